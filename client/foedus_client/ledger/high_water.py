"""The ledger's high-water mark: how far it had come when a vector was last stored for sending, or masked.

A ledger that forgets is worse than none. A home restored from an older copy would not know what was released since, and
would mask a vector again that was masked before. So the mark lies outside the home and outside its backups; a ledger
that does not contain it is not used until the site's administrator has decided (docs/protocol.md section 4). Knows no
SQL and no clock.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from foedus_common.canonical import digest
from foedus_common.errors import LocalError
from foedus_common.private_files import private_folder, read_private, replace_private

MAX_BYTES = 1024


@dataclass(frozen=True)
class Mark:
    """The ledger's last entry and its head (32 bytes), and how many vectors had been masked."""

    entries: int
    head: bytes
    masked: int


def state_folder(environment: Mapping[str, str]) -> Path:
    """Where this machine keeps what belongs to no backup: XDG_STATE_HOME, else ~/.local/state."""
    state = environment.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state).absolute() / "foedus"


def mark_name(site: str, root_public_key: bytes) -> str:
    """What a site's mark is called: it outlasts keys, certificates and the home's path."""
    return f"{site}-{digest('high-water', site, root_public_key).hex()[:16]}"


class HighWater:
    """The mark of one site, in a file of its own that several processes may advance."""

    def __init__(self, folder: Path, name: str) -> None:
        """folder: as `state_folder` says; name: as `mark_name` says."""
        self.path = folder / f"{name}.json"

    def read(self) -> Mark | None:
        """None when this machine has none. Raises LocalError when the file is damaged or others can read it."""
        if not self.path.exists():
            return None
        try:
            table = json.loads(read_private(self.path, MAX_BYTES))
            return Mark(int(table["entries"]), bytes.fromhex(table["head"]), int(table["masked"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise LocalError(
                f"The high-water mark {self.path} is damaged; a copy of it, or `foedus-site ledger --accept-loss`, "
                "gets the site back to work."
            ) from None

    def advance(self, mark: Mark) -> None:
        """On disk when it returns. Never moves back, whichever process comes last."""
        with self._alone():
            known = self.read()
            if known is None or (mark.entries, mark.masked) > (known.entries, known.masked):
                self._write(mark)

    def reset(self, mark: Mark) -> None:
        """Begin anew from here: the administrator has accepted what is lost."""
        with self._alone():
            self._write(mark)

    def _write(self, mark: Mark) -> None:
        table = {"entries": mark.entries, "head": mark.head.hex(), "masked": mark.masked}
        replace_private(self.path, json.dumps(table).encode())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        private_folder(self.path.parent)
        descriptor = os.open(self.path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
