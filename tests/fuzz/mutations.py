"""Mutated inputs from good ones, seeded: raw bytes, length-prefixed lists, frames, JSON trees, lines of text, archives.

A mutator takes a `Random`, one good input and the other good inputs, and gives bytes. What it knows of a format it uses
to get past the first check: lengths are put right again, JSON stays JSON. Each is followed by raw damage now and then.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from random import Random
from typing import Any

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Frame

from foedus_common.canonical import enc, unenc

Mutator = Callable[[Random, bytes, Sequence[bytes]], bytes]

INTERESTING = (
    0,
    1,
    2,
    4,
    0x7F,
    0x80,
    0xFF,
    0x100,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63,
    2**64 - 1,
)


def raw(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """One to four of: flip, set, cut, insert, repeat, splice, truncate, an interesting integer."""
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        size = len(out)
        at = random.randrange(size + 1)
        match random.randrange(9):
            case 0 if size:
                out[at % size] ^= 1 << random.randrange(8)
            case 1 if size:
                out[at % size] = random.randrange(256)
            case 2:
                del out[at : at + random.choice((1, 2, 4, 16, 64))]
            case 3:
                out[at:at] = random.randbytes(random.choice((1, 2, 4, 8, 32)))
            case 4:
                out[at:at] = out[at : at + random.choice((1, 4, 16, 64))] * random.choice((1, 2, 8))
            case 5:
                other = random.choice(others)
                start = random.randrange(len(other) + 1)
                out[at : at + random.choice((0, 8, 64))] = other[start : start + random.choice((4, 32, 128))]
            case 6:
                del out[at:]
            case 7:
                width, order = random.choice((1, 2, 4, 8)), random.choice(("big", "little"))
                out[at : at + width] = (random.choice(INTERESTING) % (1 << 8 * width)).to_bytes(width, order)
            case 8:
                out += random.choice((b"\0", b"\n", b'"', b"\xff", b" "))
    return bytes(out)


def _then_damage(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return raw(random, data, others) if random.random() < 0.1 else data


# --- Length-prefixed lists (`foedus_common.canonical.enc`) ---


def framed(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Changes one part, however deep it lies, of an `enc(...)`, and puts all lengths around it right again."""
    if random.random() < 0.2:
        return raw(random, data, others)
    return _then_damage(random, _framed(random, data, others), others)


def _framed(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    try:
        parts = list(unenc(data))
    except ValueError:
        parts = []
    if len(parts) < 1 or random.random() < 0.1:
        return raw(random, data, others)
    at = random.randrange(len(parts))
    match random.randrange(8):
        case 0:
            del parts[at]
        case 1:
            parts.insert(at, random.choice(parts))
        case 2:
            parts = parts * random.choice((2, 3, 200))
        case 3:
            other = random.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case 4:
            parts[at] = random.choice((b"", bytes(8), b"\xff" * 8, bytes(32), bytes(33), bytes(64), b"a" * 41))
        case _:
            parts[at] = _framed(random, parts[at], others) if parts[at] else random.randbytes(4)
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def in_parts(mutate: Mutator) -> Mutator:
    """Changes one part of an `enc(...)`, however deep it lies, by the mutator given."""

    def mutated(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        try:
            parts = list(unenc(data))
        except ValueError:
            parts = []
        if not parts:
            return mutate(random, data, [data])
        at = random.randrange(len(parts))
        parts[at] = mutated(random, parts[at], others)
        return enc(*parts)

    return mutated


# --- Protocol Buffers ---


def frames(*kinds: type[Frame]) -> Mutator:
    """Changes a field of a message of one of these kinds, wherever it is; other values of it are of the same type."""

    def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        frame = random.choice(kinds)()
        try:
            frame.ParseFromString(data)
        except DecodeError:
            return raw(random, data, others)
        _change_field(random, frame)
        return _then_damage(random, frame.SerializeToString(), others)

    return mutate


def _change_field(random: Random, frame: Frame) -> None:
    field = random.choice(frame.DESCRIPTOR.fields)
    if field.message_type is not None:
        child = getattr(frame, field.name)
        child.SetInParent()
        if child.DESCRIPTOR.fields:
            _change_field(random, child)
        return
    value = getattr(frame, field.name)
    if isinstance(value, bool):
        value = not value
    elif isinstance(value, int):  # 32 bits or 64
        value = random.choice((*INTERESTING, value + 1)) % (1 << 32 if field.type == field.TYPE_UINT32 else 1 << 64)
    elif isinstance(value, float):
        value = random.choice((0.0, -1.0, 1e308, math.inf, math.nan))
    elif isinstance(value, bytes):
        value = raw(random, value, [value])
    else:
        value = raw(random, value.encode(), [b"a"]).decode("utf-8", "ignore")
    setattr(frame, field.name, value)


# --- JSON ---

_ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    2**64,
    10**400,
    0.0,
    -0.5,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    5e-324,
    "",
    " ",
    "a",
    "\0",
    "\ud800",
    "\u202e",
    "é" * 40,
    "x" * 2000,
    "../../etc/passwd",
    "/etc/passwd",
    "0" * 64,
    [],
    {},
    [[]],
    [None],
    [{}],
    {"": None},
)


def json_tree(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Changes some values, keys or branches of a JSON text and writes it canonically most of the time."""
    if random.random() < 0.15:
        return raw(random, data, others)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return raw(random, data, others)
    for _ in range(random.choice((1, 1, 2, 3))):
        tree = _changed(random, tree)
    if random.random() < 0.01:
        tree = _nested(random.choice((50, 400, 700, 5_000, 50_000)), json.dumps(tree))
        return _then_damage(random, tree.encode(), others)
    if random.random() < 0.8:
        text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    else:
        text = json.dumps(tree, indent=random.choice((None, 1)))
    return _then_damage(random, text.encode("utf-8", "surrogatepass"), others)


def _nested(depth: int, text: str) -> str:
    return "[" * depth + text + "]" * depth


def _changed(random: Random, tree: Any) -> Any:
    if isinstance(tree, dict) and tree and random.random() < 0.9:
        key = random.choice(list(tree))
        match random.randrange(7):
            case 0:
                return {k: v for k, v in tree.items() if k != key}
            case 1:
                return {**tree, random.choice(("", "extra", "name", "\ud800", key[:-1], key + "s")): tree[key]}
            case 2:
                other = random.choice(list(tree))
                return {**tree, key: tree[other], other: tree[key]}
            case _:
                return {**tree, key: _changed(random, tree[key])}
    if isinstance(tree, list) and tree and random.random() < 0.9:
        at = random.randrange(len(tree))
        match random.randrange(6):
            case 0:
                return tree[:at] + tree[at + 1 :]
            case 1:
                return [*tree, tree[at]]
            case 2:
                return tree * random.choice((2, 20))
            case _:
                return [*tree[:at], _changed(random, tree[at]), *tree[at + 1 :]]
    if isinstance(tree, str) and tree and random.random() < 0.5:
        return raw(random, tree.encode("utf-8", "surrogatepass"), [b"a"]).decode("utf-8", "surrogateescape")
    if isinstance(tree, int | float) and not isinstance(tree, bool) and random.random() < 0.5:
        return random.choice((tree + 1, -tree, tree * 2, float(tree) if abs(tree) < 1e300 else 0, str(tree), [tree]))
    return random.choice(_ODD)


# --- Text: TOML, CSV, JSON lines, PEM, tokens ---


def lines(*words: bytes) -> Mutator:
    """Changes lines, and puts in words that mean something in the format."""

    def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        if random.random() < 0.3:
            return raw(random, data, others)
        parts = data.split(b"\n")
        for _ in range(random.choice((1, 1, 2, 4))):
            at = random.randrange(len(parts)) if parts else 0
            line = parts[at] if parts else b""
            match random.randrange(7):
                case 0 if parts:
                    del parts[at]
                case 1:
                    parts.insert(at, line)
                case 2:
                    parts.insert(at, random.choice(random.choice(others).split(b"\n")))
                case 3:
                    word = random.choice(words) * (1 if random.random() < 0.98 else random.choice((100, 3000)))
                    place = random.randrange(len(line) + 1)
                    parts[at : at + 1] = [line[:place] + word + line[place:]]
                case 4:
                    name, mark, _ = line.partition(b"=")
                    parts[at : at + 1] = [name + mark + b" " + random.choice(words)]
                case 5 if parts:
                    random.shuffle(parts)
                case _:
                    parts[at : at + 1] = [raw(random, line, others)]
        return _then_damage(random, b"\n".join(parts), others)

    return mutate


TOML_WORDS = (
    *(b'"', b"'", b"[", b"]", b"[[", b"{", b"}", b"=", b"#", b",", b".", b'"""', b"\\u0000", b"\\ud800", b"\xff"),
    *(b"true", b"nan", b"inf", b"-1", b"0", b"1e999", b"99999999999999999999", b"0x10", b"1979-05-27", b"[]", b"{}"),
    *(b'""', b'"x"', b"[[]]", b"[1, 'a']", b"a = 1", b"[[phase]]", b"[privacy]"),
)
ROW_WORDS = (
    *(b",", b'"', b'""', b"\r", b"\r\n", b"\0", b"\t", b"nan", b"NaN", b"null", b"true", b"\xef\xbb\xbf", b"\xff"),
    *(
        b"text",
        b"label",
        b"{",
        b"}",
        b"[",
        b"1e999",
        b"123456789012345678901",
        b'{"text": "a", "label": 1}',
        b"\\ud800",
    ),
)
PEM_WORDS = (
    b"-----BEGIN CERTIFICATE-----",
    b"-----END CERTIFICATE-----",
    b"=",
    b"AAAA",
    b"-----BEGIN PRIVATE KEY-----",
)


# --- Archives ---


@cache
def _entries(archive: bytes) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        entries = [(entry, tar.extractfile(entry)) for entry in tar]
        return [(entry, file.read() if file else b"") for entry, file in entries]


def tar_entries(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Changes an archive's entries and puts their hashes into its list again, most of the time."""
    if random.random() < 0.4:
        return raw(random, data, others)
    *files, (about, listed) = ((copy(entry), content) for entry, content in _entries(data))
    at = random.randrange(len(files))
    entry, content = files[at]
    match random.randrange(8):
        case 0:
            entry.name = random.choice(("../up", "/etc/x", "a/../b", ".hidden", "a" * 300, "x\ny", "", ".", "a/b/c"))
        case 1:
            entry.type = random.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, b"Z"))
            entry.linkname = random.choice(("/etc/passwd", "../../x", ""))
        case 2:
            del files[at]
        case 3:
            files.append(files[at])
        case 4:
            files[at] = (entry, raw(random, content, others))
        case 5:
            listed = json_tree(random, listed, [listed])
        case 6:
            entry.mode, entry.uid = random.choice((0o7777, 0, 0o600)), random.choice((0, 2**21 - 1))
        case 7:
            entry.pax_headers = {"path": random.choice(("../x", "é", "a" * 500)), "size": "99999999"}
    if random.random() < 0.7 and listed.startswith(b"{"):
        try:
            table = json.loads(listed)
            table["files"] = {entry.name: hashlib.sha256(content).hexdigest() for entry, content in files}
            listed = json.dumps(table).encode()
        except (ValueError, TypeError, RecursionError):
            pass
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=random.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for entry, content in [*files, (about, listed)]:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return _then_damage(random, target.getvalue(), others)
