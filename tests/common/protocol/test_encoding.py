"""Encoding. Failure: decode(sum(encode)) differs from the sum of the rounded vectors, or a value silently changes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.protocol.encoding import FieldLayout

LAYOUTS = st.builds(
    FieldLayout,
    bits=st.integers(16, 32),
    max_sites=st.integers(1, 128),
    segments=st.lists(
        st.tuples(st.integers(1, 9), st.floats(1e-6, 1e6, allow_subnormal=False)), min_size=1, max_size=4
    ).map(tuple),
)


def scales(layout: FieldLayout) -> np.ndarray:
    return np.concatenate([np.full(length, scale) for length, scale in layout.segments])


@given(LAYOUTS, st.integers(0, 2**32), st.data())
def test_the_law(layout, seed, data):
    """decode(sum(encode(u_i))) == sum(rounded u_i), exactly, for the largest sums and any subset."""
    rng, coins = np.random.default_rng(seed), random.Random(seed).randbytes
    survivors = data.draw(st.sampled_from(sorted({1, min(2, layout.max_sites), layout.max_sites})))
    extreme = data.draw(st.sampled_from([None, 1.0, -1.0]))
    total = np.zeros(layout.words, dtype=np.uint64)
    expected = np.zeros(layout.dimension, dtype=np.int64)
    for _ in range(survivors):
        draws = rng.uniform(-1, 1, layout.dimension) if extreme is None else np.full(layout.dimension, extreme)
        integers = layout.quantise(draws * scales(layout), coins)
        total += layout.pack(integers)
        expected += integers
    np.testing.assert_array_equal(layout.unpack_sum(total, survivors), expected)
    decoded = layout.decode(total, survivors)
    np.testing.assert_array_equal(decoded, expected * (scales(layout) / layout.half_range))


@given(LAYOUTS, st.integers(0, 2**32))
def test_rounding_moves_a_value_by_less_than_one_step(layout, seed):
    values = np.random.default_rng(seed).uniform(-1, 1, layout.dimension) * scales(layout)
    steps = layout.quantise(values, random.Random(seed).randbytes)
    step = scales(layout) / layout.half_range
    assert np.all(np.abs(steps * step - values) < step * (1 + 1e-9))
    assert np.all(np.abs(steps) <= layout.half_range)


@given(st.integers(16, 32), st.integers(1, 128))
def test_a_sum_of_all_sites_stays_within_its_field(bits, max_sites):
    layout = FieldLayout(bits, max_sites, ((1, 1.0),))
    assert max_sites * 2 * layout.half_range < 2**bits
    assert max_sites * 2 * (layout.half_range + 1) >= 2**bits  # and no bit lies idle


def test_multiples_of_the_step_are_kept_as_they_are():
    layout = FieldLayout(21, 16, ((1000, 65535 / 4096),))  # the grid of 2^-12
    values = np.random.default_rng(0).integers(-65535, 65536, 1000) / 4096
    words = layout.encode(values, random.Random(0).randbytes)
    np.testing.assert_array_equal(layout.decode(words, 1), values)


def test_rounding_is_unbiased():
    """The mean of 200,000 roundings of 0.3 steps is 0.3 within 5 standard deviations."""
    layout = FieldLayout(21, 16, ((200_000, 1.0),))
    values = np.full(200_000, 0.3 / layout.half_range)
    steps = layout.quantise(values, random.Random(7).randbytes)
    assert set(np.unique(steps)) == {0, 1}
    assert abs(steps.mean() - 0.3) < 5 * (0.3 * 0.7 / 200_000) ** 0.5


def test_equal_randomness_gives_equal_words_and_other_randomness_other_ones():
    layout = FieldLayout(21, 16, ((50_000, 1.0),))
    values = np.random.default_rng(1).uniform(-1, 1, 50_000)
    one, again, other = (layout.encode(values, random.Random(seed).randbytes) for seed in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).any()


@pytest.mark.parametrize(("bits", "dimension", "size"), [(21, 1_000_000, 0.67), (16, 1_000_000, 0.50)])
def test_bytes_against_plain_float32(bits, dimension, size):
    assert FieldLayout(bits, 8, ((dimension, 1.0),)).size / (4 * dimension) <= size + 0.001


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.2500001, -1.0])
def test_a_value_that_does_not_fit_is_refused_and_not_told(value):
    layout = FieldLayout(21, 16, ((3, 1.0), (2, 0.25)))
    vector = np.array([1.0, -1.0, 0.0, 0.25, value])
    with pytest.raises(LocalError, match=r"coordinates 3\.\.4") as caught:
        layout.encode(vector, random.Random(0).randbytes)
    assert str(value) not in str(caught.value)


def test_vectors_of_the_wrong_shape_are_refused():
    layout = FieldLayout(21, 16, ((3, 1.0),))
    with pytest.raises(LocalError):
        layout.encode(np.zeros(4), random.Random(0).randbytes)
    with pytest.raises(LocalError):
        layout.pack(np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(LocalError):
        layout.unpack_sum(np.zeros(7, dtype=np.uint64), 1)


@pytest.mark.parametrize("beyond", [65536, -65536])
def test_integers_beyond_the_field_are_refused(beyond):
    with pytest.raises(LocalError):
        FieldLayout(21, 16, ((3, 1.0),)).pack(np.array([0, beyond, 0]))


@pytest.mark.parametrize(
    ("bits", "max_sites", "segments"),
    [
        (7, 3, ((1, 1.0),)),
        (33, 3, ((1, 1.0),)),
        (8, 128, ((1, 1.0),)),
        (16, 0, ((1, 1.0),)),
        (16, 3, ()),
        (16, 3, ((0, 1.0),)),
        (16, 3, ((1, 0.0),)),
        (16, 3, ((1, float("nan")),)),
        (16, 3, ((1, float("inf")),)),
    ],
)
def test_layouts_that_make_no_sense_are_refused(bits, max_sites, segments):
    with pytest.raises(LocalError):
        FieldLayout(bits, max_sites, segments)


def test_a_sum_that_keeps_a_mask_is_refused():
    layout = FieldLayout(21, 16, ((1000, 1.0),))
    noise = np.random.default_rng(0).integers(0, 2**64, layout.words, dtype=np.uint64)
    with pytest.raises(RemoteError) as caught:
        layout.decode(layout.pack(np.zeros(1000, dtype=np.int64)) + noise, 1)
    assert caught.value.reason is Reason.BAD_SUM
