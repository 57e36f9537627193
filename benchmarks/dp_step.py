"""What privacy costs in time: one DP-SGD step of head and factors against the same step without privacy.

A BERT of MiniLM's dimensions with random weights, 256 rows of 5 to 30 tokens, rank 4 on query and value of six layers;
both steps run as a site runs them (`LocalTrainer.train`), noise and all, on one thread, and take turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import (
    Adapter,
    AgreedPlan,
    Data,
    Model,
    Phase,
    Privacy,
    Run,
    RunPlan,
    Task,
    schedule,
)
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from report import report

ROWS = 256
LABELS = tuple(f"label-{number}" for number in range(20))
TURNS = 7

PRIVATE = Phase("adapter", rounds=1, learning_rate=1.0, steps=1, sampling_rate=1.0, budget_share=1.0)
PLAIN = Phase("adapter", rounds=1, learning_rate=0.01, epochs=1.0, batch_size=ROWS)


def write_model(folder: Path) -> None:
    words = {f"w{number}": number for number in range(1000)} | {"[PAD]": 1000, "[UNK]": 1001}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(config).save_pretrained(folder)


def agreed_plan(folder: Path, phase: Phase, privacy: Privacy) -> tuple[AgreedPlan, TextClassifier]:
    plan = RunPlan(
        Run("dp-step", "A benchmark."),
        Model("random", manifest_sha256(folder)),
        Data("random"),
        Task("text-classification", LABELS, max_length=32),
        (phase,),
        privacy,
        Adapter(rank=4, targets=("query", "value")),
    )
    classifier = TextClassifier.load(folder, plan)
    spec = classifier.spec
    noise = (1.0,) if privacy.on else ()
    return AgreedPlan(1, plan, noise, (spec.parts("adapter"),), spec.digest().hex(), "0" * 64), classifier


def main() -> bool:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    lengths = random.integers(5, 31, ROWS)
    rows = [
        (" ".join(f"w{word}" for word in random.integers(0, 1000, length)), LABELS[number % 20])
        for number, length in enumerate(lengths)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_model(folder)
        steps = {}
        for name, phase, privacy in (
            ("private", PRIVATE, Privacy(epsilon=8.0, delta=1e-5, divisor=ROWS)),
            ("plain", PLAIN, Privacy(unit="none")),
        ):
            agreed, classifier = agreed_plan(folder, phase, privacy)
            steps[name] = (LocalTrainer(classifier, agreed, rows), schedule(agreed.plan)[0])
    adapter = {
        t.name: (0.05 * random.normal(size=t.shape)).astype(np.float32)
        for t in steps["plain"][0].classifier.spec.tensors
    }
    seconds: dict[str, list[float]] = {"private": [], "plain": []}
    for _ in range(TURNS):
        for name, (trainer, plan) in steps.items():
            start = time.process_time()
            trainer.train(adapter, plan, os.urandom)
            seconds[name].append(time.process_time() - start)
    ratios = [private / plain for private, plain in zip(seconds["private"], seconds["plain"], strict=True)][1:]
    print(f"private {min(seconds['private']):.3f} s, plain {min(seconds['plain']):.3f} s for {ROWS} rows (CPU)")
    claim = "CPU time of a DP-SGD step on LoRA factors and head, over the same step without privacy"
    return report("dp_step", claim, statistics.median(ratios), 1.10, at_least=False)


if __name__ == "__main__":
    raise SystemExit(not main())
