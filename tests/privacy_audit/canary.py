"""A canary in the released adapter: trained hundreds of times with and without it, does the adapter tell?

The attack sees only what is released in the end, after all rounds and all of their Poisson samples, and knows the rest
of the data. What it proves about epsilon must stay below what the accountant says of the plan; without the noise it
must prove more, or it would be no attack. Head-only training on given features: production's mechanism, no encoder.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from foedus_common.plan import AgreedPlan, Part, schedule
from foedus_common.privacy.accounting import calibrate, epsilon, events_of
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.private_training import HeadGradients, private_update
from foedus_common.tasks.text_classification import no_progress
from plans import run_plan
from privacy_audit.bounds import Errors, epsilon_at_least
from privacy_audit.faults import noise_off
from privacy_audit.reference import Reals
from privacy_audit.specimens import as_sent
from privacy_audit.verdicts import Verdict

LABELS, WIDTH, ROWS = 3, 9, 20
DELTA = 1e-5
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Study:
    """A plan, and rows of which the last is the canary. features: float32 (ROWS + 1, WIDTH); labels: int64."""

    agreed: AgreedPlan
    features: torch.Tensor
    labels: NDArray[np.int64]

    @property
    def accounted(self) -> float:
        return epsilon(events_of(self.agreed), DELTA)


def study(target_epsilon: float) -> Study:
    """Twelve Poisson steps in three rounds that cost `target_epsilon`; the canary has a feature that no other row has,
    and like every row it is clipped."""
    phase = {"train": "head", "rounds": 3, "steps": 4, "sampling_rate": 0.5, "learning_rate": 1.0, "budget_share": 1.0}
    plan = run_plan(
        phase=[phase],
        privacy={"unit": "record", "epsilon": target_epsilon, "delta": DELTA, "clip": 0.5, "divisor": ROWS // 2},
        secure_aggregation__retries=0,
    )
    size = LABELS * WIDTH
    agreed = AgreedPlan(1, plan, calibrate(plan, [size]), ((Part("head", size),),), "b" * 64, "c" * 64)
    random = np.random.default_rng(0)
    features = random.normal(size=(ROWS + 1, WIDTH))
    features[:, -1] = 0
    features[ROWS] = np.eye(WIDTH)[-1]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels = random.integers(0, LABELS, ROWS + 1)
    return Study(agreed, torch.tensor(features, dtype=torch.float32), labels)


def released_adapter(of: Study, canary: bool, random: RandomBytes) -> Reals:
    """The head after all rounds, (LABELS * WIDTH,): each round's update as it is sent, added to the one before."""
    agreed, rows = of.agreed, ROWS + canary
    gradients = HeadGradients(of.features[:rows], of.labels[:rows], agreed.plan.privacy.clip)
    head = np.zeros(LABELS * WIDTH)
    for round_plan in schedule(agreed.plan):
        update = private_update(head, gradients, rows, agreed, round_plan, random, no_progress)
        head = head + as_sent(agreed, round_plan, update, random)
    return head


@dataclass(frozen=True)
class Told:
    """epsilon: proved with CONFIDENCE; advantage: true minus false positive rate, as counted."""

    epsilon: float
    advantage: float


def attack(of: Study, trainings: int, random: RandomBytes) -> Told:
    """`trainings` with the canary and as many without: half of them choose the threshold, the other half count.

    The score is the canary's own logit against the others', which its gradient raises.
    """
    label = int(of.labels[ROWS])

    def scores(canary: bool) -> Reals:
        heads = [released_adapter(of, canary, random).reshape(LABELS, WIDTH) for _ in range(trainings)]
        logits = np.array([head @ of.features[ROWS].double().numpy() for head in heads])
        return logits[:, label] - (logits.sum(axis=1) - logits[:, label]) / (LABELS - 1)

    without, present, half = scores(False), scores(True), trainings // 2

    def errors(threshold: float, part: slice) -> Errors:
        alarms, misses = without[part] > threshold, present[part] <= threshold
        return Errors(int(alarms.sum()), alarms.size, int(misses.sum()), misses.size)

    candidates = np.quantile(np.concatenate([without[:half], present[:half]]), np.linspace(0.01, 0.99, 99))
    best = max(candidates, key=lambda threshold: errors(threshold, slice(half)).advantage)
    counted = errors(best, slice(half, None))
    return Told(epsilon_at_least(counted, DELTA, CONFIDENCE), counted.advantage)


def verdicts(of: Study, trainings: int, random: RandomBytes) -> list[Verdict]:
    accounted = of.accounted
    noised = attack(of, trainings, random)
    with noise_off():
        bare = attack(of, trainings, random)
    limit = (math.exp(accounted) - 1 + 2 * DELTA) / (math.exp(accounted) + 1)
    return [
        Verdict(
            f"canary in the adapter, {2 * trainings} trainings, 95 %",
            f"epsilon >= {noised.epsilon:.2f}, advantage {noised.advantage:.2f}",
            f"<= {accounted:.3f} accounted, advantage {limit:.2f}",
            noised.epsilon <= accounted,
        ),
        Verdict(
            "... and with the noise off",
            f"epsilon >= {bare.epsilon:.2f}, advantage {bare.advantage:.2f}",
            f"> {accounted:.3f}: the attack works",
            bare.epsilon > accounted,
        ),
    ]
