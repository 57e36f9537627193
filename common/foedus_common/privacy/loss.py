"""The privacy loss of one noisy step, as dp-accounting composes it, but found at all its points at once.

dp-accounting connects the dots (Doroshenko et al., PETS 2022) through the hockey-stick divergences at evenly spaced
epsilons, and asks for the noise at which each of them is lost with one call of Python's for each: half a second a step,
and calibration takes dozens. Here that one formula is an array's; its distribution functions, bounds and dots stay
dp-accounting's. Knows a step's numbers and no plans.
"""

from __future__ import annotations

import math

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss


def losses_of_step(noise_multiplier: float, sampling_rate: float, width: float) -> PrivacyLossDistribution:
    """What dp-accounting's `from_gaussian_mechanism` gives: pessimistic, for adding and for removing a row. width: of
    the buckets, in nats."""
    remove = _dots(noise_multiplier, sampling_rate, width, AdjacencyType.REMOVE)
    if sampling_rate == 1.0:  # then adding is the mirror image
        return PrivacyLossDistribution(remove)
    return PrivacyLossDistribution(remove, _dots(noise_multiplier, sampling_rate, width, AdjacencyType.ADD))


def _dots(sigma: float, rate: float, width: float, adjacency: AdjacencyType) -> PLDPmf:
    """Removing: (1 - q) N(0, sigma^2) + q N(-1, sigma^2) against N(0, sigma^2). Adding: the second against the first,
    mirrored."""
    step = GaussianPrivacyLoss(sigma, sampling_prob=rate, adjacency_type=adjacency)
    bounds = step.connect_dots_bounds()
    first, last = math.floor(bounds.epsilon_lower / width), math.ceil(bounds.epsilon_upper / width)
    epsilons = np.arange(first, last + 1) * width

    side = 1 if adjacency is AdjacencyType.REMOVE else -1
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        unsampled = np.log1p(np.expm1(side * epsilons) / rate)  # the loss without sampling; nan: beyond all that occur
    lost = ~np.isnan(unsampled)
    noise = -side * (0.5 + unsampled[lost] * sigma**2)
    deltas = np.maximum(0.0, -np.expm1(epsilons)) if side == 1 else np.zeros(len(epsilons))
    deltas[lost] = step.mu_upper_cdf(noise) - np.exp(epsilons[lost] + step.mu_lower_log_cdf(noise))
    return create_pmf_pessimistic_connect_dots_fixed_gap(width, first, last, np.clip(deltas, 0.0, 1.0))
