from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from operators import Operator


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(tmp_path / "operator")
    yield operator
    operator.close()
