"""`foedus simulate`: many sites on one machine, through the round code of production. A plug-in of `foedus`."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from foedus_client.data import read_rows
from foedus_common.errors import LocalError
from foedus_common.plan import read_plan, schedule
from foedus_common.terminal import console, print_json, print_table
from foedus_simulations.corpora import Row
from foedus_simulations.partition import partition

COMPARISONS = ("alone", "central")


@dataclass(frozen=True)
class Report:
    """accuracy: after each round, on the held-out rows; alone: by site; epsilon: from each site's ledger."""

    plan: str
    seed: int
    rows: Mapping[str, int]
    held_out: int
    accuracy: tuple[float, ...]
    epsilon: Mapping[str, float | None]
    seconds: float
    alone: Mapping[str, float] = field(default_factory=dict)
    central: float | None = None


def simulate(
    plan: Annotated[Path, typer.Argument(help="The plan, as `foedus run submit` takes it.")],
    model: Annotated[Path, typer.Option(help="Folder of the plan's model.")],
    data: Annotated[Path, typer.Option(help="All rows: CSV, JSONL or Parquet.")],
    text: Annotated[str, typer.Option(help="Column with the text.")] = "text",
    label: Annotated[str, typer.Option(help="Column with the label.")] = "label",
    held_out: Annotated[Path | None, typer.Option(help="Rows to judge by; else a fifth of --data.")] = None,
    sites: Annotated[int, typer.Option(help="How many sites share the rows.")] = 3,
    partition_by: Annotated[str, typer.Option("--partition", help="iid, or dirichlet:ALPHA.")] = "iid",
    seed: Annotated[int, typer.Option(help="The same seed, the same adapter, bit for bit.")] = 0,
    compare: Annotated[str, typer.Option(help="alone, central, or both with a comma.")] = "",
    report: Annotated[Path | None, typer.Option(help="Folder for report.json and rounds.csv.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Run a plan over simulated sites: the protocol, the ledgers and the noise are real, the network is not."""
    wanted = _comparisons(compare)
    rows = [Row(content, name, "") for content, name in read_rows(data, text, label)]
    if held_out is None:
        order = np.random.default_rng(seed).permutation(len(rows))
        cut = len(rows) // 5
        judged, rows = [rows[i] for i in order[:cut]], [rows[i] for i in np.sort(order[cut:])]
    else:
        judged = [Row(content, name, "") for content, name in read_rows(held_out, text, label)]
    parts = partition(partition_by, {label: [row.label for row in rows]}, label=label, sites=sites, seed=seed)
    shares = {f"site-{number:03}": [rows[i] for i in part] for number, part in enumerate(parts, start=1)}
    result = _simulate(plan, model, shares, judged, seed, wanted)
    if report is not None:
        _write(result, plan, report)
    print_json(result) if as_json else _show(result, report)


def _comparisons(text: str) -> tuple[str, ...]:
    wanted = tuple(filter(None, text.split(",")))
    for each in wanted:
        if each not in COMPARISONS:
            raise LocalError(f"--compare {each!r} is not known; give alone, central, or both with a comma.")
    return wanted


def _simulate(
    plan: Path,
    model: Path,
    shares: Mapping[str, Sequence[Row]],
    judged: Sequence[Row],
    seed: int,
    wanted: tuple[str, ...],
) -> Report:
    from foedus_common.tasks.local_trainer import LocalTrainer  # torch takes seconds to import
    from foedus_common.tasks.text_classification import TextClassifier
    from foedus_server.prepare import first_adapter
    from foedus_simulations.alone import alone, central, pairs, train
    from foedus_simulations.federation import simulate as run
    from foedus_simulations.randomness import seeded

    classifier = TextClassifier.load(model, read_plan(plan))
    started = time.monotonic()
    outcome = run(plan, model, shares, seed, classifier)
    seconds = time.monotonic() - started
    first = first_adapter(outcome.spec, outcome.agreed.plan.adapter.seed)
    held_out = classifier.encode(pairs(judged))
    by_site: dict[str, float] = {}
    if "alone" in wanted:
        for name, rows in shares.items():
            judge = classifier.encode(pairs(judged[::2]))
            test = classifier.encode(pairs(judged[1::2]))
            one = alone(classifier, outcome.agreed, first, rows, judge, test, seeded(seed, f"alone {name}"))
            by_site[name] = one.accuracy
    at_once = None
    if "central" in wanted:
        agreed = central(outcome.agreed, len(shares))
        everything = [row for rows in shares.values() for row in rows]
        trainer = LocalTrainer(classifier, agreed, pairs(everything))
        tensors = train(trainer, agreed.plan, first, seeded(seed, "central"))
        at_once = classifier.accuracy(tensors, held_out)
    return Report(
        plan=outcome.agreed.plan.run.name,
        seed=seed,
        rows={name: len(rows) for name, rows in shares.items()},
        held_out=len(judged),
        accuracy=tuple(classifier.accuracy(adapter, held_out) for adapter in outcome.adapters),
        epsilon=outcome.epsilon,
        seconds=seconds,
        alone=by_site,
        central=at_once,
    )


def _write(result: Report, plan: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    with (folder / "rounds.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["round", "phase", "accuracy"])
        for round_plan, accuracy in zip(schedule(read_plan(plan)), result.accuracy, strict=True):
            writer.writerow([round_plan.index + 1, round_plan.settings.train, accuracy])


def _show(result: Report, folder: Path | None) -> None:
    console.print(f"{result.plan}: {len(result.rows)} sites, {len(result.accuracy)} rounds in {result.seconds:.1f} s")
    print_table(
        ["site", "rows", "epsilon", "alone"],
        [
            (
                name,
                count,
                "-" if result.epsilon[name] is None else f"{result.epsilon[name]:.3f}",
                f"{result.alone[name]:.3f}" if name in result.alone else "-",
            )
            for name, count in result.rows.items()
        ],
        "",
    )
    console.print(f"together: {result.accuracy[-1]:.3f} of {result.held_out} held-out rows are right")
    if result.central is not None:
        console.print(f"central (all rows in one place, at the same privacy): {result.central:.3f}")
    if folder is not None:
        console.print(f"report.json and rounds.csv are in {folder}")
