"""Vectors that wait to be sent, and the facts of the protocol that a site must not forget (docs/protocol.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from foedus_client.store.entries import Entries
from foedus_client.store.schema import OVER
from foedus_common.errors import LocalError
from foedus_common.protocol.effects import Answered, AttemptSeen, Record, VectorMasked
from foedus_common.protocol.messages import AttemptId, Consistency, Message, RoundTerms, Unmask, VectorRef
from foedus_common.protocol.site_stages import Outbox
from foedus_common.protocol.wire import parse_envelope, parse_terms, terms_bytes

ANSWERS: Mapping[type[Message], str] = {Consistency: "survivors.signed", Unmask: "unmasking.answered"}
"""What answers are called in the journal; entered before the answer leaves. That of the masked input is told by the
vector that was masked for it."""


class Vectors(Entries):
    """The outbox and what was done with it. Each change that may leave the site advances the high-water mark."""

    def put_vector(self, charge: int, terms: RoundTerms, vector: VectorRef) -> None:
        """Put a vector in the outbox; `Ledger.release` calls it, so that no vector is there without its charge."""
        with self.transaction("outbox"):
            self._after_commit.add(self._advance_mark)
            self._db.execute(
                "INSERT INTO outbox (charge, run_id, round, terms, vector_sha256, vector_size, stored_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (charge, terms.run_id, terms.round, terms_bytes(terms), vector.digest, vector.size, self._now()),
            )
            where = {"run": str(terms.run_id), "round": terms.round}
            # Not its digest: the coordinator is shown heads of the journal, which must confirm no guess of a vector.
            self.log("vector.stored", **where, charge=charge, size=vector.size)

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

    def vectors_of(self, run_id: int) -> set[str]:
        """Names of all objects that the run's vectors ever were, masked or not, in hexadecimal digits."""
        rows = self._all("SELECT vector_sha256, masked_sha256 FROM outbox WHERE run_id = ?", run_id)
        return {sha256.hex() for row in rows for sha256 in row if sha256 is not None}

    def vectors_awaited(self, since: float) -> set[str]:
        """Names of those that may still be asked for: not masked yet, or masked and not acknowledged; of runs that are
        neither over nor were stopped before `since` (Unix seconds)."""
        rows = self._all(
            "SELECT coalesce(masked_sha256, vector_sha256) AS sha256 FROM outbox JOIN plans USING (run_id)"
            f" WHERE NOT acknowledged AND state NOT IN ({', '.join('?' * len(OVER))})"
            " AND NOT (state = 'stopped' AND decided_at < ?)",
            *sorted(OVER),
            since,
        )
        return {row["sha256"].hex() for row in rows}

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
            self.log("attempt.begun", **_where(record.attempt))
        elif isinstance(record, VectorMasked):
            self._after_commit.add(self._advance_mark)
            changed = self._db.execute(
                "UPDATE outbox SET masked_attempt = ?, masked_sha256 = ?, masked_size = ?"
                " WHERE run_id = ? AND round = ? AND vector_sha256 = ?",
                (record.attempt.attempt, *record.masked, *record.attempt[:2], record.vector.digest),
            ).rowcount
            if changed != 1:
                raise LocalError("A vector that is not in the outbox was masked.")
            self.log(
                "vector.masked", **_where(record.attempt), vector=record.masked.digest.hex(), size=record.masked.size
            )
        elif isinstance(record, Answered):
            self._db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)",
                (*record.attempt, record.sequence, record.request, record.answer),
            )
            if event := ANSWERS.get(type(parse_envelope(record.answer).message)):
                self.log(event, **_where(record.attempt))
        else:
            raise LocalError(f"A site keeps no {type(record).__name__} records.")


def _where(attempt: AttemptId) -> dict[str, Any]:
    return {"run": str(attempt.run_id), "round": attempt.round, "attempt": attempt.attempt}
