"""What an operator is told of a roster whose organisations have several sites.

A failure means that a run is submitted that its sites can never make a round of, or one that no dropout may hit, and
nobody was told what to do about it.
"""

from __future__ import annotations

import hashlib
import re

import pytest

from foedus_common.checks import Note
from foedus_common.identity import Roster, RosterSite
from foedus_server.cohorts import outlook, shortfall, usual_round
from plans import agreed_plan, by_site


def roster_of(*sizes: int) -> Roster:
    """Organisations with so many sites: Org 0, Org 1 and so on."""
    names = [(f"site-{o:02}-{s:03}", f"Org {o}") for o, size in enumerate(sizes) for s in range(size)]
    sites = tuple(RosterSite(name, org, hashlib.sha256(name.encode()).digest()) for name, org in names)
    return Roster(1, 1 << 40, bytes(32), sites)


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((1,) * 10, "There are 10 sites of 10 organisations. A round of all 10 sites needs 6 of them until its end."),
        (
            (5,) * 6,
            r"30 sites of 6 organisations \(up to 5 each\).* needs 18 .* any organisation may collude, with 5 sites at",
        ),
        (
            (100, 50, 50),
            r"200 sites of 3 organisations \(up to 100 each\); each sum counts the organisations of its own",
        ),
    ],
)
def test_doctor_says_what_a_round_of_the_roster_needs(sizes: tuple[int, ...], said: str) -> None:
    assert re.search(said, usual_round(roster_of(*sizes)))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((10, 1, 1), "needs 12 of them .* With fewer sites of Org 0, or more of others, some could drop out"),
        ((4, 1), "5 sites of 2 organisations .* make no round yet .* 3 are needed"),
        ((1, 1), "make no round yet .* at least 3 sites"),
    ],
)
def test_doctor_notes_a_roster_that_one_organisation_dominates(sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(Note, match=said):
        usual_round(roster_of(*sizes))


def test_a_plan_is_looked_at_before_the_sites_of_the_roster() -> None:
    usual = {"min_sites": 4, "max_sites": 40, "field_bits": 21, "retries": 2}
    two = agreed_plan(secure_aggregation={**usual, "colluding": 2})
    assert "needs 21 of them until its end, so that any 2 organisations may collude, with 10" in outlook(
        two, roster_of(*(5,) * 6)
    )
    assert "needs 9 of them until its end." in outlook(agreed_plan(), roster_of(*(1,) * 16))
    assert "With fewer sites of the largest 2 organisations" in outlook(two, roster_of(9, 5, 1, 1))
    assert "(up to 9 each), and rounds of the plan have room for 16." in outlook(agreed_plan(), roster_of(9, 9, 9))
    assert outlook(two, roster_of(2, 1, 1)).endswith("belong to 3 organisations, and 4 are needed.")
    assert outlook(agreed_plan(), roster_of(1, 1)).endswith("which make no round: its plan needs 3.")


def test_large_rounds_are_drawn_for_a_trial() -> None:
    """Two hundred sites of a hundred organisations, or of three; and of one that few others join."""
    secure = {"min_sites": 150, "max_sites": 300, "colluding": 8, "field_bits": 24, "retries": 2}
    plan = agreed_plan(secure_aggregation=secure)
    said = re.search(r"cohorts of 100 to 100 sites need (\d+) to (\d+) of them", outlook(plan, roster_of(*[2] * 100)))
    assert said is not None
    assert 55 <= int(said[1]) <= int(said[2]) <= 59  # 55 were each organisation there once, 59 if eight are there twice
    assert "2 of 2 cohorts open no sum: TOO_FEW_SITES" in outlook(plan, roster_of(100, 50, 50))
    sharing = agreed_plan(**{**by_site(), "secure_aggregation": secure})
    assert "2 of 2 cohorts open no sum: COHORT_SIZE" in outlook(sharing, roster_of(*[20] * 10))


def test_where_the_noise_of_others_counts_many_sites_of_one_organisation_ask_for_more_sites() -> None:
    secure = {"min_sites": 20, "max_sites": 40, "colluding": 1, "field_bits": 24, "retries": 2}
    plan, roster = agreed_plan(**{**by_site(), "secure_aggregation": secure}), roster_of(*(5,) * 6)
    names = [site.name for site in roster.sites]
    assert "noise of 9 honest ones in a sum, and the plan counts 10" in shortfall(names[:22], plan, roster)
    assert shortfall(names[:23], plan, roster) == ""
    assert shortfall(names[:22], agreed_plan(secure_aggregation=secure), roster) == ""  # a site's own noise alone
