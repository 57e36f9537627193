"""One step's losses against dp-accounting's own, which finds them one by one.

A failure means that epsilon is computed from another distribution than the one whose pessimism is proved.
"""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

from foedus_common.privacy.loss import losses_of_step


@pytest.mark.parametrize("sigma", [0.05, 0.7, 12.0])
@pytest.mark.parametrize("rate", [1e-4, 0.17, 0.999, 1.0])
def test_all_points_at_once_are_those_found_one_by_one(sigma: float, rate: float) -> None:
    """Of every epsilon, the delta for removing and adding a row; and what a hundred steps cost."""
    width = 2e-3 / min(1.0, sigma)
    ours = losses_of_step(sigma, rate, width)
    theirs = from_gaussian_mechanism(sigma, sampling_prob=rate, value_discretization_interval=width)
    for mine, reference in ((ours._pmf_remove, theirs._pmf_remove), (ours._pmf_add, theirs._pmf_add)):
        assert mine.to_dense_pmf().size == reference.to_dense_pmf().size
        epsilons = np.linspace(-3, 3, 100) / sigma
        np.testing.assert_allclose(
            [mine.get_delta_for_epsilon(epsilon) for epsilon in epsilons],
            [reference.get_delta_for_epsilon(epsilon) for epsilon in epsilons],
            rtol=1e-9,
            atol=1e-14,
        )
    cost = theirs.self_compose(100).get_epsilon_for_delta(1e-6)
    assert ours.self_compose(100).get_epsilon_for_delta(1e-6) == pytest.approx(cost, rel=1e-8, abs=1e-12)
