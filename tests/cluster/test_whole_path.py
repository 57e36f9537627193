"""The whole path by the programs' own commands, with real training: from `foedus init` to an exported adapter.

Three sites enrol and approve; a run goes through a head phase and an adapter phase. In its course the coordinator is
restarted, one site's trainer is killed at work and its daemon restarted, and another looks for a GPU in vain. The first
of them runs under strace, where there is one: what was on its disk before it opened its data is read from the kernel's
own account. The remaining site runs with an audit hook, which tells what its programs executed.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from foedus_client.config import SiteSettings
from foedus_client.store import SiteStore
from foedus_common.clock import SystemClock
from foedus_common.journal import Entry
from foedus_common.model_folder import manifest_sha256
from foedus_server.config import Home
from foedus_simulations.parties import OPERATOR, Party, free_ports, until
from known_sites import write_rows
from processes import TESTS, charges_of, children, environment, plan_state
from tiny_model import LABELS, rows, write_tiny_model

TRACED, AUDITED, THIRD = SITES = ("north", "east", "south")
CANARY = "zanzibar"
"""A word that is in every row of every site."""
RECEIVED = "quagga"
"""A word in what the coordinator sends."""

PLAN = """
run = {{ name = "quagga", purpose = "The whole path of a quagga, once." }}
model = {{ name = "tiny", sha256 = "{model}" }}
data = {{ name = "terms" }}
task = {{ kind = "text-classification", labels = {labels}, max_length = 32 }}
adapter = {{ rank = 2 }}
privacy = {{ epsilon = 7.5, delta = 1e-5, clip = 1.0, divisor = 40 }}
aggregation = {{ optimizer = "fedavgm", momentum = 0.5, average_last = 2 }}
[[phase]]
train = "head"
rounds = 2
steps = 2
sampling_rate = 1.0
learning_rate = 8.0
budget_share = 0.4
[[phase]]
train = "adapter"
rounds = 2
steps = 2
sampling_rate = 0.5
learning_rate = 2.0
budget_share = 0.6
"""

STRACE = [shutil.which("strace") or "", "-D", "-f", "-A", "--seccomp-bpf", "-y", "-s", "5000"]
CALLS = ["-e", "trace=openat,write,pwrite64,fsync,fdatasync"]
STARTING = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system")
AUDIT_HOOK = Path(__file__).parent / "audited"


class Traced(Party):
    """Its daemon runs under strace, and is itself the process that is started and signalled (-D)."""

    def command(self, *arguments: str) -> list[str]:
        traced = [*STRACE, *CALLS, "-o", str(self.home.parent / "strace.txt")] if arguments == ("run",) else []
        return [*traced, *super().command(*arguments)]


def may_trace() -> bool:
    """Whether strace is here and the system lets it look at processes of ours."""
    if not STRACE[0]:
        return False
    return (
        subprocess.run([*STRACE, *CALLS, "-o", "/dev/null", "true"], capture_output=True, check=False).returncode == 0
    )


@dataclass
class Federation:
    """A finished run; the coordinator and the sites are still up."""

    folder: Path
    operator: Party
    sites: dict[str, Party]
    daemons: dict[str, subprocess.Popen[bytes]]
    run: str = ""


@pytest.fixture(scope="module")
def finished() -> Iterator[Federation]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        gates = {TRACED: f"1:invite:{folder}/gate-1", THIRD: f"2:invite:{folder}/gate-2"}
        sites = {name: site_of(folder, name, gates.get(name, "")) for name in SITES}
        federation = Federation(folder, Party(OPERATOR, folder / "operator"), sites, {})
        try:
            set_up(federation)
            conduct(federation)
            yield federation
        finally:
            for party in (federation.operator, *sites.values()):
                party.stop()


def site_of(folder: Path, name: str, gate: str) -> Party:
    """A site's program, held at `gate` (see `rigged`)."""
    around = environment({"FOEDUS_HOLD": gate})
    if name == AUDITED:
        path = os.pathsep.join([str(AUDIT_HOOK), around["PYTHONPATH"]])
        around |= {"PYTHONPATH": path, "FOEDUS_AUDIT": str(folder / "audit.jsonl")}
    return (Traced if name == TRACED and may_trace() else Party)("rigged_site", folder / name, around)


def set_up(made: Federation) -> None:
    """Keys, enrolment, models and data, as people do it."""
    operator, model = made.operator, write_tiny_model(made.folder / "tiny")
    link, enrolment = free_ports(2)
    operator.ask("init", "--demonstration", "--port", str(link), "--enrolment-port", str(enrolment))
    operator.start("up", "up", "--json")
    operator.await_line("up", '"ready"')

    def join(name: str) -> None:
        site = made.sites[name]
        token = operator.ask("site", "invite", name, "--org", f"Hospital {name}")["token"]
        site.start("join", "join", "-", "--json", secret=token)
        site.await_line("join", "fingerprint")
        shown = json.loads(site.log("join").read_text().splitlines()[0])["fingerprint"]
        operator.ask("site", "approve", name, "--fingerprint", shown)

    def open_for_work(name: str) -> None:
        site, count = made.sites[name], 30 + 10 * SITES.index(name)
        site.finish("join")
        (site.home / "site.toml").write_text(SiteSettings(threads=1).to_toml())
        data = write_rows(made.folder / f"{name}.csv", [(f"{text} {CANARY}", label) for text, label in rows(count)])
        site.ask("model", "add", str(model))
        site.ask("data", "add", "terms", str(data))
        made.daemons[name] = site.start("run", "run")

    with ThreadPoolExecutor() as at_once:
        list(at_once.map(join, SITES))
        operator.ask("roster", "sign")
        list(at_once.map(open_for_work, SITES))
    operator.ask("model", "add", str(model))


def conduct(made: Federation) -> None:
    """Submits the plan, has it approved, and takes the run through its disturbances to its end."""
    operator, plan = made.operator, made.folder / "plan.toml"
    plan.write_text(PLAN.format(model=manifest_sha256(made.folder / "tiny"), labels=json.dumps(LABELS)))
    made.run = operator.ask("run", "submit", str(plan))["run"]

    def approve(site: Party) -> None:
        until(lambda: plan_state(site.home, int(made.run)) == "pending", 60, "the plan's arrival")
        site.ask("approve", made.run)

    with ThreadPoolExecutor() as at_once:
        list(at_once.map(approve, made.sites.values()))
    runs = Home.open(operator.home).store(SystemClock()).runs

    def await_rounds(count: int) -> None:
        until(lambda: runs.run(int(made.run)).rounds_done == count, 240, f"the end of round {count}")

    await_rounds(1)  # the traced site is held before the second round
    until(lambda: any(attempt.round == 1 for attempt in runs.attempts(int(made.run))), 60, "the second round's begin")
    operator.stop("up")
    operator.start("up", "up", "--json")
    trainers = children(made.daemons[TRACED].pid)
    for trainer in trainers:
        trainer.suspend()
    (made.folder / "gate-1").touch()
    until(lambda: charges(made, TRACED)[1:] == [(1, "reserved")], 60, "the round's being charged, and trained")
    for trainer in trainers:
        trainer.kill()

    await_rounds(2)  # the third site is held before the third
    until(lambda: charges(made, TRACED)[3:] == [(2, "released")], 60, "the traced site's vector")
    made.sites[TRACED].stop("run")
    made.daemons[TRACED] = made.sites[TRACED].start("run", "run")
    third = made.sites[THIRD]
    third.stop("run")
    (third.home / "site.toml").write_text(SiteSettings(threads=1, device="cuda:7").to_toml())
    (made.folder / "gate-2").touch()
    third.start("run", "run")
    until(lambda: "cuda:7" in third.ask("status")["last trouble"], 240, "the device's being missed")
    third.stop("run")
    (third.home / "site.toml").write_text(SiteSettings(threads=1).to_toml())
    made.daemons[THIRD] = third.start("run", "run")
    watched = operator.attempt("run", "watch", made.run)
    assert watched.returncode == 0, watched.stdout
    log = operator.home / "coordinator.log"
    until(lambda: "run quagga: finished" in log.read_text(), 60, "the sites' being told, and shown the last heads")


def charges(made: Federation, name: str) -> list[tuple[int, str]]:
    """(round, state) of each training that the site's own ledger has for the run."""
    return charges_of(made.sites[name].home, int(made.run))


# --- What the run left behind ---


def test_every_round_is_committed_by_all_three(finished: Federation) -> None:
    shown = finished.operator.ask("run", "show", finished.run)
    assert (shown["state"], shown["rounds_done"]) == ("finished", 4)
    committed = [attempt for attempt in shown["attempts"] if attempt["state"] == "committed"]
    assert [(attempt["round"], attempt["survivors"]) for attempt in committed] == [(n, sorted(SITES)) for n in range(4)]


def test_the_restarted_coordinator_went_on_from_the_last_committed_round(finished: Federation) -> None:
    attempts = finished.operator.ask("run", "show", finished.run)["attempts"]
    cut = [(attempt["round"], attempt["reason"]) for attempt in attempts if attempt["state"] == "aborted"]
    assert (1, "interrupted") in cut
    assert all(index != 0 for index, _ in cut)


def test_the_daemon_outlives_a_trainer_that_is_killed_at_work(finished: Federation) -> None:
    """As by a kernel that is out of memory: the round is declined with a sentence, then trained and charged again."""
    assert finished.daemons[TRACED].poll() is None
    log = finished.sites[TRACED].log("run").read_text()
    assert "round 2: declined: The trainer was killed, most likely because memory ran out; free memory" in log
    ended = [(0, "committed"), (1, "reserved"), (1, "committed"), (2, "committed"), (3, "committed")]
    assert charges(finished, TRACED) == ended


@pytest.mark.parametrize("name", SITES)
def test_each_site_spent_what_the_plan_said_and_nothing_stays_reserved(finished: Federation, name: str) -> None:
    site = finished.sites[name]
    until(lambda: plan_state(site.home, int(finished.run)) == "finished", 60, "the site hearing that the run ended")
    (line,) = site.ask("ledger")
    assert 0 < line["spent"] <= 7.5
    assert line["reserved"] == 0
    assert line["releases"] >= 4
    assert site.attempt("ledger", "--verify").returncode == 0


def test_both_sides_journals_are_whole_and_each_vouches_for_the_other_s(finished: Federation) -> None:
    coordinator = finished.folder / "coordinator.json"
    finished.operator.ask("audit", "export", str(coordinator))
    for name, site in finished.sites.items():
        heads = finished.folder / f"{name}.json"
        assert site.ask("audit", "export", str(heads))["heads"] > 8  # four rounds and the end, of both journals
        facts = site.ask("audit", "verify", "--against", str(coordinator))
        assert facts["entries"] - facts["countersigned up to"] < 3  # what the site's commands wrote since
        facts = finished.operator.ask("audit", "verify", "--against", str(heads))
        assert facts["entries"] - facts["countersigned by"][name] < 3


def test_a_device_that_is_not_there_is_named_and_costs_nothing(finished: Federation) -> None:
    log = finished.sites[THIRD].log("run").read_text()
    assert re.search(r"round 3: declined: .*cuda:7.*\n", log)
    assert "Traceback" not in log
    assert charges(finished, THIRD) == [(index, "committed") for index in range(4)]


@pytest.mark.parametrize("name", SITES)
def test_the_daemon_leaves_no_core_dump(finished: Federation, name: str) -> None:
    assert resource.prlimit(finished.daemons[name].pid, resource.RLIMIT_CORE) == (0, 0)


def test_every_rounds_adapter_is_evaluated_and_the_last_one_exported(finished: Federation) -> None:
    held_out = write_rows(finished.folder / "held-out.csv", rows(30))
    scores = finished.operator.ask("run", "evaluate", finished.run, "--data", str(held_out), "--every-round")
    assert [score["round"] for score in scores] == [1, 2, 3, 4]
    assert all(0 <= score["accuracy"] <= 1 and score["rows"] == 30 for score in scores)
    folder = finished.folder / "adapter"
    finished.operator.ask("run", "export", finished.run, "--to", str(folder))
    exported = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "head.safetensors", "labels.json"} <= exported


@pytest.mark.parametrize("name", SITES)
def test_a_run_that_is_over_leaves_no_object_at_a_site(finished: Federation, name: str) -> None:
    assert [path for path in (finished.sites[name].home / "objects").rglob("*") if path.is_file()] == []


def test_no_word_of_the_data_is_anywhere_but_in_the_data(finished: Federation) -> None:
    files = [path for path in finished.folder.rglob("*") if path.is_file() and path.name != "strace.txt"]
    holding = {path.name for path in files if CANARY.encode() in path.read_bytes()}
    assert holding == {f"{name}.csv" for name in SITES}


# --- What the traced site did, in the order in which its kernel saw it ---


@pytest.fixture(scope="module")
def calls(finished: Federation) -> list[str]:
    if not isinstance(finished.sites[TRACED], Traced):
        pytest.skip("strace is not installed, or the system does not let it trace")
    return (finished.folder / "strace.txt").read_text(errors="replace").splitlines()


def test_every_training_is_on_disk_before_it_is_asked_for(finished: Federation, calls: list[str]) -> None:
    """In the first round and the next, when a round is trained again after a crash, and after a restart."""
    assert [entry.event["round"] for entry in reservations(finished)] == [0, 1, 1, 2, 3]
    asked = places(calls, "write(", r"\"do\": \"train\"")
    assert len(asked) == 5
    for reserved, request in zip(on_disk(finished, calls), asked, strict=True):
        assert reserved < request


def test_the_reservation_is_on_disk_before_the_data_is_opened(finished: Federation, calls: list[str]) -> None:
    """Each trainer opens the data once: the first one, the one after it was killed, and the one after the restart."""
    opened: dict[str, int] = {}
    for place in places(calls, "openat(", f'/{TRACED}.csv"'):
        opened.setdefault(calls[place].split()[0], place)
    assert len(opened) == 3
    first, died, again, _, restarted = on_disk(finished, calls)
    places_opened = list(opened.values())
    assert [first, places_opened[0], died, again, places_opened[1], restarted, places_opened[2]] == sorted(
        [first, died, again, restarted, *places_opened]
    )


def reservations(finished: Federation) -> list[Entry]:
    """The traced site's entries of rounds reserved, in the order of its ledger."""
    with closing(SiteStore(finished.sites[TRACED].home / "site.db", SystemClock())) as store:
        entries = [entry for entry, _ in store.ledger_entries()]
    return [entry for entry in entries if entry.event["event"] == "reserve_round"]


def on_disk(finished: Federation, calls: list[str]) -> list[int]:
    """For each reservation of a round, the place at which the file that holds it was synchronised."""
    found = []
    for entry in reservations(finished):
        body = entry.body.decode().replace('"', r"\"")
        written = places(calls, "pwrite64(", "site.db-wal>", body)[0]
        thread = calls[written].split()[0]
        synced = [place for place in places(calls, "sync", "= 0") if calls[place].split()[0] == thread]
        found.append(next(place for place in synced if place > written))
    return found


def places(calls: list[str], *parts: str) -> list[int]:
    """The lines that hold all the parts."""
    return [number for number, call in enumerate(calls) if all(part in call for part in parts)]


# --- What the audited site executed ---


@pytest.fixture(scope="module")
def events(finished: Federation) -> list[list[Any]]:
    """Process id, event, and what tells it apart, of the audited site's daemon, its commands and its trainer."""
    return [json.loads(line) for line in (finished.folder / "audit.jsonl").read_text().splitlines()]


def test_nothing_that_was_received_is_executed(finished: Federation, events: list[list[Any]]) -> None:
    """Code comes from what was installed at the site (here: the interpreter's folders and this checkout), or was made
    there in memory, and then holds no word of the coordinator's and no path of what was received."""
    packages = Path(typer.__file__).parents[1]
    installed = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(TESTS.parent), str(packages)]
    home, marks = str(finished.folder), (RECEIVED, str(finished.folder / AUDITED))
    for _, event, *what in events:
        if event in ("exec", "compile") or (event == "import" and what[1]):
            name = what[0] if event != "import" else what[1]
            assert name[:1] in ("<", "") or any(name.startswith(root) for root in installed), (event, name)
            assert not name.startswith(home), (event, name)
        if event in ("exec", "compile"):
            assert not any(mark in what[1] for mark in marks), (event, what)
        if event == "ctypes.dlopen":
            assert not what[0].startswith(home), what
    assert [what for _, event, *what in events if event == "pickle.find_class"] == []


def test_a_site_starts_its_trainer_and_nothing_else(finished: Federation, events: list[list[Any]]) -> None:
    started = [what for _, event, *what in events if event in STARTING]
    assert started == [[sys.executable, str([sys.executable, "-P", "-m", "foedus_client.training.trainer"])]]


def test_the_audit_saw_the_round(finished: Federation, events: list[list[Any]]) -> None:
    """Or the two tests above would show nothing."""
    executed = {what[0] for _, event, *what in events if event == "exec"}
    opened = {what[0] for _, event, *what in events if event == "open"}
    for module in ("client/foedus_client/round.py", "client/foedus_client/training/trainer.py"):
        assert str(TESTS.parent / module) in executed
    assert any("/objects/" in path for path in opened)
    assert f"{finished.folder}/{AUDITED}.csv" in opened
    assert len({process for process, *_ in events}) >= 3


def test_the_audit_sees_code_that_was_received(tmp_path: Path) -> None:
    seen = tmp_path / "audit.jsonl"
    harm = tmp_path / "received.py"
    harm.write_text("quagga = 1")
    script = (
        f"import pickle, runpy; exec('quagga = 1'); runpy.run_path({str(harm)!r}); pickle.loads(pickle.dumps(print))"
    )
    around = {**os.environ, "PYTHONPATH": str(AUDIT_HOOK), "FOEDUS_AUDIT": str(seen)}
    subprocess.run([sys.executable, "-c", script], env=around, check=True)
    events = [json.loads(line) for line in seen.read_text().splitlines()]
    assert any(event == "exec" and RECEIVED in what[1] for _, event, *what in events)
    assert any(event == "exec" and what[0] == str(harm) for _, event, *what in events)
    assert any(event == "pickle.find_class" for _, event, *_ in events)
