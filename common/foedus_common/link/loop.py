"""The one event loop of a process on which gRPC runs, in a thread of its own.

One, because gRPC's asyncio has one poller for the whole process and hands late events to whichever loop they came
from, also when that one is closed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def on_loop(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine on the loop, from any other thread; the loop starts at first use and lasts."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="foedus-link", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(work, _loop)
