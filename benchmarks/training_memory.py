"""What a site's trainer takes at its peak, over the formula behind the README's table (`foedus_common.tasks.memory`).

A BERT of MiniLM's shape with random weights trains one DP-SGD step on 48 rows of 128 tokens, once for each way of
holding the base, each time in a process of its own. Measured is the largest resident set (VmHWM of Linux) above that of
the same process with a model of 16 dimensions, which is what Python, torch and transformers take by themselves.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedTokenizerFast

from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import Adapter, AgreedPlan, Data, Model, Phase, Privacy, Run, RunPlan, Task, schedule
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.memory import LENGTH, MODELS, RANK, estimate, shape_of
from foedus_common.tasks.text_classification import TextClassifier
from report import report
from resident import memory

ROWS = 48
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"base_weights": "bfloat16"},
    "bfloat16, checkpointing": {"base_weights": "bfloat16", "gradient_checkpointing": True},
    "4bit, checkpointing": {"base_weights": "4bit", "gradient_checkpointing": True, "dtype": "bfloat16"},
}


def write_model(
    folder: Path, config: PretrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Path:
    words = {f"w{number}": number for number in range(1000)} | {"[PAD]": 1000, "[UNK]": 1001}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    with torch.device(device):
        AutoModel.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


def formula(settings: dict[str, Any]) -> dict[str, Any]:
    """The same settings as `estimate` takes them."""
    half = "bfloat16" in settings.values()
    held = {key: value for key, value in settings.items() if key != "dtype"}
    return held | {"products": torch.bfloat16 if half else torch.float32}


def agree(
    folder: Path, settings: dict[str, Any], device: str = "cpu", targets: tuple[str, ...] = ("query", "value")
) -> tuple[TextClassifier, AgreedPlan]:
    """The model under those settings, and a plan of one DP-SGD step on all rows."""
    plan = RunPlan(
        Run("training-memory", "A benchmark."),
        Model("random", manifest_sha256(folder)),
        Data("random"),
        Task("text-classification", ("a", "b"), max_length=LENGTH),
        (Phase("adapter", rounds=1, learning_rate=1.0, steps=1, sampling_rate=1.0, budget_share=1.0),),
        Privacy(epsilon=8.0, delta=1e-5, divisor=ROWS),
        Adapter(rank=RANK, targets=targets),
    )
    classifier = TextClassifier.load(folder, plan, device, **settings)
    spec = classifier.spec
    return classifier, AgreedPlan(1, plan, (1.0,), (spec.parts("adapter"),), spec.digest().hex(), "0" * 64)


def train_one_step(classifier: TextClassifier, agreed: AgreedPlan, count: int = ROWS) -> None:
    rows = [(" ".join(f"w{(row + word) % 1000}" for word in range(LENGTH)), "ab"[row % 2]) for row in range(count)]
    adapter = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in classifier.spec.tensors}
    LocalTrainer(classifier, agreed, rows).train(adapter, schedule(agreed.plan)[0], os.urandom)


def of_a_process(folder: Path, settings: dict[str, Any]) -> float:
    """Megabytes: its largest resident set."""
    given = [str(folder), json.dumps(settings)]
    told = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(told.splitlines()[-1])


def main() -> bool:
    shape, ratios = shape_of(MODELS["MiniLM-L6"]), []
    nearly_none = AutoConfig.for_model(
        "bert", hidden_size=16, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1
    )
    with tempfile.TemporaryDirectory() as scratch:
        empty = of_a_process(write_model(Path(scratch) / "tiny", nearly_none), SETTINGS["float32"])
        folder = write_model(Path(scratch) / "minilm", MODELS["MiniLM-L6"])
        print(f"the process itself {empty:.0f} MB")
        for name, settings in SETTINGS.items():
            if settings.get("base_weights") == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
                print(f"{name}: not measured, bitsandbytes is not installed")
                continue
            computed = estimate(shape, **formula(settings)).total / 1e6
            measured = of_a_process(folder, settings) - empty
            ratios.append(measured / computed)
            print(f"{name}: measured {measured:.0f} MB, computed {computed:.0f} MB")
    claim = "memory of training a model of MiniLM's shape, over the formula's; the largest"
    return report("training_memory", claim, max(ratios), 1.25, at_least=False)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit(not main())
    torch.set_num_threads(1)
    train_one_step(*agree(Path(sys.argv[1]), json.loads(sys.argv[2])))
    print(memory("VmHWM"))
