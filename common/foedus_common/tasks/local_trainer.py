"""One site's training, round by round: the same object runs in a site's trainer process and in simulations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.head import HEAD
from foedus_common.tasks.per_example import PerExampleGradients
from foedus_common.tasks.physical_batches import COMPANIONS
from foedus_common.tasks.plain_training import plain_update
from foedus_common.tasks.private_training import AdapterGradients, ClippedSum, HeadGradients, private_update
from foedus_common.tasks.targets import blocks
from foedus_common.tasks.text_classification import Progress, TextClassifier, no_progress


class LocalTrainer:
    """Trains an agreed plan's rounds on one site's rows.

    classifier: the plan's model; several trainers may share one, in turn. rows: (text, label) pairs. Raises LocalError
    when the classifier's spec or a layout is not the agreed one, or a label is not the plan's; without privacy also
    when there are no rows. With it they are noise like any others: nothing is refused that only the data decides.
    """

    def __init__(
        self,
        classifier: TextClassifier,
        agreed: AgreedPlan,
        rows: Sequence[tuple[str, str]],
        progress: Progress = no_progress,
    ) -> None:
        check_spec(classifier, agreed)
        if not (rows or agreed.plan.privacy.on):
            raise LocalError("The data has no rows; there is nothing to train on.")
        self.classifier = classifier
        self.rows = classifier.encode(rows)
        self._agreed = agreed
        self._progress = progress
        if agreed.plan.privacy.unit == "record" and classifier.batches.one_shape:
            self._try_shapes()

    def train(self, adapter: Tensors, round_plan: RoundPlan, random: RandomBytes) -> NDArray[np.float64]:
        """The update of one round from `adapter`, float64 (d,), laid out as the phase's trained vector.

        Where the record is the unit of privacy its noise is in it; where the site is, its noise is still to come.
        """
        if self._agreed.plan.privacy.unit != "record":
            return plain_update(self.classifier, adapter, self.rows, round_plan, random, self._progress)
        train = round_plan.settings.train
        start = self.classifier.spec.vector(adapter, train).astype(np.float64)
        return private_update(
            start,
            self._clipped_sum(adapter, round_plan),
            len(self.rows),
            self._agreed,
            round_plan,
            random,
            self._progress,
        )

    def _try_shapes(self) -> None:
        """Learn how much fits the device from rows that are nobody's: were it the site's own that did not fit, they
        would decide in which shapes the others are computed."""
        spec, stand_ins = self.classifier.spec, self.classifier.stand_ins()
        nothing = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in spec.tensors}
        for round_plan in schedule(self._agreed.plan):
            if round_plan.settings.train == "adapter":
                clip = self._agreed.plan.privacy.clip
                gradients = AdapterGradients(self.classifier, nothing, stand_ins, clip, round_plan)
                gradients(spec.vector(nothing, "adapter").astype(np.float64), np.arange(len(stand_ins)))
                return
        self.classifier.features(nothing, stand_ins)

    def _clipped_sum(self, adapter: Tensors, round_plan: RoundPlan) -> ClippedSum:
        clip = self._agreed.plan.privacy.clip
        if round_plan.settings.train == "head":
            features = self.classifier.features(adapter, self.rows, self._progress)
            return HeadGradients(features, self.rows.labels, clip)
        self.rows.features.clear()  # no longer of use, and how many there are must not decide what else fits the device
        return AdapterGradients(self.classifier, adapter, self.rows, clip, round_plan)


def check_spec(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    """Raises LocalError unless the loaded model has the adapter that was agreed, in the agreed layout, and
    computes each row by itself where the row is the unit of privacy."""
    if classifier.spec.digest().hex() != agreed.spec_sha256:
        raise LocalError("The model does not give the adapter that the plan describes; compare the model's hash.")
    for number, (phase, parts) in enumerate(zip(agreed.plan.phase, agreed.trained, strict=True), start=1):
        if classifier.spec.parts(phase.train) != parts:
            raise LocalError(f"The plan's layout of the trained vector in phase {number} is not this model's.")
    if agreed.plan.privacy.unit == "record":
        check_rows_apart(classifier)
        if any(phase.train == "adapter" for phase in agreed.plan.phase):
            check_layers(classifier)


def check_rows_apart(classifier: TextClassifier) -> None:
    """Raises LocalError, naming the layer, when a row's features depend on another row of its batch: then no bound on
    one row's gradient would bound what that row does."""
    for name, module in classifier.encoder.named_modules():
        if isinstance(module, _BatchNorm):
            raise LocalError(f"{name} is batch norm, which mixes rows; this model cannot be trained under DP.")
    stack = {name: block for name, (_, block) in blocks(classifier.encoder).items()}
    places = {"the embeddings": classifier.encoder.get_input_embeddings(), **stack}
    passed: dict[str, torch.Tensor] = {}
    with ExitStack() as watching:
        for name, module in places.items():
            watching.enter_context(module.register_forward_hook(_keep(name, passed)))
        features = classifier.pooled_inputs(*_twins(classifier))
    direction = torch.linspace(-1, 1, features.shape[1], device=features.device)
    gradients = torch.autograd.grad(features[0] @ direction, list(passed.values()), allow_unused=True)
    after = ""
    for name, gradient in reversed(list(zip(passed, gradients, strict=True))):
        if gradient is not None and gradient[1].any():
            raise LocalError(f"The model mixes rows {after or f'after {name}'}; it cannot be trained under DP.")
        after = f"in {name}"
    check_shapes(classifier)


class Shapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation on numbers that are rounded, in its order, and the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
        if any(part.is_floating_point() for part in given):
            self.seen.append((str(function), tuple(tuple(part.shape) for part in given)))
        return function(*args, **(kwargs or {}))


def check_shapes(classifier: TextClassifier) -> None:
    """Raises LocalError when what rows say decides in which shapes they are computed, as an expert multiplies as many
    tokens as are sent to it: a row is then rounded by the others (0.1 % of the clip, a tiny Mixtral in bfloat16)."""
    alike, few = (torch.zeros_like(part) for part in _twins(classifier))
    few[:, 0] = 1
    known = classifier.encoder.get_input_embeddings().num_embeddings
    many = torch.linspace(0, known - 1, alike.numel()).long().view(alike.shape)
    found = []
    for ids, mask in ((alike, few), (many, torch.ones_like(many))):
        with Shapes() as shapes, torch.no_grad():
            classifier.pooled_inputs(ids, mask)
        found.append(shapes.seen)
    if found[0] != found[1]:
        raise LocalError(
            "What rows say decides how the model computes others (as in a mixture of experts); "
            "it cannot be trained under DP."
        )


def _keep(name: str, passed: dict[str, torch.Tensor]) -> Callable[..., None]:
    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        passed[name] = hidden if hidden.requires_grad else hidden.requires_grad_(True)

    return hook


def check_layers(classifier: TextClassifier) -> None:
    """Raises LocalError, naming the layer, unless the model uses every trained factor once for each row: it must be
    used, not used again, not be out of the gradient's reach, and see one row per example."""
    names = [tensor.name for tensor in classifier.spec.trained("adapter") if tensor.name != HEAD]
    with PerExampleGradients({name: classifier.factors[name] for name in names}) as gradients:
        features = classifier.pooled_inputs(*_twins(classifier))
        collected = gradients.backward(features, torch.ones_like(features))
    for name, of_each in collected.items():
        if len(of_each) != 2 + COMPANIONS:
            raise LocalError(f"{name} does not see one row per example; it cannot be trained under DP.")


def _twins(classifier: TextClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    return classifier.encode([("a", None)] * 2).inputs(np.arange(2))
