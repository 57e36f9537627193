"""Bytes that everybody builds alike: `enc`, canonical JSON and the hash over both (docs/protocol.md section 1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

LABEL = b"foedus/v1/"

Encodable = bytes | str | int | Sequence["Encodable"]


def enc(*parts: Encodable) -> bytes:
    """Length-prefixed concatenation: injective, so that no two lists of parts share an encoding.

    Each part is preceded by its length as 4 bytes, big-endian. Strings are UTF-8, integers 8 bytes big-endian
    (0 <= i < 2^64), sequences the `enc` of their items.
    """
    return b"".join(len(body).to_bytes(4, "big") + body for body in map(_encode, parts))


def _encode(part: Encodable) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, str):
        return part.encode()
    if isinstance(part, int):
        return part.to_bytes(8, "big")
    return enc(*part)


def unenc(data: bytes) -> tuple[bytes, ...]:
    """The parts that `enc` joined, as bytes. Raises ValueError when the lengths do not add up to the data."""
    parts, start = [], 0
    while start < len(data):
        body = start + 4
        end = body + int.from_bytes(data[start:body], "big")
        if end > len(data):
            raise ValueError("the encoding is cut short")
        parts.append(data[body:end])
        start = end
    return tuple(parts)


def labelled(domain: str, *parts: Encodable) -> bytes:
    """What is signed or hashed: `enc` under the domain label `foedus/v1/`."""
    return LABEL + enc(domain, *parts)


def digest(domain: str, *parts: Encodable) -> bytes:
    """SHA-256 (32 bytes) over `labelled(domain, *parts)`."""
    return hashlib.sha256(labelled(domain, *parts)).digest()


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no blanks, UTF-8. Floats print as Python's shortest round-trip repr; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
