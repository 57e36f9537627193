"""Two attacks that recover one client's vector from Flower 1.41's SecAgg+, on its own mod and its own workflow.

`alive_and_dead`: one unmask request lists the victim as active and as dead, and every client answers for both. The
server's code is Flower's; its grid alters one message on the way out and tidies the answers: the round ends as usual.

`brute_force`: nothing is altered. A mask's seed is folded to 32 bits of which 28 vary (the base64 text of a key, four
bytes at a time, xored), and makes the mask by MT19937. With two clients one seed hides the vector once the server has
taken off the self-mask, as it does in every round. To save time the attack may be told the seed's upper bits; the rate
is measured, so the time without that help follows.

Source of both: `flwr.client.mod.secaggplus_mod`, `flwr.common.secure_aggregation.secaggplus_utils.pseudo_rand_gen`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

CLIP, TARGET, MODULUS = 1.0, 1 << 22, 1 << 32
SEED_BITS = 28

Tamper = Callable[[ConfigRecord], None]


class Wiretap:
    """A grid that runs Flower's mod for each client in this process and keeps what a server sees."""

    def __init__(self, updates: NDArray[np.float32], tamper: Tamper | None = None) -> None:
        self.nodes = range(len(updates))
        self.public_keys: dict[int, bytes] = {}
        self.masked: dict[int, list[NDArray[np.int64]]] = {}
        self.shares: dict[tuple[str, int], list[bytes]] = defaultdict(list)
        self._tamper = tamper
        self._updates = updates
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in self.nodes}

    def send_and_receive(self, messages: Iterable[Message], timeout: float | None = None) -> list[Message]:
        return [self._deliver(deepcopy(message)) for message in messages]

    def _deliver(self, message: Message) -> Message:
        node, asked = message.metadata.dst_node_id, message.content.config_records[RECORD_KEY_CONFIGS]
        stage, honest = asked[Key.STAGE], dict(asked)
        if stage == Stage.UNMASK and self._tamper:
            self._tamper(asked)
        told = dict(asked)
        reply = secaggplus_mod(message, self._contexts[node], self._train)
        said = reply.content.config_records[RECORD_KEY_CONFIGS]
        if stage == Stage.SETUP:
            self.public_keys[node] = said[Key.PUBLIC_KEY_1]
        elif stage == Stage.COLLECT_MASKED_VECTORS:
            self.masked[node] = [np.load(BytesIO(data)) for data in said[Key.MASKED_PARAMETERS]]
        elif stage == Stage.UNMASK:
            kinds = ["seed"] * len(told[Key.ACTIVE_NODE_ID_LIST]) + ["key"] * len(told[Key.DEAD_NODE_ID_LIST])
            for kind, owner, share in zip(kinds, said[Key.NODE_ID_LIST], said[Key.SHARE_LIST], strict=True):
                self.shares[kind, owner].append(share)
            expected = len(honest[Key.ACTIVE_NODE_ID_LIST]) + len(honest[Key.DEAD_NODE_ID_LIST])
            said[Key.NODE_ID_LIST] = said[Key.NODE_ID_LIST][:expected]  # nothing that the server's code would notice
            said[Key.SHARE_LIST] = said[Key.SHARE_LIST][:expected]
        return reply

    def _train(self, message: Message, context: Context) -> Message:
        parameters = ndarrays_to_parameters([self._updates[context.node_id]])
        result = FitRes(Status(Code.OK, ""), parameters, 1, {})
        return Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)

    def without_self_mask(self, node: int) -> list[NDArray[np.int64]]:
        """A client's masked vector less its self-mask, whose seed the server puts together in every round."""
        seed = combine_shares(self.shares["seed", node])
        shapes = [array.shape for array in self.masked[node]]
        return [a - b for a, b in zip(self.masked[node], pseudo_rand_gen(seed, MODULUS, shapes), strict=True)]


class Once(FedAvg):
    """Asks every client once and keeps the average."""

    def __init__(self, nodes: range) -> None:
        super().__init__()
        self.nodes = nodes

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: object) -> list[Any]:
        return [(SimpleNamespace(node_id=node), FitIns(parameters, {})) for node in self.nodes]

    def aggregate_fit(self, server_round: int, results: list[Any], failures: list[Any]) -> tuple[None, dict[str, Any]]:
        (self.average,) = parameters_to_ndarrays(results[0][1].parameters)
        return None, {}


def aggregate(tap: Wiretap, threshold: int) -> NDArray[np.float64]:
    """One round of Flower's own workflow over the tap; gives the average that its strategy is shown."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    strategy = Once(tap.nodes)
    client_manager = SimpleNamespace(num_available=lambda: len(tap.nodes))
    context = LegacyContext(Context(1, 0, {}, RecordDict(), {}), strategy=strategy, client_manager=client_manager)
    context.state.config_records["config"] = ConfigRecord({"current_round": 1})
    context.state.array_records["parameters"] = ArrayRecord()
    SecAggPlusWorkflow(
        num_shares=1.0,
        reconstruction_threshold=threshold / len(tap.nodes),
        max_weight=1.0,
        clipping_range=CLIP,
        quantization_range=TARGET,
        modulus_range=MODULUS,
    )(tap, context)
    return strategy.average


# --- Alive and dead ---


def alive_and_dead(updates: NDArray[np.float32], victim: int, threshold: int) -> NDArray[np.float64]:
    """The victim's update, recovered in a round that ends with the right average."""

    def tamper(unmask: ConfigRecord) -> None:
        unmask[Key.DEAD_NODE_ID_LIST] = [*unmask[Key.DEAD_NODE_ID_LIST], victim]

    tap = Wiretap(updates, tamper)
    np.testing.assert_allclose(aggregate(tap, threshold), updates.mean(axis=0), atol=1e-5)
    key = bytes_to_private_key(combine_shares(tap.shares["key", victim]))
    left = tap.without_self_mask(victim)
    shapes = [array.shape for array in left]
    for node in tap.nodes:
        if node != victim:
            shared = generate_shared_key(key, bytes_to_public_key(tap.public_keys[node]))
            mask = pseudo_rand_gen(shared, MODULUS, shapes)
            sign = 1 if victim > node else -1
            left = [a - sign * b for a, b in zip(left, mask, strict=True)]
    return _decoded(left)


def _decoded(words: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    _, vector = (array % MODULUS for array in words)
    return vector * (2 * CLIP / TARGET) - CLIP


# --- 28 bits ---


@dataclass(frozen=True)
class Search:
    """What was recovered (d,), and how many seeds were tried in how many seconds."""

    vector: NDArray[np.float64] | None
    seeds: int
    seconds: float

    @property
    def seconds_in_full(self) -> float:
        return self.seconds / self.seeds * 2**SEED_BITS


def brute_force(updates: NDArray[np.float32], told_bits: int) -> Search:
    """Two clients, nothing altered: the first one's update. told_bits: how many of the 28 bits the attack is told."""
    tap = Wiretap(updates)
    aggregate(tap, threshold=2)
    left = tap.without_self_mask(0)
    key = tap._contexts[0].state.config_records["secaggplus_state"]["sk1"]
    shared = generate_shared_key(bytes_to_private_key(key), bytes_to_public_key(tap.public_keys[1]))
    upper = _spread_inverse(_folded(shared)) >> (SEED_BITS - told_bits)  # all that the attack is told

    begin, count = upper << (SEED_BITS - told_bits), 1 << (SEED_BITS - told_bits)
    wanted = (TARGET - int(left[0][0])) % MODULUS  # client 0 subtracts, and its weight was sent in the clear
    start = time.perf_counter()
    for low in range(begin, begin + count, BLOCK):
        seeds = _spread(np.arange(low, low + min(BLOCK, count), dtype=np.uint32))
        for seed in seeds[_first_output(seeds) == wanted]:
            mask = pseudo_rand_gen(int(seed).to_bytes(4, "little"), MODULUS, [array.shape for array in left])
            vector = _decoded([a + b for a, b in zip(left, mask, strict=True)])
            if np.abs(vector).max() <= CLIP:
                return Search(vector, low + BLOCK - begin, time.perf_counter() - start)
    return Search(None, count, time.perf_counter() - start)


BLOCK = 1 << 15


def _folded(key: bytes) -> int:
    words = np.frombuffer(key, dtype="<u4")
    return int(np.bitwise_xor.reduce(words))


def _spread(bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """28 bits to the seeds that a base64 text can fold to: seven in each byte."""
    seeds = np.zeros_like(bits)
    for lane in range(4):
        seeds |= (bits >> np.uint32(7 * lane) & np.uint32(0x7F)) << np.uint32(8 * lane)
    return seeds


def _spread_inverse(seed: int) -> int:
    return sum((seed >> 8 * lane & 0x7F) << 7 * lane for lane in range(4))


def _first_output(seeds: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """The first 32 bits of MT19937 for each seed (Matsumoto and Nishimura 1998), all seeds at once."""
    state, mixed = seeds.copy(), np.empty_like(seeds)
    first = state.copy()
    for index in range(1, 398):
        np.right_shift(state, np.uint32(30), out=mixed)
        state ^= mixed
        state *= np.uint32(1812433253)
        state += np.uint32(index)
        if index == 1:
            second = state.copy()
    both = (first & np.uint32(0x80000000)) | (second & np.uint32(0x7FFFFFFF))
    word = state ^ (both >> np.uint32(1)) ^ (both & np.uint32(1)) * np.uint32(0x9908B0DF)
    word ^= word >> np.uint32(11)
    word ^= (word << np.uint32(7)) & np.uint32(0x9D2C5680)
    word ^= (word << np.uint32(15)) & np.uint32(0xEFC60000)
    word ^= word >> np.uint32(18)
    return word
