"""Mask expansion against the raw AES-256-CTR keystream, both measured in turns in this process, in CPU time.

`python benchmarks/mask_expansion.py`: n = 10 sites, d = 1M coordinates in fields of 21 bits, nine keys.
"""

from __future__ import annotations

import os
import time

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import BLOCK_BYTES, apply_masks
from report import report

GOAL = 0.65
REPEATS = 40


def raw_keystream(keys: list[bytes], size: int) -> float:
    """Seconds to make `size` bytes of keystream for every key, into one block, thrown away."""
    zeros, block = memoryview(bytes(BLOCK_BYTES)), bytearray(BLOCK_BYTES)
    start = time.process_time()
    for key in keys:
        generator = Cipher(AES256(key), CTR(bytes(16))).encryptor()
        for offset in range(0, size, BLOCK_BYTES):
            generator.update_into(zeros[: min(BLOCK_BYTES, size - offset)], block)
    return time.process_time() - start


def masked(keys: list[bytes], accumulator: np.ndarray) -> float:
    start = time.process_time()
    apply_masks(accumulator, add=keys[::2], subtract=keys[1::2])
    return time.process_time() - start


def main() -> bool:
    layout = FieldLayout(21, 16, ((1_000_000, 1.0),))
    accumulator = np.zeros(layout.words, dtype=np.uint64)
    keys = [os.urandom(32) for _ in range(9)]
    pairs = [(raw_keystream(keys, layout.size), masked(keys, accumulator)) for _ in range(REPEATS)]
    raw, ours = (min(column) for column in zip(*pairs, strict=True))
    volume = len(keys) * layout.size / 1e9
    print(f"raw AES-256-CTR {volume / raw:.2f} GB/s, masks {volume / ours:.2f} GB/s")
    return report(
        "mask_expansion", "mask expansion against the AES-256-CTR keystream of the same run", raw / ours, GOAL
    )


if __name__ == "__main__":
    raise SystemExit(not main())
