"""What the daemon last said of itself, in a small file of the home, for `foedus-site status` to show.

Nothing rests on it: it is not synchronised, and where it cannot be written it is merely old.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from foedus_client.link.state import LinkState
from foedus_common.clock import Clock, iso

FILE = "condition.json"
MAX_BYTES = 1 << 16
_SPEAKERS = ("foedus_client.round", "foedus_client.link.site_link")
"""Loggers whose warnings say that a run suffers here."""


class Condition(logging.Handler):
    """Keeps the file: how the link stands, and the last warning about a run. All methods may be called from any
    thread; none raises for want of a disk."""

    def __init__(self, home: Path, clock: Clock) -> None:
        super().__init__(logging.WARNING)
        self._path = home / FILE
        self._clock = clock
        self._facts: dict[str, str] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Warnings are noted within the block; the file begins empty."""
        self._write()
        for name in _SPEAKERS:
            logging.getLogger(name).addHandler(self)
        try:
            yield
        finally:
            for name in _SPEAKERS:
                logging.getLogger(name).removeHandler(self)

    def link(self, state: LinkState, sentence: str) -> None:
        self._facts["link"] = f"{state}: {sentence}"
        self._write()

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`, which holds the handler's lock."""
        self._facts["trouble"] = f"{iso(self._clock.now())} {record.getMessage().splitlines()[0]}"
        self._write()

    def _write(self) -> None:
        with suppress(OSError):
            with tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=".", delete=False) as file:  # mode 0600
                file.write(json.dumps(self._facts).encode())
            os.replace(file.name, self._path)


def read_condition(home: Path) -> dict[str, str]:
    """ "link" and "trouble", each only where there is something to say."""
    try:
        with (home / FILE).open("rb") as file:
            facts = json.loads(file.read(MAX_BYTES))
        return {str(name): str(fact) for name, fact in facts.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
