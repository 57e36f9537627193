"""Work on all cores: numpy, AES and signatures do without the interpreter's lock, so threads are enough.

What is computed never depends on how it was divided. Knows lengths only.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

LEAST = 1 << 16
"""Words in a part: below, waking a thread takes longer than it saves."""

_MOST = 8


def in_parts(length: int, work: Callable[[int, int], None], least: int = LEAST, multiple: int = 64) -> None:
    """work(start, stop) for runs that make up 0..length, at once where there are cores for it.

    Runs are at least `least` long and start at multiples of `multiple`. Raises what a run raises, once all have ended.
    """
    parts = max(1, min(_cores(), length // least))
    step = -(-length // parts // multiple) * multiple
    starts = range(0, length, max(step, 1))
    others = [_threads().submit(work, start, min(start + step, length)) for start in starts[1:]]
    try:
        work(0, min(step, length))
    finally:
        for other in others:
            other.exception()  # waits
    for other in others:
        other.result()


@cache
def _cores() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_cores(), thread_name_prefix="vectors")
