"""Fixtures of tests that start real processes."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from foedus_client.policy import SitePolicy
from processes import Cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in item.path.parts:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


MakeCluster = Callable[..., Cluster]


@pytest.fixture(scope="module")
def make_cluster() -> Iterator[MakeCluster]:
    """Whatever was started is stopped in the end."""
    made: list[Cluster] = []

    def make(policies: Mapping[str, SitePolicy], **options: Any) -> Cluster:
        made.append(Cluster.make(Path(folder) / str(len(made)), policies, **options))
        return made[-1]

    with tempfile.TemporaryDirectory() as folder:
        yield make
        for cluster in made:
            cluster.stop()
            cluster.operator.close()
