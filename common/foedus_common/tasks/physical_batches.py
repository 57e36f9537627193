"""How many tokens go through the model at once: a matter of the machine, of which no result depends but by rounding.

Knows nothing of what is computed on a batch, only that it may not fit the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from foedus_common.tasks.rows import EncodedRows

ON_CPU = 2048
"""Tokens: enough to keep a core busy, few enough to stay in its cache."""

ON_GPU = 16384

MOST_ROWS = 128
"""In one shape: short rows would fill those tokens by the hundred, and each has gradients of its own."""

COMPANIONS = 1
"""Rows of padding that go through the model in every batch: see `text_classification`."""

Result = TypeVar("Result")


class PhysicalBatches:
    """tokens: how many go through the model at once, padding included; less from the moment that they did not fit.

    one_shape: every batch of one length has as many rows as those tokens allow; what the rows leave is filled up with
    companions. GPUs choose among kernels by the shape of what is multiplied, and each rounds in its own way; within one
    shape a row comes out the same to the last bit, at whatever place and with whatever others. Without, the row that
    joined 15 others moved their sum of clipped gradients by 2 % of the clip (bfloat16, Llama's shape, H100).
    """

    def __init__(self, tokens: int, one_shape: bool = False) -> None:
        self.tokens = tokens
        self.one_shape = one_shape

    def rows(self, length: int) -> int:
        """How many rows of so many tokens go through at once, at least one."""
        fit = max(1, self.tokens // length)
        return min(fit, MOST_ROWS) if self.one_shape else fit

    def companions(self, rows: int, length: int) -> int:
        """How many rows of padding go along with a batch of so many rows and tokens a row: COMPANIONS at least."""
        return COMPANIONS + (max(0, self.rows(length) - rows) if self.one_shape else 0)

    def each(
        self, rows: EncodedRows, chosen: NDArray[np.int64], compute: Callable[[NDArray[np.int64]], Result]
    ) -> Iterator[tuple[NDArray[np.int64], Result]]:
        """Every chosen row's index in one batch, and what `compute` makes of that batch.

        compute may be called again with some of the rows of a call that ran out of the device's memory, so it must
        leave no trace of its own. Raises torch.OutOfMemoryError when a row by itself does not fit.
        """
        waiting = list(rows.batches(chosen, self.rows))
        while waiting:
            batch = waiting.pop(0)
            length = int(rows.padded[batch[0]])
            together = len(batch) + self.companions(len(batch), length) - COMPANIONS
            try:
                result = compute(batch)
            except torch.OutOfMemoryError:
                if together == 1:
                    raise
            else:
                yield batch, result
                continue
            torch.cuda.empty_cache()  # out of the handler: what failed lives until its traceback is gone
            self.tokens = together * length // 2
            waiting = list(rows.batches(np.concatenate([batch, *waiting]), self.rows))
