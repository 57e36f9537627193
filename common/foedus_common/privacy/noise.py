"""Integer noise for differential privacy: an exact discrete Gaussian, and the noised sum that training uses.

No floating-point number decides what is drawn: samples come from uniform integers and integer comparisons alone, so
the distribution is the one that is accounted for (floating-point Gaussians leak through their low bits: Mironov, CCS
2012). Knows nothing of plans, epsilons or models.
"""

from __future__ import annotations

import math

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from foedus_common.errors import LocalError
from foedus_common.randomness import RandomBytes

GRID = 16 * 4096
"""Grid units in one clipping bound: the sum is scaled by 16 / clip and keeps 12 fractional bits."""

MIN_SIGMA = 16
MAX_SIGMA = 2**25
"""Grid units. Above it (noise multiplier 512) the acceptance test would not fit 63 bits."""

ARITHMETIC_SLACK = 2.0**-14
"""Relative: by how much float32 norms and float64 sums may let a row exceed the clipping bound (measured: < 1e-6)."""

SMOOTHING = 8
"""Grid units squared: variance given away to compare the discrete with the continuous Gaussian (docs/privacy.md)."""

_CHUNK = 1 << 15  # proposals at a time: what stays in a core's cache
_FAR = 64  # standard deviations; a proposal beyond them is dropped, whose chance of acceptance is below e^-1900

Reals = NDArray[np.float64]
Integers = NDArray[np.int64]
Decisions = NDArray[np.bool_]


def discrete_gaussian(sigma: int, size: int, random: RandomBytes) -> Integers:
    """`size` independent integers with P(k) proportional to exp(-k^2 / (2 sigma^2)), int64 (size,).

    sigma: grid units, MIN_SIGMA..MAX_SIGMA. random: asked once for 32 bytes, the key of an AES-256-CTR stream.
    Rejection from the discrete Laplace of scale sigma (Canonne, Kamath, Steinke: The Discrete Gaussian for
    Differential Privacy, NeurIPS 2020, algorithm 3, with t = sigma): |Y| is accepted with probability
    exp(-(|Y| - sigma)^2 / (2 sigma^2)). Raises LocalError for a sigma outside its range.
    """
    if not MIN_SIGMA <= sigma <= MAX_SIGMA:
        raise LocalError(f"The noise has {sigma} grid units; it must have {MIN_SIGMA} to {MAX_SIGMA}.")
    bits = _Bits(random(32))
    noise = np.empty(size, np.int64)
    done = 0
    while done < size:
        proposals = _discrete_laplace(sigma, min(_CHUNK, 2 * (size - done) + 64), bits)
        accepted = proposals[_bernoulli_exp((np.abs(proposals) - sigma) ** 2, 2 * sigma * sigma, bits)]
        taken = accepted[: size - done]
        noise[done : done + taken.size] = taken
        done += taken.size
    return noise


def noised_sum(total: Reals, clip: float, noise_multiplier: float, random: RandomBytes) -> Reals:
    """The sum of clipped gradients, rounded to the grid, plus discrete Gaussian noise; float64 (d,) like `total`.

    total: float64 (d,), finite, a sum over rows of vectors whose L2 norm is at most `clip`; the caller has clamped it
    to +-divisor * clip. noise_multiplier: standard deviation in units of `clip`; `accounted_multiplier` is what it
    is worth. The noise is never truncated. Raises LocalError for a total that is not finite or beyond 2^36 clips.
    """
    scaled = np.rint(total * (GRID / clip))
    if not bool(np.all(np.abs(scaled) < 2.0**52)):
        raise LocalError("The sum of gradients is not finite or too large for the noise's grid; check [privacy] clip.")
    noise = discrete_gaussian(grid_sigma(noise_multiplier), total.size, random)
    return (scaled.astype(np.int64) + noise).astype(np.float64) * (clip / GRID)


def grid_sigma(noise_multiplier: float) -> int:
    """The discrete Gaussian's sigma, in grid units, for a noise multiplier in units of the clipping bound."""
    return round(noise_multiplier * GRID)


def accounted_multiplier(noise_multiplier: float, size: int) -> float:
    """Noise multiplier of the continuous Gaussian mechanism that `noised_sum` on (size,) is at least as private as.

    Sensitivity: the clipping bound plus one grid unit per coordinate for rounding (sqrt(size) in L2), plus the slack
    of the arithmetic. Noise: N_Z(mu, sigma^2) is, within 1e-67 a coordinate in total variation, N(mu, sigma^2 - 8)
    rounded to an integer by N_Z(x, 8) (Peikert, CRYPTO 2010, theorem 3.1), which is post-processing.
    """
    deviation = math.sqrt(grid_sigma(noise_multiplier) ** 2 - SMOOTHING)
    return deviation / ((GRID + math.sqrt(size)) * (1 + ARITHMETIC_SLACK))


class _Bits:
    """Uniform integers from an AES-256-CTR key stream with zero IV: the key serves one stream."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def below(self, bound: int, size: int) -> Integers:
        """int64 (size,), each uniform on 0..bound-1, by rejection of the bits that `bound` has. 1 <= bound < 2^63."""
        if bound == 1:
            return np.zeros(size, np.int64)
        drawn = self._words(size, (bound - 1).bit_length())
        if bound & (bound - 1):
            again = np.flatnonzero(drawn >= bound)
            while again.size:
                redrawn = self._words(again.size, (bound - 1).bit_length())
                drawn[again] = redrawn
                again = again[redrawn >= bound]
        return drawn

    def _words(self, size: int, bits: int) -> Integers:
        stream = np.frombuffer(self._encryptor.update(bytes(8 * size)), "<u8")
        drawn: Integers = (stream >> np.uint64(64 - bits)).astype(np.int64)
        return drawn


def _discrete_laplace(scale: int, proposals: int, bits: _Bits) -> Integers:
    """About 0.63 * proposals integers with P(k) proportional to exp(-|k| / scale) (CKS, algorithm 2)."""
    within = bits.below(scale, proposals)
    within = within[_bernoulli_exp_unit(within, scale, bits)]
    magnitude = within + scale * _geometric(within.size, bits)
    negative = bits.below(2, magnitude.size).astype(bool)
    kept: Decisions = (magnitude < _FAR * scale) & ~(negative & (magnitude == 0))
    signed: Integers = np.where(negative, -magnitude, magnitude)
    return signed[kept]


def _geometric(size: int, bits: _Bits) -> Integers:
    """How often in a row Bernoulli(exp(-1)) succeeds."""
    successes = np.zeros(size, np.int64)
    active = np.arange(size)
    while active.size:
        active = active[_bernoulli_exp_unit(np.ones(active.size, np.int64), 1, bits)]
        successes[active] += 1
    return successes


def _bernoulli_exp(numerator: Integers, denominator: int, bits: _Bits) -> Decisions:
    """True with probability exp(-numerator / denominator), for any numerator >= 0."""
    whole = numerator // denominator
    accepted = _bernoulli_exp_unit(numerator - whole * denominator, denominator, bits)
    pending = np.flatnonzero(accepted & (whole > 0))
    while pending.size:
        success = _bernoulli_exp_unit(np.ones(pending.size, np.int64), 1, bits)
        accepted[pending[~success]] = False
        whole[pending] -= 1
        pending = pending[success & (whole[pending] > 0)]
    return accepted


def _bernoulli_exp_unit(numerator: Integers, denominator: int, bits: _Bits) -> Decisions:
    """True with probability exp(-g), g = numerator / denominator in [0, 1] (CKS, algorithm 1).

    The first k at which Bernoulli(g / k) fails is odd with that probability: the alternating series of exp(-g).
    """
    accepted = np.zeros(numerator.size, np.bool_)
    running = np.arange(numerator.size)
    k = 1
    while running.size:
        success = bits.below(denominator * k, running.size) < numerator
        if k % 2:
            accepted[running[~success]] = True
        running, numerator = running[success], numerator[success]
        k += 1
    return accepted
