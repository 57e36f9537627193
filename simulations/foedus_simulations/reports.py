"""What a demonstration found: one record of figures, shown on one screen and written as `report.json`.

Knows figures only. Where they came from (ledgers, stores, simulations) is the business of who fills the record; the
page for a browser is made from the same record by `report_page`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Hospital:
    """One site: what it holds, what it reached without the others, and what its own ledger says it spent."""

    name: str
    rows: int  # for training
    accuracy_alone: float  # same privacy, its own rows only; simulated, charged to nobody
    epsilon: float  # epsilon_local spent over the run, read from its ledger


@dataclass(frozen=True)
class Round:
    """One round of the run, numbered from 1."""

    number: int
    phase: str  # "head" or "adapter"
    accuracy: float  # of the adapter that the round made, on the held-out rows
    epsilon: float  # epsilon_local of everything released up to and with this round, at any one hospital
    bytes_up: int  # per site
    bytes_down: int  # per site


@dataclass(frozen=True)
class Example:
    """A held-out row, what it is, and what the adapter said with which probability."""

    text: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class DemoReport:
    """Everything that is shown. Accuracies are shares of the held-out rows, all of the same rows."""

    title: str
    data: str  # one sentence: what the rows are, and what they are not
    model: str
    labels: int
    rows_held_out: int
    hospitals: tuple[Hospital, ...]
    rounds: tuple[Round, ...]
    accuracy_together: float  # of the adapter that the run ended with
    examples: tuple[Example, ...]
    epsilon_budget: float
    delta: float
    seconds_total: float
    seconds_by_stage: Mapping[str, float]
    parameters: int  # numbers trained
    secure_aggregation: bool
    adapter: Path
    notes: tuple[str, ...] = ()  # sentences that a reader must know before believing the figures

    @property
    def mean_alone(self) -> float:
        return sum(hospital.accuracy_alone for hospital in self.hospitals) / len(self.hospitals)

    def standard_error(self, accuracy: float) -> float:
        """Of an accuracy measured on the held-out rows, were they independent (binomial)."""
        return math.sqrt(accuracy * (1 - accuracy) / self.rows_held_out)

    @property
    def phases(self) -> tuple[tuple[str, int, int], ...]:
        """(name, first round, last round) of every stretch of rounds that train the same part."""
        found: list[tuple[str, int, int]] = []
        for played in self.rounds:
            if found and found[-1][0] == played.phase:
                found[-1] = (played.phase, found[-1][1], played.number)
            else:
                found.append((played.phase, played.number, played.number))
        return tuple(found)


def write_json(report: DemoReport, path: Path) -> None:
    """`report.json`: the figures that other programs compare. Bytes up are the mean over the rounds."""
    figures = {
        "accuracy_together": report.accuracy_together,
        "accuracy_alone": [hospital.accuracy_alone for hospital in report.hospitals],
        "epsilon_local": [hospital.epsilon for hospital in report.hospitals],
        "delta": report.delta,
        "rounds": len(report.rounds),
        "seconds_total": report.seconds_total,
        "seconds_by_stage": dict(report.seconds_by_stage),
        "bytes_up_per_site_per_round": round(mean_bytes_up(report)),
        "parameters": report.parameters,
        "secure_aggregation": report.secure_aggregation,
        "adapter": str(report.adapter),
    }
    path.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def mean_bytes_up(report: DemoReport) -> float:
    return sum(played.bytes_up for played in report.rounds) / len(report.rounds)


def size(count: float) -> str:
    """Bytes for a person, to three digits: 20.6 kB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Seconds for a person: 0.42 s, 41 s, 3 min 05 s."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"


def tiny(probability: float) -> str:
    """A probability such as delta: 1e-5."""
    return f"{probability:.0e}".replace("e-0", "e-")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


# The screen


def show(report: DemoReport, console: Console) -> None:
    """The final screen. Colour only repeats what the words say, so it reads the same where there is none."""
    rule = console.is_terminal
    console.print()
    console.print(Text(report.title, style="bold"))
    console.print(Text(report.data, style="dim"))
    console.print()
    _heading(console, f"Accuracy by round, on {report.rows_held_out:,} held-out rows", rule)
    for line in plot(report):
        console.print(line, no_wrap=True)
    console.print()
    _heading(console, "Together against alone, at the same privacy (± 1 standard error)", rule)
    console.print(Padding(_comparison(report), _INDENT))
    alone = "alone: its own rows only, same epsilon and delta, the best of three rates on validation rows; simulated"
    console.print(Padding(Text(alone, style="dim"), _INDENT))
    gain = 100 * (report.accuracy_together - report.mean_alone)
    console.print(f"  Together is {abs(gain):.1f} points {'above' if gain >= 0 else 'BELOW'} the mean of alone.")
    console.print()
    _heading(console, "Privacy, traffic and time", rule)
    console.print(Padding(_facts(report), _INDENT))
    console.print()
    _heading(console, f"{len(report.examples)} held-out rows and what the adapter says", rule)
    console.print(Padding(_examples(report), _INDENT))
    for note in report.notes:
        console.print(Text(f"Note: {note}", style="dim"))


def _heading(console: Console, words: str, colour: bool) -> None:
    console.print(Text(words, style="bold cyan" if colour else ""))


_EIGHTHS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"head": "blue", "adapter": "green"}
_INDENT = (0, 0, 0, 2)


def bar(share: float, width: int) -> str:
    """A horizontal bar of `share` (0 to 1) of `width` characters, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def plot(report: DemoReport) -> list[Text]:
    """Accuracy by round as columns over an axis that begins at 0, ten points to a line, and the phases' names below."""
    height = math.ceil(10 * max(played.accuracy for played in report.rounds))
    width = max(1, 60 // len(report.rounds))
    lines = []
    for level in reversed(range(height)):
        line = Text(f"  {10 * (level + 1):3} % ┤" if level % 2 else "        │")
        for played in report.rounds:
            eighths = round(8 * (10 * played.accuracy - level))
            line.append(_EIGHTHS[min(max(eighths, 0), 8)] * width, style=_COLOURS.get(played.phase, ""))
        lines.append(line)
    lines.append(Text("    0 % └" + "─" * (width * len(report.rounds))))
    names = Text(" " * 9)
    for phase, first, last in report.phases:
        words, room = f"{phase} {first}-{last}", width * (last - first + 1)
        names.append(words[:room].ljust(room), style=_COLOURS.get(phase, ""))
    return [*lines, names]


def _comparison(report: DemoReport) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    rows = [("together", f"{len(report.hospitals)} hospitals", report.accuracy_together, "green")]
    rows += [(f"{h.name} alone", f"{h.rows:,} rows", h.accuracy_alone, "") for h in report.hospitals]
    for name, held, accuracy, style in rows:
        error = 100 * report.standard_error(accuracy)
        table.add_row(
            Text(f"{name}", style="bold" if style else ""),
            Text(held, style="dim"),
            Text(f"{percent(accuracy)} ± {error:.1f}"),
            Text(bar(accuracy, 30), style=style),
        )
    return table


def _facts(report: DemoReport) -> Table:
    ledgers = ", ".join(f"{hospital.name} {hospital.epsilon:.2f}" for hospital in report.hospitals)
    up, down = sum(played.bytes_up for played in report.rounds), sum(played.bytes_down for played in report.rounds)
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds_by_stage.items())
    secure = "on" if report.secure_aggregation else "OFF"
    facts = {
        "epsilon spent": f"{ledgers}  (each hospital's own ledger; budget {report.epsilon_budget:g})",
        "delta": f"{tiny(report.delta)}  (per record; holds even if everybody else colludes)",
        "secure sums": f"{secure}; {report.parameters:,} trained numbers, {len(report.rounds)} rounds",
        "bytes per site": f"{size(up)} up, {size(down)} down  ({size(mean_bytes_up(report))} up per round)",
        "seconds": f"{duration(report.seconds_total)} in all: {stages}",
        "adapter": str(report.adapter),
    }
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for name, words in facts.items():
        table.add_row(Text(f"{name}", style="dim"), Text(words))
    return table


def _examples(report: DemoReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("row", "is", "said"):
        table.add_column(heading, overflow="fold")
    for example in report.examples:
        right = example.predicted == example.label
        said = f"{example.predicted} ({example.probability:.0%}) {'✓' if right else '✗'}"
        table.add_row(Text(f"{example.text}"), Text(example.label), Text(said, style="green" if right else "red"))
    return table
