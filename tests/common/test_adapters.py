from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from foedus_common.adapters import (
    AdapterSpec,
    TensorSpec,
    adapter_bytes,
    load_adapter,
    parse_spec,
    read_adapter,
    save_adapter,
)
from foedus_common.errors import LocalError
from foedus_common.plan import Part

SPEC = AdapterSpec(
    (
        TensorSpec("x.lora_A.weight", (2, 4), "frozen"),
        TensorSpec("x.lora_B.weight", (3, 2), "adapter"),
        TensorSpec("head.weight", (2, 5), "head"),
        TensorSpec("y.lora_B.weight", (1, 2), "adapter"),
    )
)


def tensors(spec: AdapterSpec = SPEC) -> dict[str, np.ndarray]:
    return {t.name: (np.arange(t.size, dtype=np.float32) + k).reshape(t.shape) for k, t in enumerate(spec.tensors)}


def test_canonical_bytes_and_digest_are_pinned() -> None:
    spec = AdapterSpec((TensorSpec("head.weight", (2, 5), "head"),))
    assert spec.canonical() == b'[["head.weight",[2,5],"head"]]'
    parts = b"adapter-spec", spec.canonical()
    encoded = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    assert spec.digest() == hashlib.sha256(b"foedus/v1/" + encoded).digest()


def test_vector_has_head_first_then_factors_in_the_specs_order() -> None:
    assert [t.name for t in SPEC.trained("head")] == ["head.weight"]
    assert [t.name for t in SPEC.trained("adapter")] == ["head.weight", "x.lora_B.weight", "y.lora_B.weight"]
    assert SPEC.parts("head") == (Part("head", 10),)
    assert SPEC.parts("adapter") == (Part("head", 10), Part("adapter", 8))
    assert SPEC.vector(tensors(), "adapter").tolist() == [*range(2, 12), *range(1, 7), 3, 4]


@given(st.lists(st.floats(allow_nan=False, width=32), min_size=18, max_size=18))
def test_with_vector_then_vector_is_the_identity(values: list[float]) -> None:
    before, vector = tensors(), np.array(values, np.float32)
    after = SPEC.with_vector(before, "adapter", vector)
    assert np.array_equal(SPEC.vector(after, "adapter"), vector)
    assert np.array_equal(after["x.lora_A.weight"], before["x.lora_A.weight"])
    assert np.array_equal(before["head.weight"], tensors()["head.weight"])


def test_an_update_is_added_in_float64() -> None:
    start = SPEC.with_vector(tensors(), "head", np.ones(10))
    after = SPEC.with_update(start, "head", np.full(10, 2.0**-24 + 2.0**-50))  # in float32 a tie, rounded to 1
    assert SPEC.vector(after, "head").tolist() == [1 + 2.0**-23] * 10


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        SPEC.with_vector(tensors(), "adapter", np.zeros(17))


def test_equal_tensors_give_equal_bytes_in_any_order() -> None:
    shuffled = dict(reversed(tensors().items()))
    data = save_adapter(tensors(), SPEC)
    assert save_adapter(shuffled, SPEC) == data
    assert len(data) == adapter_bytes(SPEC)
    loaded = load_adapter(data, SPEC)
    assert list(loaded) == [t.name for t in SPEC.tensors]
    assert all(np.array_equal(loaded[name], value) for name, value in tensors().items())


def swapped(name: str, value: np.ndarray) -> bytes:
    return save({**tensors(), name: value})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        save_adapter(tensors(), SPEC) + b"\0",
        save_adapter(tensors(), SPEC)[:-1],
        bytes(adapter_bytes(SPEC)),
        swapped("head.weight", np.zeros((5, 2), np.float32)),
        swapped("head.weight", np.zeros((2, 5), np.int32)),
        swapped("head.weight", np.full((2, 5), np.nan, np.float32)),
        swapped("y.lora_B.weight", np.full((1, 2), np.inf, np.float32)),
        save({name.replace("head", "haed"): value for name, value in tensors().items()}),
        save(tensors(), metadata={"a": "b"}),
    ],
    ids=["empty", "longer", "shorter", "zeros", "transposed", "int32", "nan", "inf", "renamed", "metadata"],
)
def test_anything_but_the_specs_own_bytes_is_refused(data: bytes) -> None:
    with pytest.raises(LocalError, match="adapter"):
        load_adapter(data, SPEC)


def test_a_file_is_read_only_as_far_as_its_size_is_right(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(save_adapter(tensors(), SPEC))
    assert np.array_equal(read_adapter(path, SPEC)["head.weight"], tensors()["head.weight"])
    path.write_bytes(bytes(10**6))
    with pytest.raises(LocalError, match=f"{adapter_bytes(SPEC) + 1} bytes long"):
        read_adapter(path, SPEC)
    with pytest.raises(LocalError, match="cannot be read"):
        read_adapter(tmp_path / "absent", SPEC)


def test_tensors_that_are_not_the_specs_are_not_written() -> None:
    with pytest.raises(ValueError, match=r"head\.weight"):
        save_adapter({**tensors(), "head.weight": np.zeros((2, 5))}, SPEC)


def test_spec_survives_its_canonical_form() -> None:
    assert parse_spec(SPEC.canonical()) == SPEC


@pytest.mark.parametrize(
    "entries",
    [
        {"a": 1},
        [["a", [1], "boss"]],
        [["a", [], "head"]],
        [["a", [0], "head"]],
        [["a", [-1], "head"]],
        [["a", [True], "head"]],
        [["a", [1.0], "head"]],
        [[1, [1], "head"]],
        [["a", [1], "head"], ["a", [2], "head"]],
        [["a", [1 << 20, 1 << 20], "head"]],
        [["a", [1], "head", 1]],
    ],
)
def test_malformed_specs_are_refused(entries: object) -> None:
    with pytest.raises(LocalError):
        parse_spec(json.dumps(entries, separators=(",", ":")).encode())


def test_spec_bytes_that_are_not_canonical_are_refused() -> None:
    with pytest.raises(LocalError, match="canonical"):
        parse_spec(SPEC.canonical().replace(b",", b", "))
    with pytest.raises(LocalError, match="canonical"):
        parse_spec(b"\xff")
    with pytest.raises(LocalError, match="at most"):
        parse_spec(b" " * (4 * 1024 * 1024 + 1))
