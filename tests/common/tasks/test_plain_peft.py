"""Training without DP against a loop that shares no code with it: peft, torch's optimisers, transformers' schedules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModel, AutoTokenizer, get_scheduler

from foedus_common.plan import Phase, RoundPlan, schedule
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from seeded import seeded
from tiny_model import LABELS, rows, tiny_agreed, without_dp, write_tiny_model

COUNT, MICRO = 23, 4
"""Rows, so that an epoch ends in a batch that is not full; and how many the plain loop takes at a time."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def shuffled(epochs: int, size: int) -> list[list[int]]:
    """The batches of row numbers, from the same seed that the trainer is given: 8 bytes a row and epoch, sorted."""
    random, batches = seeded("order"), []
    for _ in range(epochs):
        draws = np.frombuffer(random(8 * COUNT), "<u8")
        order = sorted(range(COUNT), key=lambda row: int(draws[row]))
        batches += [order[start : start + size] for start in range(0, COUNT, size)]
    return batches


def plain_training(folder: Path, adapter: dict[str, np.ndarray], method: str, alpha: float, phase: Phase) -> np.ndarray:
    """What changes in the head and the trained factors, in the order of the model's layers, A before B."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager")
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=alpha, target_modules=["query", "value"])).eval()
    tensors = {name: torch.tensor(value) for name, value in adapter.items()}
    head = torch.nn.Parameter(tensors.pop("head.weight"))
    set_peft_model_state_dict(model, tensors)
    factors = [
        p for name, p in model.named_parameters() if "lora_B" in name or (method == "fedit" and "lora_A" in name)
    ]
    trained = [head, *factors] if phase.train == "adapter" else [head]
    before = [p.detach().clone() for p in trained]

    rates = [phase.head_learning_rate or phase.learning_rate, phase.learning_rate]
    groups = [{"params": [head], "lr": rates[0]}, {"params": trained[1:], "lr": rates[1]}]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[phase.optimizer]
    optimizer = kind(groups, weight_decay=phase.weight_decay or 0.0)
    batches = shuffled(int(phase.epochs), phase.batch_size)
    warm = (phase.warmup or 0) * len(batches)
    assert warm == int(warm), "a fraction of a step: transformers counts whole ones"
    name = {"none": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}[phase.decay]
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=int(warm), num_training_steps=len(batches))

    tokenizer, data = AutoTokenizer.from_pretrained(folder), rows(COUNT)
    for batch in batches:
        for part in (batch[start : start + MICRO] for start in range(0, len(batch), MICRO)):  # accumulation
            inputs = tokenizer([data[row][0] for row in part], padding=True, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            mean = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, inputs["attention_mask"], strict=True)])
            features = torch.cat([mean / mean.norm(dim=1, keepdim=True), torch.full((len(part), 1), 0.3)], 1)
            labels = torch.tensor([LABELS.index(data[row][1]) for row in part])
            loss = torch.nn.functional.cross_entropy(features @ head.T, labels) * len(part) / len(batch)
            loss.backward()
        if phase.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, phase.max_grad_norm)
        optimizer.step()
        scheduler.step()
        model.zero_grad()
        optimizer.zero_grad()
    return np.concatenate([(p.detach() - b).numpy().ravel() for p, b in zip(trained, before, strict=True)])


CRAFT: list[dict[str, Any]] = [
    {"batch_size": 8, "epochs": 4.0, "warmup": 0.25, "decay": "linear"},  # 12 steps
    {"batch_size": 23, "epochs": 4.0, "warmup": 0.5, "decay": "cosine", "weight_decay": 0.1},
    {"batch_size": 8, "epochs": 2.0, "warmup": 0.5, "decay": "none", "max_grad_norm": 0.05},
]


@pytest.mark.parametrize("craft", CRAFT, ids=lambda craft: craft["decay"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("train", "method"), [("head", "ffa-lora"), ("adapter", "ffa-lora"), ("adapter", "fedit")])
def test_one_site_trains_as_plain_peft_does(
    model: Path, train: str, method: str, optimizer: str, craft: dict[str, Any]
) -> None:
    rate = {"sgd": 0.5, "adamw": 0.01}[optimizer]
    table = {"train": train, "rounds": 1, "learning_rate": rate, "optimizer": optimizer, "update_bound": 100.0, **craft}
    if train == "adapter":
        table["head_learning_rate"] = 2 * rate
    agreed = tiny_agreed(model, **(without_dp() | {"phase": [table], "adapter__method": method}))
    trainer = LocalTrainer(TextClassifier.load(model, agreed.plan, dtype="float32"), agreed, rows(COUNT))
    random = np.random.default_rng(0)
    adapter = {t.name: (0.3 * random.normal(size=t.shape)).astype(np.float32) for t in trainer.classifier.spec.tensors}
    update = trainer.train(adapter, schedule(agreed.plan)[0], seeded("order"))
    expected = plain_training(model, adapter, method, agreed.plan.adapter.alpha, agreed.plan.phase[0])
    np.testing.assert_allclose(update, expected, atol=1e-5)
    assert np.abs(update).max() > 1e-3


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_rates_are_a_matter_of_progress_not_of_rows(decay: str) -> None:
    """Two sites, of 3 and of 12 steps a round, have the same rate whenever they are equally far, in every round."""
    phase = Phase(train="head", rounds=4, learning_rate=2.0, warmup=0.375, decay=decay)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    name = {"none": "constant_with_warmup"}.get(decay, decay)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=18, num_training_steps=48)
    of_many = []
    for _ in range(48):
        of_many.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rounds = [RoundPlan(done, 0, phase, done) for done in range(4)]
    assert [plan.learning_rate("head", k / 12) for plan in rounds for k in range(12)] == pytest.approx(of_many)
    of_few = [plan.learning_rate("head", k / 3) for plan in rounds for k in range(3)]
    assert of_few == pytest.approx(of_many[::4])
    assert math.isclose(max(of_few), 2.0, rel_tol=0.15)
