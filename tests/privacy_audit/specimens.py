"""What is examined: a site's trainer on a small model, and the vectors that it really releases.

`releases` trains the plan's rounds with production's `LocalTrainer`, encodes each update as the site does before it is
masked, and decodes it again: what the coordinator would hold if secure aggregation were broken. A witness notes the
vector and the rows of every step, so that the noise of each step can be told from the gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from foedus_client.round import encoded
from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.randomness import RandomBytes
from foedus_common.tasks import local_trainer
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from foedus_common.terms import field_layout
from privacy_audit.reference import Reals, step_factors
from tiny_model import tiny_agreed

CLIP = 0.05
"""Far below the norms of the tiny model's gradients, tensor by tensor: every row is clipped, whatever the rule."""

DIVISOR = 10


@dataclass(frozen=True)
class Specimen:
    """A trainer with its rows, the plan it trains by, and the adapter that the first round starts from."""

    trainer: LocalTrainer
    agreed: AgreedPlan
    adapter: Tensors

    @property
    def classifier(self) -> TextClassifier:
        return self.trainer.classifier


@dataclass(frozen=True)
class Step:
    """Where a step began, (d,), and the rows that it drew."""

    vector: Reals
    rows: NDArray[np.int64]


@dataclass(frozen=True)
class Release:
    """One round's vector. update: as decoded from its encoding; exact: before the encoding; both float64 (d,)."""

    round_plan: RoundPlan
    adapter: Tensors
    start: Reals
    steps: Sequence[Step]
    exact: Reals
    update: Reals


def tiny_plan_of_noise(folder: Path) -> AgreedPlan:
    """168 steps on eight rows, nearly half of them on an empty batch; every group has a rate and a scale of its own.

    The noise is a tenth of the clip: the smaller it is, the better a wrong gradient shows in what is left over.
    """
    agreed = tiny_agreed(
        folder,
        privacy={"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip": CLIP, "divisor": DIVISOR},
        phase__0__rounds=30,
        phase__0__steps=4,
        phase__0__sampling_rate=0.1,
        phase__1__rounds=16,
        phase__1__steps=3,
        phase__1__sampling_rate=0.1,
        phase__1__head_scale=2.0,
        phase__1__head_learning_rate=4.0,
    )
    return dataclasses.replace(agreed, noise_multipliers=(0.1, 0.1))


def random_adapter(classifier: TextClassifier, seed: int) -> dict[str, NDArray[np.float32]]:
    """Any adapter: its numbers are no secret, and gradients of a zero head would vanish below it."""
    random = np.random.default_rng(seed)
    return {t.name: (0.3 * random.normal(size=t.shape)).astype(np.float32) for t in classifier.spec.tensors}


def releases(specimen: Specimen, random: RandomBytes) -> list[Release]:
    """Every round of the plan, each from the adapter that the one before it released."""
    spec, adapter, made = specimen.classifier.spec, specimen.adapter, []
    for round_plan in schedule(specimen.agreed.plan):
        train = round_plan.settings.train
        start = spec.vector(adapter, train).astype(np.float64)
        with witnessed() as steps:
            exact = specimen.trainer.train(adapter, round_plan, random)
        update = as_sent(specimen.agreed, round_plan, exact, random)
        made.append(Release(round_plan, adapter, start, steps, exact, update))
        adapter = spec.with_update(adapter, train, update)
    return made


def as_sent(agreed: AgreedPlan, round_plan: RoundPlan, update: Reals, random: RandomBytes) -> Reals:
    """The update after the site's own encoding, to which masks are added next, (d,)."""
    layout = field_layout(agreed, round_plan)
    return layout.decode(encoded(update, agreed, round_plan, layout, random), 1)


def opened(trainers: Sequence[LocalTrainer], agreed: AgreedPlan, adapter: Tensors, random: RandomBytes) -> Reals:
    """What a secure sum of the first round opens, (d,): all sites' noised sums of gradients together. The plan's rounds
    are one step."""
    round_plan = schedule(agreed.plan)[0]
    layout = field_layout(agreed, round_plan)
    updates = (trainer.train(adapter, round_plan, random) for trainer in trainers)
    words = sum(encoded(update, agreed, round_plan, layout, random) for update in updates)
    return -layout.decode(words, len(trainers)) / step_factors(agreed, round_plan)


@contextmanager
def witnessed() -> Iterator[list[Step]]:
    """While it is open, every step that `private_update` asks a clipped sum for is noted."""
    steps: list[Step] = []
    inner = local_trainer.private_update

    def watched(start: Reals, clipped_sum: Any, *others: Any) -> Reals:
        def noting(vector: Reals, rows: NDArray[np.int64]) -> Reals:
            steps.append(Step(vector.copy(), rows.copy()))
            return clipped_sum(vector, rows)

        return inner(start, noting, *others)

    with mock.patch.object(local_trainer, "private_update", watched):
        yield steps
