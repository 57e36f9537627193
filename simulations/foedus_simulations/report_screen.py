"""A report on one screen of a terminal. Colour only repeats what the words say, so it reads the same without it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foedus_simulations.reports import Report, duration, percent, size, tiny

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_COLOURS = {"head": "blue", "adapter": "green"}
_PLOT_WIDTH = 60
_EXAMPLE_LENGTH = 120  # characters


def show(report: Report, console: Console) -> None:
    """The final screen."""
    console.print()
    console.print(Text(report.title, style="bold"))
    console.print(Text(report.data, style="dim"))
    if not report.private:
        console.print(Text("WITHOUT differential privacy: the adapter may reveal rows that it was trained on."))
    for heading, body in _sections(report):
        console.print()
        console.print(Text(heading, style="bold cyan" if console.is_terminal else ""))
        for part in body:
            console.print(part, no_wrap=isinstance(part, Text))
    for note in report.notes:
        console.print(Text(f"Note: {note}", style="dim"))


def _sections(report: Report) -> Iterator[tuple[str, list[RenderableType]]]:
    yield f"Accuracy by round, on {report.rows_held_out:,} held-out rows", [*plot(report)]
    if report.alone or report.accuracy_central is not None:
        alike = "at the same privacy" if report.private else "all without differential privacy"
        words = Text(report.compared, style="dim")
        parts: list[RenderableType] = [_indented(_comparison(report)), _indented(words), *_gain(report)]
        yield f"Together against alone, {alike} (± 1 standard error)", parts
    yield "Privacy, traffic and time", [_indented(_facts(report))]
    if report.examples:
        yield f"{len(report.examples)} held-out rows and what the adapter says", [_indented(_examples(report))]


def _indented(part: RenderableType) -> Padding:
    return Padding(part, (0, 0, 0, 2))


def bar(share: float, width: int) -> str:
    """A horizontal bar of `share` (0 to 1) of `width` characters, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + (" ▏▎▍▌▋▊▉"[eighths % 8] if eighths % 8 else "")


def plot(report: Report) -> list[Text]:
    """Accuracy by round as columns over an axis that begins at 0, ten points to a line, and the phases' names below.
    Of more rounds than fit, evenly many are left out."""
    rounds = report.rounds[:: -math.ceil(len(report.rounds) / _PLOT_WIDTH)][::-1]
    height, width = math.ceil(10 * max(played.accuracy for played in rounds)), _PLOT_WIDTH // len(rounds)
    lines = []
    for level in reversed(range(height)):
        line = Text(f"  {10 * (level + 1):3} % ┤" if level % 2 else "        │")
        for played in rounds:
            eighths = round(8 * (10 * played.accuracy - level))
            line.append(_EIGHTHS[min(max(eighths, 0), 8)] * width, style=_COLOURS.get(played.phase, ""))
        lines.append(line)
    lines.append(Text("    0 % └" + "─" * (width * len(rounds))))
    names = Text(" " * 9)
    for phase, first, last in report.phases:
        room = width * sum(first <= played.number <= last for played in rounds)
        names.append(f"{phase} {first}-{last}"[:room].ljust(room), style=_COLOURS.get(phase, ""))
    return [*lines, names]


def _comparison(report: Report) -> Table:
    total = sum(site.rows for site in report.sites)
    rows = [("together", f"{len(report.sites)} {report.noun.many}", report.accuracy_together, "green")]
    rows += [(*shown, "") for shown in report.shown_alone]
    if report.accuracy_central is not None:
        rows.append(("central", f"all {total:,} rows", report.accuracy_central, ""))
    table = _table()
    for name, held, accuracy, style in rows:
        error = 100 * report.standard_error(accuracy)
        table.add_row(
            Text(name, style="bold" if style else ""),
            Text(held, style="dim"),
            Text(f"{percent(accuracy)} ± {error:.1f}"),
            Text(bar(accuracy, 30), style=style),
        )
    always = bar(report.commonest, 30)
    table.add_row(Text("commonest"), Text("label, always", style="dim"), Text(percent(report.commonest)), Text(always))
    return table


def _gain(report: Report) -> Iterator[Text]:
    if report.mean_alone is not None:
        gain = 100 * (report.accuracy_together - report.mean_alone)
        yield Text(f"  Together is {abs(gain):.1f} points {'above' if gain >= 0 else 'BELOW'} the mean of alone.")


def _facts(report: Report) -> Table:
    up, down = (sum(getattr(played, way) for played in report.rounds) for way in ("bytes_up", "bytes_down"))
    stages = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in report.seconds_by_stage.items())
    secure = "on" if report.secure_aggregation else "OFF"
    facts = {
        **_privacy(report),
        "secure sums": f"{secure}; {report.parameters:,} trained numbers, {len(report.rounds)} rounds",
        "bytes each": f"{size(up)} up, {size(down)} down  ({size(report.mean_bytes_up)} up per round)",
        "seconds": f"{duration(report.seconds_total)} in all: {stages}",
    }
    if report.adapter is not None:
        facts["adapter"] = str(report.adapter)
    table = _table()
    for name, words in facts.items():
        if words:
            table.add_row(Text(name, style="dim"), Text(words))
    return table


def _privacy(report: Report) -> dict[str, str]:
    if report.delta is None:
        released = max(site.releases_without_privacy for site in report.sites)
        return {"epsilon": f"none: each {report.noun.one}'s ledger counts {released} releases without privacy"}
    budget = f"; budget {report.epsilon_budget:g}"
    of_local, of_central = ("", budget) if report.bound_by_central else (budget, "")
    return {
        "epsilon_local": f"{report.spent_locally}  (own noise only: even if everybody else colludes{of_local})",
        "epsilon_central": f"{report.spent_centrally}  (while secure sums hold{of_central})",
        "": report.about_epsilons,
        "delta": f"{tiny(report.delta)}  (per {report.unit})",
    }


def _examples(report: Report) -> Table:
    table = _table(header=True)
    for heading in ("row", "is", "said"):
        table.add_column(heading, overflow="fold")
    for example in report.examples:
        right = example.predicted == example.label
        said = f"{example.predicted} ({example.probability:.0%}) {'✓' if right else '✗'}"
        text = textwrap.shorten(example.text, _EXAMPLE_LENGTH, placeholder=" …")
        table.add_row(Text(text), Text(example.label), Text(said, style="green" if right else "red"))
    return table


def _table(header: bool = False) -> Table:
    return Table(box=None, pad_edge=False, show_header=header, padding=(0, 2, 0, 0), header_style="dim")
