"""`foedus up`: the link that listens for sites, and one thread for each run that is under way.

Composition only. Commands of the operator write the database from processes of their own; this one looks at it every
250 ms and starts, follows or stops runs accordingly. A thread drives one Flower ServerApp from start to end.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from foedus_common.clock import Clock, SystemClock
from foedus_common.errors import FoedusError, LocalError
from foedus_common.identity import Roster, SignedPlan, SignedRoster
from foedus_common.link.contents import context_of
from foedus_common.objects import ObjectStore
from foedus_common.plan import schedule
from foedus_common.randomness import RandomBytes
from foedus_common.sparing_log import Sparing
from foedus_common.terms import field_layout
from foedus_server.app import server_app
from foedus_server.audit import notary
from foedus_server.config import Home
from foedus_server.link.grid import LinkServer, LinkStopping
from foedus_server.members.registry import ApprovedSites, Registry
from foedus_server.runs import UNDER_WAY, Coordinator
from foedus_server.store import DatabaseAway, Run

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
RENEW_SECONDS = 1.0
"""A new authority's certificates are given to sites from the moment it is made, so the link has to trust it at once."""


class Service:
    """The running coordinator of one home. `start`, then `serve` until told to stop, then `stop`."""

    def __init__(self, home: Home, clock: Clock, random: RandomBytes) -> None:
        self._store = home.store(clock)
        self._registry = Registry(home, self._store, clock, random)
        self._root_public_key = home.root_public_key()
        self._clock = clock
        objects = ObjectStore(home.objects)
        self._coordinator = Coordinator(
            self._store, objects, clock, home.settings.patience, self._roster, notary(home, self._store)
        )
        self._authorities = self._registry.authorities
        self._shown = self._authorities.tls()
        self._looked_at = clock.monotonic()
        self.link = LinkServer(
            address=home.settings.listen_address,
            enrol_address=home.settings.enrolment_listen_address,
            tls=self._shown,
            directory=ApprovedSites(self._store, clock),
            objects=objects,
            uploads=home.path / "uploads",
            enrol=self._registry.enrol,
            not_admitted=self._registry.note_not_admitted,
            clock=clock,
            random=random,
        )
        self._threads: dict[int, threading.Thread] = {}
        self._complaints: dict[int, str] = {}

    def start(self) -> None:
        """Listen. Raises LocalError when a port is in use, or another coordinator works with the database."""
        self._store.database.claim()
        self.link.start()

    def serve(self, stopping: threading.Event) -> None:
        """Look after the runs, and what sites are shown, until `stopping` is set; wait for a database that is away.

        Raises LocalError when another coordinator has taken the database meanwhile.
        """
        away = False
        while not stopping.wait(LOOK_SECONDS):
            try:
                self._store.database.claim()
                self._look()
                away = False
            except DatabaseAway as error:
                if not away:  # once, not at every look
                    logger.error("%s Waiting for it.", error)
                away = True

    def _look(self) -> None:
        self._renew()
        for run in self._store.runs.all():
            thread = self._threads.get(run.run_id)
            if run.state in UNDER_WAY and (thread is None or not thread.is_alive()):
                self._begin(run)

    def stop(self, grace: float = 5.0) -> None:
        """Drain: runs stop between two messages and go on after the next start."""
        self.link.drain_and_stop(grace)
        for thread in self._threads.values():
            thread.join()
        self._store.close()

    def _renew(self) -> None:
        """A certificate that nears its end, or that another authority is to sign, is replaced while the link is up."""
        if self._clock.monotonic() - self._looked_at < RENEW_SECONDS:
            return
        self._looked_at = self._clock.monotonic()
        if (tls := self._authorities.tls()) == self._shown:
            return
        try:
            self.link.show(tls)
        except LocalError as error:  # for want of files, say: what is shown holds for weeks yet
            logger.error("sites are shown the old certificate still: %s", error)
            return
        self._shown = tls
        logger.info("sites are shown a new certificate from now on")

    def _begin(self, run: Run) -> None:
        thread = threading.Thread(target=self._conduct, args=(run,), name=f"run-{run.run_id}", daemon=True)
        self._threads[run.run_id] = thread
        thread.start()

    def _conduct(self, run: Run) -> None:
        try:
            grid = self.link.grid(run.run_id, max_upload_bytes=self._largest_vector(run))
            logger.info("run %s: taken up, %d of %d rounds done", run.name, run.rounds_done, run.rounds)
            try:
                server_app(self._coordinator)(grid=grid, context=context_of(run.run_id))
            finally:
                grid.close()  # after a clean stop as well: the next attempt at the round uses no upload of this one
            logger.info("run %s: %s", run.name, self._store.runs.run(run.run_id).state)
        except LinkStopping:
            logger.info("run %s: waits for the next start", run.name)
        except FoedusError as error:
            if self._complaints.get(run.run_id) != str(error):  # once, not at every look
                logger.error("run %s: %s", run.name, error)
            self._complaints[run.run_id] = str(error)
        except Exception:
            logger.exception("run %s: failed for a reason that was not foreseen", run.name)

    def _largest_vector(self, run: Run) -> int:
        """Bytes that one site may have uploaded and not yet seen used: two vectors, for an attempt cut short."""
        assert run.signed_plan is not None
        agreed = SignedPlan.from_bytes(run.signed_plan).verify(self._roster()[1].plan_key)
        return 2 * max(field_layout(agreed, round_plan).size for round_plan in schedule(agreed.plan))

    def _roster(self) -> tuple[SignedRoster, Roster]:
        """The newest roster. Raises LocalError while the root has signed none."""
        signed = self._registry.roster()
        if signed is None:
            raise LocalError("There is no roster yet; approve the sites and run `foedus roster sign`.")
        return signed, signed.verify(self._root_public_key, now=self._clock.now(), highest_epoch=0)


def log_to(path: Path | None) -> None:
    """Log lines go to standard error, or to a file of mode 0600."""
    handler: logging.Handler = logging.StreamHandler()
    if path is not None:
        path.touch(mode=0o600)
        handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(Sparing(SystemClock()))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("flwr").setLevel(logging.WARNING)
