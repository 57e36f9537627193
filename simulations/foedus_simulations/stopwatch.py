"""How long the stages of something took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds by stage, in the order in which they first began; total: since it was made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._made = time.monotonic()

    @property
    def total(self) -> float:
        return time.monotonic() - self._made

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time that its body takes to the stage's."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
