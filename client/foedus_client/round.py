"""One round at a site, top to bottom: the page an auditor reads.

    propose   a plan arrives; policy, ledger and a person decide
    invite    reserve in the ledger (on disk) -> open the data and train -> encode -> outbox (on disk) -> Ready
    step      the cryptographic stages A0 to A5, each answer stored before it is sent
    end       the run is over; what was reserved and never released returns
    journal   each side shows the other the head of its journal; no round depends on it

Each takes the bytes of one envelope from the coordinator and gives the bytes of one signed envelope. The coordinator is
not trusted: whatever does not check ends in a bare Declined, and the reason stays in the site's own log. Knows no
Flower, no socket and no torch; those are arguments.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from foedus_client import storage
from foedus_client.approval import POLICY, Approval
from foedus_client.audit import notary, note_roster, sign_end
from foedus_client.ledger.accounts import Commitment
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_client.training.turns import Turns
from foedus_common.allowance import Allowance
from foedus_common.clock import Clock
from foedus_common.errors import FoedusError, LocalError, PolicyRefusal, Reason, RemoteError
from foedus_common.identity import MAX_ROSTER_BYTES, SIGNATURE_BYTES, Roster, SignedPlan
from foedus_common.journal import Refusals
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import AgreedPlan, RoundPlan, parse_agreed_plan, schedule
from foedus_common.privacy.site_level import noised_update
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.effects import Abort, Erase, Persist, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import Words
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import (
    Advertised,
    Agreed,
    Committed,
    Finished,
    Masked,
    Revealed,
    Shared,
    SiteState,
)
from foedus_common.protocol.thresholds import PeerRule
from foedus_common.randomness import RandomBytes
from foedus_common.ranges import counted_sites, half_range
from foedus_common.terms import protocol_roster, round_terms

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
SUMMING = (Committed, Revealed, Advertised, Shared, Masked, Agreed)

PROPOSALS, HEADS = (64, 900.0), (1024, 60.0)
"""So many plans, and heads of the coordinator's journal, at once, and then one for so many seconds."""
MAX_ATTEMPTS = 128
"""Attempts at a round that a site begins: more than the draws that it takes part in."""


class Trainer(Protocol):
    """Trains one run's rounds. `open` has the model ready; the data is opened at the first `train` and not before."""

    def open(self) -> None: ...
    def train(self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan) -> NDArray[np.float64]: ...
    def stop(self) -> None: ...


class Courier(Protocol):
    """Moves objects between this site and the coordinator (`foedus_client.link.site_link.SiteLink`)."""

    def fetch(self, run_id: int, ref: ObjectRef) -> Path: ...
    def push(self, run_id: int, ref: ObjectRef) -> None: ...


class Member(Protocol):
    """What this site is in the federation (`foedus_client.enrol.Membership`)."""

    key: Ed25519PrivateKey

    @property
    def name(self) -> str: ...
    def roster(self, now: float) -> Roster: ...
    def accept_roster(self, signed: bytes, now: float) -> Roster: ...


@dataclass(frozen=True)
class Site:
    """Everything a round needs of its site. `pausing` is set when no new round is to begin, `stopping` when the daemon
    goes down."""

    member: Member
    policy: SitePolicy
    store: SiteStore
    ledger: Ledger
    objects: ObjectStore
    courier: Courier
    open_trainer: Callable[[AgreedPlan], Trainer]
    clock: Clock
    random: RandomBytes
    max_trainers: int = 2
    pausing: threading.Event = field(default_factory=threading.Event)
    stopping: threading.Event = field(default_factory=threading.Event)


class SiteRounds:
    """The rounds of one site. Messages of one run come one at a time; different runs may come at once."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._sessions: dict[int, tuple[m.AttemptId, SiteSession, SiteState]] = {}
        self._trainers = Turns(site.open_trainer, site.max_trainers)
        self._training: set[int] = set()
        self._arriving: dict[int, ObjectRef] = {}
        self._reading_roster = threading.Lock()
        self._proposals = Allowance(site.clock, *PROPOSALS)
        self._heads = Allowance(site.clock, *HEADS)
        self._refusals = Refusals(site.store.log, site.clock)

    # --- A plan arrives ---

    def propose(self, request: bytes) -> bytes:
        """Ready when the site takes part in the plan's run, Declined when not. Waits for a person if policy says so."""
        envelope = self._open(request)
        try:
            agreed = self._receive_plan(envelope)
            willing = self._decide(agreed)
        except FoedusError as error:
            self._refuse("plan.refused", "the plan is not accepted", envelope.header, error)
            willing = False
        return self._answer(envelope.header, m.Ready() if willing else m.Declined())

    def _receive_plan(self, envelope: wire.Envelope) -> AgreedPlan:
        """The plan, once roster and plan are signed by those who may, and stored. Raises FoedusError."""
        site, header, proposal = self._site, envelope.header, envelope.message
        if not isinstance(proposal, m.Propose):
            raise RemoteError(Reason.WRONG_STAGE, f"a {type(proposal).__name__} came where a proposal belongs")
        shown = ObjectRef(proposal.roster.digest.hex(), proposal.roster.size)
        if shown.size > SIGNATURE_BYTES + MAX_ROSTER_BYTES:
            raise RemoteError(Reason.BAD_MESSAGE, f"a roster of {shown.size} bytes is announced, which is too long")
        with self._reading_roster:
            signed_roster = site.courier.fetch(header.run_id, shown).read_bytes()
            site.objects.delete(shown)
            roster = site.member.accept_roster(signed_roster, site.clock.now())
        note_roster(site.store, roster)
        agreed = SignedPlan(proposal.plan, proposal.plan_signature).verify(roster.plan_key)
        if (agreed.run_id, agreed.digest()) != (header.run_id, header.binding):
            raise RemoteError(Reason.CONFIG_MISMATCH, "the proposal's envelope names another plan than it carries")
        Commitment.of(agreed)  # refuses noise that cannot be drawn before anybody is shown the plan
        storage.let_lapse(site.store, site.clock)
        known = site.store.plan(agreed.digest())
        if (known is None or known.state == "stopped") and not self._proposals.take():
            raise RemoteError(Reason.QUOTA, "plans are proposed faster than anybody could decide on them")
        site.store.put_plan(agreed.digest(), agreed.run_id, proposal.plan, proposal.plan_signature)
        return agreed

    def _decide(self, agreed: AgreedPlan) -> bool:
        """Whether the site takes part. Policy is a ceiling: what exceeds it is declined and never clamped."""
        site, digest = self._site, agreed.digest()
        stored = site.store.plan(digest)
        assert stored is not None  # `_receive_plan` stored it
        if stored.state == "stopped":  # the operator takes the run up again: whether this site does is a new decision
            stored = site.store.decide_plan(digest, "pending", by="coordinator")
        if stored.state == "pending":
            approval = Approval(
                site.member.name, site.member.roster(site.clock.now()), site.policy, site.store, site.ledger
            )
            if reasons := approval.lasting_reasons(agreed):
                approval.decline(digest, by=POLICY)
                raise PolicyRefusal(reasons)
            if approval.needs_person(agreed):
                logger.info("run %s waits for approval: `foedus-site plans`", agreed.plan.run.name)
            else:
                approval.approve(digest, by=POLICY)
                if rows := approval.left_out(agreed):
                    logger.warning("run %s: %d rows have labels that are not the plan's", agreed.plan.run.name, rows)
        while (stored := site.store.plan(digest)) and stored.state == "pending":
            if site.stopping.wait(LOOK_SECONDS):
                raise LocalError("the site's daemon is stopping; the coordinator will ask again.")
        return stored is not None and stored.state == "approved"

    # --- A round begins ---

    def invite(self, request: bytes) -> bytes:
        """Ready when this round's vector is in the outbox, Declined when the site does not take part in the round."""
        envelope = self._open(request)
        header = envelope.header
        if self._site.pausing.is_set():
            self._site.stopping.wait()
            raise LocalError("the site pauses; the coordinator will ask again.")
        self._training.add(header.run_id)
        try:
            self._make_vector(envelope)
        except FoedusError as error:
            self._refuse("round.refused", "declined", header, error)
            return self._answer(header, m.Declined())
        finally:
            self._training.discard(header.run_id)
        logger.info("run %d, round %d: ready", header.run_id, header.round + 1)
        return self._answer(header, m.Ready())

    def _make_vector(self, envelope: wire.Envelope) -> None:
        """Raises FoedusError when the round is not what was approved, the ledger has no room, or training fails."""
        site, header = self._site, envelope.header
        agreed, round_plan, adapter = self._check_invitation(envelope)
        terms = round_terms(agreed, round_plan, adapter)
        waiting = site.store.outbox(header.run_id, header.round)
        if waiting and waiting.masked_in is None and waiting.terms == terms and self._lies_here(waiting.vector):
            return  # made before and never masked: the stored vector serves
        path = self._fetch(header.run_id, adapter)
        try:
            with self._trainers.trainer(agreed) as trainer:
                trainer.open()  # a missing device or too little memory for the model costs no charge
                charge = site.ledger.reserve_round(header.run_id, header.round, site.policy.budget)  # before any data
                update = trainer.train(path, adapter.sha256, round_plan)
        finally:  # whatever came of it: a coordinator could offer another adapter every minute
            if adapter.sha256 != agreed.first_adapter_sha256:  # which another run may be starting from, too
                site.objects.delete(adapter)
        words = encoded(update, agreed, round_plan, terms.layout, site.random)
        vector = ObjectVectors(site.objects).store(words)
        site.ledger.release(charge, terms, vector)  # the outbox, on disk before Ready is sent

    def _check_invitation(self, envelope: wire.Envelope) -> tuple[AgreedPlan, RoundPlan, ObjectRef]:
        """What is to be trained, and from which adapter. Raises RemoteError unless just that was approved."""
        site, header, invite = self._site, envelope.header, envelope.message
        if not isinstance(invite, m.Invite):
            raise RemoteError(Reason.WRONG_STAGE, f"a {type(invite).__name__} came where an invitation belongs")
        stored = site.store.plan(header.binding)
        if stored is None or stored.state != "approved" or stored.run_id != header.run_id:
            self._let_go(header.run_id)
            raise RemoteError(Reason.CONFIG_MISMATCH, "the invitation names a plan that is not approved here")
        if (invite.plan, invite.plan_signature) != (stored.canonical, stored.signature):
            raise RemoteError(Reason.CONFIG_MISMATCH, "the invitation carries another plan than was approved")
        site.ledger.check_approval(header.run_id, stored.digest)
        agreed = parse_agreed_plan(stored.canonical)
        site.member.roster(site.clock.now())  # an expired roster vouches for nobody
        rounds = schedule(agreed.plan)
        if header.round >= len(rounds) or invite.base_model_hash.hex() != agreed.plan.model.sha256:
            raise RemoteError(Reason.CONFIG_MISMATCH, "the plan has no such round, or another base model")
        adapter = ObjectRef(invite.adapter.digest.hex(), invite.adapter.size)
        if header.round == 0 and adapter.sha256 != agreed.first_adapter_sha256:
            raise RemoteError(Reason.CONFIG_MISMATCH, "the first round does not start from the plan's first adapter")
        return agreed, rounds[header.round], adapter

    def _fetch(self, run_id: int, adapter: ObjectRef) -> Path:
        """The adapter; a download that is cut is gone on with by the next try, unless that is for another adapter."""
        if (earlier := self._arriving.pop(run_id, adapter)) != adapter:
            self._site.objects.delete(earlier)
        self._arriving[run_id] = adapter
        path = self._site.courier.fetch(run_id, adapter)
        del self._arriving[run_id]
        return path

    def _lies_here(self, vector: m.VectorRef) -> bool:
        return self._site.objects.has(ObjectRef(vector.digest.hex(), vector.size))

    # --- The cryptographic stages ---

    def step(self, request: bytes) -> bytes:
        """The session's answer to one request of A0 to A5; effects are carried out in the order it gives."""
        try:
            envelope = self._open(request)
        except RemoteError:
            self._sessions.clear()  # nobody can say which attempt it was about: every secret under way is dropped
            raise
        attempt = envelope.header.attempt_id
        try:
            session, state = self._session(attempt)
        except FoedusError as error:
            self._refuse("round.refused", "declined", envelope.header, error)
            return self._answer(envelope.header, m.Declined())
        state, effects = session.step(state, request)
        self._sessions.pop(attempt.run_id, None)  # should an effect fail, then this is a crash: only the disk counts
        answer = self._answer(envelope.header, m.Declined())
        for effect in effects:
            match effect:
                case Persist(records):
                    self._site.store.persist(records)
                case Send(_, answer):
                    self._push_what_it_names(attempt.run_id, answer)
                case Erase(objects):
                    for ref in objects:
                        self._site.objects.delete(ObjectRef(ref.digest.hex(), ref.size))
                case Abort(why):
                    self._refuse("attempt.aborted", "stopped", envelope.header, why)
        self._sessions[attempt.run_id] = (attempt, session, state)
        if isinstance(state.stage, Agreed | Finished):  # the coordinator named this site a survivor: it has the vector
            self._site.ledger.commit(attempt.run_id, attempt.round)
        return answer

    def _session(self, attempt: m.AttemptId) -> tuple[SiteSession, SiteState]:
        """The attempt's session: the one under way, a new one, or what a restart left of it."""
        site = self._site
        plan = site.store.plan_of_run(attempt.run_id)
        if plan is None or plan.state != "approved":  # looked up at every step: who withdraws sends nothing more
            self._sessions.pop(attempt.run_id, None)
            raise RemoteError(Reason.WRONG_STAGE, "the run's plan is not approved here")
        known = self._sessions.get(attempt.run_id)
        if known and known[0] == attempt:
            return known[1:]
        outbox = site.store.outbox(attempt.run_id, attempt.round)
        if outbox is None:
            raise RemoteError(Reason.WRONG_STAGE, "no vector of this round is in the outbox")
        agreed = parse_agreed_plan(plan.canonical)
        session = SiteSession(
            site=site.member.name,
            sign=site.member.key.sign,
            roster=protocol_roster(site.member.roster(site.clock.now())),
            rule=peer_rule(site.policy),
            size=agreed.plan.secure_aggregation.size,
            outbox=outbox,
            vectors=ObjectVectors(site.objects),
            random=site.random,
            honest=counted_sites(agreed, outbox.terms.phase),
        )
        if attempt in outbox.attempts_seen:
            return session, session.after_restart(site.store.answered(attempt))
        if len(outbox.attempts_seen) >= MAX_ATTEMPTS:
            raise RemoteError(Reason.QUOTA, f"{MAX_ATTEMPTS} attempts at this round were begun here already")
        return session, session.begin()

    def _push_what_it_names(self, run_id: int, answer: bytes) -> None:
        """An answer that names an object is sent after the object; sending it again finds it there."""
        message = wire.parse_envelope(answer).message
        if isinstance(message, m.MaskedInput):
            self._site.courier.push(run_id, ObjectRef(message.vector.digest.hex(), message.vector.size))

    # --- Beside the rounds ---

    def journal(self, request: bytes) -> bytes:
        """This journal's head for the coordinator's, each signed by both sides."""
        envelope = self._open(request)
        site, header = self._site, envelope.header
        try:
            if not isinstance(envelope.message, m.JournalHeads) or site.store.plan(header.binding) is None:
                raise RemoteError(Reason.WRONG_STAGE, "heads of journals are shown in runs that are known here")
            if not self._heads.take():
                raise RemoteError(Reason.QUOTA, "heads of the journal are shown faster than rounds end")
            coordinator_key = site.member.roster(site.clock.now()).plan_key
            ours = notary(site.store, site.member)
            with site.store.transaction("heads of journals"):
                amiss = ours.take(wire.COORDINATOR, coordinator_key, envelope.message)
                own = sign_end(site.store, site.member, site.random)
                answer = ours.show(wire.COORDINATOR, own, envelope.message.own)
        except FoedusError as error:
            self._refuse("heads.refused", "no head of the journal is shown", header, error)
            return self._answer(header, m.Declined())
        for sentence in amiss:
            logger.warning("%s `foedus-site audit verify` says more.", sentence)
        return self._answer(header, answer)

    # --- The end ---

    def end(self, request: bytes) -> bytes:
        """The coordinator says that no round will follow; believing it costs the site nothing."""
        envelope = self._open(request)
        header, site = envelope.header, self._site
        stored = site.store.plan(header.binding)
        if not isinstance(envelope.message, m.RunEnded) or stored is None or stored.run_id != header.run_id:
            return self._answer(header, m.Ready())
        self._let_go(header.run_id)
        if stored.state == "approved":
            end = envelope.message.end
            site.ledger.close_run(header.run_id)
            site.store.decide_plan(stored.digest, "finished" if end == m.End.FINISHED else "stopped", by="coordinator")
            storage.forget_run(site.objects, site.store, site.clock, header.run_id)
            logger.info("run %d: %s", header.run_id, end)
        return self._answer(header, m.Ready())

    def _let_go(self, run_id: int) -> None:
        self._sessions.pop(run_id, None)
        if adapter := self._arriving.pop(run_id, None):
            self._site.objects.delete(adapter)
        self._trainers.stop(run_id)

    @property
    def training(self) -> bool:
        """Whether a round is being trained; cut off now, it would cost its run a retry."""
        return bool(self._training)

    @property
    def summing(self) -> bool:
        """Whether a secure sum is under way that this site would be missed in."""
        return any(isinstance(state.stage, SUMMING) for _, _, state in list(self._sessions.values()))

    def stop(self) -> None:
        """The daemon goes down: trainers end; everything that matters is on disk."""
        self._site.stopping.set()
        self._trainers.close()

    # --- Refusals ---

    def _refuse(self, event: str, what: str, header: wire.Header, error: FoedusError) -> None:
        """The sentence goes into the log, for it may name numbers that only this site should know; the kind into the
        journal."""
        logger.warning("run %d, round %d: %s: %s", header.run_id, header.round + 1, what, error)
        kind = error.reason.value if isinstance(error, RemoteError) else type(error).__name__
        where = {"run": str(header.run_id), "round": header.round, "attempt": header.attempt}
        self._refusals.note(event, **where, reason=kind)

    # --- Envelopes ---

    def _open(self, request: bytes) -> wire.Envelope:
        """Raises RemoteError for what is no envelope from the coordinator to this site: then nobody is answered."""
        envelope = wire.parse_envelope(request)
        if (envelope.header.source, envelope.header.destination) != (wire.COORDINATOR, self._site.member.name):
            raise RemoteError(Reason.BAD_MESSAGE, "an envelope that is not from the coordinator to this site")
        return envelope

    def _answer(self, request: wire.Header, message: m.FromSite) -> bytes:
        header = dataclasses.replace(request, source=self._site.member.name, destination=wire.COORDINATOR)
        return wire.build_envelope(header, message, self._site.member.key.sign)


def encoded(
    update: NDArray[np.float64], agreed: AgreedPlan, round_plan: RoundPlan, layout: FieldLayout, random: RandomBytes
) -> Words:
    """The update as words that may be masked and sent.

    Record: its noise is in it, in every step of training; one that was one step goes out in the integers in which it
    was noised, and nothing is rounded. Site: it is clipped and noised here. Noise is never truncated: the range is so
    wide that leaving it has a probability below 2^-40, and encoding refuses. Without DP each coordinate is clamped to
    the plan's `update_bound`.
    """
    match agreed.plan.privacy.unit:
        case "record" if agreed.linear(round_plan.phase):
            return layout.pack(layout.whole_steps(update))
        case "record":
            return layout.encode(update, random)
        case "site":
            return layout.pack(noised_update(update, agreed, round_plan, random))
        case _:
            bound = half_range(agreed, round_plan, "adapter")
            return layout.encode(np.clip(update, -bound, bound), random)


def peer_rule(policy: SitePolicy) -> PeerRule:
    """Every organisation that policy names has to be there."""
    return PeerRule(frozenset(policy.must_include), len(policy.must_include))


class ObjectVectors:
    """The session's vectors as objects of this site (`foedus_common.protocol.effects.VectorStore`)."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects

    def load(self, ref: m.VectorRef) -> Words:
        data = self._objects.read(ObjectRef(ref.digest.hex(), ref.size))
        return np.frombuffer(data, dtype="<u8").astype(np.uint64)

    def store(self, words: Words) -> m.VectorRef:
        ref = self._objects.put(words.astype("<u8", copy=False).tobytes())
        return m.VectorRef(bytes.fromhex(ref.sha256), ref.size)
