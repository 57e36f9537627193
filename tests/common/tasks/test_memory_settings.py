"""What a site sets to fit its memory changes time and rounding: no row is lost or counts twice, or exceeds the clip."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foedus_common.errors import LocalError
from foedus_common.plan import schedule
from foedus_common.tasks.encoder import recompute_blocks, spec_of
from foedus_common.tasks.local_trainer import LocalTrainer, check_spec
from foedus_common.tasks.physical_batches import MOST_ROWS, ON_CPU, PhysicalBatches
from foedus_common.tasks.private_training import AdapterGradients
from foedus_common.tasks.rows import EncodedRows, padded_lengths
from foedus_common.tasks.rows_apart import Shapes
from foedus_common.tasks.text_classification import DType, TextClassifier
from privacy_audit.specimens import random_adapter
from seeded import seeded
from tiny_families import FAMILIES, Family, write_family
from tiny_model import rows, tiny_agreed, without_dp, write_tiny_model

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (foedus[gpu]) is not installed"
)
SOME = [family for family in FAMILIES if family.name in ("bert", "gpt2", "modernbert", "llama")]
PRIVACY: dict[str, dict[str, Any]] = {"private": {}, "plain": without_dp()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family.name: write_family(family, root / family.name) for family in SOME}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def trained(folder: Path, privacy: str, changes: dict[str, Any] | None = None, **settings: Any) -> np.ndarray:
    """The update of an adapter round, with the same randomness every time."""
    agreed = tiny_agreed(folder, **(PRIVACY[privacy] | (changes or {})))
    classifier = TextClassifier.load(folder, agreed.plan, **({"dtype": "float32"} | settings))
    trainer = LocalTrainer(classifier, agreed, rows(30))
    return trainer.train(random_adapter(classifier, 0), schedule(agreed.plan)[-1], seeded("round"))


# --- Gradient checkpointing ---


@pytest.mark.parametrize("family", SOME, ids=lambda family: family.name)
@pytest.mark.parametrize("method", ["ffa-lora", "fedit"])
@pytest.mark.parametrize("privacy", PRIVACY)
def test_gradient_checkpointing_changes_no_number(
    family: Family, folders: dict[str, Path], method: str, privacy: str
) -> None:
    changes = {"adapter__targets": [family.query], "adapter__method": method}
    kept = trained(folders[family.name], privacy, changes)
    again = trained(folders[family.name], privacy, changes, gradient_checkpointing=True)
    assert np.array_equal(kept, again)


def kept_bytes(classifier: TextClassifier) -> int:
    """What autograd keeps of one forward pass through the encoder, but for its weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in classifier.encoder.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.full((8, 32), 5)
    for module in classifier.factors.values():
        module.weight.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = classifier.pooled_inputs(ids, torch.ones_like(ids))
    assert features.requires_grad
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less(folders: dict[str, Path]) -> None:
    plan = tiny_agreed(folders["bert"], adapter__targets=["query"]).plan
    everything, little = (
        kept_bytes(TextClassifier.load(folders["bert"], plan, dtype="float32", gradient_checkpointing=on))
        for on in (False, True)
    )
    assert little < everything / 4


# --- Physical batches ---


class SmallDevice:
    """Runs out of memory as a GPU does whenever more than so many tokens come at once."""

    def __init__(self, classifier: TextClassifier, tokens: int) -> None:
        self.pooled, self.tokens, self.failed = classifier.pooled, tokens, 0

    def __call__(self, rows: EncodedRows, batch: np.ndarray) -> torch.Tensor:
        features = self.pooled(rows, batch)
        if len(batch) * int(rows.padded[batch[0]]) > self.tokens:  # after hooks have run, as in life
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features


@pytest.mark.parametrize("privacy", PRIVACY)
def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost_or_counted_twice(
    model: Path, privacy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(model, privacy)
    devices: list[tuple[TextClassifier, SmallDevice]] = []
    load = TextClassifier.load

    def small(*arguments: Any, **settings: Any) -> TextClassifier:
        classifier = load(*arguments, **settings)
        devices.append((classifier, SmallDevice(classifier, 20)))
        monkeypatch.setattr(classifier, "pooled", devices[0][1])
        return classifier

    monkeypatch.setattr(TextClassifier, "load", small)
    np.testing.assert_allclose(trained(model, privacy), whole, atol=1e-5)
    ((classifier, device),) = devices
    assert 1 <= device.failed <= 4  # it learns: a batch that did not fit is not tried again and again
    assert classifier.batches.tokens <= 20


def test_each_row_comes_once_whatever_fits(model: Path) -> None:
    plan = tiny_agreed(model).plan
    encoded = TextClassifier.load(model, plan, dtype="float32").encode(rows(60))

    def compute(batch: np.ndarray) -> list[int]:
        if len(batch) * int(encoded.padded[batch[0]]) > 13:
            raise torch.OutOfMemoryError
        return batch.tolist()

    batches = PhysicalBatches(100)
    chosen = np.arange(59, 0, -2)
    found = [(batch.tolist(), result) for batch, result in batches.each(encoded, chosen, compute)]
    assert all(batch == result for batch, result in found)
    assert sorted(row for _, result in found for row in result) == sorted(chosen.tolist())
    assert 13 // 2 < batches.tokens < 2 * 13


def test_a_row_that_does_not_fit_by_itself_is_an_error(model: Path) -> None:
    plan = tiny_agreed(model).plan
    encoded = TextClassifier.load(model, plan, dtype="float32").encode(rows(9))

    def compute(batch: np.ndarray) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        list(PhysicalBatches(100).each(encoded, np.arange(9), compute))


def test_the_device_or_the_site_says_how_many_tokens(model: Path) -> None:
    plan = tiny_agreed(model).plan
    assert TextClassifier.load(model, plan, "cpu").batches.tokens == ON_CPU
    assert TextClassifier.load(model, plan, "cpu", tokens_per_batch=64).batches.tokens == 64


# --- One shape, as on GPUs ---


def in_one_shape(folder: Path, tokens: int, dtype: DType = "float32", **changes: Any) -> TextClassifier:
    classifier = TextClassifier.load(folder, tiny_agreed(folder, **changes).plan, "cpu", dtype)
    classifier.batches = PhysicalBatches(tokens, one_shape=True)
    return classifier


@pytest.mark.parametrize("phase", [0, -1], ids=["head", "adapter"])
def test_every_batch_of_a_length_has_the_same_shape(model: Path, phase: int) -> None:
    agreed, classifier = tiny_agreed(model), in_one_shape(model, 64)
    trainer = LocalTrainer(classifier, agreed, rows(60))
    seen: set[tuple[int, ...]] = set()
    embeddings = classifier.encoder.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: seen.add(tuple(inputs[0].shape)))
    trainer.train(random_adapter(classifier, 0), schedule(agreed.plan)[phase], seeded("round"))
    assert seen == {(64 // length + 1, length) for length in set(trainer.rows.padded)}
    assert classifier.batches.rows(8) == 8
    assert PhysicalBatches(1 << 20, one_shape=True).rows(8) == MOST_ROWS


@pytest.mark.parametrize("family", SOME, ids=lambda family: family.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_operation_can_tell_how_many_rows_are_not_companions_or_what_they_say(
    family: Family, folders: dict[str, Path], dtype: DType, checkpointing: bool
) -> None:
    """From token ids to each row's gradients, forth and back: shapes choose kernels, and the order of sums."""
    agreed = tiny_agreed(folders[family.name], adapter__targets=[family.query])
    classifier = in_one_shape(folders[family.name], 64, dtype, adapter__targets=[family.query])
    classifier.encoder.base_model.model.set_attn_implementation("sdpa")  # as on GPUs
    if checkpointing:
        recompute_blocks(classifier.encoder)
    round_plan, adapter = schedule(agreed.plan)[-1], random_adapter(classifier, 0)
    encoded = classifier.encode([("eye", "Eye")] * 7 + [("!" * 40, "Eye")])
    encoded.tokens[-1], encoded.padded[-1] = encoded.tokens[-1][:8], 8  # full: it has no padding
    gradients = AdapterGradients(classifier, adapter, encoded, 1.0, round_plan)
    head = torch.from_numpy(adapter["head.weight"].astype(np.float64))
    found = []
    for chosen in ([0], [7], range(5), range(8)):
        with Shapes() as shapes:
            gradients._of_each(np.array(chosen), head)
        found.append(shapes.seen)
    assert len(found[0]) > 100
    assert all(each == found[0] for each in found)


def test_rows_that_fill_a_batch_up_change_nothing(model: Path) -> None:
    agreed, updates = tiny_agreed(model), []
    for classifier in (TextClassifier.load(model, agreed.plan, "cpu", "float32"), in_one_shape(model, 256)):
        trainer = LocalTrainer(classifier, agreed, rows(60))
        updates.append(trainer.train(random_adapter(classifier, 0), schedule(agreed.plan)[-1], seeded("round")))
    np.testing.assert_allclose(updates[1], updates[0], atol=1e-4)


@pytest.mark.parametrize("head_alone", [False, True])
def test_rows_that_are_nobody_s_find_out_what_fits(
    model: Path, head_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, agreed = in_one_shape(model, 256), tiny_agreed(model)
    if head_alone:
        plan = replace(agreed.plan, phase=(replace(agreed.plan.phase[0], budget_share=1.0),))
        agreed = replace(agreed, plan=plan, trained=agreed.trained[:1])
    pooled = classifier.pooled

    def on_a_small_device(rows: EncodedRows, batch: np.ndarray) -> torch.Tensor:
        if classifier.batches.tokens > 64:
            raise torch.OutOfMemoryError
        return pooled(rows, batch)

    monkeypatch.setattr(classifier, "pooled", on_a_small_device)
    LocalTrainer(classifier, agreed, [])
    assert classifier.batches.tokens == 64


def test_what_a_phase_of_the_head_kept_is_gone_in_one_of_the_adapter(model: Path) -> None:
    """How many rows a site has would else decide what is left of the device, and so the shapes."""
    agreed, classifier = tiny_agreed(model), in_one_shape(model, 256)
    trainer, kept = LocalTrainer(classifier, agreed, rows(20)), []
    for round_plan in (schedule(agreed.plan)[0], schedule(agreed.plan)[-1]):
        trainer.train(random_adapter(classifier, 0), round_plan, seeded("round"))
        kept.append(len(trainer.rows.features))
    assert kept == [1, 0]


@pytest.mark.parametrize("few", [False, True])
def test_a_row_is_padded_to_a_length_that_its_own_decides(few: bool) -> None:
    lengths = np.arange(1, 200)
    padded = padded_lengths(lengths, 150, few)
    assert (padded >= np.minimum(lengths, 150)).all()
    assert sorted(set(padded)) == ([8, 16, 32, 64, 128, 150] if few else [*range(4, 150, 4), 150])


# --- How the base is held ---


@pytest.mark.parametrize("privacy", PRIVACY)
def test_a_base_in_bfloat16_trains_nearly_the_same_in_half_the_memory(model: Path, privacy: str) -> None:
    full, half = trained(model, privacy), trained(model, privacy, base_weights="bfloat16", dtype="auto")
    difference = np.linalg.norm(full - half) / np.linalg.norm(full)
    assert 0 < difference < 0.25
    agreed = tiny_agreed(model)
    classifier = TextClassifier.load(model, agreed.plan, base_weights="bfloat16")
    base = {p.dtype for name, p in classifier.encoder.named_parameters() if "lora_" not in name}
    assert base == {torch.bfloat16}
    assert {module.weight.dtype for module in classifier.factors.values()} == {torch.float32}


@needs_bitsandbytes
@pytest.mark.parametrize("family", SOME, ids=lambda family: family.name)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_base_in_four_bits_is_the_same_adapter_and_keeps_the_clip(
    family: Family, folders: dict[str, Path], checkpointing: bool
) -> None:
    folder = folders[family.name]
    agreed = tiny_agreed(folder, adapter__targets=[family.query])
    classifier = TextClassifier.load(
        folder, agreed.plan, "cpu", "float32", base_weights="4bit", gradient_checkpointing=checkpointing
    )
    assert any(type(module).__name__ == "Linear4bit" for module in classifier.encoder.modules())
    assert spec_of(classifier.encoder, agreed.plan).digest().hex() == agreed.spec_sha256
    check_spec(classifier, agreed)
    adapter = random_adapter(classifier, 0)
    classifier.features(adapter, classifier.encode(rows(3)))  # without a graph; training must still get its gradients
    sums = LocalTrainer(classifier, agreed, rows(12))._clipped_sum(adapter, schedule(agreed.plan)[2])
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64)
    apart = [sums(vector, np.array([row])) for row in range(12)]
    assert max(np.linalg.norm(one) for one in apart) <= 1 + 1e-6
    np.testing.assert_allclose(sums(vector, np.arange(12)), sum(apart), atol=1e-4)


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned for fast kernel:UserWarning")
def test_a_base_in_four_bits_learns(model: Path) -> None:
    update = trained(model, "plain", base_weights="4bit")
    assert np.isfinite(update).all()
    assert np.abs(update).max() > 1e-3


def test_four_bits_without_bitsandbytes_is_a_sentence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(LocalError, match=r'base_weights = "4bit" needs bitsandbytes.* "foedus\[gpu\]"'):
        TextClassifier.load(model, tiny_agreed(model).plan, "cpu", base_weights="4bit")
