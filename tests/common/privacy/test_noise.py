"""The exact sampler against the exact distribution, and the noised sum against its promises.

A failure means that the noise is not what the accountant assumes. Seeds are fixed, so no test fails by chance.
"""

from __future__ import annotations

import ast
import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from foedus_common.errors import LocalError
from foedus_common.privacy import noise
from foedus_common.privacy.noise import GRID, MAX_SIGMA, MIN_SIGMA, accounted_multiplier, discrete_gaussian, noised_sum
from seeded import seeded


def pmf(sigma: int, reach: int) -> np.ndarray:
    """P(-reach..reach) in double precision, summed over the integers themselves."""
    weights = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float64) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize("sigma", [16, 17, 64])
def test_samples_follow_the_exact_mass_function(sigma: int) -> None:
    samples = discrete_gaussian(sigma, 400_000, seeded(f"chi-square {sigma}"))
    reach = 3 * sigma
    expected = pmf(sigma, 40 * sigma)[37 * sigma : 43 * sigma + 1] * samples.size
    observed = np.bincount(samples[np.abs(samples) <= reach] + reach, minlength=2 * reach + 1)
    outside = samples.size - expected.sum()
    test = stats.chisquare([*observed, samples.size - observed.sum()], [*expected, outside])
    assert test.pvalue > 1e-3


@pytest.mark.parametrize("sigma", [GRID, 13 * GRID, 2**21, MAX_SIGMA])
def test_wide_samples_follow_the_gaussian_they_approach(sigma: int) -> None:
    samples = discrete_gaussian(sigma, 200_000, seeded(f"wide {sigma}")) / sigma
    assert stats.kstest(samples, "norm").pvalue > 1e-3
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(samples**power) - moment) < 4 * math.sqrt(spread / samples.size)


def test_tails_are_as_heavy_as_they_should_be() -> None:
    samples = np.abs(discrete_gaussian(64, 1_000_000, seeded("tails")))
    for deviations in (2, 3, 4):
        beyond = 1 - pmf(64, 40 * 64)[(40 - deviations) * 64 : (40 + deviations) * 64 + 1].sum()
        count = int(np.sum(samples > deviations * 64))
        assert stats.binomtest(count, samples.size, beyond).pvalue > 1e-3


def test_low_bits_are_uniform() -> None:
    """What floating-point samplers leak: every residue is equally likely, even far out."""
    samples = discrete_gaussian(13 * GRID, 200_000, seeded("low bits"))
    for chosen in (samples, samples[np.abs(samples) > 20 * GRID]):
        assert stats.chisquare(np.bincount(chosen & 15, minlength=16)).pvalue > 1e-3


@pytest.mark.parametrize("numerator", [0, 1, 3, 7, 8, 13, 24, 40])
def test_acceptance_has_the_probability_of_the_exponential(numerator: int) -> None:
    bits = noise._Bits(seeded(f"bernoulli {numerator}")(32))
    decisions = noise._bernoulli_exp(np.full(100_000, numerator), 8, bits)
    assert stats.binomtest(int(decisions.sum()), decisions.size, math.exp(-numerator / 8)).pvalue > 1e-3


@given(bound=st.integers(1, 2**62), seed=st.text(max_size=4))
@settings(max_examples=50, deadline=None)
def test_uniform_integers_stay_below_their_bound(bound: int, seed: str) -> None:
    drawn = noise._Bits(seeded(seed)(32)).below(bound, 100)
    assert drawn.min() >= 0
    assert drawn.max() < bound


@pytest.mark.parametrize("bound", [3, 5, 33, 100])
def test_uniform_integers_are_uniform(bound: int) -> None:
    drawn = noise._Bits(seeded(f"uniform {bound}")(32)).below(bound, 100_000)
    assert stats.chisquare(np.bincount(drawn, minlength=bound)).pvalue > 1e-3


def test_known_answers() -> None:
    """Pins the draw order: a change here changes every seeded simulation."""
    key = seeded("known answer")
    assert discrete_gaussian(64, 8, key).tolist() == [-46, -25, 73, 88, -78, 66, 35, -70]
    assert discrete_gaussian(13 * GRID, 4, key).tolist() == [802849, 724938, 720404, -310450]


def test_randomness_is_asked_for_one_key_of_each_sample() -> None:
    asked: list[int] = []

    def counting(count: int) -> bytes:
        asked.append(count)
        return bytes(count)

    discrete_gaussian(64, 100_000, counting)
    assert asked == [32]


def test_no_floating_point_number_decides_a_sample() -> None:
    source = "\n".join(
        inspect.getsource(part)
        for part in (
            discrete_gaussian,
            noise._Bits,
            noise._discrete_laplace,
            noise._geometric,
            noise._bernoulli_exp,
            noise._bernoulli_exp_unit,
        )
    )
    for node in ast.walk(ast.parse(source)):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not isinstance(node, ast.Div)
        assert not (isinstance(node, ast.Attribute) and node.attr in {"exp", "log", "sqrt", "float64", "random"})
    bits = noise._Bits(bytes(32))
    assert noise._discrete_laplace(64, 100, bits).dtype == np.int64
    assert bits.below(10, 3).dtype == np.int64


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
    noised = noised_sum(vector, clip, multiplier, seeded("sum"))
    drawn = discrete_gaussian(round(multiplier * GRID), vector.size, seeded("sum"))
    on_grid = noised / (clip / GRID)
    assert np.abs(on_grid - drawn - vector * (GRID / clip)).max() <= 0.5 + 1e-3
    assert np.abs(on_grid - np.rint(on_grid)).max() < 1e-3


def test_noise_is_never_truncated() -> None:
    """A total at the clamp still gets noise of both signs beyond it."""
    divisor = 100
    noised = noised_sum(np.full(10_000, float(divisor)), 1.0, 3.0, seeded("clamp"))
    assert (noised > divisor).mean() == pytest.approx(0.5, abs=0.02)
    assert noised.std() == pytest.approx(3.0, rel=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_a_total_that_is_not_a_number_is_refused(bad: float) -> None:
    with pytest.raises(LocalError, match="not finite"):
        noised_sum(np.array([0.0, bad]), 1.0, 1.0, bytes)


@given(multiplier=st.floats(0.01, 500), size=st.integers(1, 10**8))
def test_the_accounted_multiplier_never_flatters(multiplier: float, size: int) -> None:
    worth = accounted_multiplier(multiplier, size)
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
