"""A model folder and the hash that names it: safetensors, JSON and text, and nothing that could carry code.

Sites resolve a plan's model by this hash, so that all train the same weights with the same tokenizer. Knows files;
knows nothing of what is in the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from foedus_common.canonical import canonical_json, digest
from foedus_common.errors import LocalError

CARRIES_DATA = frozenset({".safetensors", ".json", ".txt"})
DOCUMENTS = frozenset({".md", ".rst"})
"""Read by people only: neither hashed nor loaded. So are names that begin with a dot, and licence texts."""

DETOURS = {
    "auto_map": "code of its own",
    "transformers_weights": "weights from another file",
    "quantization_config": "weights quantized beforehand, whose arithmetic may mix rows",
}
"""What no JSON file of a model may hold, and why."""

MAX_FILES = 1000
MAX_JSON_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class ModelFile:
    """One file: its path below the folder with `/` between names, its size in bytes and its SHA-256 in hex."""

    path: str
    size: int
    sha256: str


def manifest(folder: Path) -> tuple[ModelFile, ...]:
    """The files of a model folder that are loaded from it, sorted by path.

    Raises LocalError, naming the file, for: a symbolic link, a name that is not plain, a kind of file other than
    safetensors, JSON and text (pickled weights and Python code among them), JSON that asks for code (`auto_map`,
    attention from a repository) or for other weights (`DETOURS`, an adapter's configuration), and a folder without
    `config.json` or without safetensors.
    """
    if not folder.is_dir():
        raise LocalError(f"{folder} is not a folder; give the folder that holds the model's config.json.")
    files = tuple(_examine(folder, path) for path in _loaded_files(folder))
    if not any(file.path == "config.json" for file in files):
        raise LocalError(f"{folder} is not a model folder: it has no config.json.")
    if not any(file.path.endswith(".safetensors") and "/" not in file.path for file in files):
        raise LocalError(f"{folder} has no .safetensors file; convert the model's weights to safetensors first.")
    return files


def manifest_sha256(folder: Path) -> str:
    """64 hex digits that name the model: H(enc("model-manifest", canonical JSON of [path, size, sha256] entries))."""
    entries = [[file.path, file.size, file.sha256] for file in manifest(folder)]
    return digest("model-manifest", canonical_json(entries)).hex()


def verify(folder: Path, sha256: str) -> None:
    """Raises LocalError unless the folder is the model that `sha256` names."""
    found = manifest_sha256(folder)
    if found != sha256:
        raise LocalError(
            f"The model in {folder} is {found[:12]}, but the plan asks for {sha256[:12]}; add the model it names."
        )


def _loaded_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    for here, names, files in os.walk(folder):
        names[:] = [name for name in names if not name.startswith(".")]
        found += [Path(here, name) for name in files if not _is_document(name)]
        for name in names:
            if Path(here, name).is_symlink():
                raise LocalError(f"The model folder holds the symbolic link {name}; copy what it points to instead.")
        if len(found) > MAX_FILES:
            raise LocalError(f"{folder} holds more than {MAX_FILES} files; give a model's own folder.")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _is_document(name: str) -> bool:
    return name.startswith(".") or Path(name).suffix in DOCUMENTS or name.upper() in ("LICENSE", "NOTICE")


def _examine(folder: Path, path: Path) -> ModelFile:
    name = path.relative_to(folder).as_posix()
    if path.is_symlink() or not path.is_file():
        raise LocalError(f"The model folder holds {name}, which is not a plain file; copy what it points to instead.")
    if not name.isprintable() or "\\" in name:
        raise LocalError(f"The model folder holds a file with an unprintable name ({name!r}); rename it.")
    if path.suffix not in CARRIES_DATA:
        raise LocalError(
            f"The model folder holds {name}, which could carry code; keep safetensors, JSON and text only."
        )
    if path.suffix == ".json":
        _refuse_code_and_detours(path, name)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return ModelFile(name, path.stat().st_size, sha256)


def _refuse_code_and_detours(path: Path, name: str) -> None:
    if path.name == "adapter_config.json":
        raise LocalError(f"The model folder holds {name}: that is an adapter; give the base model's own folder.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LocalError(f"The model folder holds {name}, which is longer than {MAX_JSON_BYTES} bytes.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise LocalError(f"The model folder holds {name}, which is not valid JSON.") from None
    for key, what in DETOURS.items():
        if isinstance(content, dict) and key in content:
            raise LocalError(f"The model's {name} asks for {what} ({key}); give a plain model's own folder.")
    if "/" in str(isinstance(content, dict) and content.get("attn_implementation")):
        raise LocalError(f"The model's {name} asks for code of its own (attn_implementation); remove that line.")
