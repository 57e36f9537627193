"""From the decoded mean of a round to the next adapter: Flower's server optimisers, used as they are.

The secure sum leaves one mean update, which is handed to a Flower strategy as the reply of a single client. What a
strategy remembers between rounds (momentum, second moments) is written out after each round, so that a restarted
coordinator goes on with the same numbers.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi
from numpy.typing import NDArray
from safetensors.numpy import load, save

from foedus_common.link.contents import message_of
from foedus_common.plan import Aggregation

KEY = "vector"
Vector = NDArray[np.float64]

# Flower logs every aggregation as if clients had replied; the coordinator's own journal says what happened.
logging.getLogger("flwr").setLevel(logging.WARNING)


class ServerOptimizer:
    """One phase's optimiser over the flat trained vector, shape (d,), float64.

    `state` is what `state()` returned after the last round, or None at the start of a phase.
    """

    def __init__(self, settings: Aggregation, state: bytes | None = None) -> None:
        self._strategy = _strategy(settings)
        self._restore({} if state is None else load(state))

    def step(self, round_index: int, current: Vector, mean_update: Vector) -> Vector:
        """The next vector, given the current one and the mean of the sites' updates."""
        if isinstance(self._strategy, FedAvgM):
            self._strategy.current_arrays = ArrayRecord({KEY: Array(current)})
        elif isinstance(self._strategy, FedAdam | FedYogi):
            self._strategy.current_arrays = {KEY: current}
        reply = _as_reply(current + mean_update)
        arrays, _ = self._strategy.aggregate_train(round_index, [reply])
        assert arrays is not None  # one valid reply always aggregates
        return arrays[KEY].numpy()

    def state(self) -> bytes:
        """Safetensors bytes of what the optimiser remembers; empty moments are left out."""
        strategy = self._strategy
        moments: dict[str, Any] = {}
        if isinstance(strategy, FedAvgM) and strategy.momentum_vector is not None:
            moments["momentum"] = strategy.momentum_vector[0]
        if isinstance(strategy, FedAdam | FedYogi) and strategy.m_t and strategy.v_t:
            moments = {"first": strategy.m_t[KEY], "second": strategy.v_t[KEY]}
        return save({name: np.ascontiguousarray(moment) for name, moment in moments.items()})

    def _restore(self, moments: dict[str, Vector]) -> None:
        if isinstance(self._strategy, FedAvgM) and "momentum" in moments:
            self._strategy.momentum_vector = [moments["momentum"]]
        if isinstance(self._strategy, FedAdam | FedYogi) and "first" in moments:
            self._strategy.m_t = {KEY: moments["first"]}
            self._strategy.v_t = {KEY: moments["second"]}


def _strategy(settings: Aggregation) -> FedAvg:
    match settings.optimizer:
        case "fedavgm":
            return FedAvgM(server_learning_rate=settings.learning_rate, server_momentum=settings.momentum)
        case "fedadam":
            return FedAdam(eta=settings.learning_rate)
        case "fedyogi":
            return FedYogi(eta=settings.learning_rate)
        case _:
            return FedAvg()


def _as_reply(vector: Vector) -> Message:
    metadata = Metadata(
        run_id=0, message_id="", src_node_id=0, dst_node_id=0, reply_to_message_id="",
        group_id="", created_at=0.0, ttl=0.0, message_type="train",
    )  # fmt: skip
    content = RecordDict({"arrays": ArrayRecord({KEY: Array(vector)}), "metrics": MetricRecord({"num-examples": 1})})
    return message_of(metadata, content)
