"""Heads of journals, shown and countersigned: who loses or rewrites entries has the other side's copy against him."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.checkpoints import (
    Countersignature,
    Head,
    Notary,
    Verified,
    accept_losses,
    heads_in,
    sheet,
    statement,
    verify,
)
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError, RemoteError
from foedus_common.identity import public_bytes
from foedus_common.journal import START, BrokenChain, Checkpoint, Entry, Refusals, next_entry
from foedus_common.protocol.messages import JournalHead, JournalHeads


class Book:
    """`HeadBook` in memory."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.kept: dict[tuple[Any, ...], Head] = {}
        self.marks: dict[tuple[Any, ...], Countersignature] = {}

    def journal_end(self) -> Checkpoint:
        return Checkpoint(self.entries[-1].number, self.entries[-1].head) if self.entries else START

    def journal_head(self, number: int) -> bytes | None:
        return self.entries[number - 1].head if 0 < number <= len(self.entries) else None

    def heads(self, owner: str) -> list[Head]:
        return sorted((head for head in self.kept.values() if head.owner == owner), key=lambda head: head.number)

    def newest_heads(self, owner: str, count: int) -> list[Head]:
        return self.heads(owner)[-count:]

    def heads_at(self, owner: str, number: int) -> list[Head]:
        return [head for head in self.heads(owner) if head.number == number]

    def countersignatures(self) -> list[Countersignature]:
        return sorted(self.marks.values(), key=lambda mark: mark.number)

    def keep(self, kept: Any, marks: Any = ()) -> None:
        for head in kept:
            self.kept.setdefault((head.owner, head.number, head.head), head)
        for mark in marks:
            self.marks.setdefault((mark.number, mark.head, mark.witness), mark)

    def log(self, event: str, **details: Any) -> None:
        self.entries.append(next_entry(self.journal_end(), 0.0, event, details))

    @property
    def events(self) -> list[str]:
        return [entry.event["event"] for entry in self.entries]


class Party:
    """One side: a journal of three entries, and its key."""

    def __init__(self, name: str, seed: bytes) -> None:
        key = Ed25519PrivateKey.from_private_bytes(seed * 32)
        self.name, self.book, self.public_key = name, Book(), public_bytes(key)
        self.notary = Notary(name, self.public_key, key.sign, self.book)
        self.write(3)

    def write(self, count: int, word: str = "x") -> None:
        for number in range(count):
            self.book.log(word, number=number)

    def verified(self, other: Party, heads: list[Head] | None = None) -> Verified:
        book = self.book
        kept = [*book.heads(self.name), *(heads or [])]
        keys = {other.name: {other.public_key}}
        return verify(self.name, book.entries, kept, book.countersignatures(), {self.public_key}, keys)


@pytest.fixture
def pair() -> tuple[Party, Party]:
    return Party("@coordinator", b"c"), Party("north", b"n")


def exchange(coordinator: Party, site: Party) -> list[str]:
    """One message and its answer, as over the link; what is amiss on either side."""
    request = coordinator.notary.show(site.name, coordinator.notary.sign_end())
    amiss = site.notary.take(coordinator.name, coordinator.public_key, request)
    answer = site.notary.show(coordinator.name, site.notary.sign_end(), request.own)
    return amiss + coordinator.notary.take(site.name, site.public_key, answer)


def test_after_two_exchanges_each_side_has_the_other_s_word_for_its_own_end(pair: tuple[Party, Party]) -> None:
    coordinator, site = pair
    assert exchange(coordinator, site) == []
    assert exchange(coordinator, site) == []
    for one, other in (pair, pair[::-1]):
        assert one.verified(other).witnessed == {other.name: 3}
        assert one.verified(other).signed == 3
    coordinator.write(2)
    assert coordinator.verified(site).end.number == 5


@pytest.mark.parametrize("length", range(3))
def test_an_end_that_was_cut_off_is_named(pair: tuple[Party, Party], length: int) -> None:
    exchange(*pair)
    exchange(*pair)
    for one, other in (pair, pair[::-1]):
        del one.book.entries[length:]
        with pytest.raises(BrokenChain, match=f"entry {length + 1}: it is missing"):
            one.verified(other)


def test_a_side_that_was_rolled_back_learns_it_from_the_other_and_goes_on_once_it_says_so(
    pair: tuple[Party, Party],
) -> None:
    for one in (0, 1):
        coordinator, site = Party("@coordinator", b"c"), Party("north", b"n")
        exchange(coordinator, site)
        rolled, other = ((coordinator, site), (site, coordinator))[one]
        copy = (list(rolled.book.entries), dict(rolled.book.kept), dict(rolled.book.marks))
        rolled.write(4)
        exchange(coordinator, site)
        rolled.book.entries, rolled.book.kept, rolled.book.marks = copy
        rolled.write(1, "y")
        assert rolled.verified(other).end.number == 4  # by itself it looks whole
        amiss = exchange(coordinator, site)
        assert amiss == [
            f"{other.name} has seen this journal with 7 entries that are not those here; it was restored from an older "
            "copy, or altered."
        ]
        assert exchange(coordinator, site) == []  # said once
        assert rolled.book.events.count("journal.behind") == 1
        with pytest.raises(BrokenChain, match=r"entry [67]:"):
            rolled.verified(other)

        assert accept_losses(rolled.book, rolled.book.entries, rolled.name, "anna")
        verified = rolled.verified(other)
        assert [mark.number for mark in verified.losses] == [7]
        rolled.write(9)
        assert exchange(coordinator, site) == []
        exchange(coordinator, site)
        assert rolled.verified(other).witnessed[other.name] == len(rolled.book.entries)


def test_what_was_signed_since_the_entries_were_read_is_no_loss(pair: tuple[Party, Party]) -> None:
    coordinator, site = pair
    entries = list(coordinator.book.entries)
    coordinator.write(1)
    exchange(coordinator, site)
    assert accept_losses(coordinator.book, entries, coordinator.name, "anna") == []
    assert coordinator.book.events == ["x"] * 4


def test_two_journals_of_one_length_are_entered_as_evidence_once(pair: tuple[Party, Party]) -> None:
    coordinator, site = pair
    exchange(coordinator, site)
    coordinator.book.entries.pop()
    coordinator.write(1, "y")
    first = exchange(coordinator, site)
    assert first[0].startswith("@coordinator signed two different journals of 3 entries")
    evidence = site.book.entries[-1].event
    assert (evidence["event"], evidence["number"], len(evidence["heads"])) == ("peer.journal_differs", 3, 2)
    exchange(coordinator, site)
    assert site.book.events.count("peer.journal_differs") == 1


def test_messages_that_overtake_each_other_prove_nothing(pair: tuple[Party, Party]) -> None:
    coordinator, site = pair
    early = coordinator.notary.show(site.name, coordinator.notary.sign_end())
    coordinator.write(2)
    late = coordinator.notary.show(site.name, coordinator.notary.sign_end())
    for message in (late, early, late):
        assert site.notary.take(coordinator.name, coordinator.public_key, message) == []
    assert [head.number for head in site.book.heads(coordinator.name)] == [3, 5]


def forged(message: JournalHeads, place: str) -> JournalHeads:
    """The message with one signature, number or hash that is not what was signed."""
    seen = message.seen[0]
    changes: dict[str, Any] = {
        "own number": {"own": replace(message.own, number=99)},
        "own head": {"own": replace(message.own, head=bytes(32))},
        "own signature": {"own": replace(message.own, signature=bytes(64))},
        "seen number": {"seen": (replace(seen, number=99),)},
        "seen head": {"seen": (replace(seen, head=bytes(32)),)},
        "seen signature": {"seen": (replace(seen, signature=bytes(64)),)},
        "countersignature": {"seen": (replace(seen, countersignature=bytes(64)),)},
    }
    return replace(message, **changes[place])


@pytest.mark.parametrize(
    "place",
    [
        "own number",
        "own head",
        "own signature",
        "seen number",
        "seen head",
        "seen signature",
        "countersignature",
    ],
)
def test_a_lie_about_heads_leaves_nothing_behind(pair: tuple[Party, Party], place: str) -> None:
    coordinator, site = pair
    exchange(coordinator, site)
    coordinator.write(1)
    request = coordinator.notary.show(site.name, coordinator.notary.sign_end())
    before = (list(site.book.entries), dict(site.book.kept), dict(site.book.marks))
    with pytest.raises(RemoteError, match="BAD_SIGNATURE"):
        site.notary.take(coordinator.name, coordinator.public_key, forged(request, place))
    assert (site.book.entries, site.book.kept, site.book.marks) == before


def test_nothing_is_signed_but_the_one_statement() -> None:
    """Whatever is shown, what a site signs begins with the label and names whose journal it is."""
    signed: list[bytes] = []
    party = Party("north", b"n")

    def sign(message: bytes) -> bytes:
        signed.append(message)
        return bytes(64)

    notary = replace(party.notary, sign=sign)
    shown = JournalHead(2**63 - 1, b"\xff" * 32, b"\xfe" * 64)
    notary.show("@coordinator", notary.sign_end(), shown)
    end = party.book.journal_end()
    assert signed == [statement("north", end), statement("@coordinator", Checkpoint(shown.number, shown.head))]
    name, number = b"journal-head", (3).to_bytes(8, "big")
    parts = (name, b"north", number, end.head)
    assert signed[0] == b"foedus/v1/" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@pytest.mark.parametrize("kind", ["own", "witness"])
def test_a_kept_signature_that_is_not_good_is_named(pair: tuple[Party, Party], kind: str) -> None:
    coordinator, site = pair
    exchange(coordinator, site)
    book = coordinator.book
    rows: dict[Any, Any] = book.kept if kind == "own" else book.marks
    for key, row in rows.items():
        rows[key] = replace(row, signature=bytes(64))
    with pytest.raises(BrokenChain, match="entry 3: the signature"):
        coordinator.verified(site)
    stranger = public_bytes(Ed25519PrivateKey.from_private_bytes(b"s" * 32))
    with pytest.raises(BrokenChain):
        coordinator.verified(replace_key(site, stranger))


def replace_key(party: Party, public_key: bytes) -> Party:
    other = Party(party.name, b"n")
    other.public_key = public_key
    return other


def test_a_sheet_carries_heads_to_the_other_side(pair: tuple[Party, Party]) -> None:
    coordinator, site = pair
    exchange(coordinator, site)
    text = sheet(site.name, site.book.kept.values())
    heads = heads_in(text, coordinator.name, [coordinator.public_key])
    assert [head.number for head in heads] == [3]
    coordinator.book.kept.clear()
    coordinator.book.marks.clear()
    del coordinator.book.entries[1:]  # whoever deletes the signatures here as well
    assert coordinator.verified(site).end.number == 1
    with pytest.raises(BrokenChain, match="entry 2: it is missing"):
        coordinator.verified(site, heads)
    with pytest.raises(LocalError, match="never signed"):
        heads_in(text, coordinator.name, [site.public_key])
    huge = b'{"heads": [{"owner": "@coordinator", "number": 1e300, "head": "", "signature": ""}]}'
    for bad in (b"", b"[]", b'{"heads": [{"owner": "@coordinator"}]}', b"[" * 100_000, huge):
        with pytest.raises(LocalError, match="is no list of signed heads"):
            heads_in(bad, coordinator.name, [])


def test_what_repeats_itself_is_entered_once_a_minute_and_counted() -> None:
    book, clock = Book(), ManualClock()
    refusals = Refusals(book.log, clock)
    for _ in range(5):
        refusals.note("round.refused", reason="BAD_MESSAGE")
    refusals.note("round.refused", reason="WRONG_STAGE")
    clock.advance(60)
    refusals.note("round.refused", reason="BAD_MESSAGE")
    told = [(entry.event["reason"], entry.event["count"]) for entry in book.entries]
    assert told == [("BAD_MESSAGE", 1), ("WRONG_STAGE", 1), ("BAD_MESSAGE", 5)]


def test_of_all_refusals_together_so_many_are_entered_and_the_others_counted() -> None:
    book, clock = Book(), ManualClock()
    refusals = Refusals(book.log, clock)
    for number in range(1000):
        refusals.note("round.refused", attempt=number)
    assert len(book.entries) == 120
    clock.advance(60)
    refusals.note("round.refused", attempt=1000)
    refusals.note("round.refused", attempt=1001)
    omitted, entered = book.entries[120:]
    assert (omitted.event["event"], omitted.event["count"], entered.event["attempt"]) == ("refusals.omitted", 880, 1000)
