"""Small files that only their owner may read: keys, tokens, certificates. Whole or not there, and mode 0600.

Knows nothing of what the files hold. A file that others could read is refused rather than used.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from foedus_common.errors import LocalError

_SHARED = 0o077


def private_folder(path: Path) -> Path:
    """Make the folder with mode 0700, and those above it likewise, unless they exist.

    Raises:
        LocalError: it exists and others can look into it, or it cannot be made.
    """
    try:
        for folder in [*reversed(path.parents), path]:  # `parents=True` would leave theirs to the umask
            folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LocalError(f"The folder {path} cannot be made: {error.strerror}.") from None
    _refuse_shared(path, "700")
    return path


def create_private(path: Path, data: bytes) -> None:
    """Write a new file durably. Raises LocalError where a file of that name exists: no key is ever overwritten."""
    temporary = _written(path, data)
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise LocalError(f"{path} exists already and is not overwritten; move it away first.") from None
    finally:
        temporary.unlink()
    make_rename_durable(path)


def replace_private(path: Path, data: bytes) -> None:
    """Write a file durably, in place of an older one of that name: readers see the one or the other, whole."""
    os.replace(_written(path, data), path)
    make_rename_durable(path)


def read_private(path: Path, limit: int) -> bytes:
    """The file's bytes.

    Raises:
        LocalError: it is missing, others can read it, or it is longer than `limit` bytes.
    """
    data = read_limited(path, limit)
    _refuse_shared(path, "600")
    return data


def read_limited(path: Path, limit: int) -> bytes:
    """The bytes of any small file. Raises LocalError when it cannot be read, or is longer than `limit` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise LocalError(f"{path} does not exist.") from None
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}.") from None
    if len(data) > limit:
        raise LocalError(f"{path} is longer than {limit} bytes; it is not what its name says.")
    return data


def _refuse_shared(path: Path, mode: str) -> None:
    if path.stat().st_mode & _SHARED:
        raise LocalError(f"Others on this machine can read {path}; run `chmod {mode} {path}` first.")


def _written(path: Path, data: bytes) -> Path:
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:  # mkstemp: mode 0600
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = "; make room in its folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise LocalError(f"{path} cannot be written: {error.strerror}{advice}.") from None
    return Path(file.name)


def make_rename_durable(path: Path) -> None:
    """Have the folder of a renamed file on disk: until then the rename may be undone by a power cut."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
