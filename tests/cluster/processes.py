"""A federation of real processes on loopback: its homes are made here, its programs started, killed, stopped by pid."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foedus_client.config import SiteHome, SiteSettings
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_common.clock import Clock, SystemClock
from foedus_common.plan import AgreedPlan
from foedus_server.config import Link, Patience, Settings
from foedus_simulations.parties import Party, free_ports, until
from known_sites import assert_sums_are_exact, join_site, submit
from operators import Operator
from tiny_model import rows

TESTS = Path(__file__).parents[1]
CLOCK = SystemClock()
PATIENCE = Patience(stage_seconds=60, absent_seconds=120, retry_seconds=0.2)
"""Nobody is given up for being slow."""
IMPATIENCE = Patience(stage_seconds=5, absent_seconds=120, retry_seconds=0.2)
"""Where sites fall silent, and the others are to wait no longer than it takes an honest one on a busy machine."""


def environment(rig: Mapping[str, str]) -> dict[str, str]:
    """What a rigged program needs around it. rig: as in `rigged`."""
    path = [str(TESTS), str(TESTS / "cluster"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), **rig}


@dataclass
class Cluster:
    """A coordinator and sites that have joined, with known updates in place of training. Nothing runs until started."""

    folder: Path
    operator: Operator
    homes: dict[str, Path]
    _parties: list[Party] = field(default_factory=list)

    @classmethod
    def make(
        cls,
        folder: Path,
        policies: Mapping[str, SitePolicy],
        database: str = "",
        clock: Clock = CLOCK,
        patience: Patience = PATIENCE,
    ) -> Cluster:
        """policies: by the sites' names. database: the coordinator's, as in foedus.toml. clock: by which the federation
        was made; the programs have this machine's, unless rigged."""
        port, enrolment = free_ports(2)
        link = Link(port=port, enrolment_port=enrolment)
        settings = Settings("Test", database=database, link=link, patience=patience)
        operator = Operator(folder / "operator", clock, settings)
        for number, (name, policy) in enumerate(policies.items()):
            SiteHome.create(folder / name, SiteSettings(threads=1, policy=policy))
            join_site(operator, folder / name, name, clock, rows(30 + 10 * number))
        return cls(folder, operator, {name: folder / name for name in policies})

    # --- Programs ---

    def start(self, name: str, **rig: str) -> subprocess.Popen[bytes]:
        """Starts the "coordinator", and waits until it listens, or a site. rig: as in `rigged`."""
        coordinator = name == "coordinator"
        party = self._party("operator" if coordinator else name, rig)
        if not coordinator:
            return party.start("run", "run")
        party.log("up").unlink(missing_ok=True)  # of an earlier start, so that the line to wait for is this one's
        process = party.start("up", "up", "--json")
        party.await_line("up", '"ready"')
        return process

    @contextmanager
    def running(self, *names: str) -> Iterator[None]:
        """These run within the block; at its end each is stopped as by Ctrl-C and ends in good order."""
        started = [self.start(name) for name in names]
        yield
        for process in started:
            process.send_signal(signal.SIGINT)
        assert [process.wait(timeout=60) for process in started] == [0] * len(started)

    def command(self, *arguments: str, of: str = "operator") -> subprocess.CompletedProcess[str]:
        """One command of the operator's, or of a site's, to its end."""
        return self._party(of, {}).attempt(*arguments)

    def log(self, name: str) -> str:
        """What a site's daemon has said so far."""
        return (self.folder / "logs" / f"{name}-run.log").read_text()

    def _party(self, name: str, rig: Mapping[str, str]) -> Party:
        module = "rigged_coordinator" if name == "operator" else "rigged_site"
        self._parties.append(Party(module, self.folder / name, environment({"FOEDUS_KNOWN": "1", **rig})))
        return self._parties[-1]

    def stop(self) -> None:
        """Whatever still runs."""
        for party in self._parties:
            party.stop()

    # --- Runs ---

    def submit(self, plan: Any, run_id: int) -> AgreedPlan:
        return submit(self.operator.home, self.operator.store, plan, run_id)[1]

    def state(self, run_id: int) -> str:
        return self.operator.store.runs.run(run_id).state

    def rounds_done(self, run_id: int) -> int:
        return self.operator.store.runs.run(run_id).rounds_done

    def await_rounds(self, run_id: int, count: int, seconds: float = 180) -> None:
        until(lambda: self.rounds_done(run_id) >= count, seconds, f"round {count} of run {run_id}")

    def await_state(self, run_id: int, state: str, seconds: float = 180) -> None:
        until(lambda: self.state(run_id) == state, seconds, f"run {run_id} being {state}")

    def attempts(self, run_id: int) -> list[tuple[int, int, str]]:
        return [(a.round, a.attempt, a.state) for a in self.operator.store.runs.attempts(run_id)]

    def survivors(self, run_id: int) -> list[tuple[str, ...]]:
        return [attempt.survivors for attempt in self.operator.store.runs.committed(run_id)]

    def charges(self, name: str, run_id: int) -> list[tuple[int, str]]:
        return charges_of(self.homes[name], run_id)

    def plan_state(self, name: str, run_id: int) -> str:
        return plan_state(self.homes[name], run_id)

    def assert_sums_are_exact(self, agreed: AgreedPlan) -> None:
        assert_sums_are_exact(self.operator, self.homes, agreed)


def plan_state(home: Path, run_id: int) -> str:
    """What became of a run's plan at a site, while its daemon may be running."""
    with closing(SiteStore(home / "site.db", CLOCK)) as store:
        plan = store.plan_of_run(run_id)
        return "unknown" if plan is None else plan.state


def charges_of(home: Path, run_id: int) -> list[tuple[int, str]]:
    """(round, state) of each charge in a site's own ledger, while its daemon may be running."""
    with closing(SiteStore(home / "site.db", CLOCK)) as store:
        ledger = Ledger(store, CLOCK, sign=lambda message: b"")
        return [(charge.round, charge.state) for charge in ledger.run(run_id).charges]


@dataclass(frozen=True)
class Child:
    """A process that a process of ours started."""

    pid: int

    def suspend(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def children(pid: int) -> list[Child]:
    """The processes whose parent has this id (Linux)."""
    listed = [(path, path.read_text().rpartition(")")[2].split()) for path in Path("/proc").glob("[0-9]*/stat")]
    return [Child(int(path.parent.name)) for path, fields in listed if fields[1] == str(pid)]


def killed(process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    """Waits until the process has ended as by kill -9."""
    assert process.wait(timeout=seconds) == -signal.SIGKILL
