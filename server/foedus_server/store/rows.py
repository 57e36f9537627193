"""The rows of the coordinator's database as frozen values. Times are Unix seconds. Knows no SQL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from foedus_common.objects import ObjectRef

SiteState = Literal["invited", "waiting", "approved", "revoked"]
RunState = Literal["submitted", "inviting", "running", "stopping", "stopped", "finished", "failed"]
AttemptState = Literal["open", "committed", "aborted"]


@dataclass(frozen=True)
class Site:
    """A member or one that may become one. Times are Unix seconds.

    public_key: the identity key that was approved; waiting_key: one that asks to be (its first, or after a rotation).
    certificate_request: PKCS #10 DER that belongs to public_key.
    """

    name: str
    org: str
    state: SiteState
    invited_at: float
    public_key: bytes | None = None
    certificate_request: bytes | None = None
    waiting_key: bytes | None = None
    waiting_request: bytes | None = None
    approved_at: float | None = None
    revoked_at: float | None = None


@dataclass(frozen=True)
class TokenUse:
    """What became of an enrolment token; its secret is known here only by its hash.

    used_at, public_key, certificate_request: when and by which keys it was used, once and for all.
    voided_at: when a newer token for the same site replaced it.
    """

    secret_hash: bytes
    name: str
    org: str
    expires_at: float
    voided_at: float | None = None
    used_at: float | None = None
    public_key: bytes | None = None
    certificate_request: bytes | None = None


@dataclass(frozen=True)
class Certificate:
    """A client certificate that the link accepts until `not_after` (Unix seconds)."""

    sha256: bytes
    site: str
    der: bytes
    not_after: float


@dataclass(frozen=True)
class Model:
    name: str
    manifest_sha256: str
    path: str
    added_at: float


@dataclass(frozen=True)
class Run:
    """A run. plan_toml: what the operator wrote; signed_plan: bytes of the SignedPlan once it is agreed; spec: JSON of
    its AdapterSpec; rounds_done: committed rounds, which is the index of the next one."""

    run_id: int
    name: str
    state: RunState
    plan_toml: str
    rounds: int
    submitted_at: float
    updated_at: float
    rounds_done: int = 0
    signed_plan: bytes | None = None
    plan_digest: bytes | None = None
    spec: bytes | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round (both count from 0). seconds: by stage; bytes_up and bytes_down: over all sites.

    adapter, optimizer: what the round left behind, set when it is committed.
    """

    run_id: int
    round: int
    attempt: int
    state: AttemptState
    started_at: float
    ended_at: float | None = None
    cohort: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0
    adapter: ObjectRef | None = None
    optimizer: ObjectRef | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (0 to 1) over `rows` held-out rows of the adapter after `round` rounds; `data` names the file."""

    run_id: int
    round: int
    data: str
    rows: int
    accuracy: float
    at: float
