"""The site's one SQLite file: opening it, transactions, single values and copies.

A transaction has a name, is one unit on disk, and is synchronised before it returns (write-ahead log with
synchronous=FULL: the log is flushed at every commit), which is what "reserved before data is opened" and "stored before
sent" rest on. Knows table `meta` only.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from foedus_client.store.schema import MIGRATIONS, SCHEMA, SCHEMA_VERSION
from foedus_common.clock import Clock
from foedus_common.errors import LocalError

BUSY_SECONDS = 20.0


class Database:
    """An open file, for several threads. Raises LocalError when it cannot be used."""

    def __init__(self, path: Path, clock: Clock) -> None:
        """Open the file, or make it with mode 0600."""
        self.path = path
        self._clock = clock
        self._lock = threading.RLock()
        self._depth = 0
        self._after_commit: set[Callable[[], None]] = set()  # what the open transaction wants done once it is on disk
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._db.row_factory = sqlite3.Row
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "fullfsync=ON", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._make_schema()
        except (OSError, sqlite3.Error) as error:
            raise LocalError(f"{path} cannot be opened as the site's database: {error}.") from None

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """All or nothing, and on disk when it returns. A transaction within one is part of it.

        Raises LocalError, naming the transaction, when the file cannot be written; nothing of it has happened then.
        """
        with self._lock:
            if self._depth:
                yield
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._depth = 1
                self._after_commit.clear()
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                finally:
                    self._depth = 0
                for step in self._after_commit:
                    step()
            except sqlite3.IntegrityError as error:
                raise LocalError(f"{name} contradicts what {self.path} says already: {error}.") from None
            except sqlite3.Error as error:
                advice = "; make room on its disk" if "disk" in str(error) else ""
                raise LocalError(f"{self.path} could not be written ({name}): {error}{advice}.") from None

    def version(self) -> int:
        """A number that differs whenever another process has committed since; cheap enough to ask every 250 ms."""
        return int(self._one("PRAGMA data_version")[0])

    def copy_to(self, path: Path) -> None:
        """A copy of the file as it is now, whole, while others may go on writing it."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._lock, closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)

    # --- Single values ---

    def meta(self, key: str) -> str | None:
        row = self._first("SELECT value FROM meta WHERE key = ?", key)
        return row["value"] if row else None

    def set_meta(self, key: str, value: str) -> None:
        with self.transaction(f"set {key}"):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # --- Plumbing ---

    def _make_schema(self) -> None:
        """The tables, whole or not at all: made, or brought up to date from an older version of this program."""
        with self.transaction("schema"):
            version = self._one("PRAGMA user_version")[0]
            if version == 0:
                self._execute(SCHEMA)
            elif version != SCHEMA_VERSION and version not in MIGRATIONS:
                raise LocalError(
                    f"{self.path} has schema version {version}, and this program knows {min(MIGRATIONS)} to "
                    f"{SCHEMA_VERSION}; use the version of Foedus that wrote it."
                )
            else:
                for older in range(version, SCHEMA_VERSION):
                    self._execute(MIGRATIONS[older])
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _execute(self, script: str) -> None:
        for statement in _statements(script):
            self._db.execute(statement)

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise LocalError(f"{self.path} cannot be read: {error}.") from None

    def _first(self, query: str, *values: Any) -> sqlite3.Row | None:
        return next(iter(self._all(query, *values)), None)

    def _one(self, query: str, *values: Any) -> sqlite3.Row:
        return self._all(query, *values)[0]

    def _now(self) -> float:
        return self._clock.now()


def _statements(script: str) -> Iterator[str]:
    """The script's statements one by one, so that they run within a transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
