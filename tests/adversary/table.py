"""`make adversary`: plays every attack; prints attack, named error, session, opening attack; fails if one succeeds.

Then two attacks on Flower's SecAgg+ beside the same here; the search over all of its 2^28 seeds takes about a minute.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import secaggplus
from attacks import ATTACKS, Attack, alive_and_dead
from cheating import Cheat, Federation
from foedus_common.errors import Reason
from guessing import Guesses, betray, guess, near
from verdict import Verdict, judge

WIDTHS = (72, 20, 10)


def main() -> None:
    logging.getLogger("foedus_client").propagate = False
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation(Path(folder))
        held = play_all(federation)
        dead, keys = known_to_work_elsewhere(federation)
        federation.close()  # before a search that leaves its link no time
        beside = side_by_side(dead, keys)
    sys.exit(not (held and beside))


def play_all(federation: Federation) -> bool:
    """Whether every attack failed as it should."""
    runs, failed = count(1), 0
    print(_line("attack", "named error", "session", "opening attack"))
    for attack in ATTACKS:
        cheat = Cheat(federation, next(runs))
        verdict = judge(cheat, attack)
        cheat.close()
        held = verdict.named == attack.refused and verdict.dead and not verdict.opened
        failed += not held
        named = getattr(verdict.named, "__name__", None) or str(verdict.named)
        print(_line(attack.name, named, verdict.stage, _outcome(verdict) + ("" if held else "   <-- BROKEN")))
    print(f"\n{len(ATTACKS)} attacks, {len(ATTACKS) - failed} refused by name, session dead, no vector opened")
    return not failed


def known_to_work_elsewhere(federation: Federation) -> tuple[Verdict, Guesses]:
    """What the two attacks on SecAgg+ come to here: a site called alive and dead, a search for the last mask's key."""
    dead = judge(Cheat(federation, 10_001), Attack("", Reason.SEQUENCE_REUSED, alive_and_dead))
    cheat = Cheat(federation, 10_002)
    cheat.begin()
    return dead, guess(betray(cheat), near(bytes(32), bits=16))


def side_by_side(dead: Verdict, keys: Guesses) -> bool:
    """Whether both attacks recover a client's vector from Flower's SecAgg+ and neither did here."""
    updates = np.random.default_rng(0).uniform(-1, 1, (5, 1000)).astype(np.float32)
    print("\nA client's vector, recovered by a server from Flower's SecAgg+ and here")

    start = time.perf_counter()
    recovered = secaggplus.alive_and_dead(updates, victim=0, threshold=4)
    seconds = time.perf_counter() - start
    dead_there = np.allclose(recovered, updates[0], atol=1e-6)
    print("listed as alive and as dead, n = 5, t = 4")
    print(f"  Flower: {_recovered(dead_there)} in {seconds:.1f} s")
    print(f"  here:   {_outcome(dead)}")

    search = secaggplus.brute_force(updates[:2], told_bits=0)
    guessed_there = search.vector is not None and np.allclose(search.vector, updates[0], atol=1e-6)
    rates = search.seeds / search.seconds, keys.tried / keys.seconds
    print("search for the last mask's seed, all else known")
    print(f"  Flower: {_recovered(guessed_there)} in {search.seconds:.0f} s, {rates[0]:.1e} of 2^28 seeds a second")
    print(f"  here:   {_recovered(keys.vector is not None)}, {rates[1]:.1e} of 2^256 keys a second: ", end="")
    print(f"{keys.years_in_full:.0e} years")
    return dead_there and guessed_there and not dead.opened and keys.vector is None


def _recovered(yes: bool) -> str:
    return "the vector" if yes else "nothing"


def _line(*cells: str) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=False)), cells[-1]])


def _outcome(verdict: Verdict) -> str:
    if verdict.opened:
        return f"OPENED {verdict.opened}"
    sizes = sorted({len(sites) for sites in verdict.sums})
    return f"no vector; the sum of {' and '.join(map(str, sizes))} honest sites" if sizes else "nothing"


if __name__ == "__main__":
    main()
