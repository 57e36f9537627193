"""Text classification: a text model's pooled features under a linear softmax head.

A row's feature vector is the mean of its tokens' last hidden states (or the first or last token's), scaled to unit
norm, with the constant 0.3 appended; the head is one matrix over it. Bounded features keep one row's gradient near the
clipping bound, and the same features serve both phases, so the head that the first one trained carries over.
Knows nothing of privacy or of optimisation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from foedus_common.adapters import AdapterSpec, Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import RunPlan, Task
from foedus_common.tasks.encoder import BaseWeights, factors, load_encoder, recompute_blocks, spec_of
from foedus_common.tasks.head import CONSTANT, HEAD
from foedus_common.tasks.physical_batches import COMPANIONS, ON_CPU, ON_GPU, PhysicalBatches
from foedus_common.tasks.rows import EncodedRows, batches_of_each_length, encode_rows, load_tokenizer

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): how far a long computation is; what is "features" or "steps"."""

DType = Literal["auto", "float32", "bfloat16"]


def no_progress(what: str, done: int, total: int) -> None:
    """For callers that do not look."""


class TextClassifier:
    """The model of one plan on one device. Holds one adapter at a time; not for use from two threads at once."""

    def __init__(
        self,
        encoder: PeftModel,
        tokenizer: Any,
        task: Task,
        spec: AdapterSpec,
        dtype: torch.dtype,
        batches: PhysicalBatches,
    ) -> None:
        self.encoder = encoder
        self.spec = spec
        self.batches = batches
        self.factors = factors(encoder)
        self.device: torch.device = next(encoder.parameters()).device
        self._tokenizer = tokenizer
        self._task = task
        self._dtype = dtype

    @classmethod
    def load(
        cls,
        folder: Path,
        plan: RunPlan,
        device: str = "auto",
        dtype: DType = "auto",
        *,
        base_weights: BaseWeights = "float32",
        gradient_checkpointing: bool = False,
        tokens_per_batch: int = 0,
    ) -> TextClassifier:
        """The plan's model from a local folder.

        device: "auto", "cpu" or "cuda:N". dtype: of the matrix products in the encoder ("auto": bfloat16 where the
        machine is quick at it, or the base is held so). base_weights: how the frozen weights are held in memory.
        gradient_checkpointing: compute each layer twice and keep little of it. tokens_per_batch: how many go through
        the encoder at once; 0 leaves it to the device. Raises LocalError with one sentence.
        """
        place = choose_device(device)
        products = torch.bfloat16 if base_weights == "bfloat16" else choose_dtype(dtype, place)
        encoder = load_encoder(folder, plan, place, base_weights, products)
        if gradient_checkpointing:
            recompute_blocks(encoder)
        on_gpu = place.type != "cpu"
        batches = PhysicalBatches(
            tokens_per_batch or (ON_GPU if on_gpu else ON_CPU), one_shape=on_gpu and plan.privacy.unit == "record"
        )
        return cls(encoder, load_tokenizer(folder), plan.task, spec_of(encoder, plan), products, batches)

    def encode(self, rows: Sequence[tuple[str, str | None]]) -> EncodedRows:
        """(text, label) rows ready for this model; see `encode_rows`."""
        known = self.encoder.get_input_embeddings().num_embeddings
        return encode_rows(self._tokenizer, self._task, rows, known, few_lengths=self.batches.one_shape)

    def stand_ins(self) -> EncodedRows:
        """Rows that are nobody's, a whole batch of every length that this model's rows can have."""
        return batches_of_each_length(self._task.max_length, self.batches.one_shape, self.batches.rows)

    def load_factors(self, tensors: Tensors) -> None:
        """Put an adapter's factors (all its tensors but the head) into the encoder."""
        with torch.no_grad():
            for name, module in self.factors.items():
                module.weight.copy_(torch.from_numpy(tensors[name]))

    def pooled(self, rows: EncodedRows, batch: NDArray[np.int64]) -> torch.Tensor:
        """Features (n + companions, hidden size + 1) of one physical batch of n rows, which come first, with their
        graph if it is kept."""
        ids, mask = rows.inputs(batch)
        return self.pooled_inputs(ids, mask, self.batches.companions(*ids.shape))

    def pooled_inputs(self, ids: torch.Tensor, mask: torch.Tensor, companions: int = COMPANIONS) -> torch.Tensor:
        """The same of token ids and attention mask, both (n, length)."""
        ids, mask = (part.to(self.device) for part in _accompanied(ids, mask, companions))
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self._task.pooling == "cls":
            pooled = hidden[:, 0]
        elif self._task.pooling == "last":
            pooled = hidden[torch.arange(len(hidden), device=self.device), mask.sum(dim=1) - 1]
        else:
            weights = mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        unit = torch.nn.functional.normalize(pooled, dim=1)
        return torch.cat([unit, unit.new_full((len(unit), 1), CONSTANT)], dim=1)

    def features(self, adapter: Tensors, rows: EncodedRows, progress: Progress = no_progress) -> torch.Tensor:
        """Features of all rows under an adapter, float32 (n, hidden size + 1). Kept with the rows until they are asked
        for under other factors, so a phase that trains only the head computes them once."""
        key = self._factors_digest(adapter)
        if key not in rows.features:
            self.load_factors(adapter)
            result = torch.empty(len(rows), self.spec.tensors[0].shape[1], device=self.device)
            done = 0
            with torch.no_grad():
                everything = np.arange(len(rows))
                for batch, pooled in self.batches.each(rows, everything, lambda batch: self.pooled(rows, batch)):
                    result[torch.from_numpy(batch)] = pooled[: len(batch)].to(result.dtype)
                    done += len(batch)
                    progress("features", done, len(rows))
            rows.features = {key: result}
        return rows.features[key]

    def predict(self, adapter: Tensors, rows: EncodedRows, progress: Progress = no_progress) -> NDArray[np.int64]:
        """The likeliest label of each row, int64 (n,), as indices into the plan's labels."""
        head = torch.from_numpy(adapter[HEAD]).to(self.device)
        likeliest: NDArray[np.int64] = (self.features(adapter, rows, progress) @ head.T).argmax(dim=1).cpu().numpy()
        return likeliest

    def accuracy(self, adapter: Tensors, rows: EncodedRows, progress: Progress = no_progress) -> float:
        """The share of rows whose label is the likeliest one."""
        return float((self.predict(adapter, rows, progress) == rows.labels).mean())

    def _factors_digest(self, adapter: Tensors) -> bytes:
        state = hashlib.sha256()
        for name in self.factors:
            state.update(adapter[name].tobytes())
        return state.digest()


def _accompanied(ids: torch.Tensor, mask: torch.Tensor, companions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch and so many rows more, at least one, of one token and padding.

    A batch without any padding takes another path through attention, rounded otherwise, and so may one of a single row.
    Then a row that joins a batch would change what is computed for the others, and move a sum of clipped gradients by
    more than the clip: by up to 2 % of it for each of them in bfloat16 (MiniLM, Zen 4).
    """
    rows = ids.new_zeros(companions, ids.shape[1])
    seen = torch.zeros_like(rows)
    seen[:, 0] = 1
    return torch.cat([ids, rows]), torch.cat([mask, seen])


def choose_device(device: str) -> torch.device:
    """ "auto" is the first GPU if there is one, else the CPU. Raises LocalError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise LocalError(f'The device {device!r} is not known; write "auto", "cpu" or "cuda:0".') from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise LocalError(f"The device {device!r} was asked for, but this machine has no usable GPU.")
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise LocalError(
            f"The device {device!r} was asked for, but this machine's GPUs are cuda:0 to cuda:{count - 1}."
        )
    return chosen


def choose_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on GPUs that have it and on CPUs with bfloat16 instructions (twice as fast there), else
    float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    quick = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if quick else torch.float32


def _cpu_has_bfloat16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags
