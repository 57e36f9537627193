"""The site's journal: each fact is entered with the change that it tells of, both or neither, and stays as it is."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from answers import answered
from foedus_client.store import SiteStore
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError
from foedus_common.journal import START, next_entry, verify
from foedus_common.protocol.effects import AttemptSeen, VectorMasked
from foedus_common.protocol.messages import AttemptId, Consistency, MaskedInput, Unmask, VectorRef

RUN = 2**62
ATTEMPT = AttemptId(RUN, 3, 0)
PLAN = b"d" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SiteStore]:
    store = SiteStore(tmp_path / "site.db", ManualClock())
    yield store
    store.close()


def events(store: SiteStore) -> list[str]:
    return [entry.event["event"] for entry in store.journal_entries()]


def test_what_the_store_keeps_is_entered_in_order(store: SiteStore) -> None:
    store.add_model("minilm", "a" * 64, Path("/models/a"))
    store.add_model("minilm", "a" * 64, Path("/models/b"))
    store.put_plan(PLAN, RUN, b"plan", bytes(64))
    store.put_plan(PLAN, RUN, b"plan", bytes(64))
    store.decide_plan(PLAN, "approved", "anna")
    store.decide_plan(PLAN, "approved", "anna")
    store.append_entry(next_entry(START, 0.0, "reserve_round", {"run_id": RUN, "round": 3}), bytes(64))
    store.persist([AttemptSeen(ATTEMPT)])
    kept = (MaskedInput(VectorRef(bytes(32), 800)), Consistency(bytes(64)), Unmask(()))
    store.persist([answered(ATTEMPT, sequence, message) for sequence, message in enumerate(kept, start=2)])
    store.pause("anna")
    store.resume()
    assert events(store) == [
        "model.added",
        "plan.received",
        "plan.approved",
        "ledger.reserve_round",
        "attempt.begun",
        "survivors.signed",
        "unmasking.answered",
        "site.paused",
        "site.resumed",
    ]
    assert verify(store.journal_entries()) == store.journal_end()
    ledger = store.journal_entries()[3].event
    assert (ledger["run"], ledger["round"], ledger["entry"]) == (str(RUN), 3, 1)
    assert ledger["head"] == store.ledger_end().head.hex()


def test_a_fact_that_is_refused_is_not_entered(store: SiteStore) -> None:
    store.put_plan(PLAN, RUN, b"plan", bytes(64))
    with pytest.raises(LocalError, match="cannot become"):
        store.decide_plan(PLAN, "withdrawn", "anna")
    with pytest.raises(LocalError, match="contradicts"):
        store.persist([AttemptSeen(ATTEMPT), AttemptSeen(ATTEMPT)])
    with pytest.raises(LocalError, match="not in the outbox"):
        store.persist([VectorMasked(ATTEMPT, VectorRef(b"v" * 32, 8), VectorRef(b"m" * 32, 8))])
    assert events(store) == ["plan.received"]


def test_the_journal_is_append_only_even_for_sql(store: SiteStore) -> None:
    store.log("x")
    for statement in ("UPDATE journal SET body = x'00'", "DELETE FROM journal"):
        with sqlite3.connect(store.path) as other, pytest.raises(sqlite3.IntegrityError, match="append-only"):
            other.execute(statement)
    assert events(store) == ["x"]


def test_a_database_of_the_version_before_is_brought_up_to_date(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "site.db") as older:
        older.executescript((Path(__file__).parent / "site_version_2.sql").read_text())
    for _ in range(2):
        store = SiteStore(tmp_path / "site.db", ManualClock())
        assert store.plan_of_run(7)
        assert store.ledger_end().number == 4
        store.log("x")
        store.close()
    assert events(SiteStore(tmp_path / "site.db", ManualClock())) == ["x", "x"]
    made, migrated = (
        SiteStore(tmp_path / name, ManualClock())._all("SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2")
        for name in ("new.db", "site.db")
    )
    assert list(map(tuple, made)) == list(map(tuple, migrated))
