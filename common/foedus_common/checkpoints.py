"""Signed heads of journals, and what coordinator and sites show each other of them (docs/protocol.md section 7).

A journal that was cut off at its end is still a good chain. So each party signs the head of its own journal, shows it,
and signs what it is shown of the other's; whoever then loses or rewrites entries has the other side's copy against him.
Both parties do the same here; `HeadBook` is the side's store. Nothing but the one statement below is ever signed, and
what the other side says is kept and compared, never acted upon.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from foedus_common.canonical import labelled
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import verify as verify_signature
from foedus_common.journal import BrokenChain, Checkpoint, Entry
from foedus_common.journal import verify as verify_chain
from foedus_common.protocol.messages import MAX_SEEN, JournalHead, JournalHeads, SeenHead

LOSS_ACCEPTED = "journal.loss_accepted"
MAX_SHEET_BYTES = 16 << 20


@dataclass(frozen=True)
class Head:
    """The head of `owner`'s journal after entry `number`, signed by the owner with `public_key` (32 bytes)."""

    owner: str
    number: int
    head: bytes
    signature: bytes
    public_key: bytes

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.number, self.head)

    def verify(self) -> None:
        """Raises RemoteError(BAD_SIGNATURE)."""
        verify_signature(
            self.public_key,
            self.signature,
            statement(self.owner, self.checkpoint),
            f"the journal's head {self.number} of {self.owner}",
        )


@dataclass(frozen=True)
class Countersignature:
    """`witness` was shown this head of our journal, and signed that with `public_key` (32 bytes)."""

    number: int
    head: bytes
    witness: str
    signature: bytes
    public_key: bytes

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.number, self.head)


class HeadBook(Protocol):
    """What a side's store does for its journal. Each method that writes is one transaction, or part of the open one."""

    def journal_end(self) -> Checkpoint: ...
    def journal_head(self, number: int) -> bytes | None:
        """The head after that entry of our own journal."""

    def heads(self, owner: str) -> list[Head]:
        """Every head of that party's journal that is kept here, by number."""

    def newest_heads(self, owner: str, count: int) -> list[Head]:
        """The last `count` of them, by number."""

    def heads_at(self, owner: str, number: int) -> list[Head]:
        """Those of that number: more than one only where the owner contradicts itself."""

    def countersignatures(self) -> list[Countersignature]:
        """What others signed of our journal, by number."""

    def keep(self, kept: Sequence[Head], marks: Sequence[Countersignature] = ()) -> None:
        """Those that are kept already are kept once."""

    def log(self, event: str, **details: Any) -> None: ...


def statement(owner: str, checkpoint: Checkpoint) -> bytes:
    """What owner and witness sign."""
    return labelled("journal-head", owner, checkpoint.number, checkpoint.head)


@dataclass(frozen=True)
class Notary:
    """One side of the exchange: `name` in envelopes, its keys, and its store."""

    name: str
    public_key: bytes
    sign: Callable[[bytes], bytes]
    book: HeadBook

    def sign_end(self) -> Head:
        """Our newest head, signed and kept: from now on it cannot be cut off unnoticed while that is kept."""
        end = self.book.journal_end()
        own = Head(self.name, end.number, end.head, self.sign(statement(self.name, end)), self.public_key)
        self.book.keep([own])
        return own

    def show(self, peer: str, own: Head, shown: JournalHead | None = None) -> JournalHeads:
        """Our head for `peer`, as `sign_end` gave it; and countersigned, the newest that we hold of its journal and the
        one that it has just `shown`."""
        held = {head.checkpoint: head.signature for head in self.book.newest_heads(peer, MAX_SEEN - 1)}
        if shown is not None:
            held[Checkpoint(shown.number, shown.head)] = shown.signature
        seen = [
            SeenHead(at.number, at.head, signature, self.sign(statement(peer, at))) for at, signature in held.items()
        ]
        return JournalHeads(JournalHead(own.number, own.head, own.signature), tuple(seen))

    def take(self, peer: str, peer_key: bytes, shown: JournalHeads) -> list[str]:
        """Keep what `peer` shows; gives what is amiss, one sentence each, which is in the journal from then on.

        peer_key: 32 bytes, vouched for by the roster. Raises RemoteError, having kept nothing, for a signature that is
        not the peer's or, of our own heads, not ours.
        """
        theirs = Head(peer, shown.own.number, shown.own.head, shown.own.signature, peer_key)
        theirs.verify()
        witnessed = []
        for seen in shown.seen:
            self._require_ours(seen)
            mark = Countersignature(seen.number, seen.head, peer, seen.countersignature, peer_key)
            verify_signature(peer_key, mark.signature, statement(self.name, mark.checkpoint), f"the word of {peer}")
            witnessed.append(mark)
        amiss = [*self._contradicted(theirs), *self._behind(witnessed)]
        self.book.keep([theirs], witnessed)
        return amiss

    def _require_ours(self, seen: SeenHead) -> None:
        """Raises RemoteError unless we signed that head, with this key or an earlier one."""
        head = Head(self.name, seen.number, seen.head, seen.signature, self.public_key)
        if _holds(head.verify):
            return
        earlier = {kept.public_key for kept in self.book.heads(self.name)}
        if not any(_holds(replace(head, public_key=key).verify) for key in earlier):
            raise RemoteError(Reason.BAD_SIGNATURE, f"the head {seen.number} of {self.name} was never signed here.")

    def _contradicted(self, theirs: Head) -> list[str]:
        """Two signed heads of one number are two journals. A smaller number proves nothing: messages of different runs
        overtake each other."""
        held = {head.head for head in self.book.heads_at(theirs.owner, theirs.number)}
        if not held or theirs.head in held:
            return []
        heads = [head.hex() for head in (*sorted(held), theirs.head)]
        self.book.log("peer.journal_differs", peer=theirs.owner, number=theirs.number, heads=heads)
        return [
            f"{theirs.owner} signed two different journals of {theirs.number} entries; one of them was restored from "
            "an older copy, or altered."
        ]

    def _behind(self, witnessed: Iterable[Countersignature]) -> list[str]:
        """What others saw of our journal and we do not have: this is an older copy, or a rewritten one."""
        lost = [mark for mark in witnessed if self.book.journal_head(mark.number) != mark.head]
        known = {mark.checkpoint for mark in self.book.countersignatures()} if lost else set()
        new = [mark for mark in lost if mark.checkpoint not in known]
        for mark in new:
            self.book.log("journal.behind", witness=mark.witness, number=mark.number, head=mark.head.hex())
        return [
            f"{mark.witness} has seen this journal with {mark.number} entries that are not those here; it was "
            "restored from an older copy, or altered."
            for mark in new
        ]


# --- Verifying ---


@dataclass(frozen=True)
class Verified:
    """end: of the journal; signed, witnessed: up to which entry the owner itself, and each witness, vouches for it;
    losses: heads that are known to be lost and were accepted as such."""

    end: Checkpoint
    signed: int
    witnessed: Mapping[str, int]
    losses: tuple[Checkpoint, ...]


def verify(
    owner: str,
    entries: Sequence[Entry],
    heads: Sequence[Head],
    countersignatures: Sequence[Countersignature],
    own_keys: Collection[bytes],
    witness_keys: Mapping[str, Collection[bytes]],
) -> Verified:
    """Compare a journal, whose chain is good by itself, with every head that its owner signed and others countersigned.

    heads: those of this journal. own_keys: with which the owner signs, or signed. witness_keys: those of each witness.
    Raises BrokenChain, which names the first entry that is altered, missing or out of place, or the head whose
    signature is not good.
    """
    marks = [*(head.checkpoint for head in heads), *(mark.checkpoint for mark in countersignatures)]
    losses = _accepted(entries) & set(marks)
    end = verify_chain(entries, [mark for mark in marks if mark not in losses])
    for head in heads:
        require_good(head, own_keys)
    for mark in countersignatures:
        counter = Head(owner, mark.number, mark.head, mark.signature, mark.public_key)
        if mark.public_key not in witness_keys.get(mark.witness, ()) or not _holds(counter.verify):
            raise BrokenChain(mark.number, f"the signature of {mark.witness} kept for its head is not good")
    return Verified(
        end,
        max((head.number for head in heads if head.checkpoint not in losses), default=0),
        {mark.witness: mark.number for mark in countersignatures if mark.checkpoint not in losses},
        tuple(sorted(losses, key=lambda mark: mark.number)),
    )


def require_good(head: Head, keys: Collection[bytes]) -> None:
    """Raises BrokenChain unless one of its owner's `keys` signed a head that is kept here."""
    if head.public_key not in keys or not _holds(head.verify):
        raise BrokenChain(head.number, "the signature kept for its head is not good", f"journal of {head.owner}")


def accept_losses(book: HeadBook, entries: Sequence[Entry], own: str, by: str) -> list[Checkpoint]:
    """Enter into the journal which of its signed heads it does not hold any more; from then on `verify` names them as
    lost and goes on. Gives them. by: who decided so."""
    marks = {head.checkpoint for head in book.heads(own)} | {mark.checkpoint for mark in book.countersignatures()}
    missing = (mark for mark in marks if book.journal_head(mark.number) != mark.head)
    lost = sorted(set(missing) - _accepted(entries), key=lambda mark: mark.number)
    for mark in lost:
        book.log(LOSS_ACCEPTED, number=mark.number, head=mark.head.hex(), by=by)
    return lost


# --- On paper: what one party holds, for comparing offline ---


def sheet(party: str, heads: Iterable[Head]) -> bytes:
    """The signed heads that `party` holds, as JSON; nothing else about any journal."""
    rows = [
        {"owner": head.owner, "number": head.number, "head": head.head.hex(), "signature": head.signature.hex()}
        for head in heads
    ]
    return json.dumps({"party": party, "heads": rows}, indent=1).encode()


def heads_in(text: bytes, owner: str, keys: Iterable[bytes]) -> list[Head]:
    """The heads of `owner`'s journal in a sheet, each once however often it is listed. Raises LocalError for what is no
    sheet, or for a head there that none of the owner's `keys` signed."""
    try:
        rows = json.loads(text)["heads"]
        found = [
            (int(row["number"]), bytes.fromhex(row["head"]), bytes.fromhex(row["signature"]))
            for row in rows
            if row["owner"] == owner
        ]
        if not all(0 <= number < 1 << 63 for number, _, _ in found):
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise LocalError("The file is no list of signed heads; `audit export` writes one.") from None
    return [_signed_by_one_of(keys, Head(owner, *row, b"")) for row in dict.fromkeys(found)]


def _signed_by_one_of(keys: Iterable[bytes], head: Head) -> Head:
    for key in keys:
        signed = replace(head, public_key=key)
        if _holds(signed.verify):
            return signed
    raise LocalError(f"The file names a head {head.number} of {head.owner} that {head.owner} never signed.")


# --- Within ---


def _accepted(entries: Iterable[Entry]) -> set[Checkpoint]:
    told = (entry.event for entry in entries)
    return {Checkpoint(e["number"], bytes.fromhex(e["head"])) for e in told if e["event"] == LOSS_ACCEPTED}


def _holds(check: Callable[[], None]) -> bool:
    try:
        check()
    except RemoteError:
        return False
    return True
