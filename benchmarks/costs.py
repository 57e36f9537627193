"""What a round costs a site and the coordinator, from measured pieces: `make costs` rewrites docs/costs.md and .svg.

Measured here, in seconds of CPU: whole rounds on hardly any numbers for what a cohort costs, and encoding, masking,
adding and decoding at every size for what a vector costs. A round is the sum of both, and is compared with whole
rounds that were measured. Protocol v1 ends at 128 sites; a thousand are reckoned as eight cohorts of 125, each opened
by itself.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import apply_masks
from plots import Line, log_plot
from rounds import COLLUDING, Played, play, undisturbed

DOCS = Path(__file__).parents[1] / "docs"
SIZES = (100_000, 1_000_000, 4_000_000, 10_000_000, 40_000_000)
COHORTS = (3, 10, 30, 100, 1000)
MEASURED = (3, 10, 30, 100, 125)
KEYS, REPEATS = 2, 2
SMALL = 64
ENVELOPES, BY_PEER = 1006, 116
"""Bytes besides the vector, as `wire_bytes` counts them."""


@dataclass(frozen=True)
class Vector:
    """Seconds of CPU that a vector of one size takes: to encode, under one mask, to add, to decode; and its bytes."""

    encode: float
    mask: float
    add: float
    decode: float
    size: int


@dataclass(frozen=True)
class Cohort:
    """Seconds of CPU that a cohort takes, whatever the vector: at a site, and at the coordinator by how many drop."""

    site: float
    coordinator: float
    with_drops: float


def least(work: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def vector(dimension: int) -> Vector:
    layout = FieldLayout(21, 16, ((dimension, 1.0),))
    update = np.random.default_rng(0).uniform(-1, 1, dimension)
    words = layout.encode(update, os.urandom)
    keys = [os.urandom(32) for _ in range(KEYS)]
    repeats = 3 if dimension > 1e7 else 9
    other = words.copy()
    return Vector(
        encode=least(lambda: layout.encode(update, os.urandom), repeats),
        add=least(lambda: np.add(other, words, out=other), repeats),
        decode=least(lambda: layout.decode(words, 1), repeats),
        mask=least(lambda: apply_masks(other, add=keys), repeats) / KEYS,
        size=layout.size,
    )


def cohort(sites: int) -> Cohort:
    def rounds(drops: int) -> list[Played]:
        return [play(np.zeros((sites, SMALL)), drops, clock=time.process_time) for _ in range(REPEATS)]

    all_stay, some_drop = rounds(0), rounds(drops_of(sites))
    return Cohort(
        undisturbed([site for each in all_stay for site in each.sites]),
        undisturbed([each.coordinator for each in all_stay]),
        undisturbed([each.coordinator for each in some_drop]),
    )


def drops_of(sites: int) -> int:
    """One in ten, none of three."""
    return sites // 10


def site_seconds(of: Cohort, each: Vector, sites: int) -> float:
    return of.site + each.encode + sites * each.mask


def coordinator_seconds(of: Cohort, each: Vector, sites: int, drops: int) -> float:
    survivors = sites - drops
    masks = survivors * (1 + drops)
    return (of.with_drops if drops else of.coordinator) + survivors * each.add + masks * each.mask + each.decode


def split(sites: int) -> tuple[int, int]:
    """(how many cohorts, sites in each)."""
    return (1, sites) if sites <= 128 else (sites // 125, 125)


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.3g} MB"


def main() -> None:
    vectors = {size: vector(size) for size in SIZES}
    cohorts = {sites: cohort(sites) for sites in MEASURED}
    reckoned: dict[str, dict[int, list[float]]] = {"site": {}, "coordinator": {}, "drops": {}}
    for sites in COHORTS:
        count, each = split(sites)
        of, drops = cohorts[each], drops_of(each)
        reckoned["site"][sites] = [site_seconds(of, v, each) for v in vectors.values()]
        reckoned["coordinator"][sites] = [count * coordinator_seconds(of, v, each, 0) for v in vectors.values()]
        reckoned["drops"][sites] = [count * coordinator_seconds(of, v, each, drops) for v in vectors.values()]

    (DOCS / "costs.md").write_text(page(vectors, reckoned, comparison(cohorts, vectors)), encoding="utf-8")
    panels = [
        (title, [Line(f"{n:,} sites", list(zip(SIZES, reckoned[key][n], strict=True))) for n in COHORTS])
        for key, title in (("site", "A site"), ("drops", "The coordinator, one site in ten drops out"))
    ]
    plot = log_plot("CPU seconds of a round by numbers trained and sites", "numbers trained", "s", panels)
    (DOCS / "costs.svg").write_text(plot, encoding="utf-8")


def comparison(cohorts: dict[int, Cohort], vectors: dict[int, Vector]) -> list[list[str]]:
    """Whole rounds at d = 1M against what the pieces say."""
    rows = []
    for sites, drops in ((10, 0), (30, drops_of(30))):
        updates = np.broadcast_to(np.random.default_rng(0).uniform(-1, 1, 1_000_000), (sites, 1_000_000))
        played = [play(updates, drops, clock=time.process_time) for _ in range(REPEATS)]
        expected = (
            site_seconds(cohorts[sites], vectors[1_000_000], sites),
            coordinator_seconds(cohorts[sites], vectors[1_000_000], sites, drops),
        )
        found = (
            undisturbed([site for each in played for site in each.sites]),
            undisturbed([each.coordinator for each in played]),
        )
        for party, reckoned, measured in zip(("site", "coordinator"), expected, found, strict=True):
            rows.append([party, str(sites), str(drops), seconds(reckoned), seconds(measured)])
    return rows


def page(vectors: dict[int, Vector], reckoned: dict[str, dict[int, list[float]]], compared: list[list[str]]) -> str:
    heads = ["numbers trained", *(f"{sites:,} sites" for sites in COHORTS)]

    def by_size(cell: Callable[[int, int], str]) -> str:
        return table(heads, [[f"{d:,}", *(cell(i, n) for n in COHORTS)] for i, d in enumerate(SIZES)])

    def up(index: int, sites: int) -> str:
        return megabytes(vectors[SIZES[index]].size + ENVELOPES + BY_PEER * (split(sites)[1] - 1))

    memory = [[f"{d:,}", megabytes(v.size), megabytes(3 * v.size + 8 * d)] for d, v in vectors.items()]
    times = {key: partial(lambda key, i, n: seconds(reckoned[key][n][i]), key) for key in reckoned}
    return f"""# What secure aggregation costs

Made by `make costs`; do not edit. CPU time of one round's encoding, cryptography and checks, at a site and at the
coordinator, with fields of 21 bits and {COLLUDING} colluding site assumed. Training, TLS and disks are not in it.
Measured on {platform.machine()} with AES in hardware and Python {platform.python_version()}. Masks, encoding and
signatures use all cores, so on two cores a party waits for about half of it.

![CPU seconds of a round, at a site and at the coordinator, by numbers trained, for 3 to 1,000 sites](costs.svg)

Protocol v1 has cohorts of at most 128 sites. The column of 1,000 is reckoned for what is planned, eight random cohorts
of 125, each opened by itself, and cannot be run today.

## A site

{by_size(times["site"])}

## The coordinator

When every site stays:

{by_size(times["coordinator"])}

When one site in ten drops out after the keys, so that its masks have to be taken off one by one (none of three can):

{by_size(times["drops"])}

## Bytes up, for each site

{by_size(up)}

## The coordinator's memory

The sum, the vector that is being added and one more, and the decoded numbers; the same for 3 sites and for 128, for
vectors wait on disk (`benchmarks/coordinator_memory.py`).

{table(["numbers trained", "a vector on the wire", "memory at most"], memory)}

## How this was reckoned

A round on {SMALL} numbers gives what a cohort costs: keys, signatures, shares. Encoding, masking with one key, adding
and decoding are measured at each size. A site makes as many masks as the cohort has sites; the coordinator takes off
one for each survivor and one for each pair of a survivor and a dropped site. Whole rounds on 1,000,000 numbers,
measured in the same run:

{table(["party", "sites", "dropped", "reckoned", "measured"], compared)}
"""


if __name__ == "__main__":
    main()
