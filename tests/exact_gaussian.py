"""The discrete Gaussian by exact rejection, slow and with no error at all: what the product's sampler is held against.

Samples come from uniform integers and integer comparisons alone (Canonne, Kamath, Steinke: The Discrete Gaussian for
Differential Privacy, NeurIPS 2020).
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from foedus_common.randomness import RandomBytes

_CHUNK = 1 << 15  # proposals at a time: what stays in a core's cache
_FAR = 64  # standard deviations; a proposal beyond them is dropped, whose chance of acceptance is below e^-1900

Integers = NDArray[np.int64]
Decisions = NDArray[np.bool_]


def exact_discrete_gaussian(sigma: int, size: int, random: RandomBytes) -> Integers:
    """`size` independent integers with P(k) proportional to exp(-k^2 / (2 sigma^2)), int64 (size,).

    sigma: 1 to 2^25, so that the acceptance test fits 63 bits. random: asked once for 32 bytes, the key of an
    AES-256-CTR stream. Rejection from the discrete Laplace of scale sigma (algorithm 3 with t = sigma): |Y| is accepted
    with probability exp(-(|Y| - sigma)^2 / (2 sigma^2)).
    """
    bits = Bits(random(32))
    noise = np.empty(size, np.int64)
    done = 0
    while done < size:
        proposals = _discrete_laplace(sigma, min(_CHUNK, 2 * (size - done) + 64), bits)
        accepted = proposals[bernoulli_exp((np.abs(proposals) - sigma) ** 2, 2 * sigma * sigma, bits)]
        taken = accepted[: size - done]
        noise[done : done + taken.size] = taken
        done += taken.size
    return noise


class Bits:
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


def _discrete_laplace(scale: int, proposals: int, bits: Bits) -> Integers:
    """About 0.63 * proposals integers with P(k) proportional to exp(-|k| / scale) (CKS, algorithm 2)."""
    within = bits.below(scale, proposals)
    within = within[_bernoulli_exp_unit(within, scale, bits)]
    magnitude = within + scale * _geometric(within.size, bits)
    negative = bits.below(2, magnitude.size).astype(bool)
    kept: Decisions = (magnitude < _FAR * scale) & ~(negative & (magnitude == 0))
    signed: Integers = np.where(negative, -magnitude, magnitude)
    return signed[kept]


def _geometric(size: int, bits: Bits) -> Integers:
    """How often in a row Bernoulli(exp(-1)) succeeds."""
    successes = np.zeros(size, np.int64)
    active = np.arange(size)
    while active.size:
        active = active[_bernoulli_exp_unit(np.ones(active.size, np.int64), 1, bits)]
        successes[active] += 1
    return successes


def bernoulli_exp(numerator: Integers, denominator: int, bits: Bits) -> Decisions:
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


def _bernoulli_exp_unit(numerator: Integers, denominator: int, bits: Bits) -> Decisions:
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
