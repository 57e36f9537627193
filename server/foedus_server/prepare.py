"""Child process: what a plan trains on a model, and the first adapter, as hashed data for every site.

    python -m foedus_server.prepare MODEL_DIR PLAN.toml OUT_DIR

Builds the model on the meta device (no weights are read), writes `spec.json` and `first_adapter.safetensors` into
OUT_DIR and prints one line of JSON: spec_sha256, first_adapter_sha256, parameters (of all trained tensors) and trained
(per phase a list of [group, length]). Exit code 2 and one sentence on standard error when the plan does not fit.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import ndtri

from foedus_common.adapters import AdapterSpec, save_adapter
from foedus_common.canonical import digest, sha256_hex
from foedus_common.errors import LocalError
from foedus_common.plan import read_plan
from foedus_common.tasks.encoder import encoder_spec

SPEC_FILE = "spec.json"
FIRST_ADAPTER_FILE = "first_adapter.safetensors"


def first_adapter(spec: AdapterSpec, seed: int) -> dict[str, NDArray[np.float32]]:
    """Every A (r, in) with orthonormal rows from the public seed; every B and the head zero."""
    return {
        tensor.name: orthonormal_rows(seed, tensor.name, *tensor.shape)
        if tensor.name.endswith(".lora_A.weight")
        else np.zeros(tensor.shape, np.float32)
        for tensor in spec.tensors
    }


def orthonormal_rows(seed: int, name: str, rows: int, columns: int) -> NDArray[np.float32]:
    """A (rows, columns) with orthonormal rows, rows <= columns, uniformly distributed, from `seed` and `name` alone.

    AES-256-CTR with zero IV under the key H(enc("lora-A", seed, name)) gives little-endian uint64 u; (u >> 11) + 1/2
    over 2^53 through the inverse normal distribution function is a Gaussian matrix (columns, rows) in row-major order;
    its QR decomposition with R's diagonal made positive (Mezzadri 2007, arXiv:math-ph/0609050) is Q, and A is Q^T.
    All in float64, rounded to float32 at the end.
    """
    stream = Cipher(algorithms.AES256(digest("lora-A", seed, name)), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(8 * rows * columns)), np.dtype("<u8"))
    gaussian = ndtri(((words >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53).reshape(columns, rows)
    q, r = np.linalg.qr(gaussian)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T, dtype=np.float32)


def prepare(model: Path, plan_file: Path, out: Path) -> dict[str, object]:
    """Write both files into `out` (made if it is not there) and return what `main` prints. Raises LocalError."""
    plan = read_plan(plan_file)
    spec = encoder_spec(model, plan)
    adapter = save_adapter(first_adapter(spec, plan.adapter.seed), spec)
    out.mkdir(parents=True, exist_ok=True)
    (out / SPEC_FILE).write_bytes(spec.canonical())
    (out / FIRST_ADAPTER_FILE).write_bytes(adapter)
    return {
        "spec_sha256": spec.digest().hex(),
        "first_adapter_sha256": sha256_hex(adapter),
        "parameters": spec.size("adapter"),
        "trained": [[[part.group, part.length] for part in spec.parts(phase.train)] for phase in plan.phase],
    }


def main(arguments: list[str]) -> int:
    if len(arguments) != 3:
        print("Usage: python -m foedus_server.prepare MODEL_DIR PLAN.toml OUT_DIR", file=sys.stderr)
        return 2
    try:
        print(json.dumps(prepare(*map(Path, arguments))))
    except LocalError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
