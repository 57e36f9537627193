"""What the ledger's history looks like on a terminal."""

from __future__ import annotations

import math

import pytest

from foedus_client.ledger.chart import HEIGHT, WIDTH, chart

HOUR = 3600.0


def test_a_dataset_that_spent_half_and_then_all_of_it() -> None:
    lines = list(chart([(0.0, 0.0), (12 * HOUR, 4.0), (18 * HOUR, 8.0)], cap=8.0, now=24 * HOUR))
    blank, full, quarter = " " * (WIDTH // 2 - 1), "█" * (WIDTH // 4 + 1), WIDTH // 4
    upper, lower = f"{blank}{' ' * quarter}{full}", f"{blank}{'█' * quarter}{full}"
    assert lines == [
        f"    8.00 │{upper}",
        f"         │{upper}",
        f"    6.00 │{upper}",
        f"         │{upper}",
        f"    4.00 │{lower}",
        f"         │{lower}",
        f"    2.00 │{lower}",
        f"         │{lower}",
        f"    0.00 └{'─' * WIDTH}",
        f"          1970-01-01 00:00{'1970-01-02 00:00':>{WIDTH - 16}}",
    ]


@pytest.mark.parametrize(("spent", "cap", "top"), [(1e-9, 8.0, "8.00"), (9.0, 8.0, "9.00"), (math.inf, 8.0, "8.00")])
def test_whatever_was_spent_can_be_drawn(spent: float, cap: float, top: str) -> None:
    lines = list(chart([(0.0, 0.0), (1.0, spent)], cap, now=1.0))
    assert lines[0].split()[0] == top
    assert len(lines) == HEIGHT + 2
    assert lines[HEIGHT - 1][-1] == ("▁" if spent < 1 else "█")  # nothing that was spent is invisible
    assert {len(line) for line in lines} == {10 + WIDTH}
