"""DP-SGD against slow references: autograd one row at a time, and the formula of a step with the same noise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import LEAST, MOST, AgreedPlan, RoundPlan, schedule
from foedus_common.privacy.noise import fine_grid, noised_sum
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.encoder import HEAD
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.private_training import (
    AdapterGradients,
    HeadGradients,
    clip_factors,
    poisson_sample,
    private_update,
)
from foedus_common.tasks.rows import EncodedRows
from foedus_common.tasks.text_classification import TextClassifier, no_progress
from foedus_common.terms import field_layout
from privacy_audit.reference import ReferenceSum
from tiny_model import HIDDEN, LABELS, rows, tiny_agreed, write_tiny_model

WIDTH = HIDDEN + 1


def seeded(seed: int) -> RandomBytes:
    stream = Cipher(algorithms.AES256(seed.to_bytes(32, "big")), modes.CTR(bytes(16))).encryptor()
    return lambda size: stream.update(bytes(size))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def agreed(model: Path) -> AgreedPlan:
    return tiny_agreed(model, phase__1__head_scale=0.5, phase__1__head_learning_rate=2.0)


@pytest.fixture(scope="module")
def head_round(agreed: AgreedPlan) -> RoundPlan:
    return schedule(agreed.plan)[0]


@pytest.fixture(scope="module")
def adapter_round(agreed: AgreedPlan) -> RoundPlan:
    return schedule(agreed.plan)[2]


@pytest.fixture
def classifier(model: Path, agreed: AgreedPlan) -> TextClassifier:
    return TextClassifier.load(model, agreed.plan, dtype="float32")


def an_adapter(classifier: TextClassifier, seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    return {t.name: (0.3 * random.normal(size=t.shape)).astype(np.float32) for t in classifier.spec.tensors}


# Sums of clipped gradients


def looped_head_sum(features: torch.Tensor, labels: np.ndarray, vector: np.ndarray, clip: float) -> np.ndarray:
    total = np.zeros_like(vector)
    for row, label in zip(features, labels, strict=True):
        head = torch.tensor(vector.reshape(-1, len(row)), requires_grad=True)
        torch.nn.functional.cross_entropy(head @ row, torch.tensor(label)).backward()
        gradient = head.grad.numpy().ravel()
        total += gradient * min(1.0, clip / np.linalg.norm(gradient))
    return total


@pytest.mark.parametrize("clip", [100.0, 0.7, 0.01])
def test_head_sum_is_that_of_autograd_row_by_row(clip: float) -> None:
    random = np.random.default_rng(0)
    features = torch.tensor(random.normal(size=(40, 7)), dtype=torch.float32)
    labels, vector = random.integers(0, 3, 40), random.normal(size=21)
    chosen = np.array([0, 3, 5, 8, 39])
    expected = looped_head_sum(features.double()[chosen], labels[chosen], vector, clip)
    found = HeadGradients(features, labels, clip)(vector, chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [LEAST, MOST])
def test_no_row_however_sure_the_model_is_of_it_exceeds_the_least_clip_of_any_plan(clip: float) -> None:
    """Whoever chooses the head chooses how small a row's gradient is. A squared norm that underflowed to zero would let
    a gradient through that is any number of times the clip: at a clip of 1e-250 one of 1e54 times it."""
    features = torch.tensor([[1.0, 0.3]])
    for gap in np.linspace(0, 740, 400):  # down to the least number of float64, e^-740
        head = np.array([0.0, 0.0, gap, 0.0])
        found = HeadGradients(features, np.array([1]), clip)(head, np.array([0]))
        assert np.linalg.norm(found / clip) <= 1 + 1e-12


@pytest.mark.parametrize("method", ["ffa-lora", "fedit"])
@pytest.mark.parametrize("clip", [100.0, 0.5])
@pytest.mark.parametrize(("double", "tolerance"), [(True, 1e-12), (False, 1e-6)])
def test_adapter_sum_is_that_of_autograd_row_by_row(
    model: Path, method: str, clip: float, double: bool, tolerance: float
) -> None:
    agreed = tiny_agreed(model, adapter__method=method, phase__1__head_scale=0.5)
    plan = schedule(agreed.plan)[2]
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    if double:
        classifier.encoder.double()
    adapter, encoded = an_adapter(classifier), classifier.encode(rows(20))
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64) + 0.01
    expected = ReferenceSum(classifier, adapter, encoded, clip, plan)(vector, np.arange(20))
    found = AdapterGradients(classifier, adapter, encoded, clip, plan)(vector, np.arange(20))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_physical_batches_do_not_change_the_sum(classifier: TextClassifier, adapter_round: RoundPlan) -> None:
    classifier.encoder.double()
    adapter, encoded = an_adapter(classifier), classifier.encode(rows(30))
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64)
    gradients = AdapterGradients(classifier, adapter, encoded, 1.0, adapter_round)
    whole = gradients(vector, np.arange(30))
    classifier.batches.tokens = 8  # one row at a time
    np.testing.assert_allclose(gradients(vector, np.arange(30)), whole, atol=1e-12)
    np.testing.assert_allclose(gradients(vector, np.arange(30)[::-1]), whole, atol=1e-12)


def test_dropout_is_off(classifier: TextClassifier, adapter_round: RoundPlan) -> None:
    adapter, encoded = an_adapter(classifier), classifier.encode(rows())
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64)
    gradients = AdapterGradients(classifier, adapter, encoded, 1.0, adapter_round)
    assert np.array_equal(gradients(vector, np.arange(12)), gradients(vector, np.arange(12)))


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(1e-6, 1e6))
def test_no_row_moves_a_sum_by_more_than_the_clip(seed: int, clip: float, size: float) -> None:
    random = np.random.default_rng(seed)
    features = torch.tensor(size * random.normal(size=(6, 4)), dtype=torch.float32)
    gradients = HeadGradients(features, random.integers(0, 3, 6), clip)
    vector = random.normal(size=12)
    difference = gradients(vector, np.arange(6)) - gradients(vector, np.arange(5))
    assert np.linalg.norm(difference) <= clip * (1 + 1e-9)


def test_clip_factors_at_the_edges() -> None:
    squared = torch.tensor([0.0, 0.25, 4.0, float("inf"), float("nan")], dtype=torch.float64)
    assert clip_factors(squared, 1.0).tolist() == [1.0, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_a_head_gradient_that_is_not_finite_counts_as_zero(bad: float) -> None:
    random = np.random.default_rng(1)
    features = torch.tensor(random.normal(size=(5, 4)), dtype=torch.float32)
    labels, vector = random.integers(0, 3, 5), random.normal(size=12)
    good = HeadGradients(features, labels, 1.0)(vector, np.array([0, 1, 3, 4]))
    features[2, 1] = bad
    found = HeadGradients(features, labels, 1.0)(vector, np.arange(5))
    assert np.linalg.norm(found - good) <= (1 + 1e-9 if bad == 1e38 else 0)
    assert np.isfinite(found).all()


def test_an_adapter_gradient_that_is_not_finite_counts_as_zero(
    classifier: TextClassifier, adapter_round: RoundPlan
) -> None:
    classifier.encoder.double()
    with torch.no_grad():  # the word "poison" makes everything in its row nan
        words = classifier.encoder.get_input_embeddings().weight
        words[classifier.encode([("poison", None)]).tokens[0][1]] = float("nan")
    clean = [row for row in rows() if "poison" not in row[0]]
    adapter = an_adapter(classifier)
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64)

    def total(data: list[tuple[str, str]]) -> np.ndarray:
        encoded = classifier.encode(data)
        return AdapterGradients(classifier, adapter, encoded, 1.0, adapter_round)(vector, np.arange(len(data)))

    assert np.isfinite(total([*clean, ("eye poison", "Eye")])).all()
    np.testing.assert_allclose(total([*clean, ("eye poison", "Eye")]), total(clean), atol=1e-12)


# Steps


def test_a_step_is_the_plans_formula(agreed: AgreedPlan, adapter_round: RoundPlan) -> None:
    """Two steps by hand, with the same randomness: sample, noise, and each group's own rate and scale."""
    size, head = agreed.size(1), agreed.trained[1][0].length
    gradient = np.linspace(-1, 1, size)

    def clipped_sum(vector: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return gradient * len(chosen) + vector

    start = np.full(size, 0.25)
    found = private_update(start, clipped_sum, 40, agreed, adapter_round, seeded(5), no_progress)

    random, expected = seeded(5), start.copy()
    for _ in range(2):
        chosen = poisson_sample(40, 0.5, random)
        noised = noised_sum(np.clip(clipped_sum(expected, chosen), -10, 10), 1.0, fine_grid(1.0), random)
        expected[:head] -= 2.0 / (0.5 * 10) * noised[:head]
        expected[head:] -= 8.0 / 10 * noised[head:]
    np.testing.assert_allclose(found, expected - start, rtol=1e-12)


def test_a_later_round_has_lower_rates(agreed: AgreedPlan) -> None:
    first, last = schedule(agreed.plan)[2:4]
    size = agreed.size(1)

    def update(plan: RoundPlan) -> np.ndarray:
        return private_update(np.zeros(size), lambda *_: np.zeros(size), 5, agreed, plan, seeded(1), no_progress)

    np.testing.assert_allclose(update(last), update(first) / 2, rtol=1e-12)


def test_an_empty_batch_still_adds_noise_and_counts_a_step(agreed: AgreedPlan, adapter_round: RoundPlan) -> None:
    never = dataclasses.replace(
        adapter_round, settings=dataclasses.replace(adapter_round.settings, sampling_rate=1e-12, steps=3)
    )
    size, batches, reported = agreed.size(1), [], []

    def clipped_sum(vector: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        batches.append(len(chosen))
        return np.zeros(size)

    update = private_update(
        np.zeros(size), clipped_sum, 100, agreed, never, seeded(2), lambda *done: reported.append(done)
    )
    assert batches == [0, 0, 0]
    assert reported == [("steps", 1, 3), ("steps", 2, 3), ("steps", 3, 3)]
    in_head = update[: agreed.trained[1][0].length]
    assert np.std(in_head) == pytest.approx(np.sqrt(3) * 2.0 / (0.5 * 10), rel=0.3)


def test_sums_are_bounded_so_that_the_encodings_range_holds(agreed: AgreedPlan, head_round: RoundPlan) -> None:
    size = agreed.size(0)
    huge = private_update(np.zeros(size), lambda *_: np.full(size, 1e9), 5, agreed, head_round, seeded(3), no_progress)
    assert np.all(np.abs(huge + 24.0 * 2 * 10 / 10) < 24.0 * np.sqrt(2) * 8 / 10)  # 2 steps of 10 clips, and noise


@pytest.mark.parametrize("pull", [-1, 0, 1])
def test_no_adapter_to_start_from_makes_an_update_leave_its_range(model: Path, pull: int) -> None:
    """Where neighbouring float64 numbers lie almost a range apart, end minus start is either nothing or beyond it: a
    site whose rows pull hard enough would decline, and say so, free of charge."""
    agreed = tiny_agreed(model, privacy__divisor=1000)
    head_round = schedule(agreed.plan)[0]
    size, layout = agreed.size(0), field_layout(agreed, head_round)
    total = np.full(size, pull * 1000.0)  # the most that a sum of clipped gradients may be: divisor times clip
    for exponent in range(-10, 3):
        apart = 2.0 ** math.floor(math.log2(layout.segments[0][1])) * 2.0**exponent
        start = np.full(size, apart * 2.0**52)
        update = private_update(start, lambda *_: total, 5, agreed, head_round, seeded(4), no_progress)
        layout.encode(update, seeded(5))  # raises LocalError beyond the range


@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_row_count_changes_neither_steps_nor_shape(
    classifier: TextClassifier, agreed: AgreedPlan, adapter_round: RoundPlan, count: int
) -> None:
    reported: list[Any] = []
    trainer = LocalTrainer(classifier, agreed, rows(count), lambda *done: reported.append(done))
    update = trainer.train(an_adapter(classifier), adapter_round, seeded(4))
    assert update.shape == (agreed.size(1),)
    assert update.dtype == np.float64
    assert [done for what, done, _ in reported if what == "steps"] == [1, 2]


def test_the_adapter_changes_at_every_step(
    classifier: TextClassifier, agreed: AgreedPlan, adapter_round: RoundPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step must see the factors that the step before it made, in the encoder itself."""
    seen: list[torch.Tensor] = []
    pooled = classifier.pooled

    def watched(rows: EncodedRows, batch: np.ndarray) -> torch.Tensor:
        seen.append(torch.cat([m.weight.flatten().clone() for n, m in classifier.factors.items() if "lora_B" in n]))
        return pooled(rows, batch)

    monkeypatch.setattr(classifier, "pooled", watched)
    every_row = dataclasses.replace(
        adapter_round, settings=dataclasses.replace(adapter_round.settings, sampling_rate=1.0, steps=3)
    )
    trainer = LocalTrainer(classifier, agreed, [("eye", "Eye")])
    seen.clear()
    trainer.train(an_adapter(classifier), every_row, seeded(6))
    assert len(seen) == 3
    assert (seen[0] != seen[1]).all()
    assert (seen[1] != seen[2]).all()


# Sampling


def test_rate_one_takes_every_row_and_draws_nothing() -> None:
    assert poisson_sample(5, 1.0, lambda size: pytest.fail("drew randomness")).tolist() == [0, 1, 2, 3, 4]


def test_a_row_is_taken_when_its_draw_is_below_the_rate() -> None:
    draws = [0, 2**62 - 1, 2**62, 2**64 - 1]
    drawn = b"".join(draw.to_bytes(8, "little") for draw in draws)
    assert poisson_sample(4, 0.25, lambda size: drawn[:size]).tolist() == [0, 1]


def test_rows_are_taken_independently_at_the_rate() -> None:
    random = seeded(9)
    taken = np.zeros((4000, 2))
    for trial in taken:
        trial[poisson_sample(2, 0.3, random)] = 1
    both, error = (taken[:, 0] * taken[:, 1]).mean(), 4 * np.sqrt(0.25 / 4000)
    assert np.abs(taken.mean(axis=0) - 0.3).max() < error
    assert abs(both - 0.09) < error


# The whole trainer


def test_training_learns_the_labels(classifier: TextClassifier, model: Path) -> None:
    """Head, then adapter, with little noise, on rows that say their label."""
    changes: dict[str, Any] = {"phase__0__steps": 20, "phase__1__learning_rate": 0.5, "phase__1__sampling_rate": 0.9}
    agreed = dataclasses.replace(tiny_agreed(model, privacy__divisor=60, **changes), noise_multipliers=(0.1, 0.1))
    trainer = LocalTrainer(classifier, agreed, [(label.lower(), label) for label in LABELS] * 20)
    spec, random = classifier.spec, seeded(7)
    adapter: Tensors = {**an_adapter(classifier), HEAD: np.zeros((len(LABELS), WIDTH), np.float32)}
    accuracies = []
    for plan in schedule(agreed.plan):
        update = trainer.train(adapter, plan, random)
        adapter = spec.with_update(adapter, plan.settings.train, update)
        accuracies.append(classifier.accuracy(adapter, trainer.rows))
    assert accuracies[-1] > 0.8


def test_the_same_randomness_gives_the_same_update(
    classifier: TextClassifier, agreed: AgreedPlan, head_round: RoundPlan, adapter_round: RoundPlan
) -> None:
    trainer, adapter = LocalTrainer(classifier, agreed, rows()), an_adapter(classifier)
    for plan in (head_round, adapter_round):
        first = trainer.train(adapter, plan, seeded(8))
        assert np.array_equal(trainer.train(adapter, plan, seeded(8)), first)
        assert not np.array_equal(trainer.train(adapter, plan, seeded(9)), first)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda agreed: dataclasses.replace(agreed, spec_sha256="0" * 64), "does not give the adapter"),
        (lambda agreed: dataclasses.replace(agreed, trained=agreed.trained[::-1]), "layout .* phase 1"),
    ],
)
def test_a_plan_for_another_adapter_is_refused(
    classifier: TextClassifier, agreed: AgreedPlan, change: Callable[[AgreedPlan], AgreedPlan], said: str
) -> None:
    with pytest.raises(LocalError, match=said):
        LocalTrainer(classifier, change(agreed), rows())


def test_no_rows_are_noise_like_any_others(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    trainer, adapter = LocalTrainer(classifier, agreed, []), an_adapter(classifier)
    for plan in (schedule(agreed.plan)[0], schedule(agreed.plan)[2]):
        update = trainer.train(adapter, plan, seeded(6))
        assert update.shape == (agreed.size(plan.phase),)
        assert update.all()
