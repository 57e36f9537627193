"""Whose mistake it was: ours, the peer's, or nobody's because site policy says no.

Every error here carries one sentence that a person can act on; the programs print it and nothing else.
None of the texts may hold a secret or a value read from a site's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Reason(StrEnum):
    """Why a protocol step was refused (docs/protocol.md section 2). The values travel and are pinned by tests."""

    BAD_MESSAGE = "BAD_MESSAGE"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    BAD_SHARE = "BAD_SHARE"
    BAD_SUM = "BAD_SUM"
    BUDGET = "BUDGET"
    ALREADY_MASKED = "ALREADY_MASKED"
    COHORT_LACKS_PEERS = "COHORT_LACKS_PEERS"
    COHORT_NOT_DRAWN = "COHORT_NOT_DRAWN"
    COHORT_SIZE = "COHORT_SIZE"
    CONFIG_MISMATCH = "CONFIG_MISMATCH"
    DRAWS_EXHAUSTED = "DRAWS_EXHAUSTED"
    DUPLICATE_KEY = "DUPLICATE_KEY"
    FIELD_OVERFLOW = "FIELD_OVERFLOW"
    KEY_ALTERED = "KEY_ALTERED"
    QUOTA = "QUOTA"
    ROSTER_STALE = "ROSTER_STALE"
    ROUND_REUSED = "ROUND_REUSED"
    SECRETS_LOST = "SECRETS_LOST"
    SEED_ALTERED = "SEED_ALTERED"
    SEQUENCE_REUSED = "SEQUENCE_REUSED"
    SURVIVORS_INVALID = "SURVIVORS_INVALID"
    THRESHOLD_TOO_LOW = "THRESHOLD_TOO_LOW"
    TOO_FEW_SITES = "TOO_FEW_SITES"
    UNKNOWN_SITE = "UNKNOWN_SITE"
    VECTOR_REUSED = "VECTOR_REUSED"
    WEAK_KEY = "WEAK_KEY"
    WRONG_STAGE = "WRONG_STAGE"


class DropReason(StrEnum):
    """Why a site is not in a round any more, as the coordinator saw it."""

    DECLINED = "declined"
    DEADLINE = "deadline"
    PROTOCOL = "protocol"


class FoedusError(Exception):
    """Base of every error that has a sentence for a person. exit_code: of a program that ends with it."""

    exit_code = 2


class LocalError(FoedusError):
    """What was asked of this machine cannot be: the input, the configuration or the state is wrong."""


class RemoteError(FoedusError):
    """The other party broke the protocol.

    `reason` is the named check that failed; `suspects` are the sites it may have been, never a proof.
    """

    exit_code = 1

    def __init__(self, reason: Reason, message: str, suspects: Sequence[str] = ()) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.suspects = tuple(suspects)


class PolicyRefusal(FoedusError):
    """The site's own policy or ledger refuses a plan; one sentence per reason."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(" ".join(reasons))
        self.reasons = tuple(reasons)
