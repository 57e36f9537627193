"""Shared by all tests: the folder `tests` itself is importable, so that `plans` and other fixtures' modules are."""

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# For torch, here and in child processes: on models this small, threads wait for one another longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
# A shell that runs the tests in the background, or a CI, may have them ignore Ctrl-C, and with them what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Our programs sync what they write, and that no test can see: files are in memory, where there is room.
MEMORY = Path("/dev/shm")
if "TMPDIR" not in os.environ and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4e9:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# Examples are the same in every run, and how long they take on a busy machine says nothing.
settings.register_profile("repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="module")
def _own_log_handlers() -> Iterator[None]:
    """A program run within a test sets up its log; the next module's tests must not write to a stream that is gone."""
    before = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = before
