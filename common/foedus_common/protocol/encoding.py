"""Encoding: a float vector as packed fixed-point fields whose sums never carry into each other.

Knows numbers only. Field 0 of every vector is the header, the constant 1, so that a sum counts its own summands;
fields 1..d are the coordinates. Each coordinate is stochastically rounded to a multiple of its segment's step,

    step = scale / R,    R = floor((2^b - 1) / (2 * max_sites)),

offset by R to be non-negative, and stored in a field of b bits. A sum of at most max_sites fields stays below 2^b, so
f = floor(64 / b) fields share a uint64 and no sum carries from one to the next: adding words adds fields.

Law:  decode(encode(u_1) + ... + encode(u_k)) == round(u_1) + ... + round(u_k),  exactly, for every 1 <= k <= max_sites.

Reading of docs/protocol.md section 3: it asks for 12 fractional guard bits. Here the resolution follows from the range,
so that no bit of a field lies idle: a plan that wants the grid of 2^-12 says scale = R / 4096 and gets step = 2^-12.
Fields are laid out in planes (word w holds fields w, w + W, w + 2W, ...) so that packing runs over contiguous memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.protocol.cores import in_parts
from foedus_common.protocol.masks import Words
from foedus_common.randomness import RandomBytes

MIN_FIELD_BITS, MAX_FIELD_BITS = 8, 32
MIN_SCALE, MAX_SCALE = 1e-100, 1e100
_BLOCK = 64 * 1024
_LONG_BLOCK = 256 * 1024
"""Coordinates. The long ones are for threads, which wait for each other's turn with the interpreter at every call."""
_ZEROS = memoryview(bytes(4 * _LONG_BLOCK))

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def steps_of_half_range(bits: int, max_sites: int) -> int:
    """R: how many steps a coordinate may be off zero, so that the sum of `max_sites` stays within `bits` bits."""
    return ((1 << bits) - 1) // (2 * max_sites)


@dataclass(frozen=True)
class FieldLayout:
    """How a vector of shape (d,) becomes words: b bits a field, segments of (length, half-range) in order.

    A segment's scale is its half-range: every |value| <= scale fits. LocalError for numbers that make no layout.
    """

    bits: int
    max_sites: int
    segments: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not MIN_FIELD_BITS <= self.bits <= MAX_FIELD_BITS:
            raise LocalError(f"fields have {MIN_FIELD_BITS} to {MAX_FIELD_BITS} bits, not {self.bits}")
        if self.max_sites < 1 or self.half_range < 1:
            raise LocalError(f"fields of {self.bits} bits cannot hold the sum of {self.max_sites} sites")
        if not self.segments or any(
            length < 1 or not MIN_SCALE <= scale <= MAX_SCALE for length, scale in self.segments
        ):
            raise LocalError("every segment of a layout needs a positive length and a positive, moderate scale")

    @cached_property
    def half_range(self) -> int:
        """R: a site's coordinate is an integer in -R..R steps."""
        return steps_of_half_range(self.bits, self.max_sites)

    @cached_property
    def dimension(self) -> int:
        """d: coordinates, the header not counted."""
        return sum(length for length, _ in self.segments)

    @cached_property
    def words(self) -> int:
        """uint64 words of an encoded vector: ceil((1 + d) / f)."""
        return -(-(1 + self.dimension) // self._fields_per_word)

    @property
    def size(self) -> int:
        """Bytes on the wire."""
        return 8 * self.words

    @property
    def _fields_per_word(self) -> int:
        return 64 // self.bits

    # --- One vector to words ---

    def encode(self, vector: npt.NDArray[np.floating], random: RandomBytes) -> Words:
        """float vector (d,) -> words (words,): `pack(quantise(vector))`, block by block."""
        words: Words = np.empty(self.words, dtype=np.uint64)
        key = random(32)

        def fill(first: int, last: int) -> None:
            """The fields of these words, plane by plane: no other part writes there."""
            words[first:last] = self._offsets
            scratch = _Scratch(min(last - first, _LONG_BLOCK))
            for plane in range(self._fields_per_word):
                field = plane * self.words - 1
                for part, steps in self._rounded(vector, key, max(field + first, 0), field + last, scratch):
                    self._place(words, part, steps)

        self._require_shape(vector)
        in_parts(self.words, fill)
        return self._completed(words)

    def quantise(self, vector: npt.NDArray[np.floating], random: RandomBytes) -> Integers:
        """float (d,) -> int64 (d,) in -R..R: multiples of each segment's step, rounded up with probability = fraction.

        Value v becomes floor((trunc(v * factor) + coin) / 2^32), where factor is R * 2^32 / scale, one float64 lower
        where scale * factor would exceed R * 2^32, and coin i is the i-th little-endian 32-bit word of AES-256-CTR
        (zero IV) under a fresh key from `random`. Expectations are off by less than 2^-32 steps. LocalError for a value
        that is not finite or beyond its half-range: nothing is ever clipped.
        """
        self._require_shape(vector)
        integers = np.empty(self.dimension, dtype=np.int64)
        for part, steps in self._rounded(vector, random(32), 0, self.dimension, _Scratch(_BLOCK)):
            integers[part] = steps
        return integers

    def whole_steps(self, vector: npt.NDArray[np.float64]) -> Integers:
        """float64 (d,) of whole multiples of each segment's step -> those multiples, int64 (d,).

        LocalError for a value more than 2^-10 of a step off, or not finite: this is for what was made on the grid.
        """
        self._require_shape(vector)
        integers = np.empty(self.dimension, dtype=np.int64)
        for part, scale in self._blocks(0, self.dimension):
            steps = vector[part] * (self.half_range / scale)
            whole = np.rint(steps)
            if not bool(np.all(np.abs(steps - whole) < 2.0**-10)):  # false for NaN too
                raise LocalError(f"coordinates {part.start}..{part.stop - 1} are not whole steps of their layout")
            integers[part] = whole
        return integers

    def pack(self, integers: Integers) -> Words:
        """int64 (d,) in -R..R -> words (words,). LocalError beyond that range."""
        self._require_shape(integers)
        if integers.min() < -self.half_range or integers.max() > self.half_range:
            raise LocalError(f"an integer leaves the range of +-{self.half_range} steps that a field holds")
        words: Words = np.full(self.words, self._offsets, dtype=np.uint64)
        for part, _ in self._blocks(0, self.dimension):
            self._place(words, part, integers[part].copy())
        return self._completed(words)

    def _require_shape(self, vector: npt.NDArray[Any]) -> None:
        if vector.shape != (self.dimension,):
            raise LocalError(f"the layout has {self.dimension} coordinates and the vector has shape {vector.shape}")

    def _rounded(
        self, vector: npt.NDArray[np.floating], key: bytes, start: int, stop: int, scratch: _Scratch
    ) -> Iterator[tuple[slice, Integers]]:
        """Blocks of coordinates start..stop as integers, in a buffer that the next block overwrites."""
        coins = Cipher(AES256(key), CTR((start // 4).to_bytes(16, "big"))).encryptor()
        coins.update(bytes(4 * (start % 4)))  # a block of AES has four coins
        keystream, coin, steps = scratch.keystream, scratch.coin, scratch.steps
        for part, scale in self._blocks(start, stop, len(scratch.steps)):
            values = vector[part]
            count = len(values)
            if not (float(values.max()) <= scale and float(values.min()) >= -scale):  # false for NaN too
                raise LocalError(
                    f"coordinates {part.start}..{part.stop - 1} leave their range of +-{scale:g}; "
                    "the plan's scales are too small for this update"
                )
            np.multiply(values, self._factor(scale), out=steps[:count], dtype=np.float64, casting="unsafe")  # truncates
            coins.update_into(_ZEROS[: 4 * count], keystream)
            steps[:count] += coin[:count]
            steps[:count] >>= 32
            yield part, steps[:count]

    def _factor(self, scale: float) -> float:
        limit = float(self.half_range << 32)
        factor = limit / scale
        return factor if factor * scale <= limit else math.nextafter(factor, 0.0)

    def _place(self, words: Words, part: slice, integers: Integers) -> None:
        """Add coordinates `part` to their fields, in which they are zero so far. Overwrites the integers."""
        fields = integers.view(np.uint64)  # modulo 2^64 a negative number is taken from R
        for plane, into, taken in self._planes(part):
            fields[taken] <<= np.uint64(plane * self.bits)
            words[into] += fields[taken]

    @property
    def _offsets(self) -> int:
        """A word whose every field holds R: of such words coordinates can be added that are negative."""
        return sum(self.half_range << (plane * self.bits) for plane in range(self._fields_per_word))

    def _completed(self, words: Words) -> Words:
        """With 1 in the header and nothing in the padding, where R is."""
        words[0] -= np.uint64(self.half_range - 1)
        for plane, padding, _ in self._planes(self._padding):
            words[padding] -= np.uint64(self.half_range << (plane * self.bits))
        return words

    # --- A sum of words to numbers ---

    def decode(self, words: Words, survivors: int) -> Floats:
        """Words summed over `survivors` sites -> sum of the rounded vectors, float64 (d,). Errors of `unpack_sum`."""
        decoded = np.empty(self.dimension, dtype=np.float64)
        for part, scale, integers in self._summed(words, survivors):
            np.multiply(integers, scale / self.half_range, out=decoded[part])
        return decoded

    def unpack_sum(self, words: Words, survivors: int) -> Integers:
        """Words summed over `survivors` sites -> the sum of their integers, int64 (d,), exactly.

        RemoteError(BAD_SUM) if the header does not count `survivors` or a field cannot be such a sum: then a mask is
        left in it, or a site sent what is no encoded vector.
        """
        summed = np.empty(self.dimension, dtype=np.int64)
        for part, _, integers in self._summed(words, survivors):
            summed[part] = integers
        return summed

    def _summed(self, words: Words, survivors: int) -> Iterator[tuple[slice, float, Integers]]:
        """Blocks of the sum as integers, each with its scale, once all that lies around the fields is checked."""
        if words.shape != (self.words,):
            raise LocalError(f"the layout has {self.words} words and the sum has shape {words.shape}")
        header = int(words[0]) & (2**self.bits - 1)
        padding = self._pick(words, self._padding)
        used = self._fields_per_word * self.bits
        if header != survivors or padding.any() or (used < 64 and int(words.max()) >> used):
            raise RemoteError(Reason.BAD_SUM, f"the opened sum does not count {survivors} sites")
        for part, scale in self._blocks(0, self.dimension):
            fields = self._pick(words, part)
            if int(fields.max()) > 2 * self.half_range * survivors:
                raise RemoteError(
                    Reason.BAD_SUM, f"a field of the opened sum is larger than {survivors} sites can make it"
                )
            integers = fields.view(np.int64)
            integers -= self.half_range * survivors
            yield part, scale, integers

    def _pick(self, words: Words, part: slice) -> Words:
        """The fields of coordinates `part`."""
        fields: Words = np.empty(part.stop - part.start, dtype=np.uint64)
        for plane, out_of, taken in self._planes(part):
            np.right_shift(words[out_of], np.uint64(plane * self.bits), out=fields[taken])
        fields &= np.uint64(2**self.bits - 1)
        return fields

    # --- Where things lie ---

    @property
    def _padding(self) -> slice:
        """The fields after the last coordinate, as if they were coordinates too."""
        return slice(self.dimension, self.words * self._fields_per_word - 1)

    def _planes(self, part: slice) -> Iterator[tuple[int, slice, slice]]:
        """For coordinates `part`: plane, which words of it, which of the part's coordinates, run by run."""
        field, taken, count = 1 + part.start, 0, part.stop - part.start
        while taken < count:
            plane, word = divmod(field + taken, self.words)
            run = min(self.words - word, count - taken)
            yield plane, slice(word, word + run), slice(taken, taken + run)
            taken += run

    def _blocks(self, start: int, stop: int, longest: int = _BLOCK) -> Iterator[tuple[slice, float]]:
        """Slices of coordinates start..stop that lie within one segment, each with its scale."""
        end = 0
        for length, scale in self.segments:
            begin, end = end, end + length
            for low in range(max(begin, start), min(end, stop), longest):
                yield slice(low, min(low + longest, end, stop)), scale


class _Scratch:
    """Room for a block, used again for every block of one thread."""

    def __init__(self, coordinates: int) -> None:
        self.keystream = bytearray(4 * coordinates)
        self.coin = np.frombuffer(self.keystream, dtype="<u4")
        self.steps = np.empty(coordinates, dtype=np.int64)
