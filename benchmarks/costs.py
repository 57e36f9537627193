"""What a round costs a site and the coordinator, from measured pieces: `make costs` rewrites docs/costs.md and .svg.

Measured here, in seconds of CPU: whole rounds on hardly any numbers for what a cohort costs, and encoding, masking,
adding and decoding at every size for what a vector costs. A round is the sum of both, and is compared with whole
rounds that were measured. A thousand sites are eight cohorts of 125 and the draw that gives them, measured whole.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.protocol import messages as m
from foedus_common.protocol.coordinator_draw import Drawing, Drawn, DrawSession, DrawState
from foedus_common.protocol.coordinator_session import CoordinatorSession
from foedus_common.protocol.draw import cohort_sizes
from foedus_common.protocol.effects import Arrived, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import apply_masks
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Outbox
from foedus_common.protocol.thresholds import Member, PeerRule, Roster, thresholds
from plots import Line, log_plot
from rounds import COLLUDING, Memory, Played, Stopwatch, play, undisturbed
from simulated_sites import LAYOUT, SITES, SIZE, terms_of

DOCS = Path(__file__).parents[1] / "docs"
SIZES = (100_000, 1_000_000, 4_000_000, 10_000_000, 40_000_000)
COHORTS = (3, 10, 30, 100, 1000)
MEASURED = (3, 10, 30, 100, 125)
KEYS, REPEATS = 2, 2
TIMED = 20
SMALL = 64
ENVELOPES, BY_PEER = 1006, 116
"""Bytes besides the vector, as `wire_bytes` counts them."""
TWENTY_ROUNDS = """\
`python benchmarks/simulated_sites.py 20` plays 20 such rounds one after another, with 30 % of the sites lost in each.
On 2026-11-22 a round took 56.4 s of CPU time (52.9 s all sites together, 3.5 s the coordinator), on two cores that had
much else to do; a round alone had taken 27.3 s there when they were free. Memory peaked at 202 MB at the coordinator
and at 451 MB in the two processes of all sites, and did not grow: 178 and 440 MB in the fourth round, 179 and 443 MB in
the twentieth."""
"""Played by hand: it takes ten minutes of a machine that does nothing else."""


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


@dataclass(frozen=True)
class Draw:
    """Seconds of CPU that a draw takes, at a site and at the coordinator; bytes that a site sends and gets for it."""

    site: float = 0.0
    coordinator: float = 0.0
    up: int = 0
    down: int = 0


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


def draw() -> Draw:
    """Of `SITES` sites, every one of which answers; a few of them are timed, and A0 with all seeds is in it."""
    site, coordinator, up, down = Stopwatch(time.process_time), Stopwatch(time.process_time), 0, 0
    identities = {f"site-{number:03}": Ed25519PrivateKey.generate() for number in range(SITES)}
    members = {s: Member(key.public_key().public_bytes_raw(), f"org of {s}") for s, key in identities.items()}
    roster, terms, vectors = Roster(1, bytes(32), members), terms_of(1), Memory({}, site)
    outbox = Outbox(terms, vectors.store(LAYOUT.encode(np.zeros(LAYOUT.dimension), os.urandom)), charged=True)
    sessions = {
        name: SiteSession(name, key.sign, roster, PeerRule(), SIZE, outbox, vectors, os.urandom)
        for name, key in identities.items()
    }
    states = {name: session.begin() for name, session in sessions.items()}
    timed = set(sorted(sessions)[:: SITES // TIMED])

    def answer(request: Send) -> bytes:
        name = request.destination
        with site.running() if name in timed else nullcontext():
            states[name], effects = sessions[name].step(states[name], request.envelope)
        return next(effect.envelope for effect in effects if isinstance(effect, Send))

    session = DrawSession(terms, 0, tuple(sessions), SIZE, roster)
    with coordinator.running():
        state: DrawState
        state, effects = session.begin()
    while isinstance(state, Drawing):
        requests = [effect for effect in effects if isinstance(effect, Send)]
        answers = [Arrived(request.destination, answer(request)) for request in requests]
        up, down = up + len(answers[0].envelope), down + len(requests[0].envelope)
        for arrived in answers:
            with coordinator.running():
                state, effects = session.step(state, arrived)
    assert isinstance(state, Drawn), state
    for cohort in state.cohorts:
        limits = thresholds(len(cohort), COLLUDING)
        config = m.RoundConfig(m.PROTOCOL_VERSION, terms, 0, 1, bytes(32), cohort, limits.threshold, limits.minimum)
        with coordinator.running():
            _, effects = CoordinatorSession(config, roster, vectors, state.seeds).begin()
        openings = [effect for effect in effects if isinstance(effect, Send)]
        down += len(openings[0].envelope) if cohort is state.cohorts[0] else 0
        for opening in openings:
            if opening.destination in timed:
                answer(opening)
    return Draw(sum(site.laps) / len(timed), sum(coordinator.laps), up, down)


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
    sizes = cohort_sizes(sites)
    return len(sizes), sizes[0]


def table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def megabytes(value: float) -> str:
    return f"{value / 1e6:.3g} MB"


def main() -> None:
    vectors = {size: vector(size) for size in SIZES}
    cohorts = {sites: cohort(sites) for sites in MEASURED}
    drawn = draw()
    reckoned: dict[str, dict[int, list[float]]] = {"site": {}, "coordinator": {}, "drops": {}}
    for sites in COHORTS:
        count, each = split(sites)
        of, drops, before = cohorts[each], drops_of(each), drawn if count > 1 else Draw()
        reckoned["site"][sites] = [before.site + site_seconds(of, v, each) for v in vectors.values()]
        for key, lost in (("coordinator", 0), ("drops", drops)):
            whole = [count * coordinator_seconds(of, v, each, lost) for v in vectors.values()]
            reckoned[key][sites] = [before.coordinator + of_size for of_size in whole]

    (DOCS / "costs.md").write_text(page(vectors, reckoned, drawn, comparison(cohorts, vectors)), encoding="utf-8")
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


def page(
    vectors: dict[int, Vector], reckoned: dict[str, dict[int, list[float]]], drawn: Draw, compared: list[list[str]]
) -> str:
    heads = ["numbers trained", *(f"{sites:,} sites" for sites in COHORTS)]

    def by_size(cell: Callable[[int, int], str]) -> str:
        return table(heads, [[f"{d:,}", *(cell(i, n) for n in COHORTS)] for i, d in enumerate(SIZES)])

    def up(index: int, sites: int) -> str:
        count, each = split(sites)
        return megabytes(vectors[SIZES[index]].size + ENVELOPES + BY_PEER * (each - 1) + drawn.up * (count > 1))

    memory = [[f"{d:,}", megabytes(v.size), megabytes(3 * v.size + 8 * d)] for d, v in vectors.items()]
    times = {key: partial(lambda key, i, n: seconds(reckoned[key][n][i]), key) for key in reckoned}
    return f"""# What secure aggregation costs

Made by `make costs`; do not edit. CPU time of one round's encoding, cryptography and checks, at a site and at the
coordinator, with fields of 21 bits, organisations of one site each and {COLLUDING} that may collude. Training, TLS and
disks are not in it.
Measured on {platform.machine()} with AES in hardware and Python {platform.python_version()}. Masks, encoding and
signatures use all cores, so on two cores a party waits for about half of it.

![CPU seconds of a round, at a site and at the coordinator, by numbers trained, for 3 to 1,000 sites](costs.svg)

At most 128 sites share a sum. A thousand are drawn into eight cohorts of 125, each with a sum of its own. The draw is
in their column. It takes {seconds(drawn.site)} at a site and {seconds(drawn.coordinator)} at the coordinator, which
sends each site {drawn.down / 1e3:.3g} kB and gets {drawn.up} bytes from it.

{TWENTY_ROUNDS}

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
vectors wait on disk (`benchmarks/coordinator_memory.py`). Where cohorts are drawn, each has a sum and decoded numbers
of its own; there are eight at most.

{table(["numbers trained", "a vector on the wire", "memory at most"], memory)}

## How this was reckoned

A round on {SMALL} numbers gives what a cohort costs: keys, signatures, shares. Encoding, masking with one key, adding
and decoding are measured at each size. A site makes as many masks as the cohort has sites; the coordinator takes off
one for each survivor and one for each pair of a survivor and a dropped site. Whole rounds on 1,000,000 numbers,
measured in the same run; the draw was played with {SITES:,} sites, of which {TIMED} were timed:

{table(["party", "sites", "dropped", "reckoned", "measured"], compared)}
"""


if __name__ == "__main__":
    main()
