"""`foedus-site run`: composition. The link, the ClientApp, policy, ledger and trainers of one site, put together.

This process keeps the link alive and never trains: no torch here. Each run has a trainer process of its own. A pause is
a stop between two rounds: the site hangs up and lets go of everything, until it is resumed. A new certificate, or new
keys, are taken up the same way, without a pause.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from pathlib import Path

from foedus_client.app import client_app
from foedus_client.audit import note_standing
from foedus_client.condition import Condition
from foedus_client.config import SiteHome
from foedus_client.enrol import Membership
from foedus_client.ledger.high_water import mark_name
from foedus_client.ledger.ledger import Ledger
from foedus_client.link.renewal import Renewal
from foedus_client.link.site_link import LinkState, SiteLink, enrol
from foedus_client.round import Site, SiteRounds
from foedus_client.storage import sweep
from foedus_client.training.computing import Computing
from foedus_client.training.process import TrainerProcess, TrainerSettings
from foedus_common.clock import Clock, SystemClock
from foedus_common.errors import LocalError
from foedus_common.link.contents import context_of
from foedus_common.model_folder import verify
from foedus_common.objects import ObjectStore
from foedus_common.plan import AgreedPlan
from foedus_common.randomness import RandomBytes
from foedus_common.sparing_log import Sparing

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
GB = 10**9
SUM_SECONDS = 60.0
"""How long a pause waits for the coordinator to go on with a sum that this site is part of."""


class Daemon:
    """One site at work. `start`, then `stop`; both may be called from any thread."""

    def __init__(self, home: SiteHome, state: Path, clock: Clock, random: RandomBytes) -> None:
        """Raises LocalError when the site has not joined, its files are damaged, or the home is an older copy."""
        self._home = home
        membership = Membership(home.path)
        self._store = home.store(clock, state, mark_name(membership.name, membership.token.root_public_key))
        self._store.check_high_water()
        note_standing(self._store, membership, home.settings.policy)
        self.condition = Condition(home.path, clock)
        objects = ObjectStore(home.objects, limit=int(home.settings.max_storage_gb * GB))
        sweep(objects, self._store, clock)
        self._link = SiteLink(
            site=membership.name,
            address=home.settings.coordinator or membership.token.link_address,
            tls=home.trusting(membership.tls()),
            proxy=home.settings.proxy,
            objects=objects,
            on_state=self._on_state,
            clock=clock,
            random=random,
        )
        site = Site(
            member=membership,
            policy=home.settings.policy,
            store=self._store,
            ledger=Ledger(self._store, clock, membership.key.sign, membership.public_key),
            objects=objects,
            courier=self._link,
            open_trainer=self._open_trainer,
            max_trainers=home.settings.max_trainers,
            clock=clock,
            random=random,
        )
        self._site = site
        self._renewal = Renewal(membership, self._ask_how_things_stand, clock)
        self._member = membership
        self._rounds = SiteRounds(site)
        self.name = membership.name

    def start(self) -> None:
        self._link.start(client_app(self._rounds), context_of)
        threading.Thread(target=self._renewal.keep, args=(self._site.stopping,), name="renewal", daemon=True).start()

    @property
    def outdated(self) -> bool:
        """Whether the link has to be opened anew: there is a new certificate, a new authority, or new keys."""
        return self._renewal.changed

    @property
    def paused(self) -> bool:
        return self._store.paused() is not None

    def finish_round(self, stopping: threading.Event) -> None:
        """Begins no new round, and returns when none is under way; or at once when `stopping` is set.

        A round that the coordinator leaves lying is not waited for longer than a stage may take.
        """
        logger.info("%s %s when no round is under way here any more", self.name, "pauses" if self.paused else "redials")
        self._site.pausing.set()
        left = SUM_SECONDS
        while self._rounds.training or (self._rounds.summing and left > 0):
            if stopping.wait(LOOK_SECONDS):
                return
            left = SUM_SECONDS if self._rounds.training else left - LOOK_SECONDS

    def stop(self) -> None:
        """The link first: what is under way must not be answered with a refusal, for it is asked again after the next
        start."""
        self._link.stop()
        self._rounds.stop()
        self._store.close()

    def _on_state(self, state: LinkState, sentence: str) -> None:
        amiss = state in (LinkState.AWAY, LinkState.REFUSED)
        logger.log(logging.WARNING if amiss else logging.INFO, "%s: %s", state, sentence)
        self.condition.link(state, sentence)

    def _ask_how_things_stand(self, request: bytes) -> bytes:
        settings, member = self._home.settings, self._member
        address = settings.enrolment or member.token.enrolment_address
        return enrol(address, self._home.trusting(member.tls()).authority, request, settings.proxy, self._site.clock)

    def _open_trainer(self, agreed: AgreedPlan) -> TrainerProcess:
        """The run's trainer, not started yet. Raises LocalError when the plan's model or data is not here any more."""
        settings, plan = self._home.settings, agreed.plan
        model, dataset = self._store.model(plan.model.sha256), self._store.dataset(plan.data.name)
        if model is None or dataset is None:
            raise LocalError(f"The model or the dataset of run {plan.run.name} is not at this site.")
        verify(model.path, model.manifest_sha256)
        return TrainerProcess(
            TrainerSettings(
                model_folder=str(model.path),
                dataset=str(dataset.path),
                dataset_sha256=dataset.file_sha256,
                text=dataset.text_column,
                label=dataset.label_column,
                **{setting.name: getattr(settings, setting.name) for setting in dataclasses.fields(Computing)},
            ),
            agreed,
        )


def serve(home: SiteHome, state: Path, clock: Clock, random: RandomBytes, stopping: threading.Event) -> None:
    """Runs the daemon until `stopping` is set, with breaks while the site is paused. state: folder of high-water marks.

    Raises LocalError when another daemon has this home, and as `Daemon` does.
    """
    with home.daemon_lock():
        while not stopping.is_set():
            daemon = Daemon(home, state, clock, random)
            try:
                if daemon.paused:
                    _rest(daemon, stopping)
                else:
                    with daemon.condition.listening():
                        _work(daemon, stopping)
            finally:
                daemon.stop()


def _work(daemon: Daemon, stopping: threading.Event) -> None:
    daemon.start()
    logger.info("%s is at work", daemon.name)
    while not (stopping.wait(LOOK_SECONDS) or daemon.paused or daemon.outdated):
        pass
    if not stopping.is_set():
        daemon.finish_round(stopping)


def _rest(daemon: Daemon, stopping: threading.Event) -> None:
    logger.info("%s is paused; `foedus-site resume` brings it back to work", daemon.name)
    while not stopping.wait(LOOK_SECONDS) and daemon.paused:
        pass


def log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)-7s %(message)s", force=True)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(Sparing(SystemClock()))
