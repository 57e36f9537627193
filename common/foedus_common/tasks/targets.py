"""Which layers of a model a plan's [adapter] `targets` and `layers` name, whatever its family calls them.

A model is a stack of numbered layers (its outermost module lists); within one, linear layers have dotted names such as
`attention.self.query`, `self_attn.q_proj` or `attn.c_attn`. Patterns are shell-style and not regular expressions, so
that no plan can make a site search for ever. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers.pytorch_utils import Conv1D

from foedus_common.errors import LocalError

LINEAR = (nn.Linear, Conv1D)
"""GPT-2's Conv1D is a linear layer whose weight is stored transposed."""

_NAMES_SHOWN = 12


def blocks(encoder: nn.Module) -> dict[str, tuple[int, nn.Module]]:
    """The numbered layers of the model's stack, by name: those lists of modules that are in no other."""
    found: dict[str, tuple[int, nn.Module]] = {}
    outermost = ""
    for name, module in encoder.named_modules():  # a parent comes before its children
        if isinstance(module, nn.ModuleList) and not (outermost and name.startswith(outermost)):
            outermost = f"{name}."
            found |= {f"{name}.{number}": (number, block) for number, block in enumerate(module)}
    return found


def target_names(encoder: nn.Module, targets: Sequence[str], layers: str) -> list[str]:
    """Full names of the linear layers that are meant, in the model's order.

    A target is a name or a pattern (`*`, `?`, `[...]`) for the end of a name, from a dot on: "query", "self_attn.*",
    "*_proj", "*" for every linear layer. Raises LocalError when one matches nothing, naming what there is.
    """
    stack = blocks(encoder)
    depth = 1 + max((number for number, _ in stack.values()), default=-1)
    chosen = set(layer_numbers(layers, depth))
    linear = {
        f"{block}.{name}": name
        for block, (number, module) in stack.items()
        if number in chosen
        for name, part in module.named_modules()
        if isinstance(part, LINEAR)
    }
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            known = list(dict.fromkeys(linear.values()))
            more = ", ..." if len(known) > _NAMES_SHOWN else ""
            raise LocalError(
                f"[adapter] targets has {target!r}, which matches no linear layer in layers {layers!r} of this model; "
                f"there are {', '.join(known[:_NAMES_SHOWN])}{more}."
            )
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def layer_numbers(layers: str, depth: int) -> list[int]:
    """The numbers, sorted, that a plan's [adapter] layers names in a model of `depth` layers: "all", numbers and ranges
    such as "0-2,5", or "last-4" for the last four. Raises LocalError for anything else, or what is not there."""
    numbers: set[int] = set()
    try:
        for piece in layers.split(","):
            first, _, last = piece.strip().partition("-")
            if first == "all" and not last:
                numbers.update(range(depth))
            elif first == "last":
                numbers.update(range(max(-1, depth - int(last)), depth))
            else:  # a number beyond the last stands for all beyond: a plan must not fill the memory with them
                numbers.update(range(min(depth, int(first)), min(depth, int(last or first)) + 1))
    except ValueError:
        raise LocalError(
            f'[adapter] layers is {layers!r}; write "all", numbers such as "0-2,5", or "last-4".'
        ) from None
    if not numbers or min(numbers) < 0 or max(numbers) >= depth:
        raise LocalError(f"[adapter] layers is {layers!r}, but the model has the layers 0 to {depth - 1}.")
    return sorted(numbers)


def _matches(name: str, target: str) -> bool:
    words = name.split(".")
    return any(fnmatchcase(".".join(words[start:]), target) for start in range(len(words)))
