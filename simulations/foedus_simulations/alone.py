"""What is reached without federation: by a site on its rows alone, or with all rows in one place; same privacy.

No coordinator, no secure sum, no ledger: a site that keeps everything to itself spends nobody's budget by being
simulated. It gets the plan's noise, the plan's schedule and the best of several learning rates, chosen on validation
rows; the held-out rows are read once, for the one adapter that was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, Phase, RunPlan, schedule
from foedus_common.privacy.accounting import calibrate
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.rows import EncodedRows
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.aggregation import ServerOptimizer
from foedus_server.prepare import first_adapter
from foedus_simulations.corpora import Row

RATES = (0.5, 1.0, 2.0)
"""Factors on the plan's learning rates that a site tries."""


@dataclass(frozen=True)
class Alone:
    """accuracy: on the held-out rows, of the best of RATES on the validation rows."""

    accuracy: float
    rate: float


def alone(
    classifier: TextClassifier,
    agreed: AgreedPlan,
    first: Tensors,
    rows: Sequence[Row],
    validation: EncodedRows,
    held_out: EncodedRows,
    random: RandomBytes,
) -> Alone:
    """Trains on one site's rows with each rate and measures the best. first: the adapter that the plan starts from."""
    trainer = LocalTrainer(classifier, agreed, pairs(rows))
    trained = {}
    for rate in RATES:
        tensors = train(trainer, at_rate(agreed.plan, rate), first, random)
        trained[rate] = (classifier.accuracy(tensors, validation), tensors)
    best = max(trained, key=lambda rate: trained[rate][0])
    return Alone(classifier.accuracy(trained[best][1], held_out), best)


def central(agreed: AgreedPlan, sites: int) -> AgreedPlan:
    """The plan for one place that holds the rows of all `sites`: it divides by all their rows; the noise stays, so the
    privacy does."""
    divisor = agreed.plan.privacy.divisor
    if divisor is None:
        return agreed
    privacy = dataclasses.replace(agreed.plan.privacy, divisor=divisor * sites)
    return dataclasses.replace(agreed, plan=dataclasses.replace(agreed.plan, privacy=privacy))


def head_only(plan: RunPlan, classifier: TextClassifier) -> tuple[AgreedPlan, dict[str, NDArray[np.float32]]]:
    """The plan's head phase with the whole budget, and the adapter that it starts from.

    It is the stronger choice for a site alone: the noise of an adapter phase does not shrink with the site's rows.
    """
    phase = dataclasses.replace(next(each for each in plan.phase if each.train == "head"), budget_share=1.0)
    alone_plan = dataclasses.replace(plan, phase=(phase,))
    spec = classifier.spec
    agreed = AgreedPlan(
        run_id=1,
        plan=alone_plan,
        noise_multipliers=calibrate(alone_plan, [spec.size("head")]) if plan.privacy.on else (),
        trained=(spec.parts("head"),),
        spec_sha256=spec.digest().hex(),
        first_adapter_sha256="0" * 64,
    )
    return agreed, first_adapter(spec, plan.adapter.seed)


def train(trainer: LocalTrainer, plan: RunPlan, first: Tensors, random: RandomBytes) -> Tensors:
    """The adapter after all rounds of `plan`, if this trainer's site were the only one. The trainer's own plan gives
    the noise; `plan` differs from it in learning rates at most."""
    spec, tensors = trainer.classifier.spec, first
    for number, phase in enumerate(plan.phase):
        optimizer = ServerOptimizer(plan.aggregation)
        vectors: list[NDArray[np.float64]] = [spec.vector(tensors, phase.train).astype(np.float64)]
        for round_plan in (each for each in schedule(plan) if each.phase == number):
            update = trainer.train(tensors, round_plan, random)
            vectors.append(optimizer.step(round_plan.index, vectors[-1], update))
            tensors = spec.with_vector(tensors, phase.train, vectors[-1])
        last = vectors[1:][-plan.aggregation.average_last :]
        tensors = spec.with_vector(tensors, phase.train, np.mean(last, axis=0))
    return tensors


def at_rate(plan: RunPlan, factor: float) -> RunPlan:
    """The plan with every learning rate times `factor`."""

    def changed(phase: Phase) -> Phase:
        head = None if phase.head_learning_rate is None else factor * phase.head_learning_rate
        return dataclasses.replace(phase, learning_rate=factor * phase.learning_rate, head_learning_rate=head)

    return dataclasses.replace(plan, phase=tuple(map(changed, plan.phase)))


def pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in rows]
