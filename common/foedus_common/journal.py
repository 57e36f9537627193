"""A hash-chained log of events: what is changed, dropped or moved in it afterwards shows.

An entry's head covers its number, the head before it and its body, so the last head stands for the whole log. A log
cut off at its end is still a good chain; only a checkpoint that someone else kept, a number and its head, tells.
Knows no disk: a log is anything that gives its entries in order.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from foedus_common.allowance import Allowance
from foedus_common.canonical import canonical_json, digest
from foedus_common.clock import Clock
from foedus_common.errors import LocalError

REFUSALS_APART = 60.0
"""Seconds."""
REFUSALS_KEPT = 256
REFUSALS_AT_ONCE, REFUSALS_THEN = 120, 60.0
"""Entries, of whatever kind, and then one for so many seconds."""

GENESIS = bytes(32)
"""The head before the first entry."""


@dataclass(frozen=True)
class Entry:
    """number: from 1, without gaps; body: canonical JSON of an event; head: 32 bytes."""

    number: int
    body: bytes
    head: bytes

    @property
    def event(self) -> dict[str, Any]:
        """What happened: `at` (Unix seconds), `event` (its name) and the details."""
        event: dict[str, Any] = json.loads(self.body)
        return event


@dataclass(frozen=True)
class Checkpoint:
    """The head that the log had after entry `number`, kept by somebody else."""

    number: int
    head: bytes


START = Checkpoint(0, GENESIS)


class BrokenChain(LocalError):
    """The log is not what was written. `number` is the first entry that is bad or missing in `log`."""

    exit_code = 1

    def __init__(self, number: int, what: str, log: str = "journal") -> None:
        super().__init__(f"The {log} is broken at entry {number}: {what}.")
        self.number = number


def next_entry(last: Checkpoint, at: float, event: str, details: Mapping[str, Any]) -> Entry:
    """The entry that follows `last`; `details` are JSON values under names other than `at` and `event`."""
    body = canonical_json({**details, "at": round(at, 3), "event": event})
    return Entry(last.number + 1, body, _head(last.number + 1, last.head, body))


def follows(entry: Entry, last: Checkpoint) -> bool:
    """Whether the entry is the one after `last`, as it was written."""
    return entry.number == last.number + 1 and entry.head == _head(entry.number, last.head, entry.body)


def verify(entries: Iterable[Entry], checkpoints: Iterable[Checkpoint] = (), log: str = "journal") -> Checkpoint:
    """Recompute the chain of `log`, against what others kept of it; gives its end.

    Raises:
        BrokenChain: names the first entry that was altered, dropped, inserted or moved, that differs from a
            checkpoint, or that is missing at the end though a checkpoint knows it.
    """
    known: dict[int, set[bytes]] = {}
    for checkpoint in checkpoints:
        known.setdefault(checkpoint.number, set()).add(checkpoint.head)
    last = START
    for entry in entries:
        number = last.number + 1
        if entry.number != number:
            raise BrokenChain(number, f"entry {entry.number} is in its place", log)
        if entry.head != _head(number, last.head, entry.body):
            raise BrokenChain(number, "its content does not match its hash", log)
        if known.get(number, {entry.head}) != {entry.head}:
            raise BrokenChain(number, "it differs from what was there when the checkpoint was taken", log)
        last = Checkpoint(number, entry.head)
    if max(known, default=0) > last.number:
        raise BrokenChain(last.number + 1, "it is missing, and everything after it", log)
    return last


class Refusals:
    """Enters what was refused: what repeats itself within a minute is entered once, and then counted; and of all kinds
    together so many and then no more than one a minute, the others being counted as `refusals.omitted`. Others can
    knock as often as they like, and the journal must not grow with it."""

    def __init__(self, log: Callable[..., None], clock: Clock) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._entries = Allowance(clock, REFUSALS_AT_ONCE, REFUSALS_THEN)
        self._omitted = 0
        self._seen: OrderedDict[tuple[Any, ...], tuple[float, int]] = OrderedDict()

    def note(self, event: str, **details: Any) -> None:
        kind = (event, *details.values())
        with self._lock:
            entered_at, since = self._seen.pop(kind, (float("-inf"), 0))
            if self._clock.monotonic() - entered_at >= REFUSALS_APART:
                self._enter(event, **details, count=since + 1)
                entered_at, since = self._clock.monotonic(), -1
            self._seen[kind] = (entered_at, since + 1)
            if len(self._seen) > REFUSALS_KEPT:
                self._seen.popitem(last=False)

    def _enter(self, event: str, **details: Any) -> None:
        if not self._entries.take():
            self._omitted += 1
            return
        if self._omitted:
            self._log("refusals.omitted", count=self._omitted)
            self._omitted = 0
        self._log(event, **details)


def _head(number: int, before: bytes, body: bytes) -> bytes:
    return digest("journal", number, before, body)
