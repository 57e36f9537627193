from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import schedule
from foedus_common.tasks.encoder import HEAD
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from plans import by_site
from tiny_model import LABELS, rows, tiny_agreed, without_dp, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def trainer_for(model: Path, count: int = 60, **changes: Any) -> tuple[LocalTrainer, Tensors, tuple[Any, ...]]:
    """A trainer, an adapter with zero head, and the schedule."""
    agreed = tiny_agreed(model, **(without_dp() | changes))
    trainer = LocalTrainer(TextClassifier.load(model, agreed.plan, dtype="float32"), agreed, rows(count))
    random = np.random.default_rng(0)
    adapter = {
        t.name: (0.3 * random.normal(size=t.shape) * (t.role != "head")).astype(np.float32)
        for t in trainer.classifier.spec.tensors
    }
    return trainer, adapter, schedule(agreed.plan)


def test_no_rows_are_an_update_of_zero_where_noise_follows_and_refused_where_none_does(model: Path) -> None:
    agreed = tiny_agreed(model, **by_site())
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    adapter = {t.name: np.zeros(t.shape, np.float32) for t in classifier.spec.tensors}
    for plan in (schedule(agreed.plan)[0], schedule(agreed.plan)[2]):
        update = LocalTrainer(classifier, agreed, []).train(adapter, plan, os.urandom)
        np.testing.assert_array_equal(update, np.zeros(agreed.size(plan.phase)))
    with pytest.raises(LocalError, match="no rows"):
        trainer_for(model, count=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_both_phases_learn(model: Path, optimizer: str) -> None:
    trainer, adapter, (head_round, adapter_round) = trainer_for(
        model, phase__0__optimizer="sgd", phase__1__optimizer=optimizer, phase__0__epochs=5.0, phase__1__epochs=3.0
    )
    classifier, spec = trainer.classifier, trainer.classifier.spec

    def loss() -> float:
        features = classifier.features(adapter, trainer.rows)
        labels = torch.from_numpy(trainer.rows.labels)
        return float(torch.nn.functional.cross_entropy(features @ torch.from_numpy(adapter[HEAD]).T, labels))

    before = loss()
    assert before == pytest.approx(np.log(len(LABELS)), abs=1e-5)
    adapter = spec.with_update(adapter, "head", trainer.train(adapter, head_round, os.urandom))
    after_head = loss()
    adapter = spec.with_update(adapter, "adapter", trainer.train(adapter, adapter_round, os.urandom))
    assert before > after_head > loss()


def test_one_batch_of_sgd_is_the_mean_gradient(model: Path) -> None:
    trainer, adapter, (_, plan) = trainer_for(
        model,
        count=9,
        phase__1__optimizer="sgd",
        phase__1__batch_size=9,
        phase__1__learning_rate=0.001,
        phase__1__head_learning_rate=0.5,
    )
    adapter = {**adapter, HEAD: np.ones_like(adapter[HEAD]) * np.arange(3, dtype=np.float32)[:, None]}
    update = trainer.train(adapter, plan, os.urandom)

    classifier, spec = trainer.classifier, trainer.classifier.spec
    classifier.load_factors(adapter)
    names = [t.name for t in spec.trained("adapter")][1:]
    weights = [classifier.factors[name].weight.requires_grad_(True) for name in names]
    head = torch.tensor(adapter[HEAD], requires_grad=True)
    features = torch.cat([classifier.pooled(trainer.rows, np.array([row]))[:1] for row in range(9)])
    loss = torch.nn.functional.cross_entropy(features @ head.T, torch.from_numpy(trainer.rows.labels))
    of_head, *of_weights = torch.autograd.grad(loss, [head, *weights])
    expected = np.concatenate([0.5 * of_head.numpy().ravel(), *(0.001 * g.numpy().ravel() for g in of_weights)])
    np.testing.assert_allclose(update, -expected, atol=2e-7)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 6), (0.5, 2), (0.01, 1)])
def test_epochs_and_parts_of_them(model: Path, epochs: float, steps: int) -> None:
    agreed = tiny_agreed(model, **(without_dp() | {"phase__0__epochs": epochs}))
    reported: list[Any] = []
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    trainer = LocalTrainer(classifier, agreed, rows(10), lambda *done: reported.append(done))
    _, adapter, plans = trainer_for(model)
    trainer.train(adapter, plans[0] if epochs == 2.0 else schedule(agreed.plan)[0], os.urandom)
    assert [r for r in reported if r[0] == "steps"] == [("steps", k + 1, steps) for k in range(steps)]


def test_updates_stay_within_the_plans_bound(model: Path) -> None:
    trainer, adapter, plans = trainer_for(model, phase__0__learning_rate=50.0, phase__0__update_bound=0.25)
    update = trainer.train(adapter, plans[0], os.urandom)
    assert np.abs(update).max() == 0.25


def test_the_encoder_is_frozen_again_afterwards(model: Path) -> None:
    trainer, adapter, plans = trainer_for(model)
    trainer.train(adapter, plans[1], os.urandom)
    assert not any(parameter.requires_grad for parameter in trainer.classifier.encoder.parameters())


def test_divergence_is_said(model: Path) -> None:
    trainer, adapter, plans = trainer_for(model, phase__1__learning_rate=1e30, phase__1__epochs=3.0)
    with pytest.raises(LocalError, match="lower the plan's learning_rate"):
        trainer.train(adapter, plans[1], os.urandom)
