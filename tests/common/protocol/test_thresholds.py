"""Thresholds and set rules: the table of docs/protocol.md, and what it is for."""

from __future__ import annotations

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.protocol.thresholds import (
    Member,
    PeerRule,
    Roster,
    Thresholds,
    cohort_thresholds,
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


# --- Organisations, each with as many sites as it likes ---


def roster_of(sizes) -> Roster:
    names = [(f"site-{o:02}-{s:02}", f"org {o}") for o, size in enumerate(sizes) for s in range(size)]
    return Roster(1, bytes(32), {site: Member(bytes(32), organisation) for site, organisation in names})


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=10)


@given(SIZES, st.integers(0, 4), st.integers(0, 40), st.data())
def test_no_organisations_that_collude_can_do_what_the_protocol_promises_against(sizes, colluding, honest, data):
    """Any c of them, with all their sites: they have too few shares, cannot help to sign two survivor sets, and leave
    in every set that honest sites accept two of these, of two organisations, and as much noise as is counted."""
    roster = roster_of(sizes)
    cohort = sorted(roster.members)
    try:
        limits = cohort_thresholds(cohort, colluding, honest, roster)
    except RemoteError as error:
        event(error.reason)
        return
    event("joined")
    fallen = set(data.draw(st.permutations(range(len(sizes))))[:colluding])
    helpers = {site for site in cohort if int(roster.member(site).organisation[4:]) in fallen}
    others = [site for site in cohort if site not in helpers]
    assert len(helpers) < limits.threshold
    told = data.draw(st.lists(st.booleans(), min_size=len(others), max_size=len(others)))
    assert min(sum(told), len(others) - sum(told)) + len(helpers) < limits.threshold
    for survivors in (
        data.draw(st.sets(st.sampled_from(cohort))),
        helpers | set(data.draw(st.permutations(others))[:2]),
    ):
        try:
            require_quorum(survivors, "A4", limits, roster)
        except RemoteError:
            continue
        assert len(survivors - helpers) >= max(2, honest)
        assert len(roster.organisations(survivors - helpers)) >= 2
    assert limits.quorum - len(helpers) >= honest


@given(SIZES, st.integers(0, 4))
def test_only_too_few_organisations_keep_a_cohort_from_being_safe(sizes, colluding):
    """However many sites one has: thresholds grow, and no roster is refused."""
    roster = roster_of(sizes)
    if len(sizes) >= max(3, colluding + 2):
        limits = cohort_thresholds(roster.members, colluding, 0, roster)
        together = roster.together(roster.members, colluding)
        assert together + 2 <= limits.quorum <= len(roster.members)
        assert together == sum(sorted(sizes)[len(sizes) - colluding :])
    else:
        with pytest.raises(RemoteError):
            cohort_thresholds(roster.members, colluding, 0, roster)


@given(st.integers(3, 128), st.integers(0, 20))
def test_with_one_site_of_each_organisation_the_thresholds_are_those_of_sites(sites, colluding):
    roster = roster_of([1] * sites)
    try:
        expected = thresholds(sites, colluding)
    except LocalError:
        with pytest.raises(RemoteError) as caught:
            cohort_thresholds(roster.members, colluding, 0, roster)
        assert caught.value.reason is Reason.COHORT_SIZE
    else:
        assert cohort_thresholds(roster.members, colluding, 0, roster) == expected


@pytest.mark.parametrize(
    ("sizes", "colluding", "threshold", "drops"),
    [((5,) * 6, 1, 18, 12), ((10, 1, 1), 1, 12, 0), ((4, 1, 1), 1, 6, 0), ((3, 2, 2, 1), 2, 7, 1), ((2,) * 3, 0, 4, 2)],
)
def test_an_organisation_counts_with_all_its_sites(sizes, colluding, threshold, drops):
    roster = roster_of(sizes)
    assert cohort_thresholds(roster.members, colluding, 0, roster).threshold == threshold
    assert tolerated_drops(sum(sizes), colluding, roster.together(roster.members, colluding)) == drops


def test_too_little_honest_noise_is_refused_with_what_to_do():
    roster = roster_of([3, 1, 1])
    assert cohort_thresholds(roster.members, 1, 2, roster).quorum == 5
    with pytest.raises(
        RemoteError, match=r"have 3 of the cohort's 5 sites.* of 2 honest.* counts 3; .*smaller min_sites"
    ):
        cohort_thresholds(roster.members, 1, 3, roster)


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
