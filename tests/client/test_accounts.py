"""What an account admits and shows: decisions on plain values.

A failure means that plans could add up to more than a dataset's cap, or that a site is told a wrong number.
"""

from __future__ import annotations

import math
from dataclasses import replace

from dp_accounting import get_sigma_gaussian
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_client.ledger.accounts import Account, Budget, Charge, Commitment, Run
from foedus_common.privacy import accounting
from foedus_common.privacy.accounting import GaussianSteps
from plans import agreed_plan

DELTA = 1e-5


def commitment(run_id: int, noise_multiplier: float, rounds: int = 1, retries: int = 0) -> Commitment:
    """A run of one phase of unsampled Gaussians."""
    event = GaussianSteps(noise_multiplier, 1.0, 1)
    return Commitment(run_id, "d" * 64, "notes", (event,), DELTA, (rounds,), (rounds + retries,), retries)


def account(*runs: Run) -> Account:
    return Account("notes", ("notes",), {run.commitment.run_id: run for run in runs})


def open_run(of: Commitment, released: int = 0) -> Run:
    return Run(of, DELTA, tuple(Charge(number, number, 0, 0.0, "released") for number in range(released)))


def closed_run(of: Commitment, released: int) -> Run:
    return replace(open_run(of, released), open=False)


def test_a_commitment_says_what_the_plan_may_release_at_most() -> None:
    agreed = agreed_plan()
    of = Commitment.of(agreed)
    assert (of.run_id, of.plan_digest, of.dataset) == (7, agreed.digest().hex(), "coding-terms")
    assert (of.rounds, of.releases, of.retries, of.delta) == ((20, 8), (20, 10), 2, 1e-5)
    assert of.cost(of.releases) == accounting.events_of(agreed)
    assert [of.phase(index) for index in (0, 19, 20, 27)] == [0, 0, 1, 1]


def test_a_commitment_s_curve_bears_the_retries_in_any_phase() -> None:
    of = Commitment.of(agreed_plan())
    for placed in ((22, 8), (21, 9), (20, 10)):
        curve = accounting.rdp(of.cost(placed))
        assert all(bound >= value - 1e-12 for bound, value in zip(of.curve(), curve, strict=True))


def test_the_first_run_is_held_to_its_pld_exactly() -> None:
    of = commitment(1, 2.0)
    needed = accounting.epsilon(of.cost((1,)), DELTA)
    assert account().admits(of, Budget(needed, DELTA))
    assert not account().admits(of, Budget(math.nextafter(needed, 0), DELTA))


def test_a_second_run_passes_the_filter_or_not() -> None:
    """Gaussians of noise 4 each: at the filter's order both together must stay below its budget."""
    budget = Budget(3.0, DELTA)
    order, limit = accounting.rdp_budget(budget.epsilon, budget.delta)
    just = math.sqrt(2 * accounting.ORDERS[order] / (2 * limit))  # two of these fill the budget
    for noise, admitted in ((just * 1.001, True), (just * 0.999, False)):
        assert account(open_run(commitment(1, noise))).admits(commitment(2, noise), budget) is admitted


def test_a_first_run_that_only_pld_admitted_leaves_room_for_none() -> None:
    of = commitment(1, 2.0, rounds=4)
    budget = Budget(accounting.epsilon(of.cost((4,)), DELTA), DELTA)
    assert account().admits(of, budget)
    for held in (open_run(of), closed_run(of, released=1)):
        assert not account(held).admits(commitment(2, 1000.0), budget)
        assert account(held).left(budget) == 0
    assert account(closed_run(of, released=0)).admits(commitment(2, 1000.0), budget)


def test_closing_returns_what_was_not_released() -> None:
    of, budget = commitment(1, 10.0, rounds=30), Budget(3.0, DELTA)
    assert not account(open_run(of, released=3)).admits(replace(of, run_id=2), budget)
    assert account(closed_run(of, released=3)).admits(replace(of, run_id=2), budget)


def test_a_run_that_is_there_is_judged_without_itself() -> None:
    """Policy is asked again at every round: a run does not stand in its own way, and a lowered cap still bites."""
    of = commitment(1, 2.0)
    needed = of.epsilon(DELTA)
    assert account(open_run(of)).admits(of, Budget(needed, DELTA))
    assert not account(open_run(of)).admits(of, Budget(0.9 * needed, DELTA))


def test_what_is_reserved_counts_as_spent_for_the_next_decision() -> None:
    of, budget = commitment(1, 10.0, rounds=30), Budget(3.0, DELTA)
    held = account(open_run(of))
    assert held.epsilon(DELTA) == 0
    assert held.epsilon(DELTA, held=True) == of.epsilon(DELTA)
    assert not held.admits(replace(of, run_id=2), budget)


@given(noise=st.lists(st.floats(3.0, 60.0), min_size=1, max_size=3), cap=st.floats(1.0, 12.0))
@settings(max_examples=20, deadline=None)
def test_left_is_what_one_more_gaussian_may_cost(noise: list[float], cap: float) -> None:
    runs = [open_run(commitment(number, value)) for number, value in enumerate(noise)]
    budget = Budget(cap, DELTA)
    left = account(*runs).left(budget)
    assert 0 <= left <= cap
    for factor, admitted in ((0.999, True), (1.001, False)):
        if left > 0.02:
            further = commitment(99, noise_for(factor * left))
            assert account(*runs).admits(further, budget) is admitted


def noise_for(epsilon: float) -> float:
    """The noise multiplier of an unsampled Gaussian of this epsilon."""
    return get_sigma_gaussian(epsilon, DELTA - accounting.RESERVED_DELTA)


@given(noise=st.lists(st.floats(1.0, 60.0), min_size=2, max_size=4), cap=st.floats(1.0, 12.0))
@settings(max_examples=20, deadline=None)
def test_whatever_is_admitted_one_after_another_stays_within_the_cap(noise: list[float], cap: float) -> None:
    """Non-adaptive PLD of everything together is a lower bound of what the filter may let in."""
    held, budget = account(), Budget(cap, DELTA)
    for number, value in enumerate(noise):
        of = commitment(number, value)
        if held.admits(of, budget):
            held = account(*held.runs.values(), open_run(of, released=1))
    events = [event for run in held.runs.values() for event in run.cost(held=True)]
    assert accounting.epsilon(events, DELTA) <= cap


def test_one_run_is_shown_by_pld_and_several_by_renyi() -> None:
    one, two = (closed_run(commitment(number, 5.0, rounds=2), released=2) for number in (1, 2))
    assert account(one).epsilon(DELTA) == accounting.epsilon(one.cost(held=False), DELTA)
    events = one.cost(held=False) + two.cost(held=False)
    assert account(one, two).epsilon(DELTA) == accounting.epsilon_of_rdp(accounting.rdp(events), DELTA)
    assert account(one, two).epsilon(DELTA) > accounting.epsilon(events, DELTA)


def test_nothing_spent_is_zero() -> None:
    assert account().epsilon(DELTA) == account().epsilon(DELTA, held=True) == 0
    assert account().left(Budget(5.0, DELTA)) == 5.0
    assert account(closed_run(commitment(1, 2.0), released=0)).epsilon(DELTA, held=True) == 0


def test_without_privacy_nothing_is_left() -> None:
    bare = replace(commitment(1, 1.0), events=(), delta=0.0)
    assert not account().admits(bare, Budget(100.0, DELTA))
    held = account(open_run(bare, released=1))
    assert held.epsilon(DELTA) == math.inf
    assert held.left(Budget(100.0, DELTA)) == 0
    assert not held.admits(commitment(2, 1000.0), Budget(100.0, DELTA))
    assert account(closed_run(bare, released=0)).admits(commitment(2, 1000.0), Budget(100.0, DELTA))
