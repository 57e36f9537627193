"""The classification head, as everybody names and folds it. No torch: a program can export without loading it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from foedus_common.adapters import Tensors

HEAD = "head.weight"
"""Name of the head's one tensor, (labels, hidden size + 1): its last column meets the constant feature."""

CONSTANT = 0.3
"""The last feature of every row; the head's bias is the last column of its matrix times this."""


def head_as_linear(adapter: Tensors) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The head as an ordinary linear layer over unit-norm features: weight (labels, hidden size), bias (labels,)."""
    return adapter[HEAD][:, :-1].copy(), (adapter[HEAD][:, -1] * np.float32(CONSTANT)).astype(np.float32)
