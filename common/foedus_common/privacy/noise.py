"""Integer noise for differential privacy: a discrete Gaussian, and the noised sum that training uses.

No floating-point number decides what is drawn: samples come from uniform integers and integer comparisons alone, so
the distribution is the one that is accounted for (floating-point Gaussians leak through their low bits: Mironov, CCS
2012). Knows nothing of plans, epsilons or models; how samples are drawn is in `gaussian`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foedus_common.errors import LocalError
from foedus_common.privacy import gaussian
from foedus_common.randomness import RandomBytes

GRID = 16 * 4096
"""Grid units in one clipping bound: the sum is scaled by 16 / clip and keeps 12 fractional bits."""

MIN_SIGMA = 16
MAX_SIGMA = 2**25
"""Units of GRID, noise multiplier 512."""

ARITHMETIC_SLACK = 2.0**-14
"""Relative: by how much float32 norms and float64 sums may let a row exceed the clipping bound (measured: < 1e-6)."""

SMOOTHING = 8
"""Squared units: variance given away to compare the discrete with the continuous Gaussian (docs/privacy.md)."""

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class NoiseGrid:
    """The integers in which a sum of clipped gradients is rounded, noised and given out.

    units: in one clipping bound, of the grid in which the noised sum is given out. halvings: the sum is rounded and
    noised on a grid 2^halvings times finer, and the noise's last part carries it to the coarser one: the result is a
    discrete Gaussian about the sum itself, not about a sum that was rounded coarsely. sigma: of all the noise, in units
    of the finer grid.
    """

    units: int
    sigma: int
    halvings: int = 0

    @property
    def fine(self) -> int:
        """Finer units in one clipping bound."""
        return self.units << self.halvings

    @property
    def drawable(self) -> bool:
        return MIN_SIGMA << self.halvings <= self.sigma and self.sigma * GRID <= MAX_SIGMA * self.fine

    @property
    def before_halving(self) -> int:
        """The variance that is drawn on the finer grid; each halving adds its own, and all of it is sigma^2."""
        return self.sigma**2 - sum(gaussian.HALVING << 2 * number for number in range(1, self.halvings + 1))


def fine_grid(noise_multiplier: float) -> NoiseGrid:
    """The grid of sums that are given out as floating-point numbers. noise_multiplier: in clipping bounds."""
    return NoiseGrid(GRID, round(noise_multiplier * GRID))


def discrete_gaussian(sigma: int, size: int, random: RandomBytes) -> Integers:
    """`size` independent integers with P(k) proportional to exp(-k^2 / (2 sigma^2)), int64 (size,).

    sigma: grid units, MIN_SIGMA..MAX_SIGMA. random: asked once for 32 bytes, the key of the stream that is inverted
    (`gaussian`, which says how close to exact it is). Raises LocalError for a sigma outside its range.
    """
    if not MIN_SIGMA <= sigma <= MAX_SIGMA:
        raise LocalError(f"The noise has {sigma} grid units; it must have {MIN_SIGMA} to {MAX_SIGMA}.")
    return gaussian.samples(sigma * sigma, size, random(32))


def noised_sum(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    """The sum of clipped gradients with discrete Gaussian noise, whole units of clip / grid.units; float64 (d,).

    total: float64 (d,), finite, a sum over rows of vectors whose L2 norm is at most `clip`; the caller has clamped it
    to +-divisor * clip. `accounted_multiplier` is what the noise is worth. It is never truncated. Raises LocalError for
    a total that is not finite or beyond 2^52 of the finer units, and for noise outside the sampler's range.
    """
    if not grid.drawable:
        raise LocalError(f"The noise has {grid.sigma} units of its grid; it cannot be drawn.")
    scaled = np.rint(total * (grid.fine / clip))
    if not bool(np.all(np.abs(scaled) < 2.0**52)):
        raise LocalError("The sum of gradients is not finite or too large for the noise's grid; check [privacy] clip.")
    noised = gaussian.samples(grid.before_halving, total.size, random(32))
    noised += scaled.astype(np.int64)
    if grid.halvings:
        noised = gaussian.halved(noised, grid.halvings, random(32))
    return noised.astype(np.float64) * (clip / grid.units)


def accounted_multiplier(grid: NoiseGrid, size: int, sums: int = 1) -> float:
    """Noise multiplier of the continuous Gaussian mechanism that `sums` noised sums of (size,), of which only the total
    is seen, are at least as private as for a row of one of them.

    Sensitivity: the clipping bound plus one finer unit per coordinate for rounding (sqrt(size) in L2), plus the slack
    of the arithmetic. Noise, in units of the grid that is given out: N_Z(mu, sigma^2) is, for any real mu and within a
    factor of 1 +- 2^-222 a coordinate, N(mu, sigma^2 - 8) rounded to an integer by N_Z(x, 8) (Peikert, CRYPTO 2010,
    theorem 3.1), which is post-processing; and the sum of several such is N_Z with the sums of their mu and sigma^2
    within 1 +- e^-2000 (as in `gaussian`, with t >= 16^2 / 2).
    """
    variance = sums * grid.sigma**2 - (SMOOTHING << 2 * grid.halvings)
    return math.sqrt(max(variance, 1)) / ((grid.fine + math.sqrt(size)) * (1 + ARITHMETIC_SLACK))
