"""A site's share of distributed noise: the clip is exact, the noise is what is accounted, and all of it fits a field.

A failure means that a site's update shows more than its plan says, or that a sum overflows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, schedule
from foedus_common.privacy.accounting import calibrate, epsilon, epsilons, event_of_phase, events_of
from foedus_common.privacy.site_level import clipped, noised_update
from foedus_common.protocol.thresholds import thresholds
from foedus_common.ranges import half_range, site_grid, tail
from foedus_common.terms import field_layout, noise
from plans import agreed_plan, by_site, run_plan
from seeded import seeded


def agreed_by_site(multiplier: float = 1.0, **changes: Any) -> AgreedPlan:
    agreed = agreed_plan(**(by_site() | changes))
    return dataclasses.replace(agreed, noise_multipliers=(multiplier,) * len(agreed.plan.phase))


# The grid


@given(
    multiplier=st.floats(0.05, 200),
    bits=st.integers(16, 32),
    most=st.integers(3, 64),
    colluding=st.integers(0, 1),
)
def test_a_clipped_update_with_the_largest_noise_fits_a_field(
    multiplier: float, bits: int, most: int, colluding: int
) -> None:
    changes = {
        "secure_aggregation__field_bits": bits,
        "secure_aggregation__max_sites": most,
        "secure_aggregation__colluding": colluding,
    }
    agreed = agreed_by_site(multiplier, **changes)
    try:
        grid = site_grid(agreed, 1)
    except LocalError:
        return
    layout = field_layout(agreed, schedule(agreed.plan)[-1])
    assert grid.units + tail(agreed) * grid.sigma <= layout.half_range
    assert grid.sigma >= 16
    assert math.sqrt(grid.honest) * grid.sigma >= multiplier * grid.units  # never less noise than the plan says
    assert math.sqrt(grid.honest) * grid.sigma <= multiplier * grid.units + math.sqrt(grid.honest)


def test_fields_too_narrow_for_any_noise_are_refused_with_what_to_do() -> None:
    with pytest.raises(LocalError, match="raise \\[secure_aggregation\\] field_bits"):
        site_grid(agreed_by_site(1.0, secure_aggregation__field_bits=9), 0)


@pytest.mark.parametrize(("fewest", "colluding", "honest"), [(3, 1, 2), (3, 0, 3), (10, 2, 5), (20, 4, 9), (4, 2, 2)])
def test_the_noise_is_sized_for_the_worst_sum_of_the_smallest_cohort(fewest: int, colluding: int, honest: int) -> None:
    secure = {"min_sites": fewest, "max_sites": 20, "colluding": colluding}
    agreed = agreed_by_site(**{f"secure_aggregation__{key}": value for key, value in secure.items()})
    limits = thresholds(fewest, colluding)
    assert site_grid(agreed, 0).honest == max(limits.threshold, limits.minimum) - colluding == honest


# The update


@given(st.integers(0, 2**32), st.floats(1e-6, 1e6), st.integers(1, 6000), st.floats(1e-3, 1e3))
def test_no_update_is_longer_than_the_clip_not_by_one_part_in_a_million(
    seed: int, scale: float, units: int, clip: float
) -> None:
    vector = np.random.default_rng(seed).normal(size=200) * scale
    steps = clipped(vector, clip, units)
    assert sum(int(step) ** 2 for step in steps) <= units**2
    if units >= 100:
        wanted = vector * min(1.0, clip / np.linalg.norm(vector)) * units / clip
        assert np.abs(steps - wanted).max() <= 0.5 + 0.01 * units


def test_a_long_update_is_shortened_hardly_more_than_it_must_be() -> None:
    for size in (50, 100_000):
        vector = np.random.default_rng(0).normal(size=size)
        steps = clipped(vector, 1.0, 5000)
        assert 0.99 * 5000 < np.linalg.norm(steps) <= 5000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_an_update_that_is_not_finite_counts_as_zero_and_still_gets_noise(bad: float) -> None:
    assert not clipped(np.array([1.0, bad, bad]), 1.0, 1000).any()
    agreed = agreed_by_site()
    update = np.zeros(60)
    spoilt = noised_update(update + bad, agreed, schedule(agreed.plan)[0], seeded("spoilt"))
    assert np.array_equal(spoilt, noised_update(update, agreed, schedule(agreed.plan)[0], seeded("spoilt")))


def test_the_groups_scales_are_applied_before_the_clip_and_undone_by_the_layout() -> None:
    agreed = agreed_by_site(0.05, phase__1__head_scale=4.0)
    round_plan = schedule(agreed.plan)[-1]
    update = np.concatenate([np.full(60, 0.01), np.full(40, 0.02)])  # norm 0.34 once the head counts four times
    layout, draws = field_layout(agreed, round_plan), 400
    total = np.zeros(100)
    for number in range(draws):
        integers = noised_update(update, agreed, round_plan, seeded(f"scales {number}"))
        total += layout.decode(layout.pack(integers), 1)
    grid = site_grid(agreed, 1)
    error = 5 * grid.sigma / grid.units / math.sqrt(draws)
    np.testing.assert_allclose(total[:60] / draws, 0.01, atol=error / 4)
    np.testing.assert_allclose(total[60:] / draws, 0.02, atol=error)
    assert half_range(agreed, round_plan, "adapter") == pytest.approx(4 * half_range(agreed, round_plan, "head"))


def test_the_noise_has_its_width_and_the_sum_of_the_fewest_that_of_the_plan() -> None:
    agreed = agreed_by_site(2.0)
    round_plan, grid = schedule(agreed.plan)[0], site_grid(agreed_by_site(2.0), 0)
    layout = field_layout(agreed, round_plan)
    assert noise(agreed, round_plan).unit == "site"
    shares = np.array(
        [noised_update(np.zeros(60), agreed, round_plan, seeded(f"share {n}")) for n in range(grid.honest * 500)]
    )
    assert shares.std() == pytest.approx(grid.sigma, rel=0.02)
    sums = shares.reshape(500, grid.honest, 60).sum(axis=1) * half_range(agreed, round_plan, "head") / layout.half_range
    assert sums.std() == pytest.approx(2.0 * agreed.plan.privacy.clip, rel=0.02)
    assert abs(np.corrcoef(shares[0], shares[1])[0, 1]) < 0.5


# What it costs


def test_each_view_counts_the_noise_and_the_distance_that_are_its_own() -> None:
    agreed = agreed_by_site(3.0)
    grid = site_grid(agreed, 0)
    local, central, row = (event_of_phase(agreed, 0, view) for view in ("local", "central", "row"))
    assert local.noise_multiplier == pytest.approx(grid.sigma / grid.units, rel=1e-4)
    assert central.noise_multiplier == pytest.approx(math.sqrt(grid.honest) * grid.sigma / grid.units, rel=1e-4)
    assert 3.0 * 0.9999 < central.noise_multiplier < 3.0 * 1.01
    assert row.noise_multiplier == local.noise_multiplier / 2
    assert {(event.sampling_rate, event.steps) for event in (local, central, row)} == {(1.0, 1)}


def test_retries_are_counted_where_a_release_costs_most_however_many_steps_it_trains() -> None:
    agreed = dataclasses.replace(agreed_plan(**by_site()), noise_multipliers=(3.0, 1.0))
    assert [agreed.releases(phase) for phase in (0, 1)] == [20, 8 + 2]
    assert [event.steps for event in events_of(agreed)] == [20, 10]


def test_one_row_moves_an_update_by_no_more_than_its_view_says() -> None:
    """Whatever a row does to training, both updates are clipped."""
    random = np.random.default_rng(0)
    for _ in range(100):
        one, other = (clipped(random.normal(size=30) * 10 ** random.uniform(-2, 2), 1.0, 300) for _ in range(2))
        assert np.linalg.norm(one - other) <= 2 * 300


@pytest.mark.parametrize("changes", [{}, {"secure_aggregation__min_sites": 8}, {"privacy__epsilon": 2.0}])
def test_calibration_meets_the_central_epsilon_from_below(changes: dict[str, Any]) -> None:
    plan = run_plan(**(by_site() | changes))
    multipliers = calibrate(plan, (60, 100))
    agreed = dataclasses.replace(agreed_plan(**(by_site() | changes)), noise_multipliers=multipliers)
    found = epsilons(agreed)
    target = plan.privacy.epsilon
    assert found is not None
    assert target is not None
    assert target * 0.99 <= found.central <= target * (1 - 1e-6)
    assert found.local > found.central
    assert epsilon(events_of(agreed), 1e-5) > found.local  # of one row, as ledgers count


def test_where_the_record_is_the_unit_no_view_is_better_than_another() -> None:
    agreed = agreed_plan()
    assert events_of(agreed, "row") == events_of(agreed, "local") == events_of(agreed, "central")


def test_epsilon_of_what_was_released_is_that_of_so_many_rounds() -> None:
    agreed = agreed_by_site(3.0)
    some, all_of_them = epsilons(agreed, (3, 0)), epsilons(agreed)
    assert some is not None
    assert all_of_them is not None
    assert 0 < some.central < all_of_them.central
    assert epsilons(agreed, (0, 0)) == dataclasses.replace(some, local=0.0, central=0.0)
