"""The coordinator's side of the audit: whose heads it shows and takes, and whether its journal is whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foedus_common import checkpoints
from foedus_common.checkpoints import Head, Notary, Verified
from foedus_common.identity import public_bytes
from foedus_common.journal import Entry
from foedus_common.journal import verify as verify_chain
from foedus_common.protocol.wire import COORDINATOR
from foedus_server.config import Home
from foedus_server.store import Store


def notary(home: Home, store: Store) -> Notary:
    """The coordinator's side of the exchange of heads: it signs with the key that signs plans."""
    key = home.plan_key()
    return Notary(COORDINATOR, public_bytes(key), key.sign, store.journal)


def verify(home: Home, store: Store, sheet: Sequence[Head] = ()) -> Verified:
    """The journal by itself, against every signed head of it, and the signatures over the heads of sites' journals.

    sheet: heads of this journal that a site has shown. Raises BrokenChain, which names the first bad entry.
    """
    heads, countersignatures = store.journal.heads(), store.journal.countersignatures()
    entries = store.journal.entries()  # after what speaks of them: `foedus up` goes on writing
    verify_chain(entries)  # before anything is read in it
    keys = _keys_of_sites(entries)
    verified = checkpoints.verify(
        COORDINATOR,
        entries,
        [*(head for head in heads if head.owner == COORDINATOR), *sheet],
        countersignatures,
        {public_bytes(home.plan_key())},
        keys,
    )
    for head in heads:
        if head.owner != COORDINATOR:
            checkpoints.require_good(head, keys.get(head.owner, ()))
    return verified


def _keys_of_sites(entries: Sequence[Entry]) -> Mapping[str, set[bytes]]:
    """Every key that was ever approved, by site: the journal itself tells."""
    keys: dict[str, set[bytes]] = {}
    for event in (entry.event for entry in entries):
        if event["event"] == "site.approved":
            keys.setdefault(event["site"], set()).add(bytes.fromhex(event["public_key"]))
    return keys
