"""How long a site waits before it tries to connect again."""

from __future__ import annotations

from itertools import islice

import pytest

from foedus_client.link.transfers import pauses

LONGEST = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_pauses_double_up_to_five_seconds_and_chance_takes_up_to_half_of_each() -> None:
    assert list(islice(pauses(lambda size: b"\xff" * size), 7)) == pytest.approx(LONGEST)
    assert list(islice(pauses(bytes), 7)) == pytest.approx([pause / 2 for pause in LONGEST])
