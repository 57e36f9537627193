"""One attempt of three sites in memory, its messages, and what either side does with a mutated one."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.canonical import labelled
from foedus_common.errors import FoedusError, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_draw import Drawn, DrawSession
from foedus_common.protocol.coordinator_session import CoordinatorSession, OpenStage
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import Arrived, Deadline, Effects, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Outbox, SiteState
from foedus_common.protocol.thresholds import Member, PeerRule, Roster
from mutations import INTERESTING, raw
from seeded import seeded

SITES = ("east", "north", "south")
FUZZED = SITES[0]


class Attempt:
    """Plays an honest attempt and keeps the states in between. `envelopes`: all of its messages and some others."""

    def __init__(self) -> None:
        random = seeded("an attempt")
        self.vectors: dict[bytes, bytes] = {}
        keys = {site: Ed25519PrivateKey.from_private_bytes(random(32)) for site in SITES}
        self._sign = keys[FUZZED].sign
        members = {site: Member(key.public_key().public_bytes_raw(), f"of {site}") for site, key in keys.items()}
        roster = Roster(7, random(32), members)
        layout = FieldLayout(21, 16, ((3, 1.0), (4, 0.25)))
        terms = m.RoundTerms(
            *(11, 2, 0, random(32), random(32), random(32), "trainer 1", layout, m.Noise("record", 1.0, 0.8), 3, 1)
        )
        self.config = m.RoundConfig(m.PROTOCOL_VERSION, terms, 0, 7, roster.digest, SITES, 3, 3)
        sites = {
            site: SiteSession(
                site=site,
                sign=keys[site].sign,
                roster=roster,
                rule=PeerRule(),
                size=RoundSize(3, 16),
                outbox=Outbox(terms, self.store(layout.pack(np.ones(7, np.int64))), charged=True),
                vectors=self,
                random=random,
            )
            for site in SITES
        }
        self.requests: list[bytes] = []
        self.answers: list[bytes] = []
        self._site_states: list[tuple[SiteSession, SiteState]] = []
        self._coordinator_states: list[tuple[CoordinatorSession | DrawSession, Any]] = []
        self._play(CoordinatorSession(self.config, roster, self), sites)
        self._draw(roster, sites)
        self.envelopes = [*self.requests, *self.answers, *self._others()]

    def _play(
        self, coordinator: CoordinatorSession | DrawSession, sites: dict[str, SiteSession]
    ) -> tuple[object, dict[str, SiteState]]:
        """From the first request to the last answer; gives the states at the end."""
        states = {site: session.begin() for site, session in sites.items()}
        state: Any
        state, effects = coordinator.begin()
        while isinstance(state, OpenStage):
            answers: list[Arrived] = []
            for effect in [effect for effect in effects if isinstance(effect, Send)]:
                site = effect.destination
                if site == FUZZED:
                    self.requests.append(effect.envelope)
                    self._site_states.append((sites[site], states[site]))
                states[site], said = sites[site].step(states[site], effect.envelope)
                answers += [Arrived(site, each.envelope) for each in said if isinstance(each, Send)]
            self.answers += [answer.envelope for answer in answers if answer.site == FUZZED]
            self._coordinator_states.append((coordinator, state))
            collected: Effects = ()
            for event in (*answers, Deadline(state.sequence)):
                state, more = coordinator.step(state, event)
                collected += more
                if not isinstance(state, OpenStage):
                    break
            effects = collected
        return state, states

    def _draw(self, roster: Roster, sites: dict[str, SiteSession]) -> None:
        """A draw as if cohorts had two sites at most, and what the fuzzed site is shown of its end."""
        size = RoundSize(3, 16, largest_cohort=2)
        drawing = {site: dataclasses.replace(session, size=size) for site, session in sites.items()}
        drawn, states = self._play(DrawSession(self.config.terms, 0, SITES, size, roster), drawing)
        assert isinstance(drawn, Drawn)
        header = wire.Header(*self.config.attempt_id, self.config.terms.plan_digest, wire.COORDINATOR, FUZZED, 2)
        self.requests.append(wire.build_envelope(header, m.DrawnConfig(self.config, drawn.seeds)))
        self._site_states.append((drawing[FUZZED], states[FUZZED]))

    def _others(self) -> list[bytes]:
        reference = m.VectorRef(bytes(32), 80)
        to_site = (
            m.Propose(b"{}", bytes(64), reference),
            m.RunEnded(m.End.FINISHED),
            m.JournalHeads(m.JournalHead(3, bytes(32), bytes(64)), ()),
            m.Invite(b"{}", bytes(64), bytes(32), reference),
        )
        heads = m.JournalHeads(
            m.JournalHead(3, bytes(32), bytes(64)), (m.SeenHead(2, bytes(32), bytes(64), bytes(64)),)
        )
        back = (m.Ready(), m.Declined(), heads)
        header = wire.Header(11, 2, 0, bytes(32), wire.COORDINATOR, FUZZED, 0)
        answer = wire.Header(11, 2, 0, bytes(32), FUZZED, wire.COORDINATOR, 0)
        return [
            *(wire.build_envelope(header, message) for message in to_site),
            *(wire.build_envelope(answer, message, self._sign) for message in back),
        ]

    def changed(self, random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        """Some values of the header or the message are others; written and, from a site, signed anew."""
        envelope = wire.parse_envelope(data)
        header, message = envelope.header, envelope.message
        try:
            for _ in range(random.choice((1, 1, 2, 3))):
                if random.random() < 0.25:
                    header = _changed(random, header)
                else:
                    message = _changed(random, message)
            return wire.build_envelope(header, message, self._sign if envelope.signature else None)
        except (FoedusError, OverflowError):
            return self.damaged(random, data, others)

    def damaged(self, random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        """The bytes of the body are damaged, those around it are not; from a site, signed anew."""
        envelope = wire.parse_envelope(data)
        whole = data[: len(data) - len(envelope.signature)]
        body = raw(random, envelope.body, others)
        told = whole[: len(whole) - len(envelope.body)] + body
        return told + (self._sign(labelled("envelope", told)) if envelope.signature else b"")

    # --- What is done with a message, in one of the stages: neither ever raises ---

    def site_takes(self, request: bytes) -> None:
        session, state = self._site_states[zlib.crc32(request) % len(self._site_states)]
        session.step(state, request)

    def coordinator_takes(self, answer: bytes) -> None:
        session, state = self._coordinator_states[zlib.crc32(answer) % len(self._coordinator_states)]
        session.step(state, Arrived(FUZZED, answer))

    # --- Vectors ---

    def store(self, words: np.ndarray) -> m.VectorRef:
        data = words.tobytes()
        if len(self.vectors) < 100:
            self.vectors[hashlib.sha256(data).digest()] = data
        return m.VectorRef(hashlib.sha256(data).digest(), len(data))

    def load(self, ref: m.VectorRef) -> np.ndarray:
        if ref.digest not in self.vectors:
            raise RemoteError(Reason.BAD_MESSAGE, "no such vector")
        return np.frombuffer(bytearray(self.vectors[ref.digest]), dtype=np.uint64)


_ODD_NAMES = ("", "a", "x" * 40, "x" * 41, "@coordinator", "North", "north\n", *SITES)


def _changed(random: Random, value: Any) -> Any:
    """The same with one value in it changed, wherever that lies; FoedusError where a class forbids it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if not (fields := dataclasses.fields(value)):
            return value
        name = random.choice(fields).name
        return dataclasses.replace(value, **{name: _changed(random, getattr(value, name))})
    if isinstance(value, m.VectorRef):
        return random.choice(
            (value._replace(digest=random.randbytes(32)), value._replace(size=random.choice(INTERESTING)))
        )
    if isinstance(value, tuple) and value:
        at = random.randrange(len(value))
        changed = (*value[:at], _changed(random, value[at]), *value[at + 1 :])
        if len({type(item) for item in value}) > 1:  # a pair
            return changed
        shorter, longer = value[:at] + value[at + 1 :], (*value[:at], value[at], *value[at:])
        return random.choice(
            (shorter, longer, value[::-1], value * (50 if len(value) < 200 else 1), changed, changed, changed)
        )
    if isinstance(value, int):
        return random.choice((*INTERESTING, value + 1, value ^ 1 << random.randrange(63)))
    if isinstance(value, float):
        return random.choice((0.0, -1.0, 1e308, 5e-324, float("nan"), float("inf"), value * 2))
    if isinstance(value, str):
        return random.choice((*_ODD_NAMES, value[:-1], value + "x"))
    if isinstance(value, bytes) and value:
        at = random.randrange(len(value))
        flipped = value[:at] + bytes([value[at] ^ 1 << random.randrange(8)]) + value[at + 1 :]
        return random.choice(
            (flipped, flipped, bytes(len(value)), random.randbytes(len(value)), value[:-1], value + b"x")
        )
    return value
