"""A few of the faults of `make netfaults`; how soon a dead link is noticed, and how those come back who lost theirs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from foedus_simulations.parties import until
from networks import FAULTS, SITES, VICTIM, Networks, networks


@pytest.fixture(scope="module")
def four() -> Iterator[Networks]:
    with networks() as made:
        yield made


@pytest.mark.parametrize(
    ("stage", "fault", "became"),
    [
        ("mask", "stall", "finished, 1 round without the site"),
        ("survivors", "cut", "finished"),
        ("keys", "half-open, coordinator", "finished(, 1 round without the site)?"),  # back in time, or too late
    ],
)
def test_a_bad_network_is_survived(four: Networks, stage: str, fault: str, became: str) -> None:
    assert re.fullmatch(became, four.suffer(stage, FAULTS[fault]))


def test_a_dead_link_is_noticed_at_both_ends_and_others_come_back_after_longer_and_longer_pauses(
    four: Networks,
) -> None:
    """One site's packets vanish without a word; the others' connections are refused meanwhile."""
    others = [four.proxies[name] for name in SITES if name != VICTIM]
    log = four.cluster.operator.home.path / "coordinator.log"
    said, logged = (len(four.cluster.log(VICTIM)), len(log.read_text()))
    for proxy in others:
        proxy.arrivals.clear()
        proxy.refuse()
    four.proxies[VICTIM].stall()
    began = time.monotonic()
    # By its own count of silence, or gRPC's of unanswered pings.
    until(lambda: "away: " in four.cluster.log(VICTIM)[said:], 60, "the site's noticing")
    until(lambda: f"site {VICTIM} disconnected" in log.read_text()[logged:], 60, "the coordinator's noticing")
    until(lambda: all(len(proxy.arrivals) > 4 for proxy in others), 60, "the others' tries")
    tries, seconds = [len(proxy.arrivals) for proxy in others], time.monotonic() - began
    four.heal()
    # The shortest pauses are 0.1, 0.2, 0.4, 0.8, 1.6 and then 2.5 seconds; a busy machine only lengthens them.
    assert max(tries) <= 6 + seconds / 2.5
