"""Four sites and a coordinator, all of them real processes with known updates in place of training: in each of their
runs one is killed at a chosen point, started again as a service manager would, and nobody does anything else."""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import rigged_coordinator
import rigged_site
from foedus_client.policy import SitePolicy
from foedus_server.config import Patience
from foedus_simulations.parties import until
from judging import judge, outcome
from known_sites import plan_of
from processes import Cluster, killed

SITES = ("east", "north", "south", "west")
COORDINATOR = "coordinator"
POLICY = SitePolicy(require_approval=False, max_epsilon_per_day=400.0, max_epsilon_lifetime=400.0)
PATIENCE = Patience(stage_seconds=20, absent_seconds=60, retry_seconds=0.2)
"""So that a site which is started again at once is back in time, also on a busy machine."""
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

    def suffer(self, case: Case) -> str:
        """One run with one crash in it; gives what became of it.

        Raises what `judge` raises, or LocalError when the run does not come to its end by itself.
        """
        self._runs += 1
        run_id, order = self._runs, self._order(case.victim)
        order.write_text(f"{case.round}:{case.point}:{run_id}")
        agreed = self.cluster.submit(plan_of(rounds=ROUNDS), run_id)
        killed(self._processes[case.victim])
        order.unlink()
        self._processes[case.victim] = self._start(case.victim)
        self.cluster.await_state(run_id, "finished", seconds=90)
        until(lambda: self._heard_of_the_end(run_id), 30, "the sites' hearing of the end")
        judge(self.cluster, agreed, POLICY)
        return outcome(self.cluster, run_id)

    def _heard_of_the_end(self, run_id: int) -> bool:
        return all(self.cluster.plan_state(name, run_id) == "finished" for name in SITES)

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        return self.cluster.start(name, FOEDUS_KILL=f"@{self._order(name)}")

    def _order(self, name: str) -> Path:
        return self.cluster.folder / f"kill-{name}"


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
