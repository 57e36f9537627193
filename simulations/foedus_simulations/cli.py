"""`foedus simulate`: many sites on one machine, through the round code of production. A plug-in of `foedus`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import Progress

from foedus_client.data import read_rows
from foedus_common.errors import LocalError
from foedus_common.model_folder import verify
from foedus_common.plan import RunPlan, read_plan
from foedus_common.privacy.accounting import epsilons
from foedus_common.privacy.statement import about_epsilons
from foedus_common.terminal import console, errors, print_json, print_line
from foedus_server.commands import describe
from foedus_simulations import figures, reports
from foedus_simulations.corpora import Row
from foedus_simulations.partition import partition
from foedus_simulations.report_page import write_page
from foedus_simulations.report_screen import show
from foedus_simulations.stopwatch import Stopwatch

COMPARISONS = ("alone", "central")
SITES = 3


def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan, as `foedus run submit` takes it.")],
    model: Annotated[Path, typer.Option(help="Folder of the plan's model.")],
    data: Annotated[Path, typer.Option(help="All rows: CSV, TSV, JSONL or Parquet.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    held_out: Annotated[Path | None, typer.Option(help="Rows to judge by; else a fifth of --data.")] = None,
    sites: Annotated[int | None, typer.Option(help="How many sites share the rows; else 3.")] = None,
    partition_by: Annotated[
        str, typer.Option("--partition", help="iid, dirichlet:ALPHA, or column:NAME for a site of each value.")
    ] = "iid",
    seed: Annotated[int, typer.Option(help="The same seed, the same adapter, bit for bit.")] = 0,
    compare: Annotated[str, typer.Option(help="alone, central, or both with a comma.")] = "",
    report: Annotated[Path | None, typer.Option(help="Folder for report.json, rounds.csv and report.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Run a plan over simulated sites: the protocol, the ledgers and the noise are real, the network is not.

    For example: foedus simulate plan.toml --model /models/bert --data rows.csv --partition dirichlet:0.5 --report out
    """
    wanted, read = comparisons(compare), read_plan(plan)
    verify(model, read.model.sha256)
    rows = read_table(data, text, label, partition_by)
    held = None if held_out is None else read_table(held_out, text, label)
    study = set_up(read, rows, held, partition_by, sites, seed, wanted)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)  # before hours of rounds, not after them
    found = played(study, plan, model)
    if report is not None:
        write(found, report)
    if as_json:
        return print_json(reports.figures(found))
    show(found, console)
    if report is not None:
        print_line(f"report.json, rounds.csv and report.html are in {report}")


# --- What is to be simulated ---


@dataclass(frozen=True)
class Study:
    """Rows by site, rows that choose learning rates (only if something is compared), and rows that count."""

    plan: RunPlan
    shares: Mapping[str, Sequence[Row]]
    validation: Sequence[Row]
    test: Sequence[Row]
    dealt: str  # the partition's specification
    seed: int
    wanted: tuple[str, ...]


def comparisons(text: str) -> tuple[str, ...]:
    """What --compare asks for. Raises LocalError for anything unknown."""
    wanted = tuple(filter(None, text.split(",")))
    for each in wanted:
        if each not in COMPARISONS:
            raise LocalError(f"--compare {each!r} is not known; give alone, central, or both with a comma.")
    return wanted


def read_table(path: Path, text: str, label: str, partition_by: str = "") -> list[Row]:
    """The file's rows; a row's group is its value in the partition's column, if the partition is by one."""
    rows = read_rows(path, text, label)
    kind, _, column = partition_by.partition(":")
    groups = [group for _, group in read_rows(path, text, column)] if kind == "column" and column else [""] * len(rows)
    return [Row(content, name, group) for (content, name), group in zip(rows, groups, strict=True)]


def set_up(
    plan: RunPlan,
    rows: Sequence[Row],
    held_out: Sequence[Row] | None,
    partition_by: str,
    sites: int | None,
    seed: int,
    wanted: tuple[str, ...],
) -> Study:
    """Holds rows out, unless they are given, and deals the others to the sites.

    If anything is compared, half of the rows held out choose learning rates and do not count: what is compared is
    judged by the other half, all of it. Raises LocalError when rows, sites or comparisons do not fit the plan.
    """
    if wanted and plan.privacy.unit == "site":
        raise LocalError(
            'With unit = "site" there is nothing alike to compare with: a site alone has nobody to share its noise; '
            "leave out --compare."
        )
    random = np.random.default_rng(seed)
    if held_out is None:
        order = random.permutation(len(rows))
        cut = len(rows) // 5
        held_out, rows = [rows[i] for i in order[:cut]], [rows[i] for i in np.sort(order[cut:])]
    check_labels(plan, [*rows, *held_out])
    if len(held_out) < 2:
        raise LocalError(f"There are {len(held_out)} rows to judge by, too few; give more rows, or --held-out FILE.")
    shares = share_out(rows, partition_by, sites, seed)
    secure = plan.secure_aggregation
    if not secure.min_sites <= len(shares) <= secure.max_sites:
        raise LocalError(
            f"The rows go to {len(shares)} sites, and [secure_aggregation] of the plan lets {secure.min_sites} to "
            f"{secure.max_sites} take part; change --sites or the plan."
        )
    shuffled = [held_out[i] for i in random.permutation(len(held_out))]
    chosen = len(shuffled) // 2 if wanted else 0
    return Study(plan, shares, shuffled[:chosen], shuffled[chosen:], partition_by, seed, wanted)


def share_out(rows: Sequence[Row], partition_by: str, sites: int | None, seed: int) -> dict[str, list[Row]]:
    """The rows of each site; sites are numbered, or named after the values of the partition's column."""
    kind, _, column = partition_by.partition(":")
    if kind == "column":
        columns = {"label": [row.label for row in rows], column: [row.group for row in rows]}
    else:
        columns, sites = {"label": [row.label for row in rows]}, SITES if sites is None else sites
    parts = partition(partition_by, columns, label="label", sites=sites, seed=seed)
    names = site_names(sorted({row.group for row in rows}), len(parts))
    return {name: [rows[i] for i in part] for name, part in zip(names, parts, strict=True)}


def site_names(values: Sequence[str], count: int) -> list[str]:
    """Names like the values, in small letters, digits and dashes; numbers where that does not tell `count` apart."""
    names = [re.sub("[^a-z0-9]+", "-", value.lower()).strip("-")[:40] for value in values]
    if all(names) and len(set(names)) == count:
        return names
    return [f"site-{number:03}" for number in range(1, count + 1)]


def check_labels(plan: RunPlan, rows: Sequence[Row]) -> None:
    unknown = sorted({row.label for row in rows} - set(plan.task.labels))
    if unknown:
        raise LocalError(
            f"The data has {len(unknown)} labels that the plan does not list in [task] labels, such as {unknown[0]!r}."
        )


# --- The simulation ---


def played(study: Study, plan_file: Path, model: Path) -> reports.Report:
    """Runs the plan over the study's sites, then what it is compared with, and measures all of it."""
    from foedus_common.tasks.text_classification import TextClassifier  # torch takes seconds to import
    from foedus_simulations.alone import Comparison, Judges, compare, pairs
    from foedus_simulations.federation import simulate as run

    watch, plan = Stopwatch(), study.plan
    with watch.stage("set-up"):
        classifier = TextClassifier.load(model, plan)
    with watch.stage("run"), progress(plan.rounds, len(study.shares)) as advance:
        outcome = run(plan_file, model, study.shares, study.seed, classifier, advance)
    with watch.stage("evaluation"):
        test = classifier.encode(pairs(study.test))
        accuracies = [classifier.accuracy(adapter, test) for adapter in outcome.adapters]
    compared = Comparison({}, None)
    if study.wanted:
        judges = Judges(classifier.encode(pairs(study.validation)), test)
        with watch.stage("alone and central"):
            compared = compare(
                classifier, outcome.agreed, study.shares, judges, seed=study.seed, wanted=study.wanted, say=tell
            )
    attempts = [dataclasses.asdict(attempt) for attempt in outcome.attempts]
    phases = describe(outcome.agreed)["phases"]
    rows = sum(map(len, study.shares.values()))
    agreed = outcome.agreed
    spent = {name: epsilons(agreed, account.runs[agreed.run_id].spent) for name, account in outcome.accounts.items()}
    return reports.Report(
        kind="simulation",
        title=f"{plan.run.name}: {len(study.shares)} simulated sites",
        data=f"{rows:,} rows of {plan.data.name}, dealt out by {study.dealt} with seed {study.seed}.",
        model=plan.model.name,
        labels=len(plan.task.labels),
        noun=reports.Noun("site", "sites"),
        rows_held_out=len(study.test),
        commonest=figures.share_of_commonest([row.label for row in study.test]),
        sites=tuple(
            reports.Site(
                name=name,
                rows=len(part),
                epsilon=each.local if (each := spent[name]) else None,
                epsilon_central=each.central if each else None,
                releases_without_privacy=outcome.accounts[name].releases_without_privacy,
                accuracy_alone=compared.alone.get(name),
            )
            for name, part in study.shares.items()
        ),
        rounds=figures.rounds(plan, phases, attempts, accuracies),
        epsilon_budget=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        seconds_total=watch.total,
        seconds_by_stage=figures.stages(watch.seconds, attempts),
        parameters=max(phase["parameters"] for phase in phases),
        secure_aggregation=True,
        accuracy_central=compared.central,
        compared=COMPARED if study.wanted else "",
        notes=tuple(filter(None, [figures.retries(plan, attempts)])),
        unit=plan.privacy.unit,
        about_epsilons=about_epsilons(agreed),
    )


COMPARED = (
    "Alone and central: the same plan on one site's rows, or on all rows in one place, with the best of three learning "
    "rates on validation rows, which are not among those that count."
)


@contextmanager
def progress(rounds: int, sites: int) -> Iterator[Callable[[str, int], None]]:
    """What is told of each site's training; without a terminal, one line for each round."""
    if not errors.is_terminal:
        told: set[int] = set()

        def line(site: str, round_index: int) -> None:
            if round_index not in told:
                told.add(round_index)
                tell(f"round {round_index + 1} of {rounds}")

        yield line
        return
    with Progress(console=errors, transient=True) as bar:
        task = bar.add_task("", total=rounds * sites)
        yield lambda site, round_index: bar.update(
            task, advance=1, description=f"round {round_index + 1} of {rounds}, {site}"
        )


def tell(what: str) -> None:
    """Progress goes to standard error, so that results on standard output stay clean."""
    errors.print(what, markup=False)


def write(report: reports.Report, folder: Path) -> None:
    reports.write_json(report, folder / "report.json")
    reports.write_rounds(report, folder / "rounds.csv")
    write_page(report, folder / "report.html")
