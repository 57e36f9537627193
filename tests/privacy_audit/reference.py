"""The clipped sum once more, slowly: autograd on one row at a time and nothing from the code that is audited.

Takes from production only the model's forward pass and the layout of the vector. The rule by which a row's gradient is
shortened is an argument, so that a wrong rule can be put in its place (`faults`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, Group, RoundPlan
from foedus_common.tasks.rows import EncodedRows
from foedus_common.tasks.text_classification import TextClassifier

Reals = NDArray[np.float64]
GRID = 16 * 4096
"""Grid units in one clip, as docs/privacy.md states it."""

Shorten = Callable[[Reals, Reals, float, Mapping[str, slice]], Reals]
"""(gradient (d,), public scales (d,), clip, tensors) -> what the row adds to the sum, (d,)."""


def whole_vector(gradient: Reals, scales: Reals, clip: float, tensors: Mapping[str, slice]) -> Reals:
    """The rule of docs/protocol.md section 4: scale first, then one norm over the whole vector; not finite is zero."""
    scaled = gradient * scales
    norm = float(np.linalg.norm(scaled))
    return scaled * min(1.0, clip / max(norm, 1e-300)) if np.isfinite(norm) else np.zeros_like(scaled)


class ReferenceSum:
    """The sum over rows of shortened gradients, as a function of the trained vector: float64 (d,) -> float64 (d,)."""

    def __init__(
        self,
        classifier: TextClassifier,
        adapter: Tensors,
        rows: EncodedRows,
        clip: float,
        round_plan: RoundPlan,
        shorten: Shorten = whole_vector,
    ) -> None:
        self._classifier, self._adapter, self._rows = classifier, adapter, rows
        self._clip, self._shorten = clip, shorten
        self._train = round_plan.settings.train
        self._tensors = tensor_slices(classifier, self._train)
        roles = {tensor.name: tensor.role for tensor in classifier.spec.trained(self._train)}
        self._scales = np.empty(classifier.spec.size(self._train))
        for name, place in self._tensors.items():
            self._scales[place] = round_plan.scale("head" if roles[name] == "head" else "adapter")

    def __call__(self, vector: Reals, chosen: NDArray[np.int64]) -> Reals:
        total = np.zeros_like(vector)
        for row in chosen:
            total += self._shorten(self.gradient(vector, int(row)), self._scales, self._clip, self._tensors)
        return total

    def gradient(self, vector: Reals, row: int) -> Reals:
        """One row's gradient, neither scaled nor shortened, (d,)."""
        classifier = self._classifier
        head_name, *names = self._tensors
        head = torch.tensor(vector[self._tensors[head_name]], requires_grad=True)
        weights = [classifier.factors[name].weight.requires_grad_(True) for name in names]
        features = self._features(vector, row).double()
        logits = features @ head.view(classifier.spec.tensors[0].shape).T
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(self._rows.labels[[row]]))
        gradients = torch.autograd.grad(loss, [head, *weights])
        for weight in weights:
            weight.requires_grad_(False)
        return np.concatenate([gradient.double().numpy().ravel() for gradient in gradients])

    def _features(self, vector: Reals, row: int) -> torch.Tensor:
        """The row's features (1, width), with their graph where the factors are trained."""
        classifier = self._classifier
        if self._train == "head":
            return classifier.features(self._adapter, self._rows)[row : row + 1]
        classifier.load_factors(classifier.spec.with_vector(self._adapter, self._train, vector))
        return classifier.pooled(self._rows, np.array([row]))[:1]


def tensor_slices(classifier: TextClassifier, train: str) -> dict[str, slice]:
    """Where each tensor lies in the trained vector, in order; the head is first."""
    places, start = {}, 0
    for tensor in classifier.spec.trained(train):
        places[tensor.name] = slice(start, start + tensor.size)
        start += tensor.size
    return places


def group_values(agreed: AgreedPlan, round_plan: RoundPlan, value: Callable[[Group], float]) -> Reals:
    """A number of each group, coordinate by coordinate, (d,)."""
    return np.concatenate([np.full(part.length, value(part.group)) for part in agreed.trained[round_plan.phase]])


def step_factors(agreed: AgreedPlan, round_plan: RoundPlan) -> Reals:
    """What a noised sum is multiplied by in a step, (d,): learning rate over scale and divisor (docs/privacy.md)."""
    divisor = agreed.plan.privacy.divisor or 0

    def factor(group: Group) -> float:
        return round_plan.learning_rate(group) / (round_plan.scale(group) * divisor)

    return group_values(agreed, round_plan, factor)
