"""Discrete Gaussian samples by inverting exact tables with random bits: what `noise` draws from, and how close it is.

A table holds the cumulative distribution of N_Z(0, v), P(k) proportional to exp(-k^2 / 2v), as 256-bit integers. A
sample is the value whose interval a uniform 256-bit number falls into. Sixteen of its bits decide all but about one
sample in a hundred through a guide table (Chen, Asau 1974); only for the others are 48 more drawn, and the rest only
where those fall on the edge of an interval. Nothing is decided by a floating-point number.

Wide Gaussians are sums of narrow ones, x = y + k z, whose variances add up exactly (Peikert, CRYPTO 2010, theorem 3.1;
Micciancio, Walter, CRYPTO 2017). With variances r >= 8 k^2 of y and v of z, completing the square gives P(x) as that
of N_Z(0, r + k^2 v) times the sum over z of exp(-(z - c)^2 / 2t), where t = r v / (r + k^2 v), and by Poisson's formula
that sum varies with c by a factor of 1 +- 4 exp(-2 pi^2 t) at most.

Integers can be brought to a grid twice as coarse without rounding: `halved` draws N_Z(x / 2, 8) for an integer x, whose
centre is a whole number or lies half way between two, from two tables. Should x follow N_Z(c, v), then by the same
theorem the result follows N_Z(c / 2, v / 4 + 8), whatever real number c is, within the same factors.

Distance of one sample from N_Z(0, sigma^2), at most: a factor of 1 +- 2^-222 from up to five sums, each with t > 7.9,
and 2^-240 in total variation from the rounding and the cut tails of up to six tables of fewer than 5,000 values. Up to
sixteen halvings add a factor of 1 +- 2^-221 (two of 1 +- 4 exp(-16 pi^2) each) and sixteen tables of 110 values.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Integers = NDArray[np.int64]

BITS = 256
"""Of the uniform number that is inverted."""

_WIDEST = 128**2
"""Variance of the widest table. As measured: wider ones have more undecided cells, narrower ones make longer sums."""

_SMOOTH = 8
"""Variance, in units of k^2, that the narrow part of a sum keeps; see above."""

HALVING = 8
"""Variance that each halving adds, on the grid that it leads to."""

_BLOCK = 1 << 16  # samples at a time: what stays in a core's cache
_UNDECIDED = np.int16(-(2**15))
_GUARD = 128  # further bits of the weights, far more than their rounding errors, of which fewer than 2^24 add up


class KeyStream:
    """Random bytes without end: AES-256-CTR with zero IV under a key that serves one stream."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, buffer: bytearray | memoryview) -> None:
        self._encryptor.update_into(_ZEROS[: len(buffer)], buffer)

    def take(self, count: int) -> bytes:
        return self._encryptor.update(bytes(count))


_ZEROS = memoryview(bytes(2 * _BLOCK))


@dataclass(frozen=True)
class Table:
    """N_Z(0, variance) or N_Z(1/2, variance), ready to be inverted.

    cumulative: for each value from `lowest` on but the last, floor(2^256 P(X <= value)), ascending. leading: the same,
    the first 64 bits, uint64. guide: int16 (65536,), the value that 16 bits decide, or _UNDECIDED.
    """

    lowest: int
    cumulative: tuple[int, ...] = field(repr=False)
    leading: NDArray[np.uint64] = field(repr=False)
    guide: NDArray[np.int16] = field(repr=False)

    def draw(self, cells: Integers, stream: KeyStream) -> NDArray[np.int16]:
        """One sample for each of the cells, 16 random bits each, int16 of their shape."""
        values = np.take(self.guide, cells, mode="wrap")
        undecided = np.flatnonzero(values == _UNDECIDED)
        if undecided.size:
            further = np.frombuffer(stream.take(8 * undecided.size), "<u8") >> np.uint64(16)
            uniform = (cells[undecided].astype(np.uint64) << np.uint64(48)) | further
            values[undecided] = self.lowest + self._invert(uniform, stream)
        return values

    def _invert(self, uniform: NDArray[np.uint64], stream: KeyStream) -> Integers:
        """How many of the cumulative probabilities lie at or below each number that begins with these 64 bits."""
        below = np.searchsorted(self.leading, uniform)
        edges = self.leading[np.minimum(below, len(self.leading) - 1)] == uniform
        for place in np.flatnonzero(edges):
            rest = int.from_bytes(stream.take(BITS // 8 - 8), "little")
            below[place] = bisect_right(self.cumulative, (int(uniform[place]) << (BITS - 64)) | rest)
        return below


@lru_cache(maxsize=32)
def table(variance: int, half: bool = False) -> Table:
    """The table of N_Z(0, variance), or of N_Z(1/2, variance); 1 <= variance <= 2^14: milliseconds, and kept."""
    weights = _weights(variance, half)
    mirrored = weights[::-1] if half else weights[:0:-1]  # about 1/2 the values come in pairs; 0 has no other
    total = sum(mirrored) + sum(weights)
    running, cumulative = 0, []
    for weight in (*mirrored, *weights[:-1]):  # the last value's is 2^256, which nothing reaches
        running += weight
        cumulative.append((running << BITS) // total)
    leading = np.array([probability >> (BITS - 64) for probability in cumulative], dtype=np.uint64)
    lowest = 1 - len(weights)

    cells, edges = np.arange(2**16, dtype=np.uint64), leading >> np.uint64(48)
    below, at_most = np.searchsorted(edges, cells, side="left"), np.searchsorted(edges, cells, side="right")
    guide = np.where(below == at_most, below + lowest, int(_UNDECIDED)).astype(np.int16)
    return Table(lowest, tuple(cumulative), leading, guide)


def _weights(variance: int, half: bool) -> list[int]:
    """exp(-k^2 / 2 variance) for k = 0, 1, ... as long as it is above 2^-256, in units of 2^-(BITS + _GUARD); about
    1/2 exp(-k (k - 1) / 2 variance) for k = 1, 2, ..., which is in the same proportions."""
    bits = BITS + _GUARD
    ratio = _exp_of_minus(2 * variance, bits)  # exp(-(2k + 1) / 2v) leads from k to k + 1
    square = (ratio * ratio) >> bits
    if half:
        ratio = square  # exp(-2k / 2v) does
    weights = [1 << bits]
    while weights[-1] >> _GUARD:
        weights.append((weights[-1] * ratio) >> bits)
        ratio = (ratio * square) >> bits
    return weights


def _exp_of_minus(divisor: int, bits: int) -> int:
    """floor-ish of 2^bits exp(-1 / divisor), within 2^7 units, by its series."""
    total, term, index = 0, 1 << bits, 0
    while term:
        total += -term if index % 2 else term
        index += 1
        term //= divisor * index
    return total


@lru_cache(maxsize=32)
def decomposition(variance: int) -> tuple[tuple[int, int], ...]:
    """(factor, variance of a table) of independent samples whose weighted sum has just this variance, narrowest first.

    Each sample but the widest keeps at least 8 times the square of the next one's factor, as the sum's proof asks.
    """
    parts: list[tuple[int, int]] = []
    while variance > _WIDEST:
        factor = math.isqrt((variance - 1) // (_WIDEST + _SMOOTH)) + 1
        widest = variance // factor**2 - _SMOOTH
        parts.insert(0, (factor, widest))
        variance -= factor**2 * widest
    return ((1, variance), *parts)


def samples(variance: int, size: int, key: bytes) -> Integers:
    """`size` independent samples of N_Z(0, variance), int64 (size,), from the stream of a 32-byte key.

    variance: 1 <= variance <= 2^50, so that five tables do.
    """
    stream = KeyStream(key)
    drawn = np.empty(size, np.int64)
    parts = [(factor, table(narrow)) for factor, narrow in decomposition(variance)]
    bits, cells, share = bytearray(2 * _BLOCK), np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    for start in range(0, size, _BLOCK):
        block = drawn[start : start + _BLOCK]
        count = len(block)
        block[:] = 0
        for factor, each in parts:
            stream.fill(memoryview(bits)[: 2 * count])
            np.copyto(cells[:count], np.frombuffer(bits, "<u2", count))
            np.multiply(each.draw(cells[:count], stream), factor, out=share[:count], dtype=np.int64)
            block += share[:count]
    return drawn


def halved(values: Integers, times: int, key: bytes) -> Integers:
    """Integers (size,) on a grid that is `times` times twice as coarse, int64 (size,): a sample of N_Z(x / 2, HALVING)
    for each x, then for each of those, and so on; a 32-byte key serves one call."""
    stream, tables = KeyStream(key), (table(HALVING), table(HALVING, half=True))
    coarse, bits = values.copy(), bytearray(2 * _BLOCK)
    for start in range(0, len(coarse), _BLOCK):
        block = coarse[start : start + _BLOCK]
        for _ in range(times):
            stream.fill(memoryview(bits)[: 2 * len(block)])
            cells = np.frombuffer(bits, "<u2", len(block)).astype(np.int64)
            about_zero, about_half = (each.draw(cells, stream) for each in tables)
            odd = (block & 1).astype(bool)
            block >>= 1
            block += np.where(odd, about_half, about_zero)
    return coarse
