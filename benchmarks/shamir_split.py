"""Splitting one 32-byte secret for 100 sites, against Flower's `create_shares`, as long as a caller waits.

`python benchmarks/shamir_split.py`: threshold 61 on both sides, what a cohort of 100 has with 20 colluding. Flower
splits in two threads that hold each other up; the CPU time of both is printed too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from flwr.common.secure_aggregation.crypto.shamir import create_shares

from foedus_common.protocol import shamir
from foedus_common.protocol.thresholds import thresholds
from report import report

SITES, COLLUDING, GOAL = 100, 20, 1000
OURS, FLOWERS = 500, 5
"""Repeats."""


def seconds(split: Callable[[], object]) -> tuple[float, float]:
    """Waited, and of CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    split()
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> bool:
    secret, threshold = os.urandom(32), thresholds(SITES, COLLUDING).threshold
    xs = range(1, SITES + 1)
    ours = min(seconds(lambda: shamir.split(secret, threshold, xs, os.urandom)) for _ in range(OURS))
    flowers = min(seconds(lambda: create_shares(secret, threshold, SITES)) for _ in range(FLOWERS))
    print(f"{ours[0] * 1e3:.2f} ms against {flowers[0]:.2f} s, of CPU {ours[1] * 1e3:.2f} ms and {flowers[1]:.2f} s")
    claim = f"Shamir shares of 32 bytes, n = {SITES}, t = {threshold}, against Flower's in the same run"
    return report("shamir_split", claim, flowers[0] / ours[0], GOAL, "times")


if __name__ == "__main__":
    raise SystemExit(not main())
