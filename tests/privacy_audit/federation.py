"""The adapters that a whole federation releases, round by round: do they hold the noises of all its sites?

Three sites train through real rounds, masks and all, in one process (`foedus_simulations.federation`). From the change
of the adapter in a round the gradients of all sites are taken out; what is left has to be the sum of three independent
noises. Sites that share a noise, or an aggregation that loses some, would show here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from foedus_common.adapters import Tensors
from foedus_common.plan import RoundPlan, schedule
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.prepare import first_adapter
from foedus_simulations.corpora import Row
from foedus_simulations.federation import InProcessTrainer, Outcome, simulate
from plans import plan_toml
from privacy_audit.reference import Reals, ReferenceSum, step_factors, tensor_slices
from privacy_audit.residuals import Residuals, deviations
from privacy_audit.specimens import CLIP, DIVISOR
from seeded import seeded
from tiny_model import LABELS, rows

SITES = ("east", "north", "west")
ROWS = 4
"""At each site."""


def plan_of_federation(model_sha256: str, rounds: int) -> str:
    """TOML: one step a round on every row, so that what the sites drew is known from outside; plain averaging."""
    phase = {"sampling_rate": 1.0, "steps": 1, "rounds": rounds, "learning_rate": 1.0}
    return plan_toml(
        model__sha256=model_sha256,
        task__labels=LABELS,
        adapter__rank=2,
        phase=[phase | {"train": "head", "budget_share": 0.5}, phase | {"train": "adapter", "budget_share": 0.5}],
        aggregation={"optimizer": "fedavg"},
        privacy={"unit": "record", "epsilon": 100.0, "delta": 1e-5, "clip": CLIP, "divisor": DIVISOR},
    )


def run(plan: Path, model: Path, classifier: TextClassifier, seed: int) -> Outcome:
    """The federation's run; each site has `ROWS` rows of its own."""
    return simulate(plan, model, _shares(), seed, classifier)


def noise_shared_by_all() -> AbstractContextManager[Any]:
    """A fault: every site draws a round's noise from the same source."""
    train = InProcessTrainer.train

    def drawn_alike(trainer: Any, adapter: Path, adapter_sha256: str, round_plan: RoundPlan) -> Reals:
        trainer._random = seeded(f"round {round_plan.index}")
        return train(trainer, adapter, adapter_sha256, round_plan)

    return mock.patch.object(InProcessTrainer, "train", drawn_alike)


def residuals(outcome: Outcome, classifier: TextClassifier) -> list[Residuals]:
    """What is left of the adapters' changes once all sites' gradients are taken out; one of each phase."""
    befores = [first_adapter(outcome.spec, outcome.agreed.plan.adapter.seed), *outcome.adapters]
    return [_of_phase(outcome, classifier, befores, phase) for phase in range(len(outcome.agreed.plan.phase))]


def _of_phase(outcome: Outcome, classifier: TextClassifier, befores: Sequence[Tensors], phase: int) -> Residuals:
    agreed, spec, clip = outcome.agreed, outcome.spec, outcome.agreed.plan.privacy.clip
    encoded = [classifier.encode([(row.text, row.label) for row in part]) for part in _shares().values()]
    noise, signal = [], []
    rounds = [each for each in schedule(agreed.plan) if each.phase == phase]
    train = rounds[0].settings.train
    for each in rounds:
        before, after = (spec.vector(befores[each.index + n], train).astype(np.float64) for n in (0, 1))
        sums: list[Reals] = [
            ReferenceSum(classifier, befores[each.index], part, clip, each)(before, np.arange(ROWS)) for part in encoded
        ]
        signal.append(np.sum(sums, axis=0))
        left = len(SITES) * (before - after) / step_factors(agreed, each) - signal[-1]
        noise.append(left / deviations(agreed, each, len(SITES), len(SITES)))
    return Residuals(
        noise=np.array(noise),
        signal=np.array(signal),
        off_grid=np.zeros((0, 1)),  # the mean of three is on no grid
        sizes=[len(SITES) * ROWS] * len(rounds),
        tensors=tensor_slices(classifier, train),
        rate=1.0,
        rows=len(SITES) * ROWS,
        steps_due=len(rounds),
    )


def _shares() -> Mapping[str, Sequence[Row]]:
    dealt = [Row(text, label, "") for text, label in rows(len(SITES) * ROWS)]
    return {name: dealt[number :: len(SITES)] for number, name in enumerate(SITES)}
