"""What only a machine with an NVIDIA card can show; `make gpu-check` runs it there and writes the result down."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foedus_common.plan import schedule
from foedus_common.tasks.local_trainer import LocalTrainer, check_spec
from foedus_common.tasks.text_classification import DType, TextClassifier, choose_device, choose_dtype
from privacy_audit.membership import rows_apart
from privacy_audit.specimens import random_adapter
from seeded import seeded
from tiny_families import FAMILIES, Family, write_family
from tiny_model import rows, tiny_agreed, without_dp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no usable GPU")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes (foedus[gpu]) is not installed"
)
slow_kernels = pytest.mark.filterwarnings("ignore:inner dimension .* is not aligned for fast kernel:UserWarning")
SOME = [family for family in FAMILIES if family.name in ("bert", "gpt2", "llama")]
PRIVACY: dict[str, dict[str, Any]] = {"private": {}, "plain": without_dp()}
each_family = pytest.mark.parametrize("family", SOME, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family.name: write_family(family, root / family.name) for family in SOME}


def trained(folder: Path, family: Family, privacy: str, device: str, **settings: Any) -> np.ndarray:
    """The update of an adapter round on that device, with the same randomness every time."""
    agreed = tiny_agreed(folder, **(PRIVACY[privacy] | {"adapter__targets": [family.query]}))
    classifier = TextClassifier.load(folder, agreed.plan, device, **({"dtype": "float32"} | settings))
    assert classifier.device.type == torch.device(device).type
    trainer = LocalTrainer(classifier, agreed, rows(60))
    return trainer.train(random_adapter(classifier, 0), schedule(agreed.plan)[-1], seeded("round"))


@each_family
@pytest.mark.parametrize("privacy", PRIVACY)
def test_a_gpu_trains_what_a_cpu_trains(family: Family, folders: dict[str, Path], privacy: str) -> None:
    on_cpu, on_gpu = (trained(folders[family.name], family, privacy, device) for device in ("cpu", "cuda:0"))
    np.testing.assert_allclose(on_gpu, on_cpu, atol=2e-3)  # a CPU's float32 is 1.2e-3 from its float64 (GPT-2)


@each_family
def test_bfloat16_is_near(family: Family, folders: dict[str, Path]) -> None:
    folder, features = folders[family.name], []
    agreed = tiny_agreed(folder, adapter__targets=[family.query])
    for dtype in ("float32", "bfloat16"):
        classifier = TextClassifier.load(folder, agreed.plan, "cuda:0", dtype)  # type: ignore[arg-type]
        adapter = {t.name: np.zeros(t.shape, np.float32) for t in classifier.spec.tensors}
        features.append(classifier.features(adapter, classifier.encode(rows(60))).cpu())
    assert 0.95 < torch.nn.functional.cosine_similarity(*features).mean() < 1 - 1e-7
    assert np.isfinite(trained(folder, family, "plain", "cuda:0", dtype="bfloat16")).all()


@each_family
@pytest.mark.parametrize("privacy", PRIVACY)
def test_checkpointing_changes_rounding_at_most(family: Family, folders: dict[str, Path], privacy: str) -> None:
    folder = folders[family.name]
    kept, again = (
        trained(folder, family, privacy, "cuda:0", gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    )
    np.testing.assert_allclose(again, kept, atol=1e-5)


@each_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_row_adds_does_not_depend_on_its_batch(family: Family, folders: dict[str, Path], dtype: DType) -> None:
    agreed = tiny_agreed(folders[family.name], adapter__targets=[family.query])
    classifier = TextClassifier.load(folders[family.name], agreed.plan, "cuda:0", dtype)
    assert rows_apart(classifier, agreed, random_adapter(classifier, 0), rows(60)) < 1e-12


@each_family
@needs_bitsandbytes
@slow_kernels
def test_four_bits_train_with_checkpointing_and_keep_the_clip(family: Family, folders: dict[str, Path]) -> None:
    agreed = tiny_agreed(folders[family.name], adapter__targets=[family.query])
    classifier = TextClassifier.load(
        folders[family.name], agreed.plan, "cuda:0", base_weights="4bit", gradient_checkpointing=True
    )
    check_spec(classifier, agreed)
    adapter = random_adapter(classifier, 0)
    sums = LocalTrainer(classifier, agreed, rows(12))._clipped_sum(adapter, schedule(agreed.plan)[2])
    vector = classifier.spec.vector(adapter, "adapter").astype(np.float64)
    apart = [np.linalg.norm(sums(vector, np.array([row]))) for row in range(12)]
    assert 0 < max(apart) <= 1 + 1e-6


def test_a_batch_that_does_not_fit_is_halved(folders: dict[str, Path]) -> None:
    """With little of the card's memory to itself, a process comes to the same features."""
    agreed = tiny_agreed(folders["bert"], **without_dp())
    classifier = TextClassifier.load(folders["bert"], agreed.plan, "cuda:0", "float32", tokens_per_batch=1 << 22)
    many = classifier.encode(rows(60_000))
    adapter = {t.name: np.zeros(t.shape, np.float32) for t in classifier.spec.tensors}
    few = classifier.features(adapter, classifier.encode(rows(40))).cpu()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        features = classifier.features(adapter, many).cpu()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert classifier.batches.tokens < 1 << 22
    torch.testing.assert_close(features[:40], few, atol=1e-5, rtol=0)


def test_auto_is_the_gpu_and_what_it_is_quick_at() -> None:
    place = choose_device("auto")
    assert place.type == "cuda"
    assert choose_dtype("auto", place) in (torch.float32, torch.bfloat16)
