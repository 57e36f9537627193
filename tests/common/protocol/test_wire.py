"""Bytes in and out. Failure: a message that changes on the way, bytes with two readings, or any other exception."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_common.canonical import enc, labelled
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.link.transport import MAX_BODY
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.draw import MAX_SITES
from foedus_common.protocol.effects import Send
from foedus_common.protocol.encoding import FieldLayout

DOCUMENT = (Path(__file__).parents[3] / "docs" / "protocol.md").read_text()
SIGN = Ed25519PrivateKey.from_private_bytes(bytes(32)).sign
NUMBERS = st.integers(0, 2**63 - 1)
SITES = st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True)
COHORTS = st.lists(SITES, max_size=5, unique=True).map(lambda sites: tuple(sorted(sites)))
LABELS = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100)
POSITIVE = st.floats(0, 1e300, exclude_min=True)


def sized(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def by_site(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[tuple[str, Any], ...]]:
    return st.dictionaries(SITES, values, max_size=4).map(lambda table: tuple(sorted(table.items())))


REFS = st.builds(m.VectorRef, sized(32), NUMBERS)
LAYOUTS = st.builds(
    FieldLayout,
    st.integers(16, 32),
    st.integers(1, 128),
    st.lists(st.tuples(st.integers(1, 2**40), st.floats(1e-100, 1e100)), min_size=1, max_size=4).map(tuple),
)
TERMS = st.builds(
    m.RoundTerms,
    run_id=NUMBERS,
    round=NUMBERS,
    phase=NUMBERS,
    plan_digest=sized(32),
    base_model_hash=sized(32),
    adapter_hash=sized(32),
    trainer_version=LABELS,
    layout=LAYOUTS,
    noise=st.builds(m.Noise, st.sampled_from(["none", "record", "site"]), POSITIVE, POSITIVE),
    min_sites=NUMBERS,
    colluding=NUMBERS,
)
CONFIGS = st.builds(m.RoundConfig, NUMBERS, TERMS, NUMBERS, NUMBERS, sized(32), COHORTS, NUMBERS, NUMBERS)
SHARES = st.builds(m.SelfMaskShare, sized(33)) | st.builds(m.PairKeyShare, sized(33))
ENTRIES = st.integers(0, 2**63 - 1)
MESSAGES: dict[type, st.SearchStrategy[Any]] = {
    m.Propose: st.builds(m.Propose, st.binary(min_size=1, max_size=50), sized(64), REFS),
    m.RunEnded: st.builds(m.RunEnded, st.sampled_from(m.End)),
    m.JournalHeads: st.builds(
        m.JournalHeads,
        st.builds(m.JournalHead, ENTRIES, sized(32), sized(64)),
        st.lists(st.builds(m.SeenHead, ENTRIES, sized(32), sized(64), sized(64)), max_size=m.MAX_SEEN).map(tuple),
    ),
    m.Invite: st.builds(m.Invite, st.binary(min_size=1, max_size=50), sized(64), sized(32), REFS),
    m.Declined: st.builds(m.Declined),
    m.Ready: st.builds(m.Ready),
    m.Draw: st.builds(m.Draw),
    m.Commitment: st.builds(m.Commitment, sized(32)),
    m.Commitments: st.builds(m.Commitments, by_site(sized(32))),
    m.Seed: st.builds(m.Seed, sized(32)),
    m.RoundConfig: CONFIGS,
    m.DrawnConfig: st.builds(m.DrawnConfig, CONFIGS, by_site(sized(32))),
    m.Advertise: st.builds(m.Advertise, sized(32), sized(32), sized(32)),
    m.PeerKeys: st.builds(m.PeerKeys, st.lists(st.binary(min_size=1, max_size=50), max_size=4).map(tuple)),
    m.ShareKeys: st.builds(m.ShareKeys, st.lists(sized(82), max_size=4).map(tuple)),
    m.PeerShares: st.builds(m.PeerShares, by_site(sized(82))),
    m.MaskedInput: st.builds(m.MaskedInput, REFS),
    m.Survivors: st.builds(m.Survivors, COHORTS),
    m.Consistency: st.builds(m.Consistency, sized(64)),
    m.Agreement: st.builds(m.Agreement, by_site(sized(64))),
    m.Unmask: st.builds(m.Unmask, st.lists(SHARES, max_size=4).map(tuple)),
}
HEADERS = st.builds(
    wire.Header, NUMBERS, NUMBERS, NUMBERS, sized(32), SITES | st.just(wire.COORDINATOR), SITES, NUMBERS
)


def build(header: wire.Header, message: m.Message) -> bytes:
    return wire.build_envelope(header, message, None if header.source == wire.COORDINATOR else SIGN)


def reading(data: bytes) -> wire.Envelope | None:
    """The envelope, or None if it is refused as it must be; any other exception is a failure."""
    try:
        return wire.parse_envelope(data)
    except RemoteError as error:
        if error.reason is not Reason.BAD_MESSAGE:
            raise
        return None


def test_every_message_is_tested():
    assert set(MESSAGES) == set(get_args(m.ToSite)) | set(get_args(m.FromSite))


@pytest.mark.parametrize("kind", MESSAGES)
@settings(max_examples=30)
@given(data=st.data())
def test_a_message_comes_back_as_it_was(kind, data):
    header, message = data.draw(HEADERS), data.draw(MESSAGES[kind])
    sent = build(header, message)
    envelope = wire.parse_envelope(sent)
    assert (envelope.header, envelope.message) == (header, message)
    assert f"`{kind.__name__}` {sent[1]}" in DOCUMENT, "its type on the wire is documented"
    told = sent[: len(sent) - len(envelope.signature)]
    assert (told + envelope.signature, labelled("envelope", told)) == (sent, envelope.signed)


@pytest.mark.parametrize("kind", MESSAGES)
@settings(max_examples=60)
@given(data=st.data())
def test_mutated_bytes_are_refused_or_have_one_reading(kind, mutations, data):
    mutated = data.draw(mutations(build(data.draw(HEADERS), data.draw(MESSAGES[kind]))))
    envelope = reading(mutated)
    if envelope:
        again = wire.build_envelope(envelope.header, envelope.message, lambda _: envelope.signature)
        assert again == mutated


@given(st.binary(max_size=2000))
def test_noise_is_refused(noise):
    with pytest.raises(RemoteError) as caught:
        wire.parse_envelope(noise)
    assert caught.value.reason is Reason.BAD_MESSAGE


def test_size_is_checked_before_anything_else():
    with pytest.raises(RemoteError, match="bytes where"):
        wire.parse_envelope(bytes(wire.MAX_ENVELOPE_BYTES + 1))


@given(TERMS)
def test_terms_survive_the_outbox(terms):
    assert wire.parse_terms(wire.terms_bytes(terms)) == terms


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite(federation, value):
    terms = replace(federation(3).terms, noise=m.Noise("record", 3.75, 0.8))
    data = wire.terms_bytes(terms)
    assert data.count(struct.pack(">d", 3.75)) == 1
    with pytest.raises(RemoteError, match="finite"):
        wire.parse_terms(data.replace(struct.pack(">d", 3.75), struct.pack(">d", float(value))))


@pytest.mark.parametrize(("value", "size"), [(0, 0), (1, 1), (255, 1), (256, 2), (2**63 - 1, 8)])
def test_counts_take_as_few_bytes_as_they_can(value, size):
    def sent(number: int) -> bytes:
        return build(wire.Header(1, 0, 0, bytes(32), wire.COORDINATOR, "a", number), m.Ready())

    assert len(sent(value)) == len(sent(0)) + size
    with pytest.raises(RemoteError, match="zeros in front"):
        wire.parse_envelope(sent(1).replace(b"\1\1", b"\2\0\1", 1))


def test_a_count_is_one_that_a_database_holds():
    data = build(wire.Header(1, 2**63 - 1, 0, bytes(32), wire.COORDINATOR, "a", 0), m.Ready())
    assert wire.parse_envelope(data)
    with pytest.raises(RemoteError, match="database"):
        wire.parse_envelope(data.replace(b"\x7f" + b"\xff" * 7, b"\xff" * 8))


class TestSpelling:
    @pytest.mark.parametrize("sites", [("b", "a"), ("a", "a")])
    def test_sets_of_sites_are_ascending(self, sites):
        with pytest.raises(LocalError):
            m.Survivors(sites)
        with pytest.raises(LocalError):
            m.Agreement(tuple((site, bytes(64)) for site in sites))
        with pytest.raises(LocalError):
            m.PeerShares(tuple((site, bytes(82)) for site in sites))
        with pytest.raises(LocalError):
            m.Commitments(tuple((site, bytes(32)) for site in sites))

    def test_a_list_that_is_not_ascending_is_refused_on_the_wire(self):
        header = wire.Header(1, 1, 1, bytes(32), wire.COORDINATOR, "a", 3)
        data = wire.build_envelope(header, m.Survivors(("a", "b")))
        with pytest.raises(RemoteError, match="ascending"):
            wire.parse_envelope(data.replace(enc("a", "b"), enc("b", "a")))

    def test_a_site_cannot_be_called_coordinator(self):
        header = wire.Header(1, 1, 1, bytes(32), wire.COORDINATOR, "a", 3)
        with pytest.raises(RemoteError):
            wire.parse_envelope(wire.build_envelope(header, m.Survivors((wire.COORDINATOR,))))

    @pytest.mark.parametrize(
        "changes", [{"clip": float("nan")}, {"clip": -1.0}, {"multiplier": float("inf")}, {"unit": "row"}]
    )
    def test_noise_that_makes_no_sense(self, changes):
        with pytest.raises(LocalError):
            m.Noise(**{"unit": "record", "clip": 1.0, "multiplier": 1.0} | changes)


class TestSignatures:
    header = wire.Header(1, 2, 3, bytes(32), "alpha", wire.COORDINATOR, 0)

    @pytest.mark.parametrize("message", [m.Ready(), m.Advertise(bytes(32), bytes(32), bytes(32)), m.ShareKeys(())])
    def test_a_site_must_sign(self, message):
        with pytest.raises(RemoteError):
            wire.parse_envelope(wire.build_envelope(self.header, message))

    def test_the_coordinator_has_no_signature(self):
        header = wire.Header(1, 2, 3, bytes(32), wire.COORDINATOR, "alpha", 0)
        with pytest.raises(RemoteError):
            wire.parse_envelope(wire.build_envelope(header, m.RunEnded(m.End.FINISHED), SIGN))

    @pytest.mark.parametrize("field", ["run_id", "round", "attempt", "binding", "source", "destination", "sequence"])
    def test_every_field_of_the_header_is_signed(self, field):
        """Two envelopes that differ in one field are signed over different bytes."""
        other = {"binding": bytes(31) + b"\1", "source": "beta", "destination": "beta"}.get(field, 9)
        changed = wire.Header(**self.header.__dict__ | {field: other})
        one, two = (wire.parse_envelope(build(header, m.Ready())) for header in (self.header, changed))
        assert one.signed != two.signed

    def test_type_and_body_are_signed(self):
        signed = {
            wire.parse_envelope(build(self.header, message)).signed
            for message in (m.Ready(), m.Declined(), m.Survivors(("a",)), m.Survivors(("b",)))
        }
        assert len(signed) == 4


def test_bytes_up_per_peer(federation):
    """The five envelopes that a site sends in a round: 116 bytes for each peer, and less than 1 KiB besides, for
    the longest name, the largest run id, and more rounds and attempts than anybody will see."""

    def sent(sites: int) -> int:
        world = federation(sites)
        world.run()
        told = [effect for effects in world.effects["site-000"] for effect in effects if isinstance(effect, Send)]
        assert len(told) == 5
        longest = (
            replace(
                wire.parse_envelope(each.envelope).header, run_id=2**63 - 1, round=65535, attempt=255, source="x" * 40
            )
            for each in told
        )
        return sum(
            len(wire.build_envelope(header, wire.parse_envelope(each.envelope).message, SIGN))
            for header, each in zip(longest, told, strict=True)
        )

    few, many = sent(6), sent(12)
    each = (many - few) // 6
    assert each == 116
    assert few - 5 * each == 1016


def test_the_largest_messages_of_the_largest_cohort_fit():
    names = [f"{'x' * 37}{index:03}" for index in range(128)]
    randbytes = random.Random(0).randbytes
    header = wire.Header(1, 2, 3, bytes(32), wire.COORDINATOR, names[0], 1)
    advertisement = wire.build_envelope(
        wire.Header(1, 2, 3, bytes(32), names[0], wire.COORDINATOR, 0),
        m.Advertise(bytes(32), bytes(32), bytes(32)),
        SIGN,
    )
    for message in (
        m.PeerKeys((advertisement,) * 128),
        m.PeerShares(tuple((name, randbytes(82)) for name in names)),
        m.Agreement(tuple((name, randbytes(64)) for name in names)),
    ):
        assert wire.parse_envelope(wire.build_envelope(header, message)).message == message


@given(TERMS)
@settings(max_examples=1)
def test_the_largest_draw_fits_one_message_of_the_link(terms):
    names = [f"{'x' * 36}{index:04}" for index in range(MAX_SITES)]
    told = tuple((name, bytes(32)) for name in names)
    config = m.RoundConfig(2, terms, 3, 1, bytes(32), tuple(names[:128]), 65, 3)
    header = wire.Header(1, 2, 3, bytes(32), wire.COORDINATOR, names[0], 1)
    for message in (m.Commitments(told), m.DrawnConfig(config, told)):
        request = wire.build_envelope(header, message)
        assert wire.parse_envelope(request).message == message
        assert len(request) <= MAX_BODY
    with pytest.raises(RemoteError):
        wire.parse_envelope(wire.build_envelope(header, m.Commitments((*told, ("y", bytes(32))))))
