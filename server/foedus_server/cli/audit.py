"""`foedus audit`: the journal, read, verified, and compared with what the sites hold of it."""

from __future__ import annotations

import getpass

import typer

from foedus_common import audit_page
from foedus_common.checkpoints import MAX_SHEET_BYTES, accept_losses, heads_in
from foedus_common.private_files import read_limited
from foedus_common.protocol.wire import COORDINATOR
from foedus_common.terminal import Json
from foedus_server.audit import notary, verify
from foedus_server.cli.runs import operator

audit_app = typer.Typer(no_args_is_help=True, help="The journal of what happened here.")


@audit_app.command("verify")
def audit_verify(context: typer.Context, against: audit_page.Against = None, as_json: Json = False) -> None:
    """Check the journal entry by entry, and against every head that was signed; names the first bad entry.

    For example: foedus audit verify --against north.json
    """
    acting = operator(context)
    keys = [notary(acting.home, acting.store).public_key]
    sheet = [] if against is None else heads_in(read_limited(against, MAX_SHEET_BYTES), COORDINATOR, keys)
    audit_page.show_verified(verify(acting.home, acting.store, sheet), {}, as_json)


@audit_app.command("show")
def audit_show(context: typer.Context, last: audit_page.Last = 20, as_json: Json = False) -> None:
    """Show the newest entries of the journal.

    For example: foedus audit show --last 50
    """
    journal = operator(context).store.journal
    audit_page.show_entries(journal.entries(after=max(0, journal.journal_end().number - last)), as_json)


@audit_app.command("export")
def audit_export(context: typer.Context, file: audit_page.Sheet, as_json: Json = False) -> None:
    """Write down the signed heads that are kept here, of this journal and of the sites' journals.

    For example: foedus audit export coordinator.json
    """
    acting = operator(context)
    notary(acting.home, acting.store).sign_end()
    audit_page.write_sheet(file, COORDINATOR, acting.store.journal.heads(), "foedus-site", as_json)


@audit_app.command("accept-loss")
def audit_accept_loss(context: typer.Context, yes: audit_page.Yes = False, as_json: Json = False) -> None:
    """After an older copy was restored: enter into the journal which of its entries are known to be lost."""
    journal = operator(context).store.journal
    audit_page.confirm_loss(yes)
    audit_page.show_losses(accept_losses(journal, journal.entries(), COORDINATOR, getpass.getuser()), as_json)
