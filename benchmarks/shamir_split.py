"""Splitting one 32-byte secret for 100 sites, against Flower's `create_shares`, in CPU time.

`python benchmarks/shamir_split.py`: threshold 61 on both sides, what a cohort of 100 has with 20 colluding. Flower
splits in two threads that hold each other up, so that its caller waits longer than this, on a busy machine several
times; the wait of both is printed too.
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


def seconds(split: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Of CPU time, and waited: each in the best of the runs."""
    runs = []
    for _ in range(repeats):
        cpu, start = time.process_time(), time.perf_counter()
        split()
        runs.append((time.process_time() - cpu, time.perf_counter() - start))
    cpus, waits = zip(*runs, strict=True)
    return min(cpus), min(waits)


def main() -> bool:
    secret, threshold = os.urandom(32), thresholds(SITES, COLLUDING).threshold
    xs = range(1, SITES + 1)
    ours, wait = seconds(lambda: shamir.split(secret, threshold, xs, os.urandom), OURS)
    flowers, flowers_wait = seconds(lambda: create_shares(secret, threshold, SITES), FLOWERS)
    print(f"{ours * 1e3:.3f} ms against {flowers:.3f} s; waited {wait * 1e3:.3f} ms and {flowers_wait:.3f} s")
    claim = f"Shamir shares of 32 bytes, n = {SITES}, t = {threshold}, against Flower's in the same run, CPU time"
    return report("shamir_split", claim, flowers / ours, GOAL, "times")


if __name__ == "__main__":
    raise SystemExit(not main())
