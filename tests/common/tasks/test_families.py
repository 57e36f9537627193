"""Every family of text models: its layers are found by name, its features are transformers' own, and DP-SGD on it sees
each row apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from foedus_common.errors import LocalError
from foedus_common.plan import schedule
from foedus_common.tasks.encoder import encoder_spec
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from tiny_families import DEPTH, FAMILIES, Family, write_family
from tiny_model import HIDDEN, rows, tiny_agreed, tiny_plan

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family.name: write_family(family, root / family.name) for family in FAMILIES}


@each_family
def test_layers_are_found_by_name_by_pattern_and_by_number(family: Family, folders: dict[str, Path]) -> None:
    folder = folders[family.name]

    def factors(targets: list[str], layers: str) -> list[str]:
        spec = encoder_spec(folder, tiny_plan(folder, adapter__targets=targets, adapter__layers=layers))
        return [tensor.name for tensor in spec.tensors if tensor.name.endswith("lora_A.weight")]

    assert len(factors([family.query], "all")) == DEPTH
    assert len(factors([family.query], "last-1")) == 1
    assert set(factors([family.query], "0,last-1")) == set(factors([family.query], "all")) - set(
        factors([family.query], "1")
    )
    assert 0 < len(factors(["*"], "1")) <= family.linear
    with pytest.raises(LocalError, match=rf"'no_such', .* there are .*{family.query}"):
        factors([family.query, "no_such"], "all")


@each_family
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_features_are_transformers_own_one_row_at_a_time(
    family: Family, folders: dict[str, Path], pooling: str
) -> None:
    """Whatever its tokenizer says of padding: a row is tokenised and run alone here, so it is not padded at all."""
    folder = folders[family.name]
    plan = tiny_plan(folder, adapter__targets=[family.query], task__pooling=pooling)
    classifier = TextClassifier.load(folder, plan, dtype="float32")
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer, expected = AutoTokenizer.from_pretrained(folder), []
    for text, _ in rows(9):
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=32, return_tensors="pt")).last_hidden_state[0]
        pooled = hidden.mean(dim=0) if pooling == "mean" else hidden[-1]
        expected.append((pooled / pooled.norm()).numpy())
    untouched = {t.name: np.zeros(t.shape, np.float32) for t in classifier.spec.tensors}
    found = classifier.features(untouched, classifier.encode(rows(9)))[:, :HIDDEN].numpy()
    np.testing.assert_allclose(found, np.array(expected), atol=2e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@each_family
@pytest.mark.parametrize("method", ["ffa-lora", "fedit"])
def test_dp_sees_each_row_apart(family: Family, folders: dict[str, Path], method: str) -> None:
    """A clipped sum over rows is the sum of clipped sums over one row each; the trainer's own checks let it pass."""
    folder = folders[family.name]
    agreed = tiny_agreed(folder, adapter__targets=[family.query], adapter__method=method)
    trainer = LocalTrainer(TextClassifier.load(folder, agreed.plan, dtype="float32"), agreed, rows(12))
    trainer.classifier.encoder.double()
    spec, random = trainer.classifier.spec, np.random.default_rng(0)
    adapter = {t.name: (0.3 * random.normal(size=t.shape)).astype(np.float32) for t in spec.tensors}
    sums = trainer._clipped_sum(adapter, schedule(agreed.plan)[2])
    vector = spec.vector(adapter, "adapter").astype(np.float64)
    apart = [sums(vector, np.array([row])) for row in range(12)]
    np.testing.assert_allclose(sums(vector, np.arange(12)), sum(apart), atol=1e-6)
    assert max(np.linalg.norm(one) for one in apart) <= 1 + 1e-6
    moved = [np.abs(one[spec.tensors[0].size :]).max() > 0 for one in apart]
    assert sum(moved) >= 10  # in a decoder, one token alone asks nothing


def test_roberta_counts_positions_from_behind_its_padding(folders: dict[str, Path]) -> None:
    encoder_spec(folders["roberta"], tiny_plan(folders["roberta"], task__max_length=63))
    with pytest.raises(LocalError, match=r"max_length is 64, but the model reads at most 63 tokens"):
        encoder_spec(folders["roberta"], tiny_plan(folders["roberta"], task__max_length=64))
    encoder_spec(folders["bert"], tiny_plan(folders["bert"], task__max_length=64))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_row_without_any_token_has_features_too(folders: dict[str, Path], pooling: str) -> None:
    folder = folders["gpt2"]
    plan = tiny_plan(folder, adapter__targets=["c_attn"], task__pooling=pooling)
    classifier = TextClassifier.load(folder, plan, dtype="float32")
    encoded = classifier.encode([("", None), ("eye", None)])
    assert [len(tokens) for tokens in encoded.tokens] == [1, 3]
    untouched = {t.name: np.zeros(t.shape, np.float32) for t in classifier.spec.tensors}
    features = classifier.features(untouched, encoded)[:, :HIDDEN]
    torch.testing.assert_close(features.norm(dim=1), torch.ones(2))
