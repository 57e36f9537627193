"""The demonstration's figures as one page for a browser: a single file, no script, nothing fetched, fit for print.

Light and dark follow the reader's system; print is always light. Every chart has axes that begin at zero, and a table
of the same figures at the end of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from foedus_simulations import charts
from foedus_simulations.charts import Level, Mark, Series
from foedus_simulations.reports import DemoReport, duration, listed, mean_bytes_up, percent, size, tiny

WIDE, HALF = 760, 370

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfcfa; --ink: #22211f; --quiet: #6f6b64; --rule: #e4e0d8; --faint: #f4f1eb;
  --together: #1d5c96; --alone: #a5673f; --budget: #8c2f39; --plain: #57534c; --down: #bdb7ab; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #171716; --ink: #e9e6e0; --quiet: #a09b92; --rule: #36342f; --faint: #201f1d;
  --together: #7db4e6; --alone: #d9a27c; --budget: #e58a93; --plain: #c3beb4; --down: #6d685f; } }
@media print { :root { color-scheme: light;
  --paper: #fff; --ink: #000; --quiet: #555; --rule: #ddd; --faint: #fff;
  --together: #1d5c96; --alone: #a5673f; --budget: #8c2f39; --plain: #57534c; --down: #bdb7ab; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-print-color-adjust: exact;
  print-color-adjust: exact; font: 17px/1.55 Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; }
main { max-width: 50rem; margin: 0 auto; padding: 3.5rem 1.25rem 4rem; }
.kicker, figcaption, table, svg, .figures, footer {
  font-family: ui-sans-serif, system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Liberation Sans", sans-serif; }
.kicker { margin: 0 0 .75rem; font-size: .8rem; letter-spacing: .04em; color: var(--quiet); }
h1 { margin: 0 0 1rem; font-size: 2.1rem; line-height: 1.18; font-weight: 600; letter-spacing: -.01em;
  text-wrap: balance; }
h2 { margin: 3rem 0 .25rem; font-size: 1.25rem; line-height: 1.3; font-weight: 600; text-wrap: balance; }
p { margin: .4rem 0 0; max-width: 42rem; }
.lead { font-size: 1.12rem; }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); margin: 2.25rem 0 0; padding: 0;
  border-block: 1px solid var(--rule); }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; padding: 1rem 1rem 1rem 0; }
.figures dt { font-size: .8rem; color: var(--quiet); line-height: 1.35; }
.figures dd { margin: 0 0 .2rem; font-size: 1.55rem; font-weight: 600; letter-spacing: -.01em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.figures .main dd { color: var(--together); }
figure { margin: 1.25rem 0 0; overflow-x: auto; }
figcaption { margin-top: .5rem; font-size: .82rem; line-height: 1.45; color: var(--quiet); max-width: 42rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.25rem; }
svg { display: block; width: 100%; height: auto; }
.wide svg { min-width: 36rem; }
text { font-size: 12.5px; fill: var(--ink); font-variant-numeric: tabular-nums; }
.unit, .tick, .detail { fill: var(--quiet); }
.value { font-weight: 600; }
.grid { stroke: var(--rule); } .axis { stroke: var(--quiet); } .border { stroke: var(--quiet); stroke-dasharray: 1 3; }
.stem { stroke: var(--rule); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .level { stroke-width: 1.25; stroke-dasharray: 5 4; }
.error { fill: none; stroke-width: 1.5; }
.line.together, .level.together, .error.together { stroke: var(--together); }
.line.plain { stroke: var(--plain); }
.level.alone, .error.alone { stroke: var(--alone); } .level.budget { stroke: var(--budget); }
.level.guess { stroke: var(--quiet); stroke-dasharray: 1 3; }
.band { fill: var(--together); opacity: .16; }
.dot.together, .column.together { fill: var(--together); } .dot.alone { fill: var(--alone); }
.dot.plain, .column.plain { fill: var(--plain); } .column.down { fill: var(--down); }
.name.together, .value.together { fill: var(--together); font-weight: 600; } .name.alone { fill: var(--alone); }
.name.budget { fill: var(--budget); } .name.guess { fill: var(--quiet); }
table { width: 100%; margin-top: 1rem; border-collapse: collapse; font-size: .86rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 400; color: var(--quiet); }
th, td { padding: .45rem 1rem .45rem 0; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
.number { text-align: right; }
.right { color: var(--together); } .wrong { color: var(--budget); }
ul { margin: .6rem 0 0; padding-left: 1.15rem; max-width: 42rem; } li { margin: .3rem 0; }
footer { margin-top: 2.5rem; padding-top: .9rem; border-top: 1px solid var(--rule); font-size: .8rem;
  color: var(--quiet); overflow-wrap: anywhere; }
@media (max-width: 40rem) { main { padding-top: 2rem; } h1 { font-size: 1.65rem; }
  .figures { grid-template-columns: 1fr 1fr; } .pair { grid-template-columns: 1fr; } .pair svg { max-width: 24rem; } }
@media print { @page { margin: 16mm; } body { font-size: 10.5pt; } main { padding: 0; max-width: none; }
  table { font-size: 8.5pt; } th, td { padding-block: .2rem; }
  figure, tr, .pair > div { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def write_page(report: DemoReport, path: Path) -> None:
    """`report.html`: one self-contained file."""
    path.write_text(page(report), encoding="utf-8")


def page(report: DemoReport) -> str:
    """The HTML document."""
    body = "\n".join(
        (
            _opening(report),
            _by_round(report),
            _comparison(report),
            _privacy_and_traffic(report),
            _time(report),
            _examples(report),
            _reading(report),
            _table(report),
            _footer(report),
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _whole_percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _opening(report: DemoReport) -> str:
    alone = [hospital.accuracy_alone for hospital in report.hospitals]
    together, hospitals = percent(report.accuracy_together), len(report.hospitals)
    spent = max(hospital.epsilon for hospital in report.hospitals)
    secure = (
        "The coordinator saw only sums over all of them, never one hospital's update."
        if report.secure_aggregation
        else "Secure aggregation was off: the coordinator saw each hospital's update."
    )
    facts = (
        (together, f"right together, ± {_points(report.standard_error(report.accuracy_together))} points", "main"),
        (percent(report.mean_alone), "right alone, on average", ""),
        (f"ε {spent:.2f}", f"spent per record at most; budget {report.epsilon_budget:g}, δ {tiny(report.delta)}", ""),
        (duration(report.seconds_total), f"in all, {len(report.rounds)} rounds", ""),
    )
    figures = "".join(
        f'<div class="{style}"><dt>{escape(words)}</dt><dd>{escape(value)}</dd></div>' for value, words, style in facts
    )
    return f"""<p class="kicker">Foedus demonstration report</p>
<h1>{escape(report.title)}</h1>
<p class="lead">Together, the {hospitals} hospitals name the right one of {report.labels} labels for {together} of
{report.rows_held_out:,} rows that none of them trained on. Alone, at the same privacy, they reach
{percent(min(alone))} to {percent(max(alone))}. No row left a hospital. {secure}</p>
<dl class="figures">{figures}</dl>"""


def _figure(svg: str, caption: str, style: str = "") -> str:
    return f'<figure class="{style}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def _by_round(report: DemoReport) -> str:
    accuracies = [played.accuracy for played in report.rounds]
    together = Series("together", accuracies, "together", [report.standard_error(share) for share in accuracies])
    levels = [Level(f"{h.name} alone", h.accuracy_alone, "alone") for h in report.hospitals]
    levels.append(Level("guessing", 1 / report.labels, "guess"))
    svg = charts.lines(
        f"Accuracy together by round, ending at {percent(accuracies[-1])}, above each hospital alone",
        [together],
        levels,
        report.phases,
        width=WIDE,
        height=360,
        room=140,
        unit="right on held-out rows",
        form=_whole_percent,
    )
    caption = (
        "Solid: the shared adapter after each round, with a band of one standard error. Dashed: what each hospital's "
        "own adapter ended at. Head rounds train the classifier; adapter rounds train it and the encoder's adapter."
    )
    return f"<h2>What the rounds brought</h2>\n{_figure(svg, caption, 'wide')}"


def _comparison(report: DemoReport) -> str:
    def mark(name: str, detail: str, accuracy: float, style: str) -> Mark:
        error = report.standard_error(accuracy)
        return Mark(name, detail, accuracy, f"{_points(accuracy)} ± {_points(error)}", style, error)

    rows = sum(hospital.rows for hospital in report.hospitals)
    marks = [mark("together", f"{rows:,} rows", report.accuracy_together, "together")]
    marks += [mark(h.name, f"alone, {h.rows:,} rows", h.accuracy_alone, "alone") for h in report.hospitals]
    svg = charts.dots(
        "Accuracy together and of each hospital alone, with one standard error",
        marks,
        width=WIDE,
        label_room=215,
        unit="right on held-out rows",
        form=_whole_percent,
    )
    gain = 100 * (report.accuracy_together - report.mean_alone)
    caption = (
        f"All at the same ε and δ, on the same {report.rows_held_out:,} rows, ± one standard error. A hospital alone "
        "trains on its own rows only, with the best of three learning rates on validation rows; it is simulated and "
        "charged to nobody's budget."
    )
    direction = "above" if gain >= 0 else "below"
    heading = f"Together is {abs(gain):.1f} points {direction} the mean of alone"
    return f"<h2>{heading}</h2>\n{_figure(svg, caption, 'wide')}"


def _privacy_and_traffic(report: DemoReport) -> str:
    spent = Series("spent", [played.epsilon for played in report.rounds], "plain")
    privacy = charts.lines(
        f"Epsilon spent by round, ending at {report.rounds[-1].epsilon:.2f} of {report.epsilon_budget:g}",
        [spent],
        [Level("budget", report.epsilon_budget, "budget")],
        report.phases,
        width=HALF,
        height=270,
        room=54,
        unit="ε per record, at any one hospital",
        form="{:g}".format,
    )
    ledgers = listed([f"{hospital.name} {hospital.epsilon:.2f}" for hospital in report.hospitals])
    privacy_caption = f"Each hospital's own ledger, at the end: {ledgers}. It holds even if everybody else colludes."
    up = Series("up", [float(played.bytes_up) for played in report.rounds], "plain")
    down = Series("down", [float(played.bytes_down) for played in report.rounds], "down")
    traffic = charts.columns(
        f"Bytes per site and round, {size(mean_bytes_up(report))} up on average",
        [up, down],
        report.phases,
        width=HALF,
        height=270,
        unit="per site and round",
        form=size,
    )
    traffic_caption = f"{report.parameters:,} numbers are trained. Up: masked vectors. Down: the adapter of the round."
    return f"""<div class="pair">
<div><h2>What it cost in privacy</h2>
{_figure(privacy, privacy_caption)}</div>
<div><h2>What travelled</h2>
{_figure(traffic, traffic_caption)}</div>
</div>"""


def _time(report: DemoReport) -> str:
    marks = [
        Mark(stage, "", seconds, f"{duration(seconds)}  ({seconds / report.seconds_total:.0%})", "plain")
        for stage, seconds in report.seconds_by_stage.items()
    ]
    svg = charts.bars("Seconds by stage", marks, width=WIDE, label_room=150)
    caption = f"{duration(report.seconds_total)} in all, with every party on one machine."
    return f"<h2>Where the time went</h2>\n{_figure(svg, caption, 'wide')}"


def _examples(report: DemoReport) -> str:
    rows = "".join(
        f"<tr><td>{escape(example.text)}</td><td>{escape(example.label)}</td>"
        f'<td class="{"right" if example.predicted == example.label else "wrong"}">'
        f"{escape(example.predicted)}\N{NO-BREAK SPACE}{'✓' if example.predicted == example.label else '✗'}</td>"
        f'<td class="number">{example.probability:.0%}</td></tr>'
        for example in report.examples
    )
    heads = '<tr><th>held-out row</th><th>is</th><th>the adapter says</th><th class="number">probability</th></tr>'
    return f"<h2>{len(report.examples)} rows, and what it says</h2>\n<table>{heads}{rows}</table>"


def _reading(report: DemoReport) -> str:
    sentences: Iterable[str] = (
        report.data,
        "A standard error counts the held-out rows as independent. Rows of one category resemble one another, so "
        "another choice of categories could move every accuracy by more than that.",
        f"ε {report.epsilon_budget:g} bounds how much more likely any outcome can become because one record was used; "
        "smaller is safer. It is the local figure: it counts only a hospital's own noise.",
        *report.notes,
    )
    return "<h2>How to read this</h2>\n<ul>" + "".join(f"<li>{escape(words)}</li>" for words in sentences) + "</ul>"


def _table(report: DemoReport) -> str:
    heads = ("round", "trains", "right", "± 1 s.e.", "ε so far", "up", "down")
    rows: list[Sequence[str]] = [
        (
            str(played.number),
            played.phase,
            percent(played.accuracy),
            _points(report.standard_error(played.accuracy)),
            f"{played.epsilon:.2f}",
            size(played.bytes_up),
            size(played.bytes_down),
        )
        for played in report.rounds
    ]
    head = "".join(f'<th class="number">{words}</th>' for words in heads)
    body = "".join("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>" for row in rows)
    return f"<h2>The figures by round</h2>\n<table><tr>{head}</tr>{body}</table>"


def _footer(report: DemoReport) -> str:
    secure = "on" if report.secure_aggregation else "OFF"
    return (
        f"<footer>Base model {escape(report.model)}. Secure aggregation {secure}. "
        f"Adapter in {escape(str(report.adapter))}.</footer>"
    )
