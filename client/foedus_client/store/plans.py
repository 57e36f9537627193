"""The plans that the site received, each with what was decided about it. What a plan may ask for is for `policy`."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from foedus_client.store.journal import Journal
from foedus_client.store.schema import NEXT, PlanState
from foedus_common.errors import LocalError, Reason, RemoteError


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


MAX_OPEN = 32
"""Plans that wait for a decision or were approved; a coordinator gets no more of them in."""
MAX_ENDED = 256
"""Plans of runs that are over or stopped; older ones are forgotten. The journal and the ledger still tell of them."""


class Plans(Journal):
    """Signed plans and their states."""

    def put_plan(self, digest: bytes, run_id: int, canonical: bytes, signature: bytes) -> StoredPlan:
        """Keep a plan whose signature was verified, as pending; a plan that is known stays as it is.

        Raises LocalError for another plan under a known run id, RemoteError(QUOTA) when MAX_OPEN others are open.
        """
        with self.transaction("put plan"):
            if known := self.plan(digest):
                return known
            if self.plan_of_run(run_id):
                raise LocalError(f"Run {run_id} is known here under another plan; a run's plan never changes.")
            self._require_few_open()
            self._db.execute(
                "INSERT INTO plans VALUES (?, ?, ?, ?, ?, 'pending', NULL, NULL)",
                (digest, run_id, canonical, signature, self._now()),
            )
            self.log("plan.received", run=str(run_id), plan=digest.hex())
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
            if state == "pending":
                self._require_few_open()
            self._db.execute(
                "UPDATE plans SET state = ?, decided_at = ?, decided_by = ? WHERE digest = ?",
                (state, self._now(), by, digest),
            )
            self.log(f"plan.{state}", run=str(plan.run_id), plan=digest.hex(), by=by)
            decided = _plan(self._one("SELECT * FROM plans WHERE digest = ?", digest))
            self._forget_oldest()
            return decided

    def _require_few_open(self) -> None:
        count = self._one("SELECT count(*) FROM plans WHERE state IN ('pending', 'approved')")[0]
        if count >= MAX_OPEN:
            raise RemoteError(
                Reason.QUOTA, f"{count} plans are open here already; decide on some of them, or withdraw from them."
            )

    def _forget_oldest(self) -> None:
        self._db.execute(
            "DELETE FROM plans WHERE state NOT IN ('pending', 'approved') AND digest NOT IN (SELECT digest FROM plans"
            " WHERE state NOT IN ('pending', 'approved') ORDER BY decided_at DESC, rowid DESC LIMIT ?)",
            (MAX_ENDED,),
        )
        # What was answered is told again in attempts of runs that may go on, and in no others.
        self._db.execute(
            "DELETE FROM answers WHERE run_id NOT IN"
            " (SELECT run_id FROM plans WHERE state IN ('pending', 'approved', 'stopped'))"
        )


def _plan(row: sqlite3.Row) -> StoredPlan:
    return StoredPlan(**dict(row))
