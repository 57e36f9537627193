"""`foedus-site audit`: the journal, read, verified, and compared with what the coordinator holds of it."""

from __future__ import annotations

import getpass
import json

import typer

from foedus_client import config
from foedus_client.audit import sign_end, verify
from foedus_client.cli.administrator import CLOCK, Administrator
from foedus_client.ledger.ledger import KEY as LEDGER_KEY
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import SiteStore
from foedus_common import audit_page
from foedus_common.checkpoints import MAX_SHEET_BYTES, accept_losses, heads_in
from foedus_common.private_files import read_limited
from foedus_common.randomness import system_random
from foedus_common.terminal import Json

audit_app = typer.Typer(no_args_is_help=True, help="The journal of what happened here.")


@audit_app.command("verify")
def audit_verify(context: typer.Context, against: audit_page.Against = None, as_json: Json = False) -> None:
    """Check journal and ledger entry by entry, and against every head that was signed; names the first bad entry.

    For example: foedus-site audit verify --against coordinator.json
    """
    store, ledger, public_key = site_to_read(config.SiteHome.open(context.obj))
    name = json.loads(store.meta("site.joined") or "{}").get("site", "")
    found = verify(store, ledger, name, public_key)
    if against is not None:
        shown = heads_in(read_limited(against, MAX_SHEET_BYTES), name, ledger.keys(public_key))
        found = verify(store, ledger, name, public_key, shown)
    more = {"entries of the ledger": found.ledger.number, "heads kept of the coordinator": found.coordinator}
    audit_page.show_verified(found.journal, more, as_json)


@audit_app.command("show")
def audit_show(context: typer.Context, last: audit_page.Last = 20, as_json: Json = False) -> None:
    """Show the newest entries of the journal.

    For example: foedus-site audit show --last 50
    """
    store, _, _ = site_to_read(config.SiteHome.open(context.obj))
    audit_page.show_entries(store.journal_entries(after=max(0, store.journal_end().number - last)), as_json)


@audit_app.command("export")
def audit_export(context: typer.Context, file: audit_page.Sheet, as_json: Json = False) -> None:
    """Write down the signed heads that this site holds of its own journal and of the coordinator's.

    For example: foedus-site audit export north.json
    """
    acting = Administrator(context.obj)
    sign_end(acting.store, acting.membership, system_random)
    audit_page.write_sheet(file, acting.membership.name, acting.store.heads(), "foedus", as_json)


@audit_app.command("accept-loss")
def audit_accept_loss(context: typer.Context, yes: audit_page.Yes = False, as_json: Json = False) -> None:
    """After an older copy was restored: enter into the journal which of its entries are known to be lost."""
    acting = Administrator(context.obj)
    audit_page.confirm_loss(yes)
    entries, name = acting.store.journal_entries(), acting.membership.name
    audit_page.show_losses(accept_losses(acting.store, entries, name, getpass.getuser()), as_json)


def site_to_read(home: config.SiteHome) -> tuple[SiteStore, Ledger, bytes]:
    """Store, ledger and the key to check it by; also after the site has left, when nobody writes them any more."""
    if (home.path / "identity").exists() or not home.database.exists():
        acting = Administrator(home.path)
        return acting.store, acting.ledger, acting.membership.public_key
    store = SiteStore(home.database, CLOCK)
    return store, Ledger(store, CLOCK, sign=lambda message: b""), bytes.fromhex(store.meta(LEDGER_KEY) or "")
