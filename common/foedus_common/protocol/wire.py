"""Messages as bytes: one envelope, one fixed schema per message, one strict parser.

Bytes are built once and signed as built; the parser keeps the received bytes, so nothing is serialised again to be
verified. Every size is checked before what it announces is read. Whatever the bytes, `parse_envelope` returns an
Envelope or raises RemoteError(BAD_MESSAGE); every accepted envelope has exactly one spelling.

    envelope  = told || signature
    told      = suite || type || run_id || round || attempt || sequence || binding || source || destination || body
    signed    = L || enc("envelope", told)

Suite and type are one byte each; the type stands for the message and its stage. The fields of the header that have no
fixed size follow a length of one byte. The body ends where the signature begins: sites sign every envelope, and the
signature is its last 64 bytes. What the coordinator sends to a site carries no signature: the link authenticates it,
and a lie in it is caught where it matters, because ctx and u1 of what was shown enter every key and every signature of
the sites. The plan inside an Invite is signed on its own. `binding` is the plan digest up to A0 and ctx from A1 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foedus_common.canonical import digest, labelled
from foedus_common.protocol import messages as m
from foedus_common.protocol.draw import MAX_SITES
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.fields import (
    COUNT,
    INTEGER,
    REAL,
    Codec,
    bad,
    exactly,
    listed,
    pair,
    read_fields,
    record,
    sized,
    text,
    write_fields,
)
from foedus_common.protocol.primitives import (
    DIGEST_BYTES,
    KEY_BYTES,
    SIGNATURE_BYTES,
    SUITE,
    TAG_BYTES,
    Sign,
    verify_signature,
)
from foedus_common.protocol.shamir import SHARE_BYTES
from foedus_common.protocol.thresholds import MAX_COHORT

COORDINATOR = "@coordinator"
"""The coordinator's name in a header; no site can have it. On the wire it is empty."""

MAX_ENVELOPE_BYTES = 1 << 20
MAX_PLAN_BYTES = 256 * 1024
MAX_SEGMENTS = 8192
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES


def _read_share(data: bytes) -> m.UnmaskShare:
    if data[0] not in (1, 2):
        raise bad("an unmask share is of one kind or the other")
    return m.SelfMaskShare(data[1:]) if data[0] == 1 else m.PairKeyShare(data[1:])


def _write_share(share: m.UnmaskShare) -> bytes:
    return (b"\1" if isinstance(share, m.SelfMaskShare) else b"\2") + exactly(SHARE_BYTES).write(share.value)


# --- The schema ---

_KEY = exactly(KEY_BYTES)
_DIGEST = exactly(DIGEST_BYTES)
_SIGNATURE = exactly(SIGNATURE_BYTES)
_SEALED = exactly(SEALED_BYTES)
_SITE = text(r"[a-z0-9-]{1,40}")
_PARTY: Codec[str] = Codec(
    lambda name: b"" if name == COORDINATOR else _SITE.write(name),
    lambda data: _SITE.read(data) if data else COORDINATOR,
)
_LABEL = text(r"[ -~]{0,100}")
_SHARE: Codec[m.UnmaskShare] = Codec(_write_share, _read_share, size=1 + SHARE_BYTES)
_END: Codec[m.End] = Codec(lambda end: end.encode(), lambda data: m.End(text("|".join(m.End)).read(data)))
_VECTOR = record(m.VectorRef, digest=_DIGEST, size=INTEGER)
_HEAD = record(m.JournalHead, number=INTEGER, head=_DIGEST, signature=_SIGNATURE)
_SEEN = record(m.SeenHead, number=INTEGER, head=_DIGEST, signature=_SIGNATURE, countersignature=_SIGNATURE)
_NOISE = record(m.Noise, unit=_LABEL, clip=REAL, multiplier=REAL)
_LAYOUT = record(FieldLayout, bits=INTEGER, max_sites=INTEGER, segments=listed(pair(INTEGER, REAL), MAX_SEGMENTS))
_TERMS = record(
    m.RoundTerms,
    run_id=INTEGER,
    round=INTEGER,
    phase=INTEGER,
    plan_digest=_DIGEST,
    base_model_hash=_DIGEST,
    adapter_hash=_DIGEST,
    trainer_version=_LABEL,
    layout=_LAYOUT,
    noise=_NOISE,
    min_sites=INTEGER,
    colluding=INTEGER,
)
_BY_SITE = listed(pair(_SITE, _DIGEST), MAX_SITES)
_CONFIG = record(
    m.RoundConfig,
    protocol_version=INTEGER,
    terms=_TERMS,
    attempt=INTEGER,
    roster_epoch=INTEGER,
    roster_digest=_DIGEST,
    cohort=listed(_SITE, MAX_COHORT),
    threshold=INTEGER,
    minimum=INTEGER,
)


@dataclass(frozen=True)
class _Kind:
    """The byte that stands for a message class, and so for its stage, and its body's schema."""

    message: type[m.Message]
    code: int
    body: Codec[Any]


def _kind(message: type[m.Message], code: int, **schema: Codec[Any]) -> _Kind:
    return _Kind(message, code, record(message, **schema))


_KINDS = (
    _kind(m.Propose, 1, plan=sized(1, MAX_PLAN_BYTES), plan_signature=_SIGNATURE, roster=_VECTOR),
    _kind(m.RunEnded, 2, end=_END),
    _kind(m.JournalHeads, 3, own=_HEAD, seen=listed(_SEEN, m.MAX_SEEN)),
    _kind(
        m.Invite,
        4,
        plan=sized(1, MAX_PLAN_BYTES),
        plan_signature=_SIGNATURE,
        base_model_hash=_DIGEST,
        adapter=_VECTOR,
    ),
    _kind(m.Declined, 5),
    _kind(m.Ready, 6),
    _Kind(m.RoundConfig, 7, _CONFIG),
    _kind(m.Advertise, 8, share_key=_KEY, mask_key=_KEY, commitment=_DIGEST),
    _kind(m.PeerKeys, 9, envelopes=listed(sized(1, 2048), MAX_COHORT)),
    _kind(m.ShareKeys, 10, sealed=listed(_SEALED, MAX_COHORT)),
    _kind(m.PeerShares, 11, sealed=listed(pair(_SITE, _SEALED), MAX_COHORT)),
    _kind(m.MaskedInput, 12, vector=_VECTOR),
    _kind(m.Survivors, 13, sites=listed(_SITE, MAX_COHORT)),
    _kind(m.Consistency, 14, signature=_SIGNATURE),
    _kind(m.Agreement, 15, signatures=listed(pair(_SITE, _SIGNATURE), MAX_COHORT)),
    _kind(m.Unmask, 16, shares=listed(_SHARE, MAX_COHORT)),
    _kind(m.Draw, 17),
    _kind(m.Commitment, 18, commitment=_DIGEST),
    _kind(m.Commitments, 19, commitments=_BY_SITE),
    _kind(m.Seed, 20, seed=_DIGEST),
    _kind(m.DrawnConfig, 21, config=_CONFIG, seeds=_BY_SITE),
)
_BY_CLASS = {kind.message: kind for kind in _KINDS}
_BY_CODE = {kind.code: kind for kind in _KINDS}


# --- The envelope ---


@dataclass(frozen=True)
class Header:
    """Where a message belongs. `binding` is the plan digest up to A0, ctx from A1 on (32 bytes)."""

    run_id: int
    round: int
    attempt: int
    binding: bytes
    source: str
    destination: str
    sequence: int

    @property
    def attempt_id(self) -> m.AttemptId:
        return m.AttemptId(self.run_id, self.round, self.attempt)


_HEADER: Mapping[str, Codec[Any]] = {
    "run_id": INTEGER,
    "round": COUNT,
    "attempt": COUNT,
    "sequence": COUNT,
    "binding": _DIGEST,
    "source": _PARTY,
    "destination": _PARTY,
}


@dataclass(frozen=True)
class Envelope:
    """A parsed envelope. `signed` is what the signature covers, of the bytes received; it is not checked yet."""

    header: Header
    message: m.Message
    body: bytes
    signed: bytes
    signature: bytes

    def verify(self, public_key: bytes) -> None:
        """RemoteError(BAD_SIGNATURE) unless the source's identity key signed this envelope."""
        verify_signature(public_key, self.signature, self.signed, self.header.source)


def build_envelope(header: Header, message: m.Message, sign: Sign | None = None, *, body: bytes | None = None) -> bytes:
    """The bytes of an envelope: signed by a site's identity key, unsigned from the coordinator. body: the message's
    bytes, where they were written before."""
    kind = _BY_CLASS[type(message)]
    written = write_fields(_HEADER.values(), [getattr(header, name) for name in _HEADER], length=1)
    told = bytes((SUITE, kind.code)) + written + (kind.body.write(message) if body is None else body)
    return told + sign(_signed(told)) if sign else told


def parse_envelope(data: bytes) -> Envelope:
    """The one way in for bytes from the other side: an Envelope, or RemoteError(BAD_MESSAGE)."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise bad(f"a message has {len(data)} bytes where {MAX_ENVELOPE_BYTES} are allowed")
    if data[:1] != bytes((SUITE,)):
        raise bad("this is no envelope of the algorithms that are known here; install the same release on both sides")
    kind = _BY_CODE.get(int.from_bytes(data[1:2], "big"))
    if kind is None:
        raise bad("the message is of a type that is not known here")
    values, start = read_fields(_HEADER.values(), data, position=2, length=1)
    header = Header(**dict(zip(_HEADER, values, strict=True)))
    end = len(data) - (0 if header.source == COORDINATOR else SIGNATURE_BYTES)
    if end < start:
        raise bad("sites sign what they send")
    body = data[start:end]
    return Envelope(header, kind.body.read(body), body, _signed(data[:end]), data[end:])


def _signed(told: bytes) -> bytes:
    return labelled("envelope", told)


# --- Hashes and signatures over what was agreed ---


def terms_bytes(terms: m.RoundTerms) -> bytes:
    """The canonical bytes of what a vector was made under, for the outbox."""
    return _TERMS.write(terms)


def parse_terms(data: bytes) -> m.RoundTerms:
    return _TERMS.read(data)


def body_bytes(message: m.Message) -> bytes:
    """The canonical bytes of a message, without an envelope."""
    return _BY_CLASS[type(message)].body.write(message)


def round_context(opening: bytes) -> bytes:
    """ctx = H(enc("round", A0)), 32 bytes, of A0's canonical bytes as built or received."""
    return digest("round", opening)


def key_set_digest(advertisements: Mapping[str, m.Advertise]) -> bytes:
    """u1 = H("U1", sorted (site, cpk, spk, H(b))), 32 bytes."""
    return digest(
        "U1",
        [[site, keys.share_key, keys.mask_key, keys.commitment] for site, keys in sorted(advertisements.items())],
    )


def survivors_statement(ctx: bytes, u1: bytes, survivors: tuple[str, ...]) -> bytes:
    """What a site signs at A4, once per attempt."""
    return labelled("u3", ctx, u1, survivors)
