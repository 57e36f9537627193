"""Messages as bytes: one envelope, one fixed schema per message, one strict parser.

Bytes are built once and signed as built; the parser keeps the received bytes, so nothing is serialised again to be
verified. Every size is checked before what it announces is read. Whatever the bytes, `parse_envelope` returns an
Envelope or raises RemoteError(BAD_MESSAGE); every accepted envelope has exactly one spelling.

    envelope  = enc(signed, signature)
    signed    = L || enc("envelope", suite, type, run_id, round, stage, attempt, binding, source, destination,
                         sequence, body)

`binding` is the plan digest up to A0 and ctx from A1 on. Sites sign every envelope. What the coordinator sends to a
site carries no signature: the link authenticates it, and a lie in it is caught where it matters, because ctx and u1 of
what was shown enter every key and every signature of the sites. The plan inside an Invite is signed on its own.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from foedus_common.canonical import digest, enc, labelled
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol.encoding import FieldLayout
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
"""The coordinator's name in an envelope; no site can have it."""

MAX_ENVELOPE_BYTES = 1 << 20
MAX_PLAN_BYTES = 256 * 1024
MAX_SEGMENTS = 8192
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


# --- Codecs: how one value is written and, strictly, read ---


@dataclass(frozen=True)
class Codec(Generic[T]):
    """`read(write(value)) == value`, and `read` accepts no other bytes for it; it raises RemoteError(BAD_MESSAGE)."""

    write: Callable[[T], bytes]
    read: Callable[[bytes], T]


def _bad(what: str) -> RemoteError:
    return RemoteError(Reason.BAD_MESSAGE, what)


def _split(data: bytes, most: int) -> list[bytes]:
    """The inverse of `enc` for at most `most` parts."""
    parts: list[bytes] = []
    position = 0
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "big")
        if len(parts) == most or start > len(data) or position > len(data):
            raise _bad("a list is cut short or too long")
        parts.append(data[start:position])
    return parts


def _sized(low: int, high: int) -> Codec[bytes]:
    def checked(data: bytes) -> bytes:
        if not low <= len(data) <= high:
            raise _bad(f"a field has {len(data)} bytes where {low} to {high} are allowed")
        return data

    return Codec(checked, checked)


def _exactly(size: int) -> Codec[bytes]:
    return _sized(size, size)


def _text(pattern: str) -> Codec[str]:
    whole = re.compile(pattern, re.ASCII)

    def read(data: bytes) -> str:
        text = data.decode("ascii", errors="replace")
        if not whole.fullmatch(text):
            raise _bad("a name or text has characters that do not belong there")
        return text

    return Codec(lambda text: text.encode(), read)


def _read_integer(data: bytes) -> int:
    if len(data) != 8 or data[0] & 0x80:
        raise _bad("an integer has 8 bytes and is below 2^63, which is what a database holds")
    return int.from_bytes(data, "big")


def _read_real(data: bytes) -> float:
    if len(data) != 8:
        raise _bad("a number has 8 bytes")
    (value,) = struct.unpack(">d", data)
    if not math.isfinite(value):
        raise _bad("a number is not finite")
    return float(value)


def _listed(item: Codec[T], most: int) -> Codec[tuple[T, ...]]:
    return Codec(
        lambda values: enc(*map(item.write, values)),
        lambda data: tuple(map(item.read, _split(data, most))),
    )


def _pair(left: Codec[A], right: Codec[B]) -> Codec[tuple[A, B]]:
    def read(data: bytes) -> tuple[A, B]:
        parts = _split(data, 2)
        if len(parts) != 2:
            raise _bad("a pair has two parts")
        return left.read(parts[0]), right.read(parts[1])

    return Codec(lambda value: enc(left.write(value[0]), right.write(value[1])), read)


def _record(kind: Callable[..., T], **schema: Codec[Any]) -> Codec[T]:
    """A dataclass or named tuple by its fields, all of them, in the order given."""

    def read(data: bytes) -> T:
        parts = _split(data, len(schema))
        if len(parts) != len(schema):
            raise _bad(f"a record has {len(parts)} fields where {len(schema)} belong")
        values = [codec.read(part) for codec, part in zip(schema.values(), parts, strict=True)]
        try:
            return kind(*values)
        except LocalError as error:
            raise _bad(str(error)) from None

    return Codec(lambda value: enc(*(codec.write(getattr(value, name)) for name, codec in schema.items())), read)


def _read_share(data: bytes) -> m.UnmaskShare:
    if len(data) != 1 + SHARE_BYTES or data[0] not in (1, 2):
        raise _bad("an unmask share is of one kind or the other")
    return m.SelfMaskShare(data[1:]) if data[0] == 1 else m.PairKeyShare(data[1:])


def _write_share(share: m.UnmaskShare) -> bytes:
    return (b"\1" if isinstance(share, m.SelfMaskShare) else b"\2") + share.value


# --- The schema ---

_INTEGER: Codec[int] = Codec(lambda value: value.to_bytes(8, "big"), _read_integer)
_REAL: Codec[float] = Codec(lambda value: struct.pack(">d", value), _read_real)
_KEY = _exactly(KEY_BYTES)
_DIGEST = _exactly(DIGEST_BYTES)
_SIGNATURE = _exactly(SIGNATURE_BYTES)
_SEALED = _exactly(SEALED_BYTES)
_SITE = _text(r"[a-z0-9-]{1,40}")
_PARTY = _text(r"[a-z0-9-]{1,40}|" + re.escape(COORDINATOR))
_LABEL = _text(r"[ -~]{0,100}")
_SHARE: Codec[m.UnmaskShare] = Codec(_write_share, _read_share)
_END: Codec[m.End] = Codec(lambda end: end.encode(), lambda data: m.End(_text("|".join(m.End)).read(data)))
_VECTOR = _record(m.VectorRef, digest=_DIGEST, size=_INTEGER)
_HEAD = _record(m.JournalHead, number=_INTEGER, head=_DIGEST, signature=_SIGNATURE)
_SEEN = _record(m.SeenHead, number=_INTEGER, head=_DIGEST, signature=_SIGNATURE, countersignature=_SIGNATURE)
_NOISE = _record(m.Noise, unit=_LABEL, clip=_REAL, multiplier=_REAL)
_LAYOUT = _record(
    FieldLayout, bits=_INTEGER, max_sites=_INTEGER, segments=_listed(_pair(_INTEGER, _REAL), MAX_SEGMENTS)
)
_TERMS = _record(
    m.RoundTerms,
    run_id=_INTEGER,
    round=_INTEGER,
    phase=_INTEGER,
    plan_digest=_DIGEST,
    base_model_hash=_DIGEST,
    adapter_hash=_DIGEST,
    trainer_version=_LABEL,
    layout=_LAYOUT,
    noise=_NOISE,
    min_sites=_INTEGER,
    colluding=_INTEGER,
)
_CONFIG = _record(
    m.RoundConfig,
    protocol_version=_INTEGER,
    terms=_TERMS,
    attempt=_INTEGER,
    roster_epoch=_INTEGER,
    roster_digest=_DIGEST,
    cohort=_listed(_SITE, MAX_COHORT),
    threshold=_INTEGER,
    minimum=_INTEGER,
)


@dataclass(frozen=True)
class _Kind:
    """What the envelope says about a message class, and its body's schema."""

    message: type[m.Message]
    name: str
    stage: m.Stage
    body: Codec[Any]


def _kind(message: type[m.Message], name: str, stage: m.Stage, **schema: Codec[Any]) -> _Kind:
    return _Kind(message, name, stage, _record(message, **schema))


_KINDS = (
    _kind(
        m.Propose,
        "propose",
        m.Stage.PROPOSE,
        plan=_sized(1, MAX_PLAN_BYTES),
        plan_signature=_SIGNATURE,
        roster=_VECTOR,
    ),
    _kind(m.RunEnded, "run-ended", m.Stage.END, end=_END),
    _kind(m.JournalHeads, "journal-heads", m.Stage.JOURNAL, own=_HEAD, seen=_listed(_SEEN, m.MAX_SEEN)),
    _kind(
        m.Invite,
        "invite",
        m.Stage.INVITE,
        plan=_sized(1, MAX_PLAN_BYTES),
        plan_signature=_SIGNATURE,
        base_model_hash=_DIGEST,
        adapter=_VECTOR,
    ),
    _kind(m.Declined, "declined", m.Stage.INVITE),
    _kind(m.Ready, "ready", m.Stage.TRAIN),
    _Kind(m.RoundConfig, "round-config", m.Stage.ROUND_CONFIG, _CONFIG),
    _kind(m.Advertise, "advertise", m.Stage.ADVERTISE, share_key=_KEY, mask_key=_KEY, commitment=_DIGEST),
    _kind(m.PeerKeys, "peer-keys", m.Stage.SHARE_KEYS, envelopes=_listed(_sized(1, 2048), MAX_COHORT)),
    _kind(m.ShareKeys, "share-keys", m.Stage.SHARE_KEYS, sealed=_listed(_SEALED, MAX_COHORT)),
    _kind(m.PeerShares, "peer-shares", m.Stage.MASKED_INPUT, sealed=_listed(_pair(_SITE, _SEALED), MAX_COHORT)),
    _kind(m.MaskedInput, "masked-input", m.Stage.MASKED_INPUT, vector=_VECTOR),
    _kind(m.Survivors, "survivors", m.Stage.CONSISTENCY, sites=_listed(_SITE, MAX_COHORT)),
    _kind(m.Consistency, "consistency", m.Stage.CONSISTENCY, signature=_SIGNATURE),
    _kind(m.Agreement, "agreement", m.Stage.UNMASK, signatures=_listed(_pair(_SITE, _SIGNATURE), MAX_COHORT)),
    _kind(m.Unmask, "unmask", m.Stage.UNMASK, shares=_listed(_SHARE, MAX_COHORT)),
)
_BY_CLASS = {kind.message: kind for kind in _KINDS}
_BY_NAME = {kind.name: kind for kind in _KINDS}


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


@dataclass(frozen=True)
class Envelope:
    """A parsed envelope. `signed` is what the signature covers, as received; the signature is not checked yet."""

    header: Header
    message: m.Message
    body: bytes
    signed: bytes
    signature: bytes

    def verify(self, public_key: bytes) -> None:
        """RemoteError(BAD_SIGNATURE) unless the source's identity key signed this envelope."""
        verify_signature(public_key, self.signature, self.signed, self.header.source)


def build_envelope(header: Header, message: m.Message, sign: Sign | None = None) -> bytes:
    """The bytes of an envelope: signed by a site's identity key, unsigned from the coordinator."""
    kind = _BY_CLASS[type(message)]
    signed = labelled(
        "envelope",
        SUITE,
        kind.name,
        header.run_id,
        header.round,
        kind.stage,
        header.attempt,
        header.binding,
        header.source,
        header.destination,
        header.sequence,
        kind.body.write(message),
    )
    return enc(signed, sign(signed) if sign else b"")


def parse_envelope(data: bytes) -> Envelope:
    """The one way in for bytes from the other side: an Envelope, or RemoteError(BAD_MESSAGE)."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise _bad(f"a message has {len(data)} bytes where {MAX_ENVELOPE_BYTES} are allowed")
    signed, signature = _pair(_sized(1, len(data)), _sized(0, SIGNATURE_BYTES)).read(data)
    prefix = labelled("envelope", SUITE)
    if not signed.startswith(prefix):
        raise _bad("this is no envelope of protocol v1 and its algorithms")
    parts = _split(signed[len(prefix) :], 10)
    if len(parts) != 10:
        raise _bad(f"an envelope has {len(parts)} fields where 10 belong")
    name, run_id, round_, stage, attempt, binding, source, destination, sequence, body = parts
    kind = _BY_NAME.get(name.decode("ascii", errors="replace"))
    if kind is None or stage != kind.stage.encode():
        raise _bad("the message has a type or stage that protocol v1 does not know")
    header = Header(
        _read_integer(run_id),
        _read_integer(round_),
        _read_integer(attempt),
        _DIGEST.read(binding),
        _PARTY.read(source),
        _PARTY.read(destination),
        _read_integer(sequence),
    )
    if len(signature) != (0 if header.source == COORDINATOR else SIGNATURE_BYTES):
        raise _bad("sites sign what they send, and the coordinator does not")
    return Envelope(header, kind.body.read(body), body, signed, signature)


# --- Hashes and signatures over what was agreed ---


def terms_bytes(terms: m.RoundTerms) -> bytes:
    """The canonical bytes of what a vector was made under, for the outbox."""
    return _TERMS.write(terms)


def parse_terms(data: bytes) -> m.RoundTerms:
    return _TERMS.read(data)


def config_bytes(config: m.RoundConfig) -> bytes:
    """The canonical bytes of A0, which are also the body of its envelope."""
    return _CONFIG.write(config)


def round_context(config: bytes) -> bytes:
    """ctx = H(enc("round", cfg)), 32 bytes, of the canonical bytes as built or received."""
    return digest("round", config)


def key_set_digest(advertisements: Mapping[str, m.Advertise]) -> bytes:
    """u1 = H("U1", sorted (site, cpk, spk, H(b))), 32 bytes."""
    return digest(
        "U1",
        [[site, keys.share_key, keys.mask_key, keys.commitment] for site, keys in sorted(advertisements.items())],
    )


def survivors_statement(ctx: bytes, u1: bytes, survivors: tuple[str, ...]) -> bytes:
    """What a site signs at A4, once per attempt."""
    return labelled("u3", ctx, u1, survivors)
