"""`make adversary`: plays every attack; prints attack, named error, session, opening attack; fails if one succeeds."""

from __future__ import annotations

import logging
import sys
import tempfile
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from attacks import ATTACKS
from cheating import Cheat, Federation
from verdict import Verdict, judge

WIDTHS = (72, 20, 10)


def main() -> None:
    logging.getLogger("foedus_client").propagate = False
    runs, failed = count(1), 0
    print(_line("attack", "named error", "session", "opening attack"))
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        for attack in ATTACKS:
            cheat = Cheat(federation, next(runs))
            verdict = judge(cheat, attack)
            cheat.close()
            held = verdict.named == attack.refused and verdict.dead and not verdict.opened
            failed += not held
            named = getattr(verdict.named, "__name__", None) or str(verdict.named)
            print(_line(attack.name, named, verdict.stage, _outcome(verdict) + ("" if held else "   <-- BROKEN")))
        federation.close()
    print(
        f"\n{len(ATTACKS)} attacks, {len(ATTACKS) - failed} refused by name with the session dead and no vector opened"
    )
    sys.exit(bool(failed))


def _line(*cells: str) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)), cells[-1]])


def _outcome(verdict: Verdict) -> str:
    if verdict.opened:
        return f"OPENED {verdict.opened}"
    sizes = sorted({len(sites) for sites in verdict.sums})
    return f"no vector; the sum of {' and '.join(map(str, sizes))} honest sites" if sizes else "nothing"


if __name__ == "__main__":
    main()
