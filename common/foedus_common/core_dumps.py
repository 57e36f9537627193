"""No core dumps: a process that holds rows or keys leaves none of its memory on a disk when it crashes."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """For this process, and by the limit for all that it starts. On Linux no other process of the same user can read
    its memory from then on, either: see prctl(2), PR_SET_DUMPABLE, which a program that is started has to set anew."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # where it is not allowed, the limit still holds
