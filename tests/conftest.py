"""Shared by all tests: the folder `tests` itself is importable, so that `plans` and other fixtures' modules are."""

import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
# For torch, here and in child processes: on models this small, threads wait for one another longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

# Examples are the same in every run, and how long one takes on a busy machine says nothing.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
