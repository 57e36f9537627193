"""The commands of `foedus-site` about plans and what they spend: look, decide, and the ledger.

`site` has the others.
"""

from __future__ import annotations

import dataclasses
import getpass
from collections.abc import Callable
from typing import Annotated, Any

import typer

from foedus_client import config
from foedus_client.approval import Approval
from foedus_client.cli.administrator import CLOCK, Administrator
from foedus_client.cli.audit import site_to_read
from foedus_client.ledger.chart import chart
from foedus_client.storage import forget_run
from foedus_client.store import StoredPlan
from foedus_common.clock import DAY, iso
from foedus_common.errors import LocalError
from foedus_common.objects import ObjectStore
from foedus_common.plan import AgreedPlan, parse_agreed_plan
from foedus_common.privacy import accounting
from foedus_common.privacy.statement import about_epsilons
from foedus_common.terminal import Json, print_as_is, print_aside, print_facts, print_json, print_line, print_table

app = typer.Typer()

PlanName = Annotated[str, typer.Argument(help="Run number, name, or the first digits of the digest.")]

UNITS = {"h": 3600.0, "d": DAY}
LONGEST_APPROVAL = 366 * DAY

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
        if row["state"] == "pending" and row["about_epsilons"]:
            print_line(f"{row['name']}: {row['about_epsilons']}")
        for reason in row["reasons"]:
            print_line(f"{row['name']}: {reason}", style="yellow")
        if (said := row["approval"]) and said["expires_at"]:
            until = f"until {said['expires_at']}" if said["holds"] else f"which ended on {said['expires_at']}"
            print_line(f"{row['name']}: approved by {said['by']} on {said['at']}, {until}.")
    if any(row["state"] == "pending" for row in rows):
        print_line("Next: foedus-site approve PLAN, or foedus-site decline PLAN")


def _plan_row(acting: Administrator, stored: StoredPlan) -> dict[str, Any]:
    agreed = parse_agreed_plan(stored.canonical)
    epsilon = acting.approval().epsilon(agreed)
    return {
        "run": str(stored.run_id),
        "name": agreed.plan.run.name,
        "purpose": agreed.plan.run.purpose,
        "state": stored.state,
        "decided_by": stored.decided_by,
        "dataset": agreed.plan.data.name,
        "epsilon": "none: no privacy" if epsilon is None else round(epsilon, 4),
        "central": _central(agreed, acting.home.settings.policy.delta),
        "about_epsilons": about_epsilons(agreed),
        "rounds": agreed.plan.rounds,
        "digest": stored.digest.hex(),
        "reasons": acting.approval().reasons(agreed) if stored.state == "pending" else (),
        "approval": _consent(acting, stored) if stored.state == "approved" else None,
    }


def _central(agreed: AgreedPlan, delta: float) -> str:
    """Epsilon of the plan's own unit of privacy while secure aggregation holds."""
    if not agreed.plan.privacy.on:
        return "-"
    return f"{accounting.epsilon(accounting.events_of(agreed, 'central'), delta):.4g} per {agreed.plan.privacy.unit}"


def _consent(acting: Administrator, stored: StoredPlan) -> dict[str, Any] | None:
    """The signed approval as people read it, and whether a round may begin by it now."""
    consent = acting.ledger.run(stored.run_id).consent
    if consent is None:
        return None
    facts = {key: value for key, value in dataclasses.asdict(consent).items() if key not in ("number", "at")}
    times = {"at": iso(consent.at), "expires_at": None if consent.expires_at is None else iso(consent.expires_at)}
    return {**facts, **times, "entry": consent.number, "holds": consent.holds(CLOCK.now())}


@app.command()
def approve(
    context: typer.Context,
    plan: PlanName,
    by: Annotated[str | None, typer.Option(help="Who decides; else this user's name.")] = None,
    expires: Annotated[str, typer.Option(help="No round begins after so many days or hours: 30d, 12h.")] = "30d",
    epsilon_cap: Annotated[
        float | None, typer.Option(help="Take part until the run has released so much; else all that its plan says.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Take part in a plan: its whole budget is set aside in the ledger now. Again, to renew or change an approval.

    For example: foedus-site approve icd-chapters --expires 90d --by "Dr. Ada"
    """
    acting = Administrator(context.obj)
    stored, agreed = acting.plan(plan)
    expires_at = CLOCK.now() + _seconds(expires)
    acting.approval().approve(stored.digest, by or getpass.getuser(), expires_at, epsilon_cap)
    if as_json:
        return print_json({"run": str(stored.run_id), "state": "approved", "expires_at": iso(expires_at)})
    print_line(f"{agreed.plan.run.name} is approved; the daemon takes part in it until {iso(expires_at)}.")


def _seconds(text: str) -> float:
    """Of "30d" or "12h". Raises LocalError for anything else."""
    number, unit = text[:-1], text[-1:]
    if not (number.isdecimal() and int(number) and unit in UNITS and int(number) * UNITS[unit] <= LONGEST_APPROVAL):
        raise LocalError(f"--expires {text!r} is no time; write days or hours, at most a year: 30d, 12h.")
    return int(number) * UNITS[unit]


@app.command()
def decline(
    context: typer.Context,
    plan: PlanName,
    as_json: Json = False,
) -> None:
    """Take no part in a plan; the coordinator learns only that.

    For example: foedus-site decline icd-chapters
    """
    _refuse(context, plan, as_json, Approval.decline, "declined", "{} is declined.")


@app.command()
def withdraw(
    context: typer.Context,
    plan: PlanName,
    as_json: Json = False,
) -> None:
    """Leave an approved plan for good: no further round is trained, and budget that was never released returns.

    For example: foedus-site withdraw icd-chapters
    """
    sentence = "This site has withdrawn from {}; what it released stays spent."
    _refuse(context, plan, as_json, Approval.withdraw, "withdrawn", sentence)
    acting = Administrator(context.obj)
    forget_run(ObjectStore(acting.home.objects), acting.store, CLOCK, acting.plan(plan)[0].run_id)


def _refuse(
    context: typer.Context,
    plan: str,
    as_json: bool,
    decide: Callable[[Approval, bytes, str], None],
    state: str,
    sentence: str,
) -> None:
    """decide: a method of `Approval`. sentence: with {} for the plan's name."""
    acting = Administrator(context.obj)
    stored, agreed = acting.plan(plan)
    decide(acting.approval(), stored.digest, getpass.getuser())
    if as_json:
        return print_json({"run": str(stored.run_id), "state": state})
    print_line(sentence.format(agreed.plan.run.name))


# --- The ledger ---


@app.command()
def ledger(
    context: typer.Context,
    verify: Annotated[bool, typer.Option("--verify", help="Recompute the chain and check every signature.")] = False,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="After an older copy was restored and there is no newer one.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --accept-loss: do not ask.")] = False,
    history: Annotated[bool, typer.Option("--history", help="With --json: what was spent by when, too.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each dataset has spent, what is reserved, what is left, and how it came to that.

    For example: foedus-site ledger --verify
    """
    if accept_loss:
        return _accept_loss(Administrator(context.obj), yes, as_json)
    home = config.SiteHome.open(context.obj)
    _, kept, public_key = site_to_read(home)
    if verify:
        end = kept.verify(public_key)
        facts = {"entries": end.number, "head": end.head.hex(), "result": "every entry is where and what it was"}
        return print_json(facts) if as_json else print_facts(facts)
    budget = home.settings.policy.budget
    lines = kept.lines(budget)
    if as_json:
        spent = kept.history(budget) if history else {}
        return print_json([{**dataclasses.asdict(line), **_points(spent, line.account)} for line in lines])
    print_table(
        ["account", "datasets", "spent", "reserved", "left", "cap", "24 hours", "delta", "releases"],
        [
            (
                line.account,
                ", ".join(line.datasets),
                f"{line.spent:.3f}",
                f"{line.reserved:.3f}",
                f"{line.left:.3f}",
                f"{line.cap:g}",
                f"{line.today:.3f} of {line.cap_per_day:g}",
                f"{line.delta:g}",
                line.releases,
            )
            for line in lines
        ],
        "No dataset has an account yet; `foedus-site data add` opens one.",
    )
    if lines:
        print_line("Counted is one row, by this site's own noise alone (epsilon_local), in every run.")
    for account, points in kept.history(budget).items():
        if len(points) > 1:
            print_line(f"\n{account}: epsilon spent, of {budget.epsilon:g}")
            for drawn in chart(points, budget.epsilon, CLOCK.now()):
                print_as_is(drawn)


def _points(spent: dict[str, list[tuple[float, float]]], account: str) -> dict[str, Any]:
    return {"history": [[iso(at), epsilon] for at, epsilon in spent[account]]} if spent else {}


def _accept_loss(acting: Administrator, yes: bool, as_json: bool) -> None:
    try:
        acting.store.check_high_water()
    except LocalError as error:
        amiss = str(error)
    else:
        raise LocalError("The ledger is in its newest state, so there is no loss to accept.")
    if not as_json:
        print_aside(
            f"{amiss}\n\nRuns that were approved since that copy was made are not in it at all. Go by your own records "
            "of them: the operator may leave some out. Lower [policy] max_epsilon_lifetime by what they may have "
            "spent; where nobody knows, train on their datasets no more.\n"
        )
    if not yes:
        typer.confirm("Count every run in it that could have gone on as spent in full?", abort=True, err=True)
    lost = acting.ledger.accept_loss(by=getpass.getuser())
    if as_json:
        return print_json({"spent_in_full": [str(run) for run in lost]})
    print_line(f"{len(lost)} runs count as spent in full. The ledger goes on from here.")
