"""Four sites and a coordinator, all of them real processes with known updates in place of training: in each of their
runs one is killed at a chosen point and started again as a service manager would, or meets with another trouble there,
and nobody does anything else."""

from __future__ import annotations

import random
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rigged_coordinator
import rigged_site
from foedus_client.policy import SitePolicy
from foedus_common.clock import DAY
from foedus_common.plan import AgreedPlan
from foedus_server.config import Patience
from foedus_simulations.parties import until
from judging import judge, outcome
from known_sites import plan_of
from processes import Cluster, killed

SITES = ("east", "north", "south", "west")
COORDINATOR = "coordinator"
POLICY = SitePolicy(require_approval=False, max_epsilon_per_day=400.0, max_epsilon_lifetime=400.0)
PATIENCE = Patience(stage_seconds=60, absent_seconds=60, retry_seconds=0.2)
"""So that a site which is started again at once is back in time, also on a busy machine."""
TROUBLES = {
    "kill": "kill -9, and a start at once",
    "disk": "for 3 s whatever is written to the disk fails",
    "ahead": "for 3 s the clock is a day ahead",
    "behind": "for 3 s the clock is a day behind",
}
LASTS = 3.0
SMALL_FILE = 16 * 1024
"""Bytes to which files may still grow on a disk that fails: databases and their logs have long passed them."""
ROUNDS = 2
ONLY_IN_THE_FIRST = ("plan stored", "policy checked", "committed")
"""Points of a site that belong to the run and to no round: `rigged_site` says 0."""


@dataclass(frozen=True)
class Case:
    """Who is killed, where, and in which round."""

    victim: str
    point: str
    round: int


def cases(seed: int) -> list[Case]:
    """All 24 points in the order of a run; the seed chooses among the sites and the rounds."""
    drawn = random.Random(seed)
    of_site = [
        Case(drawn.choice(SITES), point, 0 if point in ONLY_IN_THE_FIRST else drawn.randrange(ROUNDS))
        for point in rigged_site.POINTS
    ]
    of_coordinator = [
        # After the last round nobody is invited any more.
        Case(COORDINATOR, point, 0 if point == "published" else drawn.randrange(ROUNDS))
        for point in rigged_coordinator.POINTS
    ]
    return of_site + of_coordinator


class Federation:
    """At work from the beginning; a later crash finds what earlier ones left behind."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._runs = 0
        self._processes = {name: self._start(name) for name in (COORDINATOR, *SITES)}

    def suffer(self, case: Case, trouble: str = "kill") -> str:
        """One run with one trouble of TROUBLES in it; gives what became of it.

        Raises what `judge` raises, or LocalError when the run does not come to its end by itself.
        """
        self._runs += 1
        run_id = self._runs
        agreed = self._kill(case, run_id) if trouble == "kill" else self._strike(case, run_id, trouble)
        until(lambda: self.cluster.state(run_id) in ("finished", "failed"), 180, "the run's end")
        state = self.cluster.state(run_id)
        assert state == "finished" or trouble != "kill", f"the run {state}: {self.cluster.attempts(run_id)}"
        until(lambda: self._heard_of_the_end(run_id), 60, "the sites' hearing of the end")
        judge(self.cluster, agreed, POLICY)
        return outcome(self.cluster, run_id)

    def _kill(self, case: Case, run_id: int) -> AgreedPlan:
        order = self._order("kill", case.victim)
        order.write_text(f"{case.round}:{case.point}:{run_id}")
        agreed = self.cluster.submit(plan_of(rounds=ROUNDS), run_id)
        killed(self._processes[case.victim])
        order.unlink()
        self._processes[case.victim] = self._start(case.victim)
        return agreed

    def _strike(self, case: Case, run_id: int, trouble: str) -> AgreedPlan:
        gate = self.cluster.folder / f"gate-{run_id}"
        self._order("hold", case.victim).write_text(f"{case.round}:{case.point}:{gate}")
        agreed = self.cluster.submit(plan_of(rounds=ROUNDS), run_id)
        until(gate.with_name(f"{gate.name}.reached").exists, 60, f"the point {case.point!r}")
        pid, skew = self._processes[case.victim].pid, self._order("skew", case.victim)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        if trouble == "disk":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (SMALL_FILE, before[1]))
        else:
            skew.write_text(str(DAY if trouble == "ahead" else -DAY))
        gate.touch()
        time.sleep(LASTS)  # this is how long the trouble lasts, and no wait for anything
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
        skew.unlink(missing_ok=True)
        return agreed

    def _heard_of_the_end(self, run_id: int) -> bool:
        return all(self.cluster.plan_state(name, run_id) in ("finished", "stopped") for name in SITES)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        orders = {f"FOEDUS_{what.upper()}": f"@{self._order(what, name)}" for what in ("kill", "hold", "skew")}
        return self.cluster.start(name, **orders)

    def _order(self, what: str, name: str) -> Path:
        return self.cluster.folder / f"{what}-{name}"


@contextmanager
def federation(database: str = "") -> Iterator[Federation]:
    """In memory where there is a file system in memory. database: as in foedus.toml."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        cluster = Cluster.make(Path(folder), dict.fromkeys(SITES, POLICY), database, patience=PATIENCE)
        try:
            yield Federation(cluster)
        finally:
            cluster.stop()
            cluster.operator.close()
