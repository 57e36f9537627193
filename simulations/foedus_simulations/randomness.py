"""Randomness from a seed: the same simulation again, bit for bit. Never in production, which asks the system."""

from __future__ import annotations

import threading

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from foedus_common.canonical import digest
from foedus_common.randomness import RandomBytes


def seeded(seed: int, name: str) -> RandomBytes:
    """A stream of its own for each (seed, name): AES-256-CTR under H(enc("simulation", seed, name))."""
    stream = Cipher(algorithms.AES256(digest("simulation", seed, name)), modes.CTR(bytes(16))).encryptor()
    lock = threading.Lock()

    def random(count: int) -> bytes:
        with lock:
            return stream.update(bytes(count))

    return random
