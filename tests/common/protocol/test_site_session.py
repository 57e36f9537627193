"""A site against its coordinator: every named check, what is stored before what is sent, and what is left afterwards.

Failure: a lie that is answered, an answer that leaves before it is stored, a secret that outlives its use, or anything
but a clean refusal after any bytes whatever.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_common.errors import FoedusError, LocalError, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.effects import Abort, Answered, AttemptSeen, Erase, Persist, Send, VectorMasked
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_stages import Failed, Finished
from foedus_common.protocol.thresholds import PeerRule

SITE = "site-001"


def assert_refused(world, effects, reason: Reason, site: str = SITE) -> RemoteError:
    """The session is over for a named reason: secrets erased, a bare word sent, the sentence kept for the own log."""
    error = world.states[site].stage.error
    assert isinstance(error, RemoteError)
    assert error.reason is reason
    assert [type(effect) for effect in effects] == [Erase, Send, Abort]
    assert wire.parse_envelope(effects[1].envelope).message == m.Declined()
    assert world.states[site] == type(world.states[site])(Failed(error))
    assert world.step(site, b"anything") == (Abort(error),)
    return error


def refusal_at_a0(world, reason: Reason, **changes: object) -> RemoteError:
    config = replace(world.config, **changes)
    return assert_refused(world, world.ask(SITE, 0, config), reason)


# --- A0 ---


class TestRoundConfig:
    @pytest.mark.parametrize(
        "changes",
        [
            {"round": 3},
            {"run_id": 12},
            {"phase": 1},
            {"plan_digest": bytes(32)},
            {"base_model_hash": bytes(32)},
            {"adapter_hash": bytes(32)},
            {"trainer_version": "trainer 2"},
            {"noise": m.Noise("record", 1.0, 0.1)},
            {"noise": m.Noise("record", 2.0, 0.8)},
            {"noise": m.Noise()},
            {"layout": FieldLayout(21, 16, ((7, 1.0), (4, 0.5)))},
            {"layout": FieldLayout(21, 16, ((7, 1.0), (5, 0.25)))},
            {"layout": FieldLayout(20, 16, ((7, 1.0), (4, 0.25)))},
            {"min_sites": 2},
            {"colluding": 0},
        ],
        ids=lambda changes: ",".join(changes),
    )
    def test_terms_that_differ_from_the_vector_s(self, federation, changes):
        world = federation(4)
        error = refusal_at_a0(world, Reason.CONFIG_MISMATCH, terms=replace(world.terms, **changes))
        assert next(iter(changes)) in str(error)

    @pytest.mark.parametrize(
        "changes",
        [{"protocol_version": 3}, {"roster_epoch": 6}, {"roster_digest": bytes(32)}, {"threshold": 4}, {"minimum": 4}],
        ids=lambda changes: ",".join(changes),
    )
    def test_other_fields_that_differ(self, federation, changes):
        error = refusal_at_a0(federation(4), Reason.CONFIG_MISMATCH, **changes)
        assert next(iter(changes)) in str(error)

    def test_every_field_is_compared_or_checked(self, federation):
        """A field added to the config fails here until a test above says what happens when it is altered."""
        assert {f.name for f in fields(m.RoundTerms)} == {
            "run_id", "round", "phase", "plan_digest", "base_model_hash", "adapter_hash", "trainer_version",
            "layout", "noise", "min_sites", "colluding",
        }  # fmt: skip
        assert {f.name for f in fields(m.RoundConfig)} == {
            "protocol_version", "terms", "attempt", "roster_epoch", "roster_digest", "cohort", "threshold", "minimum",
        }  # fmt: skip

    @pytest.mark.parametrize("header", [{"run_id": 12}, {"round": 3}, {"attempt": 1}, {"binding": bytes(32)}])
    def test_an_envelope_about_something_else(self, federation, header):
        world = federation(4)
        assert_refused(world, world.ask(SITE, 0, world.config, **header), Reason.CONFIG_MISMATCH)

    def test_a_cohort_without_this_site(self, federation):
        world = federation(5)
        others = tuple(site for site in world.names if site != SITE)
        error = refusal_at_a0(world, Reason.CONFIG_MISMATCH, cohort=others, threshold=3)
        assert "not in the cohort" in str(error)

    def test_cohort_smaller_than_the_plan_allows(self, federation):
        world = federation(4)
        world.alter_outbox(SITE, terms=replace(world.terms, min_sites=5))
        refusal_at_a0(world, Reason.COHORT_SIZE)

    def test_cohort_larger_than_the_plan_allows(self, federation):
        world = federation(4)
        world.alter_outbox(SITE, terms=replace(world.terms, layout=FieldLayout(21, 3, ((7, 1.0), (4, 0.25)))))
        refusal_at_a0(world, Reason.COHORT_SIZE)

    def test_two_sites_whatever_the_plan_says(self, federation):
        world = federation(3)
        world.alter_outbox(SITE, terms=replace(world.terms, min_sites=2))
        refusal_at_a0(world, Reason.COHORT_SIZE, cohort=world.names[:2])

    def test_round_reused(self, federation):
        world = federation(4)
        world.alter_outbox(SITE, attempts_seen=frozenset({world.config.attempt_id}))
        refusal_at_a0(world, Reason.ROUND_REUSED)

    def test_vector_reused(self, federation):
        world = federation(4)
        world.alter_outbox(SITE, masked_in=world.config.attempt_id._replace(attempt=0))
        refusal_at_a0(world, Reason.VECTOR_REUSED, attempt=1)

    def test_budget(self, federation):
        world = federation(4)
        world.alter_outbox(SITE, charged=False)
        refusal_at_a0(world, Reason.BUDGET)

    def test_an_attempt_that_failed_before_masking_is_retried_with_the_same_vector(self, federation):
        world = federation(4)
        world.alter_outbox(SITE, attempts_seen=frozenset({world.config.attempt_id}))
        config = replace(world.config, attempt=1)
        assert [type(effect) for effect in world.ask(SITE, 0, config, attempt=1)] == [Persist, Send]

    def test_cohort_lacks_peers(self, federation):
        world = federation(4)
        world.alter_session(SITE, rule=PeerRule(frozenset({"org of site-000", "org of site-009"}), 2))
        refusal_at_a0(world, Reason.COHORT_LACKS_PEERS)

    def test_too_few_organisations(self, federation):
        world = federation(4, organisations={"site-000": "one", "site-002": "one", "site-003": "one"})
        refusal_at_a0(world, Reason.TOO_FEW_SITES)

    def test_unknown_site(self, federation):
        world = federation(4)
        error = refusal_at_a0(world, Reason.UNKNOWN_SITE, cohort=(*world.names[:3], "stranger"))
        assert error.suspects == ("stranger",)

    @pytest.mark.parametrize("changes", [{"threshold": 2}, {"minimum": 2}])
    def test_threshold_too_low(self, federation, changes):
        refusal_at_a0(federation(4), Reason.THRESHOLD_TOO_LOW, **changes)

    def test_field_overflow(self, federation):
        world = federation(4)
        layout = FieldLayout(21, 3, ((7, 1.0), (4, 0.25)))
        refusal_at_a0(world, Reason.FIELD_OVERFLOW, terms=replace(world.terms, layout=layout))


# --- A2 ---


class TestPeerKeys:
    def test_a_forged_signature(self, federation):
        world = federation(4)
        keys = world.reach(1)[SITE].envelopes
        forged = keys[2][:-1] + bytes([keys[2][-1] ^ 1])
        error = assert_refused(
            world, world.ask(SITE, 1, m.PeerKeys((*keys[:2], forged, keys[3]))), Reason.BAD_SIGNATURE
        )
        assert error.suspects == ("site-002",)

    def test_keys_of_another_identity(self, federation):
        """The coordinator invents keys for a site and signs them itself."""
        world = federation(4)
        keys = world.reach(1)[SITE].envelopes
        theirs = wire.parse_envelope(keys[2])
        invented = wire.build_envelope(theirs.header, theirs.message, world.keys["site-000"].sign)
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys((*keys[:2], invented, keys[3]))), Reason.BAD_SIGNATURE)

    @pytest.mark.parametrize("keep", [True, False])
    def test_own_keys_altered_or_left_out(self, federation, keep):
        world = federation(5)
        keys = list(world.reach(1)[SITE].envelopes)
        own = wire.parse_envelope(keys[1])
        altered = replace(own.message, mask_key=bytes(range(32)))
        keys[1:2] = [wire.build_envelope(own.header, altered, world.keys[SITE].sign)] if keep else []
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys(tuple(keys))), Reason.KEY_ALTERED)

    @pytest.mark.parametrize("field", ["share_key", "mask_key"])
    def test_duplicate_keys(self, federation, field):
        world = federation(4)
        keys = list(world.reach(1)[SITE].envelopes)
        theirs, others = wire.parse_envelope(keys[2]), wire.parse_envelope(keys[3]).message
        copied = replace(theirs.message, **{field: others.mask_key})
        keys[2] = wire.build_envelope(theirs.header, copied, world.keys["site-002"].sign)
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys(tuple(keys))), Reason.DUPLICATE_KEY)

    @pytest.mark.parametrize("field", ["share_key", "mask_key"])
    def test_weak_keys(self, federation, field):
        world = federation(4)
        keys = list(world.reach(1)[SITE].envelopes)
        theirs = wire.parse_envelope(keys[2])
        weak = replace(theirs.message, **{field: bytes(32)})
        keys[2] = wire.build_envelope(theirs.header, weak, world.keys["site-002"].sign)
        error = assert_refused(world, world.ask(SITE, 1, m.PeerKeys(tuple(keys))), Reason.WEAK_KEY)
        assert error.suspects == ("site-002",)

    def test_keys_of_an_earlier_attempt(self, federation):
        world, earlier = federation(4), federation(4)
        earlier.restart_coordinator(replace(world.config, attempt=9))
        old = earlier.reach(1)[SITE].envelopes[2]
        keys = list(world.reach(1)[SITE].envelopes)
        keys[2] = old
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys(tuple(keys))), Reason.CONFIG_MISMATCH)

    def test_too_few_sites(self, federation):
        world = federation(4)
        keys = world.reach(1)[SITE].envelopes
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys(keys[:2])), Reason.TOO_FEW_SITES)

    def test_peers_rule_again(self, federation):
        world = federation(4)
        world.alter_session(SITE, rule=PeerRule(frozenset({"org of site-003"}), 1))
        keys = world.reach(1)[SITE].envelopes
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys(keys[:3])), Reason.COHORT_LACKS_PEERS)

    def test_keys_of_a_site_outside_the_cohort(self, federation):
        """The roster has five sites and the cohort four of them."""
        world = federation(5)
        world.restart_coordinator(replace(world.config, cohort=world.names[:4], threshold=3))
        keys = world.reach(1)[SITE].envelopes
        header = replace(wire.parse_envelope(keys[2]).header, source="site-004")
        keys_of_the_fifth = m.Advertise(*(bytes([index]) * 32 for index in (1, 2, 3)))
        strange = wire.build_envelope(header, keys_of_the_fifth, world.keys["site-004"].sign)
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys((*keys, strange))), Reason.UNKNOWN_SITE)

    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 1, 2, 3)])
    def test_another_spelling_of_the_set(self, federation, order):
        world = federation(4)
        keys = world.reach(1)[SITE].envelopes
        request = m.PeerKeys(tuple(keys[index] for index in order))
        assert_refused(world, world.ask(SITE, 1, request), Reason.BAD_MESSAGE)

    def test_another_message_signed_by_the_site(self, federation):
        world = federation(4)
        keys = world.reach(1)[SITE].envelopes
        header = wire.parse_envelope(keys[2]).header
        other = wire.build_envelope(header, m.Declined(), world.keys["site-002"].sign)
        assert_refused(world, world.ask(SITE, 1, m.PeerKeys((*keys[:2], other, keys[3]))), Reason.BAD_MESSAGE)


# --- A3 ---


class TestPeerShares:
    def test_altered_shares(self, federation):
        world = federation(4)
        sealed = world.reach(2)[SITE].sealed
        altered = (sealed[0][0], bytes([sealed[0][1][0] ^ 1]) + sealed[0][1][1:])
        error = assert_refused(world, world.ask(SITE, 2, m.PeerShares((altered, *sealed[1:]))), Reason.BAD_SHARE)
        assert error.suspects == ("site-000",)

    def test_shares_under_another_sender_s_name(self, federation):
        world = federation(4)
        (zero, a), (two, b), last = world.reach(2)[SITE].sealed
        assert_refused(world, world.ask(SITE, 2, m.PeerShares(((zero, b), (two, a), last))), Reason.BAD_SHARE)

    @pytest.mark.parametrize("name", [SITE, "stranger"])
    def test_a_sender_outside_u1(self, federation, name):
        world = federation(4)
        sealed = dict(world.reach(2)[SITE].sealed) | {name: bytes(82)}
        assert_refused(world, world.ask(SITE, 2, m.PeerShares(tuple(sorted(sealed.items())))), Reason.UNKNOWN_SITE)

    def test_too_few_sites(self, federation):
        world = federation(4)
        sealed = world.reach(2)[SITE].sealed
        assert_refused(world, world.ask(SITE, 2, m.PeerShares(sealed[:1])), Reason.TOO_FEW_SITES)

    def test_peers_rule_again(self, federation):
        world = federation(4)
        world.alter_session(SITE, rule=PeerRule(frozenset({"org of site-003"}), 1))
        sealed = world.reach(2)[SITE].sealed
        assert_refused(world, world.ask(SITE, 2, m.PeerShares(sealed[:2])), Reason.COHORT_LACKS_PEERS)

    def test_a_second_request_with_other_senders(self, federation):
        world = federation(4)
        request = world.reach(2)[SITE]
        world.ask(SITE, 2, request)
        assert_refused(world, world.ask(SITE, 3, m.PeerShares(request.sealed[:2])), Reason.ALREADY_MASKED)

    @pytest.mark.parametrize("words", [None, 3], ids=["gone", "of another size"])
    def test_a_vector_that_is_not_there_ends_the_session_too(self, federation, words):
        world = federation(4)
        request = world.reach(2)[SITE]
        vector = world.sessions[SITE].outbox.vector
        if words is None:
            del world.vectors.objects[vector]
        else:
            world.vectors.objects[vector] = bytes(8 * words)
        assert [type(effect) for effect in world.ask(SITE, 2, request)] == [Erase, Send, Abort]
        assert isinstance(world.states[SITE].stage.error, LocalError)


# --- A4 ---


class TestSurvivors:
    @pytest.mark.parametrize(
        ("survivors", "reason"),
        [
            (("site-000", "site-002", "site-003"), Reason.SURVIVORS_INVALID),
            (("site-000", SITE, "site-004"), Reason.SURVIVORS_INVALID),
            (("site-000", SITE), Reason.TOO_FEW_SITES),
            ((SITE,), Reason.TOO_FEW_SITES),
        ],
        ids=["without this site", "one that sent nothing", "below t", "alone"],
    )
    def test_sets_that_cannot_be(self, federation, survivors, reason):
        world = federation(4)
        world.reach(3)
        assert_refused(world, world.ask(SITE, 3, m.Survivors(survivors)), reason)

    def test_a_site_that_shared_no_keys_is_no_survivor(self, federation):
        world = federation(5)
        world.run({"site-004": 1}, until=3)
        assert_refused(world, world.ask(SITE, 3, m.Survivors(world.names)), Reason.SURVIVORS_INVALID)

    def test_peers_rule_again(self, federation):
        world = federation(4)
        world.alter_session(SITE, rule=PeerRule(frozenset({"org of site-003"}), 1))
        world.reach(3)
        assert_refused(world, world.ask(SITE, 3, m.Survivors(world.names[:3])), Reason.COHORT_LACKS_PEERS)

    def test_organisations_are_counted_again(self, federation):
        """Of three sites, three and one, six suffice; not the six of two organisations."""
        world = federation(7, organisations={f"site-{i:03}": "one" if i < 3 else "two" for i in range(6)})
        world.reach(3)
        assert_refused(world, world.ask(SITE, 3, m.Survivors(world.names[:6])), Reason.TOO_FEW_SITES)

    def test_a_second_set(self, federation):
        world = federation(5)
        world.ask(SITE, 3, world.reach(3)[SITE])
        assert_refused(world, world.ask(SITE, 4, m.Survivors(world.names[:4])), Reason.SURVIVORS_INVALID)


# --- A5 ---


class TestAgreement:
    def test_too_few_signatures(self, federation):
        world = federation(5)
        signatures = world.reach(4)[SITE].signatures
        assert_refused(world, world.ask(SITE, 4, m.Agreement(signatures[:3])), Reason.TOO_FEW_SITES)

    def test_signatures_over_another_set(self, federation):
        world = federation(5)
        signatures = dict(world.reach(4)[SITE].signatures)
        other = wire.survivors_statement(world.ctx, world.states[SITE].stage.u1, world.names[:4])
        signatures["site-002"] = world.keys["site-002"].sign(other)
        request = m.Agreement(tuple(signatures.items()))
        error = assert_refused(world, world.ask(SITE, 4, request), Reason.BAD_SIGNATURE)
        assert error.suspects == ("site-002",)

    def test_a_signer_outside_the_cohort(self, federation):
        """The roster has five sites and the cohort four of them; the fifth signs as well."""
        world = federation(5)
        world.restart_coordinator(replace(world.config, cohort=world.names[:4], threshold=3))
        signatures = world.reach(4)[SITE].signatures
        stage = world.states[SITE].stage
        statement = wire.survivors_statement(world.ctx, stage.u1, stage.survivors)
        request = m.Agreement((*signatures, ("site-004", world.keys["site-004"].sign(statement))))
        assert_refused(world, world.ask(SITE, 4, request), Reason.UNKNOWN_SITE)

    def test_one_kind_of_share_for_each_site_of_u2(self, federation):
        world = federation(5)
        world.run({"site-003": 2})
        assert isinstance(world.states[SITE].stage, Finished)
        (answer,) = [effect for effect in world.effects[SITE][-1] if isinstance(effect, Send)]
        kinds = [type(share) for share in wire.parse_envelope(answer.envelope).message.shares]
        assert kinds == [m.SelfMaskShare, m.SelfMaskShare, m.SelfMaskShare, m.PairKeyShare, m.SelfMaskShare]


# --- The order of requests, and answering twice ---


MESSAGES_OUT_OF_PLACE = [(stage, request) for stage in range(6) for request in range(5) if stage != request]


@pytest.mark.parametrize(("stage", "request_of"), MESSAGES_OUT_OF_PLACE)
def test_only_the_next_request_is_answered(federation, stage, request_of):
    """Every honest request of another stage, under a fresh sequence, is refused by name."""
    world = federation(4)
    requests = [world.config, *(federation(4).reach(sequence)[SITE] for sequence in range(1, 5))]
    world.run(until=stage)
    expected = {
        m.PeerShares: Reason.ALREADY_MASKED if stage > 2 else Reason.WRONG_STAGE,
        m.Survivors: Reason.SURVIVORS_INVALID if stage > 3 else Reason.WRONG_STAGE,
    }
    request = requests[request_of]
    binding = {"binding": world.ctx if 0 < stage < 5 else world.terms.plan_digest}
    effects = world.ask(SITE, stage, request, **binding)
    assert_refused(world, effects, expected.get(type(request), Reason.WRONG_STAGE))


@pytest.mark.parametrize("sequence", range(5))
class TestSequence:
    def test_same_bytes_get_the_same_answer(self, federation, sequence):
        world = federation(4)
        world.run(until=sequence)
        request = world.requests[SITE]
        (answer,) = [effect for effect in world.step(SITE, request) if isinstance(effect, Send)]
        state = world.states[SITE]
        assert world.step(SITE, request) == (answer,)
        assert world.states[SITE] == state

    def test_other_bytes_are_refused(self, federation, sequence):
        world = federation(4)
        world.run(until=sequence)
        world.step(SITE, world.requests[SITE])
        other = world.request(SITE, sequence, m.RunEnded(m.End.FAILED))
        assert_refused(world, world.step(SITE, other), Reason.SEQUENCE_REUSED)

    def test_older_requests_are_refused(self, federation, sequence):
        world = federation(4)
        world.run(until=sequence)
        if sequence:
            older = world.history[sequence - 1][SITE]
            world.step(SITE, world.requests[SITE])
            assert_refused(world, world.step(SITE, older), Reason.SEQUENCE_REUSED)

    def test_a_sequence_that_skips_is_refused(self, federation, sequence):
        world = federation(4)
        message = world.reach(sequence)[SITE]
        binding = {} if sequence else {"binding": world.terms.plan_digest}
        assert_refused(world, world.ask(SITE, sequence + 1, message, **binding), Reason.WRONG_STAGE)

    @pytest.mark.parametrize(
        "header",
        [{"run_id": 12}, {"round": 3}, {"attempt": 1}, {"binding": bytes(32)}],
        ids=lambda header: next(iter(header)),
    )
    def test_a_request_of_another_attempt_is_refused(self, federation, sequence, header):
        world = federation(4)
        message = world.reach(sequence)[SITE]
        assert_refused(world, world.ask(SITE, sequence, message, **header), Reason.CONFIG_MISMATCH)

    @pytest.mark.parametrize("header", [{"source": "site-000"}, {"destination": "site-000"}])
    def test_a_request_that_is_not_from_the_coordinator_to_this_site_is_refused(self, federation, sequence, header):
        world = federation(4)
        message = world.reach(sequence)[SITE]
        world.step(SITE, world.request(SITE, sequence, message, **header))
        assert world.states[SITE].stage.error.reason is Reason.BAD_MESSAGE


# --- Stored before sent ---


class TestEffects:
    def kinds(self, world) -> list[list[type]]:
        return [[type(effect) for effect in effects] for effects in world.effects[SITE]]

    def test_what_is_stored_is_stored_before_it_is_sent(self, federation):
        world = federation(4)
        world.run()
        assert self.kinds(world) == [
            [Persist, Send],  # the attempt is seen
            [Send],
            [Persist, Send, Erase],  # the vector is spent
            [Persist, Send],
            [Persist, Send, Erase],
        ]
        records = [
            [type(record) for effect in effects if isinstance(effect, Persist) for record in effect.records]
            for effects in world.effects[SITE]
        ]
        assert records == [[AttemptSeen], [], [VectorMasked, Answered], [Answered], [Answered]]

    def test_stored_answers_are_the_ones_sent(self, federation):
        world = federation(4)
        world.run()
        for effects in world.effects[SITE]:
            sent = [effect.envelope for effect in effects if isinstance(effect, Send)]
            persisted = [record for effect in effects if isinstance(effect, Persist) for record in effect.records]
            stored = [record.answer for record in persisted if isinstance(record, Answered)]
            assert stored in ([], sent)

    def test_the_plain_vector_goes_once_it_is_masked_and_the_masked_one_at_the_end(self, federation):
        world = federation(4)
        world.run()
        (masked,) = [record for record in world.effects[SITE][2][0].records if isinstance(record, VectorMasked)]
        assert masked.vector == world.sessions[SITE].outbox.vector
        assert world.effects[SITE][2][-1] == Erase((masked.vector,))
        assert world.effects[SITE][4][-1] == Erase((masked.masked,))

    @pytest.mark.parametrize("sequence", [2, 3, 4])
    def test_after_a_restart_the_stored_answer_is_given_again_and_nothing_else(self, federation, sequence):
        world = federation(4)
        world.run()
        session = world.sessions[SITE]
        (answered,) = [record for record in world.effects[SITE][sequence][0].records if isinstance(record, Answered)]
        state = session.after_restart(answered)
        state, effects = session.step(state, world.history[sequence][SITE])
        assert effects == (Send(wire.COORDINATOR, answered.answer),)
        _, effects = session.step(state, world.request(SITE, sequence + 1, m.Survivors(world.names)))
        assert effects[-1].error.reason is Reason.SECRETS_LOST

    @pytest.mark.parametrize("sequence", range(5))
    def test_after_a_restart_with_no_stored_answer_everything_is_refused(self, federation, sequence):
        world = federation(4)
        world.run(until=sequence)
        session = world.sessions[SITE]
        _, effects = session.step(session.after_restart(None), world.requests[SITE])
        assert effects[-1].error.reason is Reason.SECRETS_LOST


# --- Secrets live no longer than they are needed ---


def leaves(value: object) -> list[object]:
    """Everything inside a state."""
    if is_dataclass(value):
        return [leaf for f in fields(value) for leaf in leaves(getattr(value, f.name))]
    if isinstance(value, dict):
        return [leaf for pair in value.items() for item in pair for leaf in leaves(item)]
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


class TestSecrets:
    def test_each_stage_holds_only_what_later_ones_need(self, federation):
        world = federation(4)
        world.run(until=1)
        stage = world.states[SITE].stage
        private = {stage.share_keys.private, stage.mask_keys.private, stage.self_mask_seed}
        assert private <= set(leaves(stage))
        masks: set[object] = set()
        for sequence in range(1, 5):
            world.step(SITE, self.honest(federation, sequence))
            held = set(leaves(world.states[SITE].stage))
            assert not private & held
            if sequence == 1:
                shared = world.states[SITE].stage
                masks = {shared.self_mask_key, *shared.pair_mask_keys.values(), *shared.incoming_share_keys.values()}
            else:
                assert not masks & held
        assert world.states[SITE].stage == Finished()

    def honest(self, federation, sequence: int) -> bytes:
        """The same seed gives the same round, request by request."""
        world = federation(4)
        world.run(until=sequence)
        return world.requests[SITE]

    @pytest.mark.parametrize("sequence", range(5))
    def test_nothing_secret_shows_when_a_state_is_printed(self, federation, sequence):
        world = federation(4)
        world.run(until=sequence)
        state = world.states[SITE]
        stage = state.stage
        secrets = {
            1: lambda: [stage.share_keys.private, stage.mask_keys.private, stage.self_mask_seed],
            2: lambda: [stage.self_mask_key, *stage.pair_mask_keys.values(), stage.own_shares.self_mask.value],
            3: lambda: [dealt.pair_key.value for dealt in stage.dealt.values()],
            4: lambda: [dealt.self_mask.value for dealt in stage.dealt.values()],
        }.get(sequence, list)()
        shown = repr(state) + str(state)
        for secret in secrets:
            assert repr(secret)[2:-1] not in shown
            assert secret.hex() not in shown


# --- Any bytes whatever ---


@pytest.fixture(scope="module", params=range(5))
def asked(request, federation):
    """A federation of three, of which three are needed, with an honest request on its way."""
    world = federation(3)
    world.run(until=request.param)
    return world


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_request_is_refused(asked, mutations, data):
    session, state, honest = asked.sessions[SITE], asked.states[SITE], asked.requests[SITE]
    mutated = data.draw(mutations(honest))
    after, effects = session.step(state, mutated)
    if mutated == honest:
        assert not isinstance(after.stage, Failed)
    else:
        assert isinstance(after.stage, Failed)
        assert isinstance(after.stage.error, FoedusError)
        assert not any(isinstance(effect, Persist) for effect in effects)


@given(noise=st.binary(max_size=300))
def test_noise_is_refused(asked, noise):
    after, effects = asked.sessions[SITE].step(asked.states[SITE], noise)
    assert after.stage.error.reason is Reason.BAD_MESSAGE
    assert not any(isinstance(effect, Send | Persist) for effect in effects)
