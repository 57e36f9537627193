"""The tables of a site's database, how older ones become these, and which state of a plan may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

SCHEMA_VERSION = 3

PlanState = Literal["pending", "approved", "declined", "withdrawn", "finished", "stopped"]

NEXT: Mapping[PlanState, frozenset[PlanState]] = {
    "pending": frozenset({"approved", "declined", "stopped"}),
    "approved": frozenset({"withdrawn", "finished", "stopped"}),
    "stopped": frozenset({"pending"}),  # the operator takes the run up again, and the site decides anew
}
"""Which state of a plan may follow which."""
OVER = frozenset({"declined", "withdrawn", "finished"})
"""The states that are final."""

_JOURNAL = """
CREATE TABLE journal (          -- append-only, hash-chained (foedus_common.journal); written with what it tells of
    number INTEGER PRIMARY KEY,
    body   BLOB NOT NULL,       -- canonical JSON
    head   BLOB NOT NULL
);
CREATE TRIGGER journal_is_never_updated BEFORE UPDATE ON journal BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER journal_is_never_deleted BEFORE DELETE ON journal BEGIN SELECT RAISE(ABORT, 'append-only'); END;

CREATE TABLE heads (            -- of this site's journal and of others', signed by whose journal it is; written once
    owner      TEXT NOT NULL,
    number     INTEGER NOT NULL,
    head       BLOB NOT NULL,
    signature  BLOB NOT NULL,   -- 64 bytes
    public_key BLOB NOT NULL,   -- 32 bytes, the owner's
    PRIMARY KEY (owner, number, head)
);

CREATE TABLE countersignatures ( -- by others, over heads of this site's journal; written once
    number     INTEGER NOT NULL,
    head       BLOB NOT NULL,
    witness    TEXT NOT NULL,
    signature  BLOB NOT NULL,   -- 64 bytes
    public_key BLOB NOT NULL,   -- 32 bytes, the witness's
    PRIMARY KEY (number, head, witness)
);
"""

MIGRATIONS: Mapping[int, str] = {2: _JOURNAL}
"""What turns the tables of a version into those of the next."""

SCHEMA = (
    """
-- Times are Unix seconds (REAL). Hashes are SHA-256: 32 bytes as BLOB, 64 digits as TEXT.

CREATE TABLE meta (             -- single values; overwritten
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE models (           -- model folders of this machine; a row is written once
    manifest_sha256 TEXT PRIMARY KEY,
    name            TEXT NOT NULL UNIQUE,
    path            TEXT NOT NULL,
    added_at        REAL NOT NULL
) WITHOUT ROWID;

CREATE TABLE datasets (         -- a row is written once: a file that changed is another dataset
    name         TEXT PRIMARY KEY,
    account      TEXT NOT NULL, -- ledger line; shared by datasets that share rows
    path         TEXT NOT NULL,
    text_column  TEXT NOT NULL,
    label_column TEXT NOT NULL,
    file_sha256  TEXT NOT NULL,
    rows_sha256  TEXT NOT NULL UNIQUE, -- of the rows in any order
    rows         INTEGER NOT NULL,
    label_counts TEXT NOT NULL, -- JSON object: label -> rows; never leaves this machine
    row_keys     BLOB NOT NULL, -- 16 bytes of each row's hash, sorted: finds datasets that share rows
    added_at     REAL NOT NULL
);

CREATE TABLE plans (            -- what was signed is written once; of the state see NEXT
    digest      BLOB PRIMARY KEY,
    run_id      INTEGER NOT NULL UNIQUE,
    canonical   BLOB NOT NULL,
    signature   BLOB NOT NULL,
    received_at REAL NOT NULL,
    state       TEXT NOT NULL CHECK (state IN ('pending', 'approved', 'declined', 'withdrawn', 'finished', 'stopped')),
    decided_at  REAL,
    decided_by  TEXT            -- 'policy', or the person's user name
);

CREATE TABLE ledger (           -- append-only, hash-chained (foedus_common.journal)
    number    INTEGER PRIMARY KEY,
    body      BLOB NOT NULL,    -- canonical JSON
    head      BLOB NOT NULL,
    signature BLOB NOT NULL     -- 64 bytes, the site's, over number and head
);
CREATE TRIGGER ledger_is_never_updated BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER ledger_is_never_deleted BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'append-only'); END;

CREATE TABLE outbox (           -- vectors stored for sending; written once, then masked once, then acknowledged
    charge         INTEGER PRIMARY KEY REFERENCES ledger (number), -- the reserve that pays for the vector
    run_id         INTEGER NOT NULL,
    round          INTEGER NOT NULL,
    terms          BLOB NOT NULL,    -- RoundTerms: plan digest, adapter hash, phase, layout
    vector_sha256  BLOB NOT NULL,
    vector_size    INTEGER NOT NULL, -- bytes
    masked_attempt INTEGER,          -- NULL until it is masked; then never changed
    masked_sha256  BLOB,
    masked_size    INTEGER,          -- bytes
    acknowledged   INTEGER NOT NULL DEFAULT 0,
    stored_at      REAL NOT NULL
);
CREATE INDEX outbox_by_round ON outbox (run_id, round);
CREATE TRIGGER vector_is_masked_once BEFORE UPDATE OF masked_attempt ON outbox WHEN OLD.masked_attempt IS NOT NULL
BEGIN SELECT RAISE(ABORT, 'masked before'); END;

CREATE TABLE attempts (         -- attempts whose A0 was accepted; written once
    run_id  INTEGER NOT NULL,
    round   INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    PRIMARY KEY (run_id, round, attempt)
) WITHOUT ROWID;

CREATE TABLE answers (          -- what was answered in an attempt; written once
    run_id   INTEGER NOT NULL,
    round    INTEGER NOT NULL,
    attempt  INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    request  BLOB NOT NULL,     -- hash
    answer   BLOB NOT NULL,
    PRIMARY KEY (run_id, round, attempt, sequence)
);
"""
    + _JOURNAL
)
