"""What a site holds during one attempt, stage by stage: the page that says which secret lives how long.

Plain frozen values; `site_session` moves from one to the next. Secrets are kept out of every repr.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from foedus_common.errors import FoedusError
from foedus_common.protocol import messages as m
from foedus_common.protocol import primitives
from foedus_common.protocol.effects import Answered, AttemptSeen, Erase, VectorMasked
from foedus_common.protocol.primitives import KeyPair

# --- What is durable at the site, as plain values ---


@dataclass(frozen=True)
class Outbox:
    """The vector that waits to be masked, and everything durable that decides whether it may be.

    charged: the ledger holds a charge that covers one release of this vector.
    masked_in: the attempt in which it was masked; None if never.
    attempts_seen: every attempt whose A0 was ever accepted here.
    """

    terms: m.RoundTerms
    vector: m.VectorRef
    charged: bool
    masked_in: m.AttemptId | None = None
    attempts_seen: frozenset[m.AttemptId] = frozenset()


# --- The stages of a session, each with what it holds ---


@dataclass(frozen=True)
class DealtShares:
    """What one dealer gave this site: a share of its self-mask seed, a share of its mask key. At A5 one may leave."""

    self_mask: m.SelfMaskShare
    pair_key: m.PairKeyShare


@dataclass(frozen=True)
class Waiting:
    """Nothing has been agreed yet."""


@dataclass(frozen=True)
class Committed:
    """The commitment to the own seed is out (D1)."""

    attempt: m.AttemptId
    seed: bytes = field(repr=False)


@dataclass(frozen=True)
class Revealed:
    """The own seed is out, for the draw of these commitments and no other (D2)."""

    attempt: m.AttemptId
    commitments: Mapping[str, bytes]


@dataclass(frozen=True)
class Advertised:
    """Own keys are out (A1), as the answer to the request of this sequence."""

    config: m.RoundConfig
    ctx: bytes
    sequence: int
    share_keys: KeyPair
    mask_keys: KeyPair
    self_mask_seed: bytes = field(repr=False)

    @property
    def advertisement(self) -> m.Advertise:
        return m.Advertise(self.share_keys.public, self.mask_keys.public, primitives.commitment(self.self_mask_seed))


@dataclass(frozen=True)
class Shared:
    """Own secrets are shared (A2). Keys are by peer; of the own secrets only what A3 needs is left."""

    config: m.RoundConfig
    ctx: bytes
    u1: bytes
    self_mask_key: bytes = field(repr=False)
    pair_mask_keys: Mapping[str, bytes] = field(repr=False)
    incoming_share_keys: Mapping[str, bytes] = field(repr=False)
    own_shares: DealtShares = field(repr=False)


@dataclass(frozen=True)
class Masked:
    """The masked vector is out (A3). `dealt` has the shares of every site of U2."""

    config: m.RoundConfig
    ctx: bytes
    u1: bytes
    masked: m.VectorRef
    dealt: Mapping[str, DealtShares] = field(repr=False)


@dataclass(frozen=True)
class Agreed:
    """One survivor set is signed (A4)."""

    config: m.RoundConfig
    ctx: bytes
    u1: bytes
    masked: m.VectorRef
    dealt: Mapping[str, DealtShares] = field(repr=False)
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Finished:
    """Everything was answered (A5). No secret is left."""


@dataclass(frozen=True)
class Lost:
    """The site restarted: the round's secrets are gone, stored answers are not."""


@dataclass(frozen=True)
class Failed:
    """A check failed. No secret is left and nothing is answered any more."""

    error: FoedusError


SiteStage = Waiting | Committed | Revealed | Advertised | Shared | Masked | Agreed | Finished | Lost | Failed


@dataclass(frozen=True)
class Step:
    """What a transition gives: the next stage, the answer, what to keep before it is sent, what to erase after."""

    stage: SiteStage
    answer: m.FromSite
    records: tuple[AttemptSeen | VectorMasked, ...] = ()
    keep_answer: bool = False
    erase: Erase | None = None


@dataclass(frozen=True)
class SiteState:
    """Where a session is, and its last answer, which the same request gets again."""

    stage: SiteStage
    answered: Answered | None = None
