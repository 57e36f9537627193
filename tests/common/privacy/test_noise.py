"""The noise that is added, and the noised sum against its promises; the sampler itself is tested in test_gaussian.py.

A failure means that the noise is not what the accountant assumes. Seeds are fixed, so no test fails by chance.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_common.errors import LocalError
from foedus_common.privacy.gaussian import samples
from foedus_common.privacy.noise import (
    GRID,
    MAX_SIGMA,
    MIN_SIGMA,
    accounted_multiplier,
    discrete_gaussian,
    fine_grid,
    noised_sum,
)
from seeded import seeded


def test_the_noise_is_the_sampler_s() -> None:
    assert np.array_equal(discrete_gaussian(17, 100, seeded("noise")), samples(17**2, 100, seeded("noise")(32)))


def test_randomness_is_asked_for_one_key_of_each_sample() -> None:
    asked: list[int] = []

    def counting(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    discrete_gaussian(64, 100_000, counting)
    assert asked == [32]


@pytest.mark.parametrize("sigma", [0, -5, MIN_SIGMA - 1, MAX_SIGMA + 1])
def test_a_sigma_outside_the_sampler_s_range_is_refused(sigma: int) -> None:
    with pytest.raises(LocalError, match="grid units"):
        discrete_gaussian(sigma, 1, bytes)


@given(
    total=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    clip=st.floats(1e-3, 1e3),
    multiplier=st.floats(0.001, 500),
)
@settings(max_examples=50, deadline=None)
def test_the_noised_sum_is_the_rounded_sum_plus_the_noise_exactly(
    total: list[float], clip: float, multiplier: float
) -> None:
    vector = np.array(total) * clip
    noised = noised_sum(vector, clip, fine_grid(multiplier), seeded("sum"))
    drawn = discrete_gaussian(round(multiplier * GRID), vector.size, seeded("sum"))
    on_grid = noised / (clip / GRID)
    assert np.abs(on_grid - drawn - vector * (GRID / clip)).max() <= 0.5 + 1e-3
    assert np.abs(on_grid - np.rint(on_grid)).max() < 1e-3


def test_noise_is_never_truncated() -> None:
    """A total at the clamp still gets noise of both signs beyond it."""
    divisor = 100
    noised = noised_sum(np.full(10_000, float(divisor)), 1.0, fine_grid(3.0), seeded("clamp"))
    assert (noised > divisor).mean() == pytest.approx(0.5, abs=0.02)
    assert noised.std() == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_total_that_is_not_a_number_is_refused(bad: float) -> None:
    with pytest.raises(LocalError, match="not finite"):
        noised_sum(np.array([0.0, bad]), 1.0, fine_grid(1.0), bytes)


@given(multiplier=st.floats(0.01, 500), size=st.integers(1, 10**8))
def test_the_accounted_multiplier_never_flatters(multiplier: float, size: int) -> None:
    worth = accounted_multiplier(fine_grid(multiplier), size)
    exact_square = Fraction(round(multiplier * GRID)) ** 2 / (GRID + Fraction(math.isqrt(size))) ** 2
    assert Fraction(worth) ** 2 < exact_square
    assert worth == pytest.approx(multiplier * GRID / (GRID + math.sqrt(size)), rel=1e-3)


def test_rounding_moves_neighbours_apart_by_no_more_than_accounted() -> None:
    """Two sums that differ by one clipped row differ, on the grid, by at most GRID + sqrt(d) in L2."""
    generator = np.random.default_rng(0)
    total = generator.normal(size=(200, 50)) * 100
    row = generator.normal(size=(200, 50))
    row /= np.linalg.norm(row, axis=1, keepdims=True)
    apart = np.rint((total + row) * GRID) - np.rint(total * GRID)
    assert np.linalg.norm(apart, axis=1).max() <= GRID + math.sqrt(50)
