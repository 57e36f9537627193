"""Random bytes that come out the same every time."""

from __future__ import annotations

import hashlib
from itertools import count

from foedus_common.randomness import RandomBytes


def seeded(seed: str) -> RandomBytes:
    """SHAKE-256 over the seed and a counter of calls."""
    calls = count()

    def random(size: int) -> bytes:
        return hashlib.shake_256(f"{seed}/{next(calls)}".encode()).digest(size)

    return random
