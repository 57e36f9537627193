"""One attempt of a round at a site, A0 to A5: a pure state machine that distrusts the coordinator.

    state = session.begin()
    state, effects = session.step(state, request)        # request: the bytes of one envelope from the coordinator

A step checks, computes, and returns the next state and what to do about it; it raises nothing that the coordinator can
cause. After any failed check the state is `Failed` and stays so, and its secrets are gone. Knows no socket, clock, disk
or randomness of its own. What a state holds, and so how long a secret lives, is in `site_stages`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

from foedus_common.errors import FoedusError, LocalError, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import primitives, shamir, wire
from foedus_common.protocol.cores import in_parts
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import (
    Abort,
    Answered,
    AttemptSeen,
    Effects,
    Erase,
    Persist,
    Send,
    VectorMasked,
    VectorStore,
)
from foedus_common.protocol.masks import apply_masks
from foedus_common.protocol.primitives import KeyPair, Parcel, Sign
from foedus_common.protocol.site_draw import commit, require_drawn, reveal
from foedus_common.protocol.site_stages import (
    Advertised,
    Agreed,
    Committed,
    DealtShares,
    Failed,
    Finished,
    Lost,
    Masked,
    Outbox,
    Revealed,
    Shared,
    SiteStage,
    SiteState,
    Step,
    Waiting,
)
from foedus_common.protocol.thresholds import (
    PeerRule,
    Roster,
    Thresholds,
    cohort_thresholds,
    require_peers,
    require_quorum,
)
from foedus_common.randomness import RandomBytes


@dataclass(frozen=True)
class SiteSession:
    """The site's side of one attempt: what stays the same from step to step.

    sign: by the site's identity key. roster: verified against the root. rule: site policy about peers. size: of the
    plan's rounds. honest: sites whose noises the plan counts in every sum; 0 where a site's own is all that counts.
    """

    site: str
    sign: Sign
    roster: Roster
    rule: PeerRule
    size: RoundSize
    outbox: Outbox
    vectors: VectorStore
    random: RandomBytes
    honest: int = 0

    def begin(self) -> SiteState:
        return SiteState(Waiting())

    def after_restart(self, answered: Answered | None) -> SiteState:
        """For an attempt that this site had begun: its last stored answer is given again, anything new is refused."""
        return SiteState(Lost(), answered)

    def step(self, state: SiteState, request: bytes) -> tuple[SiteState, Effects]:
        """Answer one request. Never raises FoedusError: a failed check ends in `Failed` with Erase and Abort."""
        if isinstance(state.stage, Failed):
            return state, (Abort(state.stage.error),)
        envelope = None
        try:
            envelope = wire.parse_envelope(request)
            self._require_route(envelope.header)
            if answer := _stored_answer(state.answered, envelope, request):
                return state, (Send(wire.COORDINATOR, answer),)
            _require_attempt(state.stage, envelope.header)
            step = _transition(state, envelope)(self, state.stage, envelope)
        except FoedusError as error:
            return self._fail(state.stage, envelope, error)
        return self._effects(step, envelope, request)

    def _effects(self, step: Step, envelope: wire.Envelope, request: bytes) -> tuple[SiteState, Effects]:
        answer = self._reply(step.stage, envelope.header, step.answer)
        answered = Answered(
            envelope.header.attempt_id, envelope.header.sequence, hashlib.sha256(request).digest(), answer
        )
        records = (*step.records, answered) if step.keep_answer else step.records
        effects: Effects = (Send(wire.COORDINATOR, answer),)
        if records:
            effects = (Persist(records), *effects)
        if step.erase:
            effects = (*effects, step.erase)
        return SiteState(step.stage, answered), effects

    def _fail(self, stage: SiteStage, envelope: wire.Envelope | None, error: FoedusError) -> tuple[SiteState, Effects]:
        """Secrets first, then a bare word to the coordinator so that nobody waits, the reason for the own log."""
        effects: Effects = (Erase((stage.masked,) if isinstance(stage, Masked | Agreed) else ()),)
        if envelope and envelope.header.destination == self.site:
            effects = (*effects, Send(wire.COORDINATOR, self._reply(stage, envelope.header, m.Declined())))
        return SiteState(Failed(error)), (*effects, Abort(error))

    def _reply(self, stage: SiteStage, request: wire.Header, message: m.FromSite) -> bytes:
        binding = stage.ctx if isinstance(stage, Advertised | Shared | Masked | Agreed) else request.binding
        header = replace(request, binding=binding, source=self.site, destination=wire.COORDINATOR)
        return wire.build_envelope(header, message, self.sign)

    def _require_route(self, header: wire.Header) -> None:
        if (header.source, header.destination) != (wire.COORDINATOR, self.site):
            raise RemoteError(Reason.BAD_MESSAGE, f"a message from {header.source} to {header.destination} came here")


def _require_attempt(stage: SiteStage, header: wire.Header) -> None:
    """Once a round is agreed on, every request is bound to it by ctx."""
    if isinstance(stage, Advertised | Shared | Masked | Agreed) and (
        header.attempt_id != stage.config.attempt_id or header.binding != stage.ctx
    ):
        raise RemoteError(Reason.CONFIG_MISMATCH, "a message belongs to another attempt than the one agreed on")


# --- A0 to A1: look at the round, answer with fresh keys ---


def _commit(session: SiteSession, _: Waiting, envelope: wire.Envelope) -> Step:
    _check_vector(session, envelope.header.attempt_id)
    return commit(session, envelope.header)


def _reveal(session: SiteSession, stage: Committed, envelope: wire.Envelope) -> Step:
    return reveal(session, stage, envelope.header, _message(envelope, m.Commitments))


def _advertise_drawn(session: SiteSession, stage: Revealed, envelope: wire.Envelope) -> Step:
    drawn = _message(envelope, m.DrawnConfig)
    require_drawn(session, stage, envelope.header, drawn)
    _check_config(session, drawn.config, envelope.header)
    return _with_fresh_keys(session, drawn.config, envelope)


def _advertise(session: SiteSession, _: Waiting, envelope: wire.Envelope) -> Step:
    config, size = _message(envelope, m.RoundConfig), session.size
    _check_vector(session, config.attempt_id)
    if not size.fewest <= len(config.cohort) <= min(size.most, size.largest_cohort):
        raise RemoteError(
            Reason.COHORT_SIZE,
            f"a round of {len(config.cohort)} sites in one cohort is outside the plan's {size.fewest} to {size.most} "
            f"sites, or above the {size.largest_cohort} that share a sum",
        )
    _check_config(session, config, envelope.header)
    step = _with_fresh_keys(session, config, envelope)
    return replace(step, records=(AttemptSeen(config.attempt_id),))


def _with_fresh_keys(session: SiteSession, config: m.RoundConfig, envelope: wire.Envelope) -> Step:
    stage = Advertised(
        config,
        wire.round_context(envelope.body),
        envelope.header.sequence,
        share_keys=KeyPair.generate(session.random),
        mask_keys=KeyPair.generate(session.random),
        self_mask_seed=session.random(primitives.KEY_BYTES),
    )
    return Step(stage, stage.advertisement)


def _check_vector(session: SiteSession, attempt: m.AttemptId) -> None:
    """Whether this attempt may be begun with the vector that waits."""
    outbox = session.outbox
    if attempt in outbox.attempts_seen:
        raise RemoteError(Reason.ROUND_REUSED, f"attempt {attempt.attempt} of this round was begun here before")
    if outbox.masked_in is not None:
        raise RemoteError(
            Reason.VECTOR_REUSED,
            f"this vector was masked in attempt {outbox.masked_in.attempt}; another needs a new one",
        )
    if not outbox.charged:
        raise RemoteError(Reason.BUDGET, "the ledger holds no charge that covers a release of this vector")


def _check_config(session: SiteSession, config: m.RoundConfig, header: wire.Header) -> None:
    """Everything a site can know about a round before it answers; the most telling reason first."""
    terms, sites = session.outbox.terms, len(config.cohort)
    if not terms.min_sites <= sites <= terms.max_sites:
        raise RemoteError(
            Reason.COHORT_SIZE,
            f"a cohort of {sites} is outside the plan's {terms.min_sites} to {terms.max_sites} sites",
        )
    needed = cohort_thresholds(config.cohort, terms.colluding, session.honest, session.roster)
    if config.threshold < needed.threshold or config.minimum < needed.minimum:
        raise RemoteError(
            Reason.THRESHOLD_TOO_LOW,
            f"threshold {config.threshold} and minimum {config.minimum} where {needed.threshold} and "
            f"{needed.minimum} keep {sites} sites safe",
        )
    layout = config.terms.layout
    if 2 * layout.half_range * sites >= 2**layout.bits:
        raise RemoteError(Reason.FIELD_OVERFLOW, f"fields of {layout.bits} bits overflow in a sum of {sites} sites")
    require_peers(config.cohort, "A0", session.rule, session.site, session.roster)
    if session.site not in config.cohort:
        raise RemoteError(Reason.CONFIG_MISMATCH, "this site is not in the cohort it was sent")
    expected = replace(
        config,
        protocol_version=m.PROTOCOL_VERSION,
        terms=terms,
        roster_epoch=session.roster.epoch,
        roster_digest=session.roster.digest,
        threshold=needed.threshold,
        minimum=needed.minimum,
    )
    if differing := _differing(config, expected):
        raise RemoteError(
            Reason.CONFIG_MISMATCH, f"{', '.join(differing)} differ from what this site's vector was made under"
        )
    if header.attempt_id != config.attempt_id or header.binding != terms.plan_digest:
        raise RemoteError(Reason.CONFIG_MISMATCH, "the envelope and the round inside it are not about the same plan")


def _differing(left: Any, right: Any) -> list[str]:
    """Names of the fields in which two dataclasses of one class differ, those of nested terms by their own names."""
    names = []
    for name in (f.name for f in fields(left)):
        a, b = getattr(left, name), getattr(right, name)
        if a != b:
            names += _differing(a, b) if isinstance(a, m.RoundTerms) else [name]
    return names


def _check_set(session: SiteSession, sites: tuple[str, ...], stage: str, limits: Thresholds) -> None:
    require_quorum(sites, stage, limits, session.roster)
    require_peers(sites, stage, session.rule, session.site, session.roster)


# --- A2: check everybody's keys, share the own secrets ---


def _share_keys(session: SiteSession, stage: Advertised, envelope: wire.Envelope) -> Step:
    config, ctx, own = stage.config, stage.ctx, session.site
    advertisements = _check_keys(session, stage, _message(envelope, m.PeerKeys).envelopes)
    members = tuple(advertisements)
    _check_set(session, members, "A2", config.limits)
    u1 = wire.key_set_digest(advertisements)

    xs = [config.x(site) for site in members]
    seed_shares = shamir.split(stage.self_mask_seed, config.threshold, xs, session.random)
    key_shares = shamir.split(stage.mask_keys.private, config.threshold, xs, session.random)
    dealt = {
        site: DealtShares(m.SelfMaskShare(seed_share), m.PairKeyShare(key_share))
        for site, seed_share, key_share in zip(members, seed_shares, key_shares, strict=True)
    }

    sealed, incoming, pair_keys = [], {}, {}
    for peer, keys in advertisements.items():
        if peer == own:
            continue
        salt = primitives.pair_salt(ctx, u1, own, peer)
        share_secret = stage.share_keys.shared_secret(keys.share_key, peer)
        mask_secret = stage.mask_keys.shared_secret(keys.mask_key, peer)
        outgoing = primitives.share_key(share_secret, salt, own, peer)
        shares = dealt[peer].self_mask.value + dealt[peer].pair_key.value
        sealed.append(primitives.seal(outgoing, shares, Parcel(ctx, u1, own, peer)))
        incoming[peer] = primitives.share_key(share_secret, salt, peer, own)
        pair_keys[peer] = primitives.pair_mask_key(mask_secret, salt)

    self_mask_key = primitives.self_mask_key(stage.self_mask_seed, ctx)
    return Step(Shared(config, ctx, u1, self_mask_key, pair_keys, incoming, dealt[own]), m.ShareKeys(tuple(sealed)))


def _check_keys(session: SiteSession, stage: Advertised, envelopes: tuple[bytes, ...]) -> dict[str, m.Advertise]:
    """U1 by site name, from envelopes that each site of it signed in this very attempt."""
    parsed = [wire.parse_envelope(data) for data in envelopes]
    sources = [envelope.header.source for envelope in parsed]
    if sources != sorted(set(sources)):
        raise RemoteError(Reason.BAD_MESSAGE, "the sites' keys are not listed once each in ascending order")
    for source in sources:
        if source not in stage.config.cohort:
            raise RemoteError(Reason.UNKNOWN_SITE, f"{source} sent keys and is not in the cohort", (source,))
    _verify_each([partial(each.verify, session.roster.member(each.header.source).public_key) for each in parsed])
    for source, envelope in zip(sources, parsed, strict=True):
        expected = wire.Header(*stage.config.attempt_id, stage.ctx, source, wire.COORDINATOR, stage.sequence)
        if envelope.header != expected:
            raise RemoteError(Reason.CONFIG_MISMATCH, f"the keys of {source} were made for another attempt", (source,))
    advertisements = {envelope.header.source: _message(envelope, m.Advertise) for envelope in parsed}
    if advertisements.get(session.site) != stage.advertisement:
        raise RemoteError(Reason.KEY_ALTERED, "this site's own keys came back altered, or not at all")
    keys = [key for each in advertisements.values() for key in (each.share_key, each.mask_key)]
    if len(set(keys)) != len(keys):
        raise RemoteError(Reason.DUPLICATE_KEY, "two of the keys of this attempt are the same")
    return advertisements


# --- A3: open what the others dealt, mask the vector ---


def _mask(session: SiteSession, stage: Shared, envelope: wire.Envelope) -> Step:
    config, own = stage.config, session.site
    dealt = {own: stage.own_shares}
    for peer, sealed in _message(envelope, m.PeerShares).sealed:
        if peer not in stage.incoming_share_keys:
            raise RemoteError(Reason.UNKNOWN_SITE, f"{peer} dealt shares and is not a peer of this attempt", (peer,))
        parcel = Parcel(stage.ctx, stage.u1, peer, own)
        shares = primitives.unseal(stage.incoming_share_keys[peer], sealed, parcel)
        dealt[peer] = DealtShares(
            m.SelfMaskShare(shares[: shamir.SHARE_BYTES]), m.PairKeyShare(shares[shamir.SHARE_BYTES :])
        )
    members = tuple(sorted(dealt))
    _check_set(session, members, "A3", config.limits)

    words = session.vectors.load(session.outbox.vector)
    if words.shape != (config.terms.layout.words,):
        raise LocalError("the vector in the outbox does not have the size that its own terms give")
    apply_masks(
        words,
        add=[stage.self_mask_key, *(stage.pair_mask_keys[peer] for peer in members if peer < own)],
        subtract=[stage.pair_mask_keys[peer] for peer in members if peer > own],
    )
    masked = session.vectors.store(words)
    return Step(
        Masked(config, stage.ctx, stage.u1, masked, {site: dealt[site] for site in members}),
        m.MaskedInput(masked),
        records=(VectorMasked(config.attempt_id, session.outbox.vector, masked),),
        keep_answer=True,
        erase=Erase((session.outbox.vector,)),
    )


# --- A4: sign one survivor set ---


def _agree(session: SiteSession, stage: Masked, envelope: wire.Envelope) -> Step:
    survivors = _message(envelope, m.Survivors).sites
    if session.site not in survivors:
        raise RemoteError(Reason.SURVIVORS_INVALID, "this site sent its masked input and is not among the survivors")
    if strangers := set(survivors) - set(stage.dealt):
        raise RemoteError(Reason.SURVIVORS_INVALID, f"{', '.join(sorted(strangers))} cannot have survived: not in U2")
    _check_set(session, survivors, "A4", stage.config.limits)
    signature = session.sign(wire.survivors_statement(stage.ctx, stage.u1, survivors))
    return Step(
        Agreed(stage.config, stage.ctx, stage.u1, stage.masked, stage.dealt, survivors),
        m.Consistency(signature),
        keep_answer=True,
    )


# --- A5: give one share per site, of the kind that the survivor set decides ---


def _unmask(session: SiteSession, stage: Agreed, envelope: wire.Envelope) -> Step:
    signatures = _message(envelope, m.Agreement).signatures
    statement = wire.survivors_statement(stage.ctx, stage.u1, stage.survivors)
    for signer, _ in signatures:
        if signer not in stage.config.cohort:
            raise RemoteError(Reason.UNKNOWN_SITE, f"{signer} signed the survivors and is not in the cohort", (signer,))
    _verify_each(
        [
            partial(primitives.verify_signature, session.roster.member(signer).public_key, signature, statement, signer)
            for signer, signature in signatures
        ]
    )
    if len(signatures) < stage.config.threshold:
        raise RemoteError(
            Reason.TOO_FEW_SITES,
            f"{len(signatures)} sites signed this survivor set, and {stage.config.threshold} are needed",
        )
    shares = tuple(
        dealt.self_mask if site in stage.survivors else dealt.pair_key for site, dealt in stage.dealt.items()
    )
    return Step(Finished(), m.Unmask(shares), keep_answer=True, erase=Erase((stage.masked,)))


# --- The table of legal transitions ---

_Transition = Callable[[SiteSession, Any, wire.Envelope], Step]

TRANSITIONS: Mapping[tuple[type[SiteStage], type[m.Message]], _Transition] = {
    (Waiting, m.RoundConfig): _advertise,
    (Waiting, m.Draw): _commit,
    (Committed, m.Commitments): _reveal,
    (Revealed, m.DrawnConfig): _advertise_drawn,
    (Advertised, m.PeerKeys): _share_keys,
    (Shared, m.PeerShares): _mask,
    (Masked, m.Survivors): _agree,
    (Agreed, m.Agreement): _unmask,
}

_REFUSALS: Mapping[tuple[type[SiteStage], type[m.Message]], tuple[Reason, str]] = {
    (Masked, m.PeerShares): (Reason.ALREADY_MASKED, "the vector is masked and is never masked again"),
    (Agreed, m.PeerShares): (Reason.ALREADY_MASKED, "the vector is masked and is never masked again"),
    (Finished, m.PeerShares): (Reason.ALREADY_MASKED, "the vector is masked and is never masked again"),
    (Agreed, m.Survivors): (Reason.SURVIVORS_INVALID, "a survivor set is signed and no other ever is"),
    (Finished, m.Survivors): (Reason.SURVIVORS_INVALID, "a survivor set is signed and no other ever is"),
}


def _transition(state: SiteState, envelope: wire.Envelope) -> _Transition:
    """What to do with a request that was not answered before, or the named reason why nothing is done."""
    if isinstance(state.stage, Lost):
        raise RemoteError(Reason.SECRETS_LOST, "this site restarted during the attempt and has lost its secrets")
    stage, message = type(state.stage), type(envelope.message)
    if reason := _REFUSALS.get((stage, message)):
        raise RemoteError(*reason)
    expected = state.answered.sequence + 1 if state.answered else 0
    if (stage, message) not in TRANSITIONS or envelope.header.sequence != expected:
        raise RemoteError(
            Reason.WRONG_STAGE,
            f"request {envelope.header.sequence}, {message.__name__}, does not come after {stage.__name__}",
        )
    return TRANSITIONS[stage, message]


def _stored_answer(answered: Answered | None, envelope: wire.Envelope, request: bytes) -> bytes | None:
    """Same sequence and same bytes: the same answer. Anything else under a used sequence is refused."""
    if answered is None or envelope.header.sequence > answered.sequence:
        return None
    same = envelope.header.sequence == answered.sequence and hashlib.sha256(request).digest() == answered.request
    if not same:
        raise RemoteError(
            Reason.SEQUENCE_REUSED, f"request {envelope.header.sequence} came again, and not as the last one answered"
        )
    return answered.answer


def _verify_each(checks: Sequence[Callable[[], None]]) -> None:
    """Signatures on all cores: in a large cohort they take longer than anything else that a site does."""

    def run(start: int, stop: int) -> None:
        for check in checks[start:stop]:
            check()

    in_parts(len(checks), run, least=3, multiple=1)


_M = TypeVar("_M", bound=m.Message)


def _message(envelope: wire.Envelope, kind: type[_M]) -> _M:
    if not isinstance(envelope.message, kind):
        raise RemoteError(Reason.BAD_MESSAGE, f"a {type(envelope.message).__name__} came where {kind.__name__} belongs")
    return envelope.message
