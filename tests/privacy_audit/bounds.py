"""What counts of an attack's successes prove about privacy, with the confidence that goes with it.

Lower bounds from attacks follow Nasr et al., Tight Auditing of Differentially Private Machine Learning (USENIX
Security 2023): Clopper-Pearson intervals of both error rates, turned into mu of Gaussian DP (Dong, Roth, Su: Gaussian
Differential Privacy, JRSS B 2022, definition 4) or into epsilon. They assume nothing about the mechanism.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Errors:
    """What an attack with a threshold fixed beforehand got wrong: in trials without the record, and with it."""

    false_alarms: int
    without: int
    misses: int
    present: int

    @property
    def advantage(self) -> float:
        """True minus false positive rate, as counted."""
        return 1 - self.misses / self.present - self.false_alarms / self.without

    def upper(self, confidence: float) -> tuple[float, float]:
        """Upper ends of both rates, which hold together with this confidence."""
        each = (1 + confidence) / 2
        return at_most(self.false_alarms, self.without, each), at_most(self.misses, self.present, each)


def at_most(successes: int, trials: int, confidence: float) -> float:
    """The largest rate that explains so few successes (Clopper, Pearson 1934), one-sided."""
    return 1.0 if successes == trials else float(stats.beta.ppf(confidence, successes + 1, trials - successes))


def mu_at_least(errors: Errors, confidence: float) -> float:
    """The mechanism is mu-GDP for no smaller mu: a test of it has errors a, b with ppf(1 - a) - ppf(b) <= mu."""
    false_alarms, misses = errors.upper(confidence)
    return max(0.0, float(-stats.norm.ppf(false_alarms) - stats.norm.ppf(misses)))


def epsilon_at_least(errors: Errors, delta: float, confidence: float) -> float:
    """The mechanism is (epsilon, delta)-DP for no smaller epsilon (Kairouz, Oh, Viswanath 2015): both directions."""
    false_alarms, misses = errors.upper(confidence)
    ratios = ((1 - misses - delta) / false_alarms, (1 - false_alarms - delta) / misses)
    return max(0.0, *(math.log(ratio) if ratio > 0 else 0.0 for ratio in ratios))


def guess_at_most(chance: float, mu: float) -> float:
    """How often a record is guessed from a mu-GDP release, at most, if `chance` is the rate without one: the trade-off
    function at `chance` (Hayes, Mahloujifar, Balle: Bounding Training Data Reconstruction in DP-SGD, NeurIPS 2023)."""
    return float(stats.norm.cdf(stats.norm.ppf(chance) + mu))
