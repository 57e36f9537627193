"""A whole federation in one process: real enrolment, real policies and ledgers, real rounds, no network.

The coordinator and each site get a home in a temporary folder, exactly as the programs make them. Only the link is
replaced (`grids`), randomness is seeded, policy approves by itself, and this one process does what elsewhere children
with torch do; all sites share one loaded model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foedus_client.app import client_app
from foedus_client.data import survey
from foedus_client.enrol import Membership, join
from foedus_client.ledger.accounts import Account
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.round import Site, SiteRounds
from foedus_client.store import SiteStore
from foedus_common.adapters import AdapterSpec, load_adapter, read_adapter
from foedus_common.clock import SystemClock
from foedus_common.identity import Roster, SignedRoster, public_bytes
from foedus_common.link.contents import context_of
from foedus_common.objects import ObjectStore
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server import config
from foedus_server.app import server_app
from foedus_server.audit import notary
from foedus_server.commands import Operator
from foedus_server.config import Patience
from foedus_server.members.registry import Registry
from foedus_server.prepare import prepare
from foedus_server.runs import Coordinator
from foedus_server.store import Attempt
from foedus_simulations.corpora import Row, write_csv
from foedus_simulations.grids import InProcessGrid
from foedus_simulations.randomness import seeded

SIMULATED = SitePolicy(
    max_epsilon_per_run=1000.0,
    max_epsilon_per_day=1000.0,
    max_epsilon_lifetime=1000.0,
    require_approval=False,
    allow_without_privacy=True,
)
"""Simulated sites approve whatever a study asks for."""

OnTraining = Callable[[str, int], None]
"""Told the site and the round's index whenever a site begins to train."""


@dataclass(frozen=True)
class Outcome:
    """What a simulated run left behind. adapters: the tensors after each round; accounts: of each site's ledger."""

    agreed: AgreedPlan
    spec: AdapterSpec
    adapters: tuple[Mapping[str, NDArray[np.float32]], ...]
    attempts: tuple[Attempt, ...]
    accounts: Mapping[str, Account]


class InProcessTrainer:
    """A site's trainer in this process (`foedus_client.round.Trainer`)."""

    def __init__(self, trainer: LocalTrainer, random: RandomBytes, begins: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._random = random
        self._begins = begins

    def open(self) -> None:
        """The model is loaded already."""

    def train(self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan) -> NDArray[np.float64]:
        self._begins(round_plan.index)
        tensors = read_adapter(adapter, self._trainer.classifier.spec)
        return self._trainer.train(tensors, round_plan, self._random)

    def stop(self) -> None:
        """There is no process to end."""


def simulate(
    plan: Path,
    model: Path,
    rows: Mapping[str, Sequence[Row]],
    seed: int,
    classifier: TextClassifier,
    on_training: OnTraining = lambda site, round_index: None,
) -> Outcome:
    """Runs a plan over sites that hold `rows`, through the round code of production; the same again for the same seed.

    Raises LocalError for a plan that cannot be, or a run that fails, with the operator's own sentence.
    """
    with tempfile.TemporaryDirectory(prefix="foedus-simulation-") as folder:
        return _Federation(Path(folder), seed, sorted(rows), on_training).run(plan, model, rows, classifier)


class _Federation:
    """The homes of a coordinator and its sites, made as the programs make them."""

    def __init__(self, folder: Path, seed: int, names: Sequence[str], on_training: OnTraining) -> None:
        self._folder = folder
        self._seed = seed
        self._on_training = on_training
        self._clock = SystemClock()
        settings = config.Settings("Simulation")
        random = seeded(seed, "coordinator")
        home = config.init(folder / "coordinator", settings, root_public_key=None, random=random, clock=self._clock)
        self._operator = Operator(home, self._clock, random, prepare)
        self._registry = Registry(home, self._operator.store, self._clock, random)
        self._root_key = home.root_key()
        self._members = {name: self._join(name) for name in names}

    def _join(self, name: str) -> Membership:
        """The same steps as between two people; approval and the root's signature follow at once."""

        def approve(public_key: bytes) -> None:
            self._registry.approve(name, public_key)
            self._registry.sign_roster(self._root_key)

        home = self._folder / name
        home.mkdir(mode=0o700)
        token = self._registry.invite(name, f"organisation of {name}")
        random = seeded(self._seed, f"keys of {name}")
        return join(home, token, self._registry.enrol, approve, random=random, clock=self._clock)

    def run(self, plan: Path, model: Path, rows: Mapping[str, Sequence[Row]], classifier: TextClassifier) -> Outcome:
        operator = self._operator
        operator.add_model(model)
        run = operator.submit(plan)
        agreed = operator.agreed(run)
        grid = InProcessGrid(run.run_id, operator.objects)
        sites = {name: self._site(name, rows[name], agreed, model, grid, classifier) for name in self._members}
        for name, site in sites.items():
            grid.connect(name, client_app(SiteRounds(site)), site.objects)
        ours = notary(operator.home, operator.store)
        coordinator = Coordinator(operator.store, operator.objects, self._clock, Patience(), self._roster, ours)
        server_app(coordinator)(grid=grid, context=context_of(run.run_id))
        spec = operator.spec(run)
        return Outcome(
            agreed=agreed,
            spec=spec,
            adapters=tuple(load_adapter(operator.objects.read(ref), spec) for ref in operator.adapters(run)),
            attempts=tuple(operator.store.runs.attempts(run.run_id)),
            accounts={name: site.ledger.account(agreed.plan.data.name) for name, site in sites.items()},
        )

    def _site(
        self,
        name: str,
        rows: Sequence[Row],
        agreed: AgreedPlan,
        model: Path,
        grid: InProcessGrid,
        classifier: TextClassifier,
    ) -> Site:
        """A site that has the plan's model and its own rows as the plan's dataset, and approves by policy."""
        home, member = self._folder / name, self._members[name]
        store = SiteStore(home / "site.db", self._clock)
        store.add_model(agreed.plan.model.name, agreed.plan.model.sha256, model)
        ledger = Ledger(store, self._clock, sign=member.key.sign)
        write_csv(home / "rows.csv", rows, "text", "label")
        found = survey(home / "rows.csv", "text", "label")
        ledger.add_dataset(agreed.plan.data.name, home / "rows.csv", "text", "label", found)
        random = seeded(self._seed, f"site {name}")
        pairs = [(row.text, row.label) for row in rows]
        return Site(
            member=member,
            policy=SIMULATED,
            store=store,
            ledger=ledger,
            objects=ObjectStore(home / "objects"),
            courier=grid.courier(name),
            open_trainer=lambda agreed: InProcessTrainer(
                LocalTrainer(classifier, agreed, pairs), random, partial(self._on_training, name)
            ),
            clock=self._clock,
            random=random,
        )

    def _roster(self) -> tuple[SignedRoster, Roster]:
        signed = self._registry.roster()
        assert signed is not None  # every site has joined
        return signed, signed.verify(public_bytes(self._root_key), now=self._clock.now(), highest_epoch=0)
