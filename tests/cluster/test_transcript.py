"""What a site sends, byte by byte: where each field comes from, and that nothing of the data is in it or left anywhere.

Not in these tables: heartbeats, which are empty and come by the clock, and what TLS and HTTP/2 put around a message.
"""

from __future__ import annotations

import base64
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from foedus_client.store import SiteStore
from foedus_common.identity import SignedPlan
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import PROTOCOL_VERSION
from foedus_common.plan import schedule
from foedus_common.protocol import wire
from foedus_common.terms import field_layout
from needles import Needles, spellings
from processes import CLOCK
from transcript import LARGE, ROWS, SMALL, Recording, Sent, account, log_everything

RANDOM = np.random.default_rng(5)
PLANTED = [f"geheim\u00e9{RANDOM.bytes(9).hex()}" for _ in range(1000)]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    folder = tmp_path_factory.mktemp("recording")
    level = logging.getLogger().level
    handler = log_everything(folder / "everything.log")
    try:
        made = Recording(folder, PLANTED)
        yield made
        made.close()
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(level)
        handler.close()


# --- Every field has a source ---


@dataclass
class Witness:
    """What a site was told and what it said, to compare each field with. values: by field, in order."""

    recording: Recording
    site: str
    values: dict[str, list[Any]]

    @property
    def public_key(self) -> bytes:
        roster = self.recording.operator.registry.roster()
        assert roster is not None
        return (
            roster.verify(self.recording.operator.home.root_public_key(), now=0, highest_epoch=0)
            .site(self.site)
            .public_key
        )


Check = Callable[[Witness, list[Any]], bool]


def each(holds: Callable[[Witness, Any], bool]) -> Check:
    return lambda witness, values: all(holds(witness, value) for value in values)


def fresh(size: int) -> Check:
    """So many bytes, never the same twice, with no more pattern than random ones have."""
    return lambda _, values: all(len(v) == size for v in values) and len(set(values)) == len(values)


def sealed(_: Witness, values: list[bytes]) -> bool:
    return all(len(value) == wire.SEALED_BYTES for value in values) and len(set(values)) == len(values)


def pushed(witness: Witness, _: list[Any]) -> bool:
    """Chunks make up exactly the vectors that masked inputs name."""
    digests = witness.values["MaskedInput.vector.digest"]
    sizes = witness.values["MaskedInput.vector.size"]
    data, whole = b"".join(witness.values["Push.chunk"]), []
    for size in sizes:
        whole.append(hashlib.sha256(data[:size]).digest())
        data = data[size:]
    return whole == digests and not data


SOURCES: dict[str, tuple[str, Check]] = {
    "Control.hello.protocol_version": ("a constant", each(lambda w, v: v == PROTOCOL_VERSION)),
    "Control.heartbeat": ("empty; the clock", each(lambda w, v: v is None)),
    "Control.reply.id": ("the request's, drawn by the coordinator", each(lambda w, v: len(v) == 32)),
    "envelope.run_id": ("the request's", each(lambda w, v: v == w.recording.run_id)),
    "envelope.round": ("the request's", lambda w, v: sorted(set(v)) == [0, 1]),
    "envelope.attempt": ("the request's", each(lambda w, v: v == 0)),
    "envelope.binding": (
        "the plan's digest, or ctx: hashes of what the coordinator sent",
        each(lambda w, v: len(v) == 32),
    ),
    "envelope.source": ("the site's name", each(lambda w, v: v == w.site)),
    "envelope.destination": ("a constant", each(lambda w, v: v == wire.COORDINATOR)),
    "envelope.sequence": ("the request's", lambda w, v: sorted(set(v)) == [0, 1, 2, 3, 4]),
    "envelope.signature": (
        "the identity key, over all other fields",
        each(lambda w, v: v.verify(w.public_key) is None),
    ),
    "Ready": ("empty", each(lambda w, v: v is None)),
    "JournalHeads.own.number": ("how many entries the journal has", each(lambda w, v: v > 0)),
    "JournalHeads.own.head": ("SHA-256 over entries that hold nothing to guess", each(lambda w, v: len(v) == 32)),
    "JournalHeads.own.signature": ("the identity key, over that head", each(lambda w, v: len(v) == 64)),
    "JournalHeads.seen[].number": ("the coordinator's journal", each(lambda w, v: v > 0)),
    "JournalHeads.seen[].head": ("the coordinator's journal", each(lambda w, v: len(v) == 32)),
    "JournalHeads.seen[].signature": ("the coordinator's", each(lambda w, v: len(v) == 64)),
    "JournalHeads.seen[].countersignature": ("the identity key, over that head", each(lambda w, v: len(v) == 64)),
    "Advertise.share_key": ("a fresh X25519 key", fresh(32)),
    "Advertise.mask_key": ("a fresh X25519 key", fresh(32)),
    "Advertise.commitment": ("a hash of a fresh seed", fresh(32)),
    "ShareKeys.sealed[]": ("AES-256-GCM under a key of two sites", sealed),
    "MaskedInput.vector.digest": ("SHA-256 of the masked vector", fresh(32)),
    "MaskedInput.vector.size": ("the plan", each(lambda w, v: v in sizes_of_the_plan(w))),
    "Consistency.signature": ("the identity key, over ctx, u1 and the survivors", fresh(64)),
    "Unmask.shares[].value": ("what other sites dealt to this one, and its own share", fresh(33)),
    "Stat.run_id": ("the run's", each(lambda w, v: v == w.recording.run_id)),
    "Stat.sha256": ("SHA-256 of the masked vector", lambda w, v: v == vectors(w)),
    "Stat.size": ("the plan", each(lambda w, v: v in sizes_of_the_plan(w))),
    "Push.header.object.run_id": ("the run's", each(lambda w, v: v == w.recording.run_id)),
    "Push.header.object.sha256": ("SHA-256 of the masked vector", lambda w, v: v == vectors(w)),
    "Push.header.object.size": ("the plan", each(lambda w, v: v in sizes_of_the_plan(w))),
    "Push.chunk": ("the masked vector", pushed),
    "Pull.object.run_id": ("the run's", each(lambda w, v: v == w.recording.run_id)),
    "Pull.object.sha256": ("what the coordinator named", each(lambda w, v: len(v) == 64)),
    "Pull.object.size": ("what the coordinator named", each(lambda w, v: v > 0)),
}
"""Every field that a site ever sends: where it comes from, and what holds of all its values in a run."""


def vectors(witness: Witness) -> list[str]:
    return [digest.hex() for digest in witness.values["MaskedInput.vector.digest"]]


def sizes_of_the_plan(witness: Witness) -> set[int]:
    operator = witness.recording.operator
    signed = operator.store.runs.run(witness.recording.run_id).signed_plan
    assert signed is not None
    agreed = SignedPlan.from_bytes(signed).verify(operator.home.plan_key().public_key().public_bytes_raw())
    return {field_layout(agreed, each_round).size for each_round in schedule(agreed.plan)}


@pytest.mark.parametrize("site", ROWS)
def test_every_byte_that_a_site_sends_belongs_to_a_field_with_a_source(recording: Recording, site: str) -> None:
    values: dict[str, list[Any]] = defaultdict(list)
    for sent in recording.sites[site].sent:
        for name, value in account(sent):
            values[name].append(value)
    assert set(values) | {"Control.heartbeat"} == set(SOURCES)
    witness = Witness(recording, site, values)
    for name, (source, holds) in SOURCES.items():
        assert holds(witness, values[name]), f"{name} is not {source}"


def test_a_byte_beside_the_schema_is_noticed() -> None:
    frame = pb.FromSite(hello=pb.Hello(protocol_version=1)).SerializeToString()
    with pytest.raises(AssertionError):
        list(account(Sent("Control", frame + b"\x78\x01")))


@pytest.mark.parametrize("site", ROWS)
def test_a_masked_vector_looks_like_random_bytes(recording: Recording, site: str) -> None:
    """As many ones as zeros, within six standard deviations."""
    pushed = [dict(account(sent)) for sent in recording.sites[site].sent if sent.method == "Push"]
    bits = np.unpackbits(np.frombuffer(b"".join(part.get("Push.chunk", b"") for part in pushed), np.uint8))
    assert bits.size > 1000
    assert abs(bits.mean() - 0.5) < 6 / (2 * np.sqrt(bits.size))


# --- Nothing of the data anywhere ---


def test_none_of_a_thousand_secrets_is_sent_or_left_anywhere(recording: Recording) -> None:
    """In the wire's bytes, every log at every level, both databases and journals, objects, and all else on disk."""
    needles = Needles(PLANTED)
    for site in ROWS:
        wire_bytes = b"".join(sent.data for sent in recording.sites[site].sent)
        assert needles.found_in(wire_bytes) == set()
    holding = set()
    for path in recording.folder.rglob("*"):
        if path.is_file() and needles.found_in(path.read_bytes()):
            holding.add(path.relative_to(recording.folder).as_posix())
    assert holding == {f"data/{site}.csv" for site in ROWS}


def test_the_search_finds_every_spelling_of_every_secret() -> None:
    needles = Needles(PLANTED)
    assert len(PLANTED) == len(set(PLANTED)) == 1000
    for secret in (PLANTED[0], PLANTED[-1]):
        for spelling in spellings(secret):
            assert spelling in needles.found_in(b"before" + spelling + b"after")
        for lead in range(3):
            assert needles.found_in(base64.b64encode(b"x" * lead + secret.encode() + b"rest of it"))
    assert needles.found_in(b"geheim" + bytes(100)) == set()


@pytest.mark.parametrize("site", ROWS)
def test_heads_of_the_journal_confirm_no_guess_of_rows_or_vectors(recording: Recording, site: str) -> None:
    """Heads of the journal are sent and stand for the ledger, too. An entry with a hash of the rows in it holds 256
    bits besides that only this site can know, and none holds the hash of a vector that was not masked."""
    store = SiteStore(recording.folder / site / "site.db", CLOCK)
    (dataset,) = store.datasets()
    secrets = [dataset.file_sha256, dataset.rows_sha256]
    secrets += [outbox.vector.digest.hex() for n in (0, 1) if (outbox := store.outbox(recording.run_id, n))]
    events = [entry.event for entry in (*store.journal_entries(), *(entry for entry, _ in store.ledger_entries()))]
    store.close()
    assert len(secrets) == 4
    telling = [event for event in events if any(secret in str(event) for secret in secrets)]
    assert [event["event"] for event in telling] == ["add_dataset"]
    assert len(bytes.fromhex(telling[0]["blind"])) == 32


# --- Rows do not show ---


def test_a_hundred_rows_or_two_hundred_make_the_same_messages_and_bytes(recording: Recording) -> None:
    """And the same steps. Heartbeats apart, which come by the clock."""

    def shape(site: str) -> dict[str, list[int]]:
        sizes = defaultdict(list)
        for sent in recording.sites[site].sent:
            if sent.method != "Control" or pb.FromSite.FromString(sent.data).WhichOneof("part") != "heartbeat":
                sizes[sent.method].append(len(sent.data))
        return sizes

    assert ROWS == {SMALL: 100, LARGE: 200}
    assert shape(SMALL) == shape(LARGE)
    steps = [
        {
            (index, total)
            for trainer in recording.sites[site].trainers
            for index, what, total in trainer.work
            if what == "steps"
        }
        for site in ROWS
    ]
    assert steps[0] == steps[1]
    assert {index for index, _ in steps[0]} == {0, 1}


def test_the_trainer_leaves_no_core_dump(recording: Recording) -> None:
    limits = [trainer.core_limit for site in ROWS for trainer in recording.sites[site].trainers]
    assert limits == [(0, 0), (0, 0)]
