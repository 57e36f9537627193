"""Whole rounds in memory, an honest coordinator.

Failure: an opened sum that differs from the plain sum in one bit, a tolerated set of drops that does not open, or
anything opened below the threshold.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from foedus_common.errors import Reason
from foedus_common.protocol.coordinator_session import Failed, Opened
from foedus_common.protocol.thresholds import tolerated_drops

REQUESTS = range(5)
MASKED_INPUT = 2


def assert_opens_exactly(federation, state, survivors) -> None:
    assert isinstance(state, Opened), state
    assert state.survivors == tuple(sorted(survivors))
    assert state.suspects == ()
    np.testing.assert_array_equal(state.total, federation.plain_sum(state.survivors))


@pytest.mark.parametrize("sites", [3, 4, 5, 10])
def test_everybody_stays(federation, sites):
    everybody = federation(sites)
    assert_opens_exactly(everybody, everybody.run(), everybody.names)


def drops(sites: int, most: int):
    """Every way in which up to `most` of the sites fall silent, each before one of the five requests."""
    for count in range(most + 1):
        for who in combinations(range(sites), count):
            for when in product(REQUESTS, repeat=count):
                yield dict(zip(who, when, strict=True))


@pytest.mark.parametrize(
    ("sites", "colluding"), [(3, 0), (3, 1), (4, 0), (4, 1), (4, 2), (5, 0), (5, 1), (5, 2), (5, 3)]
)
def test_every_tolerated_set_of_drops_at_every_stage_opens_exactly(federation, sites, colluding):
    for pattern in drops(sites, tolerated_drops(sites, colluding)):
        world = federation(sites, colluding)
        silent_from = {world.names[who]: when for who, when in pattern.items()}
        survivors = [site for site in world.names if silent_from.get(site, 99) > MASKED_INPUT]
        assert_opens_exactly(world, world.run(silent_from), survivors)


@pytest.mark.parametrize(("sites", "colluding"), [(3, 1), (4, 1), (5, 1)])
@pytest.mark.parametrize("when", REQUESTS)
def test_one_drop_too_many_opens_nothing(federation, sites, colluding, when):
    for who in combinations(range(sites), tolerated_drops(sites, colluding) + 1):
        world = federation(sites, colluding)
        state = world.run({world.names[index]: when for index in who})
        assert isinstance(state, Failed)
        assert state.error.reason is Reason.TOO_FEW_SITES
