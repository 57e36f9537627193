"""Memory of this process as the kernel counts it (proc(5))."""

from __future__ import annotations

from pathlib import Path


def memory(field: str) -> float:
    """Megabytes: `VmRSS` now, `VmHWM` at its peak since `begin_anew`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) * 1024 / 1e6


def begin_anew() -> float:
    """Forget the peak; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")
