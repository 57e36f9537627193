"""Where the site is the unit of privacy: is what it sends its update, clipped, and a share of the stated noise?

There is no noise in training then; it comes when the update is encoded. So the update is known, and what is left of the
decoded vector once the clipped update is taken out has to pass the tests that noise in steps passes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.privacy import site_level
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import site_grid
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from plans import by_site
from privacy_audit.faults import Fault
from privacy_audit.reference import Reals, group_values, tensor_slices, whole_vector
from privacy_audit.residuals import Residuals
from privacy_audit.specimens import Specimen, as_sent, random_adapter
from privacy_audit.verdicts import Verdict
from seeded import seeded
from tiny_model import rows, tiny_agreed

ROUNDS = 8


def tiny_specimen_of_site(folder: Path, seed: int) -> Specimen:
    """Two phases of `ROUNDS` rounds, whose updates are all longer than the clip."""
    rounds = {"phase__0__rounds": ROUNDS, "phase__1__rounds": ROUNDS, "phase__1__head_scale": 2.0}
    agreed = dataclasses.replace(tiny_agreed(folder, **(by_site() | rounds)), noise_multipliers=(0.1, 0.1))
    classifier = TextClassifier.load(folder, agreed.plan, dtype="float32")
    return Specimen(LocalTrainer(classifier, agreed, rows(8)), agreed, random_adapter(classifier, seed))


def residuals(specimen: Specimen, random: RandomBytes) -> list[Residuals]:
    """What is left of each round's vector, all from the same adapter; one of each phase."""
    plan = specimen.agreed.plan
    return [
        _of_phase(specimen, [each for each in schedule(plan) if each.phase == phase], random)
        for phase in range(len(plan.phase))
    ]


def _of_phase(specimen: Specimen, rounds: list[RoundPlan], random: RandomBytes) -> Residuals:
    agreed, classifier, train = specimen.agreed, specimen.classifier, rounds[0].settings.train
    tensors, clip, grid = tensor_slices(classifier, train), agreed.plan.privacy.clip, site_grid(agreed, rounds[0].phase)
    noise, signal, off_grid = [], [], []
    for each in rounds:
        update = specimen.trainer.train(specimen.adapter, each, random)
        scales = group_values(agreed, each, each.scale)
        signal.append(whole_vector(update, scales, clip, tensors))
        sent = as_sent(agreed, each, update, random) * scales * (grid.units / clip)
        left = sent - signal[-1] * (grid.units / clip)
        noise.append(left / np.sqrt(grid.sigma**2 + 1 / 12))  # the update is rounded to whole units
        off_grid.append(np.abs(sent - np.rint(sent)))
    return Residuals(
        noise=np.array(noise),
        signal=np.array(signal),
        off_grid=np.array(off_grid),
        sizes=[len(specimen.trainer.rows)] * len(rounds),
        tensors=tensors,
        rate=1.0,
        rows=len(specimen.trainer.rows),
        steps_due=len(rounds),
    )


def shares_together(agreed: AgreedPlan) -> Verdict:
    """What noise three sites have together, one of which keeps its own to itself, against the plan's."""
    grids = [site_grid(agreed, phase) for phase in range(len(agreed.plan.phase))]
    widths = [math.sqrt(2) * grid.sigma / grid.units for grid in grids]
    least = min(width / z for width, z in zip(widths, agreed.noise_multipliers, strict=True))
    return Verdict("two shares of three are the plan's noise", f"{least:.5f} of it", ">= 1", least >= 1)


# --- Faults ---

_gaussian, _clipped = site_level.discrete_gaussian, site_level.clipped


def _drawn(sigma_of: Any, random_of: Any) -> AbstractContextManager[Any]:
    def draw(sigma: int, size: int, random: RandomBytes) -> NDArray[np.int64]:
        return _gaussian(sigma_of(sigma), size, random_of(random))

    return mock.patch.object(site_level, "discrete_gaussian", draw)


def _twice_the_clip(vector: Reals, clip: float, units: int) -> NDArray[np.int64]:
    return _clipped(vector, 2 * clip, 2 * units)


SITE_FAULTS: Mapping[str, Fault] = {
    "a site's noise halved": lambda: _drawn(lambda sigma: sigma // 2, lambda random: random),
    "a site's noise the same in every round": lambda: _drawn(lambda sigma: sigma, lambda random: seeded("the same")),
    "a site's update clipped at twice the bound": lambda: mock.patch.object(site_level, "clipped", _twice_the_clip),
}
