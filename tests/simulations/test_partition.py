"""Partitions: every row to exactly one site, the same for the same seed, and one sentence for what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError
from foedus_simulations.partition import partition

COLUMNS = {
    "chapter": [str(number % 7) for number in range(900)],
    "hospital": [("north", "south", "east")[number % 3] for number in range(900)],
}


@given(
    seed=st.integers(0, 2**32),
    sites=st.integers(1, 6),
    spec=st.one_of(st.just("iid"), st.floats(0.2, 50).map("dirichlet:{}".format)),
)
def test_each_row_goes_to_exactly_one_site_and_the_seed_decides(seed: int, sites: int, spec: str) -> None:
    parts = partition(spec, COLUMNS, label="chapter", sites=sites, seed=seed)
    again = partition(spec, COLUMNS, label="chapter", sites=sites, seed=seed)
    assert len(parts) == sites
    assert min(map(len, parts)) >= 10
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(900))
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def test_another_seed_gives_another_partition() -> None:
    one, other = (partition("dirichlet:0.5", COLUMNS, label="chapter", sites=3, seed=seed) for seed in (1, 2))
    assert [len(part) for part in one] != [len(part) for part in other]


def test_iid_parts_differ_by_at_most_one_row() -> None:
    sizes = [len(part) for part in partition("iid", COLUMNS, label="chapter", sites=7)]
    assert max(sizes) - min(sizes) <= 1


def test_a_column_makes_one_site_of_each_value_in_their_order() -> None:
    east, north, south = partition("column:hospital", COLUMNS, label="chapter")
    assert (east[0], north[0], south[0]) == (2, 0, 1)
    assert len(east) == len(north) == len(south) == 300


def _skew(alpha: float) -> float:
    """The mean over sites of the largest class's share."""
    shares = []
    for seed in range(10):
        for part in partition(f"dirichlet:{alpha}", COLUMNS, label="chapter", sites=3, seed=seed):
            counts = np.unique(np.asarray(COLUMNS["chapter"])[part], return_counts=True)[1]
            shares.append(counts.max() / counts.sum())
    return float(np.mean(shares))


def test_a_smaller_alpha_gives_more_skewed_sites() -> None:
    assert _skew(0.1) > _skew(1.0) + 0.1
    assert _skew(1.0) > _skew(100.0) + 0.1


@pytest.mark.parametrize(
    ("spec", "sites", "said"),
    [
        ("dirichlt:0.5", 3, "did you mean 'dirichlet:0.5'?"),
        ("shards", 3, "give dirichlet:ALPHA, column:NAME or iid."),
        ("iid:3", 3, "did you mean 'iid'?"),
        ("dirichlet:", 3, "needs a number above 0"),
        ("dirichlet:-1", 3, "needs a number above 0"),
        ("dirichlet:nan", 3, "needs a number above 0"),
        ("dirichlet:inf", 3, "needs a number above 0"),
        ("dirichlet:0.5", None, "needs a number of sites"),
        ("iid", 0, "needs a number of sites"),
        ("column:hospitl", None, "did you mean 'hospital'?"),
        ("column:", None, "its columns are chapter, hospital."),
        ("column:hospital", 4, "makes 3 sites, not 4"),
        ("iid", 200, "with 4 rows, fewer than 10; use fewer sites"),
        ("dirichlet:0.001", 20, "or a larger ALPHA"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(spec: str, sites: int | None, said: str) -> None:
    with pytest.raises(LocalError) as refused:
        partition(spec, COLUMNS, label="chapter", sites=sites)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
