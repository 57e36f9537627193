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

Result = TypeVar("Result")


class PhysicalBatches:
    """tokens: how many go through the model at once, padding included; less from the moment that they did not fit."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def each(
        self, rows: EncodedRows, chosen: NDArray[np.int64], compute: Callable[[NDArray[np.int64]], Result]
    ) -> Iterator[tuple[NDArray[np.int64], Result]]:
        """Every chosen row's index in one batch, and what `compute` makes of that batch.

        compute may be called again with some of the rows of a call that ran out of the device's memory, so it must
        leave no trace of its own. Raises torch.OutOfMemoryError when a row by itself does not fit.
        """
        waiting = list(rows.batches(chosen, self.tokens))
        while waiting:
            batch = waiting.pop(0)
            try:
                result = compute(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
            else:
                yield batch, result
                continue
            torch.cuda.empty_cache()  # out of the handler: what failed lives until its traceback is gone
            self.tokens = len(batch) * int(rows.padded[batch[0]]) // 2
            waiting = list(rows.batches(np.concatenate([batch, *waiting]), self.tokens))
