"""`foedus-site`: the site administrator's program. Commands write the home's database; the daemon notices at once."""

from __future__ import annotations

import dataclasses
import getpass
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from foedus_client import config, enrol
from foedus_client.accounts import Commitment
from foedus_client.approval import Approval
from foedus_client.data import survey
from foedus_client.doctor import findings
from foedus_client.high_water import mark_name, state_folder
from foedus_client.ledger import KEY as LEDGER_KEY
from foedus_client.ledger import Ledger
from foedus_client.store import SiteStore, StoredPlan
from foedus_common import terminal
from foedus_common.backup import restore_backup, write_backup
from foedus_common.checks import show
from foedus_common.clock import SystemClock, iso
from foedus_common.enrolment import decode_token
from foedus_common.errors import LocalError
from foedus_common.identity import fingerprint
from foedus_common.link.transport import TlsIdentity
from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import AgreedPlan, parse_agreed_plan
from foedus_common.privacy import accounting
from foedus_common.randomness import system_random
from foedus_common.terminal import Json, console, print_facts, print_json, print_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Take part in a federation with data that stays here.\n\n"
    "Begin with `foedus-site join TOKEN`, add a model and data, and keep `foedus-site run` running. Plans wait for "
    "`foedus-site approve`; `foedus-site ledger` shows what they spend, `foedus-site doctor` what is amiss.",
)
model_app = typer.Typer(no_args_is_help=True, help="Base models on this machine; plans name them by their hash.")
data_app = typer.Typer(no_args_is_help=True, help="Datasets; their rows never leave this machine.")
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")

PlanName = Annotated[str, typer.Argument(help="Run number, name, or the first digits of the digest.")]

CLOCK = SystemClock()
ASK_SECONDS = 2.0
NOT_BACKED_UP = frozenset({"daemon.lock", "partial"})
"""Names in a home that belong to no copy of it."""


class Administrator:
    """What commands need of a home that exists."""

    def __init__(self, path: Path) -> None:
        self.home = config.SiteHome.open(path)
        self.membership = enrol.Membership(path)
        member = self.membership
        mark = mark_name(member.name, member.token.root_public_key)
        self.store = self.home.store(CLOCK, state_folder(os.environ), mark)
        self.ledger = Ledger(self.store, CLOCK, member.key.sign, member.public_key)

    def approval(self) -> Approval:
        roster = self.membership.roster(CLOCK.now())
        return Approval(self.membership.name, roster, self.home.settings.policy, self.store, self.ledger)

    def plan(self, text: str) -> tuple[StoredPlan, AgreedPlan]:
        """The plan that a person means: by run id, name, or the first digits of its digest; the newest that fits."""
        for stored in reversed(self.store.plans()):
            agreed = parse_agreed_plan(stored.canonical)
            if text in (str(stored.run_id), agreed.plan.run.name) or (
                len(text) >= 6 and stored.digest.hex().startswith(text)
            ):
                return stored, agreed
        raise LocalError(f"No plan {text!r} was received here; `foedus-site plans` shows those that were.")


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
    token: Annotated[str, typer.Argument(help="The operator's token; - reads it from standard input.")],
    proxy: Annotated[str, typer.Option(help="http://host:port, for a new home's site.toml; else https_proxy.")] = "",
    authorities: Annotated[
        str, typer.Option(help="PEM file of others that may vouch for the coordinator, for a new home's site.toml.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Make this site's keys and join the federation that the token names."""
    from foedus_client import link  # gRPC and Flower take a second to import

    invitation = decode_token(sys.stdin.readline().strip() if token == "-" else token)
    home = config.SiteHome.create(context.obj, config.SiteSettings(proxy=proxy, authorities=authorities))
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
    console.print(f"This machine is the site {membership.name} of {invitation.org}. Its home is {home.path}.")
    console.print("Next: foedus-site model add FOLDER, foedus-site data add NAME FILE, foedus-site run")


def _show_waiting(public_key: bytes, root_public_key: bytes, as_json: bool) -> None:
    ours, root = fingerprint(public_key), fingerprint(root_public_key)
    if as_json:
        return print_json({"waiting": True, "fingerprint": ours, "root": root})
    console.print("Waiting for approval. Read these aloud to the operator, over a line you trust:\n")
    print_facts({"    this site's key": ours, "    the consortium's root": root})


@app.command()
def run(context: typer.Context) -> None:
    """Run the site's daemon until Ctrl-C; one for each home."""
    from foedus_client.daemon import log_to_stderr, serve

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
    paused = acting.store.paused()
    facts = {
        "site": acting.membership.name,
        "organisation": acting.membership.token.org,
        "daemon": f"paused by {paused}" if paused else "running" if acting.home.daemon_runs() else "not running",
        "fingerprint": fingerprint(acting.membership.public_key),
        "coordinator": acting.home.settings.coordinator or acting.membership.token.link_address,
        "certificate ends": iso(acting.membership.certificate_ends()),
        "roster": f"epoch {roster.epoch}, {len(roster.sites)} sites, until {iso(roster.not_after)}",
        "datasets": len(acting.store.datasets()),
        "plans waiting": sum(plan.state == "pending" for plan in acting.store.plans()),
    }
    print_json(facts) if as_json else print_facts(facts)


@app.command()
def pause(context: typer.Context, as_json: Json = False) -> None:
    """Take part in no new round until `resume`: the daemon ends the round under way, then hangs up."""
    Administrator(context.obj).store.pause(by=getpass.getuser())
    if as_json:
        return print_json({"paused": True})
    console.print("Paused; a round under way is finished first. Next: foedus-site resume")


@app.command()
def resume(context: typer.Context, as_json: Json = False) -> None:
    """End a pause: the daemon connects again and takes part in the runs that were approved."""
    Administrator(context.obj).store.resume()
    if as_json:
        return print_json({"paused": False})
    console.print("Back at work, if the daemon runs; `foedus-site status` says so.")


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
            typer.confirm(f"Delete the keys of {name} and withdraw from all its plans?", abort=True)
        for plan in acting.store.plans():
            if plan.state == "approved":
                acting.approval().withdraw(plan.digest, by=getpass.getuser())
        enrol.leave(acting.home.path)
    if as_json:
        return print_json({"site": name, "left": True})
    console.print(f"{name} has left. Tell the operator, who ends its membership: foedus site revoke {name}")


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check everything that a run needs here, and say what to do about what is amiss. Exit code 1 if something is."""
    from foedus_client.link import admission  # gRPC and Flower take a second to import

    found = findings(context.obj, state_folder(os.environ), CLOCK, admission)
    raise typer.Exit(show(found, as_json))


@app.command()
def backup(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Where it goes. It is as secret as the home: it holds the site's keys.")],
    as_json: Json = False,
) -> None:
    """Write the home to one file, also while the daemon runs. Models and data stay where they are."""
    acting = Administrator(context.obj)
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
    console.print(f"{file}: {made.files} files, {made.bytes} bytes. Keep it as safe as the home itself.")


@app.command()
def restore(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="What `foedus-site backup` wrote.")],
    as_json: Json = False,
) -> None:
    """Make a new home of a backup. One that is older than what this machine remembers will not be worked with."""
    restored = restore_backup(file, context.obj, "site")
    acting = Administrator(context.obj)
    acting.store.check_high_water()
    if as_json:
        return print_json({"home": str(acting.home.path), **dataclasses.asdict(restored)})
    console.print(f"{acting.home.path} is as it was on {iso(restored.made_at)}. Next: foedus-site doctor")


# --- Models and data ---


@model_app.command("add")
def model_add(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model folder: safetensors and JSON only.")],
    name: Annotated[str | None, typer.Option(help="Else the folder's name.")] = None,
    as_json: Json = False,
) -> None:
    """Hash a model folder; from then on plans that name its hash can use it."""
    acting, path = Administrator(context.obj), folder.resolve()
    sha256 = manifest_sha256(path)
    acting.store.add_model(name or path.name, sha256, path)
    facts = {"name": name or path.name, "sha256": sha256, "folder": str(path)}
    print_json(facts) if as_json else print_facts(facts)


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
    file: Annotated[Path, typer.Argument(help="CSV, TSV, JSONL or Parquet; it stays where it is.")],
    column: Annotated[
        list[str] | None, typer.Option(help="Which column is which: text=COLUMN, label=COLUMN. Give it twice.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every row of a file now, and open the dataset's account in the ledger."""
    acting = Administrator(context.obj)
    columns = _columns(column or [])
    found = survey(file.resolve(), columns["text"], columns["label"])
    dataset = acting.ledger.add_dataset(name, file.resolve(), columns["text"], columns["label"], found)
    if as_json:
        return print_json({"name": name, "rows": dataset.rows, "labels": dataset.label_counts})
    console.print(f"{name}: {dataset.rows} rows, all of them good, with {len(dataset.label_counts)} labels.")


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


# --- Plans ---


@app.command()
def plans(context: typer.Context, as_json: Json = False) -> None:
    """Show the plans that arrived, what each would spend, and what stands against it."""
    acting = Administrator(context.obj)
    rows = [_plan_row(acting, stored) for stored in acting.store.plans()]
    if as_json:
        return print_json(rows)
    print_table(
        ["run", "plan", "state", "dataset", "epsilon", "central", "rounds", "purpose"],
        [
            (r["run"], r["name"], r["state"], r["dataset"], r["epsilon"], r["central"], r["rounds"], r["purpose"])
            for r in rows
        ],
        "No plan has arrived yet.",
    )
    for row in rows:
        for reason in row["reasons"]:
            console.print(f"{row['name']}: {reason}", style="yellow", markup=False)
    if any(row["state"] == "pending" for row in rows):
        console.print("Next: foedus-site approve PLAN, or foedus-site decline PLAN")


def _plan_row(acting: Administrator, stored: StoredPlan) -> dict[str, Any]:
    agreed = parse_agreed_plan(stored.canonical)
    commitment = Commitment.of(agreed)
    delta = acting.home.settings.policy.delta
    return {
        "run": str(stored.run_id),
        "name": agreed.plan.run.name,
        "purpose": agreed.plan.run.purpose,
        "state": stored.state,
        "decided_by": stored.decided_by,
        "dataset": agreed.plan.data.name,
        "epsilon": round(commitment.epsilon(delta), 4) if commitment.private else "none: no privacy",
        "central": _central(agreed, delta),
        "rounds": agreed.plan.rounds,
        "digest": stored.digest.hex(),
        "reasons": acting.approval().reasons(agreed) if stored.state == "pending" else (),
    }


def _central(agreed: AgreedPlan, delta: float) -> str:
    """Epsilon of the plan's own unit of privacy while secure aggregation holds."""
    if not agreed.plan.privacy.on:
        return "-"
    return f"{accounting.epsilon(accounting.events_of(agreed, 'central'), delta):.4g} per {agreed.plan.privacy.unit}"


@app.command()
def approve(
    context: typer.Context,
    plan: PlanName,
    as_json: Json = False,
) -> None:
    """Take part in a plan: its whole budget is set aside in the ledger now."""
    acting = Administrator(context.obj)
    stored, agreed = acting.plan(plan)
    acting.approval().approve(stored.digest, by=getpass.getuser())
    if as_json:
        return print_json({"run": str(stored.run_id), "state": "approved"})
    console.print(f"{agreed.plan.run.name} is approved; the daemon takes part in it from now on.")


@app.command()
def decline(
    context: typer.Context,
    plan: PlanName,
    as_json: Json = False,
) -> None:
    """Take no part in a plan; the coordinator learns only that."""
    acting = Administrator(context.obj)
    stored, agreed = acting.plan(plan)
    acting.approval().decline(stored.digest, by=getpass.getuser())
    if as_json:
        return print_json({"run": str(stored.run_id), "state": "declined"})
    console.print(f"{agreed.plan.run.name} is declined.")


@app.command()
def withdraw(
    context: typer.Context,
    plan: PlanName,
    as_json: Json = False,
) -> None:
    """Leave an approved plan for good: no further round is trained, and budget that was never released returns."""
    acting = Administrator(context.obj)
    stored, agreed = acting.plan(plan)
    acting.approval().withdraw(stored.digest, by=getpass.getuser())
    if as_json:
        return print_json({"run": str(stored.run_id), "state": "withdrawn"})
    console.print(f"This site has withdrawn from {agreed.plan.run.name}; what it released stays spent.")


# --- The ledger ---


@app.command()
def ledger(
    context: typer.Context,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute the chain and check every signature.")] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="After an older copy was restored and there is no newer one.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --accept-loss: do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each dataset has spent, what is reserved, and what is left."""
    if accept_loss:
        return _accept_loss(Administrator(context.obj), yes, as_json)
    home = config.SiteHome.open(context.obj)
    kept, public_key = _ledger_to_read(home)
    if verify:
        end = kept.verify(public_key)
        facts = {"entries": end.number, "head": end.head.hex(), "result": "every entry is where and what it was"}
        return print_json(facts) if as_json else print_facts(facts)
    lines = kept.lines(home.settings.policy.budget)
    if as_json:
        return print_json(lines)
    print_table(
        ["account", "datasets", "spent", "reserved", "left", "cap", "delta", "releases"],
        [
            (
                line.account,
                ", ".join(line.datasets),
                f"{line.spent:.3f}",
                f"{line.reserved:.3f}",
                f"{line.left:.3f}",
                f"{line.cap:g}",
                f"{line.delta:g}",
                line.releases,
            )
            for line in lines
        ],
        "No dataset has an account yet; `foedus-site data add` opens one.",
    )


def _ledger_to_read(home: config.SiteHome) -> tuple[Ledger, bytes]:
    """The ledger and the key to check it by; also after the site has left, when nobody writes it any more."""
    if (home.path / "identity").exists() or not home.database.exists():
        acting = Administrator(home.path)
        return acting.ledger, acting.membership.public_key
    store = SiteStore(home.database, CLOCK)
    return Ledger(store, CLOCK, sign=lambda message: b""), bytes.fromhex(store.meta(LEDGER_KEY) or "")


def _accept_loss(acting: Administrator, yes: bool, as_json: bool) -> None:
    try:
        acting.store.check_high_water()
    except LocalError as error:
        amiss = str(error)
    else:
        raise LocalError("The ledger is in its newest state, so there is no loss to accept.")
    if not yes:
        console.print(
            f"{amiss}\n\nRuns that were approved since that copy was made are not in it at all: ask the operator "
        )
        console.print("which there were, and lower [policy] max_epsilon_lifetime by what they may have spent.\n")
        typer.confirm("Count every run in it that could have gone on as spent in full?", abort=True)
    lost = acting.ledger.accept_loss(by=getpass.getuser())
    if as_json:
        return print_json({"spent_in_full": [str(run) for run in lost]})
    console.print(f"{len(lost)} runs count as spent in full. The ledger goes on from here.")


def main() -> NoReturn:
    terminal.run(app, "foedus-site")


if __name__ == "__main__":
    main()
