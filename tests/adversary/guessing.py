"""Brute force on one mask of ours, with everything else given away: what a search over 256-bit keys comes to.

The attack is told the victim's self-mask and all its pair masks but one, which is more than `c` colluding sites know.
What it lacks is one AES-256 key. A right guess is known for right: the header decodes as 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cheating import VICTIM, Cheat
from foedus_common.errors import RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import Words, apply_masks

YEAR = 365.25 * 24 * 3600
KEY_BITS = 256


@dataclass(frozen=True)
class OneMaskLeft:
    """The victim's vector under one last mask, to be added by whoever knows `key`."""

    words: Words
    layout: FieldLayout
    key: bytes


@dataclass(frozen=True)
class Guesses:
    """vector: recovered steps, int64 (d,). tried: keys."""

    vector: NDArray[np.int64] | None
    tried: int
    seconds: float

    @property
    def years_in_full(self) -> float:
        return self.seconds / self.tried * 2.0**KEY_BITS / YEAR


def betray(cheat: Cheat) -> OneMaskLeft:
    """Plays an honest round and takes every mask out of the victim's memory; gives its vector less all but one."""
    attempt = cheat.attempt()
    attempt.reach(2)
    stage = cheat.stage(VICTIM)
    attempt.reach(5)
    answers = [wire.parse_envelope(e.answer).message for e in cheat.exchanges if e.site == VICTIM]
    (masked,) = (answer for answer in answers if isinstance(answer, m.MaskedInput))
    words = np.frombuffer(cheat.vectors[masked.vector.digest], "<u8").astype(np.uint64)
    *known, left = stage.pair_mask_keys.values()  # the victim's name comes first, so it subtracts them all
    apply_masks(words, add=known, subtract=[stage.self_mask_key])
    return OneMaskLeft(words, attempt.config.terms.layout, left)


def near(key: bytes, bits: int) -> Iterator[bytes]:
    """Every key that differs in its lowest bits only."""
    base = int.from_bytes(key, "big") >> bits << bits
    return ((base + low).to_bytes(32, "big") for low in range(1 << bits))


def guess(covered: OneMaskLeft, keys: Iterable[bytes]) -> Guesses:
    start, tried = time.perf_counter(), 0
    for tried, key in enumerate(keys, start=1):
        words = covered.words.copy()
        apply_masks(words, add=[key])
        try:
            vector = covered.layout.unpack_sum(words, 1)
        except RemoteError:
            continue
        return Guesses(vector, tried, time.perf_counter() - start)
    return Guesses(None, tried, time.perf_counter() - start)
