"""The messages of a round, one class each, in the order they travel (docs/protocol.md section 2).

Types forbid what the protocol forbids: an unmask share is a self-mask share *or* a pair-key share, a site's answer has
no field for anything but its answer. Knows no bytes: `wire` turns a message into bytes and back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from foedus_common.errors import LocalError
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.thresholds import Thresholds

PROTOCOL_VERSION = 2


class Stage(StrEnum):
    """The stages in which sites answer with something of their own, as they are called in docs/protocol.md."""

    COMMIT = "D1"
    REVEAL = "D2"
    ADVERTISE = "A1"
    SHARE_KEYS = "A2"
    MASKED_INPUT = "A3"
    CONSISTENCY = "A4"
    UNMASK = "A5"


class AttemptId(NamedTuple):
    """One try at one round: its keys and masks are used in no other."""

    run_id: int
    round: int
    attempt: int


class VectorRef(NamedTuple):
    """A vector or another object in the store: SHA-256 of its bytes (32 bytes) and how many there are."""

    digest: bytes
    size: int


# --- Before the first round and after the last ---


@dataclass(frozen=True)
class Propose:
    """A signed plan to decide on, and the root-signed roster that names its signer."""

    plan: bytes
    plan_signature: bytes
    roster: VectorRef


class End(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class RunEnded:
    """No round of this plan will follow."""

    end: End


# --- Beside the rounds: what each side shows of its journal ---


@dataclass(frozen=True)
class JournalHead:
    """The head (32 bytes) of the sender's journal after entry `number`, signed by the sender."""

    number: int
    head: bytes
    signature: bytes


@dataclass(frozen=True)
class SeenHead:
    """A head of the receiver's journal that it signed itself, and the sender after it."""

    number: int
    head: bytes
    signature: bytes
    countersignature: bytes


MAX_SEEN = 4
"""More than one, so that a journal which went back and grew again meets the heads that it lost, also when an answer of
its owner's was lost meanwhile."""


@dataclass(frozen=True)
class JournalHeads:
    """From either side (`foedus_common.checkpoints`): its own head, and what it has seen of the receiver's journal."""

    own: JournalHead
    seen: tuple[SeenHead, ...]


# --- I and T: before there are keys ---


@dataclass(frozen=True)
class Invite:
    """The signed plan, the base model it is about (manifest hash) and the adapter to start from."""

    plan: bytes
    plan_signature: bytes
    base_model_hash: bytes
    adapter: VectorRef


@dataclass(frozen=True)
class Declined:
    """A site will not, or no longer, take part. Bare: the reasons stay in the site's own log."""


@dataclass(frozen=True)
class Ready:
    """The update is in the outbox. Bare: no number about the data."""


# --- D1 and D2: seeds for the cohorts of a round that is too large for one ---


@dataclass(frozen=True)
class Draw:
    """More sites are ready than share one sum: commit to a seed. Bare: the header says for which attempt."""


@dataclass(frozen=True)
class Commitment:
    """To this site's seed for this attempt (`draw.seed_commitment`, 32 bytes)."""

    commitment: bytes


@dataclass(frozen=True)
class Commitments:
    """Everybody's, by site name: who is in the draw."""

    commitments: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        _require_ascending([site for site, _ in self.commitments], "the sites of the draw")


@dataclass(frozen=True)
class Seed:
    """What the site committed to, 32 bytes."""

    seed: bytes


# --- A0 RoundConfig ---


@dataclass(frozen=True)
class Noise:
    """The plan's privacy: unit is "none", "record" or "site"; clip and multiplier are 0 without."""

    unit: str = "none"
    clip: float = 0.0
    multiplier: float = 0.0

    def __post_init__(self) -> None:
        if self.unit not in ("none", "record", "site"):
            raise LocalError(f'the unit of privacy is "none", "record" or "site", not "{self.unit}"')
        if not all(math.isfinite(value) and value >= 0 for value in (self.clip, self.multiplier)):
            raise LocalError("clip and noise multiplier are finite and not negative")


@dataclass(frozen=True)
class RoundTerms:
    """What a vector in a site's outbox was made under, and what the coordinator must repeat exactly at A0.

    Hashes are 32 bytes; `phase` is the index in the plan; `colluding` is c, organisations.
    """

    run_id: int
    round: int
    phase: int
    plan_digest: bytes
    base_model_hash: bytes
    adapter_hash: bytes
    trainer_version: str
    layout: FieldLayout
    noise: Noise
    min_sites: int
    colluding: int

    @property
    def max_sites(self) -> int:
        return self.layout.max_sites


@dataclass(frozen=True)
class RoundConfig:
    """Everything both sides agree on for one attempt; its bytes enter every key of the attempt."""

    protocol_version: int
    terms: RoundTerms
    attempt: int
    roster_epoch: int
    roster_digest: bytes
    cohort: tuple[str, ...]
    threshold: int
    minimum: int

    def __post_init__(self) -> None:
        _require_ascending(self.cohort, "the cohort")

    @property
    def attempt_id(self) -> AttemptId:
        return AttemptId(self.terms.run_id, self.terms.round, self.attempt)

    @property
    def limits(self) -> Thresholds:
        return Thresholds(self.threshold, self.minimum)

    def x(self, site: str) -> int:
        """Where the site's Shamir shares are evaluated."""
        return self.cohort.index(site) + 1


@dataclass(frozen=True)
class DrawnConfig:
    """A0 where cohorts are drawn: the configuration, and everybody's seed, from which its cohort follows."""

    config: RoundConfig
    seeds: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        _require_ascending([site for site, _ in self.seeds], "the sites of the draw")


# --- A1 Advertise ---


@dataclass(frozen=True)
class Advertise:
    """Two fresh X25519 keys (for shares, for masks) and the commitment to the self-mask seed, 32 bytes each."""

    share_key: bytes
    mask_key: bytes
    commitment: bytes


# --- A2 ShareKeys ---


@dataclass(frozen=True)
class PeerKeys:
    """U1: the signed A1 envelopes, exactly as the sites sent them, by site name."""

    envelopes: tuple[bytes, ...]


@dataclass(frozen=True)
class ShareKeys:
    """One sealed pair of shares for every other site of U1, by site name."""

    sealed: tuple[bytes, ...]


# --- A3 MaskedInput ---


@dataclass(frozen=True)
class PeerShares:
    """U2: what the other sites sealed for the receiver, by site name."""

    sealed: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        _require_ascending([site for site, _ in self.sealed], "the senders of shares")


@dataclass(frozen=True)
class MaskedInput:
    """The masked vector, by reference: the words themselves travel as an object."""

    vector: VectorRef


# --- A4 Consistency ---


@dataclass(frozen=True)
class Survivors:
    """U3: whose masked inputs the sum holds."""

    sites: tuple[str, ...]

    def __post_init__(self) -> None:
        _require_ascending(self.sites, "the survivors")


@dataclass(frozen=True)
class Consistency:
    """The receiver's only signature over U3."""

    signature: bytes


# --- A5 Unmask ---


@dataclass(frozen=True)
class Agreement:
    """Signatures of different sites over the same U3."""

    signatures: tuple[tuple[str, bytes], ...]

    def __post_init__(self) -> None:
        _require_ascending([site for site, _ in self.signatures], "the signers")


@dataclass(frozen=True, repr=False)
class SelfMaskShare:
    """A share (33 bytes) of the self-mask seed of a site that survived."""

    value: bytes


@dataclass(frozen=True, repr=False)
class PairKeyShare:
    """A share (33 bytes) of the mask key of a site that dropped out."""

    value: bytes


UnmaskShare = SelfMaskShare | PairKeyShare


@dataclass(frozen=True, repr=False)
class Unmask:
    """One share for every site of U2, by site name: of one kind or the other."""

    shares: tuple[UnmaskShare, ...]


Opening = RoundConfig | DrawnConfig
"""What A0 says; its bytes enter every key of the attempt."""

BetweenRounds = Propose | RunEnded | JournalHeads | Invite
ToSite = BetweenRounds | Draw | Commitments | Opening | PeerKeys | PeerShares | Survivors | Agreement
FromSite = (
    Ready | Declined | JournalHeads | Commitment | Seed | Advertise | ShareKeys | MaskedInput | Consistency | Unmask
)
Message = ToSite | FromSite


def _require_ascending(names: Sequence[str], what: str) -> None:
    """Sets of sites have one spelling: strictly ascending names."""
    if any(left >= right for left, right in pairwise(names)):
        raise LocalError(f"{what} are not listed once each in ascending order")
