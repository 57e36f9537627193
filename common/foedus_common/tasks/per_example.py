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
    """While it is open, a backward pass through `modules` leaves each example's gradient in `collected`.

    modules: bias-free linear layers by name, each applied exactly once in a forward pass, to (n, tokens, in). No
    parameter needs requires_grad: the graph starts at the first of these layers.
    collected: per name float32 (n, out, in) (float64 for a float64 model); taken out by the caller between passes.
    """

    def __init__(self, modules: Mapping[str, nn.Linear]) -> None:
        self.collected: dict[str, torch.Tensor] = {}
        self._modules = modules
        self._seen: set[str] = set()
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

    def take(self) -> dict[str, torch.Tensor]:
        """The gradients of the last backward pass, and ready for the next one."""
        taken, self.collected, self._seen = self.collected, {}, set()
        return taken

    def check_each_used_once(self) -> None:
        """Raises LocalError, naming the layer, unless the forward pass since `take` used every layer (a layer that is
        used twice is refused when it happens)."""
        unused = [name for name in self._modules if name not in self._seen]
        if unused:
            raise LocalError(f"[adapter] targets match {unused[0]}, which the model never uses; name other targets.")

    def _watch(self, name: str) -> ForwardHook:
        def forward(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
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
        self.collected[name] = torch.bmm(gradient.to(wide).transpose(1, 2), entered.to(wide))
