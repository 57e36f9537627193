"""One round of our own protocol in this process, as `SiteSession` and `CoordinatorSession` play it, timed by party."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.protocol import messages as m
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession, Opened
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import Arrived, Deadline, Effects, Send, VectorStore
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Outbox
from foedus_common.protocol.thresholds import Member, PeerRule, Roster, thresholds

CLIP = 1.0
COLLUDING = 1


class Stopwatch:
    """Seconds of every pass through `running()`, without those spent inside `paused()`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.laps: list[float] = []
        self._clock = clock
        self._paused = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        paused, start = self._paused, self._clock()
        yield
        self.laps.append(self._clock() - start - (self._paused - paused))

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = self._clock()
        yield
        self._paused += self._clock() - start


def undisturbed(watches: Sequence[Stopwatch]) -> float:
    """Seconds of a party whose every step went as fast as it did under the best of the watches."""
    return sum(map(min, zip(*(watch.laps for watch in watches), strict=True)))


class Memory:
    """A VectorStore in memory that stops its party's watch while it works."""

    def __init__(self, objects: dict[m.VectorRef, bytes], watch: Stopwatch) -> None:
        self.objects = objects
        self._watch = watch

    def store(self, words: np.ndarray) -> m.VectorRef:
        with self._watch.paused():
            ref = m.VectorRef(hashlib.sha256(words).digest(), words.nbytes)
            self.objects[ref] = words.tobytes()
            return ref

    def load(self, ref: m.VectorRef) -> np.ndarray:
        with self._watch.paused():
            return np.frombuffer(bytearray(self.objects[ref]), dtype=np.uint64)


class Cohort:
    """The sites of one attempt, each with its update of shape (d,); the last `drops` send no vector."""

    def __init__(
        self,
        updates: Sequence[np.ndarray],
        drops: int = 0,
        bits: int = 21,
        vectors_of: Callable[[Stopwatch], VectorStore] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """vectors_of: where a party with this watch keeps vectors; by default a memory that all share."""
        objects: dict[m.VectorRef, bytes] = {}
        self._vectors_of = vectors_of or (lambda watch: Memory(objects, watch))
        self.names = tuple(f"{index:03}".rjust(40, "x") for index in range(len(updates)))  # the longest there are
        identities = {site: Ed25519PrivateKey.generate() for site in self.names}
        keys = {site: key.public_key().public_bytes_raw() for site, key in identities.items()}
        self.roster = Roster(1, bytes(32), {site: Member(key, f"org of {site}") for site, key in keys.items()})
        self.size = RoundSize(3, max(16, len(updates)))
        self.layout = FieldLayout(bits, max(16, len(updates)), ((len(updates[0]), CLIP),))
        self.config = self._config()
        self.silent = frozenset(self.names[len(updates) - drops :])
        self.watches = {site: Stopwatch(clock) for site in self.names}
        self._sessions, self._states = {}, {}
        for site, update in zip(self.names, updates, strict=True):
            vectors = self._vectors_of(self.watches[site])
            with self.watches[site].running():
                words = self.layout.encode(update, os.urandom)
            outbox = Outbox(self.config.terms, vectors.store(words), charged=True)
            session = SiteSession(
                site, identities[site].sign, self.roster, PeerRule(), self.size, outbox, vectors, os.urandom
            )
            self._sessions[site], self._states[site] = session, session.begin()

    def _config(self) -> m.RoundConfig:
        terms = m.RoundTerms(
            run_id=2**63 - 1,
            round=1,
            phase=0,
            plan_digest=bytes(32),
            base_model_hash=bytes(32),
            adapter_hash=bytes(32),
            trainer_version="benchmark",
            layout=self.layout,
            noise=m.Noise(),
            min_sites=3,
            colluding=COLLUDING,
        )
        limits = thresholds(len(self.names), COLLUDING)
        return m.RoundConfig(
            m.PROTOCOL_VERSION, terms, 0, 1, self.roster.digest, self.names, limits.threshold, limits.minimum
        )

    def coordinator(self, watch: Stopwatch) -> CoordinatorSession:
        return CoordinatorSession(self.config, self.roster, self._vectors_of(watch))

    def answers(self, sequence: int, effects: Effects) -> list[Arrived | Deadline]:
        """What the sites answer to the requests among the effects, and the end of the stage."""
        events: list[Arrived | Deadline] = []
        for request in (effect for effect in effects if isinstance(effect, Send)):
            site = request.destination
            if sequence < 2 or site not in self.silent:
                with self.watches[site].running():
                    self._states[site], answers = self._sessions[site].step(self._states[site], request.envelope)
                events += [Arrived(site, answer.envelope) for answer in answers if isinstance(answer, Send)]
        return [*events, Deadline(sequence)]


@dataclass(frozen=True)
class Played:
    """sites: what the steps of each site took that sent its vector. sent: the first site's envelopes."""

    sites: tuple[Stopwatch, ...]
    coordinator: Stopwatch
    sent: tuple[bytes, ...]


def play(updates: np.ndarray, drops: int = 0, clock: Callable[[], float] = time.perf_counter) -> Played:
    """A round of (sites, d) updates in this process. What opens is compared with their sum."""
    cohort, watch, sent = Cohort(updates, drops, clock=clock), Stopwatch(clock), []
    session = cohort.coordinator(watch)
    with watch.running():
        state, effects = session.begin()
    while isinstance(state, Awaiting):
        events = cohort.answers(state.sequence, effects)
        sent += [event.envelope for event in events[:1] if isinstance(event, Arrived)]
        for event in events:
            with watch.running():
                state, more = session.step(state, event)
            effects = more or effects
    assert isinstance(state, Opened), state
    expected = updates[: len(updates) - drops].sum(axis=0)
    np.testing.assert_allclose(state.total, expected, atol=len(updates) * CLIP / cohort.layout.half_range)
    survivors = (site for site in cohort.names if site not in cohort.silent)
    return Played(tuple(cohort.watches[site] for site in survivors), watch, tuple(sent))
