from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import postgresql
from operators import Operator


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[postgresql.Server]:
    if reason := postgresql.missing():
        pytest.skip(reason)
    with postgresql.server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that is not made yet; the same test runs on both kinds."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'foedus.db'}"
    server: postgresql.Server = request.getfixturevalue("postgresql_server")
    return server.database()


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(tmp_path / "operator")
    yield operator
    operator.close()
