"""Real processes with the coordinator's database on PostgreSQL, whose server goes down in the middle of a round."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import postgresql
from foedus_client.policy import SitePolicy
from foedus_simulations.parties import until
from known_sites import plan_of
from processes import Cluster

NAMES = ("east", "north", "south")
HELD = "south"


@pytest.fixture
def server() -> Iterator[postgresql.Server]:
    if reason := postgresql.missing():
        pytest.skip(reason)
    with postgresql.server() as server:
        yield server


@pytest.fixture
def three(server: postgresql.Server) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder:
        policy = SitePolicy(require_approval=False, max_epsilon_per_day=40.0, max_epsilon_lifetime=40.0)
        cluster = Cluster.make(Path(folder), dict.fromkeys(NAMES, policy), server.database())
        yield cluster
        cluster.stop()
        cluster.operator.close()


def test_a_run_waits_for_its_database_and_goes_on(three: Cluster, server: postgresql.Server) -> None:
    gate, log = three.folder / "gate", three.operator.home.path / "coordinator.log"
    agreed = three.submit(plan_of(rounds=3), run_id=1)
    coordinator = three.start("coordinator")
    for name in NAMES:
        three.start(name, **({"FOEDUS_HOLD": f"1:keys:{gate}"} if name == HELD else {}))
    until(lambda: gate.with_name("gate.reached").exists(), 60, "the second round")
    second = three.command("up")
    assert (second.returncode, "Another `foedus up` works with this database" in second.stderr) == (2, True)

    server.stop()
    gate.touch()
    until(lambda: "Waiting for it." in log.read_text(), 60, "the coordinator's noticing")
    assert coordinator.poll() is None
    server.start()
    three.await_state(1, "finished")
    three.assert_sums_are_exact(agreed)
    assert [state for _, _, state in three.attempts(1)].count("committed") == 3
    assert three.command("audit", "verify").returncode == 0
    assert "Traceback" not in log.read_text()
