"""Faults, put in for as long as a context is open: each replaces functions of production and nothing on disk.

Every one is a mistake that somebody has made in some DP-SGD. The audit has to find them all; a fault that it would not
find is a check that it lacks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from foedus_common.plan import AgreedPlan
from foedus_common.privacy.noise import NoiseGrid
from foedus_common.randomness import RandomBytes
from foedus_common.tasks import local_trainer, private_training
from privacy_audit.reference import Reals, ReferenceSum, Shorten, whole_vector
from privacy_audit.specimens import DIVISOR
from seeded import seeded

Fault = Callable[[], AbstractContextManager[Any]]

_noised_sum = private_training.noised_sum
_poisson_sample = private_training.poisson_sample
_private_update = local_trainer.private_update


def noise_off() -> AbstractContextManager[Any]:
    """Not a fault but a tool: the same training without its noise, in whole units all the same, so that it is sent."""
    return noise_replaced(lambda total, clip, grid, random: _on_the_grid(total, clip, grid))


def bare_sums() -> AbstractContextManager[Any]:
    """Another tool: sums of gradients that nothing is done to."""
    return noise_replaced(lambda total, clip, grid, random: total)


def noise_replaced(replacement: Callable[[Reals, float, NoiseGrid, RandomBytes], Reals]) -> AbstractContextManager[Any]:
    return mock.patch.object(private_training, "noised_sum", replacement)


def _on_the_grid(total: Reals, clip: float, grid: NoiseGrid) -> Reals:
    return np.rint(total * (grid.units / clip)) * (clip / grid.units)


# --- The noise ---


def _halved(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    return _noised_sum(total, clip, dataclasses.replace(grid, sigma=grid.sigma // 2), random)


def _a_tenth_too_small(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    return _noised_sum(total, clip, dataclasses.replace(grid, sigma=grid.sigma * 9 // 10), random)


def _a_fifth_of_the_last() -> AbstractContextManager[Any]:
    """Noise of the stated width that follows the step before it a little."""
    last: dict[int, Reals] = {}

    def noised(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
        fresh = _noised_sum(np.zeros_like(total), clip, grid, random)
        draw = math.sqrt(1 - 0.2**2) * fresh + 0.2 * last.get(total.size, np.zeros_like(total))
        last[total.size] = _on_the_grid(draw, clip, grid)
        return _on_the_grid(total, clip, grid) + last[total.size]

    return noise_replaced(noised)


def _the_same_in_every_step(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    return _noised_sum(total, clip, grid, seeded("the same"))


def _tiled(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    """One short draw repeated over the coordinates."""
    draw = _noised_sum(np.zeros(32), clip, grid, random)
    return _on_the_grid(total, clip, grid) + np.resize(draw, total.size)


def _none_on_an_empty_batch(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    return _noised_sum(total, clip, grid, random) if total.any() else total


def _floating_point(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    generator = np.random.default_rng(int.from_bytes(random(8), "big"))
    return total + generator.normal(scale=grid.sigma / grid.fine * clip, size=total.size)


def _truncated(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
    noise = _noised_sum(np.zeros_like(total), clip, grid, random)
    reach = float(_on_the_grid(np.array(2 * grid.sigma / grid.fine * clip), clip, grid))
    return _on_the_grid(total, clip, grid) + np.clip(noise, -reach, reach)


@contextmanager
def _on_factors_only() -> Iterator[None]:
    """B gets noise and the head none."""
    head = 0

    def update(start: Reals, clipped_sum: Any, rows: int, agreed: AgreedPlan, *others: Any) -> Reals:
        nonlocal head
        head = agreed.trained[0][0].length
        return _private_update(start, clipped_sum, rows, agreed, *others)

    def without(total: Reals, clip: float, grid: NoiseGrid, random: RandomBytes) -> Reals:
        noised = _noised_sum(total, clip, grid, random)
        return np.concatenate([_on_the_grid(total, clip, grid)[:head], noised[head:]])

    with mock.patch.object(local_trainer, "private_update", update), noise_replaced(without):
        yield


def _the_same_in_every_round() -> AbstractContextManager[Any]:
    def update(*arguments: Any) -> Reals:
        start, clipped_sum, rows, agreed, round_plan, _, progress = arguments
        return _private_update(start, clipped_sum, rows, agreed, round_plan, seeded("the same"), progress)

    return mock.patch.object(local_trainer, "private_update", update)


# --- The clipping ---


def _gradients(shorten: Shorten) -> AbstractContextManager[Any]:
    """The adapter's gradients, shortened by another rule."""
    return mock.patch.object(local_trainer, "AdapterGradients", partial(ReferenceSum, shorten=shorten))


def _layer_by_layer(gradient: Reals, scales: Reals, clip: float, tensors: Mapping[str, slice]) -> Reals:
    scaled = gradient * scales
    parts = [scaled[place] for place in tensors.values()]
    return np.concatenate([part * min(1.0, clip / max(float(np.linalg.norm(part)), 1e-300)) for part in parts])


def _a_fifth_too_far(gradient: Reals, scales: Reals, clip: float, tensors: Mapping[str, slice]) -> Reals:
    return whole_vector(gradient, scales, 1.2 * clip, tensors)


def _before_scaling(gradient: Reals, scales: Reals, clip: float, tensors: Mapping[str, slice]) -> Reals:
    """Clipped first and scaled then: a scale above 1 takes the row over its bound."""
    return gradient * min(1.0, clip / float(np.linalg.norm(gradient))) * scales


def _after_division(gradient: Reals, scales: Reals, clip: float, tensors: Mapping[str, slice]) -> Reals:
    """Divided by the divisor first and clipped then, so that a row counts up to ten times."""
    mean = gradient * scales / DIVISOR
    return DIVISOR * mean * min(1.0, clip / float(np.linalg.norm(mean)))


# --- The rest of the step ---


@contextmanager
def _own_divisor() -> Iterator[None]:
    """The site divides by the number of its rows, which is nobody else's business."""

    def update(start: Reals, clipped_sum: Any, rows: int, agreed: AgreedPlan, *others: Any) -> Reals:
        privacy = dataclasses.replace(agreed.plan.privacy, divisor=rows)
        plan = dataclasses.replace(agreed.plan, privacy=privacy)
        return _private_update(start, clipped_sum, rows, dataclasses.replace(agreed, plan=plan), *others)

    with mock.patch.object(local_trainer, "private_update", update):
        yield


def _until_not_empty(rows: int, rate: float, random: RandomBytes) -> NDArray[np.int64]:
    while not (drawn := _poisson_sample(rows, rate, random)).size:
        pass
    return drawn


def _twice_the_rate(rows: int, rate: float, random: RandomBytes) -> NDArray[np.int64]:
    return _poisson_sample(rows, 2 * rate, random)


def _sampling(replacement: Callable[[int, float, RandomBytes], NDArray[np.int64]]) -> AbstractContextManager[Any]:
    return mock.patch.object(private_training, "poisson_sample", replacement)


FAULTS: Mapping[str, Fault] = {
    "noise halved": lambda: noise_replaced(_halved),
    "noise a tenth too small": lambda: noise_replaced(_a_tenth_too_small),
    "noise on the factors only": _on_factors_only,
    "noise that keeps a fifth of the last step's": _a_fifth_of_the_last,
    "noise the same in every step": lambda: noise_replaced(_the_same_in_every_step),
    "noise the same in every round": _the_same_in_every_round,
    "noise repeated over the coordinates": lambda: noise_replaced(_tiled),
    "noise in floating point": lambda: noise_replaced(_floating_point),
    "noise cut off at two sigma": lambda: noise_replaced(_truncated),
    "no noise on an empty batch": lambda: noise_replaced(_none_on_an_empty_batch),
    "an empty batch is drawn again": lambda: _sampling(_until_not_empty),
    "rows drawn at twice the rate": lambda: _sampling(_twice_the_rate),
    "clipped at 1.2 times the bound": lambda: _gradients(_a_fifth_too_far),
    "clipped layer by layer": lambda: _gradients(_layer_by_layer),
    "clipped before the scale": lambda: _gradients(_before_scaling),
    "clipped after the division": lambda: _gradients(_after_division),
    "divided by the site's own rows": _own_divisor,
}
