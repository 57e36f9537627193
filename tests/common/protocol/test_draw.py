"""Cohorts as a pure function of what was revealed, and the chance that colluders meet in one."""

from __future__ import annotations

from itertools import combinations
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_common.protocol.draw import (
    MAX_SITES,
    RoundSize,
    chance_of_more,
    cohort_sizes,
    drawn_cohorts,
    seed_commitment,
)
from seeded import seeded

PLAN = bytes(range(32))


def seeds_of(sites: int, name: str = "seeds") -> dict[str, bytes]:
    random = seeded(name)
    return {f"site-{number:04}": random(32) for number in range(sites)}


def cohorts_of(seeds: dict[str, bytes], largest: int = 128, **where: int) -> tuple[tuple[str, ...], ...]:
    place = {"run_id": 1, "round_index": 2, "attempt": 3} | where
    return drawn_cohorts(PLAN, seeds=seeds, largest=largest, **place)


# --- How many, and how large ---


def test_cohorts_have_64_to_128_sites() -> None:
    for sites in range(129, MAX_SITES + 1):
        sizes = cohort_sizes(sites)
        assert sum(sizes) == sites
        assert 64 <= sizes[-1] <= sizes[0] <= 128
        assert sizes[0] - sizes[-1] <= 1
        assert len(sizes) == -(-sites // 128)


def test_one_cohort_is_not_split() -> None:
    assert [cohort_sizes(sites) for sites in (3, 64, 128)] == [(3,), (64,), (128,)]


@given(st.integers(3, MAX_SITES), st.integers(3, MAX_SITES))
@settings(max_examples=50)
def test_the_smallest_and_the_largest_sum_are_those_of_some_round(one: int, other: int) -> None:
    size = RoundSize(min(one, other), max(one, other))
    sums = [each for sites in range(size.fewest, size.most + 1) for each in cohort_sizes(sites)]
    assert (size.smallest_sum, size.largest_sum) == (min(sums), max(sums))
    assert size.drawn == (size.most > 128)


# --- Who is with whom ---


@given(st.integers(129, MAX_SITES), st.integers(0, 2**32))
@settings(max_examples=25)
def test_every_site_is_in_one_cohort_and_the_draw_can_be_repeated(sites: int, seed: int) -> None:
    seeds = seeds_of(sites, str(seed))
    cohorts = cohorts_of(seeds)
    assert sorted(site for cohort in cohorts for site in cohort) == sorted(seeds)
    assert tuple(map(len, cohorts)) == cohort_sizes(sites)
    assert all(list(cohort) == sorted(cohort) for cohort in cohorts)
    assert cohorts_of(dict(reversed(seeds.items()))) == cohorts


def test_a_draw_is_pinned() -> None:
    """By SHA-256 of the labelled transcript and a name, as docs/protocol.md says; reckoned from the bytes."""
    import hashlib

    def enc(*parts: bytes) -> bytes:
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)

    def number(value: int) -> bytes:
        return value.to_bytes(8, "big")

    seeds = {"a": b"\1" * 32, "b": b"\2" * 32, "c": b"\3" * 32, "d": b"\4" * 32, "e": b"\5" * 32}
    listed = enc(*(enc(site.encode(), seed) for site, seed in seeds.items()))
    told = b"foedus/v1/" + enc(b"draw", PLAN, number(1), number(2), number(3), listed)
    revealed = hashlib.sha256(told).digest()
    keys = {s: hashlib.sha256(b"foedus/v1/" + enc(b"draw-order", revealed, s.encode())).digest() for s in seeds}
    order = sorted(seeds, key=keys.__getitem__)
    assert cohorts_of(seeds, largest=3) == (tuple(sorted(order[:3])), tuple(sorted(order[3:])))


@pytest.mark.parametrize("change", ["seed", "round_index", "attempt", "run_id"])
def test_everything_that_was_told_moves_sites(change: str) -> None:
    seeds = seeds_of(200)
    if change == "seed":
        assert cohorts_of(seeds) != cohorts_of({**seeds, "site-0007": bytes(32)})
    else:
        assert cohorts_of(seeds) != cohorts_of(seeds, **{change: 9})


def test_the_seed_of_one_site_makes_the_draw_uniform() -> None:
    """Five sites, three and two: whatever the others chose, each of the ten splits comes up equally often."""
    random = seeded("one honest site")
    fixed = {site: bytes([number]) * 32 for number, site in enumerate("bcde")}
    draws = 20_000
    counts = dict.fromkeys(combinations("abcde", 3), 0)
    for _ in range(draws):
        counts[cohorts_of({"a": random(32), **fixed}, largest=3)[0]] += 1  # type: ignore[index]
    chi_square = sum((count - draws / 10) ** 2 / (draws / 10) for count in counts.values())
    assert chi_square < 27.9  # nine degrees of freedom: one in a thousand is above; the seed is fixed


def test_a_commitment_is_good_for_one_site_and_attempt() -> None:
    told = {
        seed_commitment(run, round_, attempt, site, bytes(32))
        for run in (1, 2)
        for round_ in (1, 2)
        for attempt in (0, 1)
        for site in ("a", "b")
    }
    assert len(told) == 16


# --- Colluders ---


def test_the_chance_is_that_of_every_possible_draw() -> None:
    """Seven sites, cohorts of four and three: counted one by one for a site in either."""
    for together in range(1, 6):
        for colluding in range(together):
            worst = 0.0
            for companions in (3, 2):
                draws = list(combinations(range(6), companions))  # of the other six, the first are colluders
                met = sum(len([x for x in draw if x < together]) > colluding for draw in draws)
                worst = max(worst, met / len(draws))
            size = RoundSize(7, 7, largest_cohort=4)
            assert chance_of_more(colluding, together=together, size=size) == pytest.approx(worst)


def test_it_is_the_chance_of_the_worst_round_that_the_plan_allows() -> None:
    wide, fewest = RoundSize(300, 400), RoundSize(300, 300)
    assert chance_of_more(20, together=40, size=wide) >= chance_of_more(20, together=40, size=fewest) > 0
    assert chance_of_more(40, together=40, size=wide) == 0


def test_a_coordinator_that_may_leave_all_but_one_cohort_out_has_all_its_colluders_there() -> None:
    assert chance_of_more(9, together=10, size=RoundSize(3, 300)) == 1.0
    assert chance_of_more(9, together=10, size=RoundSize(128, 300)) == 1.0
    larger_half_of_255 = comb(127, 10) / comb(254, 10)
    assert chance_of_more(9, together=10, size=RoundSize(129, 300)) == pytest.approx(larger_half_of_255)
