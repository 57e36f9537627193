"""Drives one attempt of a round over a Grid: the page an operator reads.

    invite the sites -> wait until they are ready -> draw cohorts, where there are too many for one -> in each cohort
    keys, shares, masked vectors, survivors, shares of the masks -> the opened sums -> their mean

The coordinator sees references, signatures and sums; every check that protects a site is made at the site. Knows no
database, no Flower and no torch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from foedus_common.clock import Clock
from foedus_common.errors import DropReason, FoedusError, LocalError, Reason, RemoteError
from foedus_common.identity import Roster, SignedPlan
from foedus_common.link.contents import body_of
from foedus_common.objects import ObjectRef
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_draw import Drawn, DrawSession, DrawState
from foedus_common.protocol.coordinator_session import (
    CoordinatorSession,
    CoordinatorState,
    Event,
    Failed,
    Opened,
    OpenStage,
)
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import Arrived, Deadline, Dropped, Effects, Send
from foedus_common.protocol.masks import Words
from foedus_common.protocol.thresholds import cohort_thresholds
from foedus_common.ranges import counted_sites
from foedus_common.terms import protocol_roster, round_terms
from foedus_server.config import Patience

logger = logging.getLogger(__name__)

STAGE_TYPES = ("query.keys", "query.shares", "query.mask", "query.survivors", "query.unmask")
STAGE_NAMES = ("keys", "shares", "masked input", "consistency", "unmasking")
DRAW_TYPES = ("query.commit", "query.reveal")
DRAW_NAMES = ("commitments", "seeds")


@runtime_checkable
class RoundGrid(Protocol):
    """What a round needs of a Flower Grid, and beyond it: waiting, sites by name, and objects.

    `foedus_server.link.grid.SiteGrid` is one, and so is the simulations' grid.
    """

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]: ...
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]: ...
    def get_node_ids(self) -> Iterable[int]: ...
    def message(self, site: str, message_type: str, body: bytes, *, ttl: float) -> Any: ...
    def site(self, node: int) -> str: ...
    def forget(self, message_ids: Iterable[str]) -> None: ...
    def wait(self, timeout: float) -> None: ...
    def allow(self, ref: ObjectRef, sites: Collection[str]) -> None: ...
    def upload(self, site: str, ref: ObjectRef) -> Path: ...
    def discard(self, site: str, ref: ObjectRef) -> None: ...
    def clear_uploads(self) -> None: ...


class Presence:
    """Since when sites are away, over all rounds of a run: one that is long gone holds up no further round."""

    def __init__(self, grid: RoundGrid, clock: Clock) -> None:
        self._grid = grid
        self._clock = clock
        self._began = clock.monotonic()
        self._last_seen: dict[str, float] = {}

    def here(self) -> set[str]:
        """The sites that are connected now."""
        sites = {self._grid.site(node) for node in self._grid.get_node_ids()}
        self._last_seen |= dict.fromkeys(sites, self._clock.monotonic())
        return sites

    def away(self, site: str) -> float:
        """Seconds since the site was last seen or, if it never was, since the run was taken up."""
        return self._clock.monotonic() - self._last_seen.get(site, self._began)


@dataclass(frozen=True)
class RoundTask:
    """What one attempt is about. `sites` approved the plan and are invited."""

    agreed: AgreedPlan
    signed_plan: SignedPlan
    roster: Roster
    round_plan: RoundPlan
    attempt: int
    adapter: ObjectRef
    sites: tuple[str, ...]


@dataclass
class RoundLog:
    """What an operator is told of an attempt: seconds by stage, bytes over all sites, who dropped out and why.

    cohort: of the whole round, however many sums it has.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    cohort: tuple[str, ...] = ()
    dropped: dict[str, tuple[DropReason, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Committed:
    """The mean of the survivors' updates, float64 (d,)."""

    mean: NDArray[np.float64]
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Aborted:
    """Nothing was opened; `error` says why. Another attempt had better do without the sites `left_out`."""

    error: FoedusError
    left_out: tuple[str, ...] = ()


Session = DrawSession | CoordinatorSession
State = DrawState | CoordinatorState


class Round:
    """One attempt: `Round(...).run()` gives Committed or Aborted; `log` is filled meanwhile, for whoever watches."""

    def __init__(
        self,
        grid: RoundGrid,
        task: RoundTask,
        clock: Clock,
        patience: Patience,
        presence: Presence,
        on_change: Callable[[str, RoundLog], None] = lambda stage, log: None,
    ) -> None:
        self._grid = grid
        self._task = task
        self._clock = clock
        self._patience = patience
        self._presence = presence
        self._on_change = on_change
        self._terms = round_terms(task.agreed, task.round_plan, task.adapter)
        self.log = RoundLog()

    def run(self) -> Committed | Aborted:
        """Raises nothing that a site can cause; what stops the coordinator itself (LinkStopping) passes through."""
        size, ready = self._task.agreed.plan.secure_aggregation.size, self._invite()
        if not size.fewest <= len(ready) <= size.most:
            allowed = f"needs {size.fewest}" if len(ready) < size.fewest else f"has room for {size.most}"
            return Aborted(LocalError(f"Sites ready for the round: {len(ready)}; the plan {allowed}."))
        self.log.cohort = ready
        if len(ready) <= size.largest_cohort:
            return self._aggregate([ready])
        (drawn,) = self._play([self._draw(ready, size)], DRAW_TYPES, DRAW_NAMES)
        if isinstance(drawn, Drawn):
            return self._aggregate(drawn.cohorts, drawn.seeds)
        assert isinstance(drawn, Failed)
        suspects = drawn.error.suspects if isinstance(drawn.error, RemoteError) else ()
        return Aborted(drawn.error, suspects)

    # --- I and T: invite, and wait until the sites have trained ---

    def _invite(self) -> tuple[str, ...]:
        """The sites that said Ready in time, by name."""
        task = self._task
        self._grid.allow(task.adapter, task.sites)
        invite = m.Invite(
            plan=task.signed_plan.canonical,
            plan_signature=task.signed_plan.signature,
            base_model_hash=self._terms.base_model_hash,
            adapter=m.VectorRef(self._terms.adapter_hash, task.adapter.size),
        )
        requests = {site: wire.build_envelope(self._header(site), invite) for site in task.sites}
        seconds = task.agreed.plan.run.deadline_minutes * 60
        ready = []
        self.log.bytes_down += task.adapter.size * len(task.sites)
        for site, body in self._ask("train.invite", "training", requests, seconds, give_up_on_absent=True):
            try:
                if self._answer_to_invitation(site, body):
                    ready.append(site)
                else:
                    self._drop(site, DropReason.DECLINED, f"{site} does not take part in this round")
            except RemoteError as error:
                self._drop(site, DropReason.PROTOCOL, str(error))
        return tuple(sorted(ready))

    def _answer_to_invitation(self, site: str, body: bytes) -> bool:
        """Whether the site is ready. Raises RemoteError for an answer that is not one, or not signed by that site."""
        envelope = wire.parse_envelope(body)
        envelope.verify(self._task.roster.site(site).public_key)
        expected = self._header(site, answer=True)
        if envelope.header != expected or not isinstance(envelope.message, m.Ready | m.Declined):
            raise RemoteError(Reason.WRONG_STAGE, f"{site} did not answer the invitation", (site,))
        return isinstance(envelope.message, m.Ready)

    def _header(self, site: str, answer: bool = False) -> wire.Header:
        terms = self._terms
        source, destination = (site, wire.COORDINATOR) if answer else (wire.COORDINATOR, site)
        return wire.Header(
            terms.run_id, terms.round, self._task.attempt, terms.plan_digest, source, destination, sequence=0
        )

    # --- D1 and D2, A0 to A5: who sums with whom, and the secure sums ---

    def _draw(self, ready: tuple[str, ...], size: RoundSize) -> DrawSession:
        return DrawSession(self._terms, self._task.attempt, ready, size, protocol_roster(self._task.roster))

    def _aggregate(
        self, cohorts: Sequence[tuple[str, ...]], seeds: tuple[tuple[str, bytes], ...] = ()
    ) -> Committed | Aborted:
        """The mean over every cohort whose sum opened; the sites of one whose did not are missed like dropouts."""
        sessions: list[CoordinatorSession] = []
        unsafe: list[FoedusError] = []
        for cohort in cohorts:
            try:
                sessions.append(self._session(cohort, seeds))
            except RemoteError as refusal:  # none of its sites would join it
                unsafe.append(refusal)
        states = self._play(sessions, STAGE_TYPES, STAGE_NAMES)
        opened = [state for state in states if isinstance(state, Opened)]
        failed = [*unsafe, *(state.error for state in states if isinstance(state, Failed))]
        if not opened:
            return Aborted(failed[0])
        for error in failed:
            logger.warning("round %d: a cohort opened no sum: %s", self._terms.round + 1, error)
        survivors = tuple(sorted(site for state in opened for site in state.survivors))
        total = functools.reduce(np.add, (state.total for state in opened))
        return Committed(total / len(survivors), survivors)

    def _session(self, cohort: tuple[str, ...], seeds: tuple[tuple[str, bytes], ...]) -> CoordinatorSession:
        """Raises RemoteError for a cohort that its sites would refuse."""
        terms, roster = self._terms, protocol_roster(self._task.roster)
        honest = counted_sites(self._task.agreed, terms.phase)
        limits = cohort_thresholds(cohort, terms.colluding, honest, roster)
        config = m.RoundConfig(
            protocol_version=m.PROTOCOL_VERSION,
            terms=terms,
            attempt=self._task.attempt,
            roster_epoch=roster.epoch,
            roster_digest=roster.digest,
            cohort=cohort,
            threshold=limits.threshold,
            minimum=limits.minimum,
        )
        return CoordinatorSession(config, roster, UploadedVectors(self._grid, cohort, self.log), seeds)

    def _play(self, sessions: Sequence[Session], types: Sequence[str], names: Sequence[str]) -> list[State]:
        """Takes the sessions through their stages side by side, and gives what each came to."""
        begun = [session.begin() for session in sessions]
        states: list[State] = [state for state, _ in begun]
        requests = [_requests(effects) for _, effects in begun]

        def tell(number: int, event: Event) -> None:
            states[number], effects = sessions[number].step(states[number], event)  # type: ignore[arg-type]
            requests[number] |= _requests(effects)
            for effect in effects:
                if isinstance(effect, Dropped):
                    self._drop(effect.site, effect.reason, effect.sentence)

        for stage, (message_type, name) in enumerate(zip(types, names, strict=True)):
            whose = {site: number for number, each in enumerate(requests) for site in each}
            asked = {site: envelope for each in requests for site, envelope in each.items()}
            requests = [{} for _ in sessions]
            for site, body in self._ask(message_type, name, asked, self._patience.stage_seconds) if asked else ():
                tell(whose[site], Arrived(site, body))
            for number, state in enumerate(states):
                if isinstance(state, OpenStage) and state.sequence == stage:
                    tell(number, Deadline(stage))
        return states

    # --- Asking sites ---

    def _ask(
        self,
        message_type: str,
        stage: str,
        requests: Mapping[str, bytes],
        seconds: float,
        give_up_on_absent: bool = False,
    ) -> Iterator[tuple[str, bytes]]:
        """Sends a request to each site and yields the answers as they come, until all are in or the time is over."""
        started = self._clock.monotonic()
        self._on_change(stage, self.log)
        ids = self._grid.push_messages(
            self._grid.message(site, message_type, body, ttl=seconds) for site, body in requests.items()
        )
        waiting = dict(zip(ids, requests, strict=True))
        self.log.bytes_down += sum(map(len, requests.values()))
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                site = waiting.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    self._drop(site, DropReason.PROTOCOL, f"{site}'s program failed; its own log says why")
                else:
                    body = body_of(reply)
                    self.log.bytes_up += len(body)
                    yield site, body
            self._presence.here()
            left = started + seconds - self._clock.monotonic()
            if give_up_on_absent:
                absent = min(map(self._presence.away, waiting.values()), default=0.0)
                left = min(left, self._patience.absent_seconds - absent)
            if not waiting or left <= 0:
                break
            self._grid.wait(min(left, 1.0))
        self._grid.forget(waiting)
        for site in waiting.values():
            self._drop(site, DropReason.DEADLINE, f"{site} did not answer in time ({stage})")
        self.log.seconds[stage] = self._clock.monotonic() - started

    def _drop(self, site: str, reason: DropReason, sentence: str) -> None:
        self.log.dropped.setdefault(site, (reason, sentence))


def _requests(effects: Effects) -> dict[str, bytes]:
    return {effect.destination: effect.envelope for effect in effects if isinstance(effect, Send)}


class UploadedVectors:
    """Masked vectors as the sites uploaded them; each is read once, and deleted when it has been."""

    def __init__(self, grid: RoundGrid, cohort: tuple[str, ...], log: RoundLog) -> None:
        self._grid = grid
        self._cohort = cohort
        self._log = log

    def load(self, ref: m.VectorRef) -> Words:
        """The words of the vector that some site of the cohort uploaded. Raises RemoteError when none did."""
        wanted = ObjectRef(ref.digest.hex(), ref.size)
        for site in self._cohort:
            try:
                path = self._grid.upload(site, wanted)
            except RemoteError:
                continue
            words = np.fromfile(path, dtype="<u8")  # one copy: with the sum it is all that is in memory
            if hashlib.sha256(words.data).digest() != ref.digest:
                raise RemoteError(Reason.BAD_MESSAGE, f"the vector of {site} is not what its reference says", (site,))
            self._grid.discard(site, wanted)
            self._log.bytes_up += ref.size
            return words.astype(np.uint64, copy=False)
        raise RemoteError(Reason.BAD_MESSAGE, "no site of the cohort uploaded the vector that was named")
