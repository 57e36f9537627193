"""A process that forbade core dumps leaves none, and neither do its children."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, subprocess, sys
from foedus_common.core_dumps import forbid_core_dumps
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
forbid_core_dumps()
print(before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE), flush=True)
subprocess.run([sys.executable, "-c", "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_neither_the_process_nor_what_it_starts_dumps_core() -> None:
    printed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["1 0 (0, 0)", "(0, 0)"]
