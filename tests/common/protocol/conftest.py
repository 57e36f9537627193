"""A whole federation in memory: real sessions, real keys, seeded randomness, and a hand on every message."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.errors import LocalError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession, CoordinatorState
from foedus_common.protocol.effects import Arrived, Deadline, Effects, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_session import Outbox, SiteSession, SiteState
from foedus_common.protocol.thresholds import Member, PeerRule, Roster, thresholds


class MemoryStore:
    """A VectorStore of dictionary entries."""

    def __init__(self) -> None:
        self.objects: dict[m.VectorRef, bytes] = {}

    def load(self, ref: m.VectorRef) -> np.ndarray:
        try:
            return np.frombuffer(bytearray(self.objects[ref]), dtype=np.uint64)
        except KeyError:
            raise LocalError("no such object") from None

    def store(self, words: np.ndarray) -> m.VectorRef:
        data = words.tobytes()
        ref = m.VectorRef(hashlib.sha256(data).digest(), len(data))
        self.objects[ref] = data
        return ref


@dataclass
class Federation:
    """n sites with one vector each. `step` and `ask` let a test play the coordinator; `run` plays an honest one."""

    sites: int
    colluding: int = 1
    seed: int = 0
    layout: FieldLayout | None = None
    organisations: Mapping[str, str] = field(default_factory=dict)
    rule: PeerRule = field(default_factory=PeerRule)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed).randbytes
        self.names = tuple(f"site-{index:03}" for index in range(self.sites))
        self.keys = {site: Ed25519PrivateKey.from_private_bytes(self.random(32)) for site in self.names}
        self.roster = Roster(
            epoch=7,
            digest=self.random(32),
            members={
                site: Member(key.public_key().public_bytes_raw(), self.organisations.get(site, f"org of {site}"))
                for site, key in self.keys.items()
            },
        )
        self.layout = self.layout or FieldLayout(21, 16, ((7, 1.0), (4, 0.25)))
        limits = thresholds(self.sites, self.colluding)
        self.terms = m.RoundTerms(
            run_id=11,
            round=2,
            phase=0,
            plan_digest=self.random(32),
            base_model_hash=self.random(32),
            adapter_hash=self.random(32),
            trainer_version="trainer 1",
            layout=self.layout,
            noise=m.Noise("record", 1.0, 0.8),
            min_sites=3,
            colluding=self.colluding,
        )
        self.config = m.RoundConfig(
            protocol_version=1,
            terms=self.terms,
            attempt=0,
            roster_epoch=7,
            roster_digest=self.roster.digest,
            cohort=self.names,
            threshold=limits.threshold,
            minimum=limits.minimum,
        )
        self.vectors = MemoryStore()
        self.integers = {}
        self.sessions: dict[str, SiteSession] = {}
        rng = np.random.default_rng(self.seed)
        low_high = self.layout.half_range
        for site in self.names:
            self.integers[site] = rng.integers(-low_high, low_high + 1, self.layout.dimension)
            ref = self.vectors.store(self.layout.pack(self.integers[site]))
            self.sessions[site] = SiteSession(
                site=site,
                sign=self.keys[site].sign,
                roster=self.roster,
                rule=self.rule,
                outbox=Outbox(self.terms, ref, charged=True),
                vectors=self.vectors,
                random=self.random,
            )
        self.coordinator = CoordinatorSession(self.config, self.roster, self.vectors)
        self.states: dict[str, SiteState] = {site: session.begin() for site, session in self.sessions.items()}
        self.effects: dict[str, list[Effects]] = {site: [] for site in self.names}

    @property
    def ctx(self) -> bytes:
        return wire.round_context(wire.config_bytes(self.config))

    def plain_sum(self, sites: Iterable[str]) -> np.ndarray:
        return sum(self.integers[site] for site in sites)

    def alter_outbox(self, site: str, **changes: object) -> None:
        session = self.sessions[site]
        self.sessions[site] = replace(session, outbox=replace(session.outbox, **changes))

    def request(self, site: str, sequence: int, message: m.ToSite, **header: object) -> bytes:
        binding = self.ctx if sequence else self.terms.plan_digest
        base = wire.Header(*self.config.attempt_id, binding, wire.COORDINATOR, site, sequence)
        return wire.build_envelope(replace(base, **header), message)

    def step(self, site: str, request: bytes) -> Effects:
        """One request to one site; its state moves on."""
        self.states[site], effects = self.sessions[site].step(self.states[site], request)
        self.effects[site].append(effects)
        return effects

    def ask(self, site: str, sequence: int, message: m.ToSite, **header: object) -> Effects:
        return self.step(site, self.request(site, sequence, message, **header))

    def run(
        self,
        silent_from: Mapping[str, int] | None = None,
        tamper: Callable[[str, int, bytes], bytes] = lambda site, sequence, answer: answer,
    ) -> CoordinatorState:
        """An honest coordinator and its sites; a site in `silent_from` answers no request of that sequence or later."""
        silent_from = silent_from or {}
        state, effects = self.coordinator.begin()
        while isinstance(state, Awaiting):
            sequence = state.sequence
            requests = [effect for effect in effects if isinstance(effect, Send)]
            effects = ()
            for request in requests:
                if silent_from.get(request.destination, 99) <= sequence:
                    continue
                for answer in self.step(request.destination, request.envelope):
                    if isinstance(answer, Send):
                        arrived = Arrived(request.destination, tamper(request.destination, sequence, answer.envelope))
                        state, more = self.coordinator.step(state, arrived)
                        effects += more
            if isinstance(state, Awaiting) and state.sequence == sequence:
                state, more = self.coordinator.step(state, Deadline(sequence))
                effects += more
        return state


@pytest.fixture
def federation() -> type[Federation]:
    """The class, so that a test says how many sites it wants."""
    return Federation
