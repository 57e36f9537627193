"""A report as one page for a browser: a single file, no script, nothing fetched, fit for print.

Light and dark follow the reader's system; print is always light. Every chart has axes that begin at zero, and a table
of the same figures stands at the end of the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from foedus_server.release.evaluation import Example
from foedus_simulations import charts
from foedus_simulations.charts import Level, Mark, Series
from foedus_simulations.reports import Report, duration, percent, size, spent, tiny

WIDE, HALF = 760, 370
UNBROKEN = "\N{NO-BREAK SPACE}"
STYLE = Path(__file__).with_name("report.css")


def write_page(report: Report, path: Path) -> None:
    """`report.html`: one self-contained file."""
    path.write_text(page(report), encoding="utf-8")


def page(report: Report) -> str:
    """The HTML document."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{chr(10).join(_parts(report))}
</main>
</body>
</html>
"""


def _parts(report: Report) -> Iterator[str]:
    yield _opening(report)
    yield _by_round(report)
    if report.alone or report.accuracy_central is not None:
        yield _comparison(report)
    yield f'<div class="pair">\n<div>{_privacy(report)}</div>\n<div>{_traffic(report)}</div>\n</div>'
    yield _time(report)
    if report.examples:
        yield _examples(report)
    yield _reading(report)
    yield _table(report)
    yield _footer(report)


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _section(heading: str, svg: str, caption: str, style: str = "") -> str:
    return (
        f'<h2>{escape(heading)}</h2>\n<figure class="{style}"><div class="scroll">{svg}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


# The opening


def _opening(report: Report) -> str:
    together = percent(report.accuracy_together)
    lead = [
        f"Together, the {len(report.sites)} {report.noun.many} name the right one of {report.labels} labels for "
        f"{together} of {report.rows_held_out:,} rows that none of them trained on."
    ]
    if report.alone:
        alike = "at the same privacy" if report.private else "likewise without differential privacy"
        lead.append(f"Alone, {alike}, they reach {percent(min(report.alone))} to {percent(max(report.alone))}.")
    if report.kind == "simulation":
        lead.append("All of it was simulated on one machine, through the round code of production.")
    else:
        lead.append(f"No row left a {report.noun.one}.")
    lead.append(
        f"The coordinator saw only sums over all of them, never one {report.noun.one}'s update."
        if report.secure_aggregation
        else f"Secure aggregation was off: the coordinator saw each {report.noun.one}'s update."
    )
    if not report.private:
        lead.append("There was no differential privacy: the adapter may reveal rows that it was trained on.")
    figures = "".join(
        f'<div class="{style}"><dt>{escape(words)}</dt><dd>{escape(value)}</dd></div>'
        for value, words, style in _key_figures(report)
    )
    return f"""<p class="kicker">Foedus {report.kind} report</p>
<h1>{escape(report.title)}</h1>
<p class="lead">{escape(" ".join(lead))}</p>
<dl class="figures">{figures}</dl>"""


def _key_figures(report: Report) -> Iterator[tuple[str, str, str]]:
    """(value, words, style) of the figures that stand at the top."""
    error = _points(report.standard_error(report.accuracy_together))
    yield percent(report.accuracy_together), f"right together, ±{UNBROKEN}{error} points", "main"
    if report.mean_alone is not None:
        yield percent(report.mean_alone), "right alone, on average", ""
    if report.delta is None:
        yield "ε none", "no differential privacy", "warning"
    else:
        local = ("local", max(site.epsilon or 0.0 for site in report.sites))
        central = ("central", max(site.epsilon_central or 0.0 for site in report.sites))
        (view, most), (other, also) = (central, local) if report.bound_by_central else (local, central)
        budget = f"budget {report.epsilon_budget:g}, δ{UNBROKEN}{tiny(report.delta)}"
        yield f"ε {most:.2f}", f"{view}, per {report.unit}, at most; {also:.2f} {other}; {budget}", ""
    yield duration(report.seconds_total), f"in all, {len(report.rounds)} rounds", ""


# The charts


def _by_round(report: Report) -> str:
    accuracies = [played.accuracy for played in report.rounds]
    together = Series("together", accuracies, "together", [report.standard_error(share) for share in accuracies])
    levels = [Level(name, accuracy, "alone") for name, _, accuracy in report.shown_alone]
    if report.accuracy_central is not None:
        levels.append(Level("central", report.accuracy_central, "central"))
    levels.append(Level("commonest label", report.commonest, "guess"))
    svg = charts.lines(
        f"Accuracy together by round, ending at {percent(accuracies[-1])}",
        [together],
        levels,
        report.phases,
        width=WIDE,
        height=360,
        room=140,
        unit="right on held-out rows",
        form=_whole_percent,
    )
    caption = ["Solid: the shared adapter after each round, with a band of one standard error."]
    if report.alone:
        caption.append(f"Dashed: where each {report.noun.one}'s own adapter ended.")
    if report.accuracy_central is not None:
        caption.append("Central: where one adapter ended that had all rows in one place.")
    if any(played.phase == "adapter" for played in report.rounds):
        caption.append("Head rounds train the classifier; adapter rounds train it and the encoder's adapter.")
    return _section("What the rounds brought", svg, " ".join(caption), "wide")


def _comparison(report: Report) -> str:
    def mark(name: str, detail: str, accuracy: float, style: str) -> Mark:
        error = report.standard_error(accuracy)
        return Mark(name, detail, accuracy, f"{_points(accuracy)} ± {_points(error)}", style, error)

    rows = f"{sum(site.rows for site in report.sites):,} rows"
    marks = [mark("together", rows, report.accuracy_together, "together")]
    marks += [mark(name, detail, accuracy, "alone") for name, detail, accuracy in report.shown_alone]
    if report.accuracy_central is not None:
        marks.append(mark("central", "all in one place", report.accuracy_central, "central"))
    svg = charts.dots(
        "Accuracy together, of each alone and of all rows in one place, with one standard error",
        marks,
        width=WIDE,
        label_room=215,
        unit="right on held-out rows",
        form=_whole_percent,
    )
    alike = "All at the same ε and δ" if report.private else "All without differential privacy"
    caption = f"{alike}, on the same {report.rows_held_out:,} rows, ± one standard error. {report.compared}"
    return _section(_gain(report), svg, caption, "wide")


def _gain(report: Report) -> str:
    if report.mean_alone is None:
        return "Together and in one place"
    gain = 100 * (report.accuracy_together - report.mean_alone)
    return f"Together is {abs(gain):.1f} points {'above' if gain >= 0 else 'below'} the mean of alone"


def _privacy(report: Report) -> str:
    heading = "What it cost in privacy"
    if report.epsilon_budget is None:
        released = max(site.releases_without_privacy for site in report.sites)
        return (
            f"<h2>{heading}</h2>\n<p>No differential privacy, so there is no ε to count: the plan turned it off, and "
            f"each {escape(report.noun.one)}'s own policy let it. Each ledger holds {released} releases without "
            "privacy. Only the secure sums stood between an update and the coordinator.</p>"
        )
    local = Series("local", [played.epsilon or 0.0 for played in report.rounds], "plain")
    central = Series("central", [played.epsilon_central or 0.0 for played in report.rounds], "central")
    drawn = [central] if report.bound_by_central else [local, central] if report.central_is_smaller else [local]
    svg = charts.lines(
        f"Epsilon spent by round, ending at {drawn[0].values[-1]:.2f} of {report.epsilon_budget:g}",
        drawn,
        [Level("budget", report.epsilon_budget, "budget")],
        report.phases,
        width=HALF,
        height=270,
        room=54,
        unit=f"ε per {report.unit}, at any one {report.noun.one}",
        form="{:g}".format,
    )
    caption = (
        f"Central, while secure sums hold: {report.spent_centrally}. Local, by each {report.noun.one}'s own noise, "
        f"even if everybody else colludes: {report.spent_locally}. {report.about_epsilons}"
    )
    return _section(heading, svg, caption)


def _traffic(report: Report) -> str:
    svg = charts.columns(
        f"Bytes per {report.noun.one} and round, {size(report.mean_bytes_up)} up on average",
        [
            Series("up", [float(played.bytes_up) for played in report.rounds], "plain"),
            Series("down", [float(played.bytes_down) for played in report.rounds], "down"),
        ],
        report.phases,
        width=HALF,
        height=270,
        unit=f"per {report.noun.one} and round",
        form=size,
    )
    caption = f"{report.parameters:,} numbers are trained. Up: masked vectors. Down: the adapter of the round."
    return _section("What travelled", svg, caption)


def _time(report: Report) -> str:
    rest = report.seconds_total - sum(report.seconds_by_stage.values())
    stages = {**report.seconds_by_stage, **({"all else": rest} if rest >= 1 else {})}
    marks = [
        Mark(stage, "", seconds, f"{duration(seconds)}  ({seconds / report.seconds_total:.0%})", "plain")
        for stage, seconds in stages.items()
    ]
    svg = charts.bars("Seconds by stage", marks, width=WIDE, label_room=200)
    caption = f"{duration(report.seconds_total)} in all, with every party on one machine."
    return _section("Where the time went", svg, caption, "wide")


# Words and tables


def _examples(report: Report) -> str:
    def row(example: Example) -> str:
        right = example.predicted == example.label
        said = f"{escape(example.predicted)}{UNBROKEN}{'✓' if right else '✗'}"
        return (
            f"<tr><td>{escape(example.text)}</td><td>{escape(example.label)}</td>"
            f'<td class="{"right" if right else "wrong"}">{said}</td>'
            f'<td class="number">{example.probability:.0%}</td></tr>'
        )

    heads = '<tr><th>held-out row</th><th>is</th><th>the adapter says</th><th class="number">probability</th></tr>'
    rows = "".join(map(row, report.examples))
    table = f'<div class="scroll"><table>{heads}{rows}</table></div>'
    return f"<h2>{len(report.examples)} rows, and what it says</h2>\n{table}"


def _reading(report: Report) -> str:
    sentences = [
        report.data,
        "A standard error counts the held-out rows as independent. Rows that resemble one another are not, so another "
        "choice of rows could move every accuracy by more than that.",
        "Commonest label: what always saying the held-out rows' commonest label would reach.",
    ]
    if report.private:
        sentences.append(
            f"ε {report.epsilon_budget:g} bounds how much more likely any outcome can become because one "
            f"{report.unit} took part; smaller is safer. It is the "
            f"{'central' if report.bound_by_central else 'local'} one. The local figure counts only a "
            f"{report.noun.one}'s own noise, the central one also that of others in the secure sum, where that can be "
            "claimed."
        )
    items = "".join(f"<li>{escape(words)}</li>" for words in (*sentences, *report.notes))
    return f"<h2>How to read this</h2>\n<ul>{items}</ul>"


def _table(report: Report) -> str:
    heads = ("round", "trains", "right", "± 1 s.e.", "ε central", "ε local", "up", "down")
    rows: list[Sequence[str]] = [
        (
            str(played.number),
            played.phase,
            percent(played.accuracy),
            _points(report.standard_error(played.accuracy)),
            spent(played.epsilon_central),
            spent(played.epsilon),
            size(played.bytes_up),
            size(played.bytes_down),
        )
        for played in report.rounds
    ]
    head = "".join(f'<th class="number">{words}</th>' for words in heads)
    body = "".join("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f'<h2>The figures by round</h2>\n<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _footer(report: Report) -> str:
    secure = "on" if report.secure_aggregation else "OFF"
    adapter = "" if report.adapter is None else f" Adapter in {escape(str(report.adapter))}."
    return f"<footer>Base model {escape(report.model)}. Secure aggregation {secure}.{adapter}</footer>"
