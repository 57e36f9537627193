"""What a test can have a real process do at an exact place: end as if by kill -9, or wait.

    FOEDUS_KILL=ROUND:PLACE         ends the process when that place is reached in that round (from 0)
    FOEDUS_KILL=ROUND:PLACE:RUN     of that run only
    FOEDUS_HOLD=ROUND:PLACE:FILE    waits there until FILE exists; FILE.reached exists from then on
    FOEDUS_SKEW=SECONDS             its clock is so far ahead of this machine's

For each of them, @FILE has it read from that file every time: it may change while the process runs. Places are "invite"
and the stages A1 to A5, "keys", "shares", "mask", "survivors", "unmask", when their request comes by, and the further
ones that `rigged_site` and `rigged_coordinator` name. The programs themselves know nothing of this: functions of theirs
are wrapped by name.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foedus_common.clock import SystemClock
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire

STAGES = ("keys", "shares", "mask", "survivors", "unmask")

Where = Callable[..., tuple[int, int] | None]
"""From a call's arguments (and, after it, its result first): the run and the round, or None if this call is no such
place."""


def skew() -> None:
    """To be called before the program begins."""
    now = SystemClock.now
    if "FOEDUS_SKEW" in os.environ:
        SystemClock.now = lambda clock: now(clock) + float(order("FOEDUS_SKEW") or 0)  # type: ignore[method-assign]


def reached(place: str, run_id: int, index: int) -> None:
    """This place in this round: do what the environment says."""
    here = f"{index}:{place}"
    if order("FOEDUS_KILL") in (here, f"{here}:{run_id}"):
        os.kill(os.getpid(), signal.SIGKILL)
    held = order("FOEDUS_HOLD")
    if held.startswith(f"{here}:"):
        gate = Path(held.removeprefix(f"{here}:"))
        gate.with_name(f"{gate.name}.reached").touch()
        while not gate.exists():
            threading.Event().wait(0.02)


def order(name: str) -> str:
    """What the environment says, or the file that it names."""
    given = os.environ.get(name, "")
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text()
    except FileNotFoundError:
        return ""


def before(owner: Any, name: str, place: str, where: Where) -> None:
    """The place is where `owner.name` is about to be called."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def rigged(*arguments: Any, **options: Any) -> Any:
        if at := where(*arguments, **options):
            reached(place, *at)
        return original(*arguments, **options)

    setattr(owner, name, rigged)


def after(owner: Any, name: str, place: str, where: Where) -> None:
    """The place is where `owner.name` has returned."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def rigged(*arguments: Any, **options: Any) -> Any:
        result = original(*arguments, **options)
        if at := where(result, *arguments, **options):
            reached(place, *at)
        return result

    setattr(owner, name, rigged)


def pass_through(envelope: bytes) -> None:
    """Called with every request, before anything else is done with it."""
    opened = wire.parse_envelope(envelope)
    if not isinstance(opened.message, m.Propose | m.RunEnded):
        reached(stage_of(opened), opened.header.run_id, opened.header.round)


def stage_of(envelope: wire.Envelope) -> str:
    """Of a request that belongs to a round."""
    return "invite" if isinstance(envelope.message, m.Invite) else STAGES[envelope.header.sequence]
