"""A few of the points of `make crash-matrix`, on SQLite: those that no other test comes to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crashing import COORDINATOR, Case, Federation, federation

CASES = {
    Case("east", "mid-training", 0): "finished",
    Case("south", "outbox stored", 0): "finished",
    Case("west", "sent", 0): "finished, 1 resent",
    Case(COORDINATOR, "journal head", 0): "finished, 1 attempt aborted",
    Case(COORDINATOR, "committed", 1): "finished",
}


@pytest.fixture(scope="module")
def four() -> Iterator[Federation]:
    with federation() as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=[case.point for case in CASES])
def test_a_crash_is_survived(four: Federation, case: Case) -> None:
    assert four.suffer(case) == CASES[case]
