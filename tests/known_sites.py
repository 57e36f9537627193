"""Sites that train nothing: their updates are whole steps of the encoding and kept, so that a test can add them up.

The plan, the rounds and the ledgers are real; only the trainer's numbers are made up. No torch anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foedus_client.daemon import Daemon
from foedus_client.data import survey
from foedus_client.enrol import Membership, join
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common.adapters import AdapterSpec, Tensors, TensorSpec, load_adapter, save_adapter
from foedus_common.canonical import sha256_hex
from foedus_common.clock import Clock
from foedus_common.identity import SignedPlan
from foedus_common.objects import ObjectStore
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.privacy.accounting import calibrate
from foedus_common.randomness import RandomBytes, system_random
from foedus_common.terms import field_layout
from foedus_server.config import Home
from foedus_server.store import Run, Store
from operators import Operator
from plans import run_plan
from seeded import seeded
from tiny_model import LABELS

MODEL = "a" * 64
SPEC = AdapterSpec((TensorSpec("head.weight", (len(LABELS), 8), "head"),))
FIRST: Tensors = {"head.weight": np.zeros((len(LABELS), 8), np.float32)}

HEAD_ONLY: dict[str, Any] = {
    "model__sha256": MODEL,
    "aggregation": {"optimizer": "fedavg"},
    "run__deadline_minutes": 1,
    "run__approval_hours": 0.02,
}
PHASE = {"train": "head", "rounds": 3, "learning_rate": 8.0}
WITH_DP = {**PHASE, "steps": 2, "sampling_rate": 1.0, "budget_share": 1.0}
WITHOUT_DP = {**PHASE, "epochs": 1.0, "batch_size": 4}


def plan_of(rounds: int, *, private: bool = True, **changes: Any) -> Any:
    """A head phase of so many rounds, fedavg, 3 to 16 sites, 2 retries; further changes as in `plans.plan_table`."""
    phase = {**(WITH_DP if private else WITHOUT_DP), "rounds": rounds}
    privacy = {} if private else {"privacy": {"unit": "none"}}
    return run_plan(**{**HEAD_ONLY, "phase": [phase], **privacy, **changes})


def submit(home: Home, store: Store, plan: Any, run_id: int) -> tuple[Run, AgreedPlan]:
    """What `Operator.submit` does once the child process has prepared the plan."""
    first = save_adapter(FIRST, SPEC)
    agreed = AgreedPlan(
        run_id=run_id,
        plan=plan,
        noise_multipliers=calibrate(plan, [SPEC.size(phase.train) for phase in plan.phase]) if plan.privacy.on else (),
        trained=tuple(SPEC.parts(phase.train) for phase in plan.phase),
        spec_sha256=SPEC.digest().hex(),
        first_adapter_sha256=sha256_hex(first),
    )
    ObjectStore(home.objects).put(first)
    store.runs.submit(run_id, plan.run.name, "", plan.rounds)
    store.runs.agree(run_id, SignedPlan.sign(agreed, home.plan_key()).to_bytes(), agreed.digest(), SPEC.canonical())
    return store.runs.move(run_id, ["submitted"], "inviting"), agreed


# --- What the sites' updates are ---


def step_sizes(agreed: AgreedPlan, round_plan: RoundPlan) -> NDArray[np.float64]:
    """How large a step of the encoding is, per coordinate (d,)."""
    layout = field_layout(agreed, round_plan)
    return np.concatenate([np.full(length, scale / layout.half_range) for length, scale in layout.segments])


class KnownTrainer:
    """`foedus_client.round.Trainer` with random updates, each a whole number of steps, kept in the site's home."""

    def __init__(self, home: Path, agreed: AgreedPlan, random: RandomBytes) -> None:
        self.home = home
        self._agreed = agreed
        self._random = random

    def open(self) -> None:
        """There is no model."""

    def train(self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan) -> NDArray[np.float64]:
        size = self._agreed.size(round_plan.phase)
        steps = np.frombuffer(self._random(2 * size), np.int16).astype(np.int64) // 32
        self.keep(round_plan.index, steps)
        return steps * step_sizes(self._agreed, round_plan)

    def keep(self, index: int, steps: NDArray[np.int64]) -> None:
        np.save(_known(self.home, self._agreed.run_id, index), steps)

    def stop(self) -> None:
        """Nothing runs."""


class KnownDaemon(Daemon):
    """A site as in production but for its trainer."""

    def _open_trainer(self, agreed: AgreedPlan) -> Any:
        return KnownTrainer(self._home.path, agreed, system_random)


def _known(home: Path, run_id: int, index: int) -> Path:
    """Where a site's newest update of a round is, int64 (d,): the one that a sum which it is in must hold."""
    return home / f"run-{run_id}-round-{index}.npy"


def assert_sums_are_exact(operator: Operator, homes: Mapping[str, Path], agreed: AgreedPlan) -> None:
    """Each committed round moved the adapter by exactly the mean of its survivors' updates (plain FedAvg)."""
    objects, rounds = ObjectStore(operator.home.objects), schedule(agreed.plan)
    before = SPEC.vector(FIRST, "head").astype(np.float64)
    for attempt in operator.store.runs.committed(agreed.run_id):
        assert attempt.adapter is not None
        after = SPEC.vector(load_adapter(objects.read(attempt.adapter), SPEC), "head").astype(np.float64)
        moved = (after - before) * len(attempt.survivors) / step_sizes(agreed, rounds[attempt.round])
        known = [np.load(_known(homes[site], agreed.run_id, attempt.round)) for site in attempt.survivors]
        np.testing.assert_allclose(moved, sum(known), atol=0.1)  # in steps; what is left is the adapter's float32
        before = after


# --- Sites that have joined ---


def join_site(
    operator: Operator, home: Path, name: str, clock: Clock, rows: Sequence[tuple[str, str]], org: str = ""
) -> Membership:
    """Invite, join and approve without a network, then put the roster, the model's name and `rows` into the home."""

    def approve(public_key: bytes) -> None:
        operator.registry.approve(name, public_key)
        operator.sign_roster()

    home.mkdir(mode=0o700, exist_ok=True)
    token = operator.registry.invite(name, org or f"Organisation of {name}")
    random = seeded(f"keys of {name}")
    member = join(home, token, operator.registry.enrol, approve, random=random, clock=clock)
    store = SiteStore(home / "site.db", clock)
    store.add_model("tiny", MODEL, home)
    file = write_rows(home / "rows.csv", rows)
    Ledger(store, clock, member.key.sign).add_dataset(
        "coding-terms", file, "text", "label", survey(file, "text", "label")
    )
    store.close()
    return member


def write_rows(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path
