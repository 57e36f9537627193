"""`foedus model`, `foedus plan` and `foedus run`: what is trained. The rest of the program is in `operator`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foedus_common.clock import SystemClock
from foedus_common.errors import LocalError
from foedus_common.plan import read_plan
from foedus_common.protocol.draw import withstood
from foedus_common.randomness import system_random
from foedus_common.terminal import Json, print_facts, print_json, print_line, print_table
from foedus_server.cli import watch
from foedus_server.commands import Operator, as_facts, describe
from foedus_server.config import Home
from foedus_server.store import Run

model_app = typer.Typer(no_args_is_help=True, help="Base models, by the hash of their files.")
plan_app = typer.Typer(no_args_is_help=True, help="Plans: what a run does, in numbers.")
run_app = typer.Typer(no_args_is_help=True, help="Runs: submit, follow, stop, resume, export, evaluate.")

PlanFile = Annotated[Path, typer.Argument(help="The plan as TOML; `foedus plan new` writes one to start from.")]
RunName = Annotated[str, typer.Argument(help="The run's name, for the newest of that name, or its number.")]


def operator(context: typer.Context) -> Operator:
    return Operator(Home.open(context.obj), SystemClock(), system_random)


# --- Models and plans ---


@model_app.command("add")
def model_add(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model folder: safetensors and JSON only.")],
    name: Annotated[str | None, typer.Option(help="Else the folder's name.")] = None,
    as_json: Json = False,
) -> None:
    """Hash a model folder and remember it under its name.

    For example: foedus model add /models/all-MiniLM-L6-v2
    """
    model = operator(context).add_model(folder, name)
    if as_json:
        return print_json(model)
    print_facts({"name": model.name, "sha256": model.manifest_sha256, "folder": model.path})


@model_app.command("list")
def model_list(context: typer.Context, as_json: Json = False) -> None:
    """Show the models that plans can name."""
    models = operator(context).store.runs.models()
    if as_json:
        return print_json(models)
    rows = [(model.name, model.manifest_sha256, model.path) for model in models]
    print_table(["model", "sha256", "folder"], rows, "No models yet; `foedus model add FOLDER` adds one.")


@plan_app.command("new")
def plan_new(
    file: Annotated[Path, typer.Argument(help="Where to write the plan.")] = Path("plan.toml"), as_json: Json = False
) -> None:
    """Write a plan to start from, with a comment on every number.

    For example: foedus plan new plan.toml
    """
    if file.exists():
        raise LocalError(f"{file} exists and is not overwritten; give another name.")
    file.write_text((Path(__file__).parent / "plan_template.toml").read_text(encoding="utf-8"), encoding="utf-8")
    if as_json:
        return print_json({"file": str(file.absolute())})
    print_line(f"{file} is written. Fill it in, then: foedus plan check {file}")


@plan_app.command("check")
def plan_check(context: typer.Context, plan: PlanFile, as_json: Json = False) -> None:
    """Check a plan whole, as `run submit` does, and say what it means. No site is asked.

    For example: foedus plan check plan.toml
    """
    acting = operator(context)
    agreed = acting.prepare(plan).agreed
    secure = agreed.plan.secure_aggregation
    facts = describe(agreed) | {
        "sites_in_a_sum": f"{secure.size.smallest_sum} to {secure.size.largest_sum}",
        "organisations_withstood": secure.colluding,
        "sites_withstood": withstood(secure.colluding, size=secure.size, rounds=agreed.plan.rounds),
        "sites_of_the_roster": acting.outlook(agreed),
    }
    if as_json:
        return print_json(facts)
    facts |= {name: _short(facts[name]) for name in ("epsilon_local", "epsilon_central")}
    if facts["sites_withstood"] == secure.colluding:
        del facts["sites_withstood"]  # no more than with the organisations
    print_facts({key: value for key, value in facts.items() if value != "" and key not in ("phases", "digest")})
    print_table(
        ["phase", "rounds", "numbers trained", "noise multiplier", "bytes up a round"],
        [
            (p["train"], p["rounds"], p["parameters"], _short(p["noise_multiplier"]), p["bytes_up_per_round"])
            for p in facts["phases"]
        ],
        "",
    )


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


# --- Runs ---


def _run(context: typer.Context, text: str) -> tuple[Operator, Run]:
    acting = operator(context)
    return acting, acting.store.runs.find(text)


@run_app.command("submit")
def run_submit(context: typer.Context, plan: PlanFile, as_json: Json = False) -> None:
    """Check a plan, sign it and put it before the sites.

    For example: foedus run submit plan.toml
    """
    read_plan(plan)  # the quick mistakes first
    run = operator(context).submit(plan)
    if as_json:
        return print_json({"run": str(run.run_id), "name": run.name})
    print_line(f"Run {run.run_id} ({run.name}) is submitted; its sites' administrators decide now.")
    print_line(f"Next: foedus run watch {run.name}")


@run_app.command("list")
def run_list(context: typer.Context, as_json: Json = False) -> None:
    """Show every run, newest first."""
    runs = operator(context).store.runs.all()
    rows = [(run.run_id, run.name, run.state, f"{run.rounds_done}/{run.rounds}", run.reason or "") for run in runs]
    if as_json:
        keys = ("run", "name", "state", "rounds", "reason")
        return print_json([dict(zip(keys, map(str, row), strict=True)) for row in rows])
    print_table(["run", "name", "state", "rounds", "reason"], rows, "No runs yet; `foedus run submit PLAN.toml`.")


@run_app.command("show")
def run_show(context: typer.Context, run: RunName, as_json: Json = False) -> None:
    """Show a run: state, plan in numbers, each round with its cohort, bytes and seconds.

    For example: foedus run show icd-chapters
    """
    acting, found = _run(context, run)
    if as_json:
        return print_json(as_facts(found, acting))
    watch.show(acting.store, found.run_id)


@run_app.command("watch")
def run_watch(context: typer.Context, run: RunName, as_json: Json = False) -> None:
    """Follow a run until it ends; Ctrl-C stops watching, not the run.

    For example: foedus run watch icd-chapters
    """
    acting, found = _run(context, run)
    final = (watch.await_end if as_json else watch.follow)(acting.store, found.run_id)
    if as_json:
        print_json(as_facts(final, acting))
    if final.state != "finished":
        raise typer.Exit(1)


@run_app.command("stop")
def run_stop(context: typer.Context, run: RunName, as_json: Json = False) -> None:
    """Stop a run after the message under way; its adapters stay.

    For example: foedus run stop icd-chapters
    """
    acting, found = _run(context, run)
    stopped = acting.stop(found)
    if as_json:
        return print_json({"run": str(stopped.run_id), "state": stopped.state})
    print_line(f"{stopped.name} is stopping.")


@run_app.command("resume")
def run_resume(context: typer.Context, run: RunName, as_json: Json = False) -> None:
    """Take up a stopped or failed run after its last committed round. Its sites decide anew.

    For example: foedus run resume icd-chapters
    """
    acting, found = _run(context, run)
    resumed = acting.resume(found)
    if as_json:
        return print_json({"run": str(resumed.run_id), "state": resumed.state, "rounds_done": resumed.rounds_done})
    print_line(f"{resumed.name} goes on after round {resumed.rounds_done}; its sites' administrators decide anew.")
    print_line(f"Next: foedus run watch {resumed.name}")


@run_app.command("export")
def run_export(
    context: typer.Context,
    run: RunName,
    to: Annotated[Path | None, typer.Option(help="Folder to write; else RUN-adapter here.")] = None,
    as_json: Json = False,
) -> None:
    """Write the adapter as a PEFT folder with its head, its labels and a card that says how to load it.

    For example: foedus run export icd-chapters --to adapter
    """
    acting, found = _run(context, run)
    folder = to or Path(f"{found.name}-adapter")
    acting.export(found, folder)
    if as_json:
        return print_json({"run": str(found.run_id), "folder": str(folder.resolve())})
    print_line(f"The adapter of {found.name} is in {folder}; its README.md has the lines that load it.")


@run_app.command("evaluate")
def run_evaluate(
    context: typer.Context,
    run: RunName,
    data: Annotated[Path, typer.Option(help="Held-out rows that the consortium owns: CSV.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    every_round: Annotated[bool, typer.Option("--every-round", help="Not only the last.")] = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy on held-out rows, in a child process.

    For example: foedus run evaluate icd-chapters --data held-out.csv --text note --label chapter
    """
    acting, found = _run(context, run)
    results = acting.evaluate(found, data, text, label, every_round)
    if as_json:
        return print_json([result.as_json() for result in results])
    rows = [
        (result.round, f"{result.accuracy:.3f}", f"±{result.standard_error:.3f}", result.rows) for result in results
    ]
    print_table(["after round", "accuracy", "standard error", "rows"], rows, "")
