"""A site that pauses in the middle of a round, and an operator who stops a run and resumes it, with real processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing

import pytest

from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_simulations.parties import SITE, Party, until
from known_sites import plan_of
from processes import CLOCK, Cluster

ALWAYS, OTHER = ("east", "north"), "south"
POLICY = SitePolicy(require_approval=False, max_epsilon_lifetime=200.0, max_epsilon_per_day=200.0)


@pytest.fixture(scope="module")
def three(make_cluster: Callable[[Mapping[str, SitePolicy]], Cluster]) -> Iterator[Cluster]:
    """The other's daemon, which the first test starts, runs through both."""
    three = make_cluster(dict.fromkeys((*ALWAYS, OTHER), POLICY))
    with three.running("coordinator", *ALWAYS):
        yield three


def test_a_pause_ends_the_round_under_way_and_costs_the_run_nothing(three: Cluster) -> None:
    agreed, gate = three.submit(plan_of(rounds=3), run_id=1), three.folder / "gate"
    hold(three, f"0:survivors:{gate}")
    daemon = three.start(OTHER, FOEDUS_HOLD=f"@{three.folder / 'hold'}")
    until(lambda: masked(three, 1), 60, "the first round's vectors being masked")
    with closing(SiteStore(three.homes[OTHER] / "site.db", CLOCK)) as store:
        store.pause("ada")
    until(lambda: "south pauses when" in log(three), 60, "the daemon's noticing")
    assert "south is paused" not in log(three)
    gate.touch()
    until(lambda: "south is paused" in log(three), 60, "the daemon's rest")
    three.await_rounds(1, 1)
    assert (three.rounds_done(1), three.attempts(1)[0]) == (1, (0, 0, "committed"))
    until(lambda: OTHER not in connected(three), 60, "the site's hanging up")

    assert Party(SITE, three.homes[OTHER]).ask("resume") == {"paused": False}
    three.await_state(1, "finished")
    three.assert_sums_are_exact(agreed)
    for name in (*ALWAYS, OTHER):
        assert [index for index, _ in three.charges(name, 1)] == [0, 1, 2]
    assert daemon.poll() is None


def test_a_stopped_run_is_resumed_by_the_operators_command(three: Cluster) -> None:
    gate = three.folder / "second gate"
    hold(three, f"1:keys:{gate}")
    agreed = three.submit(plan_of(rounds=3), run_id=2)
    until(gate.with_name(f"{gate.name}.reached").exists, 60, "the second round's being trained")
    assert three.command("run", "stop", "2").returncode == 0
    gate.touch()
    three.await_state(2, "stopped")
    assert three.rounds_done(2) == 1
    until(lambda: all(three.plan_state(name, 2) == "stopped" for name in three.homes), 60, "the sites' hearing of it")
    assert three.command("run", "resume", "2").returncode == 0
    three.await_state(2, "finished")
    three.assert_sums_are_exact(agreed)
    for name in three.homes:
        assert [index for index, _ in three.charges(name, 2)] == [0, 1, 2]  # no vector was masked, so they served


def hold(cluster: Cluster, where: str) -> None:
    """Where the other's daemon is to wait; see `rigged`."""
    (cluster.folder / "hold").write_text(where)


def masked(cluster: Cluster, run_id: int) -> bool:
    return any("masked input" in attempt.seconds for attempt in cluster.operator.store.runs.attempts(run_id))


def log(cluster: Cluster) -> str:
    return (cluster.folder / "logs" / f"{OTHER}-run.log").read_text()


def connected(cluster: Cluster) -> set[str]:
    """Who is connected to the coordinator, by its own log."""
    here: set[str] = set()
    for line in (cluster.operator.home.path / "coordinator.log").read_text().splitlines():
        words = line.split()
        if words[-1] == "connected":
            here.add(words[-2])
        elif words[-1] == "disconnected":
            here.discard(words[-2])
    return here
