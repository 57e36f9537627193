"""A few of the faults of `make netfaults`; how soon a dead link is noticed, and how those come back who lost theirs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from foedus_simulations.parties import until
from networks import FAULTS, SITES, VICTIM, Networks, networks

NOTICED_WITHIN = 15.0
LONGEST_PAUSE = 7.5
"""Seconds: five, and half as much again by chance."""


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
    noticed: dict[str, float] = {}

    def both() -> bool:
        if "away: " in four.cluster.log(VICTIM)[said:]:  # by its own count of silence, or gRPC's of unanswered pings
            noticed.setdefault("site", time.monotonic() - began)
        if f"site {VICTIM} disconnected" in log.read_text()[logged:]:
            noticed.setdefault("coordinator", time.monotonic() - began)
        return len(noticed) == 2

    until(both, 30, "both ends' noticing")
    assert max(noticed.values()) < NOTICED_WITHIN, noticed
    pauses = [[later - earlier for earlier, later in pairwise(proxy.arrivals)] for proxy in others]
    four.heal()
    for each in pauses:
        assert len(each) >= 3
        assert each[-1] > 2 * each[0]
        assert max(each) < LONGEST_PAUSE + 1  # and how long it takes to try
    assert len({round(each[-1], 2) for each in pauses}) == len(others)
