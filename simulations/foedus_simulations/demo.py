"""`make demo`: three sites and a coordinator, as real processes on this machine, on real data.

Everything a federation does by hand happens here by the same commands: the operator starts, three sites join, each
approves the plan, the run is watched, its adapter exported and evaluated. What a site reaches alone is simulated and
charged to nobody's ledger. The root key stays on this machine: a demonstration only.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_client.config import SETTINGS, SiteHome
from foedus_common.errors import FoedusError, LocalError
from foedus_common.plan import read_plan
from foedus_common.terminal import console
from foedus_server.release.evaluation import Example
from foedus_simulations import corpora, figures, reports
from foedus_simulations.corpora import Corpus, Row
from foedus_simulations.editions import SEED, Edition, edition
from foedus_simulations.parties import OPERATOR, SITE, Party, free_ports, until
from foedus_simulations.partition import partition
from foedus_simulations.report_page import write_page
from foedus_simulations.report_screen import show
from foedus_simulations.stopwatch import Stopwatch

HELD_OUT = Path("data") / "held-out.csv"


@dataclass(frozen=True)
class Finished:
    """What the programs printed about the finished run, as JSON. ledgers: the dataset's account, by site."""

    shown: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]
    ledgers: Mapping[str, Mapping[str, Any]]


def demo(folder: Path, playing: Edition) -> reports.Report:
    """Plays an edition in `folder`, which is emptied first, and returns what came out."""
    watch = Stopwatch()
    clear(folder)
    announce("Fetching the model and the data")
    with watch.stage("set-up"):
        model = corpora.minilm(corpora.default_cache())
        corpus = playing.corpus(corpora.default_cache())
        rows = share_out(playing, corpus)
        for file, part in {HELD_OUT: corpus.held_out, **{data_file(name): rows[name] for name in rows}}.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            corpora.write_csv(folder / file, part, *playing.columns)
    finished = federate(folder, playing, model, corpus, watch)
    announce("Training alone, and on all rows in one place: simulated, charged to nobody")
    with watch.stage("alone and central"):
        compared = train_without_federation(folder / "plan.toml", model, rows, corpus)
    return as_report(folder, playing, corpus, rows, finished, compared, watch)


def announce(sentence: str) -> None:
    console.print(f"[bold]{sentence}[/bold]")


def clear(folder: Path) -> None:
    """Empties the folder of an earlier demonstration. Raises LocalError for a folder that holds anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / HELD_OUT).exists():
        raise LocalError(f"{folder} holds something else than a demonstration and is not emptied; give another one.")
    shutil.rmtree(folder, ignore_errors=True)


def share_out(playing: Edition, corpus: Corpus) -> dict[str, list[Row]]:
    """The training rows, site by site."""
    columns = {"label": [row.label for row in corpus.train]}
    parts = partition(playing.partition, columns, label="label", sites=len(playing.sites), seed=SEED)
    return {name: [corpus.train[index] for index in part] for name, part in zip(playing.sites, parts, strict=True)}


def data_file(site: str) -> Path:
    return Path("data") / f"{site}.csv"


# --- The federation, by its own commands ---


def federate(folder: Path, playing: Edition, model: Path, corpus: Corpus, watch: Stopwatch) -> Finished:
    with ExitStack() as stack:
        operator = stack.enter_context(Party(OPERATOR, folder / "coordinator"))
        sites = {name: stack.enter_context(Party(SITE, folder / name)) for name in playing.sites}
        announce(f"A coordinator starts; {reports.listed(playing.sites)} join")
        with watch.stage("set-up"):
            start_coordinator(operator, playing.federation)
            for name, site in sites.items():
                join(operator, site, name, f"{name} {playing.noun.one}")
            operator.ask("roster", "sign")
            console.print("Demonstration only: the root key that signed the roster lies on this machine.")
            if not playing.private:
                console.print(f"Without privacy: each {playing.noun.one}'s policy gets allow_without_privacy = true.")
            at_once(sites, lambda name, site: open_for_work(site, playing, model, folder / data_file(name)))
        announce(f"The operator submits the plan; each {playing.noun.one} approves it")
        with watch.stage("set-up"):
            fill_in_plan(operator, playing.plan, model, corpus, folder / "plan.toml")
            run = operator.ask("run", "submit", str(folder / "plan.toml"))["run"]
            at_once(sites, lambda name, site: approve(site, run))
        announce(
            f"The run: every round a secure sum of {'noised updates' if playing.private else 'updates, without noise'}"
        )
        with watch.stage("run"):
            if operator.show("run", "watch", run) != 0:
                raise LocalError(f"The run did not finish; see {operator.home / 'coordinator.log'}.")
        announce("Measuring every round's adapter on held-out rows that the consortium owns")
        with watch.stage("evaluation"):
            text, label = playing.columns
            held_out = ("--data", str(folder / HELD_OUT), "--text", text, "--label", label)
            scores = operator.ask("run", "evaluate", run, *held_out, "--every-round")
            operator.ask("run", "export", run, "--to", str(folder / "adapter"))
        shown = operator.ask("run", "show", run)
        ledgers = {name: site.ask("ledger")[0] for name, site in sites.items()}
    return Finished(shown, scores, ledgers)


def start_coordinator(operator: Party, federation: str) -> None:
    link, enrolment = free_ports(2)
    ports = ("--port", str(link), "--enrolment-port", str(enrolment))
    operator.ask("init", "--demonstration", "--federation", federation, *ports)
    operator.start("up", "up", "--json")
    operator.await_line("up", '"ready"')


def join(operator: Party, site: Party, name: str, org: str) -> None:
    """Both people's part: the token is handed over, the fingerprint read aloud and compared."""
    token = operator.ask("site", "invite", name, "--org", org)["token"]
    site.start("join", "join", "-", "--json", secret=token)
    site.await_line("join", '"fingerprint"')
    read_aloud = json.loads(site.log("join").read_text().splitlines()[0])["fingerprint"]
    operator.ask("site", "approve", name, "--fingerprint", read_aloud)


def at_once(sites: Mapping[str, Party], act: Callable[[str, Party], None]) -> None:
    """What every site's administrator does by himself, all of them at the same time."""
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(act, name, site) for name, site in sites.items()]:
            done.result()


def open_for_work(site: Party, playing: Edition, model: Path, data: Path) -> None:
    """The administrator's settings, model and data, once the site is let in; then the daemon runs."""
    site.finish("join")
    settings = SiteHome.open(site.home).settings
    policy = dataclasses.replace(settings.policy, allow_without_privacy=not playing.private)
    changed = dataclasses.replace(settings, threads=1, policy=policy)  # one thread: three sites share these cores
    (site.home / SETTINGS).write_text(changed.to_toml())
    text, label = playing.columns
    site.ask("model", "add", str(model))
    site.ask("data", "add", playing.dataset, str(data), "--column", f"text={text}", "--column", f"label={label}")
    site.start("run", "run")


def fill_in_plan(operator: Party, template: Path, model: Path, corpus: Corpus, to: Path) -> None:
    """The plan as an operator would write it: with the model's hash and the labels."""
    sha256 = operator.ask("model", "add", str(model))["manifest_sha256"]
    text = template.read_text().replace('"MODEL"', json.dumps(sha256))
    to.write_text(text.replace('["LABELS"]', json.dumps(list(corpus.labels), ensure_ascii=False)))


def approve(site: Party, run: str) -> None:
    until(lambda: any(plan["run"] == run for plan in site.ask("plans")), 180, f"{site.home.name}: the plan's arrival")
    site.ask("approve", run)


# --- What came out ---


@dataclass(frozen=True)
class Compared:
    """Accuracies without federation, and how they were had."""

    alone: Mapping[str, float]
    central: float | None
    sentence: str


def train_without_federation(
    plan_file: Path, model: Path, rows: Mapping[str, Sequence[Row]], corpus: Corpus
) -> Compared:
    """Each site alone, and all rows in one place, at the run's privacy. torch is imported here, when every other
    process has ended."""
    from foedus_common.tasks.text_classification import TextClassifier
    from foedus_simulations.alone import RATES, Judges, agree, compare, head_only, pairs

    plan = read_plan(plan_file)
    classifier = TextClassifier.load(model, plan)
    judges = Judges(classifier.encode(pairs(corpus.validation)), classifier.encode(pairs(corpus.held_out)))
    agreed = agree(head_only(plan) if plan.privacy.on else plan, classifier)
    rates = RATES if plan.privacy.on else (1.0,)
    found = compare(classifier, agreed, rows, judges, seed=SEED, rates=rates, say=console.print)
    return Compared(found.alone, found.central, WITH_PRIVACY if plan.privacy.on else WITHOUT_PRIVACY)


WITH_PRIVACY = (
    "Alone: its own rows only, the whole budget spent on the head, and the best of three rates on validation rows. "
    "Central: the same with all rows in one place. Both are simulated and charged to nobody."
)
WITHOUT_PRIVACY = (
    "Alone: the same plan on its own rows only. Central: the same plan with all rows in one place. Both are simulated."
)


def as_report(
    folder: Path,
    playing: Edition,
    corpus: Corpus,
    rows: Mapping[str, Sequence[Row]],
    finished: Finished,
    compared: Compared,
    watch: Stopwatch,
) -> reports.Report:
    plan = read_plan(folder / "plan.toml")
    shown, attempts = finished.shown["plan"], finished.shown["attempts"]
    accuracies = [score["accuracy"] for score in finished.scores]
    played = figures.rounds(plan, shown["phases"], attempts, accuracies)
    central = figures.epsilon_central(shown, played, attempts)
    return reports.Report(
        kind="demonstration",
        title=playing.title,
        data=playing.data,
        model=plan.model.name,
        labels=len(plan.task.labels),
        noun=playing.noun,
        rows_held_out=len(corpus.held_out),
        commonest=figures.share_of_commonest([row.label for row in corpus.held_out]),
        sites=tuple(as_site(central, name, rows, finished, compared) for name in playing.sites),
        rounds=played,
        epsilon_budget=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        seconds_total=watch.total,
        seconds_by_stage=figures.stages(watch.seconds, attempts),
        parameters=max(phase["parameters"] for phase in shown["phases"]),
        secure_aggregation=True,
        accuracy_central=compared.central,
        compared=compared.sentence,
        examples=tuple(Example(**example) for example in finished.scores[-1]["examples"]),
        adapter=from_here(folder / "adapter"),
        notes=tuple(filter(None, notes(playing, figures.retries(plan, attempts)))),
        about_epsilons=shown["about_epsilons"],
    )


def as_site(
    central: float | None, name: str, rows: Mapping[str, Sequence[Row]], finished: Finished, compared: Compared
) -> reports.Site:
    """central: epsilon_central of the run, at every site; None without privacy."""
    ledger = finished.ledgers[name]
    return reports.Site(
        name=name,
        rows=len(rows[name]),
        epsilon=None if central is None else ledger["spent"],
        epsilon_central=central,
        releases_without_privacy=ledger["releases_without_privacy"],
        accuracy_alone=compared.alone[name],
    )


def from_here(path: Path) -> Path:
    """As a person in the current folder would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def notes(playing: Edition, retries: str) -> Iterator[str]:
    yield retries
    if not playing.private:
        yield (
            f"There is no differential privacy in this run: its plan says so, and each {playing.noun.one}'s policy was "
            "set to allow_without_privacy = true for it."
        )
    yield "The root key that signed the roster lay on the same machine: a demonstration only."


def main() -> int:
    parser = argparse.ArgumentParser(description="Three sites and a coordinator on this machine, on real data.")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="emptied first (default: demo)")
    parser.add_argument("--small", action="store_true", help="the head phase on fewer rows: about two minutes")
    parser.add_argument("--privacy", choices=("on", "off"), default="on", help="off: the same without DP")
    parser.add_argument("--data", choices=("icd", "credit"), default="icd", help="hospitals, or bank branches")
    arguments = parser.parse_args()
    try:
        playing = edition(arguments.data, arguments.privacy == "on", arguments.small)
        report = demo(arguments.folder.absolute(), playing)
    except FoedusError as error:
        console.print(f"demo: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    reports.write_json(report, arguments.folder / "report.json")
    write_page(report, arguments.folder / "report.html")
    show(report, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
