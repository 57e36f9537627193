"""Whether a model computes each row by itself, which the bound on one row's gradient supposes: asked of the model as
it was loaded, before any data.

Knows no plan and no rows but its own; `local_trainer.check_spec` says when it is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foedus_common.errors import LocalError
from foedus_common.tasks.head import HEAD
from foedus_common.tasks.per_example import PerExampleGradients
from foedus_common.tasks.physical_batches import COMPANIONS
from foedus_common.tasks.targets import blocks
from foedus_common.tasks.text_classification import TextClassifier


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
