"""What is said beside the two epsilons: that one is smaller if and only if it is, and on which conditions.

A failure means that a data-protection officer reads a claim that does not hold, or not what it rests on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from foedus_common.privacy.accounting import epsilons
from foedus_common.privacy.statement import about_epsilons
from plans import agreed_plan, by_site

ALL_ONE = {"phase__0__steps": 1, "phase__1__steps": 1}


@pytest.mark.parametrize("changes", [{}, {"phase__0__steps": 1}, {"phase__1__steps": 1}, ALL_ONE, by_site()])
def test_the_sentence_claims_less_exactly_where_the_accountant_does(changes: dict[str, Any]) -> None:
    agreed = dataclasses.replace(agreed_plan(**changes), noise_multipliers=(4.0, 2.0))
    found, said = epsilons(agreed), about_epsilons(agreed)
    assert found is not None
    assert ("is smaller because" in said) == (found.central < found.local)
    assert ("are the same" in said) == (found.central == found.local)


def test_it_names_the_sites_that_hide_a_record_and_those_that_may_not_help() -> None:
    secure = {"secure_aggregation__min_sites": 10, "secure_aggregation__colluding": 2}
    said = about_epsilons(agreed_plan(**ALL_ONE, **secure))
    assert "totals of each round, over 7 sites or more" in said
    assert "each record is hidden by the noise of at least 5 honest ones" in said
    assert "at most 2 organisations help it, with all their sites" in said
    assert "the plan's epsilon and all ledgers count a site's own noise alone" in said
    assert "at most 1 organisation helps it, with all its sites;" in about_epsilons(agreed_plan(**ALL_ONE))
    assert "no organisation helps it" in about_epsilons(agreed_plan(**ALL_ONE, secure_aggregation__colluding=0))
    by_sites = about_epsilons(agreed_plan(**by_site()))
    assert "each site is hidden by the noise of at least 2 honest ones" in by_sites
    assert "; ledgers count a site's own noise alone" in by_sites


def test_it_names_the_phases_that_the_claim_is_about() -> None:
    said = about_epsilons(agreed_plan(phase__0__steps=1))
    assert "totals of phase 1, over" in said
    assert said.endswith("The other phases have several steps a round; in both epsilons they count so.")


def test_without_privacy_nothing_is_said() -> None:
    phase = {"train": "head", "rounds": 2, "learning_rate": 1.0, "epochs": 1.0, "batch_size": 8}
    assert about_epsilons(agreed_plan(privacy={"unit": "none"}, phase=[phase])) == ""
