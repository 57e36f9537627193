"""One site's share of distributed noise: its update clipped, rounded and noised on the grid in which it is summed.

For plans with [privacy] unit = "site" (docs/protocol.md section 4). The neighbouring federation is the one in which the
site's update is zero. Everything after the clip is integers, so the bound on the update and the noise are exact.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.privacy.noise import discrete_gaussian
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import site_grid

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


def noised_update(update: Reals, agreed: AgreedPlan, round_plan: RoundPlan, random: RandomBytes) -> Integers:
    """The update as it may be packed and sent, int64 (d,) in steps of the round's layout.

    update: float64 (d,), laid out as the phase's trained vector. Groups are scaled by the plan's public factors, the
    whole is clipped, and each coordinate gets a discrete Gaussian. An update that is not finite counts as zero. The
    noise is never cut: a sum that leaves its field, with a probability below 2^-40 over the run, is refused by `pack`.
    """
    grid = site_grid(agreed, round_plan.phase)
    parts = agreed.trained[round_plan.phase]
    scales = np.concatenate([np.full(part.length, round_plan.scale(part.group)) for part in parts])
    noised = discrete_gaussian(grid.sigma, update.size, random)
    noised += clipped(update * scales, agreed.plan.privacy.clip, grid.units)
    return noised


def clipped(vector: Reals, clip: float, units: int) -> Integers:
    """The vector in steps of clip / units, int64 (d,), with an L2 norm of at most `units`, exactly.

    Rounded to the nearest step; where that makes the norm too long, the vector is shortened a little and rounded again.
    """
    with np.errstate(over="ignore"):  # a norm beyond all numbers is infinite, which is what is asked
        norm = float(np.linalg.norm(vector))
    if not math.isfinite(norm):
        return np.zeros(vector.shape, np.int64)
    factor = units / max(norm, clip)
    while True:
        steps = np.rint(vector * factor).astype(np.int64)
        square = int(steps @ steps)
        if square <= units * units:
            return steps
        factor *= units / math.sqrt(square) * (1 - 2.0**-12)
