from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import RunPlan
from foedus_common.tasks.head import CONSTANT, head_as_linear
from foedus_common.tasks.text_classification import (
    TextClassifier,
    choose_device,
    choose_dtype,
)
from tiny_model import HIDDEN, LABELS, rows, tiny_plan, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def plan(model: Path) -> RunPlan:
    return tiny_plan(model)


@pytest.fixture(scope="module")
def classifier(model: Path, plan: RunPlan) -> TextClassifier:
    return TextClassifier.load(model, plan, dtype="float32")


def adapter(classifier: TextClassifier, seed: int = 0, scale: float = 0.3) -> Tensors:
    random = np.random.default_rng(seed)
    return {t.name: (scale * random.normal(size=t.shape)).astype(np.float32) for t in classifier.spec.tensors}


def untouched(classifier: TextClassifier) -> Tensors:
    return {t.name: np.zeros(t.shape, np.float32) for t in classifier.spec.tensors}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_features_are_pooled_unit_vectors_and_a_constant(model: Path, pooling: str) -> None:
    """Against transformers alone, one row at a time, on the model without an adapter."""
    classifier = TextClassifier.load(model, tiny_plan(model, task__pooling=pooling), dtype="float32")
    plain, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    expected = []
    for text, _ in rows(9):
        with torch.no_grad():
            hidden = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        pooled = hidden.mean(dim=0) if pooling == "mean" else hidden[0]
        expected.append(np.append(pooled / pooled.norm(), CONSTANT))
    found = classifier.features(untouched(classifier), classifier.encode(rows(9)))
    np.testing.assert_allclose(found, np.array(expected), atol=1e-6)


def test_a_rows_features_do_not_depend_on_the_other_rows(classifier: TextClassifier) -> None:
    tensors = adapter(classifier)
    together = classifier.features(tensors, classifier.encode(rows(12))).numpy()
    for number, row in enumerate(rows(12)):
        alone = classifier.features(tensors, classifier.encode([row])).numpy()
        np.testing.assert_allclose(together[number], alone[0], atol=1e-6)


def test_padding_is_the_rows_own(classifier: TextClassifier) -> None:
    encoded = classifier.encode([("eye " * words, "Eye") for words in (0, 2, 6, 7, 30, 31, 200)])
    assert encoded.padded.tolist() == [4, 4, 8, 12, 32, 32, 32]  # two special tokens each; cut to max_length


def test_rows_are_cut_below_their_special_tokens(model: Path) -> None:
    classifier = TextClassifier.load(model, tiny_plan(model, task__max_length=1), "cpu", "float32")
    encoded = classifier.encode([("eye", "Eye"), ("", "Eye")])
    assert [len(row) for row in encoded.tokens] == encoded.padded.tolist() == [1, 1]


def test_batches_hold_every_chosen_row_once(classifier: TextClassifier) -> None:
    encoded = classifier.encode(rows(30))
    chosen = np.arange(0, 30, 2)
    batches = list(encoded.batches(chosen, lambda length: max(1, 24 // length)))
    assert sorted(np.concatenate(batches)) == chosen.tolist()
    for batch in batches:
        ids, mask = encoded.inputs(batch)
        assert ids.shape == mask.shape
        assert ids.numel() <= 24
        assert mask.sum(dim=1).tolist() == [len(encoded.tokens[row]) for row in batch]
    assert list(encoded.batches(chosen[:0], lambda length: 1)) == []


def test_labels_are_indices_and_unknown_ones_are_not_quoted(classifier: TextClassifier) -> None:
    assert classifier.encode([("eye", "Skin"), ("ear", None)]).labels.tolist() == [LABELS.index("Skin"), -1]
    with pytest.raises(LocalError, match="Row 2 of the data has a label") as caught:
        classifier.encode([("eye", "Eye"), ("ear", "a patient's name")])
    assert "patient" not in str(caught.value)


def test_the_adapter_decides_the_features(classifier: TextClassifier) -> None:
    encoded = classifier.encode(rows())
    first = classifier.features(adapter(classifier, 0), encoded)
    other = classifier.features(adapter(classifier, 1), encoded)
    assert (first - other).abs().max() > 0.01
    assert torch.equal(classifier.features(adapter(classifier, 0), encoded), first)


def test_features_are_kept_while_only_the_head_changes(classifier: TextClassifier) -> None:
    encoded, seen = classifier.encode(rows()), []
    tensors = dict(adapter(classifier))
    classifier.features(tensors, encoded, lambda *done: seen.append(done))
    assert seen[-1] == ("features", 12, 12)
    seen.clear()
    tensors["head.weight"] = tensors["head.weight"] + 1
    classifier.features(tensors, encoded, lambda *done: seen.append(done))
    assert seen == []


def test_predictions_are_the_heads_on_the_features(classifier: TextClassifier) -> None:
    tensors, encoded = adapter(classifier), classifier.encode(rows())
    weight, bias = head_as_linear(tensors)
    unit = classifier.features(tensors, encoded).numpy()[:, :HIDDEN]
    expected = (unit @ weight.T + bias).argmax(axis=1)
    assert classifier.predict(tensors, encoded).tolist() == expected.tolist()
    assert classifier.accuracy(tensors, encoded) == pytest.approx((expected == encoded.labels).mean())


def test_bfloat16_is_near_float32(model: Path, plan: RunPlan, classifier: TextClassifier) -> None:
    rounded = TextClassifier.load(model, plan, dtype="bfloat16")
    tensors = adapter(classifier)
    exact = classifier.features(tensors, classifier.encode(rows()))
    near = rounded.features(tensors, rounded.encode(rows()))
    assert near.dtype == torch.float32
    assert 0 < (exact - near).abs().max() < 0.05


def test_devices_and_dtypes() -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_dtype("float32", cpu) == torch.float32
    assert choose_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(LocalError, match="not known"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(LocalError, match="no usable GPU"):
            choose_device("cuda:0")


def test_a_gpu_that_is_one_too_far_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(LocalError, match=r"'cuda:2' was asked for, but .* cuda:0 to cuda:1"):
        choose_device("cuda:2")


def test_a_token_that_the_model_does_not_have_is_no_reason_to_stumble(tmp_path: Path) -> None:
    """A tokenizer may have one that was added later. A site whose rows hold it must train like any other."""
    folder = write_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["diabetes"])
    tokenizer.save_pretrained(folder)
    classifier = TextClassifier.load(folder, tiny_plan(folder), dtype="float32")
    with_it, without = classifier.encode([("eye diabetes", "Eye"), ("eye [PAD]", "Eye")]).tokens
    assert with_it.tolist() == without.tolist()
    adapter = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in classifier.spec.tensors}
    assert classifier.features(adapter, classifier.encode([("eye diabetes", "Eye")])).isfinite().all()
