"""Four small charts as SVG text: lines by round, columns by round, and rows of dots or bars.

Only shapes and class names are made here; colours, fonts and dark mode come from the style sheet of the page that the
SVG is pasted into. Every label is escaped. Nothing here knows what the numbers are about.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line: a value per round; `errors` (same length) draw a band around it. `name` stands at its end."""

    name: str
    values: Sequence[float]
    style: str
    errors: Sequence[float] = ()


@dataclass(frozen=True)
class Level:
    """A horizontal line at a value that belongs to no round."""

    name: str
    value: float
    style: str


@dataclass(frozen=True)
class Mark:
    """One row of a dot or bar chart: its name, a detail beside it, and what is written at its value."""

    name: str
    detail: str
    value: float
    words: str
    style: str
    error: float = 0.0


@dataclass(frozen=True)
class Scale:
    """Values from 0 to `high` onto pixels from `start` to `end`."""

    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (self.end - self.start) * value / self.high, 1)


def ticks(high: float, about: int = 4) -> list[float]:
    """Round numbers from 0 to the first at or above `high`: steps of 1, 2, 2.5 or 5 times a power of ten."""
    rough = max(high, 1e-9) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))
    return [step * count for count in range(math.ceil(high / step - 1e-9) + 1)]


def lines(
    alt: str,
    series: Sequence[Series],
    levels: Sequence[Level],
    phases: Sequence[tuple[str, int, int]],
    *,
    width: int,
    height: int,
    room: int,
    unit: str,
    form: Format,
) -> str:
    """Values by round. `room` is the width left of the right edge for the names of lines and levels."""
    rounds = len(series[0].values)
    marks = ticks(max([level.value for level in levels] + [max(line.values) for line in series]))
    x, y = Scale(rounds, 44, width - room), Scale(marks[-1], height - 48, 30)
    body = [*_grid(marks, y, 44, width - room, form, unit), *_rounds(phases, x, y)]
    ends = [(level.value, level.name, level.style) for level in levels]
    for level in levels:
        at = y(level.value)
        body.append(f'<line class="level {level.style}" x1="{x.start}" x2="{x.end}" y1="{at}" y2="{at}"/>')
    for line in series:
        points = [(x(number + 0.5), value) for number, value in enumerate(line.values)]
        if line.errors:
            above = [f"{at},{y(v + e)}" for (at, v), e in zip(points, line.errors, strict=True)]
            below = [f"{at},{y(v - e)}" for (at, v), e in zip(points, line.errors, strict=True)]
            body.append(f'<polygon class="band {line.style}" points="{" ".join([*above, *reversed(below)])}"/>')
        path = " ".join(f"{at},{y(value)}" for at, value in points)
        body.append(f'<polyline class="line {line.style}" points="{path}"/>')
        for number, (at, value) in enumerate(points, start=1):
            tip = f"<title>round {number}: {escape(form(value))}</title>"
            body.append(f'<circle class="dot {line.style}" cx="{at}" cy="{y(value)}" r="2.2">{tip}</circle>')
        ends.append((line.values[-1], line.name, line.style))
    body += [_text(x.end + 8, at + 4, name, f"name {style}") for at, name, style in _apart(ends, y)]
    return _svg(alt, width, height, body)


def columns(
    alt: str,
    series: Sequence[Series],
    phases: Sequence[tuple[str, int, int]],
    *,
    width: int,
    height: int,
    unit: str,
    form: Format,
) -> str:
    """Values by round as columns side by side; the names stand above the plot as a key."""
    rounds = len(series[0].values)
    marks = ticks(max(max(one.values) for one in series))
    x, y = Scale(rounds, 56, width - 8), Scale(marks[-1], height - 48, 52)
    body = [*_grid(marks, y, 56, width - 8, form, unit), *_rounds(phases, x, y)]
    slot = (x.end - x.start) / rounds
    thick = max(1.0, round(slot * 0.8 / len(series), 2))
    for place, one in enumerate(series):
        key = 56 + 110 * place
        body.append(f'<rect class="column {one.style}" x="{key}" y="26" width="9" height="9"/>')
        body.append(_text(key + 14, 35, one.name, "name"))
        for number, value in enumerate(one.values):
            left = round(x(number) + slot * 0.1 + place * thick, 1)
            tip = f"<title>round {number + 1}, {escape(one.name)}: {escape(form(value))}</title>"
            box = f'x="{left}" y="{y(value)}" width="{thick}" height="{round(y.start - y(value), 1)}"'
            body.append(f'<rect class="column {one.style}" {box}>{tip}</rect>')
    return _svg(alt, width, height, body)


def dots(alt: str, marks: Sequence[Mark], *, width: int, label_room: int, unit: str, form: Format) -> str:
    """One dot a row, with its error to both sides."""
    steps = ticks(max(mark.value + mark.error for mark in marks))
    x, height = Scale(steps[-1], label_room, width - 110), 34 * len(marks) + 56
    body = [*_columns_grid(steps, x, 8, height - 44, form, unit)]
    for row, mark in enumerate(marks):
        at = 34 * row + 26
        body += _row_name(mark, at, label_room)
        body.append(f'<line class="stem" x1="{x.start}" x2="{x(mark.value)}" y1="{at}" y2="{at}"/>')
        low, high = x(mark.value - mark.error), x(mark.value + mark.error)
        caps = f"M{low},{at - 5}V{at + 5}M{low},{at}H{high}M{high},{at - 5}V{at + 5}"
        body.append(f'<path class="error {mark.style}" d="{caps}"/>')
        body.append(f'<circle class="dot {mark.style}" cx="{x(mark.value)}" cy="{at}" r="3"/>')
        body.append(_text(high + 10, at + 4, mark.words, f"value {mark.style}"))
    return _svg(alt, width, height, body)


def bars(alt: str, marks: Sequence[Mark], *, width: int, label_room: int) -> str:
    """One bar a row, from 0; the values stand at their ends, so there is no axis."""
    longest = max(mark.value for mark in marks)
    x, height = Scale(longest or 1.0, label_room, width - 130), 30 * len(marks) + 6
    body = [f'<line class="axis" x1="{x.start}" x2="{x.start}" y1="2" y2="{height - 4}"/>']
    for row, mark in enumerate(marks):
        at = 30 * row + 18
        body += _row_name(dataclasses.replace(mark, style=""), at, label_room)
        long = max(0.5, round(x(mark.value) - x.start, 1))
        body.append(f'<rect class="column {mark.style}" x="{x.start}" y="{at - 8}" width="{long}" height="16"/>')
        body.append(_text(x(mark.value) + 8, at + 4, mark.words, "value"))
    return _svg(alt, width, height, body)


def _svg(alt: str, width: int, height: int, body: Sequence[str]) -> str:
    inside = "\n".join(body)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">\n{inside}\n</svg>'


def _text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'


def _grid(marks: Sequence[float], y: Scale, left: float, right: float, form: Format, unit: str) -> list[str]:
    """Horizontal lines with their values at the left, and the unit above them."""
    body = [_text(0, 12, unit, "unit")]
    for mark in marks:
        style = "grid" if mark else "axis"
        body.append(f'<line class="{style}" x1="{left}" x2="{right}" y1="{y(mark)}" y2="{y(mark)}"/>')
        body.append(_text(left - 8, y(mark) + 4, form(mark), "tick", "end"))
    return body


def _columns_grid(marks: Sequence[float], x: Scale, top: float, bottom: float, form: Format, unit: str) -> list[str]:
    """Vertical lines with their values below, and the unit below those."""
    body = [_text(x.start, bottom + 38, unit, "unit")]
    for mark in marks:
        style = "grid" if mark else "axis"
        body.append(f'<line class="{style}" x1="{x(mark)}" x2="{x(mark)}" y1="{top}" y2="{bottom}"/>')
        body.append(_text(x(mark), bottom + 18, form(mark), "tick", "middle"))
    return body


def _rounds(phases: Sequence[tuple[str, int, int]], x: Scale, y: Scale) -> list[str]:
    """Below the plot: each phase's name and first round, a line where a phase begins, and the last round of all."""
    body = []
    for phase, first, last in phases:
        left, right = x(first - 1), x(last)
        if first > 1:
            body.append(f'<line class="border" x1="{left}" x2="{left}" y1="{y.end}" y2="{y.start + 38}"/>')
        if last == x.high > first:
            body.append(_text(x(last - 0.5), y.start + 17, str(last), "tick", "middle"))
        body.append(_text(x(first - 0.5), y.start + 17, str(first), "tick", "middle"))
        body.append(_text((left + right) / 2, y.start + 35, f"{phase} rounds", "unit", "middle"))
    return body


def _apart(ends: Sequence[tuple[float, str, str]], y: Scale, gap: float = 16.0) -> list[tuple[float, str, str]]:
    """Names at the heights of their values, pushed apart to `gap` pixels: down from the top, then up from the axis."""
    ordered = sorted(ends, key=lambda end: -end[0])
    heights = [y(value) for value, _, _ in ordered]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    heights[-1] = min(heights[-1], y.start)
    for place in reversed(range(len(heights) - 1)):
        heights[place] = min(heights[place], heights[place + 1] - gap)
    return [(at, name, style) for at, (_, name, style) in zip(heights, ordered, strict=True)]


def _row_name(mark: Mark, at: float, label_room: int) -> list[str]:
    """The row's name at the left, and its detail, quieter, before the axis."""
    return [
        _text(0, at + 4, mark.name, f"name {mark.style}"),
        _text(label_room - 12, at + 4, mark.detail, "detail", "end"),
    ]
