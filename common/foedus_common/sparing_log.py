"""A log that others cannot fill: each line of the program speaks so often about each peer, and then one by one.

What is left out is counted, and the next line that is let through says how many there were. Knows nothing of what the
lines say.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

from foedus_common.allowance import Allowance
from foedus_common.clock import Clock

BURST = 60
APART_SECONDS = 10.0
PEERS_KEPT = 1024


class Sparing(logging.Filter):
    """For a handler. A record's `peer`, if it has one, has an allowance of its own (`logger.info(..., extra=...)`)."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._spoken: OrderedDict[tuple[str, int, str], Allowance] = OrderedDict()
        self._left_out: dict[tuple[str, int, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Called by the handler, under its lock."""
        key = (record.pathname, record.lineno, str(getattr(record, "peer", "")))
        allowance = self._spoken.setdefault(key, Allowance(self._clock, BURST, APART_SECONDS))
        self._spoken.move_to_end(key)
        if len(self._spoken) > PEERS_KEPT:
            self._left_out.pop(self._spoken.popitem(last=False)[0], None)
        if not allowance.take():
            self._left_out[key] = self._left_out.get(key, 0) + 1
            return False
        if count := self._left_out.pop(key, 0):
            record.msg, record.args = f"{record.getMessage()} [{count} lines like this one were left out]", ()
        return True
