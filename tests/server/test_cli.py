"""`foedus` as an operator types it: what each command prints and which exit code it ends with.

Commands run in the test's process, except where a signal is the point. Plans that need a model are in
`tests/cluster/test_whole_path.py`.
"""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import postgresql
from foedus_common.checkpoints import sheet
from foedus_common.clock import SystemClock, iso
from foedus_common.enrolment import decode_token
from foedus_common.identity import fingerprint
from foedus_common.randomness import system_random
from foedus_server import commands as actions
from foedus_server.audit import notary
from foedus_server.cli import operator as cli
from foedus_server.config import Link, Settings
from foedus_server.release.evaluation import Score
from foedus_simulations.parties import OPERATOR, Party, free_ports, until
from known_sites import plan_of, submit
from operators import Applicant, Operator
from programs import Program, assert_teaches, commands, takes_json
from tiny_model import model_folder

COMMANDS = dict(commands(cli.app))


class Foedus(Program):
    operator: Operator


@pytest.fixture
def foedus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Foedus]:
    foedus = Foedus(cli.main, tmp_path / "home", monkeypatch, capsys)
    foedus.operator = Operator(foedus.home, SystemClock())
    yield foedus
    foedus.operator.close()


# --- Every command ---


@pytest.mark.parametrize("words", COMMANDS)
def test_its_help_teaches(words: str) -> None:
    assert_teaches(COMMANDS[words])


@pytest.mark.parametrize("words", COMMANDS)
def test_it_prints_json_when_asked(words: str) -> None:
    assert takes_json(COMMANDS[words])


@pytest.mark.parametrize(
    "words",
    [
        "up",
        "site list",
        "site revoke x",
        "roster sign",
        "model list",
        "run list",
        "audit verify",
        "audit show",
        "audit export f",
        "audit accept-loss --yes",
        "backup b",
    ],
)
def test_without_a_home_it_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    nowhere = Program(cli.main, tmp_path / "nowhere", monkeypatch, capsys)
    ended = nowhere(*words.split())
    assert (ended.code, ended.out) == (2, "")
    assert (
        ended.err
        == f"foedus: There is no Foedus home at {nowhere.home}; `foedus init` makes one, --home names another.\n"
    )


@pytest.mark.parametrize("words", ["nothing", "site nothing", "run show", "run list --nothing"])
def test_what_it_does_not_understand_ends_with_2(foedus: Foedus, words: str) -> None:
    assert foedus(*words.split()).code == 2


# --- Making a home ---


def test_a_home_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foedus = Program(cli.main, tmp_path / "home", monkeypatch, capsys)
    assert "--demonstration, and not both" in foedus("init").err
    root = foedus("root", "new", str(tmp_path / "root.key"), "--json").json
    made = foedus("init", "--root-public-key", root["public key"], "--json").json
    assert made == {"home": str(foedus.home), "root": root["fingerprint"], "demonstration": False}
    again = foedus("init", "--demonstration")
    assert (again.code, "exists and is not empty" in again.err) == (2, True)
    assert foedus("roster", "sign").code == 2  # its root key is elsewhere


# --- Sites and the roster ---


def test_a_site_from_its_token_to_its_end(foedus: Foedus) -> None:
    token = foedus("site", "invite", "north", "--org", "North Hospital", "--json").json["token"]
    assert token.startswith("foedus1-")
    assert foedus("site", "approve", "north").code == 2
    applicant = Applicant(foedus.operator, decode_token(token))
    applicant.ask()
    read_aloud = fingerprint(applicant.public_key)
    (row,) = foedus("site", "list", "--json").json
    known = {"name": "north", "org": "North Hospital", "state": "waiting", "fingerprint": read_aloud}
    assert row == {**known, "certificate_ends": None}
    assert "has another fingerprint" in foedus("site", "approve", "north", "--fingerprint", "abcd efgh").err
    assert foedus("site", "approve", "north", "--fingerprint", read_aloud, "--json").json["site"] == "north"
    assert foedus("roster", "sign", "--json").json["sites"] == ["north"]
    applicant.ask()
    (row,) = foedus("site", "list", "--json").json
    assert row["certificate_ends"] == iso(foedus.operator.registry.certificate_ends()["north"])
    assert foedus("site", "rotate", "north", "--json").json["token"] != token
    assert foedus("site", "revoke", "north", "--json").json == {"site": "north", "state": "revoked"}
    assert foedus("site", "revoke", "south").code == 2


def test_sites_are_counted_by_organisation_where_one_has_several(foedus: Foedus) -> None:
    registry = foedus.operator.registry
    for name, org in (("north-1", "North Hospital"), ("north-2", "North Hospital"), ("west", "West Clinic")):
        applicant = Applicant(foedus.operator, registry.invite(name, org))
        applicant.ask()
        applicant.is_approved()
    for words in (("roster", "sign"), ("site", "list")):
        counted = re.split(r"\norganisation +sites", foedus(*words).out)[1]
        assert re.findall(r"(\w+ \w+) +(\d)", counted) == [("North Hospital", "2"), ("West Clinic", "1")]


def test_the_authority_is_changed_with_one_command(foedus: Foedus) -> None:
    applicant = Applicant(foedus.operator, decode_token(foedus.operator.registry.invite("north", "North").encode()))
    applicant.ask()
    applicant.is_approved()
    made = foedus("authority", "rotate", "--json").json
    listed = foedus("authority", "list", "--json").json
    assert [each["shown"] for each in listed["authorities"]] == [True, False]
    assert listed["authorities"][1]["authority"] == made["authority"] == "CN=Test Foedus CA 2"
    assert listed["waits_for"] == ["north"]
    assert "it waits for north" in foedus("authority", "rotate").err


# --- Models and plans ---


def test_models_and_plans(foedus: Foedus, tmp_path: Path) -> None:
    added = foedus("model", "add", str(model_folder(tmp_path / "tiny")), "--json").json
    assert foedus("model", "list", "--json").json == [added]
    assert foedus("model", "add", str(tmp_path)).code == 2
    written = foedus("plan", "new", str(tmp_path / "plan.toml"), "--json").json["file"]
    assert "is not overwritten" in foedus("plan", "new", written).err
    assert foedus("plan", "check", written).code == 2
    assert foedus("run", "submit", written).code == 2


# --- Runs ---


def test_a_run_is_stopped_and_resumed(foedus: Foedus) -> None:
    submit(foedus.operator.home, foedus.operator.store, plan_of(rounds=2), run_id=7)
    runs = foedus.operator.store.runs
    for action in ("resume", "stop"):
        ended = foedus("run", action, "7")
        assert (action, ended.code) in (("resume", 2), ("stop", 0))
    runs.move(7, ["stopping"], "stopped", "stopped by the operator")
    assert foedus("run", "stop", "icd-chapters").err == (
        "foedus: The run icd-chapters is stopped; this takes one that is inviting or running.\n"
    )
    resumed = foedus("run", "resume", "icd-chapters", "--json").json
    assert resumed == {"run": "7", "state": "inviting", "rounds_done": 0}
    (row,) = foedus("run", "list", "--json").json
    assert (row["state"], row["rounds"], row["reason"]) == ("inviting", "0/2", "")
    runs.move(7, ["inviting"], "failed", "Nobody came.")
    assert foedus("run", "resume", "7", "--json").json["state"] == "inviting"
    assert foedus("run", "resume", "nothing").code == 2


def test_watching_a_run_that_did_not_finish_ends_with_1(foedus: Foedus) -> None:
    submit(foedus.operator.home, foedus.operator.store, plan_of(rounds=2), run_id=7)
    foedus.operator.store.runs.move(7, ["inviting"], "failed", "Nobody came.")
    ended = foedus("run", "watch", "7")
    assert (ended.code, ended.out) == (1, "icd-chapters failed after 0 of 2 rounds: Nobody came.\n")
    shown = foedus("run", "watch", "7", "--json")
    assert (shown.code, shown.json["state"]) == (1, "failed")
    assert shown.json == foedus("run", "show", "7", "--json").json


def test_what_a_run_starts_from_is_judged_as_after_no_round(foedus: Foedus, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(foedus.operator.home, foedus.operator.store, plan_of(rounds=2), run_id=7)
    monkeypatch.setattr(actions.Operator, "_model_folder", lambda self, plan: Path("model"))
    monkeypatch.setattr(
        actions, "evaluate", lambda *given, **named: [Score("first", rows=4, right=1, classes={}, examples=())]
    )
    (judged,) = foedus("run", "evaluate", "7", "--data", "rows.csv", "--json").json
    assert (judged["round"], judged["accuracy"]) == (0, 0.25)
    runs = foedus.operator.store.runs
    (first,) = actions.Operator(foedus.operator.home, SystemClock(), system_random).adapters(runs.run(7))
    attempt = runs.start_attempt(7, 0)
    runs.commit_attempt(replace(attempt, adapter=first, survivors=("north",)))  # its rates were 0: it moved nothing
    (judged,) = foedus("run", "evaluate", "7", "--data", "rows.csv", "--json").json
    assert judged["round"] == 1


# --- Copies ---


def test_a_backup_is_restored_whole_into_a_new_home(foedus: Foedus, tmp_path: Path) -> None:
    foedus("site", "invite", "north", "--org", "North Hospital")
    submit(foedus.operator.home, foedus.operator.store, plan_of(rounds=2), run_id=7)
    made = foedus("backup", str(tmp_path / "copy"), "--json").json
    assert made["kind"] == "coordinator"
    assert foedus("audit", "show", "--last", "1", "--json").json[0]["event"] == "backup.made"
    verified = foedus("audit", "verify", "--json").json
    assert "into a new home only" in foedus("restore", str(tmp_path / "copy")).err
    foedus.home.rename(tmp_path / "broken")
    assert foedus("restore", str(tmp_path / "copy"), "--json").json["files"] == made["files"]
    assert foedus("audit", "verify", "--json").json["entries"] == verified["entries"] + 1
    assert foedus("audit", "show", "--last", "1", "--json").json[0]["event"] == "home.restored"
    assert foedus("run", "resume", "7").code == 2
    assert foedus("run", "stop", "7").code == 0


def test_a_home_on_postgresql_is_backed_up_and_restored_on_either_kind(
    foedus: Foedus, tmp_path: Path, postgresql_server: postgresql.Server
) -> None:
    copy, settings, file = str(tmp_path / "copy"), foedus.home / "foedus.toml", foedus.home / "foedus.db"

    def lose_home() -> None:
        foedus.home.rename(tmp_path / f"lost-{len(list(tmp_path.iterdir()))}")

    lose_home()
    first, second = postgresql_server.database(), postgresql_server.database()
    foedus("init", "--demonstration", "--database", first, "--json")
    assert not file.exists()
    foedus("site", "invite", "north", "--org", "North Hospital")
    sites = foedus("site", "list", "--json").json
    foedus("backup", copy)
    head = foedus("audit", "verify", "--json").json["head"]

    lose_home()
    taken = foedus("restore", copy)  # into the database that is still there
    assert (taken.code, "holds a coordinator already" in taken.err, foedus.home.exists()) == (2, True, False)
    for url in (second, ""):
        assert foedus("restore", copy, "--database", url).code == 0
        assert (f'database = "{url}"' in settings.read_text(), file.exists()) == (True, url == "")
        assert settings.stat().st_mode & 0o777 == 0o600
        assert foedus("site", "list", "--json").json == sites
        assert foedus("audit", "verify").code == 0
        (before, restored) = foedus("audit", "show", "--last", "2", "--json").json
        assert (before["event"], restored["event"]) == ("backup.made", "home.restored")
        assert foedus("doctor", "--json").json
        lose_home()
    assert len(head) == 64


# --- Audit ---


def test_a_journal_that_was_cut_off_ends_with_1_and_one_sentence(foedus: Foedus) -> None:
    foedus("site", "invite", "north", "--org", "North Hospital")
    notary(foedus.operator.home, foedus.operator.store).sign_end()
    end = foedus("audit", "verify", "--json").json["entries"]
    with closing(sqlite3.connect(foedus.home / "foedus.db")) as db, db:
        db.execute("DELETE FROM journal WHERE number = ?", (end,))
    ended = foedus("audit", "verify")
    assert (ended.code, ended.err) == (
        1,
        f"foedus: The journal is broken at entry {end}: it is missing, and everything after it.\n",
    )
    foedus("site", "invite", "south", "--org", "South Hospital")  # another entry takes its place
    assert foedus("audit", "verify").code == 1
    assert foedus("audit", "accept-loss", "--yes", "--json").json == {"lost": [end]}
    assert foedus("audit", "verify", "--json").json["heads that were lost"] == 1


def test_what_a_site_holds_of_the_journal_is_compared_offline(foedus: Foedus, tmp_path: Path) -> None:
    foedus("site", "invite", "north", "--org", "North Hospital")
    head = notary(foedus.operator.home, foedus.operator.store).sign_end()
    (tmp_path / "north.json").write_bytes(sheet("north", [head]))
    assert foedus("audit", "verify", "--against", str(tmp_path / "north.json")).code == 0
    assert foedus("audit", "export", str(tmp_path / "ours.json"), "--json").json["heads"] == 1
    assert "exists already" in foedus("audit", "export", str(tmp_path / "ours.json")).err
    with closing(sqlite3.connect(foedus.home / "foedus.db")) as db, db:
        db.execute("DELETE FROM heads")  # whoever holds the disk cuts the journal off, and its signatures with it
        db.execute("DELETE FROM journal WHERE number >= ?", (head.number,))
    assert foedus("audit", "verify").code == 0
    ended = foedus("audit", "verify", "--against", str(tmp_path / "north.json"))
    assert (ended.code, f"broken at entry {head.number}: it is missing" in ended.err) == (1, True)
    (tmp_path / "north.json").write_bytes(sheet("north", [replace(head, number=99)]))
    ended = foedus("audit", "verify", "--against", str(tmp_path / "north.json"))
    assert (ended.code, "never signed" in ended.err) == (2, True)
    assert foedus("audit", "verify", "--against", str(tmp_path / "absent.json")).code == 2


# --- Signals ---


def test_ctrl_c_ends_a_watch_with_130_and_the_coordinator_with_0(tmp_path: Path) -> None:
    port, enrolment_port = free_ports(2)
    settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment_port))
    operator = Operator(tmp_path / "home", SystemClock(), settings)
    submit(operator.home, operator.store, plan_of(rounds=2), run_id=7)
    operator.close()
    with Party(OPERATOR, operator.home.path) as foedus:
        watching = foedus.start("watch", "run", "watch", "7", "--json")
        until(lambda: has_open(watching.pid, "foedus.db"), 60, "the watch's look at the database")
        coordinator = foedus.start("up", "up", "--json")
        foedus.await_line("up", '"ready"')
        for process, code in ((watching, 130), (coordinator, 0)):
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == code


def has_open(pid: int, name: str) -> bool:
    """Whether the process has a file of this name open (Linux)."""
    with suppress(OSError):
        return any(os.readlink(each).endswith(f"/{name}") for each in Path(f"/proc/{pid}/fd").iterdir())
    return False
