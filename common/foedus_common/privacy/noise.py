"""Integer noise for differential privacy: a discrete Gaussian, and the noised sum that training uses.

No floating-point number decides what is drawn: samples come from uniform integers and integer comparisons alone, so
the distribution is the one that is accounted for (floating-point Gaussians leak through their low bits: Mironov, CCS
2012). Knows nothing of plans, epsilons or models; how samples are drawn is in `gaussian`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from foedus_common.errors import LocalError
from foedus_common.privacy import gaussian
from foedus_common.randomness import RandomBytes

GRID = 16 * 4096
"""Grid units in one clipping bound: the sum is scaled by 16 / clip and keeps 12 fractional bits."""

MIN_SIGMA = 16
MAX_SIGMA = 2**25
"""Grid units, noise multiplier 512."""

ARITHMETIC_SLACK = 2.0**-14
"""Relative: by how much float32 norms and float64 sums may let a row exceed the clipping bound (measured: < 1e-6)."""

SMOOTHING = 8
"""Grid units squared: variance given away to compare the discrete with the continuous Gaussian (docs/privacy.md)."""

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]


def discrete_gaussian(sigma: int, size: int, random: RandomBytes) -> Integers:
    """`size` independent integers with P(k) proportional to exp(-k^2 / (2 sigma^2)), int64 (size,).

    sigma: grid units, MIN_SIGMA..MAX_SIGMA. random: asked once for 32 bytes, the key of the stream that is inverted
    (`gaussian`, which says how close to exact it is). Raises LocalError for a sigma outside its range.
    """
    if not MIN_SIGMA <= sigma <= MAX_SIGMA:
        raise LocalError(f"The noise has {sigma} grid units; it must have {MIN_SIGMA} to {MAX_SIGMA}.")
    return gaussian.samples(sigma * sigma, size, random(32))


def noised_sum(total: Reals, clip: float, noise_multiplier: float, random: RandomBytes) -> Reals:
    """The sum of clipped gradients, rounded to the grid, plus discrete Gaussian noise; float64 (d,) like `total`.

    total: float64 (d,), finite, a sum over rows of vectors whose L2 norm is at most `clip`; the caller has clamped it
    to +-divisor * clip. noise_multiplier: standard deviation in units of `clip`; `accounted_multiplier` is what it
    is worth. The noise is never truncated. Raises LocalError for a total that is not finite or beyond 2^36 clips.
    """
    scaled = np.rint(total * (GRID / clip))
    if not bool(np.all(np.abs(scaled) < 2.0**52)):
        raise LocalError("The sum of gradients is not finite or too large for the noise's grid; check [privacy] clip.")
    noised = discrete_gaussian(grid_sigma(noise_multiplier), total.size, random)
    noised += scaled.astype(np.int64)
    return noised.astype(np.float64) * (clip / GRID)


def grid_sigma(noise_multiplier: float) -> int:
    """The discrete Gaussian's sigma, in grid units, for a noise multiplier in units of the clipping bound."""
    return round(noise_multiplier * GRID)


def accounted_multiplier(noise_multiplier: float, size: int) -> float:
    """Noise multiplier of the continuous Gaussian mechanism that `noised_sum` on (size,) is at least as private as.

    Sensitivity: the clipping bound plus one grid unit per coordinate for rounding (sqrt(size) in L2), plus the slack
    of the arithmetic. Noise: N_Z(mu, sigma^2) is, within a factor of 1 +- 2^-222 a coordinate, N(mu, sigma^2 - 8)
    rounded to an integer by N_Z(x, 8) (Peikert, CRYPTO 2010, theorem 3.1), which is post-processing.
    """
    deviation = math.sqrt(grid_sigma(noise_multiplier) ** 2 - SMOOTHING)
    return deviation / ((GRID + math.sqrt(size)) * (1 + ARITHMETIC_SLACK))
