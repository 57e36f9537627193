"""Where random bytes come from: an argument everywhere, the operating system in production."""

from __future__ import annotations

import os
from collections.abc import Callable

RandomBytes = Callable[[int], bytes]
"""`random(n)` gives n bytes. Seeded sources exist in `foedus_simulations` and in tests only."""

system_random: RandomBytes = os.urandom
