"""The sampler's tables against the definition, its inversion at every edge, and its samples against the exact sampler.

A failure means that the noise is not what the accountant assumes. Seeds are fixed, so no test fails by chance.
"""

from __future__ import annotations

import ast
import inspect
import json
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from exact_gaussian import Bits, bernoulli_exp, exact_discrete_gaussian
from foedus_common.privacy import gaussian
from foedus_common.privacy.gaussian import BITS, HALVING, decomposition, halved, samples, table
from foedus_common.privacy.noise import GRID, MAX_SIGMA, MIN_SIGMA
from seeded import seeded

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "discrete_gaussian.json").read_text())
KEYS = [seeded(f"key {number}")(32) for number in range(12)]


def mass(variance: int, value: int, half: bool = False) -> Fraction:
    """P(value), from the table."""
    cumulative = (0, *table(variance, half).cumulative, 1 << BITS)
    place = value - table(variance, half).lowest
    return Fraction(cumulative[place + 1] - cumulative[place], 1 << BITS) if 0 <= place < len(cumulative) - 1 else 0


# Tables


@pytest.mark.parametrize("variance", [1, 8, 256, 300, 4096, 128**2])
def test_a_table_is_the_distribution_to_75_digits(variance: int) -> None:
    with localcontext() as context:
        context.prec = 110
        weights = {k: (-Decimal(k * k) / (2 * variance)).exp() for k in range(int(25 * variance**0.5) + 25)}
        total = weights[0] + 2 * sum(list(weights.values())[1:])
        running, found = Decimal(0), table(variance)
        for value in range(-max(weights), max(weights)):
            running += weights[abs(value)]
            place = value - found.lowest
            if 0 <= place < len(found.cumulative):
                assert abs(Decimal(found.cumulative[place]) / (1 << BITS) - running / total) < Decimal(2) ** -250
            else:
                assert min(running, total - running) / total < Decimal(2) ** -250


def test_a_table_about_one_half_is_its_distribution_to_75_digits() -> None:
    with localcontext() as context:
        context.prec = 110
        weights = {k: (-Decimal((2 * k - 1) ** 2) / (8 * HALVING)).exp() for k in range(-90, 92)}
        for value in weights:
            found = mass(HALVING, value, half=True)
            expected = weights[value] / sum(weights.values())
            assert abs(Decimal(found.numerator) / Decimal(found.denominator) - expected) < Decimal(2) ** -250


@pytest.mark.parametrize("centre", [0, 1, -7])
def test_a_half_of_a_gaussian_has_the_probabilities_of_a_gaussian_to_60_digits(centre: int) -> None:
    """Also about a centre that is no whole number any more: that is what makes rounding unnecessary."""
    variance, at_zero = 300, None
    reach = 1 - table(variance).lowest
    with localcontext() as context:
        context.prec = 110
        for value in (0, 1, 5, -40):
            found = sum(
                mass(variance, x - centre) * mass(HALVING, value - (x >> 1), bool(x & 1))
                for x in range(centre - reach, centre + reach + 1)
            )
            off = Decimal(value) - Decimal(centre) / 2
            expected = (-off * off / (2 * (Decimal(variance) / 4 + HALVING))).exp()
            ratio = Decimal(found.numerator) / Decimal(found.denominator) / expected
            at_zero = at_zero or ratio
            assert abs(ratio / at_zero - 1) < Decimal(10) ** -60


def test_tables_fit_two_bytes() -> None:
    assert table(gaussian._WIDEST).lowest > -5000 / 2 > -(2**15)


@given(st.integers(1, MAX_SIGMA**2))
def test_a_decomposition_has_the_variance_and_is_smooth_enough(variance: int) -> None:
    parts = decomposition(variance)
    assert sum(factor**2 * narrow for factor, narrow in parts) == variance
    assert parts[0][0] == 1
    assert len(parts) <= 6
    assert all(1 <= narrow <= gaussian._WIDEST for _, narrow in parts)
    below = parts[0][1]
    for factor, narrow in parts[1:]:
        smoothing = Fraction(below * narrow, below + factor**2 * narrow)
        assert smoothing > Fraction(79, 10)
        below += factor**2 * narrow


@pytest.mark.parametrize("variance", [128**2 + 1, 20_000, 3 * 128**2 + 5])
def test_a_sum_has_the_probabilities_of_the_gaussian_to_60_digits(variance: int) -> None:
    (_, narrow), (factor, wide) = decomposition(variance)
    at_zero = None
    with localcontext() as context:
        context.prec = 110
        for value in (0, 1, 2, 7, 100, 333, -500):
            reach = 1 - table(wide).lowest
            found = sum(mass(narrow, value - factor * z) * mass(wide, z) for z in range(-reach, reach + 1))
            probability = Decimal(found.numerator) / Decimal(found.denominator)
            at_zero = at_zero or probability
            expected = (-Decimal(value * value) / (2 * variance)).exp()
            assert abs(probability / at_zero / expected - 1) < Decimal(10) ** -60


# Inversion


class Scripted:
    """A stream whose bytes are given."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = list(pieces)

    def take(self, count: int) -> bytes:
        piece = self._pieces.pop(0)
        assert len(piece) == count
        return piece


def inverted(variance: int, uniform: int) -> int:
    """What the 256-bit number becomes: its cell, then 48 more bits, then the rest, as far as they are asked for."""
    cell = np.array([uniform >> (BITS - 16)])
    middle = (uniform >> (BITS - 64)) & (2**48 - 1)
    rest = uniform & (2 ** (BITS - 64) - 1)
    stream = Scripted((middle << 16).to_bytes(8, "little"), rest.to_bytes(24, "little"))
    return int(table(variance).draw(cell, stream)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("variance", [1, 256, 4096])
def test_every_edge_between_two_values_lies_where_the_table_says(variance: int) -> None:
    found = table(variance)
    edges = found.cumulative
    for place in (0, 1, 2, len(edges) // 3, len(edges) // 2, len(edges) // 2 + 5, len(edges) - 2, len(edges) - 1):
        value = found.lowest + place
        following = value + 1 + sum(edge == edges[place] for edge in edges[place + 1 :])
        assert inverted(variance, edges[place]) == following
        if edges[place]:
            assert inverted(variance, edges[place] - 1) <= value
        if place and edges[place] > edges[place - 1]:
            assert inverted(variance, edges[place] - 1) == value
    assert inverted(variance, 0) == found.lowest + sum(edge == 0 for edge in edges)
    assert inverted(variance, 2**BITS - 1) <= 1 - found.lowest


def test_numbers_within_an_interval_become_its_value() -> None:
    random = np.random.default_rng(0)
    edges = table(256).cumulative
    for _ in range(300):
        uniform = int.from_bytes(random.bytes(32), "big")
        assert inverted(256, uniform) == table(256).lowest + sum(edge <= uniform for edge in edges)


def test_hardly_any_sample_needs_more_than_its_sixteen_bits() -> None:
    assert (table(64**2).guide == gaussian._UNDECIDED).mean() < 0.01


# Samples


@pytest.mark.parametrize("sigma", [16, 64, 300, 3000])
def test_twelve_keys_agree_with_the_exact_sampler(sigma: int) -> None:
    """Chi-square of both samplers' counts in a hundred equal bins: no key is far off, nor all of them a little."""
    bins = sigma * stats.norm.ppf(np.linspace(0, 1, 101))
    values = []
    for number, key in enumerate(KEYS):
        ours = np.histogram(samples(sigma**2, 40_000, key), bins)[0]
        exact = np.histogram(exact_discrete_gaussian(sigma, 40_000, seeded(f"exact {sigma} {number}")), bins)[0]
        filled = (ours + exact) > 0
        values.append(stats.chi2_contingency([ours[filled], exact[filled]]).pvalue)
    assert min(values) > 1e-4
    assert 1e-3 < stats.combine_pvalues(values).pvalue < 1 - 1e-3


@pytest.mark.parametrize("sigma", [16, 17, 64])
def test_samples_follow_the_exact_mass_function(sigma: int) -> None:
    drawn = samples(sigma**2, 2_000_000, KEYS[0])
    reach = 4 * sigma
    expected = [float(mass(sigma**2, value)) * drawn.size for value in range(-reach, reach + 1)]
    observed = np.bincount(drawn[np.abs(drawn) <= reach] + reach, minlength=2 * reach + 1)
    test = stats.chisquare(
        [*observed, drawn.size - observed.sum()], [*expected, drawn.size - sum(expected)], sum_check=False
    )
    assert test.pvalue > 1e-3


@pytest.mark.parametrize("sigma", [GRID, 13 * GRID, 2**21, MAX_SIGMA])
def test_wide_samples_follow_the_gaussian_they_approach(sigma: int) -> None:
    drawn = samples(sigma**2, 400_000, KEYS[1]) / sigma
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(drawn**power) - moment) < 4 * (spread / drawn.size) ** 0.5


@pytest.mark.parametrize("sigma", [64, 13 * GRID])
def test_tails_are_as_heavy_as_they_should_be(sigma: int) -> None:
    drawn = np.abs(samples(sigma**2, 4_000_000, KEYS[2]))
    for deviations in (2, 3, 4, 5):
        reach = deviations * sigma
        inside = sum(mass(sigma**2, k) for k in range(-reach, reach + 1)) if sigma == 64 else None
        beyond = float(1 - inside) if inside else 2 * stats.norm.sf(deviations)
        assert stats.binomtest(int(np.sum(drawn > reach)), drawn.size, beyond).pvalue > 1e-3


@pytest.mark.parametrize("value", [12, 13, -7])
def test_halving_draws_about_one_half_of_each_value(value: int) -> None:
    drawn = halved(np.full(400_000, value), 1, KEYS[7]) - (value >> 1)
    expected = [float(mass(HALVING, k, bool(value & 1))) * drawn.size for k in range(-8, 10)]
    observed = np.bincount(drawn[(drawn > -9) & (drawn < 10)] + 8, minlength=18)
    rest = drawn.size - observed.sum(), drawn.size - sum(expected)
    assert stats.chisquare([*observed, rest[0]], [*expected, rest[1]], sum_check=False).pvalue > 1e-3


def test_several_halvings_keep_the_mean_and_add_their_variances() -> None:
    values = np.resize(np.arange(-1000, 1000), 400_000)
    drawn = halved(values, 5, KEYS[8]) - values / 2**5
    variance = sum(HALVING / 4**number for number in range(5))
    assert abs(drawn.mean()) < 4 * (variance / drawn.size) ** 0.5
    assert drawn.var() == pytest.approx(variance, rel=4 * (2 / drawn.size) ** 0.5)
    assert abs(np.corrcoef(drawn, values)[0, 1]) < 4 / drawn.size**0.5
    assert np.array_equal(halved(values, 0, KEYS[8]), values)


def test_low_bits_are_uniform() -> None:
    """What floating-point samplers leak: every residue is equally likely, even far out."""
    drawn = samples((13 * GRID) ** 2, 400_000, KEYS[3])
    for chosen in (drawn, drawn[np.abs(drawn) > 20 * GRID]):
        assert stats.chisquare(np.bincount(chosen & 15, minlength=16)).pvalue > 1e-3


def test_neighbouring_samples_have_nothing_in_common() -> None:
    for sigma in (64, 13 * GRID):
        drawn = samples(sigma**2, 1_000_000, KEYS[4]).astype(np.float64) / sigma
        for apart in (1, 2, gaussian._BLOCK):
            assert abs(np.mean(drawn[apart:] * drawn[:-apart])) < 4 / drawn.size**0.5


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: f"variance {case['variance']}")
def test_known_answers_of_a_second_implementation(case: dict[str, object]) -> None:
    drawn = samples(case["variance"], len(case["samples"]), bytes.fromhex(case["key"]))  # type: ignore
    assert drawn.tolist() == case["samples"]


def test_a_longer_draw_begins_like_a_shorter_one_only_within_a_block() -> None:
    """Pins the order of the stream: a block's cells come before what its undecided samples need."""
    short, long = samples(256, gaussian._BLOCK, KEYS[5]), samples(256, 2 * gaussian._BLOCK, KEYS[5])
    assert np.array_equal(short, long[: gaussian._BLOCK])
    assert samples(256, 0, KEYS[5]).shape == (0,)


def test_no_floating_point_number_decides_a_sample() -> None:
    for node in ast.walk(ast.parse(inspect.getsource(gaussian))):
        assert not (isinstance(node, ast.Constant) and isinstance(node.value, float))
        assert not isinstance(node, ast.Div)
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"exp", "log", "sqrt", "float16", "float32", "float64", "random", "erf"}
    assert samples(MIN_SIGMA**2, 10, KEYS[6]).dtype == np.int64


# The exact sampler that the tests above lean on


@pytest.mark.parametrize("numerator", [0, 1, 3, 7, 8, 13, 24, 40])
def test_acceptance_has_the_probability_of_the_exponential(numerator: int) -> None:
    decisions = bernoulli_exp(np.full(100_000, numerator), 8, Bits(seeded(f"bernoulli {numerator}")(32)))
    assert stats.binomtest(int(decisions.sum()), decisions.size, np.exp(-numerator / 8)).pvalue > 1e-3


@pytest.mark.parametrize("bound", [3, 5, 33, 100])
def test_uniform_integers_are_uniform(bound: int) -> None:
    drawn = Bits(seeded(f"uniform {bound}")(32)).below(bound, 100_000)
    assert stats.chisquare(np.bincount(drawn, minlength=bound)).pvalue > 1e-3
