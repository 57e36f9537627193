"""Under DP a model is refused, by the name of the layer, unless it computes each row by itself and uses each trained
layer once, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertModel

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.tasks.local_trainer import check_spec
from foedus_common.tasks.per_example import PerExampleGradients
from foedus_common.tasks.rows_apart import check_layers, check_rows_apart
from foedus_common.tasks.text_classification import TextClassifier
from tiny_families import LLAMA, Family, write_family
from tiny_model import HIDDEN, tiny_agreed, tiny_plan, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(params=["ffa-lora", "fedit"])
def agreed(model: Path, request: pytest.FixtureRequest) -> AgreedPlan:
    return tiny_agreed(model, adapter__method=request.param)


@pytest.fixture
def classifier(model: Path, agreed: AgreedPlan) -> TextClassifier:
    return TextClassifier.load(model, agreed.plan, dtype="float32")


def block(classifier: TextClassifier, number: int) -> Any:
    return classifier.encoder.base_model.model.encoder.layer[number]


def test_a_plain_encoder_passes(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    check_spec(classifier, agreed)


def test_batch_norm_is_refused_by_name(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    block(classifier, 1).output.LayerNorm = nn.BatchNorm1d(HIDDEN).eval()
    with pytest.raises(LocalError, match=r"layer\.1\.output\.LayerNorm is batch norm, which mixes rows"):
        check_spec(classifier, agreed)


class Mixing(nn.Module):
    """Takes a thousandth of the mean over the batch from every row, then does what it stands for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor, *arguments: Any) -> Any:
        return self.inner(hidden - hidden.mean(dim=0, keepdim=True) / 1000, *arguments)


@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_that_mixes_rows_is_refused_by_name(
    classifier: TextClassifier, agreed: AgreedPlan, number: int
) -> None:
    block(classifier, number).intermediate = Mixing(block(classifier, number).intermediate)
    with pytest.raises(LocalError, match=rf"mixes rows in base_model\.model\.encoder\.layer\.{number};"):
        check_spec(classifier, agreed)


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
    ],
)
def test_experts_that_multiply_what_is_sent_to_them_are_refused(
    name: str, experts: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_family(Family(name, LLAMA | experts, "q_proj", 9, decoder=True), tmp_path / "model")
    agreed = tiny_agreed(folder, adapter__targets=["q_proj"])
    with pytest.raises(LocalError, match=r"What rows say decides .* mixture of experts.* cannot be trained under DP"):
        check_spec(TextClassifier.load(folder, agreed.plan, "cpu", "float32"), agreed)


def test_rows_are_kept_apart_where_only_a_head_is_trained(model: Path) -> None:
    agreed = tiny_agreed(model, phase=[tiny_phase()])
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    check_spec(classifier, agreed)
    apart = classifier.pooled_inputs
    classifier.pooled_inputs = lambda ids, mask: apart(ids, mask) - apart(ids, mask).mean(dim=0)  # type: ignore[method-assign]
    with pytest.raises(LocalError, match=r"mixes rows after base_model\.model\.encoder\.layer\.1;"):
        check_spec(classifier, agreed)


def tiny_phase() -> dict[str, Any]:
    return {
        "train": "head",
        "rounds": 1,
        "steps": 1,
        "sampling_rate": 1.0,
        "learning_rate": 1.0,
        "budget_share": 1.0,
    }


def test_layers_that_are_used_again_are_refused(tmp_path: Path) -> None:
    """ALBERT runs one layer many times; its spec is fine, DP on it is not."""
    folder = write_tiny_model(tmp_path / "model")
    config = AlbertConfig(
        vocab_size=25,
        embedding_size=8,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_layers=2,
        num_hidden_groups=1,
        max_position_embeddings=64,
    )
    AlbertModel(config).save_pretrained(folder)
    classifier = TextClassifier.load(folder, tiny_plan(folder, adapter__layers="0"), dtype="float32")
    check_rows_apart(classifier)
    with pytest.raises(LocalError, match=r"query.* more than once \(tied weights\)"):
        check_layers(classifier)


def no_graph(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(forward)


def checkpoint_that_freezes(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The known trap: reentrant checkpointing makes no graph when none of its inputs needs a gradient."""
    return lambda *arguments, **named: checkpoint(lambda *a: forward(*a, **named), *arguments, use_reentrant=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("around", [no_graph, checkpoint_that_freezes])
def test_layers_that_are_frozen_by_mistake_are_refused_by_name(
    classifier: TextClassifier, around: Callable[..., Any]
) -> None:
    block(classifier, 0).forward = around(block(classifier, 0).forward)
    with pytest.raises(LocalError, match=r"No gradient comes to .*layer\.0\.attention\.self\.query"):
        check_layers(classifier)


def test_layers_that_are_never_used_are_refused_by_name(classifier: TextClassifier) -> None:
    attention = block(classifier, 1).attention.self
    attention.query.forward = attention.query.base_layer.forward
    with pytest.raises(LocalError, match=r"layer\.1\.attention\.self\.query.*, which the model never uses"):
        check_layers(classifier)


def test_layers_that_see_something_else_than_rows_are_refused_by_name() -> None:
    flat = nn.Linear(2, 2, bias=False)
    with PerExampleGradients({"flat": flat}), pytest.raises(LocalError, match="flat does not see one row per example"):
        flat(torch.zeros(3, 2))


def test_layers_that_see_the_batch_as_one_row_are_refused_by_name(classifier: TextClassifier) -> None:
    value = block(classifier, 1).attention.self.value
    inner = value.forward
    value.forward = lambda hidden: inner(hidden.reshape(1, -1, HIDDEN)).reshape(hidden.shape)
    with pytest.raises(LocalError, match=r"layer\.1\.attention\.self\.value.* does not see one row per example"):
        check_layers(classifier)
