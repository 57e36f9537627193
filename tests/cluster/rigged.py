"""What a test can have a real process do at an exact place: end as if by kill -9, or wait.

    FOEDUS_KILL=ROUND:STAGE         ends the process when that stage of that round (from 0) reaches it
    FOEDUS_HOLD=ROUND:STAGE:FILE    waits there until FILE exists

Stages are "invite" and A1 to A5: "keys", "shares", "mask", "survivors", "unmask". The programs themselves know nothing
of this: `rigged_site` and `rigged_coordinator` wrap them.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from foedus_common.protocol import messages as m
from foedus_common.protocol import wire

STAGES = ("keys", "shares", "mask", "survivors", "unmask")


def pass_through(envelope: bytes) -> None:
    """Called with every request, before anything else is done with it."""
    opened = wire.parse_envelope(envelope)
    stage = "invite" if isinstance(opened.message, m.Invite) else STAGES[opened.header.sequence]
    place = f"{opened.header.round}:{stage}"
    if isinstance(opened.message, m.Propose | m.RunEnded):
        return
    if os.environ.get("FOEDUS_KILL") == place:
        os.kill(os.getpid(), signal.SIGKILL)
    held = os.environ.get("FOEDUS_HOLD", "")
    if held.startswith(f"{place}:"):
        gate = Path(held.removeprefix(f"{place}:"))
        while not gate.exists():
            threading.Event().wait(0.02)
