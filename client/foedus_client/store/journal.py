"""The site's journal as it lies in the file, and the signed heads of it and of the coordinator's.

Every fact that the other parts of the store keep is entered here with it, in the same transaction. What an entry tells
is canonical JSON without secrets and without numbers about the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foedus_client.store.database import Database
from foedus_common.checkpoints import Countersignature, Head
from foedus_common.journal import START, Checkpoint, Entry, next_entry


class Journal(Database):
    """The site's hash-chained events (`foedus_common.journal`)."""

    def log(self, event: str, **details: Any) -> None:
        """Add an entry, within the transaction that is open or in one of its own; `details` are JSON values, and
        numbers that can pass 2^53 are written as text."""
        with self.transaction("journal"):
            entry = next_entry(self.journal_end(), self._now(), event, details)
            self._db.execute("INSERT INTO journal VALUES (?, ?, ?)", (entry.number, entry.body, entry.head))

    def journal_entries(self, after: int = 0) -> list[Entry]:
        """Those numbered above `after`, in order."""
        rows = self._all("SELECT * FROM journal WHERE number > ? ORDER BY number", after)
        return [Entry(row["number"], row["body"], row["head"]) for row in rows]

    def journal_end(self) -> Checkpoint:
        row = self._first("SELECT number, head FROM journal ORDER BY number DESC LIMIT 1")
        return Checkpoint(row["number"], row["head"]) if row else START

    def journal_head(self, number: int) -> bytes | None:
        row = self._first("SELECT head FROM journal WHERE number = ?", number)
        return row["head"] if row else None

    # --- Signed heads (`foedus_common.checkpoints.HeadBook`) ---

    def heads(self, owner: str | None = None) -> list[Head]:
        """By number; of every journal unless `owner` is given."""
        rows = self._all("SELECT * FROM heads WHERE ?1 IS NULL OR owner = ?1 ORDER BY number, rowid", owner)
        return [Head(**dict(row)) for row in rows]

    def newest_heads(self, owner: str, count: int) -> list[Head]:
        rows = self._all("SELECT * FROM heads WHERE owner = ? ORDER BY number DESC, rowid DESC LIMIT ?", owner, count)
        return [Head(**dict(row)) for row in reversed(rows)]

    def heads_at(self, owner: str, number: int) -> list[Head]:
        rows = self._all("SELECT * FROM heads WHERE owner = ? AND number = ?", owner, number)
        return [Head(**dict(row)) for row in rows]

    def countersignatures(self) -> list[Countersignature]:
        rows = self._all("SELECT * FROM countersignatures ORDER BY number, rowid")
        return [Countersignature(**dict(row)) for row in rows]

    def keep(self, kept: Sequence[Head], marks: Sequence[Countersignature] = ()) -> None:
        with self.transaction("heads of journals"):
            self._db.executemany(
                "INSERT OR IGNORE INTO heads VALUES (:owner, :number, :head, :signature, :public_key)",
                [vars(head) for head in kept],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO countersignatures VALUES (:number, :head, :witness, :signature, :public_key)",
                [vars(mark) for mark in marks],
            )

    # --- A pause ---

    def paused(self) -> str | None:
        """Who paused the site; None while it is at work."""
        return self.meta("paused") or None

    def pause(self, by: str) -> None:
        with self.transaction("pause"):
            self.set_meta("paused", by)
            self.log("site.paused", by=by)

    def resume(self) -> None:
        with self.transaction("resume"):
            self.set_meta("paused", "")
            self.log("site.resumed")
