"""The coordinator's database: what is committed is whole, and threads and processes share it without losing a word."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import text

import postgresql
from foedus_common.checkpoints import Head
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError
from foedus_common.journal import verify
from foedus_common.objects import ObjectRef
from foedus_server.config import Settings
from foedus_server.store import Attempt, Certificate, DatabaseAway, Evaluation, Store, database, engine
from foedus_simulations.parties import until

ADAPTER, OPTIMIZER = ObjectRef("a" * 64, 1_500), ObjectRef("b" * 64, 1)
RUN = 2**63 - 1


ON_SQLITE = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store.create(url, ManualClock())
    yield store
    store.close()


def clock_of(store: Store) -> ManualClock:
    assert isinstance(store.database.clock, ManualClock)
    return store.database.clock


def events(store: Store) -> list[str]:
    return [entry.event["event"] for entry in store.database.entries()]


def submitted(store: Store, run_id: int = RUN, name: str = "icd-chapters") -> None:
    store.runs.submit(run_id, name, "[run]", rounds=2)


# --- The file ---


@ON_SQLITE
def test_only_the_owner_can_read_any_of_its_files(store: Store, tmp_path: Path) -> None:
    submitted(store)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["foedus.db", "foedus.db-shm", "foedus.db-wal"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600] * 3


def test_a_database_is_made_once_and_opened_only_when_it_is_there(store: Store, url: str, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="not overwritten"):
        Store.create(url, ManualClock())
    assert store.database.entries() == []  # and as it was
    with pytest.raises(LocalError, match=r"no database .*absent\.db; `foedus init`"):
        Store.open(f"sqlite:///{tmp_path / 'absent.db'}", ManualClock())
    assert not (tmp_path / "absent.db").exists()


def test_a_database_of_another_version_is_refused(store: Store, url: str) -> None:
    with store.database.writing("be of the future") as connection:
        connection.execute(text("UPDATE meta SET value = '99' WHERE key = 'schema'"))
    with pytest.raises(LocalError, match="version 99, and this Foedus knows 1 to 2"):
        Store.open(url, ManualClock())


@pytest.mark.parametrize("name", ["empty", "text"])
def test_a_file_that_is_no_database_of_ours_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"" if name == "empty" else b"not a database" * 100)
    with pytest.raises(LocalError, match="is no database of Foedus"):
        Store.open(f"sqlite:///{tmp_path / name}", ManualClock())


@pytest.mark.parametrize(
    "wrong",
    [
        "no url",
        "postgresql://host:port/name",
        "oracle17://host/name",
        "mysql://host/name",
        "postgresql+nodriver:///name",
    ],
)
def test_a_url_that_nothing_here_can_open_is_refused(wrong: str) -> None:
    with pytest.raises(LocalError, match="database"):
        Store.create(wrong, ManualClock())


@pytest.mark.parametrize(
    "secret",
    [
        "postgresql://user:hunter2@host/name",
        "postgresql+nodriver://user:hunter2@host/name",
        "postgresql://user@host/name?password=hunter2",
        "postgresql://user@host/name?sslpassword=hunter2",
    ],
)
def test_a_url_with_a_secret_in_it_is_refused_and_not_shown(secret: str) -> None:
    for use in (lambda: Store.open(secret, ManualClock()), lambda: Settings("Test", database=secret)):
        with pytest.raises(LocalError, match=r"holds a password.*~/\.pgpass") as error:
            use()
        assert "hunter2" not in str(error.value)


def test_tables_of_the_version_before_are_brought_up_to_date_once(url: str, tmp_path: Path) -> None:
    older(url)
    stores = [Store.open(url, ManualClock()) for _ in range(2)]
    for store in stores:
        assert [site.name for site in store.members.sites()] == ["north"]
        assert store.runs.committed(RUN)[0].adapter == ADAPTER
        assert store.journal.heads() == []
    assert events(stores[0])[-2:] == ["round.committed", "database.migrated"]
    assert verify(stores[1].database.entries()).number == len(events(stores[0]))
    made = Store.create(f"sqlite:///{tmp_path / 'made.db'}", ManualClock())
    for store in (made, *stores):
        store.journal.keep([Head("north", 1, b"h" * 32, b"s" * 64, b"k" * 32)])
        assert len(store.journal.heads("north")) == 1
        store.close()


def older(url: str) -> None:
    """What version 1 left behind."""
    if url.startswith("sqlite"):
        with sqlite3.connect(url.removeprefix("sqlite:///")) as file:
            file.executescript((Path(__file__).parent / "foedus_version_1.sql").read_text())
        return
    with tempfile.TemporaryDirectory() as folder:
        older(file_url := f"sqlite:///{folder}/foedus.db")
        migrated = Store.open(file_url, ManualClock())
        migrated.database.copy_into(url)
        migrated.close()
    with engine.open_engine(url).connect().execution_options(foedus="write") as connection, connection.begin():
        for statement in (
            "DROP TABLE heads",
            "DROP TABLE countersignatures",
            "DELETE FROM journal WHERE number = (SELECT max(number) FROM journal)",
            "UPDATE meta SET value = '1' WHERE key = 'schema'",
        ):
            connection.execute(text(statement))


# --- One writer, one service ---


def test_of_two_services_on_one_database_the_second_is_refused(
    store: Store, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "GONE_SECONDS", 0.1)
    other = Store.open(url, ManualClock())
    store.database.claim()
    store.database.claim()
    with pytest.raises(LocalError, match="Another `foedus up` works with this database"):
        other.database.claim()
    other.database.record("x")  # an operator's command goes on beside it
    store.close()
    other.database.claim()
    other.close()


def test_a_reader_sees_one_moment(store: Store, url: str) -> None:
    submitted(store)
    other = Store.open(url, ManualClock())
    with store.database.reading() as connection:
        count = text("SELECT count(*) FROM journal")
        before = connection.execute(count).scalar_one()
        other.database.record("x")
        assert connection.execute(count).scalar_one() == before
    assert events(store) == ["run.submitted", "x"]
    other.close()


def test_a_service_that_has_just_been_killed_is_waited_for(
    postgresql_server: postgresql.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session ends when the server notices; here that is when the next service waits for it."""
    monkeypatch.setattr(database, "GONE_SECONDS", 60)
    url = postgresql_server.database()
    killed, following = Store.create(url, ManualClock()), Store.open(url, ManualClock())
    killed.database.claim()
    waiting = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")

    def awaited() -> bool:
        with killed.database.reading() as connection:
            return bool(connection.execute(waiting).scalar_one())

    with ThreadPoolExecutor() as threads:
        claim = threads.submit(following.database.claim)
        until(awaited, 60, "the next service's waiting")
        killed.close()
        claim.result()
    following.close()


def test_a_server_that_goes_down_is_waited_for(
    postgresql_server: postgresql.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "GONE_SECONDS", 0.1)
    url = postgresql_server.database()
    store = Store.create(url, ManualClock())
    store.database.claim()
    other = Store.open(url, ManualClock())
    postgresql_server.stop()
    try:
        for use in (store.database.claim, store.runs.all, lambda: store.database.record("x"), store.database.claim):
            with pytest.raises(DatabaseAway, match="The database could not"):
                use()
        with pytest.raises(DatabaseAway):
            Store.open(url, ManualClock())
    finally:
        postgresql_server.start()
    assert store.runs.all() == []
    store.database.record("x")
    store.database.claim()
    with pytest.raises(LocalError, match="Another `foedus up`"):
        other.database.claim()
    assert events(store) == ["x"]
    for each in (store, other):
        each.close()


def test_names_are_sorted_alike_on_both(store: Store) -> None:
    names = ["a-z", "a0", "aa", "b", "a-"]
    for number, name in enumerate(names):
        store.members.add_token(bytes([number]) * 32, name, "Org", 1.0)
        store.runs.add_model(name, "a" * 64, Path("/models"))
    assert [site.name for site in store.members.sites()] == sorted(names)
    assert [model.name for model in store.runs.models()] == sorted(names)


# --- Copies ---


def test_a_copy_holds_everything_and_can_be_put_into_another_kind(store: Store, url: str, tmp_path: Path) -> None:
    submitted(store)
    attempt = replace(store.runs.start_attempt(RUN, 0), cohort=("north",), seconds={"train": 1.5}, adapter=ADAPTER)
    store.runs.commit_attempt(attempt)
    store.members.add_token(b"h" * 32, "north", "Nordklinik", 1.0)
    store.journal.keep([Head("north", 1, b"h" * 32, b"s" * 64, b"k" * 32)])
    store.database.copy_to(tmp_path / "copy.db")
    assert (tmp_path / "copy.db").stat().st_mode & 0o777 == 0o600
    copy = Store.open(f"sqlite:///{tmp_path / 'copy.db'}", ManualClock())
    for each in (copy, store):
        with pytest.raises(LocalError, match="not overwritten"):
            each.database.copy_into(url)
    copy.database.copy_into(f"sqlite:///{tmp_path / 'again.db'}")
    again = Store.open(f"sqlite:///{tmp_path / 'again.db'}", ManualClock())
    for each in (copy, again):
        assert each.database.entries() == store.database.entries()
        assert each.runs.attempts(RUN) == store.runs.attempts(RUN)
        assert each.members.sites() == store.members.sites()
        assert each.journal.heads() == store.journal.heads()
        each.close()


# --- Transactions ---


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    def fail() -> None:
        with store.database.writing("fail") as connection:
            store.database.log(connection, "lost")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert events(store) == []


def test_a_busy_database_is_one_sentence(store: Store, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_SECONDS", 0.001)
    other = Store.open(url, ManualClock())
    with store.database.writing("hold the lock"):
        with pytest.raises(LocalError, match=r"could not write the journal: (database is locked|.* lock timeout)"):
            other.database.record("x")
        assert other.runs.all() == []  # readers do not wait
    other.database.record("x")
    assert events(store) == ["x"]
    other.close()


def test_threads_write_one_chain(store: Store) -> None:
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda number: store.database.record("x", number=number), range(64)))
    assert verify(store.database.entries()).number == 64
    assert sorted(entry.event["number"] for entry in store.database.entries()) == list(range(64))


def test_processes_write_one_chain(store: Store, url: str) -> None:
    script = (
        "import sys; from foedus_common.clock import ManualClock; from foedus_server.store import Store\n"
        "store = Store.open(sys.argv[1], ManualClock())\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for number in range(50): store.database.record('theirs', number=number)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        for number in range(50):
            store.database.record("ours", number=number)
    assert other.returncode == 0
    assert verify(store.database.entries()).number == 100
    assert events(store).count("theirs") == 50


def test_the_journal_is_read_in_parts(store: Store) -> None:
    for number in range(5):
        store.database.record("x", number=number)
    assert [entry.number for entry in store.database.entries(after=2, limit=2)] == [3, 4]


# --- Members ---


def test_a_certificate_of_a_key_that_lost_its_approval_is_not_accepted(store: Store) -> None:
    members, now = store.members, clock_of(store).now()
    members.add_token(b"h" * 32, "north", "Nordklinik", now + 60)
    members.use_token(b"h" * 32, b"k" * 32, b"request")
    certificate = Certificate(b"c" * 32, "north", b"der", now + 60)
    assert not members.add_certificate(certificate, b"k" * 32)
    members.approve("north", b"k" * 32)
    assert not members.add_certificate(certificate, b"K" * 32)
    assert not members.add_certificate(replace(certificate, site="south"), b"k" * 32)
    assert members.add_certificate(certificate, b"k" * 32)
    assert members.certificates() == [certificate]
    members.revoke("north")
    assert members.certificates() == []
    assert not members.add_certificate(replace(certificate, sha256=b"C" * 32), b"k" * 32)


def test_one_token_binds_one_of_many_that_come_at_once(store: Store) -> None:
    store.members.add_token(b"h" * 32, "north", "Nordklinik", clock_of(store).now() + 60)
    keys = [bytes([number]) * 32 for number in range(8)]
    with ThreadPoolExecutor(8) as threads:
        uses = list(threads.map(lambda key: store.members.use_token(b"h" * 32, key, b"request"), keys))
    bound = {use.public_key for use in uses if use is not None}
    assert len(bound) == 1
    site = store.members.site("north")
    assert site is not None
    assert {site.waiting_key} == bound
    assert events(store) == ["site.invited", "site.enrolled"]


# --- Models ---


def test_a_model_keeps_its_name(store: Store) -> None:
    added = store.runs.add_model("minilm", "a" * 64, Path("/models/a"))
    moved = store.runs.add_model("minilm", "a" * 64, Path("/models/b"))
    assert moved == replace(added, path="/models/b")
    assert store.runs.models() == [moved]
    with pytest.raises(LocalError, match="Another model is called 'minilm'"):
        store.runs.add_model("minilm", "b" * 64, Path("/models/c"))
    assert store.runs.models() == [moved]


# --- Runs ---


def test_a_run_is_found_by_its_id_and_by_the_newest_of_its_name(store: Store) -> None:
    submitted(store, 5)
    clock_of(store).advance(1)
    submitted(store, RUN)
    assert [run.run_id for run in store.runs.all()] == [RUN, 5]
    assert store.runs.find("5").run_id == 5
    assert store.runs.find("icd-chapters").run_id == RUN
    assert store.runs.run(5).state == "submitted"
    for missing in (lambda: store.runs.find("absent"), lambda: store.runs.run(6)):
        with pytest.raises(LocalError, match="There is no run"):
            missing()


def test_a_run_moves_only_from_the_states_it_was_decided_from(store: Store) -> None:
    submitted(store)
    clock_of(store).advance(1)
    moved = store.runs.move(RUN, {"submitted"}, "inviting")
    assert (moved.state, moved.updated_at) == ("inviting", clock_of(store).now())
    with pytest.raises(LocalError, match="icd-chapters is inviting; this takes one that is running or stopping"):
        store.runs.move(RUN, {"stopping", "running"}, "stopped")
    failed = store.runs.move(RUN, {"inviting"}, "failed", "The model is not here.")
    assert failed.reason == "The model is not here."
    assert events(store) == ["run.submitted", "run.inviting", "run.failed"]


def test_of_two_that_move_a_run_one_wins(store: Store) -> None:
    submitted(store)

    def move(_: int) -> bool:
        try:
            store.runs.move(RUN, {"submitted"}, "inviting")
        except LocalError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(move, range(8))) == 1


def test_the_agreed_plan_is_kept_once(store: Store) -> None:
    submitted(store)
    store.runs.agree(RUN, b"signed", b"d" * 32, b"{}")
    with pytest.raises(LocalError, match="has its agreed plan already"):
        store.runs.agree(RUN, b"other", b"e" * 32, b"{}")
    run = store.runs.run(RUN)
    assert (run.signed_plan, run.plan_digest, run.spec) == (b"signed", b"d" * 32, b"{}")


# --- Rounds ---


def test_an_attempt_survives_with_all_it_holds(store: Store) -> None:
    submitted(store)
    started = store.runs.start_attempt(RUN, 0)
    assert started == Attempt(RUN, 0, 0, "open", clock_of(store).now())
    full = replace(
        started,
        cohort=("north", "south", "west"),
        survivors=("north", "west"),
        seconds={"train": 1.5, "masked input": 0.01},
        bytes_up=2**40,
        bytes_down=7,
        adapter=ADAPTER,
        optimizer=OPTIMIZER,
    )
    store.runs.save_attempt(full)
    assert store.runs.attempts(RUN) == [full]


def test_a_committed_round_counts_in_the_run_and_in_the_journal(store: Store) -> None:
    submitted(store)
    attempt = replace(store.runs.start_attempt(RUN, 0), cohort=("north",), survivors=("north",), adapter=ADAPTER)
    clock_of(store).advance(2)
    committed = store.runs.commit_attempt(attempt)
    assert (committed.state, committed.ended_at) == ("committed", clock_of(store).now())
    assert store.runs.run(RUN).rounds_done == 1
    assert store.runs.committed(RUN) == [committed]
    last = store.database.entries()[-1].event
    assert (last["event"], last["run"], last["adapter"]) == ("round.committed", str(RUN), ADAPTER.sha256)


def test_a_round_is_committed_in_its_order_with_its_adapter_and_once(store: Store) -> None:
    submitted(store)
    early = replace(store.runs.start_attempt(RUN, 1), adapter=ADAPTER)
    with pytest.raises(LocalError, match="at round 0, not at 1"):
        store.runs.commit_attempt(early)
    attempt = store.runs.start_attempt(RUN, 0)
    with pytest.raises(LocalError, match="without its adapter"):
        store.runs.commit_attempt(attempt)
    store.runs.commit_attempt(replace(attempt, adapter=ADAPTER))
    for again in (store.runs.save_attempt, store.runs.commit_attempt):
        with pytest.raises(LocalError):
            again(replace(attempt, adapter=ADAPTER))
    assert store.runs.run(RUN).rounds_done == 1
    assert [attempt.state for attempt in store.runs.attempts(RUN)] == ["committed", "open"]
    assert events(store) == ["run.submitted", "round.committed"]


def test_an_attempt_that_failed_is_followed_by_the_next(store: Store) -> None:
    submitted(store)
    aborted = store.runs.abort_attempt(store.runs.start_attempt(RUN, 0), "TOO_FEW_SITES")
    assert (aborted.state, aborted.reason) == ("aborted", "TOO_FEW_SITES")
    with pytest.raises(LocalError, match=r"Attempt 0 at round 0 .* is not open"):
        store.runs.abort_attempt(aborted, "again")
    assert store.runs.start_attempt(RUN, 0).attempt == 1
    assert events(store) == ["run.submitted", "round.aborted"]


def test_an_attempt_that_a_crash_left_open_is_ended_by_the_next(store: Store) -> None:
    submitted(store)
    left = store.runs.start_attempt(RUN, 0)
    assert store.runs.start_attempt(RUN, 0).attempt == 1
    assert store.runs.attempts(RUN)[0].reason == "interrupted"
    assert events(store)[-1] == "round.interrupted"
    with pytest.raises(LocalError, match="is not open"):
        store.runs.save_attempt(left)


def test_the_same_evaluation_again_replaces_the_first(store: Store) -> None:
    submitted(store)
    first = Evaluation(RUN, 2, "held-out.csv", 2000, 0.5, 1.0)
    other = Evaluation(RUN, 1, "held-out.csv", 2000, 0.4, 1.0)
    for evaluation in (first, other, replace(first, accuracy=0.6)):
        store.runs.add_evaluation(evaluation)
    assert store.runs.evaluations(RUN) == [other, replace(first, accuracy=0.6)]
