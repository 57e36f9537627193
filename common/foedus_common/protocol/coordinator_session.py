"""One attempt of a round at the coordinator, A0 to A5: a pure state machine that opens one sum or nothing.

    state, effects = session.begin()
    state, effects = session.step(state, Arrived(site, envelope) | Deadline(sequence))

A stage closes when every site asked has answered or its deadline came; sites that did not answer, or answered wrongly,
are dropped, and the attempt goes on while enough are left. It ends in `Opened` or `Failed`. Masked vectors are loaded
one at a time and added as they arrive, so memory does not grow with the cohort. The session uses no randomness: fed
the persisted events again, in order, a restarted coordinator is where it was and its requests are the same bytes.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar, cast

from foedus_common.errors import DropReason, FoedusError, PolicyRefusal, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import primitives, shamir, wire
from foedus_common.protocol.effects import (
    Abort,
    Arrived,
    Deadline,
    Dropped,
    Effects,
    Persist,
    Send,
    VectorReader,
)
from foedus_common.protocol.encoding import Floats
from foedus_common.protocol.masks import Words, apply_masks
from foedus_common.protocol.primitives import KeyPair
from foedus_common.protocol.thresholds import Roster, require_quorum

Event = Arrived | Deadline

DRAW_REQUESTS = 2
"""Each attempt counts its requests from 0, and a draw comes before A0."""


@dataclass(frozen=True)
class Gathered:
    """What the closed stages left behind, all of it public but the total, which is masked.

    envelopes: the A1 envelopes as the sites signed them. total: sum of the masked vectors that have arrived.
    """

    envelopes: Mapping[str, bytes] = field(default_factory=dict)
    advertisements: Mapping[str, m.Advertise] = field(default_factory=dict)
    u1: bytes = b""
    dealers: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    total: Words | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class OpenStage:
    """A stage, counted from 0: `waiting` were asked and have not answered."""

    sequence: int
    waiting: frozenset[str]


@dataclass(frozen=True)
class Awaiting(OpenStage):
    """A stage of A0 to A5 is open; `answers` are in."""

    answers: Mapping[str, m.FromSite]
    gathered: Gathered


@dataclass(frozen=True)
class Opened:
    """The sum of the survivors' vectors, unmasked, checked and decoded: float64 (d,), the header not counted.

    suspects: sites whose shares were wrong, or whose dealt shares were; never a proof.
    """

    total: Floats = field(repr=False)
    survivors: tuple[str, ...]
    suspects: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The attempt is over; a new one needs fresh keys."""

    error: FoedusError


CoordinatorState = Awaiting | Opened | Failed


@dataclass(frozen=True)
class CoordinatorSession:
    """The coordinator's side of one attempt: what stays the same from step to step.

    seeds: by site name, of the draw that gave this cohort; empty where none was held.
    """

    config: m.RoundConfig
    roster: Roster
    vectors: VectorReader
    seeds: tuple[tuple[str, bytes], ...] = ()

    @cached_property
    def opening(self) -> m.Opening:
        return m.DrawnConfig(self.config, self.seeds) if self.seeds else self.config

    @cached_property
    def ctx(self) -> bytes:
        return wire.round_context(wire.body_bytes(self.opening))

    def header(self, site: str, stage: int) -> wire.Header:
        """Of the request that opens a stage, counted from 0; a draw has used up the first sequences."""
        binding = self.ctx if stage else self.config.terms.plan_digest
        sequence = stage + (DRAW_REQUESTS if self.seeds else 0)
        return wire.Header(*self.config.attempt_id, binding, wire.COORDINATOR, site, sequence)

    def begin(self) -> tuple[Awaiting, Effects]:
        """Ask the whole cohort for keys."""
        return _ask(self, 0, dict.fromkeys(self.config.cohort, self.opening), Gathered())

    def step(self, state: CoordinatorState, event: Event) -> tuple[CoordinatorState, Effects]:
        """Take in one event. Never raises FoedusError; what came too late, twice or unasked changes nothing."""
        if not isinstance(state, Awaiting):
            return state, ()
        taken, effects = take_in(state, event, _STAGES[state.sequence].name, self._accept)
        if taken.waiting or not effects:
            return taken, effects
        return self._close(taken, effects)

    def _accept(self, state: Awaiting, event: Arrived) -> Awaiting:
        """One answer into the open stage. Its errors name the check that it fails; the site is dropped for it."""
        stage = _STAGES[state.sequence]
        asked = replace(self.header(event.site, state.sequence), binding=self.ctx)
        answer = answer_to(asked, stage.answer, event, self.roster)
        gathered = stage.accept(self, state, event, answer)
        return replace(state, gathered=gathered, answers={**state.answers, event.site: answer})

    def _close(self, state: Awaiting, effects: Effects) -> tuple[CoordinatorState, Effects]:
        """Everybody asked has answered or is dropped: go on to the next stage, or to the end."""
        try:
            following, requests = _STAGES[state.sequence].close(self, state)
        except FoedusError as error:
            return Failed(error), (*effects, Abort(error))
        return following, (*effects, *requests)


def send_each(requests: Mapping[str, m.ToSite], header: Callable[[str], wire.Header]) -> Effects:
    """A request to each site. One that is the same for all is written once: it may list them all."""
    distinct = {id(request): request for request in requests.values()}
    written = {key: wire.body_bytes(request) for key, request in distinct.items()}
    return tuple(
        Send(site, wire.build_envelope(header(site), request, body=written[id(request)]))
        for site, request in requests.items()
    )


def answer_to(asked: wire.Header, kind: type[m.FromSite], event: Arrived, roster: Roster) -> m.FromSite:
    """What a site signed in answer to this request. Raises PolicyRefusal where it declined, else RemoteError."""
    site, envelope = event.site, wire.parse_envelope(event.envelope)
    envelope.verify(roster.member(site).public_key)
    if isinstance(envelope.message, m.Declined):
        raise PolicyRefusal([f"{site} declined to go on"])
    if envelope.header != replace(asked, source=site, destination=wire.COORDINATOR):
        raise RemoteError(Reason.CONFIG_MISMATCH, f"the answer of {site} belongs elsewhere", (site,))
    if not isinstance(envelope.message, kind):
        raise RemoteError(Reason.WRONG_STAGE, f"{site} did not answer with {kind.__name__}", (site,))
    return envelope.message


_Open = TypeVar("_Open", bound="OpenStage")


def take_in(state: _Open, event: Event, stage: str, accept: Callable[[_Open, Arrived], _Open]) -> tuple[_Open, Effects]:
    """An open stage after one event, and what came of it: nothing, for what is late, twice or unasked. When nobody is
    waited for any more, the stage is to be closed. accept: takes an answer in; its errors drop the site."""
    if isinstance(event, Deadline) and event.sequence == state.sequence:
        late = (
            Dropped(site, DropReason.DEADLINE, f"{site} did not answer {stage} in time")
            for site in sorted(state.waiting)
        )
        return replace(state, waiting=frozenset()), (Persist((event,)), *late)
    if isinstance(event, Arrived) and event.site in state.waiting:
        effects: Effects = (Persist((event,)),)
        try:
            state = accept(state, event)
        except FoedusError as error:
            reason = DropReason.DECLINED if isinstance(error, PolicyRefusal) else DropReason.PROTOCOL
            effects = (*effects, Dropped(event.site, reason, str(error)))
        return replace(state, waiting=state.waiting - {event.site}), effects
    return state, ()


def _ask(
    session: CoordinatorSession, sequence: int, requests: Mapping[str, m.ToSite], gathered: Gathered
) -> tuple[Awaiting, Effects]:
    """Open a stage: one request to each of the sites that are still there."""
    sends = send_each(requests, lambda site: session.header(site, sequence))
    return Awaiting(sequence, frozenset(requests), {}, gathered), sends


def _require_quorum(session: CoordinatorSession, sites: Iterable[str], stage: str) -> None:
    require_quorum(sites, stage, session.config.limits, session.roster)


def _require_threshold(session: CoordinatorSession, sites: Collection[str], stage: str) -> None:
    """At A4 and A5 the survivors are fixed; it takes t of them, whoever they are, to open their sum."""
    if len(sites) < session.config.threshold:
        raise RemoteError(
            Reason.TOO_FEW_SITES, f"{len(sites)} sites are left at {stage}, and {session.config.threshold} are needed"
        )


# --- A1 to A2: collect keys, show them to everybody ---


def _accept_keys(_: CoordinatorSession, state: Awaiting, event: Arrived, keys: m.Advertise) -> Gathered:
    known = {key for each in state.gathered.advertisements.values() for key in (each.share_key, each.mask_key)}
    if len(known | {keys.share_key, keys.mask_key}) != len(known) + 2:
        raise RemoteError(Reason.DUPLICATE_KEY, f"{event.site} sent a key twice, or that of another", (event.site,))
    return replace(
        state.gathered,
        envelopes={**state.gathered.envelopes, event.site: event.envelope},
        advertisements={**state.gathered.advertisements, event.site: keys},
    )


def _send_keys(session: CoordinatorSession, state: Awaiting) -> tuple[Awaiting, Effects]:
    _require_quorum(session, state.answers, "A1")
    members = sorted(state.answers)
    gathered = replace(
        state.gathered,
        advertisements={site: state.gathered.advertisements[site] for site in members},
        u1=wire.key_set_digest(state.gathered.advertisements),
    )
    request = m.PeerKeys(tuple(gathered.envelopes[site] for site in members))
    return _ask(session, 1, dict.fromkeys(members, request), gathered)


# --- A2 to A3: carry sealed shares from each to each ---


def _accept_shares(_: CoordinatorSession, state: Awaiting, event: Arrived, shares: m.ShareKeys) -> Gathered:
    if len(shares.sealed) != len(state.gathered.advertisements) - 1:
        raise RemoteError(Reason.BAD_SHARE, f"{event.site} did not deal one pair of shares to each peer", (event.site,))
    return state.gathered


def _send_shares(session: CoordinatorSession, state: Awaiting) -> tuple[Awaiting, Effects]:
    _require_quorum(session, state.answers, "A2")
    dealers = tuple(sorted(state.answers))
    sealed: dict[str, dict[str, bytes]] = {}
    for dealer in dealers:
        peers = [site for site in state.gathered.advertisements if site != dealer]
        sealed[dealer] = dict(zip(peers, cast(m.ShareKeys, state.answers[dealer]).sealed, strict=True))
    requests = {
        site: m.PeerShares(tuple((dealer, sealed[dealer][site]) for dealer in dealers if dealer != site))
        for site in dealers
    }
    return _ask(session, 2, requests, replace(state.gathered, dealers=dealers))


# --- A3 to A4: add up masked vectors, say whose ---


def _accept_vector(session: CoordinatorSession, state: Awaiting, event: Arrived, masked: m.MaskedInput) -> Gathered:
    layout = session.config.terms.layout
    if masked.vector.size != layout.size:
        raise RemoteError(
            Reason.BAD_MESSAGE,
            f"the masked vector of {event.site} has {masked.vector.size} bytes where {layout.size} belong",
            (event.site,),
        )
    words = session.vectors.load(masked.vector)
    if state.gathered.total is not None:
        words += state.gathered.total  # into the array just loaded: the earlier state keeps its own
    return replace(state.gathered, total=words)


def _send_survivors(session: CoordinatorSession, state: Awaiting) -> tuple[Awaiting, Effects]:
    _require_quorum(session, state.answers, "A3")
    survivors = tuple(sorted(state.answers))
    request = m.Survivors(survivors)
    return _ask(session, 3, dict.fromkeys(survivors, request), replace(state.gathered, survivors=survivors))


# --- A4 to A5: collect signatures over the survivors, show t of them to everybody ---


def _accept_signature(
    session: CoordinatorSession, state: Awaiting, event: Arrived, consistency: m.Consistency
) -> Gathered:
    statement = wire.survivors_statement(session.ctx, state.gathered.u1, state.gathered.survivors)
    key = session.roster.member(event.site).public_key
    primitives.verify_signature(key, consistency.signature, statement, event.site)
    return state.gathered


def _send_signatures(session: CoordinatorSession, state: Awaiting) -> tuple[Awaiting, Effects]:
    _require_threshold(session, state.answers, "A4")
    signers = sorted(state.answers)
    enough = signers[: session.config.threshold]
    request = m.Agreement(tuple((site, cast(m.Consistency, state.answers[site]).signature) for site in enough))
    return _ask(session, 4, dict.fromkeys(signers, request), state.gathered)


# --- A5: put secrets together again, take the masks off ---


def _accept_unmasking(_: CoordinatorSession, state: Awaiting, event: Arrived, unmask: m.Unmask) -> Gathered:
    kinds = [
        m.SelfMaskShare if dealer in state.gathered.survivors else m.PairKeyShare for dealer in state.gathered.dealers
    ]
    if [type(share) for share in unmask.shares] != kinds:
        raise RemoteError(Reason.BAD_SHARE, f"{event.site} did not send the shares it was asked for", (event.site,))
    return state.gathered


def _open(session: CoordinatorSession, state: Awaiting) -> tuple[Opened, Effects]:
    _require_threshold(session, state.answers, "A5")
    gathered = state.gathered
    secrets, suspects = _recover_secrets(session, state)

    to_subtract = [primitives.self_mask_key(secrets[site], session.ctx) for site in gathered.survivors]
    to_add: list[bytes] = []
    for dropped in sorted(set(gathered.dealers) - set(gathered.survivors)):
        mask_keys = KeyPair.from_private(secrets[dropped])
        for site in gathered.survivors:
            salt = primitives.pair_salt(session.ctx, gathered.u1, site, dropped)
            secret = mask_keys.shared_secret(gathered.advertisements[site].mask_key, site)
            key = primitives.pair_mask_key(secret, salt)
            (to_subtract if dropped < site else to_add).append(key)

    assert gathered.total is not None
    words = gathered.total.copy()
    apply_masks(words, add=to_add, subtract=to_subtract)
    total = session.config.terms.layout.decode(words, len(gathered.survivors))
    return Opened(total, gathered.survivors, suspects), ()


def _recover_secrets(session: CoordinatorSession, state: Awaiting) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Self-mask seeds of survivors and mask keys of the dropped, each checked against A1; and who is suspect."""
    gathered, responders = state.gathered, sorted(state.answers)
    sites = {session.config.x(site): site for site in responders}
    recovery = shamir.Recovery(list(sites), session.config.threshold)
    secrets: dict[str, bytes] = {}
    suspects: set[str] = set()
    for index, dealer in enumerate(gathered.dealers):
        shares = {x: cast(m.Unmask, state.answers[site]).shares[index].value for x, site in sites.items()}
        genuine = _is_seed if dealer in gathered.survivors else _is_mask_key
        try:
            known_wrong = recovery.wrong
            secrets[dealer] = recovery.secret(shares, partial(genuine, gathered.advertisements[dealer]))
        except RemoteError:
            raise RemoteError(
                Reason.BAD_SHARE,
                f"the shares of {dealer}'s secret do not open it: {dealer} or some of those who sent them are at fault",
                (dealer, *(site for site in responders if site != dealer)),
            ) from None
        if recovery.wrong != known_wrong:
            suspects |= {dealer, *(sites[x] for x in recovery.wrong - known_wrong)}
    return secrets, tuple(sorted(suspects))


def _is_seed(advertised: m.Advertise, secret: bytes) -> bool:
    return hmac.compare_digest(primitives.commitment(secret), advertised.commitment)


def _is_mask_key(advertised: m.Advertise, secret: bytes) -> bool:
    return hmac.compare_digest(KeyPair.from_private(secret).public, advertised.mask_key)


# --- The table of stages ---


class _Stage(NamedTuple):
    """What a stage awaits, how one answer is checked and taken in, what comes when the stage closes."""

    name: m.Stage
    answer: type[m.FromSite]
    accept: Callable[[CoordinatorSession, Awaiting, Arrived, Any], Gathered]
    close: Callable[[CoordinatorSession, Awaiting], tuple[CoordinatorState, Effects]]


_STAGES = (
    _Stage(m.Stage.ADVERTISE, m.Advertise, _accept_keys, _send_keys),
    _Stage(m.Stage.SHARE_KEYS, m.ShareKeys, _accept_shares, _send_shares),
    _Stage(m.Stage.MASKED_INPUT, m.MaskedInput, _accept_vector, _send_survivors),
    _Stage(m.Stage.CONSISTENCY, m.Consistency, _accept_signature, _send_signatures),
    _Stage(m.Stage.UNMASK, m.Unmask, _accept_unmasking, _open),
)
"""Indexed by the sequence of the requests whose answers they await."""
