"""Rounds whose cohorts are drawn: honest ones open their sums, and a coordinator that cheats is refused by name.

Most are played with cohorts of four, for the largest cohort is a number that sessions are made with; one is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.errors import DropReason, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_draw import Drawing, Drawn, DrawSession, DrawState
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession, Failed, Opened
from foedus_common.protocol.draw import MAX_DRAWS, RoundSize, cohort_sizes, drawn_cohorts, seed_commitment
from foedus_common.protocol.effects import Arrived, AttemptSeen, Deadline, Dropped, Effects, Persist, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Failed as SiteFailed
from foedus_common.protocol.site_stages import Outbox, SiteState
from foedus_common.protocol.thresholds import Member, PeerRule, Roster, thresholds

SITE = "site-003"
PLAN = bytes(range(32))


class Round:
    """A round of many sites with one vector each. `ask` plays the coordinator; `draw` and `sums` play an honest one."""

    def __init__(self, store, sites: int, size: RoundSize | None = None, attempt: int = 0) -> None:
        self.random = random.Random(sites).randbytes
        self.size = size or RoundSize(3, 16, largest_cohort=4)
        self.attempt = m.AttemptId(11, 2, attempt)
        self.names = tuple(f"site-{index:03}" for index in range(sites))
        self.keys = {site: Ed25519PrivateKey.from_private_bytes(self.random(32)) for site in self.names}
        members = {s: Member(key.public_key().public_bytes_raw(), f"org of {s}") for s, key in self.keys.items()}
        self.roster = Roster(7, self.random(32), members)
        layout = FieldLayout(21, self.size.largest_sum, ((3, 1.0),))
        hashes = [self.random(32) for _ in range(2)]
        self.terms = m.RoundTerms(
            *(*self.attempt[:2], 0, PLAN, *hashes, "trainer 1", layout, m.Noise(), self.size.smallest_sum, 1)
        )
        self.vectors = store
        self.integers = {site: np.full(3, number) for number, site in enumerate(self.names)}
        self.sessions = {
            site: SiteSession(
                site=site,
                sign=self.keys[site].sign,
                roster=self.roster,
                rule=PeerRule(),
                size=self.size,
                outbox=Outbox(self.terms, store.store(layout.pack(self.integers[site])), charged=True),
                vectors=store,
                random=self.random,
            )
            for site in self.names
        }
        self.states: dict[str, SiteState] = {site: session.begin() for site, session in self.sessions.items()}

    def alter(self, site: str, **changes: object) -> None:
        self.sessions[site] = replace(self.sessions[site], **changes)

    def alter_outbox(self, site: str, **changes: object) -> None:
        self.alter(site, outbox=replace(self.sessions[site].outbox, **changes))

    # --- Saying anything to anybody ---

    def step(self, site: str, request: bytes) -> Effects:
        self.states[site], effects = self.sessions[site].step(self.states[site], request)
        return effects

    def ask(self, site: str, sequence: int, message: m.ToSite, **header: object) -> m.FromSite:
        """What the site answers."""
        base = wire.Header(*self.attempt, PLAN, wire.COORDINATOR, site, sequence)
        effects = self.step(site, wire.build_envelope(replace(base, **header), message))
        (answer,) = [effect.envelope for effect in effects if isinstance(effect, Send)]
        return wire.parse_envelope(answer).message

    def refusal(self, site: str = SITE) -> Reason | None:
        stage = self.states[site].stage
        if not isinstance(stage, SiteFailed):
            return None
        assert isinstance(stage.error, RemoteError)
        return stage.error.reason

    # --- An honest coordinator ---

    def play(self, session: DrawSession | CoordinatorSession, silent_from: dict[str, int] | None = None):
        """To the session's end; gives its last state and everything that it asked for."""
        state, effects = session.begin()
        log = effects
        while isinstance(state, Drawing | Awaiting):
            sequence, requests = state.sequence, [effect for effect in effects if isinstance(effect, Send)]
            effects = ()
            for request in requests:
                if (silent_from or {}).get(request.destination, 99) > sequence:
                    for answer in self.step(request.destination, request.envelope):
                        if isinstance(answer, Send):
                            state, more = session.step(state, Arrived(request.destination, answer.envelope))
                            effects += more
            state, more = session.step(state, Deadline(sequence))
            effects += more
            log += effects
        return state, log

    def draw_session(self, sites: Collection[str] = ()) -> DrawSession:
        return DrawSession(self.terms, self.attempt.attempt, tuple(sites or self.names), self.size, self.roster)

    def draw(self) -> Drawn:
        state, _ = self.play(self.draw_session())
        assert isinstance(state, Drawn)
        return state

    def config(self, cohort: tuple[str, ...]) -> m.RoundConfig:
        limits = thresholds(len(cohort), 1)
        return m.RoundConfig(
            m.PROTOCOL_VERSION,
            self.terms,
            self.attempt.attempt,
            self.roster.epoch,
            self.roster.digest,
            cohort,
            limits.threshold,
            limits.minimum,
        )

    def cohort_session(self, cohort: tuple[str, ...], drawn: Drawn) -> CoordinatorSession:
        return CoordinatorSession(self.config(cohort), self.roster, self.vectors, drawn.seeds)

    def plain_sum(self, sites: Collection[str]) -> np.ndarray:
        return sum(self.integers[site] for site in sites) / self.terms.layout.half_range


@pytest.fixture
def make(federation) -> Callable[..., Round]:
    store = type(federation(3).vectors)
    return lambda sites, **options: Round(store(), sites, **options)


@pytest.fixture
def nine(make) -> Round:
    return make(9)


# --- Honest rounds ---


@pytest.mark.parametrize(("sites", "size"), [(9, None), (16, None), (130, RoundSize(129, 300))])
def test_each_cohort_opens_its_own_sum_without_its_dropouts(make, sites: int, size: RoundSize | None) -> None:
    round_ = make(sites, size=size)
    drawn = round_.draw()
    assert tuple(map(len, drawn.cohorts)) == cohort_sizes(sites, round_.size.largest_cohort)
    assert sorted(site for cohort in drawn.cohorts for site in cohort) == sorted(round_.names)
    for cohort in drawn.cohorts:
        silent = cohort[:1] if len(cohort) > 3 else ()
        opened, _ = round_.play(round_.cohort_session(cohort, drawn), dict.fromkeys(silent, 2))
        assert isinstance(opened, Opened)
        assert opened.survivors == cohort[len(silent) :]
        np.testing.assert_allclose(opened.total, round_.plain_sum(opened.survivors), atol=1e-12)


def test_a_cohort_that_fails_leaves_the_others_alone(nine: Round) -> None:
    drawn = nine.draw()
    first, *others = drawn.cohorts
    failed, _ = nine.play(nine.cohort_session(first, drawn), dict.fromkeys(first, 0))
    assert isinstance(failed, Failed)
    for cohort in others:
        assert isinstance(nine.play(nine.cohort_session(cohort, drawn))[0], Opened)


def test_the_attempt_is_on_disk_before_the_commitment_leaves_and_is_entered_once(nine: Round) -> None:
    header = wire.Header(*nine.attempt, PLAN, wire.COORDINATOR, SITE, 0)
    assert nine.step(SITE, wire.build_envelope(header, m.Draw()))[0] == Persist((AttemptSeen(nine.attempt),))
    drawn = make_draw(nine, told=True)
    effects = nine.step(SITE, next(e.envelope for e in opening_of(nine, drawn) if e.destination == SITE))
    assert not any(isinstance(effect, Persist) for effect in effects)


def make_draw(round_: Round, told: bool = False) -> Drawn:
    """told: SITE was asked to commit before; the same request gets the stored answer."""
    stage = round_.states[SITE].stage
    drawn = round_.draw()
    assert not told or stage.seed == dict(drawn.seeds)[SITE]
    return drawn


def opening_of(round_: Round, drawn: Drawn, site: str = SITE) -> tuple[Send, ...]:
    cohort = next(each for each in drawn.cohorts if site in each)
    _, effects = round_.cohort_session(cohort, drawn).begin()
    return tuple(effect for effect in effects if isinstance(effect, Send))


def test_a_request_of_the_draw_that_comes_again_gets_the_same_bytes(nine: Round) -> None:
    header = wire.Header(*nine.attempt, PLAN, wire.COORDINATOR, SITE, 0)
    request = wire.build_envelope(header, m.Draw())
    first, again = nine.step(SITE, request), nine.step(SITE, request)
    assert first[-1:] == again


def test_the_draw_enters_every_key(nine: Round) -> None:
    drawn = nine.draw()
    sessions = [nine.cohort_session(drawn.cohorts[0], replace(drawn, seeds=drawn.seeds[:count])) for count in (9, 8)]
    assert sessions[0].ctx != sessions[1].ctx


# --- The coordinator's own side ---


def test_a_site_that_does_not_commit_is_not_in_the_draw(nine: Round) -> None:
    drawn, effects = nine.play(nine.draw_session(), {SITE: 0})
    assert isinstance(drawn, Drawn)
    assert SITE not in dict(drawn.seeds)
    assert [(e.site, e.reason) for e in effects if isinstance(e, Dropped)] == [(SITE, DropReason.DEADLINE)]


def test_a_site_that_keeps_its_seed_back_ends_the_attempt_and_is_named(nine: Round) -> None:
    failed, _ = nine.play(nine.draw_session(), {SITE: 1})
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, RemoteError)
    assert (failed.error.reason, failed.error.suspects) == (Reason.TOO_FEW_SITES, (SITE,))


def test_a_site_that_reveals_another_seed_ends_the_attempt(nine: Round) -> None:
    session = nine.draw_session()
    state: DrawState
    state, effects = session.begin()
    for sequence, message in enumerate((m.Commitment, m.Seed)):
        for request in [effect for effect in effects if isinstance(effect, Send)]:
            site, asked = request.destination, wire.parse_envelope(request.envelope).header
            header = replace(asked, source=site, destination=wire.COORDINATOR)
            lie = wire.build_envelope(header, message(bytes(32)), nine.keys[site].sign)
            state, more = session.step(state, Arrived(site, lie))
            effects = more or effects
        assert isinstance(state, Failed if sequence else Drawing)
    assert isinstance(state, Failed)
    assert isinstance(state.error, RemoteError)
    assert state.error.suspects == nine.names


def test_a_draw_of_too_few_is_not_held(nine: Round) -> None:
    failed, _ = nine.play(nine.draw_session(), dict.fromkeys(nine.names[4:], 0))
    assert isinstance(failed, Failed)
    assert "4 sites are left for a draw, and 5 are needed" in str(failed.error)


def test_answers_that_are_not_signed_or_belong_elsewhere_drop_the_site(nine: Round) -> None:
    session = nine.draw_session()
    state, _ = session.begin()
    header = wire.Header(*nine.attempt, PLAN, SITE, wire.COORDINATOR, 0)
    message = m.Commitment(bytes(32))
    for envelope in (
        wire.build_envelope(header, message, nine.keys["site-000"].sign),
        wire.build_envelope(replace(header, attempt=1), message, nine.keys[SITE].sign),
        wire.build_envelope(header, m.Seed(bytes(32)), nine.keys[SITE].sign),
        wire.build_envelope(header, m.Declined(), nine.keys[SITE].sign),
    ):
        after, effects = session.step(state, Arrived(SITE, envelope))
        assert isinstance(after, Drawing)
        assert SITE not in after.waiting | set(after.told)
        assert any(isinstance(effect, Dropped) for effect in effects)


# --- A coordinator that cheats ---


@dataclass
class Committed:
    """SITE and everybody else committed; the coordinator has not shown anything yet."""

    round: Round
    commitments: dict[str, bytes]

    def seeds(self) -> dict[str, bytes]:
        """What the sites have committed to, as only they know."""
        return {site: state.stage.seed for site, state in self.round.states.items()}  # type: ignore[union-attr]

    def show(self, commitments: dict[str, bytes], site: str = SITE) -> m.FromSite:
        return self.round.ask(site, 1, m.Commitments(tuple(sorted(commitments.items()))))


@pytest.fixture
def committed(nine: Round) -> Committed:
    answers = {site: nine.ask(site, 0, m.Draw()) for site in nine.names}
    return Committed(nine, {s: answer.commitment for s, answer in answers.items() if isinstance(answer, m.Commitment)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({SITE: None}, Reason.SEED_ALTERED),
        ({SITE: bytes(32)}, Reason.SEED_ALTERED),
        ({"ghost": bytes(32)}, Reason.UNKNOWN_SITE),
        (dict.fromkeys(["site-004", "site-005", "site-006", "site-007", "site-008"]), Reason.COHORT_SIZE),
    ],
    ids=["own commitment withheld", "own commitment altered", "a stranger", "so few that they are one cohort"],
)
def test_a_false_list_of_commitments(committed: Committed, change: dict[str, bytes | None], reason: Reason) -> None:
    shown = {site: told for site, told in (committed.commitments | change).items() if told is not None}
    assert committed.show(shown) == m.Declined()
    assert committed.round.refusal() == reason


def test_a_draw_of_fewer_or_more_sites_than_the_plan_allows(make) -> None:
    for size in (RoundSize(10, 16, 4), RoundSize(3, 8, 4)):
        round_ = make(9, size=size)
        commitments = {}
        for site in round_.names:
            answer = round_.ask(site, 0, m.Draw())
            assert isinstance(answer, m.Commitment)
            commitments[site] = answer.commitment
        Committed(round_, commitments).show(commitments)
        assert round_.refusal() == Reason.COHORT_SIZE


def test_a_second_list_of_commitments(committed: Committed) -> None:
    """Once a seed is told, it counts for one draw: another list is refused in the same sequence and in the next."""
    assert isinstance(committed.show(committed.commitments), m.Seed)
    other = committed.commitments | {"site-008": seed_commitment(*committed.round.attempt, "site-008", bytes(32))}
    assert committed.show(other) == m.Declined()
    assert committed.round.refusal() == Reason.SEQUENCE_REUSED


def test_a_second_list_in_the_next_sequence(committed: Committed) -> None:
    committed.show(committed.commitments)
    request = m.Commitments(tuple(sorted(committed.commitments.items())))
    assert committed.round.ask(SITE, 2, request) == m.Declined()
    assert committed.round.refusal() == Reason.WRONG_STAGE


@dataclass
class Revealed:
    """Every site revealed its seed for the same list."""

    round: Round
    drawn: Drawn

    @property
    def cohort(self) -> tuple[str, ...]:
        return next(cohort for cohort in self.drawn.cohorts if SITE in cohort)

    def open(self, cohort: tuple[str, ...], seeds: dict[str, bytes] | None = None, **header: object) -> m.FromSite:
        told = tuple(sorted((seeds or dict(self.drawn.seeds)).items()))
        return self.round.ask(SITE, 2, m.DrawnConfig(self.round.config(cohort), told), **header)


@pytest.fixture
def revealed(nine: Round) -> Revealed:
    return Revealed(nine, nine.draw())


def test_an_honest_opening_is_answered_with_keys(revealed: Revealed) -> None:
    assert isinstance(revealed.open(revealed.cohort), m.Advertise)


def test_no_cohort_but_the_drawn_one_is_accepted(nine: Round) -> None:
    """Of all cohorts of three or four with this site in it, whatever sizes: one."""
    drawn = nine.draw()
    before, accepted = nine.states[SITE], []
    others = [site for site in nine.names if site != SITE]
    for companions in (companions for count in (2, 3) for companions in combinations(others, count)):
        cohort = tuple(sorted((*companions, SITE)))
        nine.states[SITE] = before
        if isinstance(Revealed(nine, drawn).open(cohort), m.Advertise):
            accepted.append(cohort)
        else:
            assert nine.refusal() == Reason.COHORT_NOT_DRAWN
    assert accepted == [next(cohort for cohort in drawn.cohorts if SITE in cohort)]


def test_one_site_put_into_another_cohort(revealed: Revealed) -> None:
    other = next(cohort for cohort in revealed.drawn.cohorts if SITE not in cohort)
    assert revealed.open(tuple(sorted((*other[1:], SITE)))) == m.Declined()
    assert revealed.round.refusal() == Reason.COHORT_NOT_DRAWN


def test_a_cohort_that_this_site_is_not_in(revealed: Revealed) -> None:
    revealed.open(next(cohort for cohort in revealed.drawn.cohorts if SITE not in cohort))
    assert revealed.round.refusal() == Reason.COHORT_NOT_DRAWN


@pytest.mark.parametrize("whose", [SITE, "site-008"])
def test_a_seed_changed_after_the_commitment(revealed: Revealed, whose: str) -> None:
    revealed.open(revealed.cohort, dict(revealed.drawn.seeds) | {whose: bytes(32)})
    assert revealed.round.refusal() == Reason.SEED_ALTERED


def test_a_seed_left_out_and_one_put_in(revealed: Revealed) -> None:
    before = revealed.round.states[SITE]
    seeds = dict(revealed.drawn.seeds)
    for told in ({s: seed for s, seed in seeds.items() if s != "site-008"}, seeds | {"ghost": bytes(32)}):
        revealed.round.states[SITE] = before
        revealed.open(revealed.cohort, told)
        assert revealed.round.refusal() == Reason.SEED_ALTERED


def test_two_partitions_shown_to_two_sites(make) -> None:
    """Of one draw a second one is refused. Two draws that put the same three sites together have different contexts,
    and sites that saw different ones do not accept each other's keys."""
    round_ = make(6, size=RoundSize(3, 16, 5))
    own = {site: round_.ask(site, 0, m.Draw()).commitment for site in round_.names}  # type: ignore[union-attr]
    seeds = {site: state.stage.seed for site, state in round_.states.items()}
    cohort = _own(round_, "site-000", seeds)
    other = next(site for site in cohort if site != "site-000")
    liar = next(site for site in round_.names if site not in cohort)
    lies = (seeds | {liar: number.to_bytes(32, "big")} for number in range(10_000))  # until the same three meet again
    shown = {"site-000": seeds, other: next(told for told in lies if _own(round_, other, told) == cohort)}
    envelopes = {}
    for site, told in shown.items():
        commitments = own | {liar: seed_commitment(*round_.attempt, liar, told[liar])}
        round_.ask(site, 1, m.Commitments(tuple(sorted(commitments.items()))))
        opening = m.DrawnConfig(round_.config(cohort), tuple(sorted(told.items())))
        header = wire.Header(*round_.attempt, PLAN, wire.COORDINATOR, site, 2)
        (answer,) = [e.envelope for e in round_.step(site, wire.build_envelope(header, opening)) if isinstance(e, Send)]
        envelopes[site] = answer
    ctx = wire.parse_envelope(envelopes["site-000"]).header.binding
    assert ctx != wire.parse_envelope(envelopes[other]).header.binding
    round_.ask("site-000", 3, m.PeerKeys(tuple(envelopes.values())), binding=ctx)
    assert round_.refusal("site-000") == Reason.CONFIG_MISMATCH


def _own(round_: Round, site: str, seeds: dict[str, bytes]) -> tuple[str, ...]:
    cohorts = drawn_cohorts(PLAN, *round_.attempt, seeds, round_.size.largest_cohort)
    return next(cohort for cohort in cohorts if site in cohort)


@pytest.mark.parametrize("now", [(11, 2, 1), (11, 3, 0)], ids=["the next attempt", "the next round"])
def test_what_was_told_in_a_draw_counts_for_no_other(nine: Round, now: tuple[int, int, int]) -> None:
    """Commitments and seeds of an earlier draw, shown again: the site's own is missed at once; that of another site,
    which cannot be told from a new one, when it is to be opened."""
    seeds, begun = nine.draw().seeds, frozenset({nine.attempt})
    earlier = {site: seed_commitment(*nine.attempt, site, seed) for site, seed in seeds}
    nine.attempt = m.AttemptId(*now)
    nine.alter_outbox(SITE, terms=replace(nine.terms, round=nine.attempt.round), attempts_seen=begun)
    nine.states[SITE] = nine.sessions[SITE].begin()
    answer = nine.ask(SITE, 0, m.Draw())
    assert isinstance(answer, m.Commitment)
    before = nine.states[SITE]
    assert nine.ask(SITE, 1, m.Commitments(tuple(sorted(earlier.items())))) == m.Declined()
    assert nine.refusal() == Reason.SEED_ALTERED
    nine.states[SITE] = before
    told = nine.ask(SITE, 1, m.Commitments(tuple(sorted((earlier | {SITE: answer.commitment}).items()))))
    assert isinstance(told, m.Seed)
    assert told.seed != dict(seeds)[SITE]
    shown = dict(seeds) | {SITE: told.seed}
    cohort = _own(nine, SITE, shown)
    nine.ask(SITE, 2, m.DrawnConfig(nine.config(cohort), tuple(sorted(shown.items()))))
    assert nine.refusal() == Reason.SEED_ALTERED


def test_who_commits_last_cannot_reveal_what_another_committed_to(committed: Committed) -> None:
    """A colluder that repeats the site's own commitment has nothing to open it with: it is good for one name."""
    commitments = committed.commitments | {"site-008": committed.commitments[SITE]}
    seeds = committed.seeds()
    assert isinstance(committed.show(commitments), m.Seed)
    for told in (seeds, seeds | {"site-008": seeds[SITE]}):
        before = committed.round.states[SITE]
        cohort = _own(committed.round, SITE, told)
        request = m.DrawnConfig(committed.round.config(cohort), tuple(sorted(told.items())))
        assert committed.round.ask(SITE, 2, request) == m.Declined()
        assert committed.round.refusal() == Reason.SEED_ALTERED
        committed.round.states[SITE] = before


def test_seeds_chosen_after_everybody_else_told_theirs_do_not_help(make) -> None:
    """The coordinator has the other sites reveal for one list. Then it shows this site another, with such seeds of two
    colluders as would put them beside it, if it drew the seed again that it told last. They meet as often as chance
    has it: both are among its two companions out of five in a tenth of all draws."""
    round_ = make(6, size=RoundSize(3, 16, 3))
    colluders, guess = ("site-001", "site-002"), bytes(32)
    before, draws, met = round_.states[SITE], 600, 0
    for _ in range(draws):
        round_.states[SITE] = before
        answer = round_.ask(SITE, 0, m.Draw())
        assert isinstance(answer, m.Commitment)
        others = {site: round_.random(32) for site in round_.names if site != SITE}
        tries = (others | {colluder: round_.random(32) for colluder in colluders} for _ in range(50))
        seeds = next((each for each in tries if _beside(round_, each | {SITE: guess}, colluders)), others)
        shown = {site: seed_commitment(*round_.attempt, site, seed) for site, seed in seeds.items()}
        told = round_.ask(SITE, 1, m.Commitments(tuple(sorted((shown | {SITE: answer.commitment}).items()))))
        assert isinstance(told, m.Seed)
        guess = told.seed
        met += _beside(round_, seeds | {SITE: guess}, colluders)
    assert abs(met - draws / 10) < 3.3 * (draws * 0.1 * 0.9) ** 0.5  # one in a thousand is further off


def _beside(round_: Round, seeds: dict[str, bytes], colluders: Collection[str]) -> bool:
    return set(colluders) < set(_own(round_, SITE, seeds))


def test_sites_shown_different_epochs_of_the_roster_do_not_accept_each_other_s_keys(nine: Round) -> None:
    """One draw, and A0 with the epoch that each of two sites knows: nobody refuses that, and they do not get together.
    Whom only the older roster lists is unknown to the other at once."""
    drawn = nine.draw()
    cohort = next(cohort for cohort in drawn.cohorts if SITE in cohort)
    other = next(site for site in cohort if site != SITE)
    older = replace(nine.roster, epoch=6, digest=bytes(32))
    nine.alter(other, roster=older)
    envelopes = {}
    for site, roster in ((SITE, nine.roster), (other, older)):
        config = replace(nine.config(cohort), roster_epoch=roster.epoch, roster_digest=roster.digest)
        header = wire.Header(*nine.attempt, PLAN, wire.COORDINATOR, site, 2)
        request = wire.build_envelope(header, m.DrawnConfig(config, drawn.seeds))
        (envelopes[site],) = [effect.envelope for effect in nine.step(site, request) if isinstance(effect, Send)]
    ctx = wire.parse_envelope(envelopes[SITE]).header.binding
    nine.ask(SITE, 3, m.PeerKeys(tuple(envelopes[site] for site in sorted(envelopes))), binding=ctx)
    assert nine.refusal() == Reason.CONFIG_MISMATCH


def test_a_site_that_a_newer_roster_does_not_list_is_in_no_draw(committed: Committed) -> None:
    members = {name: member for name, member in committed.round.roster.members.items() if name != "site-008"}
    committed.round.alter(SITE, roster=Roster(8, bytes(32), members))
    assert committed.show(committed.commitments) == m.Declined()
    assert committed.round.refusal() == Reason.UNKNOWN_SITE


# --- Who may draw at all, and how often ---


def test_a_large_round_cannot_do_without_a_draw(make) -> None:
    """Where the plan's rounds are larger than a cohort, a cohort that was not drawn is refused, whatever its size."""
    size = RoundSize(5, 16, largest_cohort=4)
    for count in (3, 4, 5, 9):
        round_ = make(9, size=size)
        round_.ask(SITE, 0, round_.config(round_.names[:count] if count > 3 else round_.names[1:4]))
        assert round_.refusal() == Reason.COHORT_SIZE


def test_an_undrawn_cohort_is_within_the_plan_where_rounds_may_be_small(nine: Round) -> None:
    assert isinstance(nine.ask(SITE, 0, nine.config(nine.names[:4])), m.Advertise)


def test_a_round_that_is_one_cohort_is_not_drawn(make) -> None:
    round_ = make(9, size=RoundSize(3, 16, largest_cohort=16))
    assert round_.ask(SITE, 0, m.Draw()) == m.Declined()
    assert round_.refusal() == Reason.COHORT_SIZE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attempts_seen": frozenset({m.AttemptId(11, 2, 0)})}, Reason.ROUND_REUSED),
        ({"masked_in": m.AttemptId(11, 2, 5)}, Reason.VECTOR_REUSED),
        ({"charged": False}, Reason.BUDGET),
        ({"attempts_seen": frozenset(m.AttemptId(11, 2, n + 1) for n in range(MAX_DRAWS))}, Reason.DRAWS_EXHAUSTED),
    ],
)
def test_an_attempt_that_may_not_be_begun(nine: Round, changes: dict[str, object], reason: Reason) -> None:
    nine.alter_outbox(SITE, **changes)
    assert nine.ask(SITE, 0, m.Draw()) == m.Declined()
    assert nine.refusal() == reason


def test_the_last_draw_that_is_allowed(nine: Round) -> None:
    seen = frozenset(m.AttemptId(11, 2, number + 1) for number in range(MAX_DRAWS - 1))
    nine.alter_outbox(SITE, attempts_seen=seen)
    assert isinstance(nine.ask(SITE, 0, m.Draw()), m.Commitment)


@pytest.mark.parametrize("change", [{"round": 3}, {"run_id": 12}, {"binding": bytes(32)}])
def test_a_draw_for_another_round(nine: Round, change: dict[str, object]) -> None:
    nine.ask(SITE, 0, m.Draw(), **change)
    assert nine.refusal() == Reason.CONFIG_MISMATCH


@pytest.mark.parametrize("change", [{"attempt": 1}, {"round": 3}, {"binding": bytes(32)}])
def test_requests_of_another_attempt_in_the_midst_of_a_draw(nine: Round, change: dict[str, object]) -> None:
    drawn = nine.draw()
    before = nine.states[SITE]
    Revealed(nine, drawn).open(Revealed(nine, drawn).cohort, **change)
    assert nine.refusal() == Reason.CONFIG_MISMATCH
    nine.states[SITE] = before
    other = replace(nine.config(Revealed(nine, drawn).cohort), attempt=1)
    nine.ask(SITE, 2, m.DrawnConfig(other, drawn.seeds))
    assert nine.refusal() == Reason.CONFIG_MISMATCH


@pytest.mark.parametrize("change", [{"attempt": 1}, {"binding": bytes(32)}])
def test_commitments_of_another_attempt(committed: Committed, change: dict[str, object]) -> None:
    request = m.Commitments(tuple(sorted(committed.commitments.items())))
    committed.round.ask(SITE, 1, request, **change)
    assert committed.round.refusal() == Reason.CONFIG_MISMATCH


def test_a_draw_is_neither_skipped_nor_cut_short(nine: Round, committed: Committed) -> None:
    before = committed.round.states[SITE]
    for sequence, message in (
        (1, committed.round.config(committed.round.names[:4])),
        (1, m.DrawnConfig(committed.round.config(committed.round.names[:4]), ())),
        (1, m.Draw()),
    ):
        committed.round.states[SITE] = before
        assert committed.round.ask(SITE, sequence, message) == m.Declined()
        assert committed.round.refusal() == Reason.WRONG_STAGE


def test_a_drawn_cohort_is_checked_like_any_other(revealed: Revealed) -> None:
    """Thresholds, peers and terms: a lie about them is refused under its own name."""
    before, honest, seeds = revealed.round.states[SITE], revealed.round.config(revealed.cohort), revealed.drawn.seeds
    lies = [
        (replace(honest, threshold=1), Reason.THRESHOLD_TOO_LOW),
        (replace(honest, roster_epoch=6), Reason.CONFIG_MISMATCH),
        (replace(honest, terms=replace(honest.terms, adapter_hash=bytes(32))), Reason.CONFIG_MISMATCH),
        (replace(honest, terms=replace(honest.terms, min_sites=1)), Reason.CONFIG_MISMATCH),
    ]
    for config, reason in lies:
        revealed.round.states[SITE] = before
        revealed.round.ask(SITE, 2, m.DrawnConfig(config, seeds))
        assert revealed.round.refusal() == reason
    revealed.round.states[SITE] = before
    absent = next(site for site in revealed.round.names if site not in revealed.cohort)
    revealed.round.alter(SITE, rule=PeerRule(frozenset({f"org of {absent}"}), 1))
    revealed.open(revealed.cohort)
    assert revealed.round.refusal() == Reason.COHORT_LACKS_PEERS
    revealed.round.states[SITE] = before
    one_owner = {s: replace_organisation(member, s) for s, member in revealed.round.roster.members.items()}
    revealed.round.alter(SITE, rule=PeerRule(), roster=replace(revealed.round.roster, members=one_owner))
    revealed.open(revealed.cohort)  # sybils, each of them signed by the root
    assert revealed.round.refusal() == Reason.TOO_FEW_SITES


def replace_organisation(member: Member, site: str) -> Member:
    return member if site == SITE else member._replace(organisation="Sybil Inc")


def test_seeds_are_kept_out_of_every_repr(committed: Committed) -> None:
    stage = committed.round.states[SITE].stage
    assert repr(committed.seeds()[SITE]) not in repr(stage)
