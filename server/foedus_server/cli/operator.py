"""`foedus`: the operator's program. Each command is a few lines around `commands`, `registry` or `service`.

The commands about models, plans and runs are in `runs`.
"""

from __future__ import annotations

import dataclasses
import getpass
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from foedus_common import terminal
from foedus_common.backup import Backup, restore_backup, write_backup
from foedus_common.checks import show
from foedus_common.clock import SystemClock, iso
from foedus_common.core_dumps import forbid_core_dumps
from foedus_common.errors import LocalError, RemoteError
from foedus_common.identity import (
    MAX_ROSTER_BYTES,
    SIGNATURE_BYTES,
    Roster,
    SignedRoster,
    fingerprint,
    parse_roster,
    public_pem,
    read_key,
    read_public_key,
)
from foedus_common.private_files import read_limited
from foedus_common.randomness import system_random
from foedus_common.terminal import Json, print_aside, print_facts, print_json, print_line, print_table
from foedus_server import config
from foedus_server.cli.audit import audit_app
from foedus_server.cli.doctor import findings
from foedus_server.cli.runs import model_app, operator, plan_app, run_app
from foedus_server.members.registry import Registry

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Coordinate a federation: who belongs to it, what is trained, what came out.\n\n"
    "Begin with `foedus init`, `foedus up`, and `foedus site invite NAME --org ORGANISATION` for each site; then add a "
    "model, write a plan and submit it. `foedus doctor` says what is amiss.",
)
root_app = typer.Typer(no_args_is_help=True, help="The consortium's root key, on the machine that is kept offline.")
site_app = typer.Typer(no_args_is_help=True, help="Who belongs to the federation.")
authority_app = typer.Typer(no_args_is_help=True, help="Who signs the certificates that open the link.")
roster_app = typer.Typer(no_args_is_help=True, help="The list of members that the root signs.")
for name, group in {
    "root": root_app,
    "site": site_app,
    "authority": authority_app,
    "roster": roster_app,
    "model": model_app,
    "plan": plan_app,
    "run": run_app,
    "audit": audit_app,
}.items():
    app.add_typer(group, name=name)

SiteName = Annotated[str, typer.Argument(help="As `foedus site list` shows it.")]

CLOCK = SystemClock()
NOT_BACKED_UP = frozenset({"coordinator.log", "foedus.lock", "partial", "uploads"})
"""Names in a home that belong to no copy of it."""


@app.callback()
def choose_home(
    context: typer.Context,
    home: Annotated[Path | None, typer.Option(help="Home folder; else $FOEDUS_HOME, else ./foedus-home.")] = None,
) -> None:
    context.obj = config.home_path(home, os.environ)


def registry(context: typer.Context) -> Registry:
    acting = operator(context)
    return Registry(acting.home, acting.store, CLOCK, system_random)


# --- The coordinator itself ---


@app.command()
def init(
    context: typer.Context,
    federation: Annotated[str, typer.Option(help="What the federation is called.")] = "Foedus federation",
    host: Annotated[str, typer.Option(help="Name or address under which sites reach this machine.")] = "127.0.0.1",
    listen: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port for sites.")] = 8443,
    enrolment_port: Annotated[int, typer.Option(help="Port for tokens.")] = 8444,
    database: Annotated[
        str, typer.Option(help="URL of an empty PostgreSQL database, without a password; else SQLite in the home.")
    ] = "",
    root_public_key: Annotated[
        Path | None, typer.Option(help="Public half of the root key that `foedus root new` made.")
    ] = None,
    demonstration: Annotated[
        bool, typer.Option("--demonstration", help="Make the root key here. For demonstrations only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a coordinator's home: keys, certificate authority, database.

    For example: foedus init --host foedus.example.org --listen 0.0.0.0 --root-public-key root.key.pub
    """
    if (root_public_key is None) != demonstration:
        raise LocalError("Give --root-public-key FILE from `foedus root new`, or --demonstration, and not both.")
    settings = config.Settings(federation, host, database, config.Link(listen, port, enrolment_port))
    root = None if root_public_key is None else read_public_key(root_public_key)
    home = config.init(context.obj, settings, root_public_key=root, random=system_random, clock=CLOCK)
    facts = {"home": str(home.path), "root": fingerprint(home.root_public_key()), "demonstration": demonstration}
    if as_json:
        return print_json(facts)
    print_facts(facts)
    if demonstration:
        print_line("Demonstration only: the root key lies on this machine, so whoever has it can add sites.")
    print_line("Next: foedus site invite NAME --org ORGANISATION, then foedus up")


@root_app.command("new")
def root_new(
    file: Annotated[Path, typer.Argument(help="Where the private key goes; FILE.pub is its public half.")],
    as_json: Json = False,
) -> None:
    """Make the consortium's root key. Do it on a machine that is kept offline.

    For example: foedus root new root.key
    """
    public = config.create_root_key(file, system_random)
    public_file = file.with_name(f"{file.name}.pub")
    public_file.write_bytes(public_pem(public))
    facts = {"private key": file, "public key": public_file, "fingerprint": fingerprint(public)}
    print_json(facts) if as_json else print_facts(facts)


@app.command()
def up(context: typer.Context, as_json: Json = False) -> None:
    """Run the coordinator until Ctrl-C, which lets messages under way finish."""
    from foedus_server.link.listeners import allow_many_files  # gRPC and Flower take a second to import
    from foedus_server.service import Service, log_to

    forbid_core_dumps()
    allow_many_files()
    home = config.Home.open(context.obj)
    log_to(home.path / "coordinator.log" if as_json else None)
    service = Service(home, CLOCK, system_random)
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    service.start()
    where = {"link": service.link.address, "enrolment": service.link.enrol_address}
    if as_json:
        print_json({"ready": True, **where})
    else:
        print_facts({"sites connect to": where["link"], "tokens are used at": where["enrolment"]})
        print_line("Ready. Ctrl-C drains and stops.")
    try:
        service.serve(stopping)
    finally:
        service.stop()


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check everything that a run needs here, and say what to do about what is amiss. Exit code 1 if something is."""
    raise typer.Exit(show(findings(context.obj, CLOCK), as_json))


@app.command()
def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where it goes. It is as secret as the home: it holds its keys.")],
    as_json: Json = False,
) -> None:
    """Write the home to one file, also while `foedus up` runs. Models stay where they are.

    For example: foedus backup foedus.backup
    """
    acting = operator(context)
    acting.store.journal.log("backup.made", by=getpass.getuser())
    made = write_backup(
        file,
        acting.home.path,
        "coordinator",
        leave_out=NOT_BACKED_UP,
        database=config.DATABASE,
        copy_database=acting.store.database.copy_to,
        now=CLOCK.now(),
    )
    if as_json:
        return print_json({"file": str(file.absolute()), **dataclasses.asdict(made)})
    print_line(f"{file}: {made.files} files, {made.bytes} bytes. Keep it as safe as the home itself.")


@app.command()
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What `foedus backup` wrote.")],
    database: Annotated[
        str | None, typer.Option(help="URL of an empty PostgreSQL database, or '' for SQLite; else as it was.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a new home of a backup. Rounds since then are lost; what they cost the sites is not given back.

    For example: foedus --home another-home restore foedus.backup
    """

    def finish(draft: Path, made: Backup) -> None:
        with closing(config.put_database_back(draft, database, CLOCK)) as store:
            store.journal.log("home.restored", made_at=iso(made.made_at), by=getpass.getuser())

    restored = restore_backup(file, context.obj, "coordinator", finish)
    if as_json:
        return print_json({"home": str(context.obj), **dataclasses.asdict(restored)})
    print_line(f"{context.obj} is as it was on {iso(restored.made_at)}. Next: foedus doctor, then foedus up")


# --- Sites and the roster ---


@site_app.command("invite")
def site_invite(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Small letters, digits and dashes.")],
    org: Annotated[str, typer.Option(help="The organisation that answers for the site.")],
    as_json: Json = False,
) -> None:
    """Print one token for a new site: used once, within 24 hours.

    For example: foedus site invite north --org "North Hospital" > north.token
    """
    _show_token(registry(context).invite(name, org).encode(), name, as_json)


@site_app.command("rotate")
def site_rotate(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
    """Print a token with which a member makes new keys; the old ones hold until the new ones are approved.

    For example: foedus site rotate north > north.token
    """
    _show_token(registry(context).rotate(name).encode(), name, as_json)


def _show_token(token: str, name: str, as_json: bool) -> None:
    if as_json:
        return print_json({"site": name, "token": token})
    print_aside(f"Give this token to {name}; it is used once, within 24 hours:\n")
    print(token, flush=True)  # alone on standard output, so that it can go into a file
    print_aside(f"\nThere: foedus-site join TOKEN.  Then here: foedus site approve {name}")


@site_app.command("list")
def site_list(context: typer.Context, as_json: Json = False) -> None:
    """Show every site, its state, the fingerprint of its key and when its certificate ends."""
    register = registry(context)
    ends = register.certificate_ends()
    rows = [
        {
            "name": site.name,
            "org": site.org,
            "state": site.state,
            "fingerprint": fingerprint(key) if (key := site.waiting_key or site.public_key) else None,
            "certificate_ends": iso(ends[site.name]) if site.name in ends else None,
        }
        for site in register.sites()
    ]
    if as_json:
        return print_json(rows)
    print_table(
        ["site", "organisation", "state", "fingerprint", "certificate ends"],
        [list(row.values()) for row in rows],
        "No sites yet; `foedus site invite NAME --org ORG` makes a token for one.",
    )
    _show_organisations(site.org for site in register.sites() if site.state == "approved")


@site_app.command("approve")
def site_approve(
    context: typer.Context,
    name: SiteName,
    fingerprint_read: Annotated[
        str | None, typer.Option("--fingerprint", help="What the site's administrator read aloud.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Accept a site's key after comparing its fingerprint with what its administrator sees.

    For example: foedus site approve north
    """
    register = registry(context)
    key = register.site(name).waiting_key
    if key is None:
        raise LocalError(f"{name} has no key that waits; its administrator has to run `foedus-site join TOKEN` first.")
    ours = fingerprint(key)
    if fingerprint_read is None:
        print_aside(f"{name} shows this fingerprint if nobody is in between:\n\n    {ours}\n")
        if not typer.confirm("Is it the one that the administrator reads to you?", err=True):
            raise LocalError(f"{name} was not approved; its token can be withdrawn by inviting it anew.")
    elif "".join(fingerprint_read.split()) != "".join(ours.split()):
        raise LocalError(f"The key that waits at {name} has another fingerprint; do not approve it, and find out why.")
    register.approve(name, key)
    if as_json:
        return print_json({"site": name, "fingerprint": ours})
    print_line(f"{name} is approved. Next: foedus roster sign{_with_root_key(context)}")


@site_app.command("revoke")
def site_revoke(context: typer.Context, name: SiteName, as_json: Json = False) -> None:
    """End a site's membership; its session ends at once.

    For example: foedus site revoke north
    """
    registry(context).revoke(name)
    if as_json:
        return print_json({"site": name, "state": "revoked"})
    print_line(f"{name} is revoked. Next: foedus roster sign{_with_root_key(context)}, so that the other sites know.")


def _with_root_key(context: typer.Context) -> str:
    """What `roster sign` has to be given besides, unless the key lies in the home."""
    return "" if config.Home.open(context.obj).demonstration else " --root-key FILE"


@authority_app.command("list")
def authority_list(context: typer.Context, as_json: Json = False) -> None:
    """Show the authorities, which one signed what sites are shown, and for whom a new one waits."""
    acting = registry(context).authorities
    shown, home = acting.shown.der, config.Home.open(context.obj)
    rows = [
        {
            "authority": each.certificate.subject.rfc4514_string(),
            "ends": iso(each.certificate.not_valid_after_utc.timestamp()),
            "shown": each.der == shown,
        }
        for each in home.authorities()
    ]
    if as_json:
        return print_json({"authorities": rows, "waits_for": acting.lacking()})
    print_table(["authority", "ends", "shown to sites"], [list(row.values()) for row in rows], "")
    if waits_for := acting.lacking():
        print_line(f"The newest is shown when these have had a certificate of it for a week: {', '.join(waits_for)}")


@authority_app.command("rotate")
def authority_rotate(context: typer.Context, as_json: Json = False) -> None:
    """Make the next certificate authority. Sites take it up by themselves; then it replaces the one before."""
    made = registry(context).authorities.rotate()
    facts = {"authority": made.certificate.subject.rfc4514_string(), "sha256": made.sha256.hex()}
    if as_json:
        return print_json(facts)
    print_facts(facts)
    print_line("Keep `foedus up` running: within a day sites trust it, and after a week it is shown to them.")


@roster_app.command("draft")
def roster_draft(
    context: typer.Context, to: Annotated[Path, typer.Argument(help="File to write.")], as_json: Json = False
) -> None:
    """Write the list of approved sites, to be carried to the machine with the root key.

    For example: foedus roster draft draft.json
    """
    roster = registry(context).draft_roster()
    to.write_bytes(roster.canonical())
    if as_json:
        return print_json({"file": str(to.absolute()), "epoch": roster.epoch, "sites": len(roster.sites)})
    print_line(f"{to} holds epoch {roster.epoch} with {len(roster.sites)} sites.")
    print_line(f"Next, where the root key is: foedus roster sign --root-key FILE --draft {to.name} --to SIGNED")


@roster_app.command("sign")
def roster_sign(
    context: typer.Context,
    root_key: Annotated[
        Path | None, typer.Option(help="The root's private key; in a demonstration it lies in the home.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="A draft from `roster draft`; then no home is needed.")] = None,
    to: Annotated[Path | None, typer.Option(help="With --draft: where the signed roster goes.")] = None,
    as_json: Json = False,
) -> None:
    """Sign the list of members with the root key: a draft from elsewhere, or this home's, which then counts at once.

    For example: foedus roster sign --root-key root.key --draft draft.json --to roster.signed
    """
    if draft is not None or to is not None:
        if draft is None or to is None or root_key is None:
            raise LocalError("Away from the coordinator give all three: --root-key FILE, --draft FILE and --to FILE.")
        roster = _read_draft(draft)
        to.write_bytes(SignedRoster.sign(roster, read_key(root_key)).to_bytes())
        _show_roster(roster, as_json)
        return
    home = config.Home.open(context.obj)
    _show_roster(registry(context).sign_roster(home.root_key() if root_key is None else read_key(root_key)), as_json)
    if home.demonstration and not as_json:
        print_line("Demonstration only: the root key was on this machine.")


def _read_draft(file: Path) -> Roster:
    try:
        return parse_roster(read_limited(file, MAX_ROSTER_BYTES))
    except RemoteError:
        raise LocalError(f"{file} is no draft of a roster; `foedus roster draft FILE` writes one.") from None


@roster_app.command("install")
def roster_install(
    context: typer.Context,
    signed: Annotated[Path, typer.Argument(help="What `roster sign --to` wrote.")],
    as_json: Json = False,
) -> None:
    """Give out a roster that was signed elsewhere, from now on.

    For example: foedus roster install roster.signed
    """
    data = read_limited(signed, MAX_ROSTER_BYTES + SIGNATURE_BYTES)
    _show_roster(registry(context).install_roster(SignedRoster.from_bytes(data)), as_json)


def _show_roster(roster: Roster, as_json: bool) -> None:
    if as_json:
        sites = [site.name for site in roster.sites]
        return print_json({"epoch": roster.epoch, "sites": sites, "not_after": iso(roster.not_after)})
    print_facts({"epoch": roster.epoch, "not after": iso(roster.not_after)})
    rows = [(site.name, site.org, fingerprint(site.public_key)) for site in roster.sites]
    print_table(["site", "organisation", "fingerprint"], rows, "No site is in it.")
    _show_organisations(site.org for site in roster.sites)


def _show_organisations(of_sites: Iterable[str]) -> None:
    """How many sites each organisation has, where one has several: it counts with all of them."""
    counts = Counter(of_sites)
    if any(count > 1 for count in counts.values()):
        print_line("")
        print_table(["organisation", "sites"], counts.most_common(), "")


def main() -> NoReturn:
    for command in entry_points(group="foedus.commands"):  # what other installed packages add, such as `simulate`
        app.command(command.name)(command.load())
    terminal.run(app, "foedus")
