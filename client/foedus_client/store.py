"""Everything that a site must still know after a crash: one SQLite file, and the only SQL of the site.

A transaction has a name, is one unit on disk, and is synchronised before it returns (write-ahead log with
synchronous=FULL: the log is flushed at every commit), which is what "reserved before data is opened" and "stored before
sent" rest on. One `SiteStore` may be used from several threads, and several processes may open one file. It keeps
facts and refuses to overwrite those that are write-once; what they mean is for `ledger`, `policy` and `round`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_client.high_water import HighWater, Mark
from foedus_client.schema import NEXT, SCHEMA, SCHEMA_VERSION, PlanState
from foedus_common.clock import Clock
from foedus_common.errors import LocalError
from foedus_common.journal import START, Checkpoint, Entry
from foedus_common.protocol.effects import Answered, AttemptSeen, Record, VectorMasked
from foedus_common.protocol.messages import AttemptId, RoundTerms, VectorRef
from foedus_common.protocol.site_stages import Outbox
from foedus_common.protocol.wire import parse_terms, terms_bytes

BUSY_SECONDS = 20.0

_WAYS_ON = (
    "Restore the newest copy that there is; if none is newer, `foedus-site ledger --accept-loss` counts every run that "
    "could have gone on as spent in full."
)


@dataclass(frozen=True)
class StoredModel:
    name: str
    manifest_sha256: str
    path: Path
    added_at: float


@dataclass(frozen=True)
class Dataset:
    """A file of rows that was checked when it was added. `account`: its line in the ledger."""

    name: str
    account: str
    path: Path
    text_column: str
    label_column: str
    file_sha256: str
    rows_sha256: str
    rows: int
    label_counts: Mapping[str, int]
    added_at: float


@dataclass(frozen=True)
class StoredPlan:
    """A signed plan and what was decided about it. Times in Unix seconds."""

    digest: bytes
    run_id: int
    canonical: bytes
    signature: bytes
    received_at: float
    state: PlanState
    decided_at: float | None
    decided_by: str | None


class SiteStore:
    """The site's database file. Raises LocalError when it cannot be used, and when a write-once fact would change."""

    def __init__(self, path: Path, clock: Clock, high_water: HighWater | None = None) -> None:
        """Open the file, or make it with mode 0600. high_water: advanced with everything that may leave the site."""
        self.path = path
        self._clock = clock
        self._high_water = high_water
        self._lock = threading.RLock()
        self._depth = 0
        self._outbox_changed = False
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
                self._depth, self._outbox_changed = 1, False
                try:
                    yield
                    self._db.execute("COMMIT")
                except BaseException:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    raise
                finally:
                    self._depth = 0
                if self._high_water and self._outbox_changed:
                    self._high_water.advance(self._mark())  # after the commit: the mark is never ahead of the file
            except sqlite3.IntegrityError as error:
                raise LocalError(f"{name} contradicts what {self.path} says already: {error}.") from None
            except sqlite3.Error as error:
                raise LocalError(f"{self.path} could not be written ({name}): {error}.") from None

    def version(self) -> int:
        """A number that differs whenever another process has committed since; cheap enough to ask every 250 ms."""
        return int(self._one("PRAGMA data_version")[0])

    # --- Single values ---

    def meta(self, key: str) -> str | None:
        row = self._first("SELECT value FROM meta WHERE key = ?", key)
        return row["value"] if row else None

    def set_meta(self, key: str, value: str) -> None:
        with self.transaction(f"set {key}"):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def paused(self) -> str | None:
        """Who paused the site; None while it is at work."""
        return self.meta("paused") or None

    def pause(self, by: str) -> None:
        self.set_meta("paused", by)

    def resume(self) -> None:
        self.set_meta("paused", "")

    # --- Models and datasets ---

    def add_model(self, name: str, manifest_sha256: str, path: Path) -> None:
        """Adding the same folder again is no mistake. Raises LocalError for a name that another model has."""
        with self.transaction("add model"):
            known = self.model(manifest_sha256)
            if known and known.name == name:
                self._db.execute("UPDATE models SET path = ? WHERE name = ?", (str(path.absolute()), name))
                return
            if known:
                raise LocalError(f"This model was added already, as {known.name!r}.")
            if self._first("SELECT 1 FROM models WHERE name = ?", name):
                raise LocalError(f"Another model has the name {name!r}; choose another name.")
            self._db.execute(
                "INSERT INTO models VALUES (?, ?, ?, ?)", (manifest_sha256, name, str(path.absolute()), self._now())
            )

    def models(self) -> list[StoredModel]:
        return [_model(row) for row in self._all("SELECT * FROM models ORDER BY name")]

    def model(self, manifest_sha256: str) -> StoredModel | None:
        row = self._first("SELECT * FROM models WHERE manifest_sha256 = ?", manifest_sha256)
        return _model(row) if row else None

    def add_dataset(self, dataset: Dataset, row_keys: bytes) -> None:
        """Raises LocalError for a name that is taken; `Ledger.add_dataset` has the rest of the rules."""
        with self.transaction("add dataset"):
            if self.dataset(dataset.name):
                raise LocalError(f"A dataset named {dataset.name!r} exists already; choose another name.")
            self._db.execute(
                "INSERT INTO datasets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    dataset.name,
                    dataset.account,
                    str(dataset.path),
                    dataset.text_column,
                    dataset.label_column,
                    dataset.file_sha256,
                    dataset.rows_sha256,
                    dataset.rows,
                    json.dumps(dataset.label_counts),
                    row_keys,
                    dataset.added_at,
                ),
            )

    def datasets(self) -> list[Dataset]:
        return [_dataset(row) for row in self._all(f"SELECT {_DATASET} FROM datasets ORDER BY name")]

    def dataset(self, name: str) -> Dataset | None:
        row = self._first(f"SELECT {_DATASET} FROM datasets WHERE name = ?", name)
        return _dataset(row) if row else None

    def row_keys(self, name: str) -> bytes:
        return bytes(self._one("SELECT row_keys FROM datasets WHERE name = ?", name)["row_keys"])

    # --- Plans ---

    def put_plan(self, digest: bytes, run_id: int, canonical: bytes, signature: bytes) -> StoredPlan:
        """Keep a plan whose signature was verified, as pending; a plan that is known stays as it is.

        Raises LocalError for another plan under a known run id.
        """
        with self.transaction("put plan"):
            if known := self.plan(digest):
                return known
            if self.plan_of_run(run_id):
                raise LocalError(f"Run {run_id} is known here under another plan; a run's plan never changes.")
            self._db.execute(
                "INSERT INTO plans VALUES (?, ?, ?, ?, ?, 'pending', NULL, NULL)",
                (digest, run_id, canonical, signature, self._now()),
            )
            return _plan(self._one("SELECT * FROM plans WHERE digest = ?", digest))

    def plans(self) -> list[StoredPlan]:
        """Oldest first."""
        return [_plan(row) for row in self._all("SELECT * FROM plans ORDER BY received_at, run_id")]

    def plan(self, digest: bytes) -> StoredPlan | None:
        row = self._first("SELECT * FROM plans WHERE digest = ?", digest)
        return _plan(row) if row else None

    def plan_of_run(self, run_id: int) -> StoredPlan | None:
        row = self._first("SELECT * FROM plans WHERE run_id = ?", run_id)
        return _plan(row) if row else None

    def decide_plan(self, digest: bytes, state: PlanState, by: str) -> StoredPlan:
        """Move a plan to `state`; deciding the same again changes nothing.

        by: 'policy', 'coordinator' or a person's user name. Raises LocalError where the step is not possible.
        """
        with self.transaction("decide plan"):
            plan = self.plan(digest)
            if plan is None:
                raise LocalError("No plan with this digest was received.")
            if plan.state == state:
                return plan
            if state not in NEXT.get(plan.state, ()):
                raise LocalError(f"The plan of run {plan.run_id} is {plan.state} and cannot become {state}.")
            self._db.execute(
                "UPDATE plans SET state = ?, decided_at = ?, decided_by = ? WHERE digest = ?",
                (state, self._now(), by, digest),
            )
            return _plan(self._one("SELECT * FROM plans WHERE digest = ?", digest))

    # --- The ledger's entries ---

    def ledger_entries(self) -> list[tuple[Entry, bytes]]:
        """(entry, signature) in order."""
        rows = self._all("SELECT * FROM ledger ORDER BY number")
        return [(Entry(row["number"], row["body"], row["head"]), row["signature"]) for row in rows]

    def ledger_end(self) -> Checkpoint:
        row = self._first("SELECT number, head FROM ledger ORDER BY number DESC LIMIT 1")
        return Checkpoint(row["number"], row["head"]) if row else START

    def append_entry(self, entry: Entry, signature: bytes) -> None:
        with self.transaction("ledger"):
            self._db.execute(
                "INSERT INTO ledger VALUES (?, ?, ?, ?)", (entry.number, entry.body, entry.head, signature)
            )

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

    def _holds(self, mark: Mark) -> bool:
        row = self._first("SELECT head FROM ledger WHERE number = ?", mark.entries)
        return row is not None and row["head"] == mark.head and self._mark().masked >= mark.masked

    def _mark(self) -> Mark:
        end = self.ledger_end()
        masked = self._one("SELECT count(*) FROM outbox WHERE masked_attempt IS NOT NULL")[0]
        return Mark(end.number, end.head, masked)

    # --- Copies ---

    def copy_to(self, path: Path) -> None:
        """A copy of the file as it is now, whole, while others may go on writing it."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._lock, closing(sqlite3.connect(path)) as copy:
            self._db.backup(copy)

    # --- Vectors waiting to be sent, and the protocol's durable facts ---

    def put_vector(self, charge: int, terms: RoundTerms, vector: VectorRef) -> None:
        """Put a vector in the outbox; `Ledger.release` calls it, so that no vector is there without its charge."""
        with self.transaction("outbox"):
            self._outbox_changed = True
            self._db.execute(
                "INSERT INTO outbox (charge, run_id, round, terms, vector_sha256, vector_size, stored_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (charge, terms.run_id, terms.round, terms_bytes(terms), vector.digest, vector.size, self._now()),
            )

    def outbox(self, run_id: int, round_index: int) -> Outbox | None:
        """The round's newest vector with everything durable that decides whether it may be masked."""
        with self._lock:
            row = self._first(
                "SELECT * FROM outbox WHERE run_id = ? AND round = ? ORDER BY charge DESC LIMIT 1", run_id, round_index
            )
            seen = self._all("SELECT * FROM attempts WHERE run_id = ? AND round = ?", run_id, round_index)
        if row is None:
            return None
        masked_in = row["masked_attempt"]
        return Outbox(
            terms=parse_terms(row["terms"]),
            vector=VectorRef(row["vector_sha256"], row["vector_size"]),
            charged=True,  # the row and its release are one transaction
            masked_in=None if masked_in is None else AttemptId(run_id, round_index, masked_in),
            attempts_seen=frozenset(AttemptId(run_id, round_index, other["attempt"]) for other in seen),
        )

    def acknowledge(self, charge: int) -> None:
        """The coordinator has what this vector was for; `Ledger.commit` calls it."""
        with self.transaction("acknowledge"):
            self._db.execute("UPDATE outbox SET acknowledged = 1 WHERE charge = ?", (charge,))

    def persist(self, records: Iterable[Record]) -> None:
        """Write a step's records in one transaction.

        Raises LocalError, having written none, for a fact that contradicts one that is there: an attempt begun twice,
        a vector masked twice, another answer to the same sequence.
        """
        with self.transaction("protocol step"):
            for record in records:
                self._persist(record)

    def answered(self, attempt: AttemptId) -> Answered | None:
        """The attempt's last stored answer."""
        row = self._first(
            "SELECT * FROM answers WHERE run_id = ? AND round = ? AND attempt = ? ORDER BY sequence DESC LIMIT 1",
            *attempt,
        )
        return Answered(attempt, row["sequence"], row["request"], row["answer"]) if row else None

    def _persist(self, record: Record) -> None:
        if isinstance(record, AttemptSeen):
            self._db.execute("INSERT INTO attempts VALUES (?, ?, ?)", record.attempt)
        elif isinstance(record, VectorMasked):
            self._outbox_changed = True
            changed = self._db.execute(
                "UPDATE outbox SET masked_attempt = ?, masked_sha256 = ?, masked_size = ?"
                " WHERE run_id = ? AND round = ? AND vector_sha256 = ?",
                (record.attempt.attempt, *record.masked, *record.attempt[:2], record.vector.digest),
            ).rowcount
            if changed != 1:
                raise LocalError("A vector that is not in the outbox was masked.")
        elif isinstance(record, Answered):
            self._db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
                (*record.attempt, record.sequence, record.request, record.answer),
            )
        else:
            raise LocalError(f"A site keeps no {type(record).__name__} records.")

    # --- Plumbing ---

    def _make_schema(self) -> None:
        with self.transaction("schema"):
            version = self._one("PRAGMA user_version")[0]
            if version == 0:
                for statement in _statements(SCHEMA):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise LocalError(
                    f"{self.path} has schema version {version}, and this program knows {SCHEMA_VERSION}; "
                    "use the version of Foedus that wrote it."
                )

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


_DATASET = "name, account, path, text_column, label_column, file_sha256, rows_sha256, rows, label_counts, added_at"


def _model(row: sqlite3.Row) -> StoredModel:
    return StoredModel(row["name"], row["manifest_sha256"], Path(row["path"]), row["added_at"])


def _dataset(row: sqlite3.Row) -> Dataset:
    return Dataset(**{**dict(row), "path": Path(row["path"]), "label_counts": json.loads(row["label_counts"])})


def _plan(row: sqlite3.Row) -> StoredPlan:
    return StoredPlan(**dict(row))
