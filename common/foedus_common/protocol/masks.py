"""Masks: AES-256-CTR keystreams read as little-endian uint64, added to and subtracted from a vector modulo 2^64.

Knows keys and words, not who they belong to. Each key makes one keystream, once, so the counter starts at zero. The
vector is walked in blocks that stay in the processor's cache while every keystream passes over them; memory beyond the
vector is one block for each core, however many keys there are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from foedus_common.errors import LocalError
from foedus_common.protocol.cores import in_parts

Words = npt.NDArray[np.uint64]
"""A vector as it is masked and sent: shape (words,), little-endian uint64."""

BLOCK_BYTES = 512 * 1024
_WORD_BYTES = 8
_ZEROS = memoryview(bytes(BLOCK_BYTES))


def apply_masks(accumulator: Words, *, add: Iterable[bytes] = (), subtract: Iterable[bytes] = ()) -> None:
    """Add the keystream of each 32-byte key in `add`, take off that of each in `subtract`, in place, modulo 2^64.

    accumulator: contiguous, writable, uint64, shape (words,). LocalError otherwise.
    """
    if accumulator.dtype != np.uint64 or not accumulator.flags.c_contiguous or sys.byteorder != "little":
        raise LocalError("masks are applied to contiguous uint64 words on a little-endian machine")
    signed = [(np.add, key) for key in add] + [(np.subtract, key) for key in subtract]

    def mask(start: int, stop: int) -> None:
        passes = [(combine, _keystream(key, start)) for combine, key in signed]
        buffer = bytearray(BLOCK_BYTES)
        for low in range(start, stop, BLOCK_BYTES // _WORD_BYTES):
            block = accumulator[low : min(low + BLOCK_BYTES // _WORD_BYTES, stop)]
            zeros, keystream = _ZEROS[: block.nbytes], np.frombuffer(buffer, dtype=np.uint64, count=len(block))
            for combine, generator in passes:
                generator.update_into(zeros, buffer)
                combine(block, keystream, out=block)

    in_parts(len(accumulator), mask)


def _keystream(key: bytes, word: int) -> CipherContext:
    """The key's keystream from an even word on; the counter counts pairs of words."""
    return Cipher(AES256(key), CTR((word // 2).to_bytes(16, "big"))).encryptor()
