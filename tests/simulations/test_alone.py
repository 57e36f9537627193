"""Training without federation: the plan's own arithmetic, rates chosen on other rows than those that count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from foedus_common.adapters import Tensors
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.ranges import noise_grid
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.prepare import first_adapter
from foedus_simulations.alone import (
    Judges,
    agree,
    at_rate,
    best_of_rates,
    compare,
    head_only,
    in_one_place,
    pairs,
    pooled,
    train,
)
from foedus_simulations.corpora import Row
from seeded import seeded
from tiny_model import rows, tiny_agreed, tiny_plan, without_dp, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def classifier(model: Path) -> TextClassifier:
    return TextClassifier.load(model, tiny_plan(model), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def agreed(model: Path, classifier: TextClassifier) -> AgreedPlan:
    return agree(tiny_plan(model), classifier)


def some_rows(count: int, start: int = 0) -> list[Row]:
    return [Row(text, label, "") for text, label in rows(start + count)[start:]]


def stub(classifier: TextClassifier, update: Callable[[RoundPlan], float], **attributes: Any) -> Any:
    """A trainer whose every update has the same value in each coordinate."""
    spec = classifier.spec

    def one_round(tensors: Tensors, round_plan: RoundPlan, random: object) -> np.ndarray:
        return np.full(spec.size(round_plan.settings.train), update(round_plan))

    return SimpleNamespace(classifier=SimpleNamespace(spec=spec, **attributes), train=one_round)


@pytest.mark.parametrize(("average_last", "head", "factors"), [(1, 4.0, 2.0), (2, 3.0, 1.5)])
def test_training_goes_through_the_phases_and_averages_the_last_rounds_of_each(
    model: Path, classifier: TextClassifier, average_last: int, head: float, factors: float
) -> None:
    """Two head rounds and two adapter rounds, each adding 1 to all that it trains."""
    plan = tiny_plan(model, aggregation__optimizer="fedavg", aggregation__average_last=average_last)
    first = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in classifier.spec.tensors}
    trained = train(stub(classifier, lambda round_plan: 1.0), plan, first, seeded("x"))
    for tensor in classifier.spec.tensors:
        expected = {"head": head, "adapter": factors, "frozen": 0.0}[tensor.role]
        np.testing.assert_allclose(trained[tensor.name], expected, err_msg=tensor.name)


def test_the_rate_is_chosen_on_validation_rows_and_the_others_are_read_once(
    model: Path, classifier: TextClassifier
) -> None:
    plan = tiny_plan(model, aggregation__optimizer="fedavg", phase__0__rounds=1, phase__1__rounds=1)
    read: list[str] = []

    def accuracy(tensors: Tensors, judged: str) -> float:
        """Validation rows like a head of 2 best, and rows that count like larger heads better still."""
        read.append(judged)
        reached = float(tensors["head.weight"][0, 0])
        return 1 - abs(reached - 2.0) / 10 if judged == "validation" else reached

    def update(round_plan: RoundPlan) -> float:
        return round_plan.learning_rate("head") / plan.phase[0].learning_rate if round_plan.phase == 0 else 0.0

    trainer = stub(classifier, update, accuracy=accuracy)
    first = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in classifier.spec.tensors}
    judges = Judges("validation", "test")  # type: ignore[arg-type]
    assert best_of_rates(trainer, plan, (1.0, 2.0, 4.0), first, judges, seeded("x")) == pytest.approx(2.0)
    assert read == ["validation"] * 3 + ["test"]


def test_one_rate_needs_no_validation_rows(model: Path, classifier: TextClassifier) -> None:
    trainer = stub(classifier, lambda round_plan: 0.0, accuracy=lambda tensors, judged: judged)
    first = first_adapter(classifier.spec, 0)
    judges = Judges(None, "test")  # type: ignore[arg-type]
    assert best_of_rates(trainer, tiny_plan(model), (1.0,), first, judges, seeded("x")) == "test"


def test_at_rate_scales_every_learning_rate_and_nothing_else(model: Path) -> None:
    plan = tiny_plan(model, phase__1__head_learning_rate=3.0)
    faster = at_rate(plan, 2.0)
    assert [phase.learning_rate for phase in faster.phase] == [2 * phase.learning_rate for phase in plan.phase]
    assert faster.phase[1].head_learning_rate == 6.0
    assert faster.phase[0].head_learning_rate is None
    assert at_rate(faster, 0.5) == plan


def test_one_place_divides_by_all_rows_and_keeps_the_noise(agreed: AgreedPlan) -> None:
    gathered = in_one_place(agreed, 3)
    assert gathered.plan.privacy == dataclasses.replace(agreed.plan.privacy, divisor=30)
    assert gathered.noise_multipliers == agreed.noise_multipliers
    assert in_one_place(agreed, 1).plan.privacy == agreed.plan.privacy


def test_one_place_draws_the_noise_of_one_step_whatever_the_sites_fields_hold(model: Path) -> None:
    """Three times the divisor would leave too coarse a grid in fields that just hold the plan's own."""
    plan = tiny_agreed(model, phase__0__steps=1, privacy__divisor=2500)
    narrow = dataclasses.replace(plan, noise_multipliers=(0.7, 0.7))
    wider = dataclasses.replace(plan.plan.privacy, divisor=7500)
    assert noise_grid(narrow, 0).drawable
    assert not noise_grid(dataclasses.replace(narrow, plan=dataclasses.replace(plan.plan, privacy=wider)), 0).drawable
    assert noise_grid(in_one_place(narrow, 3), 0).drawable


def test_without_privacy_one_place_changes_nothing(model: Path, classifier: TextClassifier) -> None:
    plain = agree(tiny_plan(model, **without_dp()), classifier)
    assert plain.noise_multipliers == ()
    assert in_one_place(plain, 3) == plain


def test_a_head_alone_spends_the_whole_budget_with_less_noise(
    model: Path, classifier: TextClassifier, agreed: AgreedPlan
) -> None:
    alone = agree(head_only(agreed.plan), classifier)
    assert [phase.train for phase in alone.plan.phase] == ["head"]
    assert alone.plan.phase[0].budget_share == 1.0
    assert alone.noise_multipliers[0] < agreed.noise_multipliers[0]


def test_pooled_rows_keep_the_features_of_their_sites(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    parts = [some_rows(5), some_rows(7, start=5)]
    trainers = [LocalTrainer(classifier, agreed, pairs(part)) for part in parts]
    first = first_adapter(classifier.spec, 0)
    for trainer in trainers:
        classifier.features(first, trainer.rows)
    everything = pooled(trainers, agreed, [row for part in parts for row in part])
    (kept,) = everything.rows.features.values()
    fresh = classifier.features(first, classifier.encode(pairs([row for part in parts for row in part])))
    torch.testing.assert_close(kept, fresh)
    classifier.features(first, everything.rows)
    assert everything.rows.features[next(iter(everything.rows.features))] is kept


@pytest.mark.parametrize("wanted", [("alone",), ("central",), ("alone", "central")])
def test_what_is_compared_is_what_was_asked_for_and_the_same_by_seed(
    classifier: TextClassifier, agreed: AgreedPlan, wanted: tuple[str, ...]
) -> None:
    parts = {"north": some_rows(12), "south": some_rows(12, start=12)}
    judges = Judges(classifier.encode(rows(9)), classifier.encode(rows(30)))
    said: list[str] = []
    once, again = (
        compare(classifier, agreed, parts, judges, seed=1, wanted=wanted, rates=(0.5, 1.0), say=said.append)
        for _ in range(2)
    )
    assert once == again
    assert set(once.alone) == (set(parts) if "alone" in wanted else set())
    assert (once.central is not None) == ("central" in wanted)
    assert len(said) == 2 * (2 * ("alone" in wanted) + ("central" in wanted))
