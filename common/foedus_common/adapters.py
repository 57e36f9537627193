"""Adapter tensors, their bytes, and the one flat vector that is trained: `AdapterSpec` is the single authority.

A spec lists every tensor of an adapter in order: the head, then the factors of each adapted layer. Knows numpy and the
safetensors format; knows nothing of torch, of models, or of what the numbers mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from foedus_common.canonical import canonical_json, digest
from foedus_common.errors import LocalError
from foedus_common.plan import Part

Role = Literal["head", "adapter", "frozen"]
"""head and adapter tensors are trained; frozen ones belong to the adapter but keep their first values."""

Tensors = Mapping[str, NDArray[np.float32]]

MAX_SPEC_BYTES = 4 * 1024 * 1024
MAX_PARAMETERS = 1 << 30

_TRAINED: Mapping[str, tuple[Role, ...]] = {"head": ("head",), "adapter": ("head", "adapter")}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name in the file, its shape, its role. The dtype is always float32."""

    name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterSpec:
    """The tensors of an adapter, in order."""

    tensors: tuple[TensorSpec, ...]

    def canonical(self) -> bytes:
        """Canonical JSON: a list of [name, shape, role]."""
        return canonical_json([[tensor.name, list(tensor.shape), tensor.role] for tensor in self.tensors])

    def digest(self) -> bytes:
        """32 bytes: H(enc("adapter-spec", canonical))."""
        return digest("adapter-spec", self.canonical())

    def trained(self, train: str) -> tuple[TensorSpec, ...]:
        """The tensors of the vector that a phase with `train` of "head" or "adapter" trains, in the vector's order:
        those of the head, then (in an adapter phase) those of the adapter, each in the spec's order."""
        return tuple(tensor for role in _TRAINED[train] for tensor in self.tensors if tensor.role == role)

    def parts(self, train: str) -> tuple[Part, ...]:
        """The layout of that vector by group; groups without a coordinate are left out."""
        lengths = {role: sum(t.size for t in self.tensors if t.role == role) for role in _TRAINED[train]}
        return tuple(Part(role, lengths[role]) for role in ("head", "adapter") if lengths.get(role))

    def size(self, train: str) -> int:
        """d: how many numbers that vector has."""
        return sum(tensor.size for tensor in self.trained(train))

    def vector(self, tensors: Tensors, train: str) -> NDArray[np.float32]:
        """The trained tensors as one float32 vector (d,), each tensor in row-major order."""
        flat = [np.ravel(tensors[tensor.name]).astype(np.float32) for tensor in self.trained(train)]
        return np.concatenate(flat)

    def with_vector(self, tensors: Tensors, train: str, vector: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """A copy of `tensors` whose trained part is `vector` (d,), rounded to float32. ValueError: wrong length."""
        if vector.shape != (self.size(train),):
            raise ValueError(f"the vector has shape {vector.shape}, not ({self.size(train)},)")
        new, start = {name: value.copy() for name, value in tensors.items()}, 0
        for tensor in self.trained(train):
            new[tensor.name] = vector[start : start + tensor.size].reshape(tensor.shape).astype(np.float32)
            start += tensor.size
        return new

    def with_update(self, tensors: Tensors, train: str, update: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """A copy of `tensors` with `update` (d,) added in float64 and the sum rounded to float32."""
        return self.with_vector(tensors, train, self.vector(tensors, train).astype(np.float64) + update)


def parse_spec(canonical: bytes) -> AdapterSpec:
    """A spec from its canonical bytes. Raises LocalError for anything that `AdapterSpec.canonical` does not write."""
    if len(canonical) > MAX_SPEC_BYTES:
        raise LocalError(f"The adapter's specification is {len(canonical)} bytes; at most {MAX_SPEC_BYTES} are read.")
    try:
        spec = AdapterSpec(tuple(_parse_tensor(*item) for item in json.loads(canonical)))
        well_formed = spec.canonical() == canonical
    except (ValueError, TypeError, RecursionError):
        well_formed = False
    if not well_formed:
        raise LocalError("The adapter's specification is not canonical JSON of [name, shape, role] entries.")
    if len({tensor.name for tensor in spec.tensors}) != len(spec.tensors):
        raise LocalError("The adapter's specification names a tensor twice.")
    if sum(tensor.size for tensor in spec.tensors) > MAX_PARAMETERS:
        raise LocalError(f"The adapter's specification has more than {MAX_PARAMETERS} parameters.")
    return spec


def _parse_tensor(name: Any, shape: Any, role: Any) -> TensorSpec:
    if not isinstance(name, str) or role not in ("head", "adapter", "frozen") or not 0 < len(shape) <= 4:
        raise ValueError("not a tensor")
    if not all(type(length) is int and 0 < length <= MAX_PARAMETERS for length in shape):
        raise ValueError("not a shape")
    return TensorSpec(name, tuple(shape), role)


def save_adapter(tensors: Tensors, spec: AdapterSpec) -> bytes:
    """The adapter as safetensors bytes; equal tensors give equal bytes. ValueError: the tensors are not the spec's."""
    for tensor in spec.tensors:
        if tensors[tensor.name].shape != tensor.shape or tensors[tensor.name].dtype != np.float32:
            raise ValueError(f"{tensor.name} is not float32 of shape {tensor.shape}")
    return safetensors_numpy.save({t.name: np.ascontiguousarray(tensors[t.name]) for t in spec.tensors})


def adapter_bytes(spec: AdapterSpec) -> int:
    """How many bytes `save_adapter` writes for this spec: a file of any other size is not read."""
    return len(save_adapter({t.name: np.zeros(t.shape, np.float32) for t in spec.tensors}, spec))


def load_adapter(data: bytes, spec: AdapterSpec) -> dict[str, NDArray[np.float32]]:
    """The tensors in safetensors bytes. Raises LocalError unless they are exactly what `save_adapter` writes for this
    spec (names, shapes, float32, nothing else beside them) and every number is finite."""
    if len(data) != adapter_bytes(spec):
        raise LocalError(f"The adapter is {len(data)} bytes long, but its specification makes {adapter_bytes(spec)}.")
    try:
        tensors = safetensors_numpy.load(data)
        matches = save_adapter(tensors, spec) == data
    except (SafetensorError, ValueError, KeyError, TypeError):
        matches = False
    if not matches:
        raise LocalError("The adapter is not a safetensors file with the tensors of its specification.")
    for tensor in spec.tensors:
        if not np.isfinite(tensors[tensor.name]).all():
            raise LocalError(f"The adapter's tensor {tensor.name} holds a number that is not finite.")
    return {tensor.name: tensors[tensor.name] for tensor in spec.tensors}


def read_adapter(path: Path, spec: AdapterSpec) -> dict[str, NDArray[np.float32]]:
    """`load_adapter` on a file; its size is checked before it is read."""
    expected = adapter_bytes(spec)
    try:
        with path.open("rb") as file:
            data = file.read(expected + 1)
    except OSError as error:
        raise LocalError(f"The adapter {path} cannot be read: {error.strerror}.") from None
    return load_adapter(data, spec)
