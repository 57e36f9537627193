"""`foedus doctor`: each thing that can be amiss at the coordinator is found, by its name and with what to do."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from foedus_common.adapters import save_adapter
from foedus_common.checks import Finding
from foedus_common.clock import DAY, ManualClock
from foedus_common.objects import ObjectStore
from foedus_server.cli import doctor
from foedus_server.config import Link, Settings
from foedus_server.link.grid import LinkServer
from foedus_server.members.registry import ApprovedSites
from foedus_simulations.parties import free_ports
from known_sites import FIRST, SPEC, plan_of, submit
from operators import Applicant, Operator
from tiny_model import model_folder


class Coordinator(Operator):
    """A home with one approved site, a signed roster, a model and a run with one round behind it."""

    def __init__(self, folder: Path) -> None:
        port, enrolment_port = free_ports(2)
        super().__init__(folder, settings=Settings("Test", link=Link(port=port, enrolment_port=enrolment_port)))
        self.approve("north")
        self.sign_roster()
        self.model = model_folder(folder.parent / "tiny")
        self.store.runs.add_model("tiny", doctor.manifest_sha256(self.model), self.model)
        submit(self.home, self.store, plan_of(rounds=2), run_id=7)
        self.store.runs.move(7, ["inviting"], "running")
        self.adapter = ObjectStore(self.home.objects).put(save_adapter(FIRST, SPEC) + b" ")

    def approve(self, name: str) -> None:
        applicant = Applicant(self, self.registry.invite(name, f"Organisation of {name}"))
        applicant.ask()
        applicant.is_approved()

    def findings(self) -> dict[str, Finding]:
        return {each.check: each for each in doctor.findings(self.home.path, self.clock)}

    def amiss(self) -> dict[str, str]:
        return {check: each.sentence for check, each in self.findings().items() if each.state == "problem"}


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path / "home")
    yield coordinator
    coordinator.close()


def test_nothing_is_amiss_at_a_coordinator_that_works(coordinator: Coordinator) -> None:
    found = coordinator.findings()
    notes = {"root key": "note", "organisations": "note"}  # a demonstration, with one site so far
    assert {check: each.state for check, each in found.items() if each.state != "ok"} == notes
    assert set(found) == {
        *("settings", "files", "disk", "root key", "authority", "certificate", "link port", "enrolment port"),
        *("software", "database", "roster", "organisations", "sites", "model tiny", "run icd-chapters"),
    }


def test_no_home(tmp_path: Path) -> None:
    (only,) = doctor.findings(tmp_path / "nowhere", ManualClock())
    assert (only.check, only.state) == ("settings", "problem")


def test_settings_that_cannot_be(coordinator: Coordinator) -> None:
    (coordinator.home.path / "foedus.toml").write_text('federation = "Test"\nprot = 1\n')
    assert list(coordinator.amiss()) == ["settings"]


def test_a_file_that_others_can_read(coordinator: Coordinator) -> None:
    (coordinator.home.path / "plan.key").chmod(0o644)
    assert "chmod -R go-rwx" in coordinator.amiss()["files"]


def test_a_root_key_that_is_elsewhere(coordinator: Coordinator) -> None:
    (coordinator.home.path / "root.key").unlink()
    assert coordinator.findings()["root key"].state == "ok"


def test_certificates_that_end(coordinator: Coordinator) -> None:
    coordinator.home.tls(coordinator.random, coordinator.clock)
    coordinator.clock.advance(390 * DAY)
    assert "`foedus up` running, which renews it" in coordinator.findings()["certificate"].sentence
    coordinator.clock.advance(10 * DAY)
    assert "ended on" in coordinator.amiss()["certificate"]
    coordinator.clock.advance(3_650 * DAY)
    assert "make a new home for the sites" in coordinator.amiss()["authority"]


# --- Ports ---


def test_the_ports_are_ours_while_the_coordinator_runs(coordinator: Coordinator) -> None:
    home = coordinator.home
    link = LinkServer(
        address=home.settings.listen_address,
        enrol_address=home.settings.enrolment_listen_address,
        tls=home.tls(coordinator.random, coordinator.clock),
        directory=ApprovedSites(coordinator.store, coordinator.clock),
        objects=ObjectStore(home.objects),
        uploads=home.path / "uploads",
        enrol=coordinator.registry.enrol,
    )
    link.start()
    found = coordinator.findings()
    link.drain_and_stop(0.5)
    for port in ("link port", "enrolment port"):
        assert (found[port].state, "`foedus up` is listening" in found[port].sentence) == ("ok", True)


def test_a_port_that_another_program_has(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    coordinator.home.tls(coordinator.random, coordinator.clock)
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.5)  # it says nothing at all
    with socket.create_server(("127.0.0.1", coordinator.home.settings.link.port)):
        (amiss,) = coordinator.amiss().items()
    assert amiss[0] == "link port"
    assert amiss[1].startswith("Another program has port")


def test_an_address_that_is_not_this_machines(coordinator: Coordinator) -> None:
    settings = coordinator.home.path / "foedus.toml"
    settings.write_text(settings.read_text().replace('listen = "127.0.0.1"', 'listen = "192.0.2.1"'))
    assert "cannot be had" in coordinator.amiss()["link port"]


# --- What is in the database ---


def test_software_that_is_not_installed(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else True)
    assert coordinator.findings()["software"].sentence.startswith("torch cannot be imported")


def test_a_database_that_is_none(coordinator: Coordinator) -> None:
    coordinator.close()
    for file in coordinator.home.path.glob("foedus.db*"):
        file.unlink()
    assert "There is no database" in coordinator.amiss()["database"]


def test_a_roster_that_is_behind_or_has_ended(coordinator: Coordinator) -> None:
    coordinator.approve("south")
    assert "south" in coordinator.amiss()["roster"]
    coordinator.sign_roster()
    assert coordinator.amiss() == {}
    coordinator.registry.revoke("north")
    assert "It does not say of north what was decided since" in coordinator.amiss()["roster"]
    coordinator.sign_roster()
    coordinator.clock.advance(160 * DAY)
    assert coordinator.findings()["roster"].state == "note"
    coordinator.clock.advance(30 * DAY)
    assert "ended on" in coordinator.amiss()["roster"]


def test_a_model_that_changed(coordinator: Coordinator) -> None:
    (coordinator.model / "config.json").write_text('{"other": 1}')
    assert "no longer what was added" in coordinator.amiss()["model tiny"]


def test_an_adapter_that_is_gone(coordinator: Coordinator) -> None:
    runs, objects = coordinator.store.runs, ObjectStore(coordinator.home.objects)
    attempt = runs.start_attempt(7, 0)
    runs.commit_attempt(type(attempt)(**{**vars(attempt), "adapter": coordinator.adapter}))
    assert "1 of 2 rounds" in coordinator.findings()["run icd-chapters"].sentence
    objects.delete(coordinator.adapter)
    assert "is not in" in coordinator.amiss()["run icd-chapters"]


def test_a_run_that_failed_is_no_fault_of_the_home(coordinator: Coordinator) -> None:
    coordinator.store.runs.move(7, ["running"], "failed", "Nobody came.")
    found = coordinator.findings()["run icd-chapters"]
    assert (found.state, found.sentence) == (
        "note",
        "It failed: Nobody came. `foedus run resume icd-chapters` takes it up again.",
    )


def test_a_site_whose_daemon_does_not_renew_its_certificate(coordinator: Coordinator) -> None:
    north = Applicant(coordinator, coordinator.registry.rotate("north"))
    north.ask()
    north.is_approved()
    coordinator.sign_roster()
    north.ask()
    assert coordinator.findings()["sites"].sentence == "1 sites hold certificates, and none ends soon."
    coordinator.clock.advance(70 * DAY)
    found = coordinator.findings()["sites"]
    assert (found.state, "within 21 days at north" in found.sentence) == ("note", True)
    north.ask()
    assert coordinator.findings()["sites"].state == "ok"
