"""The threat model lists the attacks that are played, each under the error that it ends with."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from attacks import ATTACKS

DOCUMENT = Path(__file__).parents[2] / "docs" / "threat-model.md"


def test_the_table_of_attacks_is_the_one_that_is_played() -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition("### Attacks that are played against real sites")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    played = defaultdict(list)
    for attack in ATTACKS:
        played[getattr(attack.refused, "value", None) or attack.refused.__name__].append(attack.name)
    assert {error: attacks.split("; ") for error, attacks in rows} == played
