"""DP-SGD: Poisson-sampled steps on clipped per-example gradients with integer noise (docs/protocol.md section 4).

Abadi et al., Deep Learning with Differential Privacy, CCS 2016, with one clipping bound for the whole trained vector
after public factors per group, and a public divisor in place of the batch's size. `private_update` is the mechanism
and knows no model; `HeadGradients` and `AdapterGradients` give it the clipped sums. The number of steps, the size of
what is returned and every constant come from the plan; the rows decide nothing but the values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.privacy.noise import noised_sum
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import noise_grid
from foedus_common.tasks.head import HEAD
from foedus_common.tasks.per_example import PerExampleGradients
from foedus_common.tasks.rows import EncodedRows
from foedus_common.tasks.text_classification import Progress, TextClassifier

Reals = NDArray[np.float64]

ClippedSum = Callable[[Reals, NDArray[np.int64]], Reals]
"""(vector (d,), rows (n,)) -> the sum of the rows' scaled and clipped gradients at that vector, float64 (d,)."""

_BLOCK = 4096  # rows of features that are widened to float64 at a time


def private_update(
    start: Reals,
    clipped_sum: ClippedSum,
    rows: int,
    agreed: AgreedPlan,
    round_plan: RoundPlan,
    random: RandomBytes,
    progress: Progress,
) -> Reals:
    """The update of one round, float64 (d,): the sum of `steps` noisy steps from `start`.

    A step adds -learning_rate / (scale * divisor) * noised_sum to each group. An empty batch is a step like any other.
    Steps are added up by themselves: end minus start would be rounded to what numbers of the size of `start` can tell
    apart, beyond the range of the encoding, and whether a site then declines would depend on its rows.
    With one step the update is that product and nothing else: whole steps of the round's encoding, up to the last bits
    of float64 (`foedus_common.ranges.noise_grid`).
    """
    settings, privacy = round_plan.settings, agreed.plan.privacy
    divisor, steps, rate = privacy.divisor or 0, settings.steps or 0, settings.sampling_rate or 0.0
    factor = np.concatenate(
        [
            np.full(part.length, round_plan.learning_rate(part.group) / (round_plan.scale(part.group) * divisor))
            for part in agreed.trained[round_plan.phase]
        ]
    )
    grid, update = noise_grid(agreed, round_plan.phase), np.zeros_like(start)
    for step in range(steps):
        total = clipped_sum(start + update, poisson_sample(rows, rate, random))
        bounded = np.clip(total, -divisor * privacy.clip, divisor * privacy.clip)  # so that the encoding's range holds
        update -= factor * noised_sum(bounded, privacy.clip, grid, random)
        progress("steps", step + 1, steps)
    return update


def poisson_sample(rows: int, rate: float, random: RandomBytes) -> NDArray[np.int64]:
    """Row indices, each of 0..rows-1 taken independently with probability `rate` (to 2^-64). random: 8 bytes a row."""
    if rate >= 1:
        return np.arange(rows)
    draws = np.frombuffer(random(8 * rows), np.dtype("<u8"))
    return np.flatnonzero(draws < np.uint64(int(rate * 2**64)))


class HeadGradients:
    """Clipped sums for a head over fixed features: softmax regression, in closed form and in float64 throughout.

    With p the softmax and y the one-hot label, a row's gradient is (p - y) outer f, whose norm is |p - y| |f|.
    features: float32 (n, width). labels: int64 (n,).
    """

    def __init__(self, features: torch.Tensor, labels: NDArray[np.int64], clip: float) -> None:
        self._features = features
        self._labels = torch.from_numpy(labels).to(features.device)
        self._clip = clip

    def __call__(self, vector: Reals, rows: NDArray[np.int64]) -> Reals:
        head = torch.from_numpy(vector).to(self._features.device).view(-1, self._features.shape[1])
        total = torch.zeros_like(head)
        for start in range(0, len(rows), _BLOCK):
            block = torch.from_numpy(rows[start : start + _BLOCK]).to(head.device)
            features = self._features[block].double()
            errors = softmax_errors(features, head, self._labels[block])
            factor = clip_factors(_squared_norms(errors) * _squared_norms(features), self._clip)
            total += _weighted(errors, factor).T @ _finite(features)
        return total.flatten().cpu().numpy()


class AdapterGradients:
    """Clipped sums for head and factors together: one backward pass through the encoder per physical batch.

    The vector is laid out as `AdapterSpec.trained("adapter")`. Weights are rounded to float32 for the pass; norms and
    sums are float64.
    """

    def __init__(
        self, classifier: TextClassifier, adapter: Tensors, rows: EncodedRows, clip: float, round_plan: RoundPlan
    ) -> None:
        self._classifier = classifier
        self._adapter = adapter
        self._rows = rows
        self._clip = clip
        self._head_scale, self._factor_scale = round_plan.scale("head"), round_plan.scale("adapter")
        self._names = [tensor.name for tensor in classifier.spec.trained("adapter") if tensor.name != HEAD]

    def __call__(self, vector: Reals, rows: NDArray[np.int64]) -> Reals:
        classifier, spec = self._classifier, self._classifier.spec
        classifier.load_factors(spec.with_vector(self._adapter, "adapter", vector))
        shape = spec.tensors[0].shape
        head = torch.from_numpy(vector[: shape[0] * shape[1]].reshape(shape)).to(classifier.device)
        totals = {HEAD: torch.zeros_like(head)}
        for name in self._names:
            totals[name] = torch.zeros_like(classifier.factors[name].weight, dtype=torch.float64)
        for _, sums in classifier.batches.each(self._rows, rows, lambda batch: self._sums(batch, head)):
            for name, share in sums.items():
                totals[name] += share
        return np.concatenate([totals[t.name].flatten().cpu().numpy() for t in spec.trained("adapter")])

    def _sums(self, batch: NDArray[np.int64], head: torch.Tensor) -> dict[str, torch.Tensor]:
        """One physical batch's share of each total, float64."""
        own = slice(len(batch))
        errors, features, collected = self._of_each(batch, head)
        errors, features = errors[own], features[own]
        flat = {name: value[own].flatten(1).double() for name, value in collected.items()}
        squared = self._head_scale**2 * _squared_norms(errors) * _squared_norms(features)
        squared = squared + self._factor_scale**2 * sum(_squared_norms(value) for value in flat.values())
        factor = clip_factors(squared, self._clip)
        sums = {HEAD: self._head_scale * (_weighted(errors, factor).T @ _finite(features))}
        for name, value in flat.items():
            sums[name] = self._factor_scale * (factor @ _finite(value)).view_as(collected[name][0])
        return sums

    def _of_each(
        self, batch: NDArray[np.int64], head: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Errors and features of each row in float64, and its gradient by each factor in float32, companions included.

        Nothing in here but what is looked up has a shape that tells how many rows are not companions: were it only a
        sum over float32 features, its order on a GPU would depend on that number, and the backward pass in bfloat16
        made 0.5 % of the clip of it (20 rows, BERT base, H100).
        """
        with PerExampleGradients({name: self._classifier.factors[name] for name in self._names}) as gradients:
            features = self._classifier.pooled(self._rows, batch)
            labels = np.zeros(len(features), np.int64)
            labels[: len(batch)] = self._rows.labels[batch]
            wide = features.detach().double()
            errors = softmax_errors(wide, head, torch.from_numpy(labels).to(features.device))
            return errors, wide, gradients.backward(features, (errors @ head).to(features.dtype))


def softmax_errors(features: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient of the cross-entropy by the logits, p - y, (n, labels)."""
    errors = torch.softmax(features @ head.T, dim=1)
    errors[torch.arange(len(labels), device=labels.device), labels] -= 1
    return errors


def clip_factors(squared_norms: torch.Tensor, clip: float) -> torch.Tensor:
    """What each row's gradient is multiplied by so that its L2 norm is at most `clip`; 0 where it is not finite."""
    factor = (clip / squared_norms.sqrt()).clamp(max=1.0)  # clip / 0 is inf, clamped to 1
    return torch.where(torch.isfinite(squared_norms), factor, torch.zeros_like(factor))


def _squared_norms(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(dim=1)


def _weighted(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return _finite(rows) * factor.unsqueeze(1)


def _finite(rows: torch.Tensor) -> torch.Tensor:
    """A row that is not finite has the factor 0, and 0 * nan is nan: such numbers become 0 here."""
    return torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)
