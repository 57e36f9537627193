"""`foedus-site doctor`: each thing that can be amiss at a site is found, by its name and with what to do about it."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from foedus_client.cli import doctor
from foedus_client.config import SiteHome
from foedus_client.enrol import Membership
from foedus_client.ledger.accounts import Budget
from foedus_client.ledger.high_water import HighWater, Mark, mark_name
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common.checks import Finding
from foedus_common.clock import DAY, ManualClock
from foedus_common.errors import LocalError
from known_sites import join_site
from operators import Operator
from plans import agreed_plan
from tiny_model import model_folder, rows


class Site:
    """A home that has joined, and a coordinator that is asked by `admission` alone; its port is a real one."""

    def __init__(self, folder: Path) -> None:
        self.clock = ManualClock()
        self.home, self.state = folder / "north", folder / "state"
        self.operator = Operator(folder / "operator", self.clock)
        SiteHome.create(self.home)
        join_site(self.operator, self.home, "north", self.clock, rows())
        (self.home / "rows.csv").chmod(0o600)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.set("coordinator", f'"127.0.0.1:{self.listening.getsockname()[1]}"')
        self.admission: Callable[[], float] = self.clock.now
        with closing(self.store()) as store:
            store._db.execute("DELETE FROM models")
            model = model_folder(folder / "tiny")
            store.add_model("tiny", doctor.manifest_sha256(model), model)

    def store(self) -> SiteStore:
        member = Membership(self.home)
        return SiteHome.open(self.home).store(self.clock, self.state, mark_name("north", member.token.root_public_key))

    def set(self, key: str, value: str) -> None:
        """Change a line of site.toml."""
        lines = (self.home / "site.toml").read_text().splitlines()
        (self.home / "site.toml").write_text(
            "\n".join(f"{key} = {value}" if line.startswith(f"{key} =") else line for line in lines)
        )

    def findings(self) -> dict[str, Finding]:
        found = doctor.findings(self.home, self.state, self.clock, lambda *where: self.admission())
        return {each.check: each for each in found}

    def amiss(self) -> dict[str, str]:
        """The problems only."""
        return {check: each.sentence for check, each in self.findings().items() if each.state == "problem"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.listening.close()
    site.operator.close()


def test_nothing_is_amiss_at_a_site_that_works(site: Site) -> None:
    found = site.findings()
    assert {check: each.state for check, each in found.items() if each.state != "ok"} == {"daemon": "note"}
    assert set(found) == {
        *("settings", "files", "disk", "device", "membership", "certificate", "roster"),
        *("organisation", "network", "coordinator"),
        *("database", "ledger", "approvals", "data coding-terms", "model tiny", "daemon"),
    }
    assert "12 rows" in found["data coding-terms"].sentence


def test_a_running_and_a_paused_daemon_are_told(site: Site) -> None:
    with SiteHome.open(site.home).daemon_lock():
        assert site.findings()["daemon"].sentence == "It is running."
    with closing(site.store()) as store:
        store.pause("ada")
    assert site.findings()["daemon"].sentence.startswith("ada paused this site")


# --- The machine and the home ---


def test_no_home(tmp_path: Path) -> None:
    (only,) = doctor.findings(tmp_path / "nowhere", tmp_path, ManualClock(), lambda *where: 0.0)
    assert (only.check, only.state) == ("settings", "problem")
    assert "`foedus-site join` makes one" in only.sentence


def test_settings_that_cannot_be(site: Site) -> None:
    site.set("device", '"gpu"')
    assert list(site.amiss()) == ["settings"]


def test_a_file_that_others_can_read(site: Site) -> None:
    (site.home / "identity" / "roster").chmod(0o640)
    assert "chmod -R go-rwx" in site.amiss()["files"]


@pytest.mark.parametrize(("free", "state"), [(1 << 20, "problem"), (2 << 30, "note"), (50 << 30, "ok")])
def test_room_on_the_disk(site: Site, monkeypatch: pytest.MonkeyPatch, free: int, state: str) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    assert site.findings()["disk"].state == state


def test_a_card_that_is_not_there(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-1)\n"
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 0, listed, ""))
    assert "GPU 0: NVIDIA H100." in site.findings()["device"].sentence
    site.set("device", '"cuda:1"')
    assert "lists 1 cards" in site.amiss()["device"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "lists 0 cards" in site.amiss()["device"]
    site.set("device", '"cpu"')
    assert "device" not in site.amiss()


def test_software_that_is_not_installed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else True)
    assert "peft cannot be imported" in site.amiss()["device"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else True)
    assert "device" not in site.amiss()
    site.set("base_weights", '"4bit"')
    assert "needs bitsandbytes; pip install 'foedus[gpu]'" in site.amiss()["device"]


# --- Membership and the coordinator ---


def test_a_site_that_waits(site: Site) -> None:
    (site.home / "identity").rename(site.home / "joining")
    assert "waits to be approved" in site.amiss()["membership"]


def test_a_stranger_under_the_organisation_s_name_is_shown_to_who_can_tell(site: Site, tmp_path: Path) -> None:
    """Thresholds count an organisation's sites by what the roster says of each; nobody else knows this one's."""
    assert site.findings()["organisation"].sentence == "No other site is listed as one of Organisation of north."
    for name, org in (("south", "Organisation of north"), ("west", "Organisation of west")):
        join_site(site.operator, tmp_path / name, name, site.clock, rows(), org=org)
    newest = site.operator.registry.roster()
    assert newest is not None
    Membership(site.home).accept_roster(newest.to_bytes(), site.clock.now())
    found = site.findings()
    assert "Organisation of north, too: south; if one is not, tell" in found["organisation"].sentence
    assert "with 3 sites of 2 organisations (up to 2 each) is good until" in found["roster"].sentence


def test_certificates_and_rosters_that_end(site: Site) -> None:
    site.clock.advance(70 * DAY)
    assert site.findings()["certificate"].state == "note"
    site.clock.advance(30 * DAY)
    assert "ended on" in site.amiss()["certificate"]
    assert "roster" not in site.amiss()
    site.clock.advance(90 * DAY)
    assert "operator has to sign a new one" in site.amiss()["roster"]


def test_a_coordinator_that_is_down(site: Site) -> None:
    site.listening.close()
    assert "ask the operator whether `foedus up` is running" in site.amiss()["network"]
    assert "coordinator" not in site.findings()


def test_a_name_that_does_not_resolve(site: Site) -> None:
    site.set("coordinator", '"coordinator.invalid:8443"')
    assert "does not resolve" in site.amiss()["network"]


@pytest.mark.parametrize(
    ("error", "advice"),
    [(TimeoutError(), "through the firewall"), (OSError(101, "Network is unreachable"), "this machine's own network")],
)
def test_a_firewall_that_swallows_and_a_cable_that_is_out(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: OSError, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", fail)
    assert advice in site.amiss()["network"]


def test_a_site_that_is_not_let_in(site: Site) -> None:
    def revoked() -> float:
        raise LocalError("It was revoked.")

    site.admission = revoked
    assert site.amiss()["coordinator"].startswith("It was revoked. At the coordinator `foedus doctor`")


@pytest.mark.parametrize(("seconds", "words"), [(-3600.0, "3600 seconds ahead of"), (90.0, "90 seconds behind")])
def test_clocks_that_differ(site: Site, seconds: float, words: str) -> None:
    site.admission = lambda: site.clock.now() + seconds
    assert words in site.amiss()["coordinator"]


# --- What is in the home ---


def test_a_home_without_a_database_is_not_given_one(site: Site) -> None:
    for file in site.home.glob("site.db*"):
        file.unlink()
    assert site.findings()["database"].state == "note"
    assert not (site.home / "site.db").exists()


def test_a_database_that_is_none(site: Site) -> None:
    for file in site.home.glob("site.db*"):
        file.unlink()
    (site.home / "site.db").write_bytes(b"nothing of the kind" * 100)
    (site.home / "site.db").chmod(0o600)
    assert "cannot be opened" in site.amiss()["database"]


def test_a_ledger_that_was_altered_or_is_an_older_copy(site: Site) -> None:
    mark = HighWater(site.state, mark_name("north", Membership(site.home).token.root_public_key))
    mark.reset(Mark(2, bytes(32), 0))
    assert "older copy" in site.amiss()["ledger"]
    mark.path.unlink()
    with closing(site.store()) as store:
        store._db.execute("DROP TRIGGER ledger_is_never_updated")
        store._db.execute("UPDATE ledger SET body = replace(body, 'coding', 'nothing')")
    assert "broken at entry 1" in site.amiss()["ledger"]


def test_data_and_models_that_changed_or_are_gone(site: Site) -> None:
    (site.home / "rows.csv").write_text("text,label\nother,Eye\n")
    (site.home.parent / "tiny" / "config.json").write_text('{"other": 1}')
    amiss = site.amiss()
    assert "is not what was added" in amiss["data coding-terms"]
    assert "is not what was added" in amiss["model tiny"]
    (site.home / "rows.csv").unlink()
    assert "No such file" in site.amiss()["data coding-terms"]


def test_an_approval_that_has_ended(site: Site) -> None:
    agreed, budget = agreed_plan(), Budget(20.0, 1e-5)
    member = Membership(site.home)
    with closing(site.store()) as store:
        ledger = Ledger(store, site.clock, member.key.sign)
        store.put_plan(agreed.digest(), agreed.run_id, agreed.canonical(), b"s" * 64)
        ledger.reserve_run(agreed, budget)
        ledger.approve(agreed, "ada", budget.delta, None, expires_at=site.clock.now() + 60)
        store.decide_plan(agreed.digest(), "approved", "ada")
    assert site.findings()["approvals"].sentence == "1 plans are approved now."
    site.clock.advance(61)
    found = site.findings()["approvals"]
    assert (found.state, f"of run {agreed.run_id}; `foedus-site approve` renews" in found.sentence) == ("note", True)
