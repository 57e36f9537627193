"""How fast the exact discrete Gaussian is drawn.

`python benchmarks/discrete_gaussian.py`: a million samples at the width that a head phase needs (noise multiplier 13).
"""

from __future__ import annotations

import os
import time

from foedus_common.privacy.noise import GRID, discrete_gaussian
from report import report

GOAL = 1.5
SIZE = 1_000_000
REPEATS = 5


def seconds() -> float:
    start = time.process_time()
    discrete_gaussian(13 * GRID, SIZE, os.urandom)
    return time.process_time() - start


def main() -> bool:
    fastest = min(seconds() for _ in range(REPEATS))
    return report(
        "discrete_gaussian",
        "exact discrete Gaussian samples on one core",
        SIZE / fastest / 1e6,
        GOAL,
        "million a second",
    )


if __name__ == "__main__":
    raise SystemExit(not main())
