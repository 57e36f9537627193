"""A run from its agreed plan to its last adapter: propose, one round after the other, tell everybody that it ended.

What must survive a restart is in the store before the next step begins; `conduct` picks up after the last committed
round. Knows no Flower (the grid is an argument) and no torch.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foedus_common.adapters import AdapterSpec, adapter_bytes, load_adapter, parse_spec, save_adapter
from foedus_common.checkpoints import Notary
from foedus_common.clock import DAY, Clock
from foedus_common.errors import FoedusError, LocalError, Reason, RemoteError
from foedus_common.identity import Roster, SignedPlan, SignedRoster
from foedus_common.link.contents import body_of
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.draw import MAX_DRAWS
from foedus_server.aggregation import ServerOptimizer
from foedus_server.cohorts import shortfall
from foedus_server.config import Patience
from foedus_server.link.grid import LinkStopping
from foedus_server.rounds import STAGE_NAMES, Aborted, Committed, Presence, Round, RoundGrid, RoundLog, RoundTask
from foedus_server.silences import Silences
from foedus_server.store import Attempt, DatabaseAway, Run, RunState, Store

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
UNDER_WAY: tuple[RunState, ...] = ("inviting", "running", "stopping")

COSTLY_TO_STOP = STAGE_NAMES[3:]
"""Stages in which the sites have masked their vectors: a stop waits for the end of the round, seconds away, since a
vector that was masked for nothing costs the run one of its retries."""

ATTEMPTS = 6
"""Attempts at one round that may fail before the run is given up; the sites' own limit on retries is usually reached
first. A draw that is repeated without the sites that spoilt it is not counted: of those, sites bear `MAX_DRAWS`."""


@dataclass(frozen=True)
class Coordinator:
    """What conducting a run needs. `roster()` is the newest one that the root signed, verified; `notary` exchanges the
    heads of journals with the sites."""

    store: Store
    objects: ObjectStore
    clock: Clock
    patience: Patience
    roster: Callable[[], tuple[SignedRoster, Roster]]
    notary: Notary


def conduct(coordinator: Coordinator, run_id: int, grid: RoundGrid) -> None:
    """Takes an agreed run to its end. Raises LocalError when it cannot be finished, with the sentence for the operator;
    what stops the coordinator itself passes through and leaves the run to be taken up again."""
    run = coordinator.store.runs.run(run_id)
    conductor = _Conductor(coordinator, run, grid)
    try:
        conductor.propose()
        for round_plan in schedule(conductor.agreed.plan)[run.rounds_done :]:
            conductor.round(round_plan)
        coordinator.store.runs.move(run_id, ["running", "stopping"], "finished")
        conductor.tell_end(m.End.FINISHED)
    except (LinkStopping, DatabaseAway):
        raise  # the run stays where it is, for the next start
    except RunStopped:
        coordinator.store.runs.move(run_id, ["stopping"], "stopped")
        conductor.tell_end(m.End.STOPPED)
    except Exception as error:  # also a mistake of ours: taking the run up again would repeat it at the sites' expense
        if coordinator.store.runs.run(run_id).state in UNDER_WAY:
            reason = str(error) if isinstance(error, FoedusError) else "the coordinator's program failed; see its log"
            coordinator.store.runs.move(run_id, UNDER_WAY, "failed", reason)
            conductor.tell_end(m.End.FAILED)
        raise


class RunStopped(Exception):
    """The operator asked for it."""


class _Conductor:
    """One run under way: who is willing, and what the next round starts from."""

    def __init__(self, coordinator: Coordinator, run: Run, grid: RoundGrid) -> None:
        assert run.signed_plan is not None  # `Operator.submit` agreed it
        assert run.spec is not None
        self._coordinator = coordinator
        self._run_id = run.run_id
        self._grid = grid
        self._signed_plan = SignedPlan.from_bytes(run.signed_plan)
        self._signed_roster, self._roster = coordinator.roster()
        self.agreed: AgreedPlan = self._signed_plan.verify(self._roster.plan_key)
        self._spec: AdapterSpec = parse_spec(run.spec)
        self._proposed: dict[str, str] = {}
        self._failures: Counter[str] = Counter()
        self._again: dict[str, float] = {}
        self._willing: set[str] = set()
        self._heads: dict[str, str] = {}
        self._presence = Presence(grid, coordinator.clock)
        self._silences = Silences()

    # --- The plan before the sites ---

    def propose(self) -> None:
        """Shows the plan to every site of the roster and waits for each one's decision, which people make.

        The run begins when all have answered, or with those that are willing after the plan's approval_hours. One that
        is taken up again needs no decisions: the others may take absent_seconds to come back, once enough are there.
        """
        runs, plan, clock = self._coordinator.store.runs, self.agreed.plan, self._coordinator.clock
        self._show(self._roster.public_keys)
        began = clock.monotonic()
        resumed = runs.run(self._run_id).state == "running"
        to_decide = plan.run.approval_hours * 3600
        to_come_back = self._coordinator.patience.absent_seconds if resumed else to_decide
        while self._proposed or self._again:
            self._check_stopped()
            self._take_decisions()
            enough = not self._shortfall(self._members())
            if clock.monotonic() - began > (to_come_back if enough else to_decide):
                break
            self._grid.wait(LOOK_SECONDS)
        if short := self._shortfall(self._members()):
            raise LocalError(
                f"{len(self._members())} sites take part in {plan.run.name}, and {short}; "
                "ask the administrators of the others, or submit a plan that asks for less or that more of them accept."
            )
        if not resumed:
            runs.move(self._run_id, ["inviting"], "running")

    def _shortfall(self, sites: Collection[str], phase: int | None = None) -> str:
        return shortfall(sites, self.agreed, self._roster, phase)

    def _show(self, sites: Collection[str]) -> None:
        roster = self._coordinator.objects.put(self._signed_roster.to_bytes())
        names = sorted(sites)
        self._grid.allow(roster, names)
        self._grid.allow(self._current_adapter(), names)  # a site may be waiting for it since before a restart
        proposal = m.Propose(
            self._signed_plan.canonical,
            self._signed_plan.signature,
            m.VectorRef(bytes.fromhex(roster.sha256), roster.size),
        )
        ttl = self.agreed.plan.run.approval_hours * 3600
        messages = [
            self._grid.message(site, "query.propose", self._envelope(site, proposal), ttl=ttl) for site in names
        ]
        self._proposed |= dict(zip(self._grid.push_messages(messages), names, strict=True))

    def _take_decisions(self) -> None:
        """Who has decided since the last look."""
        self._show_again()
        for reply in self._grid.pull_messages(list(self._proposed)):
            site = self._proposed.pop(reply.metadata.reply_to_message_id)
            self._willing.discard(site)
            if reply.has_error():
                self._note_failure(site)
                continue
            try:
                if self._is_willing(site, body_of(reply)):
                    self._willing.add(site)
            except RemoteError as error:
                logger.warning("%s answered the proposal wrongly: %s", site, error)

    def _note_failure(self, site: str) -> None:
        """That is no decision, and what kept the site from one, a full disk, may pass. As with a round, it is asked
        again after growing pauses, about a minute in all."""
        self._failures[site] += 1
        again = self._failures[site] < ATTEMPTS
        then = "and it is asked again" if again else "and it is left out"
        logger.warning("%s's program failed on the proposal; its own log says why, %s", site, then)
        if again:
            pause = self._coordinator.patience.retry_seconds * 2 ** (self._failures[site] - 1)
            self._again[site] = self._coordinator.clock.monotonic() + pause

    def _show_again(self) -> None:
        now = self._coordinator.clock.monotonic()
        if due := [site for site, at in self._again.items() if at <= now]:
            self._again = {site: at for site, at in self._again.items() if at > now}
            self._show(due)

    def _is_willing(self, site: str, body: bytes) -> bool:
        envelope = wire.parse_envelope(body)
        envelope.verify(self._roster.site(site).public_key)
        if envelope.header != self._header(site, wire.COORDINATOR):
            raise RemoteError(Reason.WRONG_STAGE, "the answer belongs to another proposal", (site,))
        return isinstance(envelope.message, m.Ready)

    # --- One round ---

    def round(self, round_plan: RoundPlan) -> None:
        """Attempts the round until it is committed. Raises LocalError when it is given up.

        A draw that sites spoilt by keeping their seeds back cost nobody a vector. It is repeated at once without them,
        and does not count as one that failed.
        """
        failed, attempts, pause = 0, 0, 0.0
        while failed < ATTEMPTS and attempts < MAX_DRAWS:
            self._pause(pause)
            self._await_sites(round_plan.phase)
            attempt, result = self._attempt(round_plan)
            if isinstance(result, Committed):
                self._commit(round_plan, attempt, result)
                self._show_heads()
                return
            error, attempts, pause = result.error, attempt.attempt + 1, 0.0
            self._coordinator.store.runs.abort_attempt(attempt, str(error))
            if not self._can_do_without(result.left_out, round_plan):
                failed += 1
                pause = self._coordinator.patience.retry_seconds * 2 ** (failed - 1)
        raise LocalError(f"Round {round_plan.index + 1} was given up after {attempts} attempts: {error}")

    def _can_do_without(self, spoilers: Collection[str], round_plan: RoundPlan) -> bool:
        """Whether the attempt failed for these sites, and enough are left without them."""
        organisations = self._roster.organisations
        self._silences.note(spoilers, round_plan.index, organisations)
        left = self._silences.without(self._members(), round_plan.index, organisations)
        if spoilers and not self._shortfall(left, round_plan.phase):
            return True
        self._silences.forgive()
        return False

    def _pause(self, seconds: float) -> None:
        """What kept a site from the last attempt, a full disk or a GPU that is taken, may pass."""
        ends = self._coordinator.clock.monotonic() + seconds
        while (left := ends - self._coordinator.clock.monotonic()) > 0:
            self._check_stopped()
            self._grid.wait(min(left, LOOK_SECONDS))

    def _await_sites(self, phase: int) -> None:
        """Until the sites here make a round of the phase; each may be away for as long as it may take to train."""
        minutes = self.agreed.plan.run.deadline_minutes
        began = self._coordinator.clock.monotonic()
        while True:
            self._check_stopped()
            self._take_decisions()
            self._take_heads()
            self._follow_roster()
            here = self._presence.here() & set(self._members())
            if not (short := self._shortfall(here, phase)):
                return
            if self._coordinator.clock.monotonic() - began > minutes * 60:
                raise LocalError(
                    f"For {minutes:g} minutes too few of the sites that take part were connected: "
                    f"{len(here)} are now, and {short}."
                )
            self._grid.wait(LOOK_SECONDS)

    def _attempt(self, round_plan: RoundPlan) -> tuple[Attempt, Committed | Aborted]:
        attempt = self._coordinator.store.runs.start_attempt(self._run_id, round_plan.index)
        sites = self._silences.without(members := self._members(), round_plan.index, self._roster.organisations)
        if left_out := ", ".join(sorted({*members} - {*sites})):
            logger.warning("round %d: left out, for seeds were kept back: %s", attempt.round + 1, left_out)
        task = RoundTask(
            agreed=self.agreed,
            signed_plan=self._signed_plan,
            roster=self._roster,
            round_plan=round_plan,
            attempt=attempt.attempt,
            adapter=self._current_adapter(),
            sites=sites,
        )

        def save(stage: str, log: RoundLog) -> None:
            if stage not in COSTLY_TO_STOP:
                self._check_stopped()
            self._coordinator.store.runs.save_attempt(_with_log(attempt, log))

        self._grid.clear_uploads()  # of an earlier attempt: nobody will ever read them, and they use up the sites' room
        one = Round(self._grid, task, self._coordinator.clock, self._coordinator.patience, self._presence, save)
        try:
            result = one.run()
        except RunStopped:
            self._coordinator.store.runs.abort_attempt(_with_log(attempt, one.log), "stopped by the operator")
            raise
        for site, (reason, sentence) in one.log.dropped.items():
            logger.warning("round %d: %s dropped out (%s): %s", round_plan.index + 1, site, reason, sentence)
        return _with_log(attempt, one.log), result

    def _commit(self, round_plan: RoundPlan, attempt: Attempt, result: Committed) -> None:
        """The next adapter and the optimiser's memory become durable, then the round counts."""
        train = round_plan.settings.train
        tensors = load_adapter(self._coordinator.objects.read(self._current_adapter()), self._spec)
        optimizer = ServerOptimizer(self.agreed.plan.aggregation, self._optimizer_state(round_plan))
        current = self._spec.vector(tensors, train).astype(np.float64)
        following = optimizer.step(round_plan.index, current, result.mean)
        if self._ends_phase(round_plan):
            following = self._averaged(round_plan, following)
        adapter = save_adapter(self._spec.with_vector(tensors, train, following), self._spec)
        self._coordinator.store.runs.commit_attempt(
            dataclasses.replace(
                attempt,
                survivors=result.survivors,
                adapter=self._coordinator.objects.put(adapter),
                optimizer=self._coordinator.objects.put(optimizer.state()),
            )
        )

    def _averaged(self, round_plan: RoundPlan, last: NDArray[np.float64]) -> NDArray[np.float64]:
        """The mean of the last rounds' vectors of the phase, `last` included (plan: average_last)."""
        count = min(self.agreed.plan.aggregation.average_last, round_plan.settings.rounds)
        earlier = self._coordinator.store.runs.committed(self._run_id)[round_plan.index - count + 1 :]
        vectors = [last]
        for attempt in earlier:
            assert attempt.adapter is not None  # a committed attempt has one
            tensors = load_adapter(self._coordinator.objects.read(attempt.adapter), self._spec)
            vectors.append(self._spec.vector(tensors, round_plan.settings.train).astype(np.float64))
        return np.asarray(np.mean(vectors, axis=0), dtype=np.float64)

    def _ends_phase(self, round_plan: RoundPlan) -> bool:
        rounds = schedule(self.agreed.plan)
        return round_plan.index + 1 == len(rounds) or rounds[round_plan.index + 1].phase != round_plan.phase

    def _current_adapter(self) -> ObjectRef:
        committed = self._coordinator.store.runs.committed(self._run_id)
        if committed and committed[-1].adapter is not None:
            return committed[-1].adapter
        return ObjectRef(self.agreed.first_adapter_sha256, adapter_bytes(self._spec))

    def _optimizer_state(self, round_plan: RoundPlan) -> bytes | None:
        """What the optimiser remembers from the round before; nothing at the start of a phase."""
        if round_plan.index == 0 or schedule(self.agreed.plan)[round_plan.index - 1].phase != round_plan.phase:
            return None
        before = self._coordinator.store.runs.committed(self._run_id)[-1]
        return None if before.optimizer is None else self._coordinator.objects.read(before.optimizer)

    # --- Around the rounds ---

    def _check_stopped(self) -> None:
        if self._coordinator.store.runs.run(self._run_id).state == "stopping":
            raise RunStopped

    def _follow_roster(self) -> None:
        """After the root signed a new roster, sites are shown it; who is no longer in it is not invited."""
        signed, roster = self._coordinator.roster()
        if roster.epoch == self._roster.epoch:
            return
        self._signed_roster, self._roster = signed, roster
        self._failures.clear()
        self._again.clear()
        self._show(roster.public_keys)

    def tell_end(self, end: m.End) -> None:
        """Best effort: a site that is away for long, or whose disk stays full, keeps what it had set aside until it
        withdraws."""
        clock, patience = self._coordinator.clock, self._coordinator.patience
        deadline = clock.monotonic() + patience.absent_seconds
        again = clock.monotonic() + patience.retry_seconds
        unheard = self._push("query.end", dict.fromkeys(self._members(), m.RunEnded(end)))
        failed: set[str] = set()
        for showing in (False, True, True):  # what the last round asked; then twice, so that each side signs the last
            if showing:
                self._show_heads()
            while (self._heads or unheard or failed) and clock.monotonic() < deadline:
                self._take_heads()
                for reply in self._grid.pull_messages(list(unheard)):
                    site = unheard.pop(reply.metadata.reply_to_message_id)
                    failed |= {site} if reply.has_error() else set()
                if failed and clock.monotonic() >= again:
                    unheard |= self._push("query.end", dict.fromkeys(failed, m.RunEnded(end)))
                    failed, again = set(), clock.monotonic() + patience.retry_seconds
                if self._heads or unheard or failed:
                    self._grid.wait(LOOK_SECONDS)

    def _show_heads(self) -> None:
        """To the sites that take part and owe no answer to an earlier question; theirs are taken when there is time."""
        self._take_heads()
        here = self._presence.here()
        away = [message_id for message_id, site in self._heads.items() if site not in here]
        self._grid.forget(away)  # what follows says more
        self._heads = {key: site for key, site in self._heads.items() if key not in away}
        notary = self._coordinator.notary
        own = notary.sign_end()
        asked = [site for site in self._members() if site not in self._heads.values()]
        shown = {site: notary.show(site, own) for site in asked}
        self._heads |= self._push("query.journal", shown, ttl=DAY)  # one that still trains answers when it has

    def _take_heads(self) -> None:
        """What has arrived since the last look. Nothing in a run depends on it; the journal has what is amiss."""
        for reply in self._grid.pull_messages(list(self._heads)):
            site = self._heads.pop(reply.metadata.reply_to_message_id)
            try:
                if not reply.has_error():
                    self._take_head(site, body_of(reply))
            except RemoteError as error:
                logger.warning("%s showed no head of its journal: %s", site, error)

    def _take_head(self, site: str, body: bytes) -> None:
        envelope, key = wire.parse_envelope(body), self._roster.site(site).public_key
        envelope.verify(key)
        if envelope.header != self._header(site, wire.COORDINATOR) or not isinstance(envelope.message, m.JournalHeads):
            raise RemoteError(Reason.WRONG_STAGE, "the answer holds no heads of journals", (site,))
        for sentence in self._coordinator.notary.take(site, key, envelope.message):
            logger.error("%s `foedus audit verify` says more.", sentence)

    def _members(self) -> list[str]:
        return sorted(self._willing & set(self._roster.public_keys))

    def _push(self, message_type: str, messages: Mapping[str, m.ToSite], ttl: float = 60) -> dict[str, str]:
        """Sites by the ids of what was sent to them."""
        envelopes = [
            self._grid.message(site, message_type, self._envelope(site, message), ttl=ttl)
            for site, message in messages.items()
        ]
        return dict(zip(self._grid.push_messages(envelopes), messages, strict=True))

    def _header(self, source: str, destination: str) -> wire.Header:
        return wire.Header(self._run_id, 0, 0, self.agreed.digest(), source, destination, sequence=0)

    def _envelope(self, site: str, message: m.ToSite) -> bytes:
        return wire.build_envelope(self._header(wire.COORDINATOR, site), message)


def _with_log(attempt: Attempt, log: RoundLog) -> Attempt:
    return dataclasses.replace(
        attempt, cohort=log.cohort, seconds=dict(log.seconds), bytes_up=log.bytes_up, bytes_down=log.bytes_down
    )
