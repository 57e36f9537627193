"""How much memory a site's training takes: a formula over a model's shape, for the table in the README.

    python -m foedus_common.tasks.memory [MODEL_FOLDER ...]

prints the table's rows for those models. In bytes, with P parameters of which B are in the layers of the stack; L
layers, h hidden, m intermediate, a attention heads; physical batches of N tokens, in rows of T; w bytes a number (2 in
bfloat16, else 4); k = 3 for gated layers (Llama's), else 1; and d numbers trained:

    weights       4 P, or 2 P in bfloat16; in 4 bits 0.516 B + w (P - B). If float32 ones are multiplied in bfloat16,
                  2 B more for their copies
    kept          N L w (6 h + k m + a T) from the forward pass for the backward pass; with gradient checkpointing
                  N L 4 h and one layer's w (6 h + k m + a T). On GPUs attention is fused, and a T falls away
    in work       4 N w max(m, a T) for the layer that is computed
    per example   12 d N / T under DP: each row's gradient in float32, and in float64 while it is clipped. On GPUs
                  batches are filled up, the shortest rows come first, and N / T becomes min(128, N / 8)

and on CPUs kept and in work twice, for what glibc's allocator does not give back. What is kept was counted on BERT and
Llama (a test does so again), the allocator's share measured (`benchmarks/training_memory.py`). Knows nothing of what
Python and torch take by themselves, about half a GB, and of CUDA's own share.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from foedus_common.tasks.encoder import BaseWeights
from foedus_common.tasks.physical_batches import MOST_ROWS, ON_CPU
from foedus_common.tasks.rows import SHORTEST
from foedus_common.tasks.targets import LINEAR, blocks

RANK = 8
LENGTH = 128
"""Of the table: rank 8 on queries and values, rows of 128 tokens."""


@dataclass(frozen=True)
class Shape:
    """A model's numbers. in_layers: parameters of linear layers in the stack; queries_and_values: their outputs."""

    parameters: int
    in_layers: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    gated: bool
    queries_and_values: int


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    weights: int
    kept: int
    in_work: int
    per_example: int

    @property
    def total(self) -> int:
        return self.weights + self.kept + self.in_work + self.per_example


def shape_of(config: PretrainedConfig) -> Shape:
    """Counted on the model's layers, made without weights."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    stack = [block for _, block in blocks(model).values()]
    linear = [part for block in stack for part in block.modules() if isinstance(part, LINEAR)]
    hidden, heads = config.hidden_size, config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        in_layers=sum(part.weight.numel() for part in linear),
        layers=len(stack),
        hidden=hidden,
        intermediate=getattr(config, "intermediate_size", None) or 4 * hidden,
        heads=heads,
        gated=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
        queries_and_values=hidden + hidden * groups // heads,
    )


def estimate(
    shape: Shape,
    *,
    base_weights: BaseWeights = "float32",
    products: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    tokens: int = ON_CPU,
    length: int = LENGTH,
    rank: int = RANK,
    gpu: bool = False,
) -> Memory:
    """What an adapter phase under DP takes at its peak; the module says by which formula. products: float32 or
    bfloat16, as the site's dtype."""
    wide = products.itemsize
    rest = shape.parameters - shape.in_layers
    weights = {
        "float32": 4 * shape.parameters + (2 * shape.in_layers if wide == 2 else 0),
        "bfloat16": 2 * shape.parameters,
        "4bit": round(0.516 * shape.in_layers) + wide * rest,
    }[base_weights]
    scores = 0 if gpu else shape.heads * length
    of_a_layer = wide * (6 * shape.hidden + (3 if shape.gated else 1) * shape.intermediate + scores)
    kept = 4 * shape.hidden * shape.layers + of_a_layer if gradient_checkpointing else of_a_layer * shape.layers
    trained = rank * shape.queries_and_values * shape.layers
    allocator = 1 if gpu else 2
    return Memory(
        weights=weights,
        kept=allocator * tokens * kept,
        in_work=allocator * 4 * tokens * wide * max(shape.intermediate, scores),
        per_example=12 * trained * (min(MOST_ROWS, tokens // SHORTEST) if gpu else max(1, tokens // length)),
    )


# --- The table ---

MODELS: dict[str, PretrainedConfig] = {
    "MiniLM-L6": AutoConfig.for_model(
        "bert", hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    ),
    "BERT base": AutoConfig.for_model("bert"),
    "BERT large": AutoConfig.for_model(
        "bert", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    ),
    "Llama 3.2 1B": AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Llama 3.1 8B": AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}
"""As their makers' configurations say, without a head for words."""


def row(name: str, config: PretrainedConfig) -> str:
    """One row of the README's table: GB (10^9 bytes) as the settings get thriftier, for ON_CPU tokens a batch; four on
    a CPU, two on a GPU."""
    shape = shape_of(config)
    half = torch.bfloat16
    choices = (
        estimate(shape),
        estimate(shape, base_weights="bfloat16", products=half),
        estimate(shape, base_weights="bfloat16", products=half, gradient_checkpointing=True),
        estimate(shape, base_weights="4bit", products=half, gradient_checkpointing=True),
        estimate(shape, base_weights="bfloat16", products=half, gradient_checkpointing=True, gpu=True),
        estimate(shape, base_weights="4bit", products=half, gradient_checkpointing=True, gpu=True),
    )
    cells = " | ".join(f"{memory.total / 1e9:.2g}" for memory in choices)
    return f"| {name} | {shape.parameters / 1e6:,.0f} M | {cells} |"


def main(folders: list[str]) -> None:
    models = {folder: AutoConfig.from_pretrained(Path(folder), local_files_only=True) for folder in folders} or MODELS
    for name, config in models.items():
        print(row(name, config))


if __name__ == "__main__":
    main(sys.argv[1:])
