"""Masks. Failure: masks that do not cancel exactly, or more memory than a block."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError
from foedus_common.protocol.cores import _cores
from foedus_common.protocol.masks import BLOCK_BYTES, apply_masks

BLOCK_WORDS = BLOCK_BYTES // 8


@pytest.mark.parametrize("words", [0, 1, 3, BLOCK_WORDS - 1, BLOCK_WORDS, BLOCK_WORDS + 1, 3 * BLOCK_WORDS + 5])
def test_what_is_added_is_subtracted_exactly(words):
    rng = np.random.default_rng(words)
    vector = rng.integers(0, 2**64, words, dtype=np.uint64)
    keys = [random.Random(index).randbytes(32) for index in range(5)]
    masked = vector.copy()
    apply_masks(masked, add=keys[:3], subtract=keys[3:])
    assert words == 0 or (masked != vector).any()
    apply_masks(masked, add=keys[3:], subtract=keys[:3])
    np.testing.assert_array_equal(masked, vector)


@given(st.integers(0, 2 * BLOCK_WORDS), st.integers(0, 2 * BLOCK_WORDS))
def test_a_keystream_does_not_depend_on_the_length_of_the_vector(one, other):
    streams = [np.zeros(words, dtype=np.uint64) for words in (one, other)]
    for stream in streams:
        apply_masks(stream, add=[bytes(32)])
    shorter = min(one, other)
    np.testing.assert_array_equal(streams[0][:shorter], streams[1][:shorter])


def test_memory_beyond_the_vector_is_a_block_however_many_keys():
    vector = np.zeros(32 * BLOCK_WORDS, dtype=np.uint64)
    keys = [bytes([index]) * 32 for index in range(60)]
    tracemalloc.start()
    apply_masks(vector, add=keys[:30], subtract=keys[30:])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (1 + _cores()) * BLOCK_BYTES


@pytest.mark.parametrize("vector", [np.zeros(4), np.zeros((8,), dtype=np.uint64)[::2], np.zeros(4, dtype=">u8")])
def test_what_is_no_vector_of_words_is_refused(vector):
    with pytest.raises(LocalError):
        apply_masks(vector, add=[bytes(32)])
