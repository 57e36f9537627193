"""Both audits over real databases: a thousand random alterations each, and every one is named.

A failure means that somebody could alter, drop, move or cut off what a journal or the ledger tells, unseen.
"""

from __future__ import annotations

import random
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from answers import answered
from foedus_client import audit as site_audit
from foedus_client.ledger.accounts import Budget
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_common.errors import LocalError
from foedus_common.journal import BrokenChain
from foedus_common.objects import ObjectRef
from foedus_common.plan import schedule
from foedus_common.protocol.effects import AttemptSeen, VectorMasked
from foedus_common.protocol.messages import AttemptId, Consistency, MaskedInput, Unmask, VectorRef
from foedus_common.protocol.wire import COORDINATOR
from foedus_common.terms import round_terms
from foedus_server import audit as coordinator_audit
from foedus_server.store import Attempt
from known_sites import join_site, plan_of, submit
from operators import Operator

MUTATIONS = 1000
RUN = 7


class Federation:
    """A coordinator and one site after a round and two exchanges, on disk."""

    def __init__(self, folder: Path) -> None:
        self.operator = Operator(folder / "operator")
        self.member = join_site(self.operator, folder / "north", "north", self.operator.clock, [("a", "Eye")])
        self.store = SiteStore(folder / "north" / "site.db", self.operator.clock)
        self.ledger = Ledger(self.store, self.operator.clock, self.member.key.sign, self.member.public_key)
        site_audit.note_standing(self.store, self.member, SitePolicy())
        self._take_part()
        self.theirs = coordinator_audit.notary(self.operator.home, self.operator.store)
        self.ours = site_audit.notary(self.store, self.member)
        for _ in range(2):
            self.exchange()
        self.theirs.sign_end()
        self.ours.sign_end()

    def exchange(self) -> list[str]:
        request = self.theirs.show("north", self.theirs.sign_end())
        amiss = self.ours.take(COORDINATOR, self.theirs.public_key, request)
        answer = self.ours.show(COORDINATOR, self.ours.sign_end(), request.own)
        return amiss + self.theirs.take("north", self.member.public_key, answer)

    def go_on(self) -> None:
        """Both journals and the ledger grow, and each side signs and shows its new end."""
        self.operator.store.database.record("x")
        self.ledger._append("x")
        self.exchange()

    def verify_coordinator(self) -> None:
        coordinator_audit.verify(self.operator.home, self.operator.store)

    def verify_site(self) -> None:
        site_audit.verify(self.store, self.ledger, "north", self.member.public_key)

    def close(self) -> None:
        self.operator.close()
        self.store.close()

    def _take_part(self) -> None:
        runs = self.operator.store.runs
        _, agreed = submit(self.operator.home, self.operator.store, plan_of(rounds=2), RUN)
        self.store.put_plan(agreed.digest(), RUN, agreed.canonical(), bytes(64))
        self.ledger.reserve_run(agreed, Budget(40.0, 1e-5))
        self.store.decide_plan(agreed.digest(), "approved", "anna")
        for round_plan in schedule(agreed.plan):
            attempt: Attempt = runs.start_attempt(RUN, round_plan.index)
            where = AttemptId(RUN, round_plan.index, 0)
            vector, masked = VectorRef(bytes([round_plan.index]) * 32, 800), VectorRef(b"m" * 32, 800)
            charge = self.ledger.reserve_round(RUN, round_plan.index)
            self.ledger.release(charge, round_terms(agreed, round_plan, ObjectRef("d" * 64, 400)), vector)
            self.store.persist([AttemptSeen(where)])
            self.store.persist([VectorMasked(where, vector, masked), answered(where, 2, MaskedInput(masked))])
            self.store.persist([answered(where, 3, Consistency(bytes(64)))])
            self.ledger.commit(RUN, round_plan.index)
            self.store.persist([answered(where, 4, Unmask(()))])
            runs.abort_attempt(attempt, "TOO_FEW_SITES")


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        yield federation
        federation.close()


Row = list[Any]


class Table:
    """A table of a database, to be altered behind the program's back and put right again. Its triggers are gone."""

    def __init__(self, file: Path, name: str) -> None:
        self.name = name
        self._file = file
        with closing(sqlite3.connect(file)) as db, db:
            for (trigger,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                db.execute(f"DROP TRIGGER {trigger}")
            self.rows: list[Row] = [list(row) for row in db.execute(f"SELECT * FROM {name} ORDER BY number")]

    def write(self, rows: list[Row]) -> None:
        with closing(sqlite3.connect(self._file)) as db, db:
            db.execute(f"DELETE FROM {self.name}")
            places = ", ".join("?" * len(self.rows[0]))
            db.executemany(f"INSERT INTO {self.name} VALUES ({places})", rows)


def flipped(draw: random.Random, rows: list[Row]) -> tuple[list[Row], int]:
    """One bit of one row, in any column of bytes."""
    place = draw.randrange(len(rows))
    column = draw.choice([index for index, value in enumerate(rows[place]) if isinstance(value, bytes)])
    value = bytearray(rows[place][column])
    value[draw.randrange(len(value))] ^= 1 << draw.randrange(8)
    return [*rows[:place], [*rows[place][:column], bytes(value), *rows[place][column + 1 :]], *rows[place + 1 :]], place


def dropped(draw: random.Random, rows: list[Row]) -> tuple[list[Row], int]:
    """One row, and perhaps those after it moved up."""
    place = draw.randrange(len(rows))
    up = draw.choice((0, 1))
    return rows[:place] + [[row[0] - up, *row[1:]] for row in rows[place + 1 :]], place


def reordered(draw: random.Random, rows: list[Row]) -> tuple[list[Row], int]:
    """Two rows change places."""
    one, other = sorted(draw.sample(range(len(rows)), 2))
    moved = [list(row) for row in rows]
    moved[one], moved[other] = [rows[one][0], *rows[other][1:]], [rows[other][0], *rows[one][1:]]
    return moved, one


def truncated(draw: random.Random, rows: list[Row]) -> tuple[list[Row], int]:
    """The end is cut off."""
    place = draw.randrange(len(rows))
    return rows[:place], place


KINDS: list[Callable[[random.Random, list[Row]], tuple[list[Row], int]]] = [flipped, dropped, reordered, truncated]


def assert_each_alteration_is_named(table: Table, verify: Callable[[], None], log: str, count: int) -> None:
    draw = random.Random(f"alterations of {table.name}")
    for number in range(count):
        rows, place = KINDS[number % len(KINDS)](draw, table.rows)
        table.write(rows)
        with pytest.raises(BrokenChain) as error:
            verify()
        assert str(error.value).startswith(f"The {log} is broken at entry {place + 1}:"), (number, str(error.value))
    table.write(table.rows)
    verify()


def test_every_alteration_of_the_coordinator_s_journal_is_named(federation: Federation) -> None:
    table = Table(federation.operator.home.path / "foedus.db", "journal")
    assert_each_alteration_is_named(table, federation.verify_coordinator, "journal", MUTATIONS)


def test_every_alteration_of_a_site_s_journal_or_ledger_is_named(federation: Federation) -> None:
    for name in ("journal", "ledger"):
        table = Table(federation.store.path, name)
        assert_each_alteration_is_named(table, federation.verify_site, name, MUTATIONS // 2)


@pytest.mark.parametrize("side", ["coordinator", "site"])
@pytest.mark.parametrize("name", ["heads", "countersignatures"])
def test_an_altered_head_or_signature_is_named(federation: Federation, side: str, name: str) -> None:
    file = federation.operator.home.path / "foedus.db" if side == "coordinator" else federation.store.path
    verify = federation.verify_coordinator if side == "coordinator" else federation.verify_site
    table, draw = Table(file, name), random.Random(side + name)
    for _ in range(100):
        rows, _ = flipped(draw, table.rows)
        table.write(rows)
        with pytest.raises(BrokenChain):
            verify()
    table.write(table.rows)
    verify()


def test_a_ledger_that_was_rewritten_and_signed_anew_is_not_what_the_journal_tells_of(federation: Federation) -> None:
    """Even with the site's own key: the journal, and so the coordinator's signature over its head, names each entry."""
    from foedus_common.canonical import labelled
    from foedus_common.journal import START, Checkpoint, next_entry

    table, end, rows = Table(federation.store.path, "ledger"), START, []
    for entry, _ in federation.store.ledger_entries()[:-1]:
        details = entry.event
        rewritten = next_entry(end, details.pop("at") + 1, details.pop("event"), details)
        end = Checkpoint(rewritten.number, rewritten.head)
        signature = federation.member.key.sign(labelled("ledger", end.number, end.head))
        rows.append([end.number, rewritten.body, end.head, signature])
    table.write(rows)
    assert federation.ledger.verify(federation.member.public_key) == end
    with pytest.raises(BrokenChain, match="ledger is broken at entry 1: it is not the one that entry"):
        federation.verify_site()
    table.write(table.rows)


# --- While the programs go on ---


def test_a_coordinator_that_goes_on_while_it_is_audited_is_whole(tmp_path: Path) -> None:
    with closing(Federation(tmp_path)) as federation:
        home = federation.operator.home
        auditor = home.store(federation.operator.clock)
        reading = auditor.database.reading

        @contextmanager
        def and_then_more(*what: str) -> Iterator[Any]:
            with reading(*what) as connection:
                yield connection
            federation.go_on()

        auditor.database.reading = and_then_more  # type: ignore[method-assign]
        coordinator_audit.verify(home, auditor)
        assert federation.operator.events().count("x") == 3
        coordinator_audit.verify(home, auditor)
        auditor.close()


def test_a_site_that_goes_on_while_it_is_audited_is_whole(tmp_path: Path) -> None:
    """Journal and ledger are read at one moment, in which the daemon has to wait."""
    with closing(Federation(tmp_path)) as federation:
        auditor, waited = SiteStore(federation.store.path, federation.operator.clock), []
        federation.store._db.execute("PRAGMA busy_timeout = 0")
        read = auditor._all

        def and_then_more(*query: Any) -> list[sqlite3.Row]:
            rows = read(*query)
            try:
                federation.go_on()
            except LocalError:
                waited.append(query)
            return rows

        auditor._all = and_then_more  # type: ignore[method-assign]
        ledger = Ledger(auditor, federation.operator.clock, federation.member.key.sign)
        for _ in range(2):
            site_audit.verify(auditor, ledger, "north", federation.member.public_key)
        assert len(waited) == 2 * 4
        assert [entry.event["event"] for entry, _ in federation.store.ledger_entries()].count("x") >= 2
        auditor.close()
