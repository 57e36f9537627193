"""The site's database: durable, write-once where it must be, shared by threads and processes.

A failure means that a fact could be lost, or silently replaced by another.
"""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from answers import answered
from foedus_client.store import Dataset, SiteStore
from foedus_client.store.plans import MAX_ENDED, MAX_OPEN
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError, RemoteError
from foedus_common.journal import START, next_entry
from foedus_common.objects import ObjectRef
from foedus_common.plan import schedule
from foedus_common.protocol.effects import Arrived, AttemptSeen, VectorMasked
from foedus_common.protocol.messages import AttemptId, Consistency, RoundTerms, Unmask, VectorRef
from foedus_common.terms import round_terms
from plans import agreed_plan

ATTEMPT = AttemptId(7, 3, 0)
VECTOR = VectorRef(b"v" * 32, 800)
MASKED = VectorRef(b"m" * 32, 800)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SiteStore]:
    store = SiteStore(tmp_path / "site.db", ManualClock())
    yield store
    store.close()


def terms(round_index: int = 3) -> RoundTerms:
    agreed = agreed_plan()
    return round_terms(agreed, schedule(agreed.plan)[round_index], ObjectRef("d" * 64, 400))


def with_vector(store: SiteStore, vector: VectorRef = VECTOR) -> None:
    """A vector and the ledger's entry that pays for it."""
    entry = next_entry(store.ledger_end(), 0.0, "reserve_round", {})
    store.append_entry(entry, bytes(64))
    store.put_vector(entry.number, terms(), vector)


def test_the_file_is_private_and_every_commit_is_flushed(store: SiteStore) -> None:
    for path in store.path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (mode,) = store._one("PRAGMA journal_mode")
    (synchronous,) = store._one("PRAGMA synchronous")
    assert (mode, synchronous) == ("wal", 2)  # 2 is FULL: the log is flushed before a commit returns


def test_what_was_committed_is_there_for_another_connection_at_once(store: SiteStore) -> None:
    other = SiteStore(store.path, ManualClock())
    before = other.version()
    store.set_meta("paused", "yes")
    assert other.meta("paused") == "yes"
    assert other.version() != before
    assert other.meta("unknown") is None
    other.close()


def test_a_failed_transaction_leaves_nothing_behind(store: SiteStore) -> None:
    def fail() -> None:
        with store.transaction("outer"):
            store.set_meta("a", "1")
            with store.transaction("inner"):
                store.set_meta("b", "1")
            raise LocalError("stop")

    with pytest.raises(LocalError, match="stop"):
        fail()
    assert store.meta("a") is None
    assert store.meta("b") is None
    store.set_meta("a", "2")
    assert store.meta("a") == "2"


def test_threads_take_turns(store: SiteStore) -> None:
    store.set_meta("count", "0")

    def add() -> None:
        for _ in range(20):
            with store.transaction("count"):
                store.set_meta("count", str(int(store.meta("count") or 0) + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.meta("count") == "80"


COUNT = """
import sys
from pathlib import Path
from foedus_client.store import SiteStore
from foedus_common.clock import ManualClock

store = SiteStore(Path(sys.argv[1]), ManualClock())
for _ in range(20):
    with store.transaction("count"):
        store.set_meta("count", str(int(store.meta("count")) + 1))
"""


def test_processes_take_turns(store: SiteStore) -> None:
    store.set_meta("count", "0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(store.path)]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert store.meta("count") == "40"


def test_a_file_that_is_no_database_is_refused_with_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "site.db"
    path.write_text("this is something else entirely, and long enough to be looked at")
    with pytest.raises(LocalError, match="cannot be opened"):
        SiteStore(path, ManualClock())


def test_a_newer_schema_is_refused(store: SiteStore) -> None:
    store._db.execute("PRAGMA user_version = 99")
    with pytest.raises(LocalError, match="schema version 99"):
        SiteStore(store.path, ManualClock())


def test_a_plan_is_stored_once_and_decided_forwards(store: SiteStore) -> None:
    plan = store.put_plan(b"d" * 32, 7, b"bytes", b"s" * 64)
    assert plan.state == "pending"
    assert store.put_plan(b"d" * 32, 7, b"bytes", b"s" * 64) == plan
    with pytest.raises(LocalError, match="another plan"):
        store.put_plan(b"e" * 32, 7, b"other", b"s" * 64)
    approved = store.decide_plan(b"d" * 32, "approved", "ada")
    assert (approved.state, approved.decided_by, approved.decided_at) == ("approved", "ada", ManualClock().now())
    assert store.decide_plan(b"d" * 32, "approved", "bob") == approved
    assert store.decide_plan(b"d" * 32, "finished", "coordinator").state == "finished"
    with pytest.raises(LocalError, match="is finished and cannot become approved"):
        store.decide_plan(b"d" * 32, "approved", "ada")
    with pytest.raises(LocalError, match="No plan"):
        store.decide_plan(b"f" * 32, "approved", "ada")
    assert [p.run_id for p in store.plans()] == [7]
    assert store.plan_of_run(7) == store.plan(b"d" * 32)
    assert store.plan_of_run(8) is None


def test_a_plan_that_was_turned_down_stays_down(store: SiteStore) -> None:
    store.put_plan(b"d" * 32, 7, b"bytes", b"s" * 64)
    store.decide_plan(b"d" * 32, "declined", "ada")
    store.put_plan(b"e" * 32, 8, b"bytes", b"s" * 64)
    store.decide_plan(b"e" * 32, "approved", "ada")
    store.decide_plan(b"e" * 32, "withdrawn", "ada")
    for digest in (b"d" * 32, b"e" * 32):
        for again in ("approved", "pending"):
            with pytest.raises(LocalError, match=f"cannot become {again}"):
                store.decide_plan(digest, again, "ada")  # type: ignore[arg-type]


def test_a_plan_whose_run_was_stopped_is_decided_anew(store: SiteStore) -> None:
    store.put_plan(b"d" * 32, 7, b"bytes", b"s" * 64)
    store.decide_plan(b"d" * 32, "approved", "ada")
    store.decide_plan(b"d" * 32, "stopped", "coordinator")
    with pytest.raises(LocalError, match="cannot become approved"):
        store.decide_plan(b"d" * 32, "approved", "ada")
    store.decide_plan(b"d" * 32, "pending", "coordinator")
    assert store.decide_plan(b"d" * 32, "approved", "ada").state == "approved"


def test_models_have_one_name_each(store: SiteStore) -> None:
    store.add_model("minilm", "a" * 64, Path("/models/minilm"))
    store.add_model("minilm", "a" * 64, Path("/elsewhere"))
    with pytest.raises(LocalError, match="already, as 'minilm'"):
        store.add_model("other", "a" * 64, Path("/models/minilm"))
    with pytest.raises(LocalError, match="has the name 'minilm'"):
        store.add_model("minilm", "b" * 64, Path("/models/other"))
    assert [(model.name, model.path) for model in store.models()] == [("minilm", Path("/elsewhere"))]
    assert store.model("a" * 64) == store.models()[0]
    assert store.model("b" * 64) is None


def test_datasets_come_back_as_they_were_added(store: SiteStore) -> None:
    dataset = Dataset("notes", "notes", Path("/d.csv"), "note", "chapter", "f" * 64, "r" * 64, 2, {"Eye": 2}, 5.0)
    store.add_dataset(dataset, b"k" * 32)
    assert store.datasets() == [dataset]
    assert store.dataset("notes") == dataset
    assert store.dataset("other") is None
    assert store.row_keys("notes") == b"k" * 32
    with pytest.raises(LocalError, match="exists already"):
        store.add_dataset(replace(dataset, rows_sha256="s" * 64), b"")


def test_the_ledger_is_append_only_even_for_sql(store: SiteStore) -> None:
    entry = next_entry(START, 0.0, "anything", {})
    store.append_entry(entry, bytes(64))
    with pytest.raises(LocalError, match="contradicts"):
        store.append_entry(entry, bytes(64))
    for statement in ("UPDATE ledger SET body = x'00'", "DELETE FROM ledger"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store._db.execute(statement)
    assert store.ledger_entries() == [(entry, bytes(64))]


def test_a_vector_waits_with_everything_that_decides_whether_it_may_be_masked(store: SiteStore) -> None:
    assert store.outbox(7, 3) is None
    with_vector(store)
    waiting = store.outbox(7, 3)
    assert waiting is not None
    assert (waiting.terms, waiting.vector, waiting.charged) == (terms(), VECTOR, True)
    assert (waiting.masked_in, waiting.attempts_seen) == (None, frozenset())
    assert store.outbox(7, 4) is None

    store.persist([AttemptSeen(ATTEMPT), AttemptSeen(AttemptId(7, 3, 1))])
    store.persist([VectorMasked(ATTEMPT, VECTOR, MASKED)])
    masked = store.outbox(7, 3)
    assert masked is not None
    assert masked.masked_in == ATTEMPT
    assert masked.attempts_seen == {ATTEMPT, AttemptId(7, 3, 1)}


def test_a_vector_is_masked_once_ever(store: SiteStore) -> None:
    with_vector(store)
    store.persist([VectorMasked(ATTEMPT, VECTOR, MASKED)])
    with pytest.raises(LocalError, match="masked before"):
        store.persist([VectorMasked(AttemptId(7, 3, 1), VECTOR, MASKED)])
    with pytest.raises(LocalError, match="not in the outbox"):
        store.persist([VectorMasked(ATTEMPT, VectorRef(b"x" * 32, 800), MASKED)])


def test_the_newest_vector_of_a_round_is_the_one_that_waits(store: SiteStore) -> None:
    with_vector(store)
    store.persist([VectorMasked(ATTEMPT, VECTOR, MASKED)])
    again = VectorRef(b"w" * 32, 800)
    with_vector(store, again)
    waiting = store.outbox(7, 3)
    assert waiting is not None
    assert (waiting.vector, waiting.masked_in) == (again, None)


def test_an_attempt_is_begun_once_and_a_sequence_answered_once(store: SiteStore) -> None:
    first = answered(ATTEMPT, 3, Consistency(bytes(64)), b"q" * 32)
    second = answered(ATTEMPT, 4, Unmask(()), b"r" * 32)
    store.persist([AttemptSeen(ATTEMPT), first])
    store.persist([second])
    assert store.answered(ATTEMPT) == second
    assert store.answered(AttemptId(7, 3, 1)) is None
    for repeated in (AttemptSeen(ATTEMPT), answered(ATTEMPT, 4, Unmask(()), b"s" * 32)):
        with pytest.raises(LocalError, match="contradicts"):
            store.persist([repeated])
    assert store.answered(ATTEMPT) == second


def test_a_step_s_records_are_written_all_or_none(store: SiteStore) -> None:
    with pytest.raises(LocalError, match="no Arrived"):
        store.persist([AttemptSeen(ATTEMPT), Arrived("a", b"")])
    store.persist([AttemptSeen(ATTEMPT)])


def test_open_plans_are_few_and_of_those_that_ended_the_oldest_are_forgotten(store: SiteStore) -> None:
    def put(number: int) -> bytes:
        return store.put_plan(number.to_bytes(32), number, b"plan", bytes(64)).digest

    waiting = [put(number) for number in range(MAX_OPEN)]
    with pytest.raises(RemoteError, match=f"QUOTA: {MAX_OPEN} plans are open here"):
        put(1000)
    store.decide_plan(waiting[0], "stopped", "coordinator")
    put(1000)
    with pytest.raises(RemoteError, match="QUOTA"):
        store.decide_plan(waiting[0], "pending", "coordinator")
    for number in range(2000, 2000 + MAX_ENDED):
        store.decide_plan((1000 if number == 2000 else number - 1).to_bytes(32), "declined", "policy")
        put(number)
    assert store.plan(waiting[0]) is None
    assert len(store.plans()) == MAX_OPEN + MAX_ENDED
    assert sum(entry.event["event"] == "plan.received" for entry in store.journal_entries()) == MAX_OPEN + MAX_ENDED + 1


def test_answers_are_kept_while_their_run_may_go_on(store: SiteStore) -> None:
    store.put_plan(bytes(32), 7, b"plan", bytes(64))
    store.decide_plan(bytes(32), "approved", "ada")
    store.persist([AttemptSeen(ATTEMPT), answered(ATTEMPT, 3, Consistency(bytes(64)))])
    store.decide_plan(bytes(32), "stopped", "coordinator")
    assert store.answered(ATTEMPT) is not None
    store.decide_plan(bytes(32), "pending", "coordinator")
    store.decide_plan(bytes(32), "approved", "ada")
    store.decide_plan(bytes(32), "finished", "coordinator")
    assert store.answered(ATTEMPT) is None
    with pytest.raises(LocalError, match="contradicts"):
        store.persist([AttemptSeen(ATTEMPT)])  # that it was begun is never forgotten
