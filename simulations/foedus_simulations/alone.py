"""What is reached without federation: by a site on its rows alone, or with all rows in one place; same privacy.

No coordinator, no secure sum, no ledger: a site that keeps everything to itself spends nobody's budget by being
simulated. Each gets the plan's noise, the plan's schedule and the best of several learning rates, chosen on validation
rows; the rows that count are read once, for the one adapter that was chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
from foedus_simulations.randomness import seeded

RATES = (0.5, 1.0, 2.0)
"""Factors on the plan's learning rates that are tried."""

COMPARISONS = ("alone", "central")


@dataclass(frozen=True)
class Judges:
    """Rows that choose the learning rate, and rows that count."""

    validation: EncodedRows
    test: EncodedRows


@dataclass(frozen=True)
class Comparison:
    """Accuracies on the rows that count; alone: by site; central: with all rows in one place. Empty: not asked for."""

    alone: Mapping[str, float]
    central: float | None


def compare(
    classifier: TextClassifier,
    agreed: AgreedPlan,
    rows: Mapping[str, Sequence[Row]],
    judges: Judges,
    *,
    seed: int,
    wanted: Sequence[str] = COMPARISONS,
    rates: Sequence[float] = RATES,
    say: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Trains each site alone, and then on all rows, as far as that is `wanted`. say: told what begins."""
    first = first_adapter(classifier.spec, agreed.plan.adapter.seed)
    trainers = {name: LocalTrainer(classifier, agreed, pairs(part)) for name, part in rows.items()}
    alone = {}
    if "alone" in wanted:
        for name, trainer in trainers.items():
            say(f"{name} alone")
            alone[name] = best_of_rates(trainer, agreed.plan, rates, first, judges, seeded(seed, f"{name} alone"))
    if "central" not in wanted:
        return Comparison(alone, None)
    say("all rows in one place")
    everything = pooled(list(trainers.values()), agreed, [row for part in rows.values() for row in part])
    plan = in_one_place(agreed, len(rows)).plan
    return Comparison(alone, best_of_rates(everything, plan, rates, first, judges, seeded(seed, "central")))


def best_of_rates(
    trainer: LocalTrainer,
    plan: RunPlan,
    rates: Sequence[float],
    first: Tensors,
    judges: Judges,
    random: RandomBytes,
) -> float:
    """Accuracy on the rows that count, of the rate that did best on the validation rows."""
    classifier = trainer.classifier
    trained = [train(trainer, at_rate(plan, rate), first, random) for rate in rates]
    best = trained[0]
    if len(trained) > 1:
        best = max(trained, key=lambda tensors: classifier.accuracy(tensors, judges.validation))
    return classifier.accuracy(best, judges.test)


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


def pooled(trainers: Sequence[LocalTrainer], agreed: AgreedPlan, rows: Sequence[Row]) -> LocalTrainer:
    """A trainer of all `rows`, those of the trainers in their order; features that they hold are not computed again."""
    everything = LocalTrainer(trainers[0].classifier, in_one_place(agreed, len(trainers)), pairs(rows))
    for key in set.intersection(*(set(trainer.rows.features) for trainer in trainers)):
        everything.rows.features[key] = torch.cat([trainer.rows.features[key] for trainer in trainers])
    return everything


def in_one_place(agreed: AgreedPlan, sites: int) -> AgreedPlan:
    """The plan for one place that holds the rows of all `sites`: it divides by all their rows; the noise stays, so the
    privacy does. Nothing is summed there, so that no narrow field has to hold it."""
    divisor = agreed.plan.privacy.divisor
    if divisor is None:
        return agreed
    privacy = dataclasses.replace(agreed.plan.privacy, divisor=divisor * sites)
    secure = dataclasses.replace(agreed.plan.secure_aggregation, field_bits=32)
    plan = dataclasses.replace(agreed.plan, privacy=privacy, secure_aggregation=secure)
    return dataclasses.replace(agreed, plan=plan)


def head_only(plan: RunPlan) -> RunPlan:
    """The plan's head phase with the whole budget.

    It is the stronger choice for a site alone: the noise of an adapter phase does not shrink with the site's rows.
    """
    phase = dataclasses.replace(next(each for each in plan.phase if each.train == "head"), budget_share=1.0)
    return dataclasses.replace(plan, phase=(phase,))


def agree(plan: RunPlan, classifier: TextClassifier) -> AgreedPlan:
    """The plan with its noise solved, for training here only: it belongs to no run."""
    spec = classifier.spec
    sizes = [spec.size(phase.train) for phase in plan.phase]
    return AgreedPlan(
        run_id=1,
        plan=plan,
        noise_multipliers=calibrate(plan, sizes) if plan.privacy.on else (),
        trained=tuple(spec.parts(phase.train) for phase in plan.phase),
        spec_sha256=spec.digest().hex(),
        first_adapter_sha256="0" * 64,
    )


def at_rate(plan: RunPlan, factor: float) -> RunPlan:
    """The plan with every learning rate times `factor`."""

    def changed(phase: Phase) -> Phase:
        head = None if phase.head_learning_rate is None else factor * phase.head_learning_rate
        return dataclasses.replace(phase, learning_rate=factor * phase.learning_rate, head_learning_rate=head)

    return dataclasses.replace(plan, phase=tuple(map(changed, plan.phase)))


def pairs(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row.text, row.label) for row in rows]
