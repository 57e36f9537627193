"""Large objects, named by their SHA-256: kept as files, moved in chunks, resumable, checked before they count.

A store is a folder. `<folder>/<sha256>` is a whole object, written, synchronised and then renamed into place;
`<folder>/partial/<sha256>-<size>` is one that is still arriving and survives a cut. Knows no network and no protocol.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.private_files import make_rename_durable, private_folder

SPARE_BYTES = 256 << 20
"""What an object that arrives leaves free on the disk, for a ledger or a database beside it."""
_READ_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ObjectRef:
    """Names an object: SHA-256 in lower-case hex, and its size in bytes, at least 1.

    Raises:
        RemoteError: BAD_MESSAGE when either is malformed; a reference that we did not make came from the peer.
    """

    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256) or self.size < 1:
            raise RemoteError(Reason.BAD_MESSAGE, "an object reference is not a SHA-256 and a size.")


class ObjectStore:
    """Objects as files of mode 0600 in a folder of mode 0700. Safe to use from several threads of one process.

    limit: bytes that the store may hold, whole and announced, before it receives no more; None for no limit.

    Raises:
        LocalError: the folder cannot be made, or others can look into it.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self._limit = limit
        self._folder = private_folder(folder)
        self._partial = private_folder(folder / "partial")
        self._arriving: set[ObjectRef] = set()
        self._lock = threading.Lock()

    def put(self, data: bytes | memoryview) -> ObjectRef:
        """Store `data` durably; storing the same bytes twice is one object. Raises LocalError when the disk is full."""
        ref = ObjectRef(hashlib.sha256(data).hexdigest(), memoryview(data).nbytes)
        if not self.has(ref):
            with _disk_in_words(), tempfile.NamedTemporaryFile(dir=self._partial, delete=False) as file:
                try:
                    file.write(data)
                    _publish(file, self.path(ref))
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        return ref

    def path(self, ref: ObjectRef) -> Path:
        """Where the object is, or would be."""
        return self._folder / ref.sha256

    def has(self, ref: ObjectRef) -> bool:
        try:
            return self.path(ref).stat().st_size == ref.size
        except FileNotFoundError:
            return False

    def read(self, ref: ObjectRef) -> bytes:
        """The whole object, hashed again on the way.

        Raises:
            LocalError: it is not here, or the file no longer holds what its name says.
        """
        try:
            data = self.path(ref).read_bytes()
        except FileNotFoundError:
            raise LocalError(f"Object {ref.sha256[:12]} is not in {self._folder}.") from None
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise LocalError(f"The file {self.path(ref)} is damaged: its SHA-256 is not its name; delete it.")
        return data

    def delete(self, ref: ObjectRef) -> None:
        """Forget the object and whatever has arrived of it; it need not exist."""
        self.path(ref).unlink(missing_ok=True)
        self._partial_path(ref).unlink(missing_ok=True)

    def received(self, ref: ObjectRef) -> int:
        """How many bytes of the object are here: all, some, or none."""
        if self.has(ref):
            return ref.size
        try:
            return min(self._partial_path(ref).stat().st_size, ref.size)
        except FileNotFoundError:
            return 0

    def claimed_bytes(self, ref: ObjectRef) -> int:
        """Bytes that the store would hold once `ref` and all other objects that began to arrive are whole."""
        return sum(self._claimed(ref).values())

    def claimed_objects(self, ref: ObjectRef) -> int:
        """How many objects that would be."""
        return len(self._claimed(ref))

    def _claimed(self, ref: ObjectRef) -> dict[str, int]:
        names = (path.name.split("-") for path in self._partial.iterdir() if "-" in path.name)
        sizes = {name: int(size) for name, size in names}
        sizes |= {path.name: path.stat().st_size for path in self._folder.iterdir() if path.is_file()}
        return sizes | {ref.sha256: ref.size}

    def sweep(self, keep: Collection[str], before: float) -> None:
        """Delete every object but those named in `keep`, by SHA-256, and what arrived in part and has not grown since
        `before` (Unix seconds). For when nobody stores or receives."""
        for path in self._folder.iterdir():
            if path.is_file() and path.name not in keep:
                path.unlink()
        for path in self._partial.iterdir():
            if "-" not in path.name or path.stat().st_mtime < before:  # without: a `put` that was cut
                path.unlink()

    def receive(self, ref: ObjectRef) -> Partial:
        """Take the object in, from where the last try ended; use it as a context.

        Raises:
            LocalError: another thread is receiving the same object, or the disk is almost full.
            RemoteError: QUOTA when the store would hold more than its limit.
        """
        with self._lock:
            if ref in self._arriving:
                raise LocalError(f"Object {ref.sha256[:12]} is already arriving over another connection.")
            self._require_room(ref)
            self._partial_path(ref).touch(mode=0o600)
            self._arriving.add(ref)
        return Partial(self, ref, self._partial_path(ref))

    def release(self, ref: ObjectRef) -> None:
        """End of one `receive`, finished or not; `Partial` calls it."""
        with self._lock:
            self._arriving.discard(ref)

    def _require_room(self, ref: ObjectRef) -> None:
        if self._limit is not None and self.claimed_bytes(ref) > self._limit:
            raise RemoteError(
                Reason.QUOTA, f"an object of {ref.size} bytes is above what is left of the limit of {self._limit}."
            )
        if shutil.disk_usage(self._folder).free < ref.size - self.received(ref) + SPARE_BYTES:
            raise LocalError(f"An object of {ref.size} bytes finds too little room; make some where the home is.")

    def _partial_path(self, ref: ObjectRef) -> Path:
        return self._partial / f"{ref.sha256}-{ref.size}"


class Partial:
    """An object that is arriving. One writer; leaving the context keeps what came for the next try."""

    def __init__(self, store: ObjectStore, ref: ObjectRef, path: Path) -> None:
        self._store = store
        self._ref = ref
        self._path = path
        self._hash = hashlib.sha256()
        self.offset = 0
        """Bytes held and hashed so far; the next chunk begins here."""

    def __enter__(self) -> Partial:
        self._file = self._path.open("r+b")
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            with _disk_in_words():
                self._file.close()
        finally:
            self._store.release(self._ref)

    def resume(self) -> int:
        """Hash again what earlier tries left on disk, and give the offset to go on from. Call it first."""
        while chunk := self._file.read(_READ_BYTES):
            self._hash.update(chunk)
            self.offset += len(chunk)
        return self.offset

    def append(self, chunk: bytes) -> None:
        """Add the next bytes.

        Raises:
            RemoteError: BAD_MESSAGE when they would exceed the announced size; what came is thrown away.
            LocalError: the disk is full.
        """
        if self.offset + len(chunk) > self._ref.size:
            self._path.unlink()
            raise RemoteError(Reason.BAD_MESSAGE, "an object is longer than was announced.")
        with _disk_in_words():
            self._file.write(chunk)
        self._hash.update(chunk)
        self.offset += len(chunk)

    def finish(self) -> Path:
        """Check size and hash, make the object durable and give its path; wrong bytes are thrown away.

        Raises:
            RemoteError: BAD_MESSAGE when the bytes are not the object that was announced.
        """
        if self.offset != self._ref.size or self._hash.hexdigest() != self._ref.sha256:
            self._path.unlink()
            raise RemoteError(Reason.BAD_MESSAGE, "an object's bytes do not match its size and SHA-256.")
        with _disk_in_words():
            _publish(self._file, self._store.path(self._ref))
        return self._store.path(self._ref)


@contextmanager
def _disk_in_words() -> Iterator[None]:
    """A disk that takes no more is nobody's mistake. The sentence may reach the other side, so it names no folder."""
    try:
        yield
    except OSError as error:
        raise LocalError(f"An object cannot be stored: {error.strerror}; make room where the home is.") from None


def _publish(file: BinaryIO | tempfile._TemporaryFileWrapper[bytes], target: Path) -> None:
    """Rename a complete temporary file to its name once its bytes are on disk, then make the rename durable."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, target)
    make_rename_durable(target)
