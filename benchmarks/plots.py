"""Lines on logarithmic axes as one SVG that stands by itself, in light and in dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM, NAMES = 460, 360, 62, 44, 46, 84
COLOURS = 5


@dataclass(frozen=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]


def log_plot(alt: str, x_unit: str, y_unit: str, panels: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Panels (title, lines) side by side, all on the same axes."""
    points = [point for _, lines in panels for line in lines for point in line.points]
    xs, ys = zip(*points, strict=True)
    (x_low, x_high), (y_low, y_high) = _decades(xs), _decades(ys)

    def x(value: float) -> float:
        return round(LEFT + (WIDTH - LEFT - NAMES) * (math.log10(value) - x_low) / (x_high - x_low), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (math.log10(value) - y_low) / (y_high - y_low), 1)

    body = []
    for number, (title, lines) in enumerate(panels):
        body.append(f'<g transform="translate({number * WIDTH} 0)">')
        body.append(f'<text class="strong" x="{LEFT}" y="24">{escape(title)}</text>')
        for power in range(y_low, y_high + 1):
            at = y(10.0**power)
            body.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - NAMES}" y1="{at}" y2="{at}"/>')
            body.append(
                f'<text class="dim" x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{10.0**power:g} {y_unit}</text>'
            )
        for power in range(x_low, x_high + 1):
            at = x(10.0**power)
            body.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            label = f"{10**power:,}" if power < 6 else f"{10 ** (power - 6):,} M"
            body.append(f'<text class="dim" x="{at}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label}</text>')
        middle = (LEFT + WIDTH - NAMES) / 2
        body.append(f'<text class="dim" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_unit)}</text>')
        places = _apart([y(line.points[-1][1]) for line in lines])
        for order, (line, place) in enumerate(zip(lines, places, strict=True)):
            path = " ".join(f"{x(a)},{y(b)}" for a, b in line.points)
            body.append(f'<polyline class="line c{order % COLOURS}" points="{path}"/>')
            body.append(f'<text x="{x(line.points[-1][0]) + 6}" y="{place + 4}">{escape(line.name)}</text>')
        body.append("</g>")
    inside = "\n  ".join(body)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(panels) * WIDTH} {HEIGHT}" role="img"
  aria-label="{escape(alt)}" font-size="12" font-family="system-ui, 'Segoe UI', Helvetica, Arial, sans-serif">
  <style>
    .page {{ fill: #ffffff; }} text {{ fill: #1f2328; }} .dim {{ fill: #57606a; }}
    .strong {{ font-weight: 600; font-size: 14px; }}
    .grid {{ stroke: #d0d7de; }} .line {{ fill: none; stroke-width: 2; }}
    .line.c0 {{ stroke: #57606a; }} .line.c1 {{ stroke: #0b6bcb; }} .line.c2 {{ stroke: #2f7d3b; }}
    .line.c3 {{ stroke: #9a6700; }} .line.c4 {{ stroke: #b3261e; stroke-dasharray: 5 4; }}
    @media (prefers-color-scheme: dark) {{
      .page {{ fill: #0d1117; }} text {{ fill: #e6edf3; }} .dim {{ fill: #9aa4af; }} .grid {{ stroke: #30363d; }}
      .line.c0 {{ stroke: #8b949e; }} .line.c1 {{ stroke: #58a6ff; }} .line.c2 {{ stroke: #56b366; }}
      .line.c3 {{ stroke: #d2a032; }} .line.c4 {{ stroke: #ff7b72; }}
    }}
  </style>
  <rect class="page" width="{len(panels) * WIDTH}" height="{HEIGHT}" rx="8"/>
  {inside}
</svg>
"""


def _decades(values: Sequence[float]) -> tuple[int, int]:
    return math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)


def _apart(places: Sequence[float], least: float = 14) -> list[float]:
    """The same heights, moved up as far as it takes to be apart; they come from the lowest on the page up."""
    moved: list[float] = []
    for place in places:
        moved.append(round(min(place, moved[-1] - least), 1) if moved else place)
    return moved
