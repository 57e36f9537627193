"""How often somebody else may cause something here: so many times at once, and then one by one."""

from __future__ import annotations

import threading

from foedus_common.clock import Clock


class Allowance:
    """A token bucket: `burst` times at once, then one time for every `seconds` that pass. Safe to share."""

    def __init__(self, clock: Clock, burst: int, seconds: float) -> None:
        self._clock = clock
        self._burst = burst
        self._seconds = seconds
        self._left = float(burst)
        self._counted_at = clock.monotonic()
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether one time is left; it is used then."""
        with self._lock:
            now = self._clock.monotonic()
            self._left = min(self._burst, self._left + (now - self._counted_at) / self._seconds)
            self._counted_at = now
            if self._left < 1:
                return False
            self._left -= 1
            return True
