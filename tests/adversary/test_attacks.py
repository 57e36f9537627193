"""Every attack of the table against real sites over the real link; and the opening attack fed with what suffices."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import numpy as np
import pytest

from attacks import ATTACKS, WITHOUT_VICTIM, Attack, Draw, oversized, two_groups, without
from cheating import HONEST, MOLES, POLICY, SECONDS, VICTIM, Attempt, Cheat, Federation, reason_of
from foedus_common.canonical import labelled
from foedus_common.errors import Reason
from foedus_common.identity import SignedPlan
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.draw import MAX_DRAWS
from foedus_common.protocol.site_stages import Agreed, DealtShares
from foedus_common.ranges import counted_sites
from foedus_simulations.parties import until
from known_sites import WITH_DP
from opening import Exchange
from verdict import judge

RUNS = count(100)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("federation"))
    yield made
    made.close()


@pytest.fixture
def cheat(federation: Federation) -> Iterator[Cheat]:
    made = Cheat(federation, next(RUNS))
    yield made
    made.close()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_attack_is_refused_by_name_and_opens_nothing(cheat: Cheat, attack: Attack) -> None:
    verdict = judge(cheat, attack)
    assert verdict.named == attack.refused
    assert verdict.dead
    assert verdict.opened == []


def test_a_frame_too_large_ends_the_connection_and_not_the_round(cheat: Cheat) -> None:
    """No answer, no session that hangs: the body is never read. The site comes back and the attempt goes on."""
    cheat.begin()
    attempt = cheat.attempt()
    attempt.reach(2)
    since = cheat.federation.link.connected()[VICTIM]
    oversized(cheat, 1 << 20)
    until(lambda: cheat.federation.link.connected().get(VICTIM, since) != since, SECONDS, "a new connection")
    attempt.reach(5)
    assert cheat.open().vectors == {}


def test_a_plan_for_a_task_that_is_unknown_here_is_declined_in_a_sentence(cheat: Cheat) -> None:
    """As a coordinator of a newer release would send it, properly signed."""
    plan = cheat.signed.canonical.replace(b"text-classification", b"text-translation")
    key = cheat.federation.operator.home.plan_key()
    signed = SignedPlan(plan, key.sign(labelled("signed-plan", plan)))
    assert cheat.propose(VICTIM, signed=signed) == m.Declined()
    assert re.search(
        r"'kind' in .* is 'text-translation', but must be one of 'text-classification'",
        str(cheat.federation.refusals.errors[-1]),
    )


def test_a_site_that_withdraws_sends_nothing_more(cheat: Cheat) -> None:
    """Also in an attempt that is under way, whatever the coordinator asks for."""
    cheat.begin()
    attempt = cheat.attempt()
    attempt.reach(2)
    store = cheat.federation.sites[VICTIM]._store
    store.decide_plan(cheat.agreed.digest(), "withdrawn", by="ada")
    survivors = attempt.reach(3)
    assert VICTIM not in survivors
    assert cheat.stage(VICTIM) is None
    vector = store.outbox(cheat.run_id, 0)
    assert vector is not None
    assert vector.masked_in is None


def test_neither_a_restart_nor_another_vector_gives_a_coordinator_more_draws(cheat: Cheat) -> None:
    """Draws are counted by round, on disk: whichever of its vectors a site would be drawn with."""
    cheat.begin()
    for attempt in range(MAX_DRAWS - 1):
        assert VICTIM in Draw(cheat, attempt, only=[VICTIM]).commitments
    cheat.federation.restart(VICTIM)
    first = cheat.federation.known(VICTIM, cheat.run_id, 0)
    cheat.attempt(cheat.config(attempt=MAX_DRAWS - 1)).reach(3)
    assert cheat.invite(VICTIM, attempt=MAX_DRAWS) == m.Ready()
    assert not np.array_equal(cheat.federation.known(VICTIM, cheat.run_id, 0), first)
    assert VICTIM not in Draw(cheat, MAX_DRAWS, only=[VICTIM]).commitments
    assert reason_of(cheat.federation.refusals.errors[-1]) == Reason.DRAWS_EXHAUSTED


# --- Honest rounds open their sum and nothing else ---


def total(cheat: Cheat, sites: tuple[str, ...], round_: int = 0) -> np.ndarray:
    return sum(cheat.federation.known(site, cheat.run_id, round_) for site in sites if site not in MOLES)


def test_an_honest_round_opens_its_sum_and_no_vector(cheat: Cheat) -> None:
    cheat.begin()
    cheat.attempt().reach(5)
    opened = cheat.open()
    assert opened.vectors == {}
    assert list(opened.sums) == [HONEST]
    np.testing.assert_array_equal(opened.sums[HONEST], total(cheat, HONEST))


def test_a_dropped_site_s_late_vector_stays_closed(cheat: Cheat) -> None:
    """The victim delivered, is called a dropout, and its mask key is put together: its own seed still covers it."""
    cheat.begin()
    attempt = cheat.attempt()
    attempt.reach(3)
    signatures = {}
    for site in WITHOUT_VICTIM:
        answer = attempt.ask(site, 3, m.Survivors(WITHOUT_VICTIM))
        assert isinstance(answer, m.Consistency)
        signatures[site] = answer.signature
    for site in WITHOUT_VICTIM:
        assert isinstance(attempt.ask(site, 4, m.Agreement(tuple(signatures.items()))), m.Unmask)
    opened = cheat.open()
    assert opened.vectors == {}
    np.testing.assert_array_equal(opened.sums[without(HONEST, VICTIM)], total(cheat, WITHOUT_VICTIM))


def test_the_sums_of_a_round_that_is_trained_again_do_not_subtract(cheat: Cheat) -> None:
    """The only way to a second sum of a round is fresh training, fresh noise and a fresh charge at every site."""
    cheat.begin()
    cheat.attempt().reach(5)
    for site in HONEST:
        assert cheat.invite(site, attempt=1) == m.Ready()
    cheat.attempt(cheat.config(attempt=1)).reach(5)
    opened = cheat.open()
    assert opened.vectors == {}
    np.testing.assert_array_equal(opened.sums[HONEST], total(cheat, HONEST))


def test_an_organisation_with_most_of_the_sites_opens_the_sum_of_the_others_and_no_vector(cheat: Cheat) -> None:
    """Four colluding sites of six are one organisation, and the plan withstands one: all six have to sign."""
    cheat.begin()
    attempt = cheat.attempt(cheat.config((VICTIM, "bravo", *MOLES)))
    attempt.reach(4)
    assert (cheat.open().vectors, cheat.open().sums) == ({}, {})
    attempt.reach(5)
    opened = cheat.open()
    assert opened.vectors == {}
    assert list(opened.sums) == [(VICTIM, "bravo")]


def test_no_site_joins_a_cohort_with_less_honest_noise_than_the_plan_counts(federation: Federation) -> None:
    """In rounds of one step the noise of three honest sites counts; a cohort of five, three of one organisation, has
    that of two. With one site of each organisation it is joined."""
    phase = {**WITH_DP, "steps": 1, "rounds": 2}
    secure = {"min_sites": 5, "max_sites": 6, "colluding": 1, "field_bits": 32, "retries": 2}
    cheat = Cheat(federation, next(RUNS), phase=[phase], secure_aggregation=secure)
    assert counted_sites(cheat.agreed, 0) == 3
    cheat.begin()
    cheat.attempt(cheat.config((VICTIM, "bravo", *MOLES[:3]))).reach(1, silent=("bravo", *MOLES))
    error = federation.refusals.errors[-1]
    assert (reason_of(error), "noise of 2 honest" in str(error)) == (Reason.COHORT_SIZE, True)
    cheat.attempt(cheat.config(attempt=1)).reach(5)
    assert list(cheat.open().sums) == [HONEST]
    cheat.close()


# --- What would suffice does suffice ---


def test_both_kinds_of_share_of_t_sites_would_open_a_vector(cheat: Cheat) -> None:
    """Break into the sites, take what they would never send, and the attack opens the victim's vector."""
    cheat.begin()
    attempt = cheat.attempt()
    attempt.reach(4)
    stages: dict[str, Agreed] = {site: cheat.stage(site) for site in HONEST}
    attempt.reach(5)
    assert cheat.open().vectors == {}
    stolen = [_stolen(attempt, site, stages[site].dealt) for site in HONEST]
    assert cheat.open(*stolen[:1]).vectors == {}
    assert (VICTIM, 0) in cheat.open(*stolen).vectors


def _stolen(attempt: Attempt, site: str, dealt: dict[str, DealtShares]) -> Exchange:
    """As if the site had answered for the other kind, too: the share of every mask key."""
    request = attempt.request(site, 4, m.Agreement(()))
    header = replace(wire.parse_envelope(request).header, source=site, destination=wire.COORDINATOR)
    answer = m.Unmask(tuple(shares.pair_key for shares in dealt.values()))
    return Exchange(site, request, wire.build_envelope(header, answer, lambda _: bytes(64)))


def test_the_keys_of_sealed_shares_would_open_every_vector(cheat: Cheat) -> None:
    cheat.begin()
    attempt = cheat.attempt()
    attempt.reach(1)
    keys = [cheat.stage(site).share_keys.private for site in HONEST]
    attempt.reach(3)
    assert cheat.open(private_keys=keys[:2]).vectors == {}
    assert {site for site, _ in cheat.open(private_keys=keys).vectors} == set(HONEST)


def test_a_plan_that_expects_no_colluder_would_open_to_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    """With c = 0 three of five sites suffice, so the colluder can sign with two groups: one gives shares of the
    victim's seed, the other of its key. Site policy asks for c of at least 1 unless it is told otherwise."""
    policy = replace(POLICY, colluding=0)
    federation = Federation(tmp_path_factory.mktemp("gullible"), policy=policy)
    cheat = Cheat(federation, next(RUNS), secure_aggregation__colluding=0)
    cheat.begin()
    two_groups(cheat)
    assert set(cheat.open().vectors) == {(VICTIM, 0)}
    cheat.close()
    federation.close()


def test_sites_restored_without_their_marks_would_open_the_victim_s_vector(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whole machines set back, high-water marks and all: two sums of the same vectors, and their difference."""
    federation = Federation(tmp_path_factory.mktemp("set-back"))
    cheat = Cheat(federation, next(RUNS))
    cheat.begin()
    for site in HONEST:
        federation.stop(site)
    shutil.copytree(federation.folder, federation.folder.with_name("copy"))
    for site in HONEST:
        federation.start(site)
    cheat.attempt().reach(5)
    for site in HONEST:
        federation.stop(site)
    for name in (*HONEST, "state"):
        shutil.rmtree(federation.folder / name)
        shutil.copytree(federation.folder.with_name("copy") / name, federation.folder / name)
    for site in HONEST:
        federation.start(site)
    attempt = cheat.attempt(cheat.config(attempt=1))
    attempt.reach(2)
    attempt.reach(5, silent=[VICTIM])
    assert set(cheat.open().vectors) == {(VICTIM, 0)}
    cheat.close()
    federation.close()
