"""Attacks known to work on Flower 1.41's SecAgg+ succeed there and fail here, in one run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from attacks import alive_and_dead, alive_then_dead
from cheating import VICTIM, Cheat, Federation
from foedus_common.protocol.site_stages import Failed
from guessing import betray, guess, near
from secaggplus import alive_and_dead as alive_and_dead_there
from secaggplus import brute_force as brute_force_there

UPDATES = np.random.default_rng(0).uniform(-1, 1, (5, 1000)).astype(np.float32)


@pytest.fixture
def cheat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cheat]:
    federation = Federation(tmp_path_factory.mktemp("federation"))
    made = Cheat(federation, 1)
    made.begin()
    yield made
    made.close()
    federation.close()


def test_alive_and_dead_recovers_a_vector_from_secaggplus() -> None:
    """n = 5 and t = 4, as here. The round ends with the right average and nobody is told."""
    recovered = alive_and_dead_there(UPDATES, victim=0, threshold=4)
    np.testing.assert_allclose(recovered, UPDATES[0], atol=1e-6)


@pytest.mark.parametrize("play", [alive_and_dead, alive_then_dead])
def test_alive_and_dead_recovers_nothing_here(cheat: Cheat, play) -> None:
    site = play(cheat)
    assert isinstance(cheat.stage(site), Failed)
    assert cheat.open().vectors == {}


def test_28_bits_recover_a_vector_from_secaggplus() -> None:
    """Told 10 of the 28 bits to save time; the rate gives the time for all of them."""
    search = brute_force_there(UPDATES[:2], told_bits=10)
    assert search.vector is not None
    np.testing.assert_allclose(search.vector, UPDATES[0], atol=1e-6)
    assert search.seconds_in_full < 24 * 3600


def test_guesses_recover_nothing_here(cheat: Cheat) -> None:
    """All masks but one are given away, and 246 bits of that one suffice; none of them, and no search ends."""
    covered = betray(cheat)
    told = guess(covered, near(covered.key, bits=10)).vector
    np.testing.assert_array_equal(told, cheat.federation.known(VICTIM, cheat.run_id, 0))
    search = guess(covered, near(bytes(32), bits=10))
    assert search.vector is None
    assert search.years_in_full > 1e50
