"""The ledger's entries as they lie in the file, and the check that the file is not an older copy of itself."""

from __future__ import annotations

from pathlib import Path

from foedus_client.ledger.high_water import HighWater, Mark
from foedus_client.store.journal import Journal
from foedus_common.clock import Clock
from foedus_common.errors import LocalError
from foedus_common.journal import START, Checkpoint, Entry

_WAYS_ON = (
    "Restore the newest copy that there is; if none is newer, `foedus-site ledger --accept-loss` counts every run that "
    "could have gone on as spent in full."
)


class Entries(Journal):
    """The ledger's chain of entries, with the site's signatures."""

    def __init__(self, path: Path, clock: Clock, high_water: HighWater | None = None) -> None:
        """high_water: advanced with everything that may leave the site."""
        super().__init__(path, clock)
        self._high_water = high_water

    def ledger_entries(self) -> list[tuple[Entry, bytes]]:
        """(entry, signature) in order."""
        rows = self._all("SELECT * FROM ledger ORDER BY number")
        return [(Entry(row["number"], row["body"], row["head"]), row["signature"]) for row in rows]

    def ledger_end(self) -> Checkpoint:
        row = self._first("SELECT number, head FROM ledger ORDER BY number DESC LIMIT 1")
        return Checkpoint(row["number"], row["head"]) if row else START

    def append_entry(self, entry: Entry, signature: bytes) -> None:
        """The journal names the entry and its head, so that a head of the journal stands for the ledger as well."""
        with self.transaction("ledger"):
            self._db.execute(
                "INSERT INTO ledger VALUES (?, ?, ?, ?)", (entry.number, entry.body, entry.head, signature)
            )
            told = entry.event
            what = {name: told[name] for name in ("dataset", "round", "charge") if name in told}
            run = {"run": str(told["run_id"])} if "run_id" in told else {}
            self.log(f"ledger.{told['event']}", entry=entry.number, head=entry.head.hex(), **run, **what)

    # --- The high-water mark ---

    def check_high_water(self) -> None:
        """Raises LocalError when the file lacks what the machine's mark says that it once held: it is an older copy."""
        if self._high_water is None:
            return
        mark = self._high_water.read()  # before the file: other processes go on meanwhile, the file first
        if mark is None and self._first("SELECT 1 FROM outbox"):
            raise LocalError(
                f"This machine has no high-water mark of the ledger ({self._high_water.path}), so nothing shows that "
                f"the home is in its newest state; bring the file along when a home moves. {_WAYS_ON}"
            )
        if mark and not self._holds(mark):
            raise LocalError(
                f"The ledger was restored from an older copy: it ends at entry {self.ledger_end().number}, and this "
                f"machine knows of {mark.entries} entries and {mark.masked} vectors sent. {_WAYS_ON}"
            )

    def accept_high_water(self) -> None:
        """The file is the newest state from now on; `Ledger.accept_loss` calls it."""
        if self._high_water:
            self._high_water.reset(self._mark())

    def _advance_mark(self) -> None:
        if self._high_water:
            self._high_water.advance(self._mark())

    def _holds(self, mark: Mark) -> bool:
        row = self._first("SELECT head FROM ledger WHERE number = ?", mark.entries)
        return row is not None and row["head"] == mark.head and self._mark().masked >= mark.masked

    def _mark(self) -> Mark:
        end = self.ledger_end()
        masked = self._one("SELECT count(*) FROM outbox WHERE masked_attempt IS NOT NULL")[0]
        return Mark(end.number, end.head, masked)
