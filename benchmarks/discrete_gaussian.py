"""How fast discrete Gaussian noise is drawn on one core, in turns with the exact sampler by rejection.

`python benchmarks/discrete_gaussian.py`: a million samples at sigma 64, and at the width of a head phase (noise
multiplier 13), where a sample is a sum of four.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from exact_gaussian import exact_discrete_gaussian
from foedus_common.privacy.noise import GRID, discrete_gaussian
from report import report

SIZE, EXACT_SIZE, REPEATS = 1_000_000, 200_000, 15
NARROW, WIDE = 64, 13 * GRID


def seconds(sampler: Callable[..., object], sigma: int, size: int) -> float:
    """Of CPU time, for a million samples."""
    start = time.process_time()
    sampler(sigma, size, os.urandom)
    return (time.process_time() - start) * SIZE / size


def main() -> bool:
    turns = [
        (
            seconds(discrete_gaussian, NARROW, SIZE),
            seconds(discrete_gaussian, WIDE, SIZE),
            seconds(exact_discrete_gaussian, WIDE, EXACT_SIZE),
        )
        for _ in range(REPEATS)
    ]
    narrow, wide, exact = (min(column) for column in zip(*turns, strict=True))
    print(f"exact rejection {SIZE / exact / 1e6:.1f} million a second")
    claim, unit = "discrete Gaussian samples on one core", "million a second"
    fast = report("discrete_gaussian", f"{claim}, sigma 64", SIZE / narrow / 1e6, 200, unit)
    return report("discrete_gaussian_wide", f"{claim}, noise multiplier 13", SIZE / wide / 1e6, 50, unit) and fast


if __name__ == "__main__":
    raise SystemExit(not main())
