from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foedus_common.errors import LocalError
from foedus_common.tasks.encoder import encoder_spec, factors, load_encoder, spec_of
from foedus_common.tasks.targets import layer_numbers
from tiny_model import HIDDEN, rewrite_config, tiny_plan, write_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.mark.parametrize("changes", [{}, {"adapter__method": "fedit"}, {"adapter__targets": ["query", "output.dense"]}])
def test_spec_without_weights_is_the_loaded_models(model: Path, changes: dict[str, Any]) -> None:
    plan = tiny_plan(model, **changes)
    encoder = load_encoder(model, plan, CPU)
    spec = encoder_spec(model, plan)
    assert spec_of(encoder, plan) == spec
    assert [t.name for t in spec.tensors[1:]] == list(factors(encoder))
    assert {t.name: t.shape for t in spec.tensors[1:]} == {
        name: tuple(module.weight.shape) for name, module in factors(encoder).items()
    }


def test_spec_is_the_head_then_both_factors_of_each_layer(model: Path) -> None:
    spec = encoder_spec(model, tiny_plan(model, adapter__layers="1", adapter__targets=["value"]))
    layer = "base_model.model.encoder.layer.1.attention.self.value"
    assert [(t.name, t.shape, t.role) for t in spec.tensors] == [
        ("head.weight", (3, HIDDEN + 1), "head"),
        (f"{layer}.lora_A.weight", (2, HIDDEN), "frozen"),
        (f"{layer}.lora_B.weight", (HIDDEN, 2), "adapter"),
    ]


def test_fedit_trains_a_as_well(model: Path) -> None:
    spec = encoder_spec(model, tiny_plan(model, adapter__method="fedit"))
    assert {t.role for t in spec.tensors[1:]} == {"adapter"}


def test_encoder_is_in_evaluation_mode_and_frozen(model: Path) -> None:
    encoder = load_encoder(model, tiny_plan(model), CPU)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_a_folder_does_not_choose_how_attention_is_computed(model: Path) -> None:
    """Some ways leave padding out, so that how long the rows are decides the shapes."""
    rewrite_config(model, attn_implementation="flash_attention_2")
    assert load_encoder(model, tiny_plan(model), CPU).config._attn_implementation == "eager"
    encoder_spec(model, tiny_plan(model))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["query"], ["attention.self.query"]),
        (["self.*"], ["attention.self.query", "attention.self.key", "attention.self.value"]),
        (["attention.*.dense"], ["attention.output.dense"]),
        (["output.dense"], ["attention.output.dense", "output.dense"]),
        (["layer.1.output.dense"], ["output.dense"]),
        (["[qv]*e*", "query"], ["attention.self.query", "attention.self.value"]),
    ],
)
def test_targets_are_ends_of_names_or_patterns_of_them(model: Path, targets: list[str], found: list[str]) -> None:
    spec = encoder_spec(model, tiny_plan(model, adapter__layers="1", adapter__targets=targets))
    start, end = "base_model.model.encoder.layer.1.", ".lora_B.weight"
    names = [t.name.removeprefix(start).removesuffix(end) for t in spec.tensors if t.name.endswith(end)]
    assert names == found


def test_no_pattern_makes_a_site_search_for_ever(model: Path) -> None:
    plan = tiny_plan(model, adapter__targets=["*a" * 60 + "b"])
    began = time.process_time()
    with pytest.raises(LocalError, match="matches no linear layer"):
        encoder_spec(model, plan)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [0, 1, 2, 3]),
        ("1", [1]),
        ("0-2", [0, 1, 2]),
        ("3,0-1", [0, 1, 3]),
        ("last-2", [2, 3]),
        ("0,last-1", [0, 3]),
    ],
)
def test_layers(layers: str, numbers: list[int]) -> None:
    assert layer_numbers(layers, 4) == numbers


NO_LAYERS = ["", "first", "4", "0-4", "2-1", "-1", "1;2", "last", "last-5", "last-0", "all-1"]
BEYOND_MEMORY = ["0-99999999999", "last-99999999999", "0,99999999999"]


@pytest.mark.parametrize("layers", [*NO_LAYERS, *BEYOND_MEMORY])
def test_layers_that_are_not_there_are_refused(layers: str) -> None:
    with pytest.raises(LocalError, match="layers is"):
        layer_numbers(layers, 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter__targets": ["qeury"]}, r"'qeury', .* there are attention\.self\.query, attention\.self\.key"),
        ({"adapter__targets": ["query", "LayerNorm"]}, r"'LayerNorm', which matches no linear layer"),
        ({"adapter__targets": ["pooler.dense"]}, r"'pooler\.dense', which matches no linear layer"),
        ({"adapter__targets": ["word_embeddings"]}, r"matches no linear layer"),
        ({"adapter__targets": ["Query"]}, r"matches no linear layer"),
        ({"adapter__rank": HIDDEN + 1}, f"rank is {HIDDEN + 1}, but .* only {HIDDEN} dimensions"),
        ({"adapter__layers": "2"}, "the layers 0 to 1"),
        ({"task__max_length": 65}, "reads at most 64 tokens"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LocalError, match=said):
        encoder_spec(model, tiny_plan(model, **changes))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "no-such-thing"}, "cannot be used"),
        ({"model_type": "t5", "d_model": 16, "classifier_dropout": 0.0}, "not a text encoder or decoder"),
        ({"hidden_size": 15}, "cannot be used"),
    ],
)
def test_models_of_another_kind_are_refused(model: Path, config: dict[str, Any], said: str) -> None:
    plan = tiny_plan(model)
    rewrite_config(model, **config)
    with pytest.raises(LocalError, match=said):
        encoder_spec(model, plan)


def test_a_folder_that_is_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    plan = tiny_plan(model)
    with pytest.raises(LocalError, match=r"no config\.json"):
        encoder_spec(tmp_path, plan)
    (model / "model.safetensors").unlink()
    with pytest.raises(LocalError, match="cannot be used"):
        load_encoder(model, plan, CPU)


def test_weights_that_are_missing_are_not_made_up(model: Path) -> None:
    plan = tiny_plan(model)
    weights = load_file(model / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LocalError, match=r"lacks weights \(encoder\.layer\.1\.output\.dense\.weight\)"):
        load_encoder(model, plan, CPU)


def test_tied_weights_are_refused_by_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foedus_common.tasks import encoder as module

    build = module.AutoModel.from_config

    def tied(*arguments: Any, **settings: Any) -> Any:
        made = build(*arguments, **settings)
        first, second = made.encoder.layer[0].attention.self, made.encoder.layer[1].attention.self
        second.value.weight = first.value.weight
        return made

    monkeypatch.setattr(module.AutoModel, "from_config", tied)
    with pytest.raises(LocalError, match=r"ties the weights of .*layer\.1\.attention\.self\.value.* and .*layer\.0"):
        encoder_spec(model, tiny_plan(model))
