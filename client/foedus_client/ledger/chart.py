"""What a dataset has spent over time, drawn in characters. Knows numbers and no ledger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from foedus_common.clock import utc

WIDTH, HEIGHT = 60, 8
EIGHTHS = " ▁▂▃▄▅▆▇█"


def chart(points: Sequence[tuple[float, float]], cap: float, now: float) -> Iterator[str]:
    """Lines of text: epsilon spent (upwards, the cap at the top) from the first point's moment until now.

    points: (Unix seconds, epsilon spent by then), at least one, in order. An infinite epsilon fills its columns.
    """
    begin = points[0][0]
    span = max(now - begin, 1.0)
    top = max(cap, *(spent for _, spent in points if spent < math.inf))
    moments = [begin + span * (column + 1) / WIDTH for column in range(WIDTH)]
    columns = [_by(points, moment) / top for moment in moments]
    for row in range(HEIGHT, 0, -1):
        label = f"{top * row / HEIGHT:8.2f}" if row % 2 == 0 else " " * 8
        yield f"{label} │{''.join(_cell(share, row) for share in columns)}"
    yield f"{0:8.2f} └{'─' * WIDTH}"
    yield f"{'':10}{_day(begin)}{_day(now):>{WIDTH - len(_day(begin))}}"


def _by(points: Sequence[tuple[float, float]], moment: float) -> float:
    return [spent for at, spent in points if at <= moment][-1]


def _cell(share: float, row: int) -> str:
    """The part of a column that lies in a row, in eighths; what was spent at all shows."""
    filled = min(8.0, max(0.0, (share * HEIGHT - (row - 1)) * 8))
    return EIGHTHS[math.ceil(filled)]


def _day(moment: float) -> str:
    return utc(moment).strftime("%Y-%m-%d %H:%M")
