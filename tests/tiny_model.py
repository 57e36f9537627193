"""A BERT of two layers with random weights, as a model folder, and plans that fit it: torch tests in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import AgreedPlan, RunPlan
from plans import run_plan

WORDS = ["eye", "ear", "skin", "of", "the", "left", "right", "upper", "lower", "pain", "injury", "disease", "burn"]
WORDS += ["acute", "chronic", "unspecified", "poison"]
LABELS = ["Eye", "Ear", "Skin"]
HIDDEN = 16


def write_tiny_model(folder: Path) -> Path:
    """Config, safetensors and tokenizer. Dropout is 0.1, so that a test sees whether it is off."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config)
        for parameter in model.parameters():  # far from BERT's small initial weights, so that texts differ
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder)
    return folder


def model_folder(folder: Path) -> Path:
    """What counts as a model folder, for tests that hash it and load nothing: no torch."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


def tiny_plan(folder: Path, **changes: Any) -> RunPlan:
    """The tests' usual plan for the model in `folder`, in 32-bit-friendly proportions: 2 steps, divisor 10."""
    defaults: dict[str, Any] = {
        "model__sha256": manifest_sha256(folder),
        "task__labels": LABELS,
        "adapter__rank": 2,
        "phase__0__rounds": 2,
        "phase__0__steps": 2,
        "phase__1__rounds": 2,
        "phase__1__sampling_rate": 0.5,
        "privacy__divisor": 10,
    }
    return run_plan(**(defaults | changes))


def without_dp() -> dict[str, Any]:
    """Changes that make of it a plan without DP; further changes go on top."""
    return {
        "privacy": {"unit": "none"},
        "phase": [
            {"train": "head", "rounds": 1, "learning_rate": 0.1, "epochs": 2.0, "batch_size": 4},
            {"train": "adapter", "rounds": 1, "learning_rate": 0.01, "epochs": 1.0, "batch_size": 4},
        ],
    }


def tiny_agreed(folder: Path, **changes: Any) -> AgreedPlan:
    """Such a plan as agreed: the spec is the model's own, the noise multipliers are 1."""
    from foedus_common.tasks.encoder import encoder_spec

    plan = tiny_plan(folder, **changes)
    spec = encoder_spec(folder, plan)
    return AgreedPlan(
        run_id=7,
        plan=plan,
        noise_multipliers=(1.0,) * len(plan.phase) if plan.privacy.on else (),
        trained=tuple(spec.parts(phase.train) for phase in plan.phase),
        spec_sha256=spec.digest().hex(),
        first_adapter_sha256="c" * 64,
    )


def rows(count: int = 12) -> list[tuple[str, str]]:
    """Rows of various lengths, the labels in turn."""
    return [
        (" ".join([LABELS[i % 3].lower(), *(WORDS[(i * 5 + j * 3) % 16] for j in range(i % 9))]), LABELS[i % 3])
        for i in range(count)
    ]


def rewrite_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
