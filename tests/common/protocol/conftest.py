"""A whole federation in memory: real sessions, real keys, seeded randomness, and a hand on every message."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from foedus_common.errors import LocalError, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession, CoordinatorState
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import Arrived, Deadline, Effects, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Outbox, SiteState
from foedus_common.protocol.thresholds import Member, PeerRule, Roster, cohort_thresholds, thresholds


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
        try:
            limits = cohort_thresholds(self.names, self.colluding, 0, self.roster)
        except RemoteError:  # the sites are to say so
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
            protocol_version=m.PROTOCOL_VERSION,
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
                rule=PeerRule(),
                size=RoundSize(3, self.layout.max_sites),
                outbox=Outbox(self.terms, ref, charged=True),
                vectors=self.vectors,
                random=self.random,
            )
        self.states: dict[str, SiteState] = {site: session.begin() for site, session in self.sessions.items()}
        self.effects: dict[str, list[Effects]] = {site: [] for site in self.names}
        self.restart_coordinator(self.config)

    @property
    def ctx(self) -> bytes:
        return wire.round_context(wire.body_bytes(self.coordinator.opening))

    def plain_sum(self, sites: Iterable[str]) -> np.ndarray:
        """What must open, exactly: the integers of these sites, summed, in units of each segment's step."""
        scales = np.concatenate([np.full(length, scale) for length, scale in self.layout.segments])
        return sum(self.integers[site] for site in sites) * (scales / self.layout.half_range)

    def alter_session(self, site: str, **changes: object) -> None:
        self.sessions[site] = replace(self.sessions[site], **changes)

    def alter_outbox(self, site: str, **changes: object) -> None:
        self.alter_session(site, outbox=replace(self.sessions[site].outbox, **changes))

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
        until: int = 99,
    ) -> CoordinatorState:
        """Play an honest coordinator and its sites, on from where the last call stopped.

        Stops before the requests of sequence `until` are delivered. A site in `silent_from` answers no request of
        that sequence or later. `tamper` may change an answer on its way.
        """
        while isinstance(self.state, Awaiting) and self.state.sequence != until:
            sequence = self.state.sequence
            for site, request in self.requests.items():
                if (silent_from or {}).get(site, 99) > sequence:
                    for answer in [e for e in self.step(site, request) if isinstance(e, Send)]:
                        self.deliver(Arrived(site, tamper(site, sequence, answer.envelope)))
            self.deliver(Deadline(sequence))
        return self.state

    def deliver(self, event: Arrived | Deadline) -> None:
        """One event to the honest coordinator; what it asks next is kept in `requests` and `history`."""
        self.state, effects = self.coordinator.step(self.state, event)
        self.coordinator_effects += [effects] if effects else []
        self._note_requests(effects)

    def _note_requests(self, effects: Effects) -> None:
        if requests := {e.destination: e.envelope for e in effects if isinstance(e, Send)}:
            self.requests = requests
            self.history.append(requests)

    def restart_coordinator(self, config: m.RoundConfig) -> None:
        """From A0, with this config."""
        self.config = config
        self.coordinator = CoordinatorSession(config, self.roster, self.vectors)
        self.coordinator_effects: list[Effects] = []
        self.history: list[dict[str, bytes]] = []
        self.state: CoordinatorState
        self.state, effects = self.coordinator.begin()
        self._note_requests(effects)

    def reach(self, sequence: int) -> dict[str, m.ToSite]:
        """Play honestly up to this stage; what the honest coordinator would ask each site next."""
        self.run(until=sequence)
        return {site: wire.parse_envelope(request).message for site, request in self.requests.items()}


@pytest.fixture(scope="session")
def federation() -> type[Federation]:
    """The class, so that a test says how many sites it wants."""
    return Federation


@st.composite
def _mutations(draw: st.DrawFn, data: bytes) -> bytes:
    """A few bytes flipped, cut out, put in, or the end cut off."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "truncate"])):
            case "flip" if data:
                data = data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
            case "cut":
                data = data[:at] + data[at + draw(st.integers(1, 40)) :]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
            case "truncate":
                data = data[:at]
    return data


@pytest.fixture(scope="session")
def mutations() -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return _mutations
