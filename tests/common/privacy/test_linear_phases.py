"""Rounds of one step: the noised sum goes out in the integers in which it was noised, and all sites' noises add up.

A failure means that epsilon_central is claimed where it does not hold, that a sum overflows, or that training changed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import brentq
from scipy.stats import norm

from foedus_client.round import encoded
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.privacy import noise
from foedus_common.privacy.accounting import calibrate, epsilon, epsilons, event_of_phase, events_of
from foedus_common.privacy.noise import GRID, NoiseGrid, accounted_multiplier, fine_grid, noised_sum
from foedus_common.protocol.masks import Words
from foedus_common.ranges import half_range, honest_sites, noise_grid, tail
from foedus_common.tasks.private_training import private_update
from foedus_common.tasks.text_classification import no_progress
from foedus_common.terms import field_layout
from plans import agreed_plan, run_plan
from seeded import seeded

ONE_STEP = {"phase__0__steps": 1, "phase__1__steps": 1}


def linear_plan(multipliers: tuple[float, float] = (4.0, 2.0), **changes: Any) -> AgreedPlan:
    return dataclasses.replace(agreed_plan(**(ONE_STEP | changes)), noise_multipliers=multipliers)


def uploads(agreed: AgreedPlan, round_plan: RoundPlan, total: np.ndarray, site: str) -> tuple[np.ndarray, Words]:
    """One site's update, whose clipped gradients add up to `total`, and the words that it masks."""
    update = private_update(
        np.full(total.size, 0.1), lambda _, __: total, 3, agreed, round_plan, seeded(site), no_progress
    )
    return update, encoded(update, agreed, round_plan, field_layout(agreed, round_plan), seeded(f"{site}, encoding"))


# The grid


@given(
    multiplier=st.floats(0.05, 200),
    bits=st.integers(12, 32),
    most=st.integers(3, 64),
    divisor=st.integers(1, 100_000),
)
def test_a_clamped_sum_with_the_largest_noise_fits_a_field(
    multiplier: float, bits: int, most: int, divisor: int
) -> None:
    changes = {"secure_aggregation__field_bits": bits, "secure_aggregation__max_sites": most}
    agreed = linear_plan((multiplier, 1.0), privacy__divisor=divisor, **changes)
    try:
        grid = noise_grid(agreed, 0)
    except LocalError:
        assume(False)
    layout = field_layout(agreed, schedule(agreed.plan)[0])
    assert divisor * grid.units + tail(agreed) * grid.sigma / 2**grid.halvings + 1 <= layout.half_range
    assert most * 2 * layout.half_range < 2**bits
    assert GRID <= grid.fine < 2 * GRID
    assert multiplier <= grid.sigma / grid.fine < multiplier + 1 / GRID  # never less noise than the plan says
    added = sum(8 * 4**number for number in range(1, grid.halvings + 1))
    assert grid.before_halving + added == grid.sigma**2
    assert grid.drawable == (grid.sigma >= 16 * 2**grid.halvings)
    if grid.drawable:
        assert grid.before_halving > 8


def test_a_round_of_several_steps_keeps_the_fine_grid() -> None:
    assert noise_grid(agreed_plan(), 0) == NoiseGrid(GRID, round(13.1 * GRID))
    assert noise_grid(linear_plan(), 0).halvings > 0


@pytest.mark.parametrize("changes", [{"secure_aggregation__field_bits": 12}, {"privacy__divisor": 10**7}])
def test_fields_too_narrow_for_the_noise_are_refused_with_what_to_do(changes: dict[str, Any]) -> None:
    advice = r"raise \[secure_aggregation\] field_bits, or lower max_sites or \[privacy\] divisor"
    with pytest.raises(LocalError, match=advice):
        event_of_phase(linear_plan(**changes), 0)
    with pytest.raises(LocalError, match=advice):
        calibrate(run_plan(**(ONE_STEP | changes)), (60, 100))


# The noise


def test_the_noised_sum_is_about_the_sum_itself_and_has_just_its_sigma() -> None:
    """However coarse the grid: rounding the sum to it would show in the mean, and noise beside it in the variance."""
    grid = NoiseGrid(units=4, sigma=16 << 14, halvings=14)
    total = np.repeat([0.1, -0.15, 7.03, 0.0], 100_000)  # 0.4, -0.6, 28.12 and 0 units
    drawn = noised_sum(total, 1.0, grid, seeded("coarse")) * 4
    assert np.array_equal(drawn, np.rint(drawn))
    off = (drawn - total * 4).reshape(4, -1)
    assert np.abs(off.mean(axis=1)).max() < 4 * 16 / math.sqrt(100_000)
    for part in off:
        assert 1e-3 < stats.chi2.cdf((part**2).sum() / 16**2, part.size) < 1 - 1e-3


@pytest.mark.parametrize("grid", [NoiseGrid(4, 15 << 14, 14), NoiseGrid(GRID, 513 * GRID)])
def test_noise_outside_the_samplers_range_is_not_drawn(grid: NoiseGrid) -> None:
    with pytest.raises(LocalError, match="cannot be drawn"):
        noised_sum(np.zeros(3), 1.0, grid, bytes)


# What is sent


@given(sites=st.integers(1, 16), bits=st.sampled_from([21, 24, 32]), seed=st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_the_decoded_sum_is_the_sum_of_the_noised_integers(sites: int, bits: int, seed: int) -> None:
    """The law of docs/protocol.md section 3, with nothing rounded between the noise and the sum."""
    agreed = linear_plan(secure_aggregation__field_bits=bits, phase__1__head_scale=4.0)
    for round_plan in (schedule(agreed.plan)[3], schedule(agreed.plan)[-1]):
        layout, units = field_layout(agreed, round_plan), noise_grid(agreed, round_plan.phase).units
        rates = np.concatenate(
            [
                np.full(part.length, round_plan.learning_rate(part.group) / round_plan.scale(part.group))
                for part in agreed.trained[round_plan.phase]
            ]
        )
        total = np.random.default_rng(seed).normal(size=rates.size) * 50
        sent = [uploads(agreed, round_plan, total, f"{seed} {site}") for site in range(sites)]
        integers = [np.rint(update / rates * 2000 * units).astype(np.int64) for update, _ in sent]
        summed = sum(words for _, words in sent)
        assert np.array_equal(layout.unpack_sum(summed, sites), sum(integers))
        np.testing.assert_allclose(layout.decode(summed, sites), sum(update for update, _ in sent), rtol=1e-9)


def test_an_update_that_is_not_on_the_grid_is_not_sent() -> None:
    agreed = linear_plan()
    round_plan = schedule(agreed.plan)[0]
    update, _ = uploads(agreed, round_plan, np.zeros(60), "site")
    step = half_range(agreed, round_plan, "head") / field_layout(agreed, round_plan).half_range
    for off in (step / 3, math.nan):
        with pytest.raises(LocalError, match="not whole steps"):
            encoded(update + off, agreed, round_plan, field_layout(agreed, round_plan), seeded("encoding"))


def test_what_one_site_sends_has_the_stated_sigma_and_the_fewest_sites_together_that_of_the_claim() -> None:
    agreed = linear_plan((0.6, 0.6))
    round_plan, grid = schedule(agreed.plan)[0], noise_grid(agreed, 0)
    layout = field_layout(agreed, round_plan)
    words = [uploads(agreed, round_plan, np.full(60, 5.0), f"{number}")[1] for number in range(800)]
    sigma = grid.sigma / 2**grid.halvings
    assert 16 <= sigma < 40  # so coarse that rounding would show
    alone = np.array([layout.unpack_sum(each, 1) for each in words]) + 5 * grid.units
    pairs = [layout.unpack_sum(one + other, 2) for one, other in zip(words[::2], words[1::2], strict=True)]
    together = np.array(pairs) + 2 * 5 * grid.units
    for values, width in ((alone, sigma), (together, math.sqrt(honest_sites(agreed)) * sigma)):
        share = float(stats.chi2.cdf((values**2).sum() / width**2, values.size))
        assert 1e-3 < share < 1 - 1e-3


def test_one_site_reaches_the_model_that_it_reached_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the noise: -lr * sum / divisor, added up in floating point, up to half a step of the grid a round."""
    agreed = linear_plan(secure_aggregation__field_bits=24)
    matrix = np.random.default_rng(0).normal(size=(60, 60)) / 8
    monkeypatch.setattr(noise.gaussian, "samples", lambda variance, size, key: np.zeros(size, np.int64))
    monkeypatch.setattr(noise.gaussian, "halved", lambda values, times, key: np.rint(values / 2**times).astype(int))

    def clipped_sum(vector: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return 40 * np.tanh(matrix @ vector + 0.5)

    before, after, allowed = np.zeros(60), np.zeros(60), 0.0
    for round_plan in schedule(agreed.plan)[:20]:
        layout = field_layout(agreed, round_plan)
        before = before - round_plan.learning_rate("head") * clipped_sum(before, np.arange(3)) / 2000
        update = private_update(after, clipped_sum, 3, agreed, round_plan, seeded("one"), no_progress)
        after = after + layout.decode(encoded(update, agreed, round_plan, layout, seeded("two")), 1)
        allowed += half_range(agreed, round_plan, "head") / layout.half_range
    assert np.abs(before).max() > 2
    assert np.abs(after - before).max() < allowed < 0.02


# What it costs


def exact(multiplier: float, delta: float) -> float:
    """Balle, Wang 2018, theorem 8: epsilon of one unsampled Gaussian."""

    def excess(at: float) -> float:
        z = multiplier
        return float(norm.cdf(0.5 / z - at * z) - math.exp(at + norm.logcdf(-0.5 / z - at * z))) - delta

    return float(brentq(excess, 0, 100, xtol=1e-12))


@pytest.mark.parametrize(("fewest", "colluding", "honest"), [(3, 1, 2), (3, 0, 3), (10, 2, 5), (4, 2, 2)])
def test_the_central_epsilon_is_that_of_the_honest_sites_noises(fewest: int, colluding: int, honest: int) -> None:
    secure = {"min_sites": fewest, "max_sites": 20, "colluding": colluding}
    changes = {f"secure_aggregation__{key}": value for key, value in secure.items()}
    phase = {"train": "head", "rounds": 60, "steps": 1, "sampling_rate": 1.0, "learning_rate": 1.0, "budget_share": 1.0}
    plan = run_plan(phase=[phase], **changes)
    multiplier = calibrate(plan, (60,))[0]
    agreed = dataclasses.replace(agreed_plan(phase=[phase], **changes), noise_multipliers=(multiplier,))
    found = epsilons(agreed)
    assert found is not None
    assert honest_sites(agreed) == honest
    assert 8 * 0.99 < found.local < 8 * (1 - 1e-6)  # the plan's epsilon is the local one
    for epsilon_found, noises in ((found.local, 1), (found.central, honest)):
        truth = exact(multiplier * math.sqrt(noises / (60 + 2)), 1e-5)
        assert truth <= epsilon_found <= truth * 1.003


def test_ledgers_and_the_local_view_count_a_sites_own_noise_alone() -> None:
    agreed = linear_plan()
    assert events_of(agreed, "row") == events_of(agreed, "local")
    for phase in (0, 1):
        own, together = (event_of_phase(agreed, phase, view) for view in ("local", "central"))
        assert own.noise_multiplier == accounted_multiplier(noise_grid(agreed, phase), agreed.size(phase))
        assert together.noise_multiplier == pytest.approx(math.sqrt(2) * own.noise_multiplier, rel=1e-3)
        assert dataclasses.replace(together, noise_multiplier=own.noise_multiplier) == own  # sampling counts the same


@given(multiplier=st.floats(0.05, 200), size=st.integers(1, 10**8), noises=st.integers(1, 60))
def test_no_multiplier_is_flattered(multiplier: float, size: int, noises: int) -> None:
    agreed = linear_plan((multiplier, 1.0), privacy__divisor=100)
    grid = noise_grid(agreed, 0)
    worth = accounted_multiplier(grid, size, noises)
    assert worth * (grid.fine + math.sqrt(size)) < math.sqrt(noises) * grid.sigma * (1 + 1e-12)


def test_nothing_is_claimed_for_a_phase_of_several_steps() -> None:
    agreed = linear_plan(phase__1__steps=2)
    for view in ("row", "local"):
        assert event_of_phase(agreed, 1, view) == event_of_phase(agreed, 1, "central")
    assert event_of_phase(agreed, 0, "central") != event_of_phase(agreed, 0, "local")
    found, several = epsilons(agreed), epsilons(linear_plan(phase__0__steps=2, phase__1__steps=2))
    assert found is not None
    assert several is not None
    assert found.central < found.local
    assert several.central == several.local


def test_runs_of_an_earlier_trainer_keep_their_account() -> None:
    """They rounded after the noise, and their fields may be narrower than would be agreed to now."""
    agreed = linear_plan(secure_aggregation__field_bits=12)
    earlier = dataclasses.replace(agreed, trainer_version="foedus-trainer/2")
    found = epsilons(earlier)
    assert found is not None
    assert found.central == found.local
    assert event_of_phase(earlier, 0).noise_multiplier == accounted_multiplier(fine_grid(4.0), 60)
    with pytest.raises(LocalError, match="leaves no room"):
        epsilons(agreed)


def test_retries_count_where_a_release_costs_most_to_each_view() -> None:
    """To a site its one-step rounds cost most; to the coordinator, who sees their noises added up, the other phase."""
    agreed = linear_plan((1.0, 0.3), phase__1__steps=2, secure_aggregation__min_sites=10)
    assert [event.steps for event in events_of(agreed, "local")] == [20 + 2, 2 * 8]
    assert [event.steps for event in events_of(agreed, "central")] == [20, 2 * (8 + 2)]


def test_sampling_amplifies_under_the_noise_of_all() -> None:
    """One sampled release of three sites: delta(log(1 + q (e^x - 1))) = q delta(x) (Balle, Barthe, Gaboardi 2018)."""
    agreed = linear_plan((1.2, 1.2), phase__0__sampling_rate=0.2)
    unsampled = exact(1.2 * math.sqrt(2), 1e-5 / 0.2)
    truth = math.log1p(0.2 * math.expm1(unsampled))
    assert truth <= epsilon([event_of_phase(agreed, 0, "central")], 1e-5) <= truth * 1.01


def test_the_central_epsilon_holds_in_whichever_phase_the_retries_fall() -> None:
    """Few rows under little noise cost more than their (q / z)^2 says."""
    agreed = linear_plan((0.5, 40.0), phase__0__sampling_rate=0.02, phase__1__steps=2, phase__1__sampling_rate=1.0)
    found = epsilons(agreed)
    assert found is not None
    in_turn = [event_of_phase(agreed, phase, "central") for phase in (0, 1)]
    for rounds in ((20 + 2, 8), (20, 8 + 2)):
        events = [dataclasses.replace(e, steps=e.steps * count) for e, count in zip(in_turn, rounds, strict=True)]
        assert epsilon(events, 1e-5) <= found.central
