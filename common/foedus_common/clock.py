"""The only place that reads the time."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol

DAY = 86_400
"""Seconds."""


class Clock(Protocol):
    """Seconds since the Unix epoch, and seconds that never go backwards."""

    def now(self) -> float: ...

    def monotonic(self) -> float: ...


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves when it is told to: for simulations and tests."""

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


def utc(seconds: float) -> datetime:
    """Unix seconds as the date and time in UTC that certificates carry."""
    return datetime.fromtimestamp(seconds, UTC)


APART_SECONDS = 60.0
"""Two clocks that differ by more do not agree."""


def span(seconds: float) -> str:
    """A length of time for a person: in seconds and, from two hours on, in hours."""
    return f"{seconds:.0f} seconds" if seconds < 7_200 else f"{seconds / 3_600:.1f} hours"


def apart(ours: float, theirs: float, tolerance: float = APART_SECONDS) -> str | None:
    """The sentence for this machine's clock and the coordinator's, in Unix seconds; None when they agree."""
    if abs(ours - theirs) <= tolerance:
        return None
    side = "ahead of" if ours > theirs else "behind"
    return f"This clock is {span(abs(ours - theirs))} {side} the coordinator's; set both by a time server."


def iso(seconds: float) -> str:
    """Unix seconds as ISO 8601 in UTC, to the second."""
    return utc(seconds).isoformat(timespec="seconds")
