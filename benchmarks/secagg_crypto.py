"""Secure aggregation at a site and at the coordinator against Flower's SecAgg+, both in this process, in turns.

`python benchmarks/secagg_crypto.py`: d = 1M coordinates, 10 sites without and with drops, and 30 sites of which 5 drop;
one colluding organisation of one site is assumed, which sets the threshold of both; complete graph on both sides.

Ours: `FieldLayout.encode` of float64, then `SiteSession` and `CoordinatorSession` as a round uses them: envelopes built
and parsed, signatures and the consistency stage (Flower has neither), every check, masks, shares, decoding. Flower:
`secaggplus_mod` and `SecAggPlusWorkflow` as they are, on float32; the mod also turns its masked vector into bytes, a
tenth of a site's time, where our words are sent as they lie in memory. Not counted on either side: training, and what
carries and stores messages and vectors, hashes included. Each step counts as it went at the site and in the run where
it was fastest, for a busy machine slows long steps more than short ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from types import SimpleNamespace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.task_identity import TaskIdentity

from foedus_common.protocol.thresholds import thresholds, tolerated_drops
from report import report
from rounds import CLIP, COLLUDING, Stopwatch, play, undisturbed

DIMENSION = 1_000_000


@dataclass(frozen=True)
class Setting:
    """sites of which `drops` send no vector; goals are times faster than Flower."""

    sites: int
    drops: int
    repeats: int
    site_goal: float
    coordinator_goal: float

    @property
    def threshold(self) -> int:
        return thresholds(self.sites, COLLUDING).threshold


SETTINGS = (
    Setting(10, 0, repeats=10, site_goal=10, coordinator_goal=10),
    Setting(10, tolerated_drops(10, COLLUDING), repeats=10, site_goal=10, coordinator_goal=20),
    Setting(30, 5, repeats=2, site_goal=10, coordinator_goal=50),
)


# --- Flower's SecAgg+ ---


class FlowerGrid:
    """Hands messages to `secaggplus_mod` of each node, in this process, and times them; silent nodes send no vector."""

    def __init__(self, updates: np.ndarray, silent: set[int]) -> None:
        self.sites = [Stopwatch() for _ in updates]
        self.seconds = 0.0
        self._stages = 0
        self._silent = silent
        self._contexts = {nid: Context(1, nid, {}, RecordDict(), {}) for nid in range(len(updates))}
        self._results = [
            FitRes(Status(Code.OK, ""), ndarrays_to_parameters([update.astype(np.float32)]), 1, {})
            for update in updates
        ]

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> list[Message]:
        start = time.perf_counter()
        self._stages += 1
        replies = []
        for message in messages:
            nid = message.metadata.dst_node_id
            if self._stages < 3 or nid not in self._silent:
                message = deepcopy(message)  # every node gets its own, as over a network
                with self.sites[nid].running():
                    replies.append(secaggplus_mod(message, self._contexts[nid], self._train))
        self.seconds += time.perf_counter() - start
        return replies

    def _train(self, message: Message, context: Context) -> Message:
        with self.sites[context.node_id].paused():
            content = fitres_to_recorddict(self._results[context.node_id], keep_input=True)
            return Message(content, reply_to=message)


class Collect(FedAvg):
    """Asks every node once and keeps what was aggregated."""

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self._nodes = nodes

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: object) -> list:
        return [(SimpleNamespace(node_id=nid), FitIns(parameters, {})) for nid in range(self._nodes)]

    def aggregate_fit(self, server_round: int, results: list, failures: list) -> tuple[None, dict]:
        (self.average,) = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


def flower(updates: np.ndarray, setting: Setting) -> tuple[Sequence[Stopwatch], Stopwatch]:
    """The steps of each surviving site and of the coordinator: Flower's own workflow and its own mod, unaltered."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    survivors = setting.sites - setting.drops
    grid, strategy = FlowerGrid(updates, set(range(survivors, setting.sites))), Collect(setting.sites)
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=strategy)
    context.state.config_records["config"] = ConfigRecord({"current_round": 1})
    context.state.array_records["parameters"] = ArrayRecord()
    workflow = SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=setting.threshold / setting.sites,
        max_weight=1.0,
        clipping_range=CLIP,
        quantization_range=1 << 22,
        modulus_range=1 << 32,
    )
    start = time.perf_counter()
    workflow(grid, context)
    server = Stopwatch()
    server.laps.append(time.perf_counter() - start - grid.seconds)
    np.testing.assert_allclose(strategy.average, updates[:survivors].mean(axis=0), atol=1e-5)
    return grid.sites[:survivors], server


def ours(updates: np.ndarray, setting: Setting) -> tuple[Sequence[Stopwatch], Stopwatch]:
    """The same for ours."""
    played = play(updates, setting.drops)
    return played.sites, played.coordinator


def main() -> bool:
    logging.disable(logging.INFO)  # Flower tells of every stage
    results = []
    for setting in SETTINGS:
        updates = np.random.default_rng(0).uniform(-CLIP, CLIP, (setting.sites, DIMENSION))
        runs = [(*ours(updates, setting), *flower(updates, setting)) for _ in range(setting.repeats)]
        sites, coordinators, flower_sites, flower_servers = zip(*runs, strict=True)
        site, flower_site = (undisturbed([*chain(*runs)]) for runs in (sites, flower_sites))
        coordinator, flower_server = undisturbed(coordinators), undisturbed(flower_servers)
        what = f"n = {setting.sites}, d = 1M, {setting.drops} drops"
        print(f"{what}: site {site * 1e3:.1f} ms against {flower_site * 1e3:.0f} ms, ", end="")
        print(f"coordinator {coordinator * 1e3:.1f} ms against {flower_server * 1e3:.0f} ms")
        for party, times, goal in (
            ("site", flower_site / site, setting.site_goal),
            ("coordinator", flower_server / coordinator, setting.coordinator_goal),
        ):
            name = f"secagg_{party}_{setting.sites}_sites_{setting.drops}_drops"
            claim = f"crypto of the {party} a round, {what}, against Flower's SecAgg+ in the same run"
            results.append(report(name, claim, times, goal, "times"))
    return all(results)


if __name__ == "__main__":
    raise SystemExit(not main())
