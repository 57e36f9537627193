"""Values as bytes: how a field of a message is written and, strictly, read. Every value has exactly one spelling.

Fields stand one after another. A value whose size the schema fixes stands as it is; every other is preceded by its
length, as 4 bytes big-endian unless said otherwise, and what a length announces is checked to be there before it is
read. Knows nothing of messages: `wire` puts their schemas together from these.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from foedus_common.errors import LocalError, Reason, RemoteError

T = TypeVar("T")
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True)
class Codec(Generic[T]):
    """`read(write(value)) == value`, and `read` accepts no other bytes for it; it raises RemoteError(BAD_MESSAGE).

    size: how many bytes every value has, and so those that `read` is given; None if that differs.
    """

    write: Callable[[T], bytes]
    read: Callable[[bytes], T]
    size: int | None = None


def bad(what: str) -> RemoteError:
    return RemoteError(Reason.BAD_MESSAGE, what)


# --- Fields one after another ---


def write_fields(codecs: Iterable[Codec[Any]], values: Iterable[Any], length: int = 4) -> bytes:
    """length: how many bytes say how long a value of no fixed size is."""
    written = ((codec, codec.write(value)) for codec, value in zip(codecs, values, strict=True))
    return b"".join(
        data if codec.size is not None else len(data).to_bytes(length, "big") + data for codec, data in written
    )


def read_fields(codecs: Iterable[Codec[Any]], data: bytes, position: int = 0, length: int = 4) -> tuple[list[Any], int]:
    """The inverse of `write_fields` from `position` on: the values, and where they end."""
    values = []
    for codec in codecs:
        size = codec.size
        if size is None:
            size = int.from_bytes(data[position : position + length], "big")
            position += length
        end = position + size
        if end > len(data):
            raise bad("a field is cut short")
        values.append(codec.read(data[position:end]))
        position = end
    return values, position


def _size_of(codecs: Sequence[Codec[Any]]) -> int | None:
    sizes = [codec.size for codec in codecs if codec.size is not None]
    return sum(sizes) if len(sizes) == len(codecs) else None


def _read_all(codecs: Sequence[Codec[Any]], data: bytes) -> list[Any]:
    values, end = read_fields(codecs, data)
    if end != len(data):
        raise bad(f"{len(data) - end} bytes follow after the last field")
    return values


def record(kind: Callable[..., T], **schema: Codec[Any]) -> Codec[T]:
    """A dataclass or named tuple by its fields, all of them, in the order given."""
    codecs = tuple(schema.values())

    def read(data: bytes) -> T:
        values = _read_all(codecs, data)
        try:
            return kind(*values)
        except LocalError as error:
            raise bad(str(error)) from None

    return Codec(lambda value: write_fields(codecs, [getattr(value, name) for name in schema]), read, _size_of(codecs))


def pair(left: Codec[A], right: Codec[B]) -> Codec[tuple[A, B]]:
    codecs = (left, right)

    def read(data: bytes) -> tuple[A, B]:
        first, second = _read_all(codecs, data)
        return first, second

    return Codec(lambda value: write_fields(codecs, value), read, _size_of(codecs))


def listed(item: Codec[T], most: int) -> Codec[tuple[T, ...]]:
    """At most `most` of them, to the end of the list."""

    def read(data: bytes) -> tuple[T, ...]:
        values: list[T] = []
        position = 0
        while position < len(data):
            if len(values) == most:
                raise bad(f"a list has more than the {most} items that are allowed")
            (value,), position = read_fields((item,), data, position)
            values.append(value)
        return tuple(values)

    return Codec(lambda values: write_fields([item] * len(values), values), read)


# --- Single values ---


def sized(low: int, high: int) -> Codec[bytes]:
    """Bytes, from `low` to `high` of them."""

    def checked(data: bytes) -> bytes:
        if not low <= len(data) <= high:
            raise bad(f"a field has {len(data)} bytes where {low} to {high} are allowed")
        return data

    return Codec(checked, checked, size=low if low == high else None)


def exactly(size: int) -> Codec[bytes]:
    return sized(size, size)


def text(pattern: str) -> Codec[str]:
    """ASCII that the whole pattern matches."""
    whole = re.compile(pattern, re.ASCII)

    def read(data: bytes) -> str:
        string = data.decode("ascii", errors="replace")
        if not whole.fullmatch(string):
            raise bad("a name or text has characters that do not belong there")
        return string

    return Codec(lambda string: string.encode(), read)


def _read_integer(data: bytes) -> int:
    value = int.from_bytes(data, "big")
    if value >> 63:
        raise bad("an integer is below 2^63, which is what a database holds")
    return value


INTEGER: Codec[int] = Codec(lambda value: value.to_bytes(8, "big"), _read_integer, size=8)
"""8 bytes, below 2^63."""


def _read_count(data: bytes) -> int:
    if data[:1] == b"\0":
        raise bad("a count has no zeros in front")
    return _read_integer(data)


COUNT: Codec[int] = Codec(lambda value: value.to_bytes((value.bit_length() + 7) // 8, "big"), _read_count)
"""As few bytes as it takes, none for 0; below 2^63."""


def _read_real(data: bytes) -> float:
    (value,) = struct.unpack(">d", data)
    if not math.isfinite(value):
        raise bad("a number is not finite")
    return float(value)


REAL: Codec[float] = Codec(lambda value: struct.pack(">d", value), _read_real, size=8)
"""IEEE 754, 8 bytes, finite."""
