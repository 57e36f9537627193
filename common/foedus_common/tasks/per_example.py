"""Gradients of linear layers for each example of a batch apart, taken by hooks during one backward pass.

For y = x W^T an example's gradient is the sum over its tokens of (dL/dy) outer x. The factors of LoRA are thin, so
these are small enough to hold, and the pass costs no more than an ordinary one: the frozen layers' weights get no
gradient, and the factors' own are formed here and nowhere else. Knows nothing of clipping or noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from foedus_common.errors import LocalError

ForwardHook = Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]


class PerExampleGradients:
    """Open around one forward and one backward pass through `modules`.

    modules: bias-free linear layers by name, each applied exactly once in a forward pass, to (n, tokens, in). No
    parameter needs requires_grad: the graph starts at the first of these layers.
    """

    def __init__(self, modules: Mapping[str, nn.Linear]) -> None:
        self._modules = modules
        self._seen: set[str] = set()
        self._going_back = False
        self._collected: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> PerExampleGradients:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._watch(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def backward(self, outputs: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
        """Go back from `outputs` (n, ...) with the loss's gradient by them; each example's gradient by each layer's
        weight, float32 (n, out, in) (float64 for a float64 model), in the order in which they came: from the last
        layer to the first.

        Raises LocalError, naming the layer, when one was not used or no gradient comes to it: its own are then not zero
        but unknown.
        """
        self._going_back = True
        torch.autograd.backward(outputs, gradient)
        for name in self._modules:
            if name not in self._seen:
                raise LocalError(f"[adapter] targets match {name}, which the model never uses; name other targets.")
            if name not in self._collected:
                raise LocalError(f"No gradient comes to {name}, as if it were frozen; it cannot be trained under DP.")
        return self._collected

    def _watch(self, name: str) -> ForwardHook:
        def forward(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            if self._going_back:  # gradient checkpointing repeats the forward pass for what it did not keep
                return output if output.requires_grad else output.requires_grad_(True)
            if name in self._seen:
                raise LocalError(f"The model uses {name} more than once (tied weights); it cannot be trained under DP.")
            if output.dim() != 3:
                raise LocalError(f"{name} does not see one row per example; it cannot be trained under DP.")
            self._seen.add(name)
            entered = inputs[0].detach()
            if not output.requires_grad:
                output.requires_grad_(True)
            output.register_hook(lambda gradient: self._collect(name, gradient, entered))  # type: ignore[no-untyped-call]
            return output

        return forward

    def _collect(self, name: str, gradient: torch.Tensor, entered: torch.Tensor) -> None:
        # Autocast may hand both over in bfloat16: the sum over tokens is formed in float32 at least.
        wide = torch.promote_types(gradient.dtype, torch.float32)
        self._collected[name] = torch.bmm(gradient.to(wide).transpose(1, 2), entered.to(wide))
