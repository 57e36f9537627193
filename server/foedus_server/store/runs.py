"""Models, runs, attempts at rounds, and evaluations. Each function is one transaction. Which state may follow which is
decided in `foedus_server.runs`; here a change is refused when the state is not the one it was decided from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, update

from foedus_common.errors import LocalError
from foedus_server.store.database import Database
from foedus_server.store.rows import Attempt, Evaluation, Model, Run, RunState
from foedus_server.store.schema import attempts, evaluations, models, runs


class Runs:
    """What was asked for, how far it is, and what came out."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # --- Models ---

    def add_model(self, name: str, manifest_sha256: str, path: Path) -> Model:
        """The model under its name, now at `path`. Raises LocalError when another model has the name."""
        added = Model(name, manifest_sha256, str(path), self._database.clock.now())
        with self._database.writing("add the model") as connection:
            row = connection.execute(select(models).where(models.c.name == name)).one_or_none()
            if row is not None and row.manifest_sha256 != manifest_sha256:
                raise LocalError(f"Another model is called {name!r} already; give this one another name.")
            if row is not None:
                connection.execute(update(models).where(models.c.name == name).values(path=str(path)))
                return dataclasses.replace(Model(**row._mapping), path=str(path))
            connection.execute(insert(models).values(dataclasses.asdict(added)))
            self._database.log(connection, "model.added", model=name, manifest_sha256=manifest_sha256)
        return added

    def models(self) -> list[Model]:
        """Sorted by name."""
        with self._database.reading() as connection:
            found = [Model(**row._mapping) for row in connection.execute(select(models))]
        return sorted(found, key=lambda model: model.name)  # here: each database has an order of its own for text

    # --- Runs ---

    def submit(self, run_id: int, name: str, plan_toml: str, rounds: int) -> Run:
        """A new run in state "submitted"; `rounds` is how many the plan has in all."""
        now = self._database.clock.now()
        run = Run(run_id, name, "submitted", plan_toml, rounds, now, now)
        with self._database.writing("submit the run") as connection:
            connection.execute(insert(runs).values(dataclasses.asdict(run)))
            self._database.log(connection, "run.submitted", run=str(run_id), name=name)
        return run

    def run(self, run_id: int) -> Run:
        """Raises LocalError when there is none."""
        with self._database.reading() as connection:
            return _run(connection, run_id)

    def find(self, text: str) -> Run:
        """The run that a person means: by its id, or the newest of that name. Raises LocalError when there is none."""
        for run in self.all():
            if text in (str(run.run_id), run.name):
                return run
        raise LocalError(f"There is no run {text!r}; see `foedus run list`.")

    def all(self) -> list[Run]:
        """Newest first."""
        query = select(runs).order_by(runs.c.submitted_at.desc(), runs.c.run_id)
        with self._database.reading() as connection:
            return [Run(**row._mapping) for row in connection.execute(query)]

    def agree(self, run_id: int, signed_plan: bytes, plan_digest: bytes, spec: bytes) -> None:
        """Keep what was prepared and signed for the run. Raises LocalError when that was done before."""
        with self._database.writing("keep the agreed plan") as connection:
            if _run(connection, run_id).signed_plan is not None:
                raise LocalError(f"The run {run_id} has its agreed plan already.")
            self._change(connection, run_id, signed_plan=signed_plan, plan_digest=plan_digest, spec=spec)
            self._database.log(connection, "run.agreed", run=str(run_id), plan=plan_digest.hex())

    def move(self, run_id: int, states: Collection[RunState], to: RunState, reason: str | None = None) -> Run:
        """Into the state `to`, from one of `states`; gives the run as it is then.

        Raises:
            LocalError: the run is in none of them (any more).
        """
        with self._database.writing("change the run's state") as connection:
            run = _run(connection, run_id)
            if run.state not in states:
                raise LocalError(
                    f"The run {run.name} is {run.state}; this takes one that is {' or '.join(sorted(states))}."
                )
            self._change(connection, run_id, state=to, reason=reason)
            self._database.log(connection, f"run.{to}", run=str(run_id), reason=reason)
            return _run(connection, run_id)

    # --- Rounds ---

    def start_attempt(self, run_id: int, round_index: int) -> Attempt:
        """The next attempt at a round, numbered from 0; an earlier one that is still open is aborted by it."""
        now = self._database.clock.now()
        this_round = (attempts.c.run_id == run_id, attempts.c.round == round_index)
        with self._database.writing("start the attempt") as connection:
            last = connection.execute(select(func.max(attempts.c.attempt)).where(*this_round)).scalar()
            cut_short = connection.execute(
                update(attempts)
                .where(*this_round, attempts.c.state == "open")
                .values(state="aborted", ended_at=now, reason="interrupted")
            )
            if cut_short.rowcount:
                self._database.log(connection, "round.interrupted", run=str(run_id), round=round_index, attempt=last)
            attempt = Attempt(run_id, round_index, 0 if last is None else last + 1, "open", now)
            connection.execute(insert(attempts).values(_columns(attempt)))
        return attempt

    def save_attempt(self, attempt: Attempt) -> None:
        """Overwrite what is known of an open attempt. Raises LocalError when it ended before."""
        with self._database.writing("save the attempt") as connection:
            _replace_open(connection, attempt)

    def abort_attempt(self, attempt: Attempt, reason: str) -> Attempt:
        """Raises LocalError when it ended before."""
        ended = dataclasses.replace(attempt, state="aborted", ended_at=self._database.clock.now(), reason=reason)
        with self._database.writing("abort the attempt") as connection:
            _replace_open(connection, ended)
            self._log_attempt(connection, "round.aborted", ended, reason=reason)
        return ended

    def commit_attempt(self, attempt: Attempt) -> Attempt:
        """The round is done: the attempt is committed and the run counts one round more, both or neither.

        Raises:
            LocalError: the attempt ended before, left no adapter, or is not at the run's next round.
        """
        ended = dataclasses.replace(attempt, state="committed", ended_at=self._database.clock.now())
        if ended.adapter is None:
            raise LocalError(f"Round {attempt.round} of run {attempt.run_id} cannot be committed without its adapter.")
        with self._database.writing("commit the round") as connection:
            run = _run(connection, attempt.run_id)
            if run.rounds_done != attempt.round:
                raise LocalError(f"The run {run.name} is at round {run.rounds_done}, not at {attempt.round}.")
            _replace_open(connection, ended)
            self._change(connection, run.run_id, rounds_done=attempt.round + 1)
            self._log_attempt(
                connection,
                "round.committed",
                ended,
                cohort=ended.cohort,
                survivors=ended.survivors,
                adapter=ended.adapter.sha256,
            )
        return ended

    def attempts(self, run_id: int) -> list[Attempt]:
        """In order of round and attempt."""
        query = select(attempts).where(attempts.c.run_id == run_id).order_by(attempts.c.round, attempts.c.attempt)
        with self._database.reading() as connection:
            return [Attempt(**row._mapping) for row in connection.execute(query)]

    def committed(self, run_id: int) -> list[Attempt]:
        """The attempts that were committed, in order of round; the last one holds the run's current adapter."""
        return [attempt for attempt in self.attempts(run_id) if attempt.state == "committed"]

    # --- Evaluations ---

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Keep a result; one for the same run, round and data is replaced."""
        key = (
            evaluations.c.run_id == evaluation.run_id,
            evaluations.c.round == evaluation.round,
            evaluations.c.data == evaluation.data,
        )
        with self._database.writing("keep the evaluation") as connection:
            connection.execute(evaluations.delete().where(*key))
            connection.execute(insert(evaluations).values(dataclasses.asdict(evaluation)))
            details = dataclasses.asdict(evaluation) | {"run": str(evaluation.run_id)}
            del details["run_id"], details["at"]
            self._database.log(connection, "run.evaluated", **details)

    def evaluations(self, run_id: int) -> list[Evaluation]:
        """In order of round."""
        query = select(evaluations).where(evaluations.c.run_id == run_id).order_by(evaluations.c.round)
        with self._database.reading() as connection:
            return [Evaluation(**row._mapping) for row in connection.execute(query)]

    def _change(self, connection: Connection, run_id: int, **values: Any) -> None:
        now = self._database.clock.now()
        connection.execute(update(runs).where(runs.c.run_id == run_id).values(updated_at=now, **values))

    def _log_attempt(self, connection: Connection, event: str, attempt: Attempt, **details: Any) -> None:
        self._database.log(
            connection, event, run=str(attempt.run_id), round=attempt.round, attempt=attempt.attempt, **details
        )


def _run(connection: Connection, run_id: int) -> Run:
    row = connection.execute(select(runs).where(runs.c.run_id == run_id)).one_or_none()
    if row is None:
        raise LocalError(f"There is no run {run_id}; see `foedus run list`.")
    return Run(**row._mapping)


def _replace_open(connection: Connection, attempt: Attempt) -> None:
    key = (
        attempts.c.run_id == attempt.run_id,
        attempts.c.round == attempt.round,
        attempts.c.attempt == attempt.attempt,
    )
    changed = connection.execute(update(attempts).where(*key, attempts.c.state == "open").values(_columns(attempt)))
    if not changed.rowcount:
        raise LocalError(f"Attempt {attempt.attempt} at round {attempt.round} of run {attempt.run_id} is not open.")


def _columns(attempt: Attempt) -> dict[str, Any]:
    """Not `asdict`, which would turn the references to objects into dictionaries."""
    return {column.name: getattr(attempt, column.name) for column in dataclasses.fields(attempt)}
