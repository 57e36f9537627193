"""How a round with more sites than one cohort holds is split: seeds, commitments, and the cohorts that they give.

Every site commits to a seed before it sees another's, so the seed of a single honest site makes its split uniform over
all splits, whatever the coordinator and everybody else chose (docs/decisions/0027). Pure functions: they know sites by
name and no message, key or signature. How likely colluders are to meet in one cohort is reckoned here, too.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from foedus_common.canonical import digest, enc, labelled
from foedus_common.protocol.thresholds import MAX_COHORT

MAX_SITES = 1024
"""In a round: eight of the largest cohorts. A list of as many commitments fits into one message of the link."""

SEED_BYTES = 32
MAX_DRAWS = 96
"""A site takes part in no more attempts at a round whose cohorts are drawn. A coordinator that sees the seeds before
anybody else can give a split up and ask for another: so often it may try. An honest one needs as many where sites
commit to seeds and keep them back, one after another (docs/decisions/0035)."""


def cohort_sizes(sites: int, largest: int = MAX_COHORT) -> tuple[int, ...]:
    """The fewest cohorts of at most `largest` sites, as equal as can be, the larger ones first."""
    count = -(-sites // largest)
    size, larger = divmod(sites, count)
    return (size + 1,) * larger + (size,) * (count - larger)


@dataclass(frozen=True)
class RoundSize:
    """How many sites a plan lets into a round, and how many of them share one secure sum at most."""

    fewest: int
    most: int
    largest_cohort: int = MAX_COHORT

    @property
    def drawn(self) -> bool:
        """Whether rounds of this plan may be so large that their cohorts are drawn."""
        return self.most > self.largest_cohort

    @property
    def smallest_sum(self) -> int:
        """Sites in the smallest cohort that any round of this size can have."""
        return _cohorts(self)[0]

    @property
    def largest_sum(self) -> int:
        return _cohorts(self)[1]


@cache
def _cohorts(size: RoundSize) -> tuple[int, int]:
    sizes = [each for sites in range(size.fewest, size.most + 1) for each in cohort_sizes(sites, size.largest_cohort)]
    return min(sizes), max(sizes)


# --- Seeds and what follows from them ---


def seed_commitment(run_id: int, round_index: int, attempt: int, site: str, seed: bytes) -> bytes:
    """What a site shows before it reveals its seed (32 bytes each): good for this attempt and this site only."""
    return digest("draw-seed", run_id, round_index, attempt, site, seed)


def drawn_cohorts(
    plan_digest: bytes, run_id: int, round_index: int, attempt: int, seeds: Mapping[str, bytes], largest: int
) -> tuple[tuple[str, ...], ...]:
    """The cohorts that these seeds give, each in ascending order: every site in one of them.

    Sites are ordered by SHA-256 of all that was revealed with their name, and the order is cut into `cohort_sizes`.
    """
    revealed = digest("draw", plan_digest, run_id, round_index, attempt, [[s, seeds[s]] for s in sorted(seeds)])
    prefix = labelled("draw-order", revealed)
    order = sorted(seeds, key=lambda site: hashlib.sha256(prefix + enc(site)).digest())
    cohorts, start = [], 0
    for size in cohort_sizes(len(order), largest):
        cohorts.append(tuple(sorted(order[start : start + size])))
        start += size
    return tuple(cohorts)


# --- How many colluders meet ---


def chance_of_more(colluding: int, *, together: int, size: RoundSize) -> float:
    """The probability that more than `colluding` of `together` colluding sites are drawn into a given site's cohort.

    Hypergeometric, of the worst round that the coordinator can bring about: it may call honest sites absent until the
    fewest are left, so every number of sites that the plan allows is looked at.
    """
    return max(
        _tail(colluding, together, sites, cohort)
        for sites in range(max(size.fewest, together + 1), size.most + 1)
        for cohort in set(cohort_sizes(sites, size.largest_cohort))
    )


def _tail(colluding: int, together: int, sites: int, cohort: int) -> float:
    """P(X > colluding), X of `together` among the site's cohort - 1 companions out of sites - 1; exact integers."""
    companions = range(colluding + 1, min(together, cohort - 1) + 1)
    ways = sum(math.comb(together, x) * math.comb(sites - 1 - together, cohort - 1 - x) for x in companions)
    return ways / math.comb(sites - 1, cohort - 1)


def withstood(colluding: int, *, size: RoundSize, rounds: int) -> int:
    """How many sites of a round may help the coordinator, if a cohort is made for `colluding` organisations.

    With so many, of however many organisations, the probability that any honest site meets more than `colluding` of
    them in any draw of the run is below 2^-40: a union over the sites, the rounds, and the draws in which a site takes
    part in each. Without a draw it is `colluding` itself. (As many organisations are withstood with all of their sites
    in any case, which no chance has a part in.)
    """
    if size.fewest <= size.largest_cohort:
        return colluding
    draws = size.most * rounds * MAX_DRAWS
    return (
        bisect.bisect_right(
            range(colluding, size.fewest),
            2.0**-40,
            key=lambda together: draws * chance_of_more(colluding, together=together, size=size),
        )
        + colluding
        - 1
    )
