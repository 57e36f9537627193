"""Is one record in the data? The strongest adversary there is asks it of real releases, and may not know too often.

It knows every other row, the record, the code and the adapter: all but the noise. With one full batch the answer's
trade-off is that of a Gaussian of mu = 1 / accounted multiplier, so what the adversary gets may not exceed it, and, if
the noise is not more than was asked for, comes close.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, schedule
from foedus_common.privacy.noise import ARITHMETIC_SLACK, accounted_multiplier
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import noise_grid
from foedus_common.tasks import local_trainer
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from privacy_audit.bounds import Errors, mu_at_least
from privacy_audit.faults import bare_sums
from privacy_audit.reference import GRID, Reals, step_factors
from privacy_audit.specimens import CLIP, DIVISOR, opened
from privacy_audit.verdicts import ALARM_RATE, Verdict
from tiny_model import rows, tiny_agreed

SHOWN = 0.95
"""Confidence of the figures in the table; an alarm needs that of `ALARM_RATE`."""


def tiny_plan_of_membership(folder: Path, **changes: Any) -> AgreedPlan:
    """One round of one full batch, its noise as wide as the clip."""
    phase = {"train": "adapter", "rounds": 1, "steps": 1, "sampling_rate": 1.0, "budget_share": 1.0}
    return tiny_agreed(
        folder,
        privacy={"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip": CLIP, "divisor": DIVISOR},
        phase=[phase | {"learning_rate": 1.0, "head_scale": 2.0}],
        **changes,
    )


@dataclass(frozen=True)
class Neighbours:
    """Two trainers whose data differ in one record, `present` having it."""

    without: LocalTrainer
    present: LocalTrainer
    agreed: AgreedPlan
    adapter: Tensors


def neighbours(classifier: TextClassifier, agreed: AgreedPlan, adapter: Tensors, record: int = 5) -> Neighbours:
    """Five of the tiny model's rows, and a record of one of its other rows."""
    others = rows(5)
    without = LocalTrainer(classifier, agreed, others)
    present = LocalTrainer(classifier, agreed, [*others, rows()[record]])
    return Neighbours(without, present, agreed, adapter)


@dataclass(frozen=True)
class Distinguished:
    """How well the adversary did. accounted: the mu that is charged for; proved and shown: lower bounds of the true mu,
    with the confidence of an alarm and with that of the table."""

    accounted: float
    proved: float
    shown: float

    @property
    def alarm(self) -> bool:
        return self.proved > self.accounted


def distinguish(pair: Neighbours, trials: int, random: RandomBytes, honest: int = 1) -> Distinguished:
    """`trials` releases of each dataset, told apart by a threshold half way along what the record changes.

    honest: sites in the sum that is seen. All but the record's own have the rows of `pair.without`, which the adversary
    knows; of their noise it knows nothing.
    """
    agreed, others = pair.agreed, [pair.without] * (honest - 1)
    with remembered_sums():
        without, present = noiseless_sums(pair)
        direction = (present - without) / np.linalg.norm(present - without)
        threshold = float((present + without) @ direction) / 2 + len(others) * float(without @ direction)

        def alarms(trainer: LocalTrainer) -> int:
            return sum(
                float(opened([trainer, *others], agreed, pair.adapter, random) @ direction) > threshold
                for _ in range(trials)
            )

        errors = Errors(alarms(pair.without), trials, trials - alarms(pair.present), trials)
    accounted = 1 / accounted_multiplier(noise_grid(agreed, 0), agreed.size(0), honest)
    return Distinguished(accounted, mu_at_least(errors, 1 - ALARM_RATE), mu_at_least(errors, SHOWN))


def noiseless_sums(pair: Neighbours) -> tuple[Reals, Reals]:
    """The sums that the noise would have been added to, of both datasets, each (d,)."""
    round_plan = schedule(pair.agreed.plan)[0]
    factors = step_factors(pair.agreed, round_plan)
    with bare_sums():
        updates = [trainer.train(pair.adapter, round_plan, bytes) for trainer in (pair.without, pair.present)]
    return -updates[0] / factors, -updates[1] / factors


def sensitivity(pairs: Sequence[Neighbours]) -> Verdict:
    """How far any of the records moves the sum, in clips; the accountant allows one, the grid and the arithmetic."""
    clip, size = pairs[0].agreed.plan.privacy.clip, pairs[0].agreed.size(0)
    furthest = max(float(np.linalg.norm(np.subtract(*noiseless_sums(pair)))) for pair in pairs) / clip
    allowed = (1 + math.sqrt(size) / GRID) * (1 + ARITHMETIC_SLACK)
    said, bound = f"{furthest:.6f} clips", f"<= {allowed:.4f}"
    return Verdict("one record moves the sum by at most the clip", said, bound, furthest <= allowed)


def rows_apart(
    classifier: TextClassifier, agreed: AgreedPlan, adapter: Tensors, data: Sequence[tuple[str, str]]
) -> float:
    """How far the sum over all rows, computed in batches, is from what the rows give one by one, in clips.

    What a row adds must not depend on which others are in its batch, or the others would move with it.
    """
    round_plan = next(each for each in schedule(agreed.plan) if each.settings.train == "adapter")
    encoded, clip = classifier.encode(data), agreed.plan.privacy.clip
    gradients = local_trainer.AdapterGradients(classifier, adapter, encoded, clip, round_plan)
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64)
    together = gradients(vector, np.arange(len(data)))
    alone = sum(gradients(vector, np.array([row])) for row in range(len(data)))
    return float(np.linalg.norm(together - alone)) / clip


@contextmanager
def remembered_sums() -> Iterator[None]:
    """While it is open, a sum that was asked for before is not computed again: only noise differs between trials."""
    inner = local_trainer.AdapterGradients
    sums: dict[tuple[int, bytes, bytes], Reals] = {}

    def build(classifier: TextClassifier, adapter: Tensors, data: Any, *others: Any) -> Any:
        gradients = inner(classifier, adapter, data, *others)

        def remembering(vector: Reals, chosen: NDArray[np.int64]) -> Reals:
            key = (id(data), vector.tobytes(), chosen.tobytes())
            if key not in sums:
                sums[key] = gradients(vector, chosen)
            return sums[key]

        return remembering

    with mock.patch.object(local_trainer, "AdapterGradients", build):
        yield


def verdicts(found: Distinguished, of: str = "membership of the worst record") -> list[Verdict]:
    reach = f"mu >= {found.shown:.3f} (95 %)"
    return [
        Verdict(of, reach, f"<= {found.accounted:.3f} accounted", not found.alarm),
        Verdict(
            "... and the attack has power",
            f"{found.shown / found.accounted:.2f} of the accounted mu",
            ">= 0.75",
            found.shown >= 0.75 * found.accounted,
        ),
    ]
