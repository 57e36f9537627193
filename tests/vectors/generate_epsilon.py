"""Epsilons of an independent accountant: `pip install prv-accountant==0.2.0 mpmath`, then run this to rewrite the JSON.

It imports nothing of Foedus. Sampled cases are from Microsoft's prv-accountant (Gopi, Lee, Wutschitz: Numerical
Composition of Differential Privacy, NeurIPS 2021), which gives an estimate between two bounds; unsampled ones are the
closed form of Balle and Wang (ICML 2018, theorem 8) to fifty digits. Not run by the tests: it takes a minute.
"""

from __future__ import annotations

import json
from math import sqrt
from pathlib import Path

import mpmath
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

SAMPLED = [  # ((sampling rate, noise multiplier, steps), ...), delta
    ([(0.01, 1.0, 1000)], 1e-5),
    ([(0.01, 0.7, 500)], 1e-6),
    ([(0.01, 4.0, 10000)], 1e-5),
    ([(0.02, 1.1, 2000)], 1e-5),
    ([(0.005, 0.8, 5000)], 1e-7),
    ([(0.001, 0.6, 10000)], 1e-6),
    ([(0.1, 1.0, 20)], 1e-5),
    ([(0.1, 2.0, 200)], 1e-5),
    ([(0.17, 1.0, 20)], 1e-5),
    ([(0.17, 1.5, 16)], 1e-6),
    ([(0.17, 0.7, 5)], 1e-5),
    ([(0.2, 1.2, 16)], 1e-5),
    ([(0.2, 3.0, 100)], 1e-4),
    ([(0.3, 2.0, 40)], 1e-5),
    ([(0.5, 2.5, 40)], 1e-5),
    ([(0.5, 13.0, 40)], 1e-5),
    ([(0.5, 6.0, 400)], 1e-6),
    ([(0.9, 4.0, 30)], 1e-5),
    ([(0.9, 12.0, 60)], 1e-3),
    ([(0.05, 5.0, 3000)], 1e-8),
    ([(0.25, 1.0, 3)], 1e-3),
    ([(0.05, 0.8, 50)], 1e-5),
    ([(0.5, 8.0, 60), (0.17, 1.2, 20)], 1e-5),  # two phases
    ([(0.1, 1.5, 100), (0.01, 0.9, 500)], 1e-6),
    ([(0.2, sqrt(2) * 1.2, 62)], 1e-5),  # rounds of one step, 2 or 5 honest sites' noises in each sum
    ([(0.5, sqrt(5) * 3.0, 60)], 1e-6),
    ([(0.3, sqrt(5) * 1.5, 20), (0.17, 1.2, 20)], 1e-5),  # ... before a phase of several steps a round
]
UNSAMPLED = [
    (0.7, 1, 1e-5), (1.0, 3, 1e-6), (2.0, 1, 1e-5), (13.1, 66, 1e-5), (5.0, 10, 1e-3), (40.0, 200, 1e-8),
    (sqrt(2) * 4.7375, 62, 1e-5), (sqrt(5) * 4.7375, 62, 1e-5),
]  # fmt: skip


def numerical(parts: list[tuple[float, float, int]], delta: float) -> tuple[float, float, float]:
    """Lower bound, estimate and upper bound; the second pass is as fine as a thousandth of the first's answer."""
    steps = [count for _, _, count in parts]
    mechanisms = [
        PoissonSubsampledGaussianMechanism(noise_multiplier=multiplier, sampling_probability=rate)
        for rate, multiplier, _ in parts
    ]
    answer = (0.0, 10.0, 0.0)
    for error in (0.1, 0.001):
        accountant = PRVAccountant(
            prvs=mechanisms, max_self_compositions=steps, eps_error=error * answer[1], delta_error=delta / 1000
        )
        answer = tuple(float(value) for value in accountant.compute_epsilon(delta=delta, num_self_compositions=steps))
    return answer


def closed_form(multiplier: float, steps: int, delta: float) -> float:
    """Of `steps` Gaussians, which are one of multiplier / sqrt(steps)."""
    with mpmath.workdps(50):
        z = mpmath.mpf(multiplier) / mpmath.sqrt(steps)

        def excess(at: mpmath.mpf) -> mpmath.mpf:
            return mpmath.ncdf(1 / (2 * z) - at * z) - mpmath.exp(at) * mpmath.ncdf(-1 / (2 * z) - at * z) - delta

        low, high = mpmath.mpf(0), mpmath.mpf(100)
        for _ in range(150):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return float(low)


def main() -> None:
    cases = []
    for parts, delta in SAMPLED:
        low, estimate, high = numerical(parts, delta)
        cases.append({"events": parts, "delta": delta, "low": low, "estimate": estimate, "high": high})
    for multiplier, steps, delta in UNSAMPLED:
        exact = closed_form(multiplier, steps, delta)
        events = [(1.0, multiplier, steps)]
        cases.append({"events": events, "delta": delta, "low": exact, "estimate": exact, "high": exact})
    Path(__file__).with_name("epsilon.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
