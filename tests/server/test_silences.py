"""Whom a coordinator leaves out of draws, and for how long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from foedus_server.silences import Silences

CHAIN, OTHERS = tuple(f"branch-{number}" for number in range(5)), ("clinic", "practice")
SITES = (*CHAIN, *OTHERS)
ORGANISATIONS = dict.fromkeys(CHAIN, "clinic") | {"clinic": "Clinic Inc", "practice": "Practice Inc"}
"""The chain's name is that of a site of somebody else's."""


def asked(silences: Silences, round_index: int) -> tuple[str, ...]:
    return silences.without(SITES, round_index, ORGANISATIONS)


def test_a_silence_costs_a_site_its_round_and_a_second_one_the_next_as_well() -> None:
    silences = Silences()
    away = []
    for index in range(16):
        if "clinic" in asked(silences, index):
            silences.note(["clinic"], index, ORGANISATIONS)
            away.append(index)
        assert set(SITES) - set(asked(silences, index)) == {"clinic"}
    assert away == [0, 1, 3, 7, 15]


def test_an_organisation_whose_sites_spoil_two_draws_of_a_round_is_left_out_of_it() -> None:
    silences = Silences()
    silences.note(CHAIN[:2], 3, ORGANISATIONS)  # in one draw: a line was down
    assert asked(silences, 3) == (*CHAIN[2:], *OTHERS)
    silences.note([CHAIN[2], "practice"], 3, ORGANISATIONS)
    assert asked(silences, 3) == ("clinic",)
    assert asked(silences, 4) == SITES


def test_one_silence_in_each_of_many_rounds_is_no_organisation_s() -> None:
    silences = Silences()
    for index, site in enumerate(CHAIN):
        silences.note([site], index, ORGANISATIONS)
    assert asked(silences, len(CHAIN) - 1) == (*CHAIN[:-1], *OTHERS)


def test_who_is_forgiven_is_asked_and_his_silences_still_count() -> None:
    silences = Silences()
    silences.note(["clinic"], 0, ORGANISATIONS)
    silences.forgive()
    assert asked(silences, 0) == SITES
    silences.note(["clinic"], 0, ORGANISATIONS)
    assert asked(silences, 1) == tuple(site for site in SITES if site != "clinic")


@given(st.sets(st.sampled_from(SITES), min_size=1), st.data())
def test_organisations_spoil_two_draws_of_a_round_each_at_most(colluders: set[str], data: st.DataObject) -> None:
    """Sites that spoil whenever they are asked, one or several at a time, in an order that they choose."""
    silences, spoilt = Silences(), 0
    while spoilers := [site for site in asked(silences, 0) if site in colluders]:
        chosen = data.draw(st.lists(st.sampled_from(spoilers), min_size=1, unique=True))
        silences.note(chosen, 0, ORGANISATIONS)
        spoilt += 1
    assert spoilt <= 2 * len({ORGANISATIONS[site] for site in colluders})
