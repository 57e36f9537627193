from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from foedus_common.adapters import load_adapter, parse_spec
from foedus_common.canonical import enc, sha256_hex
from foedus_common.model_folder import manifest_sha256
from foedus_server.commands import prepare_in_child
from foedus_server.prepare import FIRST_ADAPTER_FILE, SPEC_FILE, main, orthonormal_rows, prepare
from tiny_model import HIDDEN, tiny_plan, write_tiny_model

PLAN = """
run = {{ name = "small", purpose = "A test." }}
model = {{ name = "tiny", sha256 = "{sha256}" }}
data = {{ name = "rows" }}
task = {{ kind = "text-classification", labels = ["Eye", "Ear", "Skin"], max_length = 32 }}
adapter = {{ {adapter} }}
privacy = {{ unit = "none" }}
[[phase]]
train = "head"
rounds = 1
learning_rate = 1.0
epochs = 1
batch_size = 8
[[phase]]
train = "adapter"
rounds = 1
learning_rate = 1.0
epochs = 1
batch_size = 8
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def write_plan(model: Path, adapter: str = "rank = 2, seed = 5") -> Path:
    path = model.parent / "plan.toml"
    path.write_text(PLAN.format(sha256=manifest_sha256(model), adapter=adapter))
    return path


def test_writes_spec_and_first_adapter_and_prints_their_hashes(model: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main([str(model), str(write_plan(model)), str(out)]) == 0
    said = json.loads(capsys.readouterr().out)
    spec = parse_spec((out / SPEC_FILE).read_bytes())
    first = (out / FIRST_ADAPTER_FILE).read_bytes()
    assert said["spec_sha256"] == spec.digest().hex()
    assert said["first_adapter_sha256"] == sha256_hex(first)
    head, factors = 3 * (HIDDEN + 1), 4 * 2 * HIDDEN
    assert said["trained"] == [[["head", head]], [["head", head], ["adapter", factors]]]
    assert said["parameters"] == head + factors

    tensors = load_adapter(first, spec)
    for name, value in tensors.items():
        if "lora_A" in name:
            np.testing.assert_allclose(value @ value.T, np.eye(2), atol=1e-6)
            assert np.array_equal(value, orthonormal_rows(5, name, *value.shape))
        else:
            assert not value.any()


def test_the_spec_is_the_one_that_sites_find(model: Path, tmp_path: Path) -> None:
    from foedus_common.tasks.text_classification import TextClassifier

    out = tmp_path / "out"
    assert main([str(model), str(write_plan(model)), str(out)]) == 0
    loaded = TextClassifier.load(model, tiny_plan(model), dtype="float32")
    assert parse_spec((out / SPEC_FILE).read_bytes()) == loaded.spec


def test_frozen_factors_are_pinned_and_follow_the_derivation() -> None:
    """Against the docstring's words in plain Python: Gram-Schmidt is the QR whose R has a positive diagonal."""
    key = hashlib.sha256(b"foedus/v1/" + enc("lora-A", 0, "x.lora_A.weight")).digest()
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(48))
    words = [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(6)]
    gaussian = [NormalDist().inv_cdf(((word >> 11) + 0.5) / 2**53) for word in words]
    columns = [gaussian[0::2], gaussian[1::2]]
    first = [x / math.hypot(*columns[0]) for x in columns[0]]
    along = sum(x * y for x, y in zip(columns[1], first, strict=True))
    rest = [x - along * y for x, y in zip(columns[1], first, strict=True)]
    second = [x / math.hypot(*rest) for x in rest]

    found = orthonormal_rows(0, "x.lora_A.weight", 2, 3)
    np.testing.assert_allclose(found, [first, second], atol=1e-6)
    pinned = [[0.618361, -0.695598, -0.365749], [-0.116989, 0.378733, -0.918082]]
    np.testing.assert_allclose(found, pinned, atol=1e-6)


def test_seed_and_name_both_matter() -> None:
    one = orthonormal_rows(0, "x", 2, 8)
    assert not np.allclose(one, orthonormal_rows(1, "x", 2, 8))
    assert not np.allclose(one, orthonormal_rows(0, "y", 2, 8))
    square = orthonormal_rows(0, "x", 8, 8).astype(np.float64)
    np.testing.assert_allclose(square @ square.T, np.eye(8), atol=1e-6)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ('targets = ["qeury"]', "[adapter] targets has 'qeury', which matches no linear layer"),
        ("rank = 17", "[adapter] rank is 17"),
        ('layers = "9"', "the layers 0 to 1"),
        ("rnak = 2", "did you mean 'rank'?"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_sentence_and_exit_code_2(
    model: Path, tmp_path: Path, capsys: Any, adapter: str, said: str
) -> None:
    assert main([str(model), str(write_plan(model, adapter)), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none_is_said_in_one_sentence(model: Path, tmp_path: Path, capsys: Any) -> None:
    plan = write_plan(model)
    (model / "config.json").unlink()
    assert main([str(model), str(plan), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"{model} is not a model folder: it has no config.json.\n")


def test_a_process_of_its_own_makes_the_same(model: Path, tmp_path: Path) -> None:
    """And that it says what cannot be is in test_bad_input.py."""
    plan, here, there = write_plan(model), tmp_path / "here", tmp_path / "there"
    assert prepare_in_child(model, plan, there) == prepare(model, plan, here)
    for name in (SPEC_FILE, FIRST_ADAPTER_FILE):
        assert (there / name).read_bytes() == (here / name).read_bytes()


def test_wrong_arguments_are_told_the_usage(capsys: Any) -> None:
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().err
