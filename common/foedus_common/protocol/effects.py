"""What a protocol step asks its caller to do, in the order in which it must be done.

A session computes and never acts; the round code acts and never computes. "Stored before sent" is then a property of
a list: every `Persist` that a `Send` depends on stands before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from foedus_common.errors import DropReason, FoedusError
from foedus_common.protocol.masks import Words
from foedus_common.protocol.messages import AttemptId, VectorRef


class VectorReader(Protocol):
    """Where vectors are found by content. Injected."""

    def load(self, ref: VectorRef) -> Words:
        """A new, writable array of the object's little-endian uint64 words, verified against the digest.

        Raises FoedusError when the object is not to be had.
        """


class VectorStore(VectorReader, Protocol):
    """Where vectors live, by content."""

    def store(self, words: Words) -> VectorRef:
        """Durable when it returns."""


# --- What a site keeps ---


@dataclass(frozen=True)
class AttemptSeen:
    """This attempt's A0 was accepted here; it is never accepted again."""

    attempt: AttemptId


@dataclass(frozen=True)
class VectorMasked:
    """The outbox vector was masked, in this attempt, into `masked`; it is never masked again."""

    attempt: AttemptId
    vector: VectorRef
    masked: VectorRef


@dataclass(frozen=True)
class Answered:
    """The answer to a request, kept so that the same request gets the same bytes. `request` is its SHA-256."""

    attempt: AttemptId
    sequence: int
    request: bytes
    answer: bytes


# --- What the coordinator keeps, and replays after a restart ---


@dataclass(frozen=True)
class Arrived:
    """An envelope, and the site that the link says it came from."""

    site: str
    envelope: bytes


@dataclass(frozen=True)
class Deadline:
    """A stage's time is over. `sequence` is that of the requests whose answers were awaited."""

    sequence: int


Record = AttemptSeen | VectorMasked | Answered | Arrived | Deadline


# --- Effects ---


@dataclass(frozen=True)
class Persist:
    """Write these records in one transaction, and sync it to disk, before the next effect."""

    records: tuple[Record, ...]


@dataclass(frozen=True)
class Send:
    destination: str
    envelope: bytes


@dataclass(frozen=True)
class Erase:
    """Forget every earlier state of the session, for it holds the round's secrets, and delete these objects."""

    objects: tuple[VectorRef, ...] = ()


@dataclass(frozen=True)
class Abort:
    """The attempt is over here. The sentence is for the own log; nothing of it is for the other side."""

    error: FoedusError


@dataclass(frozen=True)
class Dropped:
    """The coordinator goes on without a site."""

    site: str
    reason: DropReason
    sentence: str


Effect = Persist | Send | Erase | Abort | Dropped
Effects = tuple[Effect, ...]
