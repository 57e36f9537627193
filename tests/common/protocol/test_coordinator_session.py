"""The coordinator with sites that fail or lie.

Failure: a wrong sum that opens, a wrong share that stops a round it need not stop, or a restart that changes a byte.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from foedus_common.errors import DropReason, Reason
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_session import Failed, Opened
from foedus_common.protocol.effects import Abort, Arrived, Deadline, Dropped, Persist, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.primitives import KeyPair

SITE = "site-001"


def dropped(world) -> list[Dropped]:
    return [e for effects in world.coordinator_effects for e in effects if isinstance(e, Dropped)]


def persisted(world) -> list[Arrived | Deadline]:
    return [
        record
        for effects in world.coordinator_effects
        for effect in effects
        if isinstance(effect, Persist)
        for record in effect.records
    ]


def assert_opens_without(world, state, *sites: str) -> None:
    survivors = tuple(site for site in world.names if site not in sites)
    assert isinstance(state, Opened), state
    assert state.survivors == survivors
    np.testing.assert_array_equal(state.total, world.plain_sum(survivors))


def resigned(world, answer: bytes, message: m.FromSite | None = None, **header: object) -> bytes:
    """The same answer with something changed, properly signed by its site."""
    envelope = wire.parse_envelope(answer)
    return wire.build_envelope(
        replace(envelope.header, **header), message or envelope.message, world.keys[envelope.header.source].sign
    )


# --- Answers that are no answers ---


LIES = {
    "noise": lambda world, answer: b"noise",
    "forged": lambda world, answer: answer[:-1] + bytes([answer[-1] ^ 1]),
    "declined": lambda world, answer: resigned(world, answer, m.Declined()),
    "another round": lambda world, answer: resigned(world, answer, round=3),
    "another context": lambda world, answer: resigned(world, answer, binding=bytes(32)),
    "another sequence": lambda world, answer: resigned(world, answer, sequence=9),
    "another message": lambda world, answer: resigned(world, answer, m.Ready()),
    "under another name": lambda world, answer: resigned(world, answer, source="site-002"),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("sequence", range(5))
def test_a_site_that_answers_wrongly_is_dropped_and_the_round_goes_on(federation, sequence, lie):
    world = federation(5)
    state = world.run(
        tamper=lambda site, at, answer: LIES[lie](world, answer) if (site, at) == (SITE, sequence) else answer
    )
    assert_opens_without(world, state, *([SITE] if sequence <= 2 else []))
    reason = DropReason.DECLINED if lie == "declined" else DropReason.PROTOCOL
    assert [(drop.site, drop.reason) for drop in dropped(world)] == [(SITE, reason)]


def test_a_site_that_is_silent_is_dropped_at_the_deadline(federation):
    world = federation(5)
    assert_opens_without(world, world.run({SITE: 2}), SITE)
    assert [(drop.site, drop.reason) for drop in dropped(world)] == [(SITE, DropReason.DEADLINE)]


@pytest.mark.parametrize("field", ["share_key", "mask_key"])
def test_a_copied_key_drops_who_came_second(federation, field):
    world = federation(5)
    seen: list[m.Advertise] = []

    def copy(site: str, sequence: int, answer: bytes) -> bytes:
        message = wire.parse_envelope(answer).message
        if sequence == 0:
            seen.append(message)
        if (site, sequence) == (SITE, 0):
            return resigned(world, answer, replace(message, **{field: seen[0].mask_key}))
        return answer

    assert_opens_without(world, world.run(tamper=copy), SITE)


@pytest.mark.parametrize(
    ("sequence", "lie"),
    [
        (1, lambda message: m.ShareKeys(message.sealed[1:])),
        (2, lambda message: m.MaskedInput(m.VectorRef(bytes(32), message.vector.size))),
        (3, lambda message: m.Consistency(bytes(64))),
        (4, lambda message: m.Unmask(message.shares[1:])),
        (4, lambda message: m.Unmask(tuple(m.PairKeyShare(share.value) for share in message.shares))),
    ],
    ids=["too few shares", "no such object", "wrong signature", "too few unmask shares", "wrong kind"],
)
def test_an_answer_of_the_wrong_content_drops_its_site(federation, sequence, lie):
    world = federation(5)

    def tamper(site: str, at: int, answer: bytes) -> bytes:
        if (site, at) != (SITE, sequence):
            return answer
        return resigned(world, answer, lie(wire.parse_envelope(answer).message))

    assert_opens_without(world, world.run(tamper=tamper), *([SITE] if sequence <= 2 else []))
    assert [(drop.site, drop.reason) for drop in dropped(world)] == [(SITE, DropReason.PROTOCOL)]


def test_a_vector_of_the_wrong_size_drops_its_site(federation):
    world = federation(5)

    def tamper(site: str, sequence: int, answer: bytes) -> bytes:
        if (site, sequence) != (SITE, 2):
            return answer
        longer = world.vectors.store(np.zeros(world.layout.words + 1, dtype=np.uint64))
        return resigned(world, answer, m.MaskedInput(longer))

    assert_opens_without(world, world.run(tamper=tamper), SITE)


def test_late_repeated_and_unasked_answers_change_nothing(federation):
    world = federation(5)
    (answer,) = [e.envelope for e in world.step(SITE, world.requests[SITE]) if isinstance(e, Send)]
    world.deliver(Arrived(SITE, answer))
    before = world.state
    for event in (
        Arrived(SITE, answer),
        Arrived(SITE, b"something else"),
        Arrived("stranger", b"noise"),
        Deadline(3),
    ):
        assert world.coordinator.step(before, event) == (before, ())
    world.run({"site-004": 0})
    assert [drop.site for drop in dropped(world)] == ["site-004"]


def test_nothing_happens_after_the_end(federation):
    world = federation(3)
    state = world.run()
    assert world.coordinator.step(state, Deadline(4)) == (state, ())
    assert world.coordinator.step(state, Arrived(SITE, b"x")) == (state, ())


# --- Shares that are wrong ---


def spoil(world, liars: set[str], dealer: str):
    """Liars send a wrong share of one dealer's secret at A5."""

    def tamper(site: str, sequence: int, answer: bytes) -> bytes:
        if sequence < 4 or site not in liars:
            return answer
        shares = list(wire.parse_envelope(answer).message.shares)
        index = world.names.index(dealer)
        shares[index] = type(shares[index])(bytes(32) + site[-1:].encode())
        return resigned(world, answer, m.Unmask(tuple(shares)))

    return tamper


@pytest.mark.parametrize("liars", [{SITE}, {"site-000", SITE}, {"site-007", "site-009"}])
def test_wrong_shares_are_corrected_while_there_are_enough(federation, liars):
    """n = 10, t = 6: with ten answers floor((10 - 6) / 2) = 2 wrong ones are corrected."""
    world = federation(10, colluding=1)
    state = world.run(tamper=spoil(world, liars, "site-004"))
    assert_opens_without(world, state)
    first_six = set(world.names[:6])
    assert set(state.suspects) == ({*liars, "site-004"} if liars & first_six else set())


@pytest.mark.parametrize("sites", [3, 5])
def test_wrong_shares_that_cannot_be_corrected_name_suspects(federation, sites):
    world = federation(sites)
    state = world.run(tamper=spoil(world, {SITE}, "site-000"))
    assert isinstance(state, Failed)
    assert state.error.reason is Reason.BAD_SHARE
    assert state.error.suspects[0] == "site-000"
    assert SITE in state.error.suspects
    assert world.coordinator_effects[-1][-1] == Abort(state.error)


def test_a_dealer_that_shared_another_secret_is_suspected_first(federation):
    """It advertises one key, shares another, and drops out."""
    world = federation(10)
    world.run(until=1)
    stage = world.states[SITE].stage
    keys = replace(KeyPair.from_private(bytes(range(32))), public=stage.mask_keys.public)
    world.states[SITE] = replace(world.states[SITE], stage=replace(stage, mask_keys=keys))
    state = world.run({SITE: 2})
    assert isinstance(state, Failed)
    assert (state.error.reason, state.error.suspects[0]) == (Reason.BAD_SHARE, SITE)


# --- Sums that are wrong ---


def test_a_vector_that_is_not_what_it_should_be_opens_nothing(federation):
    world = federation(5)

    def tamper(site: str, sequence: int, answer: bytes) -> bytes:
        if (site, sequence) != (SITE, 2):
            return answer
        words = world.vectors.load(wire.parse_envelope(answer).message.vector)
        words += np.uint64(1 << 20)
        return resigned(world, answer, m.MaskedInput(world.vectors.store(words)))

    state = world.run(tamper=tamper)
    assert isinstance(state, Failed)
    assert state.error.reason is Reason.BAD_SUM


def test_a_site_that_counts_itself_twice_opens_nothing(federation):
    world = federation(5)

    def tamper(site: str, sequence: int, answer: bytes) -> bytes:
        if (site, sequence) != (SITE, 2):
            return answer
        words = world.vectors.load(wire.parse_envelope(answer).message.vector)
        words += world.layout.pack(np.zeros(world.layout.dimension, dtype=np.int64))
        return resigned(world, answer, m.MaskedInput(world.vectors.store(words)))

    state = world.run(tamper=tamper)
    assert isinstance(state, Failed)
    assert state.error.reason is Reason.BAD_SUM


# --- Stored before sent, and what a restart finds ---


def test_every_answer_and_deadline_is_stored_before_what_follows_from_it(federation):
    world = federation(5)
    world.run({SITE: 2})
    for effects in world.coordinator_effects:
        assert isinstance(effects[0], Persist)
        assert not any(isinstance(effect, Persist) for effect in effects[1:])


@pytest.mark.parametrize("silent_from", [{}, {SITE: 1}, {SITE: 2}, {SITE: 3}])
def test_a_restarted_coordinator_asks_the_same_bytes_and_opens_the_same_sum(federation, silent_from):
    world = federation(5)
    end = world.run(silent_from)
    events, effects, history = persisted(world), world.coordinator_effects, world.history
    world.restart_coordinator(world.config)
    for event in events:
        world.deliver(event)
    assert (world.coordinator_effects, world.history) == (effects, history)
    np.testing.assert_array_equal(world.state.total, end.total)


def masked_answers(world) -> list[Arrived]:
    """A3 answers of every site, not delivered yet."""
    world.run(until=2)
    return [
        Arrived(site, effect.envelope)
        for site, request in world.requests.items()
        for effect in world.step(site, request)
        if isinstance(effect, Send)
    ]


def test_an_earlier_state_is_not_changed_by_a_later_step(federation):
    world = federation(4)
    totals = []
    for arrived in masked_answers(world):
        world.deliver(arrived)
        total = world.state.gathered.total
        totals.append((total, total.copy()))
    for total, copy in totals:
        np.testing.assert_array_equal(total, copy)


def test_memory_does_not_grow_with_the_cohort(federation):
    """Masked vectors of 320 kB: twelve of them are added up within the room of four."""
    world = federation(12, layout=FieldLayout(21, 16, ((120_000, 1.0),)))
    answers = masked_answers(world)
    tracemalloc.start()
    for arrived in answers:
        world.deliver(arrived)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert world.state.sequence == 3
    assert peak < 4 * world.layout.size
