"""What an auditor checks at a site: the journal tells of the site's standing, and journal and ledger are whole.

The journal itself is written by `store`, with each fact. Here: what lies in files instead of the database is entered
when it changes, heads are exchanged with the coordinator, and everything is verified. Knows no SQL and no link.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_client.enrol import Membership
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_common import checkpoints
from foedus_common.canonical import canonical_json
from foedus_common.certificates import fingerprint_of
from foedus_common.checkpoints import Head, Notary, Verified
from foedus_common.clock import iso
from foedus_common.identity import Roster, public_bytes
from foedus_common.journal import BrokenChain, Checkpoint, Entry
from foedus_common.journal import verify as verify_chain
from foedus_common.protocol.wire import COORDINATOR
from foedus_common.randomness import RandomBytes

BLIND_BYTES = 32
_LEDGER = "ledger."


class Signer(Protocol):
    """Who signs for the site."""

    key: Ed25519PrivateKey

    @property
    def name(self) -> str: ...


# --- The site's standing ---


def note_standing(store: SiteStore, member: Membership, policy: SitePolicy) -> None:
    """Enter what has changed since the journal last told of it: keys, certificate, roster and policy. They lie in files
    that people and `join` write, so the journal learns of a change when the site next looks."""
    token, certificate = member.token, ssl.PEM_cert_to_DER_cert(member.tls().certificate.decode())
    joined = {"site": member.name, "org": token.org, "public_key": member.public_key.hex()}
    _note(store, "site.joined", **joined, root=token.root_public_key.hex())
    renewed = {"sha256": fingerprint_of(certificate).hex(), "ends": iso(member.certificate_ends())}
    _note(store, "certificate.renewed", **renewed)
    note_roster(store, member.roster(now=0))  # also one that has expired
    _note(store, "policy.changed", **dataclasses.asdict(policy))


def note_roster(store: SiteStore, roster: Roster) -> None:
    _note(store, "roster.accepted", epoch=roster.epoch, digest=roster.digest().hex(), coordinator=roster.plan_key.hex())


def _note(store: SiteStore, event: str, **details: Any) -> None:
    told = canonical_json(details).decode()
    with store.transaction(event):
        if store.meta(event) != told:
            store.set_meta(event, told)
            store.log(event, **details)


# --- Heads ---


def notary(store: SiteStore, member: Signer) -> Notary:
    """The site's side of the exchange of heads."""
    return Notary(member.name, public_bytes(member.key), member.key.sign, store)


def sign_end(store: SiteStore, member: Signer, random: RandomBytes) -> Head:
    """The journal's newest head, signed, to be shown to others.

    An entry of random bits comes before it, where anything was entered since the last: a head covers what its entries
    say, and who knows the head before could try out what the one entry in between said, such as why it was declined.
    """
    ours = notary(store, member)
    if [head.number for head in store.newest_heads(member.name, 1)] != [store.journal_end().number]:
        store.log("heads.shown", blind=random(BLIND_BYTES).hex())
    return ours.sign_end()


# --- Verifying ---


@dataclass(frozen=True)
class Audited:
    """journal: the site's own; ledger: the end of its chain; coordinator: heads of its journal that are kept here."""

    journal: Verified
    ledger: Checkpoint
    coordinator: int


def verify(store: SiteStore, ledger: Ledger, name: str, public_key: bytes, sheet: Sequence[Head] = ()) -> Audited:
    """Journal and ledger, each by itself and against the other, and every signature over heads of either journal.

    name, public_key: of this site (32 bytes). sheet: heads of this journal that another party showed. Raises
    BrokenChain, which names the first bad entry, and LocalError when the whole is an older copy.
    """
    with store.transaction("audit"):  # all as it was at one moment: the daemon goes on writing
        entries, ledger_entries = store.journal_entries(), [entry for entry, _ in store.ledger_entries()]
        heads, countersignatures = store.heads(), store.countersignatures()
    verify_chain(entries)  # before anything is read in it
    ledger_end = ledger.verify(public_key)
    coordinator_keys = {bytes.fromhex(e.event["coordinator"]) for e in entries if e.event["event"] == "roster.accepted"}
    verified = checkpoints.verify(
        name,
        entries,
        [*(head for head in heads if head.owner == name), *sheet],
        countersignatures,
        ledger.keys(public_key),
        {COORDINATOR: coordinator_keys},
    )
    _compare(entries, ledger_entries)
    kept = [head for head in heads if head.owner != name]
    for head in kept:
        checkpoints.require_good(head, coordinator_keys if head.owner == COORDINATOR else ())
    return Audited(verified, ledger_end, len(kept))


def _compare(entries: Sequence[Entry], ledger: Sequence[Entry]) -> None:
    """Raises BrokenChain unless the journal tells of every entry of the ledger, since it began to, and of no other."""
    told = [entry for entry in entries if entry.event["event"].startswith(_LEDGER)]
    first = told[0].event["entry"] if told else len(ledger) + 1
    for number, entry in enumerate(told, start=first):
        named = Checkpoint(entry.event["entry"], bytes.fromhex(entry.event["head"]))
        if number > len(ledger) or named != Checkpoint(number, ledger[number - 1].head):
            raise BrokenChain(number, f"it is not the one that entry {entry.number} of the journal tells of", "ledger")
    if first + len(told) <= len(ledger):
        raise BrokenChain(first + len(told), "the journal does not tell of it", "ledger")
