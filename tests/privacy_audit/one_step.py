"""Rounds of one step: is what a site sends its sum of gradients with just the stated noise, and do noises add up?

The same sums are released again and again, in fields so narrow that a clipping bound has a few dozen units: rounding to
them, before the noise or after it, would show. The sums of several sites are added as packed words, which is what
secure aggregation opens, and have to be as private as `epsilon_central` is accounted for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from scipy import stats

from foedus_common.plan import AgreedPlan, schedule
from foedus_common.privacy import gaussian, noise
from foedus_common.privacy.noise import NoiseGrid
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import honest_sites, noise_grid
from privacy_audit.faults import Fault, noise_replaced
from privacy_audit.membership import Neighbours, noiseless_sums, remembered_sums, tiny_plan_of_membership
from privacy_audit.reference import Reals, tensor_slices
from privacy_audit.residuals import Residuals, findings
from privacy_audit.specimens import opened
from privacy_audit.verdicts import Finding
from seeded import seeded

NARROW = {"secure_aggregation__field_bits": 14, "secure_aggregation__max_sites": 18}
"""Leave the noise some 23 units."""


def tiny_plan_of_one_step(folder: Path) -> AgreedPlan:
    """One round of one full batch in narrow fields; two of three sites are honest in every sum."""
    return tiny_plan_of_membership(folder, **NARROW)


def found(pair: Neighbours, sites: int, trials: int, random: RandomBytes) -> list[Finding]:
    """Every test of `trials` sums over so many sites, each of which has the rows that `pair.without` has."""
    agreed, grid = pair.agreed, noise_grid(pair.agreed, 0)
    unit = agreed.plan.privacy.clip / grid.units
    with remembered_sums():
        total = noiseless_sums(pair)[0]
        sums = np.array([opened([pair.without] * sites, agreed, pair.adapter, random) for _ in range(trials)])
    sigma = math.sqrt(sites) * grid.sigma / 2**grid.halvings
    left = (sums - sites * total) / unit / sigma
    residuals = Residuals(
        noise=left,
        signal=np.resize(total, left.shape),
        off_grid=np.abs(sums / unit - np.rint(sums / unit)),
        sizes=[len(pair.without.rows)] * trials,
        tensors=tensor_slices(pair.without.classifier, schedule(agreed.plan)[0].settings.train),
        rate=1.0,
        rows=len(pair.without.rows),
        steps_due=trials,
    )
    return [*findings([residuals]), _about_the_sum_itself(left, total / unit)]


def _about_the_sum_itself(noise: Reals, units: Reals) -> Finding:
    """The noise along what rounding the sum to whole units would have taken from it."""
    fraction = units - np.rint(units)
    score = float((noise @ fraction).sum() / np.linalg.norm(fraction) / math.sqrt(len(noise)))
    return Finding("about the sum itself, not rounded", f"a score of {score:.1f}", 2 * float(stats.norm.sf(abs(score))))


def honest(pair: Neighbours) -> int:
    """Sites whose noises the central epsilon counts."""
    return honest_sites(pair.agreed)


# --- Faults ---

_noised_sum = noise.noised_sum


def _a_share_only(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    """As if the secure sum had to hide a record, and not the site's own noise too."""
    return _noised_sum(total, clip, dataclasses.replace(grid, sigma=math.ceil(grid.sigma / math.sqrt(2))), random)


def _rounded_first(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    """Neighbouring sums move apart by up to a whole unit in each coordinate."""
    return _noised_sum(np.rint(total * grid.units / clip) * clip / grid.units, clip, grid, random)


def _the_same_everywhere(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    return _noised_sum(total, clip, grid, seeded(f"the same {len(random(8))}"))


def _rounded_after() -> AbstractContextManager[Any]:
    """The fine integers are rounded to the coarse grid, where they should be drawn onto it."""
    return mock.patch.object(gaussian, "halved", lambda values, times, key: np.rint(values / 2**times).astype(np.int64))


ONE_STEP_FAULTS: Mapping[str, Fault] = {
    "a site adds its share of the noise only": partial(noise_replaced, _a_share_only),
    "the sum rounded to the fields' steps first": partial(noise_replaced, _rounded_first),
    "the noised sum rounded to the fields' steps": _rounded_after,
    "noise the same at every site": partial(noise_replaced, _the_same_everywhere),
}
