from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback import Federation


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    yield federation
    federation.close()
