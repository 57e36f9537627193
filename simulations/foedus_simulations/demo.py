"""`make demo`: three hospitals and a coordinator, as real processes on this machine, on real data.

Everything a federation does by hand happens here by the same commands: the operator starts, three hospitals join,
each approves the plan, the run is watched, its adapter exported and evaluated. The hospitals' "alone" figures are
simulated and charged to nobody's ledger. The root key stays on this machine: a demonstration only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foedus_common.errors import FoedusError, LocalError
from foedus_common.plan import RunPlan, read_plan, schedule
from foedus_common.privacy.accounting import GaussianSteps, epsilon
from foedus_common.privacy.noise import accounted_multiplier
from foedus_common.terminal import console
from foedus_simulations import corpora, reports
from foedus_simulations.corpora import Corpus, Row
from foedus_simulations.parties import OPERATOR, SITE, Party, free_ports, until
from foedus_simulations.partition import partition
from foedus_simulations.report_page import write_page

HOSPITALS = ("north", "lakeside", "st-mary")
DATASET = "coding-terms"
COLUMNS = ("--text", "note", "--label", "chapter")
PLANS = Path(__file__).with_name("plans")
CORPUS_SEED, PARTITION_SEED = 0, 0


@dataclass(frozen=True)
class Edition:
    """The full demo, or the small one that CI runs in two minutes."""

    plan: Path
    training_rows: int
    held_out_rows: int


FULL = Edition(PLANS / "icd-chapters.toml", 6_000, 2_000)
SMALL = Edition(PLANS / "icd-chapters-small.toml", 1_500, 1_000)


@dataclass
class Stopwatch:
    """Seconds by stage, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, sentence: str) -> Iterator[None]:
        console.print(f"[bold]{sentence}[/bold]")
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


@dataclass(frozen=True)
class Finished:
    """What the programs printed about the finished run, as JSON."""

    shown: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]
    ledgers: Mapping[str, Any]
    plan: Path


def demo(folder: Path, edition: Edition) -> reports.DemoReport:
    """Runs the whole demo in `folder`, which is emptied first, and returns what came out."""
    watch, started = Stopwatch(), time.monotonic()
    with watch.stage("set-up", "Fetching the model and the data"):
        model = corpora.minilm(corpora.default_cache())
        corpus = corpora.icd10(
            corpora.default_cache(),
            seed=CORPUS_SEED,
            train_rows=edition.training_rows,
            held_out_rows=edition.held_out_rows,
        )
        shutil.rmtree(folder, ignore_errors=True)
        rows = share_out(corpus)
        for name, part in rows.items():
            write_rows(folder / "data" / f"{name}.csv", part)
        write_rows(folder / "data" / "held-out.csv", corpus.held_out)
    finished = federate(folder, edition, model, corpus, watch)
    with watch.stage(
        "alone (simulated)", "Training each hospital alone at the same privacy: simulated, charged to nobody"
    ):
        alone = train_alone(finished.plan, model, rows, corpus)
    return as_report(folder, edition, corpus, rows, finished, alone, watch, time.monotonic() - started)


def share_out(corpus: Corpus) -> dict[str, list[Row]]:
    """The training rows, hospital by hospital: unequal in number and in what they are about."""
    columns = {"chapter": [row.label for row in corpus.train]}
    parts = partition("dirichlet:0.5", columns, label="chapter", sites=len(HOSPITALS), seed=PARTITION_SEED)
    return {name: [corpus.train[index] for index in part] for name, part in zip(HOSPITALS, parts, strict=True)}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    corpora.write_csv(path, rows, "note", "chapter")


# --- The federation, by its own commands ---


def federate(folder: Path, edition: Edition, model: Path, corpus: Corpus, watch: Stopwatch) -> Finished:
    with ExitStack() as stack:
        operator = stack.enter_context(Party(OPERATOR, folder / "coordinator"))
        sites = {name: stack.enter_context(Party(SITE, folder / name)) for name in HOSPITALS}
        with watch.stage("set-up", f"A coordinator starts; {reports.listed(HOSPITALS)} join"):
            start_coordinator(operator)
            for name, site in sites.items():
                join(operator, site, name)
            operator.ask("roster", "sign")
            console.print("Demonstration only: the root key that signed the roster lies on this machine.")
            for name, site in sites.items():
                site.finish("join")
                open_for_work(site, model, folder / "data" / f"{name}.csv")
        with watch.stage("set-up", "The operator submits the plan; each hospital's administrator approves it"):
            plan = fill_in_plan(operator, edition.plan, model, corpus, folder / "plan.toml")
            run = operator.ask("run", "submit", str(plan))["run"]
            for site in sites.values():
                approve(site, run)
        with watch.stage("run", "The run: every round a secure sum of noised updates"):
            if operator.show("run", "watch", run) != 0:
                raise LocalError(f"The run did not finish; see {operator.home / 'coordinator.log'}.")
        with watch.stage("evaluation", "Measuring every round's adapter on held-out rows that the consortium owns"):
            held_out = ("--data", str(folder / "data" / "held-out.csv"), *COLUMNS)
            scores = operator.ask("run", "evaluate", run, *held_out, "--every-round")
            operator.ask("run", "export", run, "--to", str(folder / "adapter"))
        shown = operator.ask("run", "show", run)
        ledgers = {name: site.ask("ledger")[0] for name, site in sites.items()}
    return Finished(shown, scores, ledgers, plan)


def start_coordinator(operator: Party) -> None:
    link, enrolment = free_ports(2)
    ports = ("--port", str(link), "--enrolment-port", str(enrolment))
    operator.ask("init", "--demonstration", "--federation", "Three hospitals", *ports)
    operator.start("up", "up", "--json")
    operator.await_line("up", '"ready"')


def join(operator: Party, site: Party, name: str) -> None:
    """Both people's part: the token is handed over, the fingerprint read aloud and compared."""
    token = operator.ask("site", "invite", name, "--org", f"{name} hospital")["token"]
    site.start("join", "join", token, "--json")
    site.await_line("join", '"fingerprint"')
    read_aloud = json.loads(site.log("join").read_text().splitlines()[0])["fingerprint"]
    operator.ask("site", "approve", name, "--fingerprint", read_aloud)


def open_for_work(site: Party, model: Path, data: Path) -> None:
    settings = site.home / "site.toml"
    one_thread = settings.read_text().replace(
        "threads = 0", "threads = 1"
    )  # three hospitals share this machine's cores
    settings.write_text(one_thread)
    site.ask("model", "add", str(model))
    site.ask("data", "add", DATASET, str(data), "--column", "text=note", "--column", "label=chapter")
    site.start("run", "run")


def fill_in_plan(operator: Party, template: Path, model: Path, corpus: Corpus, to: Path) -> Path:
    """The plan as an operator would write it: with the model's hash and the labels."""
    sha256 = operator.ask("model", "add", str(model))["manifest_sha256"]
    text = template.read_text().replace('"MODEL"', json.dumps(sha256))
    to.write_text(text.replace('["LABELS"]', json.dumps(list(corpus.labels), ensure_ascii=False)))
    return to


def approve(site: Party, run: str) -> None:
    until(lambda: any(plan["run"] == run for plan in site.ask("plans")), 60, f"{site.home.name}: the plan's arrival")
    site.ask("approve", run)


# --- What came out ---


def train_alone(plan: Path, model: Path, rows: Mapping[str, Sequence[Row]], corpus: Corpus) -> dict[str, float]:
    """Accuracy of each hospital alone. torch is imported here, when every other process has ended."""
    from foedus_common.tasks.text_classification import TextClassifier
    from foedus_simulations.alone import alone, head_only, pairs
    from foedus_simulations.randomness import seeded

    classifier = TextClassifier.load(model, read_plan(plan))
    agreed, first = head_only(read_plan(plan), classifier)
    validation, held_out = classifier.encode(pairs(corpus.validation)), classifier.encode(pairs(corpus.held_out))
    return {
        name: alone(classifier, agreed, first, part, validation, held_out, seeded(0, name)).accuracy
        for name, part in rows.items()
    }


def as_report(
    folder: Path,
    edition: Edition,
    corpus: Corpus,
    rows: Mapping[str, Sequence[Row]],
    finished: Finished,
    alone: Mapping[str, float],
    watch: Stopwatch,
    seconds: float,
) -> reports.DemoReport:
    plan = read_plan(finished.plan)
    committed = [attempt for attempt in finished.shown["attempts"] if attempt["state"] == "committed"]
    run_seconds = watch.seconds.pop("run")
    secure = sum(sum(stages.values()) - stages["training"] for stages in (each["seconds"] for each in committed))
    stages = {
        "set-up": watch.seconds["set-up"],
        "local training": run_seconds - secure,
        "secure aggregation": secure,
        "evaluation": watch.seconds["evaluation"],
        "alone (simulated)": watch.seconds["alone (simulated)"],
    }
    last = finished.scores[-1]
    return reports.DemoReport(
        title="Three hospitals fine-tune one adapter: the ICD-10 chapter of a coding term",
        data="Public ICD-10-CM code descriptions (CDC), not patient notes; no 3-character category is in two parts.",
        model=plan.model.name,
        labels=len(plan.task.labels),
        rows_held_out=len(corpus.held_out),
        hospitals=tuple(
            reports.Hospital(name, len(rows[name]), alone[name], finished.ledgers[name]["spent"]) for name in HOSPITALS
        ),
        rounds=tuple(as_rounds(plan, finished, committed)),
        accuracy_together=last["accuracy"],
        examples=tuple(reports.Example(**example) for example in last["examples"]),
        epsilon_budget=plan.privacy.epsilon or 0.0,
        delta=plan.privacy.delta or 0.0,
        seconds_total=seconds,
        seconds_by_stage=stages,
        parameters=max(phase["parameters"] for phase in finished.shown["plan"]["phases"]),
        secure_aggregation=True,
        adapter=folder / "adapter",
        notes=NOTES,
    )


NOTES = (
    "Alone, a hospital spends the whole budget on the head, at the best of three learning rates chosen on validation "
    "rows; the held-out rows were read once.",
    "A hospital's ledger counts what was released; the plan also reserved two retries, which no round needed.",
)


def as_rounds(plan: RunPlan, finished: Finished, committed: Sequence[Mapping[str, Any]]) -> Iterator[reports.Round]:
    """Each round with its accuracy, the epsilon spent up to it, and its traffic per site."""
    phases = finished.shown["plan"]["phases"]
    multipliers = [accounted_multiplier(each["noise_multiplier"], each["parameters"]) for each in phases]
    released = [0] * len(phases)
    for round_plan, attempt, score in zip(schedule(plan), committed, finished.scores, strict=True):
        settings = round_plan.settings
        released[round_plan.phase] += settings.steps or 0
        spent = [
            GaussianSteps(multiplier, phase.sampling_rate or 1.0, steps)
            for multiplier, phase, steps in zip(multipliers, plan.phase, released, strict=True)
            if steps
        ]
        yield reports.Round(
            number=round_plan.index + 1,
            phase=settings.train,
            accuracy=score["accuracy"],
            epsilon=epsilon(spent, plan.privacy.delta or 0.0),
            bytes_up=attempt["bytes_up"] // len(attempt["cohort"]),
            bytes_down=attempt["bytes_down"] // len(attempt["cohort"]),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Three hospitals and a coordinator on this machine, on real data.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="emptied first (default: demo)")
    parser.add_argument("--small", action="store_true", help="the head phase on fewer rows: about two minutes")
    arguments = parser.parse_args()
    try:
        report = demo(arguments.folder.absolute(), SMALL if arguments.small else FULL)
    except FoedusError as error:
        console.print(f"demo: {error}", style="red", markup=False)
        return 1
    reports.write_json(report, arguments.folder / "report.json")
    write_page(report, arguments.folder / "report.html")
    reports.show(report, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
