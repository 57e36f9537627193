"""Four sites and their coordinator, real processes, with a proxy before each site: at the beginning of a chosen stage
the network fails in a chosen way, heals after a while, and nobody does anything else."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from foedus_client.config import SiteSettings
from foedus_client.policy import SitePolicy
from foedus_simulations.parties import until
from judging import judge, outcome
from known_sites import plan_of
from processes import IMPATIENCE, Cluster
from proxy import DOWN, UP, Proxy
from rigged import STAGES

SITES = ("east", "north", "south", "west")
VICTIM = "west"
POLICY = SitePolicy(require_approval=False, max_epsilon_per_day=400.0, max_epsilon_lifetime=400.0)
AT = ("invite", *STAGES)
LONGER_THAN_A_STAGE = IMPATIENCE.stage_seconds + 3.0


@dataclass(frozen=True)
class Fault:
    """meaning: for the table. strike: done to the victim's proxy, or to all. lasts: seconds until it heals."""

    meaning: str
    strike: Callable[[Proxy, list[Proxy]], object]
    lasts: float


FAULTS = {
    "delay": Fault("a third of a second more each way", lambda one, _: one.delay(0.3), LONGER_THAN_A_STAGE),
    "stall": Fault("nothing passes for 8 s", lambda one, _: one.stall(), LONGER_THAN_A_STAGE),
    "cut": Fault("the site's connections are reset", lambda one, _: one.cut(), 0.0),
    "half-open, site": Fault("reset, and the site is not told", lambda one, _: one.half_open(UP), 0.0),
    "half-open, coordinator": Fault("reset, and the coordinator is not told", lambda one, _: one.half_open(DOWN), 0.0),
    "partition": Fault("nothing passes to any site for 8 s", lambda _, all_: stall(all_), LONGER_THAN_A_STAGE),
}


def stall(proxies: list[Proxy]) -> None:
    for proxy in proxies:
        proxy.stall()


class Networks:
    """A federation at work; a later fault finds what earlier ones left behind."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.proxies = {name: Proxy(cluster.operator.home.settings.link.port) for name in SITES}
        self._hold = cluster.folder / "hold"
        self._runs = 0
        cluster.start("coordinator", FOEDUS_HOLD=f"@{self._hold}")
        for name, proxy in self.proxies.items():
            settings = SiteSettings(coordinator=f"127.0.0.1:{proxy.port}", threads=1, policy=POLICY)
            (cluster.homes[name] / "site.toml").write_text(settings.to_toml())
            cluster.start(name)
            until(lambda: "connected: " in cluster.log(name), 60, f"{name}'s being connected")  # noqa: B023

    def suffer(self, stage: str, fault: Fault) -> str:
        """One run of two rounds with a fault in the first; gives what became of it.

        Raises what `judge` raises, or LocalError when the run does not come to its end by itself.
        """
        self._runs += 1
        run_id, gate = self._runs, self.cluster.folder / f"gate-{self._runs}"
        self._hold.write_text(f"0:{stage}:{gate}")
        agreed = self.cluster.submit(plan_of(rounds=2), run_id)
        until(gate.with_name(f"{gate.name}.reached").exists, 60, f"the stage {stage}")
        try:
            fault.strike(self.proxies[VICTIM], list(self.proxies.values()))
            gate.touch()
            time.sleep(fault.lasts)  # this is how long the fault lasts, and no wait for anything
        finally:
            self.heal()
        self.cluster.await_state(run_id, "finished")
        until(lambda: self._heard_of_the_end(run_id), 60, "the sites' hearing of the end")
        judge(self.cluster, agreed, POLICY)
        assert self.cluster.survivors(run_id)[-1] == SITES, "the site did not come back"
        return outcome(self.cluster, run_id)

    def heal(self) -> None:
        for proxy in self.proxies.values():
            proxy.heal()

    def _heard_of_the_end(self, run_id: int) -> bool:
        return all(self.cluster.plan_state(name, run_id) == "finished" for name in SITES)


@contextmanager
def networks() -> Iterator[Networks]:
    """In memory where there is a file system in memory."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        cluster = Cluster.make(Path(folder), dict.fromkeys(SITES, POLICY), patience=IMPATIENCE)
        made = None
        try:
            made = Networks(cluster)
            yield made
        finally:
            cluster.stop()
            cluster.operator.close()
            for proxy in made.proxies.values() if made else ():
                proxy.close()
