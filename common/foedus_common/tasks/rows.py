"""Rows of text as token ids, in batches whose padding never depends on which other rows are in the batch.

A row is padded behind its end, whatever side its tokenizer would take, to a length that its own alone decides. So what
is computed for it does not change when another row joins or leaves the data (which the privacy proof supposes), a
decoder never sees padding before text, and little is spent on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from foedus_common.errors import LocalError
from foedus_common.plan import Task

PADDING = 0
"""The token that stands behind a row's end. It is masked, so any will do; not every tokenizer names one, and some name
one that the model does not have."""

_MULTIPLE = 4

SHORTEST = 8
"""Tokens to which rows are padded where few lengths are wanted."""


def padded_lengths(lengths: NDArray[np.int64], limit: int, few: bool) -> NDArray[np.int64]:
    """To how many tokens rows of so many are padded, int64 (n,): to a multiple of four, or where few lengths are wanted
    (each takes a batch of its own) to a power of two from 8 on; never above the limit."""
    if few:
        powers = 2 ** np.ceil(np.log2(np.maximum(lengths, SHORTEST))).astype(np.int64)
        return np.minimum(powers, limit)
    return np.minimum(-(-lengths // _MULTIPLE) * _MULTIPLE, limit)


@dataclass
class EncodedRows:
    """Rows ready for the encoder.

    tokens: per row its token ids, int64 (length,). labels: int64 (n,), indices into the plan's labels; -1 for rows
    that have none. padded: int64 (n,), the length to which each row is padded. pad: the padding token's id.
    features: what the classifier computed for these rows last, by the digest of the adapter that it was made under.
    """

    tokens: list[NDArray[np.int64]]
    labels: NDArray[np.int64]
    padded: NDArray[np.int64]
    features: dict[bytes, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, chosen: NDArray[np.int64], most: Callable[[int], int]) -> Iterator[NDArray[np.int64]]:
        """The chosen rows' indices in groups of one padded length, and of at most most(length) rows."""
        for length in np.unique(self.padded[chosen]):
            group = chosen[self.padded[chosen] == length]
            size = most(int(length))
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def inputs(self, batch: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask of one such group, both int64 (n, length)."""
        length = int(self.padded[batch[0]])
        ids = np.full((len(batch), length), PADDING, np.int64)
        mask = np.zeros((len(batch), length), np.int64)
        for place, row in enumerate(batch):
            tokens = self.tokens[row]
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def batches_of_each_length(limit: int, few: bool, rows: Callable[[int], int]) -> EncodedRows:
    """Rows of one token and padding: for every length to which a row can be padded, rows(length) of them. Their label
    is the first."""
    lengths = np.unique(padded_lengths(np.arange(1, limit + 1), limit, few))
    padded = np.repeat(lengths, [rows(int(length)) for length in lengths])
    return EncodedRows([np.array([PADDING])] * len(padded), np.zeros(len(padded), np.int64), padded)


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer. Raises LocalError when it has none that needs no code of its own."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):
        raise LocalError(f"The tokenizer in {folder} cannot be loaded; the folder needs a tokenizer.json.") from None


def encode_rows(
    tokenizer: Any, task: Task, rows: Sequence[tuple[str, str | None]], known: int, few_lengths: bool = False
) -> EncodedRows:
    """Tokenise (text, label) rows, cut to the task's max_length tokens; a label of None means that there is none.

    known: how many tokens the model has. Some tokenizers know more; such a token counts as the model's first, for a row
    that the model cannot read would show by a site's declining that it is there. Raises LocalError for a label that the
    plan does not have; the sentence does not quote it.
    """
    index: dict[str | None, int] = {label: number for number, label in enumerate(task.labels)}
    index[None] = -1
    unknown = [number for number, (_, label) in enumerate(rows) if label not in index]
    if unknown:
        raise LocalError(f"Row {unknown[0] + 1} of the data has a label that the plan does not list in [task] labels.")
    labels = np.array([index[label] for _, label in rows], np.int64)
    texts = [text for text, _ in rows]
    ids = tokenizer(texts, truncation=True, max_length=task.max_length)["input_ids"] if texts else []
    # Some tokenizers cut nothing where their special tokens alone are too many; a row without any still has a last one.
    tokens = [np.array(row[: task.max_length] or [PADDING], np.int64) for row in ids]
    tokens = [np.where(row < known, row, 0) for row in tokens]
    lengths = np.array([len(row) for row in tokens], np.int64)
    return EncodedRows(tokens, labels, padded_lengths(lengths, task.max_length, few_lengths))
