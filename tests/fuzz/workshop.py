"""What a target of the search is, and where its files lie while one process searches."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from foedus_common.errors import FoedusError
from mutations import Mutator


@dataclass(frozen=True)
class Target:
    """good: inputs that are accepted. mutate: one is chosen for each input. run: parses one input and uses the result
    as the program does next; it returns or raises one of `allowed`, and anything else is a bug of ours."""

    name: str
    good: Sequence[bytes]
    mutate: Sequence[Mutator]
    run: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...] = (FoedusError,)


class Workshop:
    """A folder for one process's files, where memory is; removed at the end."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="foedus-fuzz-", dir=memory if memory.is_dir() else None))

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def file(self, name: str, data: bytes) -> Path:
        """Mode 0600."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        os.write(descriptor, data)
        os.close(descriptor)
        return path

    def given(self, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        """Writes the input to a file of this name and reads it."""
        return lambda data: read(self.file(name, data))
