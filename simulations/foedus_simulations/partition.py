"""Which site holds which rows: a specification such as `dirichlet:0.5` into one list of row numbers per site.

Knows the values of a table's columns and nothing else: neither files, nor texts, nor sites' names.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foedus_common.errors import LocalError

Rows = NDArray[np.int64]
"""Row numbers (n,), ascending."""

_TRIES = 200


def partition(
    spec: str,
    columns: Mapping[str, Sequence[str]],
    *,
    label: str,
    sites: int | None = None,
    seed: int = 0,
    min_rows: int = 10,
) -> list[Rows]:
    """Every row of the table to exactly one site, each site getting at least `min_rows`; the same for the same seed.

    spec: "iid" deals the rows out evenly; "dirichlet:ALPHA" draws for every value of the column `label` how it spreads
    over the sites from a symmetric Dirichlet distribution (Hsu, Qi, Brown 2019, arXiv:1909.06335; ALPHA towards 0 is
    one class per site); "column:NAME" makes one site of every value of a column, in the order of the values.
    Raises LocalError with one sentence for a specification that cannot be.
    """
    kind, _, argument = spec.partition(":")
    random = np.random.default_rng(seed)
    if kind == "column":
        parts = _by_column(argument, columns, sites)
    elif kind == "iid" and not argument:
        parts = _iid(len(_column(label, columns)), _site_count(sites, spec), random)
    elif kind == "dirichlet":
        alpha, values = _alpha(argument), np.asarray(_column(label, columns))
        parts = _dirichlet(values, alpha, _site_count(sites, spec), random, min_rows)
    else:
        known = {"dirichlet": "dirichlet:0.5", "column": "column:NAME", "iid": "iid"}
        close = difflib.get_close_matches(kind, known, n=1, cutoff=0.5)
        hint = f"did you mean {known[close[0]]!r}?" if close else "give dirichlet:ALPHA, column:NAME or iid."
        raise LocalError(f"The partition {spec!r} is not known; {hint}")
    fewest = min(map(len, parts))
    if fewest < min_rows:
        raise LocalError(
            f"The partition {spec!r} leaves one of {len(parts)} sites with {fewest} rows, fewer than {min_rows}; "
            f"use fewer sites, more rows{' or a larger ALPHA' if kind == 'dirichlet' else ''}."
        )
    return parts


def _column(name: str, columns: Mapping[str, Sequence[str]]) -> Sequence[str]:
    if name not in columns:
        close = difflib.get_close_matches(name, list(columns), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"its columns are {', '.join(columns)}."
        raise LocalError(f"The data has no column {name!r}; {hint}")
    return columns[name]


def _site_count(sites: int | None, spec: str) -> int:
    if sites is None or sites < 1:
        raise LocalError(f"The partition {spec!r} needs a number of sites, 1 or more.")
    return sites


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise LocalError(f"The partition 'dirichlet:{text}' needs a number above 0, such as dirichlet:0.5.")
    return alpha


def _by_column(name: str, columns: Mapping[str, Sequence[str]], sites: int | None) -> list[Rows]:
    values = np.asarray(_column(name, columns))
    names = np.unique(values)
    if sites is not None and len(names) != sites:
        raise LocalError(f"The column {name!r} has {len(names)} values, so it makes {len(names)} sites, not {sites}.")
    return [np.flatnonzero(values == name) for name in names]


def _iid(rows: int, sites: int, random: np.random.Generator) -> list[Rows]:
    return [np.sort(part) for part in np.array_split(random.permutation(rows), sites)]


def _dirichlet(
    values: NDArray[np.str_], alpha: float, sites: int, random: np.random.Generator, min_rows: int
) -> list[Rows]:
    """The first of `_TRIES` draws that gives every site `min_rows`; else the last one, which the caller refuses."""
    parts: list[Rows] = []
    for _ in range(_TRIES):
        owner = np.empty(len(values), dtype=np.int64)
        for value in np.unique(values):
            rows = random.permutation(np.flatnonzero(values == value))
            cuts = np.round(np.cumsum(random.dirichlet(np.full(sites, alpha))) * len(rows)).astype(np.int64)
            owner[rows] = np.searchsorted(cuts[:-1], np.arange(len(rows)), side="right")
        parts = [np.flatnonzero(owner == site) for site in range(sites)]
        if min(map(len, parts)) >= min_rows:
            break
    return parts
