"""Epsilon against closed forms, against Rényi, and the calibration that every plan rests on.

A failure means that the ledger would understate what was released, or that a plan gets less noise than it promises.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, Part
from foedus_common.privacy import accounting
from foedus_common.privacy.accounting import (
    ORDERS,
    RESERVED_DELTA,
    GaussianSteps,
    calibrate,
    epsilon,
    epsilon_of_rdp,
    event_of_phase,
    events_of,
    gaussian_epsilon,
    rdp,
    rdp_budget,
)
from foedus_common.privacy.noise import accounted_multiplier, fine_grid
from plans import agreed_plan, run_plan

DELTA = 1e-5


REFERENCE = json.loads((Path(__file__).parents[2] / "vectors" / "epsilon.json").read_text())


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: f"{case['events']} at {case['delta']:g}")
def test_an_independent_accountant_finds_the_same_and_never_more(case: dict[str, Any]) -> None:
    """tests/vectors/generate_epsilon.py says whose it is, and how its bounds are meant: the truth is between them."""
    answer = epsilon([GaussianSteps(z, rate, steps) for rate, z, steps in case["events"]], case["delta"])
    assert case["low"] <= answer <= 1.01 * case["estimate"]
    assert answer >= case["estimate"] * (1 - 1e-4)
    assert (case["high"] - case["low"]) / case["estimate"] < 0.005


def test_there_are_thirty_cases_of_all_kinds() -> None:
    rates = [rate for case in REFERENCE for rate, _, _ in case["events"]]
    assert len(REFERENCE) >= 30
    assert min(rates) <= 0.001 < 0.5 < max(rates) == 1
    assert sum(len(case["events"]) > 1 for case in REFERENCE) >= 2


def analytic_delta(noise_multiplier: float, at: float) -> float:
    """Balle, Wang 2018, theorem 8: delta of one unsampled Gaussian at epsilon `at`."""
    z = noise_multiplier
    return float(norm.cdf(0.5 / z - at * z) - math.exp(at + norm.logcdf(-0.5 / z - at * z)))


def analytic_epsilon(noise_multiplier: float, delta: float) -> float:
    if analytic_delta(noise_multiplier, 0.0) <= delta:
        return 0.0
    return float(brentq(lambda at: analytic_delta(noise_multiplier, at) - delta, 0, 300, xtol=1e-12))


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.6, 5.0, 13.1, 40.0])
@pytest.mark.parametrize("steps", [1, 3, 66])
def test_unsampled_steps_cost_what_the_analytic_gaussian_says(noise_multiplier: float, steps: int) -> None:
    exact = analytic_epsilon(noise_multiplier / math.sqrt(steps), DELTA)
    answer = epsilon([GaussianSteps(noise_multiplier, 1.0, steps)], DELTA)
    assert exact <= answer <= exact * 1.01 + 1e-9


@pytest.mark.parametrize(("noise_multiplier", "rate"), [(1.0, 0.17), (0.6, 0.5), (2.0, 0.01)])
def test_one_sampled_step_costs_what_amplification_says(noise_multiplier: float, rate: float) -> None:
    """With q rows sampled, delta(log(1 + q (e^x - 1))) = q delta(x), exactly (Balle, Barthe, Gaboardi 2018)."""
    unsampled = analytic_epsilon(noise_multiplier, DELTA / rate)
    exact = math.log1p(rate * math.expm1(unsampled))
    answer = epsilon([GaussianSteps(noise_multiplier, rate, 1)], DELTA)
    assert exact <= answer <= exact * 1.01


def test_both_accountants_agree_on_many_sampled_steps() -> None:
    """Abadi's moments accountant example: q 0.01, sigma 4, 10,000 steps gives 1.26 at 1e-5; PLD is tighter."""
    events = [GaussianSteps(4.0, 0.01, 10_000)]
    assert epsilon(events, DELTA) == pytest.approx(0.95, abs=0.02)
    assert epsilon(events, DELTA) < epsilon_of_rdp(rdp(events), DELTA) < 1.26


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("event", [(0.7, 0.17, 5), (1.0, 1.0, 3), (1.0, 0.01, 50), (13.0, 0.5, 40)])
def test_pld_is_never_above_the_renyi_bound(event: tuple[float, float, int], delta: float) -> None:
    events = [GaussianSteps(*event)]
    assert 0 < epsilon(events, delta) <= epsilon_of_rdp(rdp(events), delta)


def test_no_release_costs_nothing() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([GaussianSteps(1.0, 0.5, 0), GaussianSteps(1.0, 1.0, 0)], DELTA) == 0
    assert rdp([]) == (0.0,) * len(ORDERS)
    assert epsilon_of_rdp(rdp([]), DELTA) == 0
    assert gaussian_epsilon(0.0, DELTA) == 0


def test_the_order_and_grouping_of_events_do_not_matter() -> None:
    one = [GaussianSteps(1.0, 0.17, 4), GaussianSteps(13.0, 1.0, 6), GaussianSteps(1.0, 0.17, 2)]
    other = [GaussianSteps(13.0, 1.0, 2), GaussianSteps(1.0, 0.17, 6), GaussianSteps(13.0, 1.0, 4)]
    assert epsilon(one, DELTA) == epsilon(other, DELTA)


def test_curves_add_up() -> None:
    head, adapter = GaussianSteps(13.0, 1.0, 6), GaussianSteps(1.0, 0.17, 4)
    assert rdp([head, adapter]) == pytest.approx(np.add(rdp([head]), rdp([adapter])))
    assert rdp([head]) == pytest.approx([order * 6 / (2 * 13.0**2) for order in ORDERS])


def test_a_hostile_plan_is_answered_fast_and_never_flattered() -> None:
    """A plan with hardly any noise, or with more steps than anybody takes, must not cost gigabytes."""
    for event in (GaussianSteps(1e-4, 0.5, 10), GaussianSteps(0.02, 1.0, 1), GaussianSteps(0.6, 0.9, 10**12)):
        start = time.process_time()
        assert epsilon([event], DELTA) > 250
        assert time.process_time() - start < 5


@pytest.mark.parametrize("delta", [0.0, RESERVED_DELTA, 2 * RESERVED_DELTA])
def test_a_delta_that_the_reserve_eats_is_refused(delta: float) -> None:
    with pytest.raises(LocalError, match="too small"):
        epsilon([GaussianSteps(1.0, 1.0, 1)], delta)


def test_the_reserve_counts() -> None:
    """At a delta near the reserve the answer is the one for what is left of it."""
    delta = 3 * RESERVED_DELTA
    answer = epsilon([GaussianSteps(2.0, 1.0, 1)], delta)
    assert answer >= analytic_epsilon(2.0, delta - RESERVED_DELTA) > analytic_epsilon(2.0, delta)


def test_every_release_of_the_run_is_counted_with_the_noise_it_is_worth() -> None:
    agreed = agreed_plan()
    head, adapter = events_of(agreed)
    assert head == GaussianSteps(accounted_multiplier(fine_grid(13.1), 60), 1.0, 3 * 20)
    assert adapter == GaussianSteps(
        accounted_multiplier(fine_grid(1.0), 100), 0.17, 2 * (8 + 2)
    )  # 2 retries, costliest here
    assert event_of_phase(agreed, 1) == dataclasses.replace(adapter, steps=2)


def test_a_plan_without_privacy_has_no_events() -> None:
    plain = agreed_plan(
        privacy={"unit": "none"},
        phase=[{"train": "head", "rounds": 2, "learning_rate": 1.0, "epochs": 1.0, "batch_size": 8}],
    )
    assert calibrate(plain.plan, (60,)) == ()
    with pytest.raises(LocalError, match="no privacy"):
        events_of(plain)


@pytest.mark.parametrize("multiplier", [1e-5, 2e-4])
def test_a_plan_with_less_noise_than_can_be_drawn_is_refused(multiplier: float) -> None:
    with pytest.raises(LocalError, match="than can be drawn"):
        events_of(with_multipliers((multiplier, multiplier)))


def with_multipliers(multipliers: tuple[float, ...], **changes: object) -> AgreedPlan:
    return dataclasses.replace(agreed_plan(**changes), noise_multipliers=multipliers)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"privacy__epsilon": 0.5},
        {"privacy__epsilon": 3.0, "secure_aggregation__retries": 0},
        {"phase__0__sampling_rate": 0.5, "phase__0__rounds": 2},
        {"privacy__epsilon": 60.0},
    ],
)
def test_calibration_meets_epsilon_from_below(changes: dict[str, object]) -> None:
    plan = run_plan(**changes)
    multipliers = calibrate(plan, (60, 100))
    reached = epsilon(events_of(with_multipliers(multipliers, **changes)), DELTA)
    target = plan.privacy.epsilon
    assert target is not None
    assert target * 0.997 <= reached <= target * (1 - 1e-6)
    assert calibrate(plan, (60, 100)) == multipliers


def test_calibration_gives_each_phase_its_share_of_rho() -> None:
    plan = run_plan()
    head, adapter = calibrate(plan, (60, 100))
    rho = [3 * 20 * (1.0 / head) ** 2, 2 * 8 * (0.17 / adapter) ** 2]
    assert rho[0] / sum(rho) == pytest.approx(0.3, rel=1e-3)


def test_calibration_of_the_plan_in_the_documents_composes_few_curves() -> None:
    """It takes a second or two: each of them takes a tenth of one."""
    accounting._epsilon.cache_clear()
    accounting._losses_of_step.cache_clear()
    calibrate(run_plan(), (7720, 16936))
    assert accounting._epsilon.cache_info().misses <= 8
    assert accounting._losses_of_step.cache_info().misses <= 16


def test_a_plan_that_no_noise_can_meet_is_refused() -> None:
    with pytest.raises(LocalError, match="beyond 512 times"):
        calibrate(run_plan(privacy__epsilon=0.01, phase__0__steps=1000), (60, 100))


@given(cap=st.floats(0.5, 50), delta=st.sampled_from([1e-3, 1e-5, 1e-9]))
def test_the_filter_keeps_what_it_admits_within_the_cap(cap: float, delta: float) -> None:
    index, budget = rdp_budget(cap, delta)
    if budget > 0:
        curve = [math.inf] * len(ORDERS)
        curve[index] = budget
        assert epsilon_of_rdp(curve, delta) == pytest.approx(cap)


def test_the_filter_is_nearly_as_generous_as_the_best_order_to_a_gaussian() -> None:
    index, budget = rdp_budget(8.0, DELTA)
    rho = budget / ORDERS[index]
    assert epsilon_of_rdp(tuple(rho * order for order in ORDERS), DELTA) == pytest.approx(8.0)
    assert 0.8 * 8.0 < gaussian_epsilon(rho, DELTA) < 8.0


def test_the_demo_s_numbers_are_those_of_the_documents() -> None:
    """docs/privacy.md, "The demo's numbers, step by step"; two phases of 7,700 and 26,132 numbers."""
    head = {"train": "head", "rounds": 20, "steps": 3, "sampling_rate": 1.0, "learning_rate": 48.0}
    adapter = {"train": "adapter", "rounds": 8, "steps": 2, "sampling_rate": 0.2, "learning_rate": 24.0}
    changes = {"phase": [phase | {"decay": "linear", "budget_share": 0.5} for phase in (head, adapter)]}
    multipliers = calibrate(run_plan(**changes), (7_700, 26_132))
    layout = ((Part("head", 7_700),), (Part("head", 7_700), Part("adapter", 18_432)))
    agreed = dataclasses.replace(with_multipliers(multipliers, **changes), trained=layout)
    assert [round(z, 4) for z in multipliers] == [9.4103, 0.9719]
    asked = events_of(agreed)
    assert [(round(event.noise_multiplier, 4), event.steps) for event in asked] == [(9.3972, 60), (0.9695, 20)]
    assert [round(epsilon([event], DELTA), 2) for event in asked] == [3.50, 6.99]
    assert (round(epsilon(asked, DELTA), 2), round(epsilon(asked, 1e-8), 1)) == (7.99, 11.2)
    made = [asked[0], dataclasses.replace(asked[1], steps=16)]
    assert round(epsilon(made, DELTA), 2) == 7.40
    index, room = rdp_budget(16.0, DELTA)
    kept, wanted = rdp(made)[index], rdp(asked)[index]
    assert (ORDERS[index], round(room, 2), round(wanted, 2), round(kept, 2)) == (3, 11.20, 4.16, 3.53)
    assert kept + wanted < room < 2 * kept + wanted
    assert round(epsilon_of_rdp(rdp(asked), DELTA), 2) == 8.96
