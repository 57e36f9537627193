"""The trainers of a site's runs: each run keeps its own between rounds, and few are in memory at a time.

A trainer holds the model. With more runs than places one that is idle makes room for the next, and a run whose turn has
not come waits. Knows neither rounds nor processes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan


class Stoppable(Protocol):
    def stop(self) -> None: ...


T = TypeVar("T", bound=Stoppable)


class Turns(Generic[T]):
    """At most `places` trainers, each made by `open_trainer`. Safe to share between the runs' threads."""

    def __init__(self, open_trainer: Callable[[AgreedPlan], T], places: int) -> None:
        self._open = open_trainer
        self._places = places
        self._idle: OrderedDict[int, T] = OrderedDict()
        self._at_work: dict[int, T | None] = {}  # None while it is being made
        self._closed = False
        self._changed = threading.Condition()

    @contextmanager
    def trainer(self, agreed: AgreedPlan) -> Iterator[T]:
        """The run's own trainer, once there is a place; one thread for each run. Raises LocalError after `close`, and
        what `open_trainer` raises."""
        run = agreed.run_id
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._at_work) < self._places)
            if self._closed:
                raise _stopping()
            trainer = self._idle.pop(run, None)
            while trainer is None and self._idle and len(self._idle) + len(self._at_work) >= self._places:
                self._idle.popitem(last=False)[1].stop()
            self._at_work[run] = trainer
        try:
            trainer = trainer or self._open(agreed)
            with self._changed:
                if self._closed:
                    raise _stopping()
                self._at_work[run] = trainer
            yield trainer
        finally:
            with self._changed:
                if self._at_work.pop(run, None) is not None and trainer is not None:
                    self._idle[run] = trainer
                self._changed.notify_all()

    def stop(self, run: int) -> None:
        """The run needs its trainer no more."""
        with self._changed:
            for trainer in (self._idle.pop(run, None), self._at_work.pop(run, None)):
                if trainer is not None:
                    trainer.stop()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop all of them; whoever waits for a turn is told so."""
        with self._changed:
            self._closed = True
            for trainer in (*self._idle.values(), *self._at_work.values()):
                if trainer is not None:
                    trainer.stop()
            self._changed.notify_all()


def _stopping() -> LocalError:
    return LocalError("the site's daemon is stopping.")
