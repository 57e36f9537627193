"""A home in one file: what `backup` writes and `restore` reads, at the coordinator and at a site alike.

An uncompressed tar of mode 0600: the home's files, a database as it was at one moment, and at the end a list of all
with their SHA-256. It holds the home's keys and is as secret as the home. A home is restored whole or not at all, and
never over another one. Knows neither databases nor what the files mean.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from foedus_common.clock import iso
from foedus_common.errors import LocalError
from foedus_common.private_files import make_rename_durable

LIST = "backup.json"
MAX_LIST_BYTES = 16 << 20
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Backup:
    """kind: "site" or "coordinator". made_at: Unix seconds."""

    kind: str
    made_at: float
    files: int
    bytes: int


def write_backup(
    file: Path,
    home: Path,
    kind: str,
    *,
    leave_out: frozenset[str],
    database: str,
    copy_database: Callable[[Path], None],
    now: float,
) -> Backup:
    """Writes the home to a new file.

    leave_out: names that are not part of it; names that begin with a dot never are. database: the name of the database
    file, which `copy_database` writes to the path that it is given. Raises LocalError where `file` exists.
    """
    try:
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except FileExistsError:
        raise LocalError(f"{file} exists and is not overwritten; give another name.") from None
    except OSError as error:
        raise LocalError(f"{file} cannot be written: {error.strerror}.") from None
    try:
        with open(descriptor, "wb") as target, tempfile.TemporaryDirectory(dir=home, prefix=".backup-") as folder:
            copy = Path(folder) / database
            copy_database(copy)  # first: what it names is among the files that follow
            others = _files(home, leave_out | {database, f"{database}-wal", f"{database}-shm"})
            backup = _pack(target, {database: copy, **dict(others)}, kind, now)
        make_rename_durable(file)
    except BaseException as error:
        file.unlink()
        if isinstance(error, OSError):
            raise LocalError(f"{file} cannot be written: {error.strerror}.") from None
        raise
    return backup


def restore_backup(
    file: Path, home: Path, kind: str, finish: Callable[[Path, Backup], None] = lambda draft, backup: None
) -> Backup:
    """Makes a home of a backup. finish: told the folder that becomes the home once this returns. Raises LocalError,
    having made nothing, when the file is not a whole backup of that kind, or something is at `home` already."""
    if home.exists() and not (home.is_dir() and not any(home.iterdir())):
        raise LocalError(f"{home} exists and is not empty; a backup is restored into a new home only.")
    home.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{home.name}-"))  # mode 0700
    try:
        backup = _unpack(file, draft, kind)
        finish(draft, backup)
        draft.rename(home)
        make_rename_durable(home)
    except OSError as error:
        shutil.rmtree(draft)
        raise LocalError(f"{file} cannot be restored: {error.strerror}.") from None
    except tarfile.TarError:
        shutil.rmtree(draft)
        raise LocalError(f"{file} is no backup of Foedus.") from None
    except BaseException:
        shutil.rmtree(draft)
        raise
    return backup


def _files(home: Path, leave_out: frozenset[str]) -> Iterator[tuple[str, Path]]:
    for folder, names, files in os.walk(home):
        names[:] = [name for name in names if not (name.startswith(".") or name in leave_out)]
        for name in files:
            if not (name.startswith(".") or name in leave_out):
                path = Path(folder, name)
                yield path.relative_to(home).as_posix(), path


def _pack(target: IO[bytes], contents: Mapping[str, Path], kind: str, now: float) -> Backup:
    listed = {}
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, path in sorted(contents.items()):
            try:
                source = path.open("rb")
            except FileNotFoundError:  # an object that was done with meanwhile
                continue
            with source:
                listed[name] = hashlib.file_digest(source, "sha256").hexdigest()
                _add(tar, name, source, source.tell(), now)
        about = json.dumps({"kind": kind, "made_at": now, "files": listed}).encode()
        _add(tar, LIST, io.BytesIO(about), len(about), now)
    target.flush()
    os.fsync(target.fileno())
    return Backup(kind, now, len(listed), target.tell())


def _add(tar: tarfile.TarFile, name: str, source: IO[bytes], size: int, now: float) -> None:
    """The first `size` bytes of the source."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = size, 0o600, int(now)
    source.seek(0)
    tar.addfile(entry, source)


def _unpack(file: Path, draft: Path, kind: str) -> Backup:
    found: dict[str, str] = {}
    about: dict[str, Any] = {}
    with file.open("rb") as source, tarfile.open(fileobj=source, mode="r:") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is None or not _is_plain(entry.name):
                raise LocalError(f"{file} holds {entry.name!r}, which no backup of Foedus does.")
            if entry.name == LIST:
                about = _about(file, content.read(MAX_LIST_BYTES))
                break
            found[entry.name] = _write(draft / entry.name, content)
    if about.get("files") != found:
        raise LocalError(f"{file} is no whole backup of Foedus: it was cut off or altered.")
    if about["kind"] != kind:
        raise LocalError(f"{file} is the backup of a {about['kind']}; this program restores a {kind}.")
    return Backup(kind, about["made_at"], len(found), file.stat().st_size)


def _is_plain(name: str) -> bool:
    """Whether it is the path of a file below the home."""
    path = PurePosixPath(name)
    return name.isprintable() and not path.is_absolute() and not any(part.startswith(".") for part in path.parts)


def _about(file: Path, text: bytes) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(text)
        iso(about["made_at"])
        return {key: about[key] for key in ("kind", "made_at", "files")}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise LocalError(f"{file} is no backup of Foedus: its list of files cannot be read.") from None


def _write(path: Path, content: IO[bytes]) -> str:
    """The file with mode 0600 on disk; its SHA-256 in hexadecimal digits."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        while chunk := content.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
