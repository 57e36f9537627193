"""`foedus-site` as an administrator types it: what each command prints, which exit code it ends with, what it keeps.

The site has joined by the coordinator's own registry, without a network; commands run in the test's process, except
where a signal is the point.
"""

from __future__ import annotations

import getpass
import io
import signal
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from foedus_client.cli import site as cli
from foedus_client.config import SiteHome, SiteSettings
from foedus_client.enrol import Membership, join
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common.clock import SystemClock
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import AgreedPlan, schedule
from foedus_common.protocol.messages import VectorRef
from foedus_common.terms import round_terms
from foedus_server.config import Link, Settings
from foedus_server.link.grid import LinkServer
from foedus_server.members.registry import ApprovedSites
from foedus_simulations.parties import SITE, Party, free_ports
from known_sites import MODEL, join_site
from operators import Operator
from plans import agreed_plan
from programs import Program, assert_teaches, commands, takes_json
from seeded import seeded
from tiny_model import rows

CLOCK = SystemClock()
COMMANDS = dict(commands(cli.app))


class Site(Program):
    """The program on a home that has joined, with what a coordinator would do to it."""

    operator: Operator

    def receives(self, run_id: int = 7, **changes: Any) -> AgreedPlan:
        """A proposed plan arrives."""
        small = {"phase__0__rounds": 2, "phase__1__rounds": 1, "phase__1__sampling_rate": 1.0, "model__sha256": MODEL}
        agreed = replace(agreed_plan(**{**small, **changes}), run_id=run_id, noise_multipliers=(30.0, 12.0))
        with closing(SiteStore(self.home / "site.db", CLOCK)) as store:
            store.put_plan(agreed.digest(), run_id, agreed.canonical(), b"s" * 64)
        return agreed

    def releases(self, agreed: AgreedPlan, index: int) -> None:
        """A round was trained and its vector stored for sending."""
        member = Membership(self.home)
        with closing(cli.Administrator(self.home).store) as store:
            ledger = Ledger(store, CLOCK, member.key.sign, member.public_key)
            terms = round_terms(agreed, schedule(agreed.plan)[index], ObjectRef("d" * 64, 400))
            ledger.release(ledger.reserve_round(agreed.run_id, index), terms, VectorRef(b"v" * 32, 800))

    @property
    def states(self) -> list[str]:
        return [plan["state"] for plan in self("plans", "--json").json]

    @property
    def line(self) -> dict[str, Any]:
        (line,) = self("ledger", "--json").json
        return line  # type: ignore[no-any-return]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Site]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    site = Site(cli.main, tmp_path / "north", monkeypatch, capsys)
    site.operator = Operator(tmp_path / "operator", CLOCK)
    SiteHome.create(site.home)
    join_site(site.operator, site.home, "north", CLOCK, rows())
    yield site
    site.operator.close()


# --- Every command ---


@pytest.mark.parametrize("words", COMMANDS)
def test_its_help_teaches(words: str) -> None:
    assert_teaches(COMMANDS[words])


@pytest.mark.parametrize("words", [words for words in COMMANDS if words != "run"])
def test_it_prints_json_when_asked(words: str) -> None:
    assert takes_json(COMMANDS[words])


@pytest.mark.parametrize(
    "words",
    ["status", "plans", "ledger", "model list", "data list", "pause", "resume", "leave --yes", "approve 7", "backup b"],
)
def test_without_a_home_it_says_how_to_get_one(site: Site, tmp_path: Path, words: str) -> None:
    nowhere = Site(cli.main, tmp_path / "nowhere", site._monkeypatch, site._capsys)
    ended = nowhere(*words.split())
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        f"foedus-site: There is no site home at {nowhere.home}; `foedus-site join` makes one, --home names another.\n"
    )


def test_a_home_that_has_not_joined_says_so(site: Site, tmp_path: Path) -> None:
    SiteHome.create(tmp_path / "new")
    ended = Site(cli.main, tmp_path / "new", site._monkeypatch, site._capsys)("status")
    assert ended.code == 2
    assert "has joined no federation yet" in ended.err


@pytest.mark.parametrize("words", ["nothing", "status --nothing", "approve", "data add x"])
def test_what_it_does_not_understand_ends_with_2(site: Site, words: str) -> None:
    assert site(*words.split()).code == 2


# --- Plans ---


def test_a_plan_is_approved_and_withdrawn_from(site: Site) -> None:
    agreed = site.receives()
    assert site.states == ["pending"]
    assert site("approve", "7", "--json").json["state"] == "approved"
    assert site.line["reserved"] > 0
    site.releases(agreed, 0)
    spent = site.line["spent"]
    assert site("withdraw", "icd-chapters", "--json").json == {"run": "7", "state": "withdrawn"}
    assert (site.line["spent"], site.line["reserved"], site.states) == (spent, 0, ["withdrawn"])
    again = site("withdraw", "7")
    assert (again.code, again.err) == (
        2,
        "foedus-site: The plan is withdrawn, so there is nothing to withdraw from; see `foedus-site plans`.\n",
    )
    assert "nothing to decide" in site("approve", "7").err


def test_a_plan_above_policy_is_refused_with_its_reasons(site: Site) -> None:
    site.receives(adapter__rank=100)
    (plan,) = site("plans", "--json").json
    assert plan["reasons"] == ["The plan's adapter has rank 100, and [policy] max_rank is 64."]
    ended = site("approve", "7")
    assert (ended.code, ended.err) == (2, f"foedus-site: {plan['reasons'][0]}\n")
    assert site("decline", "7", "--json").json == {"run": "7", "state": "declined"}
    assert site("decline", "nothing").code == 2


def test_whoever_decides_reads_which_epsilon_counts_and_why_another_may_be_smaller(site: Site) -> None:
    site.receives(phase__0__steps=1, phase__1__steps=1)
    (plan,) = site("plans", "--json").json
    central, unit = plan["central"].split(" per ")
    assert unit == "record"
    assert float(central) < plan["epsilon"]
    shown = " ".join(site("plans").out.split())
    assert "epsilon_central is smaller because the coordinator sees only totals of each round" in shown
    assert plan["about_epsilons"] in shown
    assert "by this site's own noise alone (epsilon_local)" in " ".join(site("ledger").out.split())


def test_an_approval_says_who_what_how_much_and_until_when(site: Site) -> None:
    agreed = site.receives()
    assert "write days or hours" in site("approve", "7", "--expires", "tomorrow").err
    assert "has to be above 0" in site("approve", "7", "--epsilon-cap", "0").err
    assert site.states == ["pending"]
    site("approve", "7", "--by", "Dr. Ada", "--expires", "12h", "--epsilon-cap", "1.5")
    (plan,) = site("plans", "--json").json
    said = plan["approval"]
    assert {key: said[key] for key in ("by", "dataset", "purpose", "epsilon_cap", "holds", "plan_digest")} == {
        "by": "Dr. Ada",
        "dataset": "coding-terms",
        "purpose": agreed.plan.run.purpose,
        "epsilon_cap": 1.5,
        "holds": True,
        "plan_digest": agreed.digest().hex(),
    }
    assert "approved by Dr. Ada on " in site("plans").out
    assert site("status", "--json").json["plans approved"].startswith("1; an approval ends on ")
    site("approve", "7", "--by", "Bob")  # again: renewed, for all that the plan asks for
    (plan,) = site("plans", "--json").json
    said = plan["approval"]
    assert (said["by"], said["epsilon_cap"]) == ("Bob", pytest.approx(plan["epsilon"], abs=1e-4))
    assert site("ledger", "--verify").code == 0


def test_the_ledger_draws_what_was_spent(site: Site) -> None:
    agreed = site.receives()
    site("approve", "7")
    assert "epsilon spent" not in site("ledger").out
    for index in range(2):
        site.releases(agreed, index)
    out = site("ledger").out
    assert "coding-terms: epsilon spent, of 16" in out
    assert set(out) & set("▁▂▃▄▅▆▇█")
    (line,) = site("ledger", "--json", "--history").json
    spent = [epsilon for _, epsilon in line["history"]]
    assert spent == sorted(spent)
    assert (spent[0], spent[-1]) == (0.0, line["spent"])
    assert line["today"] == line["spent"]


# --- Pause and leave ---


def test_a_pause_is_shown_until_it_ends(site: Site) -> None:
    assert site("status", "--json").json["daemon"] == "not running"
    assert site("pause", "--json").json == {"paused": True}
    assert site("status", "--json").json["daemon"].startswith("paused by ")
    assert site("resume", "--json").json == {"paused": False}
    assert site("status", "--json").json["daemon"] == "not running"


def test_who_leaves_keeps_the_ledger_and_nothing_that_opens_the_link(site: Site) -> None:
    agreed = site.receives()
    site("approve", "7")
    site.releases(agreed, 0)
    spent = site.line["spent"]
    with SiteHome.open(site.home).daemon_lock():
        assert "A daemon is running" in site("leave", "--yes").err
    assert site("leave", "--yes", "--json").json == {"site": "north", "left": True}
    assert not (site.home / "identity").exists()
    assert site("status").code == 2
    assert (site.line["spent"], site.line["reserved"]) == (spent, 0)
    assert site("ledger", "--verify").code == 0


def test_who_says_no_has_not_left(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    said = site("leave", "--json")
    assert (said.code, said.out.strip()) == (1, "")  # the question is on standard error, where no pipe takes it in
    assert "Delete the keys of north" in said.err
    assert site("status").code == 0


def test_who_comes_back_under_another_name_goes_on_with_the_same_ledger(site: Site) -> None:
    agreed = site.receives()
    site("approve", "7")
    site.releases(agreed, 0)
    before = site("ledger", "--verify", "--json").json["entries"]
    site("leave", "--yes")
    site.operator.registry.revoke("north")
    join_again(site, "north-2")
    assert site("status", "--json").json["site"] == "north-2"
    assert site("ledger", "--verify", "--json").json["entries"] == before + 2  # the run's end, and the new key
    site.receives(8)
    assert site("approve", "8").code == 0


def join_again(site: Site, name: str) -> None:
    def approve(public_key: bytes) -> None:
        site.operator.registry.approve(name, public_key)
        site.operator.sign_roster()

    token = site.operator.registry.invite(name, "Organisation of north")
    join(site.home, token, site.operator.registry.enrol, approve, random=seeded(name), clock=CLOCK)


# --- Copies ---


def test_a_backup_of_the_newest_state_is_restored_and_works(site: Site, tmp_path: Path) -> None:
    agreed = site.receives()
    site("approve", "7")
    site.releases(agreed, 0)
    made = site("backup", str(tmp_path / "copy"), "--json").json
    assert (made["kind"], made["bytes"]) == ("site", (tmp_path / "copy").stat().st_size)
    line = site.line
    site.home.rename(tmp_path / "broken")
    restored = site("restore", str(tmp_path / "copy"), "--json").json
    assert (restored["home"], restored["files"]) == (str(site.home), made["files"])
    assert site.line == line
    site.releases(agreed, 1)


def test_an_older_backup_stops_until_the_loss_is_accepted(site: Site, tmp_path: Path) -> None:
    agreed = site.receives()
    site("approve", "7")
    site.releases(agreed, 0)
    whole = site.line["spent"] + site.line["reserved"]
    site("backup", str(tmp_path / "copy"))
    site.releases(agreed, 1)
    assert "no loss to accept" in site("ledger", "--accept-loss", "--yes").err

    site.home.rename(tmp_path / "broken")
    ended = site("restore", str(tmp_path / "copy"))
    assert (ended.code, "restored from an older copy" in ended.err) == (2, True)
    site.receives(8)
    for words in ("approve 8", "withdraw 7", "ledger --verify", "run"):
        ended = site(*words.split())
        assert (ended.code, "restored from an older copy" in ended.err) == (2, True), words
    assert site.states == ["approved", "pending"]
    assert site("status").code == 0

    assert site("ledger", "--accept-loss", "--yes", "--json").json == {"spent_in_full": ["7"]}
    assert (site.line["spent"], site.line["reserved"]) == (pytest.approx(whole), 0)
    assert site.states == ["withdrawn", "pending"]
    assert site("ledger", "--verify").code == 0


def test_the_journal_tells_of_backups_and_goes_on_after_a_restore(site: Site, tmp_path: Path) -> None:
    agreed = site.receives()
    site("approve", "7")
    site("backup", str(tmp_path / "copy"))
    site.releases(agreed, 0)
    site("audit", "export", str(tmp_path / "heads.json"))
    assert site("audit", "verify", "--against", str(tmp_path / "heads.json")).code == 0
    events = [entry["event"] for entry in site("audit", "show", "--last", "99", "--json").json]
    for event in ("site.joined", "policy.changed", "plan.approved", "backup.made", "vector.stored"):
        assert event in events

    site.home.rename(tmp_path / "broken")
    site("restore", str(tmp_path / "copy"))
    said = " ".join(site("ledger", "--accept-loss", "--yes").err.split())
    assert "Go by your own records" in said  # of runs since the copy, which nothing here can count
    assert site("audit", "verify").code == 0  # by itself it is whole
    ended = site("audit", "verify", "--against", str(tmp_path / "heads.json"))
    assert (ended.code, ended.err.startswith("foedus-site: The journal is broken at entry ")) == (1, True)
    events = [entry["event"] for entry in site("audit", "show", "--last", "99", "--json").json]
    assert events[events.index("backup.made") + 1] == "home.restored"


def test_a_policy_that_was_edited_is_entered_when_the_site_next_looks(site: Site) -> None:
    site("status")
    settings = site.home / "site.toml"
    settings.write_text(settings.read_text().replace("min_sites = 3", "min_sites = 4"))
    site("status")
    site("status")
    changes = [e for e in site("audit", "show", "--last", "99", "--json").json if e["event"] == "policy.changed"]
    assert [change["min_sites"] for change in changes] == [3, 4]


def test_the_journal_can_be_read_and_verified_after_the_site_has_left(site: Site) -> None:
    site("leave", "--yes")
    assert site("audit", "show", "--last", "1", "--json").json[0]["event"] == "site.left"
    assert site("audit", "verify", "--json").json["entries of the ledger"] == 1
    assert "joined no federation" in site("audit", "export", "heads.json").err


def test_an_altered_ledger_ends_an_audit_with_1(site: Site) -> None:
    site("status")
    with sqlite3.connect(site.home / "site.db") as db:
        db.execute("DROP TRIGGER ledger_is_never_updated")
        db.execute("UPDATE ledger SET body = replace(body, 'a', 'b') WHERE number = 1")
    ended = site("audit", "verify")
    assert (ended.code, ended.err.startswith("foedus-site: The ledger is broken at entry 1: ")) == (1, True)


def test_a_backup_is_restored_into_a_new_home_only(site: Site, tmp_path: Path) -> None:
    site("backup", str(tmp_path / "copy"))
    assert "is not overwritten" in site("backup", str(tmp_path / "copy")).err
    assert "into a new home only" in site("restore", str(tmp_path / "copy")).err


# --- Through a proxy ---


def test_a_proxy_is_kept_for_a_new_home_and_its_password_is_not_typed(site: Site, tmp_path: Path) -> None:
    """No coordinator is there: what counts is what the home says afterwards."""
    token = site.operator.registry.invite("east", "East").encode()
    east = Site(cli.main, tmp_path / "east", site._monkeypatch, site._capsys)
    assert "list of processes" in east("join", token, "--proxy", "http://ada:secret@proxy:3128").err
    assert not east.home.exists()
    bundle = tmp_path / "company.pem"
    bundle.write_bytes(site.operator.registry.authorities.shown.certificate.public_bytes(Encoding.PEM))
    named = ("--proxy", "http://127.0.0.1:9", "--authorities", str(bundle))
    for _ in range(2):  # a join that was cut is run again
        assert "through the proxy 127.0.0.1:9, is down" in east("join", token, *named).err
    settings = SiteHome.open(east.home).settings
    assert (settings.proxy, settings.authorities) == ("http://127.0.0.1:9", str(bundle))
    assert "secret" not in repr(SiteSettings(proxy="http://ada:secret@proxy:3128"))
    assert "has settings already" in east("join", token, "--proxy", "http://127.0.0.1:10").err


# --- The token ---


class Typed(io.StringIO):
    """A terminal at which somebody has typed."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("words", [("join",), ("join", "-")])
def test_a_token_need_not_stand_in_the_list_of_processes(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    token = site.operator.registry.invite("east", "East").encode()
    east = Site(cli.main, tmp_path / "east", site._monkeypatch, site._capsys)
    closed = ("--proxy", "http://127.0.0.1:9")  # no coordinator is there: the token was read, which is what counts
    monkeypatch.setattr(sys, "stdin", io.StringIO(token + "\n"))
    assert "is down" in east(*words, *closed).err
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "no Foedus token" in east(*words, *closed).err
    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr(getpass, "getpass", lambda prompt: token)
    asked = east(*words, *closed)
    assert "is down" in asked.err
    assert token not in asked.out + asked.err


# --- Signals ---


def test_ctrl_c_ends_a_join_that_waits_and_a_second_one_goes_on_from_there(tmp_path: Path) -> None:
    port, enrolment_port = free_ports(2)
    settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment_port))
    with closing(Operator(tmp_path / "operator", CLOCK, settings)) as operator:
        link = enrolling(operator)
        token = operator.registry.invite("north", "North").encode()
        with Party(SITE, tmp_path / "north") as north:
            waiting = north.start("join", "join", "-", "--json", secret=token)
            north.await_line("join", '"waiting": true')
            waiting.send_signal(signal.SIGINT)
            assert waiting.wait(timeout=60) == 130
            operator.registry.approve("north", operator.registry.site("north").waiting_key or b"")
            operator.sign_roster()
            assert north.ask("join", token)["site"] == "north"
        link.drain_and_stop(0.5)


def enrolling(operator: Operator) -> LinkServer:
    """The operator's two ports, listening."""
    home = operator.home
    link = LinkServer(
        address=home.settings.listen_address,
        enrol_address=home.settings.enrolment_listen_address,
        tls=home.tls(operator.random, CLOCK),
        directory=ApprovedSites(operator.store, CLOCK),
        objects=ObjectStore(home.objects),
        uploads=home.path / "uploads",
        enrol=operator.registry.enrol,
    )
    link.start()
    return link
