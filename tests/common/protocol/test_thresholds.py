"""Thresholds and set rules: the table of docs/protocol.md, and what it is for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.protocol.thresholds import (
    Member,
    PeerRule,
    Roster,
    Thresholds,
    require_peers,
    require_quorum,
    thresholds,
    tolerated_drops,
)

ROSTER = Roster(
    epoch=3,
    digest=bytes(32),
    members={site: Member(bytes(32), site[0]) for site in ("a1", "a2", "b1", "b2", "c1", "d1")},
)


@pytest.mark.parametrize(
    ("sites", "colluding", "threshold"), [(3, 1, 3), (4, 1, 3), (5, 1, 4), (10, 2, 7), (20, 4, 13), (100, 20, 61)]
)
def test_the_table(sites, colluding, threshold):
    limits = thresholds(sites, colluding)
    assert limits.threshold == threshold
    assert limits.minimum == max(3, colluding + 2)
    assert tolerated_drops(sites, colluding) == sites - max(threshold, limits.minimum)


@given(st.integers(3, 128), st.integers(0, 126))
def test_honest_sites_cannot_be_split(sites, colluding):
    """Two survivor sets with t signatures each need more than c sites to sign both."""
    try:
        limits = thresholds(sites, colluding)
    except LocalError:
        assert colluding > sites - 2
    else:
        assert 2 * limits.threshold - sites > colluding
        assert limits.minimum - colluding >= 2
        assert limits.quorum <= sites


@pytest.mark.parametrize(
    ("sites", "colluding", "says"),
    [
        (2, 0, "at least 3"),
        (2, 1, "at least 3"),
        (0, 0, "at least 3"),
        (129, 1, "at most 128"),
        (3, 2, "collude"),
        (5, -1, "-1"),
    ],
)
def test_unsafe_cohorts_are_refused_in_words(sites, colluding, says):
    with pytest.raises(LocalError, match=says):
        thresholds(sites, colluding)


class TestQuorum:
    limits = Thresholds(threshold=4, minimum=3)

    def test_enough_sites_of_enough_organisations(self):
        require_quorum(["a1", "a2", "b1", "c1"], "A2", self.limits, ROSTER)

    @pytest.mark.parametrize("sites", [["a1", "b1", "c1"], ["a1", "a1", "b1", "c1"], ["a1", "a2", "b1", "b2"]])
    def test_too_few_sites_or_organisations(self, sites):
        with pytest.raises(RemoteError) as caught:
            require_quorum(sites, "A2", self.limits, ROSTER)
        assert caught.value.reason is Reason.TOO_FEW_SITES

    def test_unknown_site(self):
        with pytest.raises(RemoteError) as caught:
            require_quorum(["a1", "b1", "c1", "x1"], "A2", self.limits, ROSTER)
        assert (caught.value.reason, caught.value.suspects) == (Reason.UNKNOWN_SITE, ("x1",))


class TestPeers:
    def test_named_organisations_are_there(self):
        require_peers(["a1", "b1", "c1"], "A0", PeerRule(frozenset("bc"), 2), "a1", ROSTER)

    @pytest.mark.parametrize(
        "sites",
        [["a1", "b1", "d1"], ["a1", "a2", "b1", "d1"], ["a1", "b1", "b2"]],
        ids=["one", "own organisation", "two sites of one"],
    )
    def test_missing_peers(self, sites):
        with pytest.raises(RemoteError) as caught:
            require_peers(sites, "A0", PeerRule(frozenset("abc"), 2), "a1", ROSTER)
        assert caught.value.reason is Reason.COHORT_LACKS_PEERS

    def test_no_rule_asks_for_nobody(self):
        require_peers(["a1"], "A0", PeerRule(), "a1", ROSTER)
