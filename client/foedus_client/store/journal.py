"""The site's journal as it lies in the file: every fact that the other parts of the store keep is entered here with it,
in the same transaction. What an entry tells is canonical JSON without secrets and without numbers about the data.
"""

from __future__ import annotations

from typing import Any

from foedus_client.store.database import Database
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
