"""The attacks, one function each: what the coordinator does, and which site it does it to.

Each is played against real sites on a run of its own and ends with the request that has to be refused. `ATTACKS` is the
table: what it is called, the function, and the error that the site's own log has to name.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cheating import COHORT, HONEST, LARGEST_COHORT, MOLE, MOLES, SECONDS, VICTIM, Attempt, Cheat
from foedus_common.errors import FoedusError, LocalError, PolicyRefusal, Reason
from foedus_common.identity import SignedPlan, generate_key
from foedus_common.link import foedus_pb2 as pb
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.draw import MAX_DRAWS, drawn_cohorts, seed_commitment
from foedus_common.protocol.primitives import KeyPair, commitment
from foedus_common.protocol.shamir import SHARE_BYTES
from foedus_server.rounds import DRAW_TYPES, STAGE_TYPES
from known_sites import plan_of
from seeded import seeded

Play = Callable[[Cheat], str]
Refused = Reason | type[Exception]

WITHOUT_VICTIM = tuple(site for site in COHORT if site != VICTIM)
RANDOM = seeded("the coordinator's own keys")


@dataclass(frozen=True)
class Attack:
    """play: gives the site that has to refuse. begun: the sites have approved the plan and trained round 0."""

    name: str
    refused: Refused
    play: Play
    begun: bool = True


ATTACKS: list[Attack] = []


def attack(name: str, refused: Refused, *, begun: bool = True) -> Callable[[Play], Play]:
    def enter(play: Play) -> Play:
        ATTACKS.append(Attack(name, refused, play, begun))
        return play

    return enter


def without(sites: Iterable[str], *left_out: str) -> tuple[str, ...]:
    return tuple(site for site in sites if site not in left_out)


# --- Survivors ---


@attack("a site is listed as survivor, then as dropped", Reason.SURVIVORS_INVALID)
def alive_then_dead(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(5)
    for site in without(HONEST, VICTIM):  # everybody gave the share of its seed; now the share of its key
        attempt.ask(site, 5, m.Survivors(WITHOUT_VICTIM))
    return "delta"


@attack("a second survivor set before the first is unmasked", Reason.SURVIVORS_INVALID)
def second_set(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(4)
    attempt.ask("delta", 4, m.Survivors(WITHOUT_VICTIM))
    return "delta"


@attack("a site is listed as survivor, then as dropped, in one sequence", Reason.SEQUENCE_REUSED)
def alive_and_dead(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(4)
    for site in without(HONEST, VICTIM):
        attempt.ask(site, 3, m.Survivors(WITHOUT_VICTIM))
    return "delta"


@attack("two survivor sets to two groups, a colluder signs both", Reason.TOO_FEW_SITES)
def two_groups(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(3)
    signed = _split(cheat, attempt)
    for site in HONEST:
        _, signatures = next(group for group in signed if site in group[1])
        attempt.ask(site, 4, m.Agreement(tuple(sorted(signatures.items()))))
    return "delta"


@attack("two survivor sets to two groups, two sites of one organisation sign both", Reason.TOO_FEW_SITES)
def two_groups_and_a_family(cheat: Cheat) -> str:
    """One of the two is no survivor of the set with the victim, and signs all the same: it is of the cohort."""
    family = (*HONEST, MOLE, "mole-2")
    attempt = cheat.attempt(cheat.config(family))
    attempt.reach(3)
    signed = _split(cheat, attempt, (without(family, "mole-2"), without(family, VICTIM)), (MOLE, "mole-2"))
    for site in HONEST:
        _, signatures = next(group for group in signed if site in group[1])
        attempt.ask(site, 4, m.Agreement(tuple(sorted(signatures.items()))))
    return "delta"


@attack("two survivor sets to two groups, signatures mixed", Reason.BAD_SIGNATURE)
def two_groups_mixed(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(3)
    (_, left), (_, right) = _split(cheat, attempt)
    for site in HONEST:
        attempt.ask(site, 4, m.Agreement(tuple(sorted((left | right).items()))))
    return "delta"


def _split(
    cheat: Cheat,
    attempt: Attempt,
    sets: tuple[tuple[str, ...], tuple[str, ...]] = (COHORT, WITHOUT_VICTIM),
    moles: tuple[str, ...] = (MOLE,),
) -> list[tuple[tuple[str, ...], dict[str, bytes]]]:
    """Half of the sites sign a set with the victim, half one without; the colluders sign both."""
    u1 = cheat.stage("bravo").u1
    groups: list[tuple[tuple[str, ...], dict[str, bytes]]] = [(tuple(sorted(each)), {}) for each in sets]
    for survivors, signatures in groups:
        statement = wire.survivors_statement(attempt.ctx, u1, survivors)
        signatures |= {mole: cheat.federation.moles[mole].key.sign(statement) for mole in moles}
    for site, (survivors, signatures) in zip(HONEST, (groups[0], groups[0], groups[1], groups[1]), strict=True):
        answer = attempt.ask(site, 3, m.Survivors(survivors))
        assert isinstance(answer, m.Consistency)
        signatures[site] = answer.signature
    return groups


@attack("a survivor set of fewer than the least", Reason.TOO_FEW_SITES)
def small_set(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(3)
    attempt.ask("charlie", 3, m.Survivors(("bravo", "charlie")))
    return "charlie"


@attack("a survivor set with a site that never delivered", Reason.SURVIVORS_INVALID)
def invented_survivor(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(3)
    attempt.ask(VICTIM, 3, m.Survivors(tuple(sorted((*COHORT, "mole-2")))))
    return VICTIM


# --- Thresholds and cohorts ---


@attack("threshold lowered", Reason.THRESHOLD_TOO_LOW)
def threshold_lowered(cheat: Cheat) -> str:
    cheat.attempt(cheat.config(threshold=2)).reach(1, silent=without(COHORT, VICTIM))
    return VICTIM


@attack("as many sites of one organisation as the threshold would be", Reason.THRESHOLD_TOO_LOW)
def family_of_the_threshold(cheat: Cheat) -> str:
    """Four of six sites, and a threshold of 4: what would be right if each were an organisation of its own."""
    config = cheat.config((VICTIM, "bravo", *MOLES), threshold=4)
    cheat.attempt(config).reach(1, silent=without(config.cohort, VICTIM))
    return VICTIM


@attack("least number in a sum lowered", Reason.THRESHOLD_TOO_LOW)
def minimum_lowered(cheat: Cheat) -> str:
    cheat.attempt(cheat.config(minimum=1)).reach(1, silent=without(COHORT, VICTIM))
    return VICTIM


@attack("a cohort of two", Reason.COHORT_SIZE)
def cohort_of_two(cheat: Cheat) -> str:
    config = replace(cheat.config(), cohort=(VICTIM, "bravo"), threshold=2, minimum=2)
    cheat.attempt(config).reach(1, silent=["bravo"])
    return VICTIM


@attack("a cohort filled with sybils that the root never signed", Reason.UNKNOWN_SITE)
def ghosts(cheat: Cheat) -> str:
    config = cheat.config(("charlie", "ghost-1", "ghost-2", "ghost-3"))
    cheat.attempt(config).ask("charlie", 0, config)
    return "charlie"


@attack("a cohort filled with sybils of one organisation", Reason.TOO_FEW_SITES)
def sybils(cheat: Cheat) -> str:
    config = cheat.config(("charlie", *MOLES))
    cheat.attempt(config).ask("charlie", 0, config)
    return "charlie"


@attack("a cohort without a peer that site policy names", Reason.COHORT_LACKS_PEERS)
def peers_left_out(cheat: Cheat) -> str:
    config = cheat.config(without(COHORT, "bravo"))
    cheat.attempt(config).ask(VICTIM, 0, config)
    return VICTIM


@attack("the named peer is 'dropped' after A0: it sent no keys", Reason.COHORT_LACKS_PEERS)
def peer_dropped_before_keys(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    keys = attempt.reach(1)[VICTIM]
    assert isinstance(keys, m.PeerKeys)
    attempt.ask(VICTIM, 1, m.PeerKeys(without_source(keys, "bravo")))
    return VICTIM


@attack("the named peer is 'dropped' after A1: it dealt no shares", Reason.COHORT_LACKS_PEERS)
def peer_dropped_before_shares(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    shares = attempt.reach(2)[VICTIM]
    assert isinstance(shares, m.PeerShares)
    attempt.ask(VICTIM, 2, m.PeerShares(tuple(pair for pair in shares.sealed if pair[0] != "bravo")))
    return VICTIM


@attack("the named peer is 'dropped' after A2: it sent no vector", Reason.COHORT_LACKS_PEERS)
def peer_dropped_before_survivors(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(3)
    attempt.ask(VICTIM, 3, m.Survivors(without(COHORT, "bravo")))
    return VICTIM


def without_source(keys: m.PeerKeys, *sources: str) -> tuple[bytes, ...]:
    return tuple(e for e in keys.envelopes if wire.parse_envelope(e).header.source not in sources)


# --- Draws ---


class Draw:
    """Everybody's seed for one attempt: the honest sites commit to theirs, the moles' are the coordinator's."""

    def __init__(self, cheat: Cheat, attempt: int = 0, only: Iterable[str] = HONEST) -> None:
        self.cheat, self.number = cheat, attempt
        self.seeds = {mole: RANDOM(32) for mole in MOLES}
        self.commitments = {mole: self._commitment(mole, seed) for mole, seed in self.seeds.items()}
        for site in only:
            answer = self.say(site, 0, m.Draw())
            if isinstance(answer, m.Commitment):
                self.commitments[site] = answer.commitment

    def say(self, site: str, sequence: int, message: m.ToSite) -> m.FromSite:
        header = replace(self.cheat.header(site, attempt=self.number), sequence=sequence)
        stage = (*DRAW_TYPES, STAGE_TYPES[0])[sequence]
        answer = self.cheat.exchange(site, wire.build_envelope(header, message), stage)
        assert answer is not None
        return wire.parse_envelope(answer).message

    def show(self, site: str, **changes: bytes | None) -> None:
        """The list of commitments with these changed, or left out."""
        shown = {each: told for each, told in (self.commitments | changes).items() if told is not None}
        answer = self.say(site, 1, m.Commitments(tuple(sorted(shown.items()))))
        if isinstance(answer, m.Seed):
            self.seeds[site] = answer.seed

    def reveal(self) -> None:
        for site in HONEST:
            self.show(site)
        assert set(self.seeds) == {*HONEST, *MOLES}

    def open(self, site: str, cohort: Iterable[str], **changes: bytes | None) -> None:
        """A0 with this cohort, and with the seeds changed or left out."""
        told = {each: seed for each, seed in (self.seeds | changes).items() if seed is not None}
        config = self.cheat.config(cohort, attempt=self.number)
        self.say(site, 2, m.DrawnConfig(config, tuple(sorted(told.items()))))

    def cohorts(self) -> tuple[tuple[str, ...], ...]:
        plan, place = self.cheat.agreed.digest(), (self.cheat.run_id, 0, self.number)
        return drawn_cohorts(plan, *place, self.seeds, LARGEST_COHORT)

    def _commitment(self, site: str, seed: bytes) -> bytes:
        return seed_commitment(self.cheat.run_id, 0, self.number, site, seed)


@attack("more sites than share a sum, and no draw", Reason.COHORT_SIZE)
def no_draw(cheat: Cheat) -> str:
    config = cheat.config((*COHORT, "mole-2", "mole-3"))
    cheat.attempt(config).ask(VICTIM, 0, config)
    return VICTIM


@attack("a draw without the victim's commitment", Reason.SEED_ALTERED)
def commitment_withheld(cheat: Cheat) -> str:
    Draw(cheat).show(VICTIM, **{VICTIM: None})
    return VICTIM


@attack("a draw in which the victim's commitment is the coordinator's", Reason.SEED_ALTERED)
def commitment_replaced(cheat: Cheat) -> str:
    Draw(cheat).show(VICTIM, **{VICTIM: RANDOM(32)})
    return VICTIM


@attack("a draw filled with sybils that the root never signed", Reason.UNKNOWN_SITE)
def ghosts_in_a_draw(cheat: Cheat) -> str:
    Draw(cheat).show(VICTIM, **{"ghost-1": RANDOM(32)})
    return VICTIM


@attack("a draw of so few that they are one cohort", Reason.COHORT_SIZE)
def small_draw(cheat: Cheat) -> str:
    Draw(cheat).show(VICTIM, bravo=None, charlie=None, delta=None)
    return VICTIM


@attack("a second list of commitments once the victim told its seed", Reason.SEQUENCE_REUSED)
def second_list(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    draw.show(VICTIM, mole=RANDOM(32))
    return VICTIM


@attack("a colluder's seed changed after its commitment", Reason.SEED_ALTERED)
def seed_changed(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    draw.seeds[MOLE] = RANDOM(32)
    draw.open(VICTIM, next(cohort for cohort in draw.cohorts() if VICTIM in cohort))
    return VICTIM


@attack("a seed kept back, the draw goes on without it", Reason.SEED_ALTERED)
def seed_kept_back(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    del draw.seeds[MOLE]
    draw.open(VICTIM, next(cohort for cohort in draw.cohorts() if VICTIM in cohort))
    return VICTIM


@attack("commitments of an earlier draw, its seeds known by now", Reason.SEED_ALTERED)
def commitments_replayed(cheat: Cheat) -> str:
    first = Draw(cheat)
    first.reveal()
    second = Draw(cheat, 1, only=[VICTIM])
    others = without(HONEST, VICTIM)
    second.commitments |= {site: first.commitments[site] for site in others}
    second.show(VICTIM)
    second.seeds |= {site: first.seeds[site] for site in others}
    second.open(VICTIM, next(cohort for cohort in second.cohorts() if VICTIM in cohort))
    return VICTIM


@attack("the victim's own commitment repeated by a colluder", Reason.SEED_ALTERED)
def commitment_repeated(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.commitments[MOLE] = draw.commitments[VICTIM]
    draw.reveal()
    draw.seeds[MOLE] = draw.seeds[VICTIM]
    draw.open(VICTIM, next(cohort for cohort in draw.cohorts() if VICTIM in cohort))
    return VICTIM


@attack("another list of commitments than the other sites were shown, with seeds chosen to suit", Reason.SEED_ALTERED)
def chosen_after_the_others(cheat: Cheat) -> str:
    """The victim's own seed makes even that a fair draw; but what it was shown is what has to be opened."""
    draw = Draw(cheat)
    for site in without(HONEST, VICTIM):
        draw.show(site)
    chosen = RANDOM(32)
    seed_shown, draw.seeds[MOLE] = draw.seeds[MOLE], chosen
    draw.show(VICTIM, **{MOLE: seed_commitment(cheat.run_id, 0, 0, MOLE, chosen)})
    draw.seeds[MOLE] = seed_shown
    draw.open(VICTIM, next(cohort for cohort in draw.cohorts() if VICTIM in cohort))
    return VICTIM


@attack("two sites of different cohorts swapped", Reason.COHORT_NOT_DRAWN)
def cohort_swapped(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    own, other = sorted(draw.cohorts(), key=lambda cohort: VICTIM not in cohort)
    draw.open(VICTIM, (*without(own, next(site for site in own if site != VICTIM)), other[0]))
    return VICTIM


@attack("one site put into another cohort", Reason.COHORT_NOT_DRAWN)
def put_elsewhere(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    draw.open(VICTIM, (*next(cohort for cohort in draw.cohorts() if VICTIM not in cohort), VICTIM))
    return VICTIM


@attack("a cohort smaller than the drawn one", Reason.COHORT_NOT_DRAWN)
def cohort_cut(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    own = next(cohort for cohort in draw.cohorts() if VICTIM in cohort)
    draw.open(VICTIM, without(own, next(site for site in own if site != VICTIM)))
    return VICTIM


@attack("two partitions of one draw shown to two sites", Reason.COHORT_NOT_DRAWN)
def two_partitions(cheat: Cheat) -> str:
    draw = Draw(cheat)
    draw.reveal()
    for site in ("bravo", VICTIM):
        others = [each for cohort in draw.cohorts() for each in cohort if each != site]
        draw.open(site, (site, *others[:2], others[-1]))  # of one cohort and of another
    return VICTIM


@attack("one draw after another until one suits", Reason.DRAWS_EXHAUSTED)
def draws_until_one_suits(cheat: Cheat) -> str:
    answered = [VICTIM in Draw(cheat, attempt, only=[VICTIM]).commitments for attempt in range(MAX_DRAWS + 1)]
    assert answered == [True] * MAX_DRAWS + [False]
    return VICTIM


@attack("a second cohort of a round, drawn once the vector was masked in the first", Reason.VECTOR_REUSED)
def second_cohort(cheat: Cheat) -> str:
    cheat.attempt().reach(3)
    assert VICTIM not in Draw(cheat, 1, only=[VICTIM]).commitments
    return VICTIM


@attack("a draw that was left for another attempt is taken up again", Reason.SECRETS_LOST)
def back_to_an_earlier_draw(cheat: Cheat) -> str:
    first = Draw(cheat)
    Draw(cheat, 1, only=[VICTIM])
    first.show(VICTIM)
    return VICTIM


# --- Keys ---


def _substitute(cheat: Cheat, make: Callable[[wire.Envelope], bytes], whose: str = "bravo") -> Attempt:
    """Shows the victim another A1 of one site; make: from the genuine one."""
    attempt = cheat.attempt()
    keys = attempt.reach(1)[VICTIM]
    assert isinstance(keys, m.PeerKeys)
    genuine = {wire.parse_envelope(data).header.source: data for data in keys.envelopes}
    genuine[whose] = make(wire.parse_envelope(genuine[whose]))
    attempt.ask(VICTIM, 1, m.PeerKeys(tuple(genuine[site] for site in sorted(genuine))))
    return attempt


def _own_keys(cheat: Cheat) -> m.Advertise:
    """Keys whose private halves the coordinator has."""
    drawn = [RANDOM(32) for _ in range(3)]
    cheat.private_keys += drawn[:2]
    share, mask = (KeyPair.from_private(key).public for key in drawn[:2])
    return m.Advertise(share, mask, commitment(drawn[2]))


@attack("a peer's keys without a signature", Reason.BAD_SIGNATURE)
def unsigned_keys(cheat: Cheat) -> str:
    _substitute(cheat, lambda e: wire.build_envelope(e.header, _own_keys(cheat), lambda _: bytes(64)))
    return VICTIM


@attack("a peer's keys swapped for the coordinator's own, signed by a colluder", Reason.BAD_SIGNATURE)
def keys_of_the_middle(cheat: Cheat) -> str:
    sign = cheat.federation.moles[MOLE].key.sign
    _substitute(cheat, lambda e: wire.build_envelope(e.header, _own_keys(cheat), sign))
    return VICTIM


@attack("two peers' keys swapped with each other", Reason.BAD_MESSAGE)
def swapped_keys(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    keys = attempt.reach(1)[VICTIM]
    assert isinstance(keys, m.PeerKeys)
    first, second, third, *rest = keys.envelopes
    attempt.ask(VICTIM, 1, m.PeerKeys((first, third, second, *rest)))
    return VICTIM


@attack("a peer's keys replayed from an earlier attempt", Reason.CONFIG_MISMATCH)
def replayed_keys(cheat: Cheat) -> str:
    earlier = cheat.attempt().reach(1)[VICTIM]
    assert isinstance(earlier, m.PeerKeys)
    attempt = cheat.attempt(cheat.config(attempt=1))
    attempt.reach(1)
    attempt.ask(VICTIM, 1, earlier)
    return VICTIM


@attack("the victim's own keys reflected as a colluder's", Reason.DUPLICATE_KEY)
def reflected_keys(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    keys = attempt.reach(1)[VICTIM]
    assert isinstance(keys, m.PeerKeys)
    parsed = {wire.parse_envelope(data).header.source: wire.parse_envelope(data) for data in keys.envelopes}
    sign = cheat.federation.moles[MOLE].key.sign
    mirror = wire.build_envelope(parsed[MOLE].header, parsed[VICTIM].message, sign)
    attempt.ask(VICTIM, 1, m.PeerKeys((*without_source(keys, MOLE), mirror)))
    return VICTIM


@attack("the victim's own keys come back altered", Reason.BAD_SIGNATURE)
def own_keys_altered(cheat: Cheat) -> str:
    sign = cheat.federation.moles[MOLE].key.sign
    _substitute(cheat, lambda e: wire.build_envelope(e.header, _own_keys(cheat), sign), whose=VICTIM)
    return VICTIM


@attack("the victim's own keys are left out", Reason.KEY_ALTERED)
def own_keys_left_out(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    keys = attempt.reach(1)[VICTIM]
    assert isinstance(keys, m.PeerKeys)
    attempt.ask(VICTIM, 1, m.PeerKeys(without_source(keys, VICTIM)))
    return VICTIM


@attack("a colluder's key that makes every shared secret zero", Reason.WEAK_KEY)
def weak_key(cheat: Cheat) -> str:
    sign = cheat.federation.moles[MOLE].key.sign
    weak = m.Advertise(bytes(32), _own_keys(cheat).mask_key, bytes(32))
    _substitute(cheat, lambda e: wire.build_envelope(e.header, weak, sign), whose=MOLE)
    return VICTIM


# --- The same vector twice ---


@attack("a second masked input, other peers, in the same sequence", Reason.SEQUENCE_REUSED)
def masked_again(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    shares = attempt.reach(2)[VICTIM]
    assert isinstance(shares, m.PeerShares)
    attempt.ask(VICTIM, 2, shares)
    attempt.ask(VICTIM, 2, m.PeerShares(tuple(pair for pair in shares.sealed if pair[0] != "delta")))
    return VICTIM


@attack("a second masked input, other peers, in the next sequence", Reason.ALREADY_MASKED)
def masked_once_more(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    shares = attempt.reach(2)[VICTIM]
    assert isinstance(shares, m.PeerShares)
    attempt.ask(VICTIM, 2, shares)
    attempt.ask(VICTIM, 3, m.PeerShares(tuple(pair for pair in shares.sealed if pair[0] != "delta")))
    return VICTIM


@attack("an opened sum is called aborted, the vectors are asked for again", Reason.VECTOR_REUSED)
def vector_in_another_attempt(cheat: Cheat) -> str:
    cheat.attempt().reach(5)
    config = cheat.config(without(COHORT, VICTIM), attempt=1)
    again = cheat.attempt(config)
    for site in without(HONEST, VICTIM):
        again.ask(site, 0, config)
    return "delta"


@attack("masked vectors are kept, sums opened without the victim, then with it", Reason.SECRETS_LOST)
def back_to_an_earlier_attempt(cheat: Cheat) -> str:
    """Stops before anybody signs survivors, visits a second attempt, and comes back."""
    first = cheat.attempt()
    first.reach(3)
    config = cheat.config(attempt=1)
    cheat.attempt(config).ask("bravo", 0, config)
    first.ask("bravo", 3, m.Survivors(WITHOUT_VICTIM))
    return "bravo"


# --- Replays ---


def _replay(cheat: Cheat, site: str, until: int = 5) -> None:
    """The very bytes of an earlier attempt, to one site."""
    earlier = [exchange for exchange in cheat.exchanges if exchange.site == site]
    for exchange in earlier[:until]:
        stage = STAGE_TYPES[wire.parse_envelope(exchange.request).header.sequence]
        cheat.exchange(site, exchange.request, stage)


@attack("a round is replayed at once", Reason.SEQUENCE_REUSED)
def replay_in_the_same_round(cheat: Cheat) -> str:
    cheat.attempt().reach(5)
    _replay(cheat, VICTIM, until=1)
    return VICTIM


@attack("a round is replayed under way in the next", Reason.SEQUENCE_REUSED)
def replay_in_the_next_round(cheat: Cheat) -> str:
    cheat.attempt().reach(5)
    cheat.begin(1)
    cheat.attempt(cheat.config(round_=1)).reach(3)
    _replay(cheat, VICTIM, until=1)
    return VICTIM


@attack("keys of a round are used in the next", Reason.CONFIG_MISMATCH)
def keys_in_the_next_round(cheat: Cheat) -> str:
    earlier = cheat.attempt().reach(1)[VICTIM]
    cheat.begin(1)
    following = cheat.attempt(cheat.config(round_=1))
    following.reach(1)
    following.ask(VICTIM, 1, earlier)
    return VICTIM


@attack("a round of a finished run is replayed", Reason.WRONG_STAGE)
def replay_of_an_older_run(cheat: Cheat) -> str:
    cheat.attempt().reach(5)
    ended = wire.build_envelope(cheat.header(VICTIM), m.RunEnded(m.End.FINISHED))
    assert cheat.send(VICTIM, "query.end", ended) is not None
    _replay(cheat, VICTIM)
    return VICTIM


@attack("an attempt is begun again after the site restarted", Reason.SEQUENCE_REUSED)
def replay_after_a_restart(cheat: Cheat) -> str:
    cheat.attempt().reach(3)
    cheat.federation.restart(VICTIM)
    _replay(cheat, VICTIM, until=1)
    return VICTIM


@attack("survivors are named after the site restarted", Reason.SECRETS_LOST)
def on_after_a_restart(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(3)
    cheat.federation.restart(VICTIM)
    attempt.ask(VICTIM, 3, m.Survivors(COHORT))
    return VICTIM


@attack("the site is restored from a backup made before it masked", LocalError)
def restored_backup(cheat: Cheat) -> str:
    """The site does not start on it; the newest copy is put back for the attacks that follow."""
    federation = cheat.federation
    home, old, new = (federation.folder / name for name in (VICTIM, "old", "new"))
    federation.stop(VICTIM)
    shutil.copytree(home, old)
    federation.start(VICTIM)
    cheat.attempt().reach(5)
    federation.stop(VICTIM)
    home.rename(new)
    old.rename(home)
    try:
        federation.start(VICTIM)
    except FoedusError as error:
        federation.refusals.errors.append(error)
    shutil.rmtree(home)
    new.rename(home)
    federation.start(VICTIM)
    return VICTIM


# --- Another truth for one site ---


@attack("an old roster epoch is shown", Reason.ROSTER_STALE, begun=False)
def old_roster(cheat: Cheat) -> str:
    old = cheat.federation.first_roster
    assert old is not None
    assert cheat.propose(VICTIM) == m.Ready()
    assert cheat.propose(VICTIM, signed_roster=old.to_bytes()) == m.Declined()
    return VICTIM


@attack("a round under an old roster epoch", Reason.CONFIG_MISMATCH)
def old_epoch(cheat: Cheat) -> str:
    config = cheat.config(roster_epoch=cheat.federation.roster.epoch - 1)
    cheat.attempt(config).ask(VICTIM, 0, config)
    return VICTIM


@attack("a plan that the coordinator's plan key did not sign", Reason.BAD_SIGNATURE, begun=False)
def plan_of_another_signer(cheat: Cheat) -> str:
    forged = SignedPlan.sign(cheat.agreed, generate_key(RANDOM))
    assert cheat.propose(VICTIM, signed=forged) == m.Declined()
    return VICTIM


@attack("one site is shown another plan for the same run", Reason.CONFIG_MISMATCH, begun=False)
def another_plan(cheat: Cheat) -> str:
    """The others agreed to the honest one; this one's rounds are about another, so their keys do not fit."""
    honest = cheat.agreed
    other = plan_of(2, run__purpose="Something else.")
    cheat.agreed = replace(honest, plan=other)
    cheat.signed = SignedPlan.sign(cheat.agreed, cheat.federation.operator.home.plan_key())
    assert (cheat.propose(VICTIM), cheat.invite(VICTIM)) == (m.Ready(), m.Ready())
    config = cheat.config()
    alone = cheat.attempt(config)
    alone.ask(VICTIM, 0, config)
    own = cheat.exchanges[-1].answer
    cheat.agreed = honest
    cheat.signed = SignedPlan.sign(honest, cheat.federation.operator.home.plan_key())
    for site in without(HONEST, VICTIM):
        assert (cheat.propose(site), cheat.invite(site)) == (m.Ready(), m.Ready())
    keys = cheat.attempt().reach(1, silent=[VICTIM])["bravo"]
    assert isinstance(keys, m.PeerKeys)
    alone.ask(VICTIM, 1, m.PeerKeys((own, *keys.envelopes)))
    return VICTIM


@attack("a plan that withstands no colluding site", PolicyRefusal, begun=False)
def nobody_colludes(cheat: Cheat) -> str:
    secure = replace(cheat.agreed.plan.secure_aggregation, colluding=0)
    cheat.agreed = replace(cheat.agreed, plan=replace(cheat.agreed.plan, secure_aggregation=secure))
    cheat.signed = SignedPlan.sign(cheat.agreed, cheat.federation.operator.home.plan_key())
    assert cheat.propose(VICTIM) == m.Declined()
    return VICTIM


@attack("an invitation with another plan than was approved", Reason.CONFIG_MISMATCH, begun=False)
def another_plan_at_invitation(cheat: Cheat) -> str:
    assert cheat.propose(VICTIM) == m.Ready()
    other = SignedPlan.sign(replace(cheat.agreed, plan=plan_of(3)), cheat.federation.operator.home.plan_key())
    assert cheat.invite(VICTIM, plan=other.canonical, plan_signature=other.signature) == m.Declined()
    return VICTIM


@attack("an invitation with another base model", Reason.CONFIG_MISMATCH, begun=False)
def another_model(cheat: Cheat) -> str:
    assert cheat.propose(VICTIM) == m.Ready()
    assert cheat.invite(VICTIM, base_model_hash=b"b" * 32) == m.Declined()
    return VICTIM


@attack("an invitation to the first round with another adapter", Reason.CONFIG_MISMATCH, begun=False)
def another_first_adapter(cheat: Cheat) -> str:
    assert cheat.propose(VICTIM) == m.Ready()
    adapter = cheat.objects.put(b"another adapter")
    assert cheat.invite(VICTIM, adapter=m.VectorRef(bytes.fromhex(adapter.sha256), adapter.size)) == m.Declined()
    return VICTIM


@attack("one site starts a later round from another adapter", Reason.CONFIG_MISMATCH)
def another_later_adapter(cheat: Cheat) -> str:
    cheat.begin(1)
    honest, other = cheat.adapter, cheat.objects.put(b"an adapter for one site alone")
    cheat.adapter = other
    assert cheat.invite(VICTIM, 1, attempt=1) == m.Ready()
    config = cheat.config(round_=1)
    alone = cheat.attempt(config)
    alone.ask(VICTIM, 0, config)
    own = cheat.exchanges[-1].answer
    cheat.adapter = honest
    keys = cheat.attempt(cheat.config(round_=1)).reach(1, silent=[VICTIM])["bravo"]
    assert isinstance(keys, m.PeerKeys)
    alone.ask(VICTIM, 1, m.PeerKeys((own, *keys.envelopes)))
    return VICTIM


@attack("one site is shown a smaller cohort", Reason.CONFIG_MISMATCH)
def another_cohort(cheat: Cheat) -> str:
    smaller = cheat.config(without(COHORT, "delta"))
    alone = cheat.attempt(smaller)
    alone.ask(VICTIM, 0, smaller)
    own = cheat.exchanges[-1].answer
    keys = cheat.attempt().reach(1, silent=[VICTIM])["bravo"]
    assert isinstance(keys, m.PeerKeys)
    alone.ask(VICTIM, 1, m.PeerKeys((own, *without_source(keys, "delta"))))
    return VICTIM


def _one_change(name: str, change: Callable[[m.RoundConfig], m.RoundConfig], refused: Refused) -> None:
    def play(cheat: Cheat) -> str:
        config = change(cheat.config())
        cheat.attempt(config).ask(VICTIM, 0, config)
        return VICTIM

    attack(f"one changed number: {name}", refused)(play)


def _terms(**changes: object) -> Callable[[m.RoundConfig], m.RoundConfig]:
    return lambda config: replace(config, terms=replace(config.terms, **changes))


_one_change("protocol version", lambda c: replace(c, protocol_version=m.PROTOCOL_VERSION + 1), Reason.CONFIG_MISMATCH)
_one_change("roster hash", lambda c: replace(c, roster_digest=bytes(32)), Reason.CONFIG_MISMATCH)
_one_change("threshold above what is needed", lambda c: replace(c, threshold=5), Reason.CONFIG_MISMATCH)
_one_change("phase", _terms(phase=1), Reason.CONFIG_MISMATCH)
_one_change("plan digest", _terms(plan_digest=bytes(32)), Reason.CONFIG_MISMATCH)
_one_change("base model", _terms(base_model_hash=bytes(32)), Reason.CONFIG_MISMATCH)
_one_change("adapter", _terms(adapter_hash=bytes(32)), Reason.CONFIG_MISMATCH)
_one_change("trainer version", _terms(trainer_version="foedus-trainer/0"), Reason.CONFIG_MISMATCH)
_one_change("colluding sites", _terms(colluding=0), Reason.CONFIG_MISMATCH)
_one_change("fewest sites", _terms(min_sites=2), Reason.CONFIG_MISMATCH)
_one_change("noise", lambda c: _terms(noise=replace(c.terms.noise, multiplier=0.0))(c), Reason.CONFIG_MISMATCH)
_one_change("clip", lambda c: _terms(noise=replace(c.terms.noise, clip=1e6))(c), Reason.CONFIG_MISMATCH)
_one_change("unit", lambda c: _terms(noise=m.Noise())(c), Reason.CONFIG_MISMATCH)
_one_change("field bits", lambda c: _terms(layout=replace(c.terms.layout, bits=22))(c), Reason.CONFIG_MISMATCH)
_one_change("largest cohort", lambda c: _terms(layout=replace(c.terms.layout, max_sites=4))(c), Reason.FIELD_OVERFLOW)
_one_change(
    "scale of one segment",
    lambda c: _terms(layout=replace(c.terms.layout, segments=((c.terms.layout.dimension, 1e9),)))(c),
    Reason.CONFIG_MISMATCH,
)


# --- Shares ---


def _altered_shares(cheat: Cheat, alter: Callable[[dict[str, bytes], Attempt], None]) -> str:
    attempt = cheat.attempt()
    shares = attempt.reach(2)[VICTIM]
    assert isinstance(shares, m.PeerShares)
    sealed = dict(shares.sealed)
    alter(sealed, attempt)
    attempt.ask(VICTIM, 2, m.PeerShares(tuple(sealed.items())))
    return VICTIM


@attack("a sealed share corrupted in one bit", Reason.BAD_SHARE)
def corrupted_share(cheat: Cheat) -> str:
    return _altered_shares(cheat, lambda s, _: s.update(bravo=bytes([s["bravo"][0] ^ 1]) + s["bravo"][1:]))


@attack("the sealed shares of two dealers swapped", Reason.BAD_SHARE)
def swapped_shares(cheat: Cheat) -> str:
    return _altered_shares(cheat, lambda s, _: s.update(bravo=s["charlie"], charlie=s["bravo"]))


@attack("a share that was sealed for another site", Reason.BAD_SHARE)
def share_of_another(cheat: Cheat) -> str:
    def alter(sealed: dict[str, bytes], attempt: Attempt) -> None:
        other = wire.parse_envelope(attempt.requests["charlie"]).message
        assert isinstance(other, m.PeerShares)
        sealed["bravo"] = dict(other.sealed)["bravo"]

    return _altered_shares(cheat, alter)


@attack("sealed shares from another attempt", Reason.BAD_SHARE)
def shares_of_another_attempt(cheat: Cheat) -> str:
    earlier = cheat.attempt().reach(2)[VICTIM]
    attempt = cheat.attempt(cheat.config(attempt=1))
    attempt.reach(2)
    attempt.ask(VICTIM, 2, earlier)
    return VICTIM


@attack("signatures over survivors from another attempt", Reason.BAD_SIGNATURE)
def signatures_of_another_attempt(cheat: Cheat) -> str:
    earlier = cheat.attempt().reach(4)[VICTIM]
    cheat.begin(1)
    attempt = cheat.attempt(cheat.config(round_=1))
    attempt.reach(4)
    attempt.ask(VICTIM, 4, earlier)
    return VICTIM


# --- Frames ---


@attack("a frame cut short", Reason.BAD_MESSAGE)
def truncated(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(2)
    cheat.send(VICTIM, STAGE_TYPES[2], attempt.requests[VICTIM][:-1])
    return VICTIM


@attack("a frame with a share's length changed", Reason.BAD_MESSAGE)
def mutated(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    shares = attempt.reach(2)[VICTIM]
    assert isinstance(shares, m.PeerShares)
    ciphertext = shares.sealed[0][1]
    request = attempt.requests[VICTIM].replace(ciphertext, ciphertext[: 2 * SHARE_BYTES])
    cheat.send(VICTIM, STAGE_TYPES[2], request)
    return VICTIM


@attack("an attempt is begun under another run's name, beside the run's own messages", Reason.BAD_MESSAGE)
def another_run_s_name(cheat: Cheat) -> str:
    other = cheat.federation.link.grid(cheat.run_id + 1_000_000, 1 << 20)
    request = other.message(VICTIM, STAGE_TYPES[0], cheat.attempt().requests[VICTIM], ttl=SECONDS)
    (reply,) = other.send_and_receive([request], timeout=SECONDS)
    assert reply.has_error()
    other.close()
    return VICTIM


@attack("an attempt with a number that no database holds", Reason.BAD_MESSAGE)
def number_beyond_the_database(cheat: Cheat) -> str:
    attempt = cheat.attempt(cheat.config(attempt=1 << 63))
    cheat.send(VICTIM, STAGE_TYPES[0], attempt.requests[VICTIM])
    return VICTIM


@attack("a round with a number that no database holds", Reason.BAD_MESSAGE)
def round_beyond_the_database(cheat: Cheat) -> str:
    config = cheat.config()
    request = wire.build_envelope(cheat.header(VICTIM, round_=(1 << 64) - 1), config)
    cheat.send(VICTIM, STAGE_TYPES[0], request)
    return VICTIM


@attack("a frame with another attempt's context", Reason.CONFIG_MISMATCH)
def another_context(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    shares = attempt.reach(2)[VICTIM]
    attempt.ask(VICTIM, 2, shares, binding=bytes(32))
    return VICTIM


@attack("a stage is left out", Reason.WRONG_STAGE)
def stage_left_out(cheat: Cheat) -> str:
    attempt = cheat.attempt()
    attempt.reach(2)
    attempt.ask(VICTIM, 2, m.Survivors(COHORT))
    return VICTIM


def oversized(cheat: Cheat, size: int) -> None:
    """A request larger than the link carries, put past the coordinator's own end, which would not send it."""
    body = bytes(size)
    request = pb.Request(id="too large", run_id=cheat.run_id, message_type=STAGE_TYPES[2], ttl=5.0, body=body)
    request.created_at = cheat.federation.link.clock.now()
    cheat.federation.link.mailbox.post(VICTIM, request)
    cheat.federation.link.mailbox.forget([request.id])  # once is enough
