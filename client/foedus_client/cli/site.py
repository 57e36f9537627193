"""`foedus-site`: the site administrator's program. Commands write the home's database; the daemon notices at once."""

from __future__ import annotations

import dataclasses
import getpass
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from foedus_client import condition, config, enrol
from foedus_client.cli import plans as cli_plans
from foedus_client.cli.administrator import CLOCK, Administrator
from foedus_client.cli.audit import audit_app
from foedus_client.cli.doctor import findings
from foedus_client.data import survey
from foedus_client.ledger.high_water import state_folder
from foedus_common import terminal
from foedus_common.backup import restore_backup, write_backup
from foedus_common.certificates import read_authorities
from foedus_common.checks import show
from foedus_common.clock import iso
from foedus_common.core_dumps import forbid_core_dumps
from foedus_common.enrolment import decode_token
from foedus_common.errors import LocalError
from foedus_common.identity import fingerprint
from foedus_common.link.transport import TlsIdentity
from foedus_common.model_folder import manifest_sha256
from foedus_common.randomness import system_random
from foedus_common.terminal import Json, print_facts, print_json, print_line, print_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Take part in a federation with data that stays here.\n\n"
    "Begin with `foedus-site join`, add a model and data, and keep `foedus-site run` running. Plans wait for "
    "`foedus-site approve`; `foedus-site ledger` shows what they spend, `foedus-site doctor` what is amiss.",
)
model_app = typer.Typer(no_args_is_help=True, help="Base models on this machine; plans name them by their hash.")
data_app = typer.Typer(no_args_is_help=True, help="Datasets; their rows never leave this machine.")
app.add_typer(cli_plans.app)
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")
app.add_typer(audit_app, name="audit")

ASK_SECONDS = 2.0
NOT_BACKED_UP = frozenset({"daemon.lock", "partial", condition.FILE})
"""Names in a home that belong to no copy of it."""


@app.callback()
def choose_home(
    context: typer.Context,
    home: Annotated[Path | None, typer.Option(help="Home folder; else $FOEDUS_HOME, else ./foedus-site-home.")] = None,
) -> None:
    context.obj = config.home_path(home, os.environ)


# --- Joining and running ---


@app.command()
def join(
    context: typer.Context,
    token: Annotated[
        str | None,
        typer.Argument(help="The operator's token; else it is asked for, and - reads standard input."),
    ] = None,
    proxy: Annotated[str, typer.Option(help="http://host:port, for the home's site.toml; else https_proxy.")] = "",
    authorities: Annotated[
        str, typer.Option(help="PEM file of others that may vouch for the coordinator, for the home's site.toml.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make this site's keys and join the federation that the token names.

    For example: foedus-site join - < north.token
    """
    from foedus_client.link import site_link as link  # gRPC and Flower take a second to import

    invitation = decode_token(_pasted() if token in (None, "-") else token)
    home = _home_to_join(context.obj, proxy, authorities)
    trusted = home.trusting(TlsIdentity(b"", b"", invitation.authority_pem)).authority
    shown = threading.Event()

    def call(body: bytes) -> bytes:
        address = home.settings.enrolment or invitation.enrolment_address
        return link.enrol(address, trusted, body, home.settings.proxy)

    def wait(public_key: bytes) -> None:
        if not shown.is_set():
            shown.set()
            _show_waiting(public_key, invitation.root_public_key, as_json)
        threading.Event().wait(ASK_SECONDS)

    membership = enrol.join(home.path, invitation, call, wait, random=system_random, clock=CLOCK)
    if as_json:
        return print_json({"site": membership.name, "org": invitation.org, "home": str(home.path)})
    print_line(f"This machine is the site {membership.name} of {invitation.org}. Its home is {home.path}.")
    print_line("Next: foedus-site model add FOLDER, foedus-site data add NAME FILE, foedus-site run")


def _pasted() -> str:
    """The token as it stands neither in the list of processes nor in a shell's history."""
    if sys.stdin.isatty():
        return getpass.getpass("Token (it is not shown): ")
    return sys.stdin.readline()


def _home_to_join(path: Path, proxy: str, authorities: str) -> config.SiteHome:
    """The home, made with these settings if there is none. Raises LocalError where it has others already."""
    if "@" in proxy:
        raise LocalError(
            "A password would stand in the list of processes; put this proxy into https_proxy or site.toml."
        )
    if authorities:
        read_authorities(Path(authorities))  # before it goes into the settings
    given = config.SiteSettings(proxy=proxy, authorities=str(Path(authorities).absolute()) if authorities else "")
    kept = config.SiteHome.create(path, given).settings
    if given.proxy not in ("", kept.proxy) or given.authorities not in ("", kept.authorities):
        raise LocalError(f"{path} has settings already; change proxy and authorities in its site.toml.")
    return config.SiteHome.open(path)


def _show_waiting(public_key: bytes, root_public_key: bytes, as_json: bool) -> None:
    ours, root = fingerprint(public_key), fingerprint(root_public_key)
    if as_json:
        return print_json({"waiting": True, "fingerprint": ours, "root": root})
    print_line("Waiting for approval. Read these aloud to the operator, over a line you trust:\n")
    print_facts({"    this site's key": ours, "    the consortium's root": root})


@app.command()
def run(context: typer.Context) -> None:
    """Run the site's daemon until Ctrl-C; one for each home."""
    from foedus_client.daemon import log_to_stderr, serve

    forbid_core_dumps()
    home = config.SiteHome.open(context.obj)
    log_to_stderr()
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    serve(home, state_folder(os.environ), CLOCK, system_random, stopping)


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show who this site is and what waits for a decision."""
    acting = Administrator(context.obj)
    roster = acting.membership.roster(CLOCK.now())
    paused, running = acting.store.paused(), acting.home.daemon_runs()
    said = condition.read_condition(acting.home.path) if running else {}
    facts = {
        "site": acting.membership.name,
        "organisation": acting.membership.token.org,
        "daemon": f"paused by {paused}" if paused else "running" if running else "not running",
        "link": said.get("link", "none"),
        "last trouble": said.get("trouble", "none since the daemon was started"),
        "fingerprint": fingerprint(acting.membership.public_key),
        "coordinator": acting.home.settings.coordinator or acting.membership.token.link_address,
        "certificate ends": iso(acting.membership.certificate_ends()),
        "roster": f"epoch {roster.epoch}, {len(roster.sites)} sites, until {iso(roster.not_after)}",
        "datasets": len(acting.store.datasets()),
        "plans waiting": sum(plan.state == "pending" for plan in acting.store.plans()),
        "plans approved": _approved(acting),
    }
    print_json(facts) if as_json else print_facts(facts)


def _approved(acting: Administrator) -> str:
    """How many plans this site takes part in, and when the first of their approvals ends."""
    runs = [plan.run_id for plan in acting.store.plans() if plan.state == "approved"]
    ends = [consent.expires_at for run in runs if (consent := acting.ledger.run(run).consent) and consent.expires_at]
    return f"{len(runs)}; an approval ends on {iso(min(ends))}" if ends else str(len(runs))


@app.command()
def pause(context: typer.Context, as_json: Json = False) -> None:
    """Take part in no new round until `resume`: the daemon ends the round under way, then hangs up."""
    Administrator(context.obj).store.pause(by=getpass.getuser())
    if as_json:
        return print_json({"paused": True})
    print_line("Paused; a round under way is finished first. Next: foedus-site resume")


@app.command()
def resume(context: typer.Context, as_json: Json = False) -> None:
    """End a pause: the daemon connects again and takes part in the runs that were approved."""
    Administrator(context.obj).store.resume()
    if as_json:
        return print_json({"paused": False})
    print_line("Back at work, if the daemon runs; `foedus-site status` says so.")


@app.command()
def leave(
    context: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Leave the federation: this site's keys are deleted here. The ledger and what it counts are kept."""
    acting = Administrator(context.obj)
    name = acting.membership.name
    with acting.home.daemon_lock():
        if not yes:
            typer.confirm(f"Delete the keys of {name} and withdraw from all its plans?", abort=True, err=True)
        for plan in acting.store.plans():
            if plan.state == "approved":
                acting.approval().withdraw(plan.digest, by=getpass.getuser())
        acting.store.log("site.left", by=getpass.getuser())
        enrol.leave(acting.home.path)
    if as_json:
        return print_json({"site": name, "left": True})
    print_line(f"{name} has left. Tell the operator, who ends its membership: foedus site revoke {name}")


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check everything that a run needs here, and say what to do about what is amiss. Exit code 1 if something is."""
    from foedus_client.link.site_link import admission  # gRPC and Flower take a second to import

    found = findings(context.obj, state_folder(os.environ), CLOCK, admission)
    raise typer.Exit(show(found, as_json))


@app.command()
def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where it goes. It is as secret as the home: it holds the site's keys.")],
    as_json: Json = False,
) -> None:
    """Write the home to one file, also while the daemon runs. Models and data stay where they are.

    For example: foedus-site backup north.backup
    """
    acting = Administrator(context.obj)
    acting.store.log("backup.made", by=getpass.getuser())
    made = write_backup(
        file,
        acting.home.path,
        "site",
        leave_out=NOT_BACKED_UP,
        database=acting.home.database.name,
        copy_database=acting.store.copy_to,
        now=CLOCK.now(),
    )
    if as_json:
        return print_json({"file": str(file.absolute()), **dataclasses.asdict(made)})
    print_line(f"{file}: {made.files} files, {made.bytes} bytes. Keep it as safe as the home itself.")


@app.command()
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What `foedus-site backup` wrote.")],
    as_json: Json = False,
) -> None:
    """Make a new home of a backup. One that is older than what this machine remembers will not be worked with.

    For example: foedus-site --home another-home restore north.backup
    """
    restored = restore_backup(file, context.obj, "site")
    acting = Administrator(context.obj)
    acting.store.log("home.restored", made_at=iso(restored.made_at), by=getpass.getuser())
    acting.store.check_high_water()
    if as_json:
        return print_json({"home": str(acting.home.path), **dataclasses.asdict(restored)})
    print_line(f"{acting.home.path} is as it was on {iso(restored.made_at)}. Next: foedus-site doctor")


# --- Models and data ---


@model_app.command("add")
def model_add(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model folder: safetensors and JSON only.")],
    name: Annotated[str | None, typer.Option(help="Else the folder's name.")] = None,
    as_json: Json = False,
) -> None:
    """Hash a model folder; from then on plans that name its hash can use it.

    For example: foedus-site model add /models/all-MiniLM-L6-v2
    """
    acting, path = Administrator(context.obj), folder.resolve()
    model = acting.store.add_model(name or path.name, manifest_sha256(path), path)
    if as_json:
        return print_json(model)
    print_facts({"name": model.name, "sha256": model.manifest_sha256, "folder": model.path})


@model_app.command("list")
def model_list(context: typer.Context, as_json: Json = False) -> None:
    """Show the models that plans may name."""
    models = Administrator(context.obj).store.models()
    if as_json:
        return print_json(models)
    rows = [(model.name, model.manifest_sha256, model.path) for model in models]
    print_table(["model", "sha256", "folder"], rows, "No models yet; `foedus-site model add FOLDER` adds one.")


@data_app.command("add")
def data_add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What plans call the dataset.")],
    file: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL, Parquet or SQLite; it stays where it is.")],
    column: Annotated[
        list[str] | None, typer.Option(help="Which column is which: text=COLUMN, label=COLUMN. Give it twice.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every row of a file now, and open the dataset's account in the ledger.

    For example: foedus-site data add coding-terms rows.csv --column text=note --column label=chapter
    """
    acting = Administrator(context.obj)
    columns = _columns(column or [])
    found = survey(file.resolve(), columns["text"], columns["label"])
    dataset = acting.ledger.add_dataset(name, file.resolve(), columns["text"], columns["label"], found)
    if as_json:
        return print_json({"name": name, "rows": dataset.rows, "labels": dataset.label_counts})
    print_line(f"{name}: {dataset.rows} rows, all of them good, with {len(dataset.label_counts)} labels.")


def _columns(given: list[str]) -> dict[str, str]:
    columns = {"text": "text", "label": "label"}
    for item in given:
        role, _, name = item.partition("=")
        if role not in columns or not name:
            raise LocalError(f"--column {item!r} is neither text=COLUMN nor label=COLUMN.")
        columns[role] = name
    return columns


@data_app.command("list")
def data_list(context: typer.Context, as_json: Json = False) -> None:
    """Show the datasets and the ledger account that pays for each."""
    datasets = Administrator(context.obj).store.datasets()
    if as_json:
        return print_json(datasets)
    rows = [(each.name, each.rows, len(each.label_counts), each.account, each.path) for each in datasets]
    print_table(["dataset", "rows", "labels", "account", "file"], rows, "No datasets yet; `foedus-site data add`.")


def main() -> NoReturn:
    terminal.run(app, "foedus-site")
