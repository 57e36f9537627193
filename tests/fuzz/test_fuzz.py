"""A slice of `make fuzz`: some hundred mutated inputs for every parser, and what earlier searches found."""

from __future__ import annotations

import atexit
import base64
import io
import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from calls import DOWNLOAD, reference
from foedus_client.condition import read_condition
from foedus_client.link.state import coordinators_clock
from foedus_common.canonical import enc
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CLOCK_KEY
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from fuzz import fuzz
from targets import by_name
from workshop import Target, Workshop

INPUTS = 200

_WORKSHOP = Workshop()
atexit.register(_WORKSHOP.close)
TARGETS = by_name(_WORKSHOP)


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_accepted(name: str) -> None:
    for data in TARGETS[name].good:
        TARGETS[name].run(data)


def test_every_kind_of_message_is_a_good_input() -> None:
    kinds = {type(wire.parse_envelope(data).message) for data in TARGETS["messages"].good}
    assert kinds == set(get_args(m.ToSite)) | set(get_args(m.FromSite))


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutated_input_does_harm(name: str) -> None:
    outcome = fuzz(TARGETS[name], 0, INPUTS)
    assert outcome.failure == ""
    assert outcome.inputs == INPUTS


def with_value(target: str, *path: str, value: object) -> bytes:
    """The target's first good input, JSON, with another value at this place."""
    table = json.loads(TARGETS[target].good[0])
    place = table
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(table, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def archive_with_list(data: bytes) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        entry = tarfile.TarInfo("backup.json")
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return target.getvalue()


def pem_with(target: str, old: bytes, new: bytes) -> bytes:
    """The target's first good input, PEM, with other bytes in what it encodes."""
    begin, coded = TARGETS[target].good[0].split(b"-----END")[0].split(b"-----\n")
    kind, der = begin.removeprefix(b"-----BEGIN "), base64.b64decode(coded)
    assert old in der
    return b"-----BEGIN %b-----\n%b-----END %b-----\n" % (kind, base64.encodebytes(der.replace(old, new)), kind)


FOUND = {
    "a text in a plan that is no Unicode": (
        "agreed plans",
        lambda: with_value("agreed plans", "spec_sha256", value="\udc93"),
    ),
    "a multiplier that is not a number": (
        "agreed plans",
        lambda: with_value("agreed plans", "noise_multipliers", value=[math.nan, 1.0]),
    ),
    "a whole number too large for a float": (
        "agreed plans",
        lambda: with_value("agreed plans", "plan", "privacy", "clip", value=10**400),
    ),
    "a plan nested deep": ("agreed plans", lambda: b'{"plan":' + nested(600) + b"}"),
    "a number of thousands of digits": ("plans", lambda: b"a = " + b"1" * 5000),
    "the same in another base": ("a site's settings", lambda: b"threads = [0x" + b"f" * 5000 + b"]"),
    "brackets without end in TOML": ("plans", lambda: b"a = " + nested(5000)),
    "a backup whose list is nested deep": ("backups", lambda: archive_with_list(nested(50_000))),
    "a high-water mark at infinity": (
        "high-water marks",
        lambda: with_value("high-water marks", "entries", value=math.inf),
    ),
    "a high-water mark nested deep": ("high-water marks", lambda: b"[" * 1024),
    "a signed head with too large a number": (
        "lists of signed heads",
        lambda: TARGETS["lists of signed heads"].good[0].replace(b'"number": 1', b'"number": ' + b"9" * 30),
    ),
    "a signed head at infinity": (
        "lists of signed heads",
        lambda: TARGETS["lists of signed heads"].good[0].replace(b'"number": 1', b'"number": Infinity'),
    ),
    "a trainer's message nested deep": ("a trainer's messages", lambda: nested(30_000)),
    "an Ed25519 key that says it is X448": (
        "identity files",
        lambda: pem_with("identity files", b"\x2b\x65\x70", b"\x2b\x65\x6f"),
    ),
    "an authority with one extension twice": (
        "bundles of authorities",
        lambda: pem_with("bundles of authorities", b"\x55\x1d\x0f", b"\x55\x1d\x0e"),
    ),
    "a download from where no file ends": (
        "downloads",
        lambda: pb.PullRequest(object=reference(DOWNLOAD), offset=2**64 - 1).SerializeToString(),
    ),
    "a coordinator that holds more of an upload than there is": (
        "transfers at a site",
        lambda: enc(pb.StatReply(received=2**64 - 1).SerializeToString(), b""),
    ),
    "a table whose name is no UTF-8": (
        "rows in SQLite",
        lambda: TARGETS["rows in SQLite"].good[0].replace(b"tablerows", b"tabler\xa4ws"),
    ),
    "a score that is a warning": ("scores", lambda: b"Some weights were newly initialized."),
    "a score that is a number": ("scores", lambda: b"1"),
}


@pytest.mark.parametrize("what", FOUND)
def test_what_was_found_stays_fixed(what: str) -> None:
    name, make = FOUND[what]
    target = TARGETS[name]
    with pytest.raises(target.allowed):
        target.run(make())


@pytest.mark.parametrize("told", ["nan", "-inf", "1e999", "-1", "", "9" * 400, "\u0661.500", "1_0.000", b"1.000"])
def test_a_coordinator_s_odd_time_is_no_time(told: object) -> None:
    assert coordinators_clock([(CLOCK_KEY, told)]) is None
    assert coordinators_clock([(CLOCK_KEY, "1800000000.123")]) == 1_800_000_000.123


def test_a_condition_nested_deep_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "condition.json").write_bytes(nested(30_000))
    assert read_condition(tmp_path) == {}


def test_a_head_that_is_listed_thousands_of_times_is_checked_once() -> None:
    sheet = json.loads(TARGETS["lists of signed heads"].good[0])
    repeated = json.dumps({**sheet, "heads": sheet["heads"] * 20_000}).encode()
    target = replace(TARGETS["lists of signed heads"], mutate=[lambda *_: repeated])
    outcome = fuzz(target, 0, 1)
    assert (outcome.failure, outcome.accepted) == ("", 1)


def test_the_search_tells_of_a_crash_a_hang_and_growth() -> None:
    def hang(data: bytes) -> None:
        while data != b"good":
            pass

    kept: list[bytes] = []
    crash = Target("crash", [b"good"], [lambda *_: b"bad"], lambda data: data == b"good" or 1 / 0)
    assert "ZeroDivisionError" in fuzz(crash, 0, 5).failure
    assert "Hang" in fuzz(Target("hang", [b"good"], [lambda *_: b"bad"], hang), 0, 5).failure
    growth = Target("growth", [b"good"], [lambda *_: b"bad"], lambda data: kept.append(b"x" * 60_000_000))
    assert "grew" in fuzz(growth, 0, 5).failure
