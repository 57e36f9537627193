"""Site policy: for every key, a plan that exceeds it by the smallest step is refused, and one at the limit is not.

A failure means that a site takes part in something that its administrator ruled out.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from foedus_client.ledger.accounts import Account, Charge, Commitment, Run
from foedus_client.policy import Allowed, Facts, Refused, SitePolicy, capped, decide
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.privacy import accounting
from foedus_common.tables import parse
from plans import agreed_plan, by_site

MODEL = "a" * 64
PLAN = agreed_plan()
EPSILON = accounting.epsilon(accounting.events_of(PLAN), 1e-5)
RARE = replace(
    agreed_plan(
        **{
            f"phase__{phase}__{key}": value
            for phase in (0, 1)
            for key, value in {"sampling_rate": 1e-6, "rounds": 1}.items()
        },
        secure_aggregation__retries=0,
    ),
    noise_multipliers=(0.13, 0.13),
)
"""Five draws of one row in a million, and then with hardly any noise: at a delta of 1e-5 that is an epsilon of 0."""
UNTRUE = replace(PLAN, noise_multipliers=(1.0, 1.0))
ROUND = max(accounting.epsilon([accounting.event_of_phase(PLAN, phase)], 1e-5) for phase in (0, 1))
ROOMY = {"max_epsilon_per_run": 900.0, "max_epsilon_per_day": 900.0, "max_epsilon_lifetime": 900.0}
POLICY = SitePolicy(max_epsilon_per_run=EPSILON, max_epsilon_per_day=ROUND, max_epsilon_lifetime=EPSILON)
FACTS = Facts("St. Mary", {"mary": "St. Mary", "north": "North Clinic"}, frozenset({MODEL}), 0)
FRESH = Account("coding-terms", ("coding-terms",))
LARGE = agreed_plan(secure_aggregation__min_sites=129, secure_aggregation__max_sites=300)
BARE = agreed_plan(
    privacy={"unit": "none"},
    phase=[{"train": "head", "rounds": 2, "learning_rate": 1.0, "epochs": 1.0, "batch_size": 8}],
)


def used_up() -> Account:
    """The same dataset after another run of the same cost."""
    run = Run(Commitment.of(replace(PLAN, run_id=6)), 1e-5)
    return Account("coding-terms", ("coding-terms",), {6: run})


def after_a_bare_release() -> Account:
    run = Run(Commitment.of(replace(BARE, run_id=6)), 1e-5, (Charge(2, 0, 0, 0.0, "released"),), open=False)
    return Account("coding-terms", ("coding-terms",), {6: run})


def test_a_plan_at_every_limit_is_allowed() -> None:
    at_the_limit = replace(POLICY, min_sites=3, must_include=("North Clinic",), base_models=(MODEL,), max_rank=4)
    assert decide(PLAN, FACTS, at_the_limit, FRESH) == Allowed(needs_approval=True)
    assert decide(PLAN, FACTS, replace(POLICY, require_approval=False), FRESH) == Allowed(needs_approval=False)


EXCEEDED: list[tuple[str, dict[str, Any], str]] = [
    ("max_epsilon_per_run", {"policy": {"max_epsilon_per_run": EPSILON * (1 - 1e-12)}}, "max_epsilon_per_run"),
    ("max_epsilon_per_day", {"policy": {"max_epsilon_per_day": ROUND * (1 - 1e-12)}}, "single round.*per_day"),
    ("max_epsilon_lifetime", {"policy": {"max_epsilon_lifetime": EPSILON * (1 - 1e-12)}}, "max_epsilon_lifetime"),
    ("max_epsilon_lifetime, used", {"account": used_up()}, "has spent or reserved"),
    ("delta", {"policy": {"delta": 0.9e-5}}, "max_epsilon_per_run"),
    ("min_sites", {"policy": {"min_sites": 4}}, "min_sites is 4"),
    ("min_sites, drawn", {"plan": LARGE, "policy": {"min_sites": 65}}, "sums of 64 sites, and .* min_sites is 65"),
    ("colluding", {"policy": {"colluding": 2}}, "withstands 1 colluding organisations.* is 2"),
    ("must_include", {"policy": {"must_include": ("South Clinic",)}}, "no site of 'South Clinic'"),
    ("must_include, itself", {"policy": {"must_include": ("St. Mary",)}}, "own organisation"),
    ("base_models", {"policy": {"base_models": ("b" * 64,)}}, "base_models"),
    ("tasks", {"policy": {"tasks": ()}}, "not among \\[policy\\] tasks"),
    ("max_rank", {"policy": {"max_rank": 3}}, "rank 4, and \\[policy\\] max_rank is 3"),
    ("allow_without_privacy", {"plan": BARE}, "allow_without_privacy is false"),
    ("hidden behind delta", {"plan": RARE}, "hides behind delta: at 1e-08"),
    ("stated epsilon", {"plan": UNTRUE, "policy": ROOMY}, "its noise gives"),
    ("trainer", {"plan": replace(PLAN, trainer_version="foedus-trainer/0")}, "foedus-trainer/0"),
    ("model here", {"facts": {"models": frozenset()}}, "foedus-site model add"),
    ("dataset here", {"account": None}, "foedus-site data add"),
    ("labels", {"facts": {"foreign_rows": 1}}, "1 rows whose label"),
]


@pytest.mark.parametrize(("change", "sentence"), [case[1:] for case in EXCEEDED], ids=[case[0] for case in EXCEEDED])
def test_one_step_beyond_is_refused_with_one_sentence(change: dict[str, Any], sentence: str) -> None:
    plan: AgreedPlan = change.get("plan", PLAN)
    facts = replace(FACTS, **change.get("facts", {}))
    policy = replace(POLICY, **change.get("policy", {}))
    verdict = decide(plan, facts, policy, change.get("account", FRESH))
    assert isinstance(verdict, Refused)
    assert re.search(sentence, verdict.reasons[0])
    if change.get("policy") != {"delta": 0.9e-5}:  # a smaller delta exceeds all caps
        assert len(verdict.reasons) == 1


def test_every_reason_is_given() -> None:
    verdict = decide(PLAN, FACTS, replace(POLICY, max_rank=1, min_sites=5, max_epsilon_per_run=0.1), FRESH)
    assert isinstance(verdict, Refused)
    assert len(verdict.reasons) == 3


def test_every_key_of_the_policy_is_held_by_a_case() -> None:
    cases = " ".join(name for name, _, _ in EXCEEDED) + " require_approval secure_aggregation"
    assert [key for key in SitePolicy.__dataclass_fields__ if key not in cases] == []


def test_secure_aggregation_cannot_be_turned_off() -> None:
    with pytest.raises(LocalError, match="must be one of 'required'"):
        parse(SitePolicy, {"secure_aggregation": "optional"}, "[policy]")


def test_defaults_are_on_the_safe_side() -> None:
    policy = parse(SitePolicy, {}, "[policy]")
    assert policy.require_approval
    assert not policy.allow_without_privacy
    assert policy.secure_aggregation == "required"
    assert policy.min_sites >= 3
    assert policy.colluding >= 1
    assert policy.max_epsilon_per_run <= 8


@pytest.mark.parametrize(
    "table",
    [
        {"max_epsilon_per_run": 0.0},
        {"max_epsilon_lifetime": -1.0},
        {"max_epsilon_per_day": 0.0},
        {"max_epsilon_lifetime": float("inf")},
        {"max_epsilon_per_run": float("nan")},
        {"delta": 0.0},
        {"delta": 0.01},
        {"min_sites": 2},
        {"max_rank": 0},
        {"max_epsilon": 3.0},
    ],
)
def test_a_policy_that_cannot_be_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(LocalError):
        parse(SitePolicy, table, "[policy]")


def test_without_privacy_only_where_policy_says_so() -> None:
    lax = replace(POLICY, allow_without_privacy=True)
    assert isinstance(decide(BARE, FACTS, lax, FRESH), Allowed)
    assert not capped(BARE, lax, FRESH)
    assert capped(BARE, POLICY, FRESH)
    assert capped(PLAN, lax, FRESH)


def test_a_bare_release_ends_the_cap_only_where_policy_allows_such_releases() -> None:
    lax = replace(POLICY, allow_without_privacy=True)
    assert isinstance(decide(PLAN, FACTS, lax, after_a_bare_release()), Allowed)
    assert isinstance(decide(PLAN, FACTS, POLICY, after_a_bare_release()), Refused)


def test_caps_hold_what_a_plan_by_site_can_tell_of_one_row() -> None:
    """Its own epsilon counts on the noise of others, and on the whole site's update against none."""
    plan = replace(agreed_plan(**by_site()), noise_multipliers=(30.0, 20.0))
    local = Commitment.of(plan).epsilon(POLICY.delta)
    found = accounting.epsilons(plan)
    assert found is not None
    assert found.central < found.local < local
    roomy = replace(POLICY, max_epsilon_per_run=1.01 * local, max_epsilon_lifetime=1.01 * local)
    assert isinstance(decide(plan, FACTS, roomy, FRESH), Allowed)
    verdict = decide(plan, FACTS, replace(roomy, max_epsilon_per_run=0.99 * local), FRESH)
    assert isinstance(verdict, Refused)
    assert "max_epsilon_per_run" in verdict.reasons[0]


def test_a_plan_by_site_must_keep_the_central_epsilon_that_it_states() -> None:
    plan = replace(agreed_plan(**by_site()), noise_multipliers=(1.0, 1.0))
    verdict = decide(plan, FACTS, replace(POLICY, max_epsilon_per_run=900.0, max_epsilon_lifetime=900.0), FRESH)
    assert isinstance(verdict, Refused)
    assert "its noise gives" in verdict.reasons[0]
