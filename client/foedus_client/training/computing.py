"""What a site computes with: settings of `site.toml` that its trainer is told as they are. Knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foedus_common.errors import LocalError


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where, and with how much memory and of the machine. Raises LocalError for values that cannot be.

    device: "auto", "cpu", "cuda" or "cuda:0". dtype, of its products of matrices, base_weights, gradient_checkpointing
    and tokens_per_batch (0 leaves it to the device): as `foedus_common.tasks.text_classification.TextClassifier.load`
    takes them. threads: 0 leaves them to torch. niceness: 0 to 19, added to the daemon's own.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    base_weights: Literal["float32", "bfloat16", "4bit"] = "float32"
    gradient_checkpointing: bool = False
    tokens_per_batch: int = 0
    threads: int = 0
    niceness: int = 0

    def __post_init__(self) -> None:
        kind, _, number = self.device.partition(":")
        if self.device not in ("auto", "cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
            raise LocalError(f'The device {self.device!r} is none of "auto", "cpu" and "cuda:0".')
        if self.base_weights == "bfloat16" and self.dtype == "float32":
            raise LocalError('Weights that are held in bfloat16 are multiplied in it; set dtype to "auto".')
        if self.tokens_per_batch < 0:
            raise LocalError("The trainer's tokens_per_batch must be 0 (as the device allows) or more.")
        if self.threads < 0 or not 0 <= self.niceness <= 19:
            raise LocalError("The trainer's threads must be 0 or more, and its niceness 0 to 19.")
