from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from foedus_common.canonical import canonical_json, digest
from foedus_common.errors import LocalError
from foedus_common.model_folder import manifest, manifest_sha256, verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    (model / "1_Pooling").mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "bert"}')
    (model / "1_Pooling" / "config.json").write_text("{}")
    (model / "vocab.txt").write_text("a\nb\n")
    (model / "model.safetensors").write_bytes(save({"w": np.zeros(3, np.float32)}))
    (model / "README.md").write_text("words")
    (model / ".gitattributes").write_text("")
    return model


def test_manifest_lists_what_is_loaded_and_nothing_else(folder: Path) -> None:
    found = manifest(folder)
    assert [file.path for file in found] == ["1_Pooling/config.json", "config.json", "model.safetensors", "vocab.txt"]
    assert found[-1].size == 4
    assert found[-1].sha256 == hashlib.sha256(b"a\nb\n").hexdigest()


def test_hash_is_of_paths_sizes_and_contents(folder: Path) -> None:
    entries = [[file.path, file.size, file.sha256] for file in manifest(folder)]
    before = manifest_sha256(folder)
    assert before == digest("model-manifest", canonical_json(entries)).hex()
    (folder / "README.md").write_text("other words")
    assert manifest_sha256(folder) == before
    (folder / "vocab.txt").rename(folder / "merges.txt")
    renamed = manifest_sha256(folder)
    (folder / "merges.txt").write_text("a\nc\n")
    assert len({before, renamed, manifest_sha256(folder)}) == 3


def test_verify_names_both_hashes(folder: Path) -> None:
    verify(folder, manifest_sha256(folder))
    with pytest.raises(LocalError, match=f"{manifest_sha256(folder)[:12]}.*ffffffffffff"):
        verify(folder, "f" * 64)


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "weights.pkl", "modeling_custom.py", "model.onnx", "tokenizer.model", "plain"],
)
def test_files_that_could_carry_code_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / "1_Pooling" / name).write_bytes(b"")
    with pytest.raises(LocalError, match=name):
        manifest(folder)


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("secret")
    link = folder / "merges.txt"
    link.symlink_to(tmp_path / "outside.txt")
    with pytest.raises(LocalError, match=r"merges\.txt"):
        manifest(folder)
    link.unlink()
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(LocalError, match="more"):
        manifest(folder)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", json.dumps({"auto_map": {"AutoModel": "modeling.Custom"}}), "auto_map"),
        ("tokenizer_config.json", json.dumps({"auto_map": {}}), "auto_map"),
        ("config.json", json.dumps({"transformers_weights": "../other.safetensors"}), "another file"),
        ("config.json", json.dumps({"quantization_config": {"load_in_8bit": True}}), "may mix rows"),
        ("config.json", json.dumps({"attn_implementation": "someone/kernel"}), "attn_implementation"),
        ("adapter_config.json", "{}", "that is an adapter"),
        ("tokenizer.json", "{", "not valid JSON"),
    ],
)
def test_json_that_asks_for_code_or_another_model_is_refused(folder: Path, name: str, content: str, said: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(LocalError, match=said):
        manifest(folder)


@pytest.mark.parametrize(("absent", "said"), [("config.json", "config.json"), ("model.safetensors", "safetensors")])
def test_a_folder_without_what_makes_it_a_model_is_refused(folder: Path, absent: str, said: str) -> None:
    (folder / absent).unlink()
    with pytest.raises(LocalError, match=said):
        manifest(folder)


def test_a_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="not a folder"):
        manifest(tmp_path / "absent")
