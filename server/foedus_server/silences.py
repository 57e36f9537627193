"""Which sites a run does without for a while: those that committed to a seed of a draw and kept it back.

Keeps a coordinator's rounds going and is nothing that sites rely on: whom it leaves out, it could as well call absent
(docs/decisions/0035). Pure; knows sites by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Silences:
    """Over all rounds of a run. A site that keeps a seed back is left out of what remains of the round; the second time
    of the next round, too, the third time of three more, and so on: it spoils about log2(T) draws in T rounds."""

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()
        self._back_in: dict[str, int] = {}

    def note(self, sites: Iterable[str], round_index: int) -> None:
        """These kept back what they had committed to, in a draw of this round."""
        for site in sites:
            self._times[site] += 1
            self._back_in[site] = round_index + 2 ** (self._times[site] - 1)

    def without(self, sites: Iterable[str], round_index: int) -> tuple[str, ...]:
        """The sites, without those that this round leaves out."""
        return tuple(site for site in sites if self._back_in.get(site, 0) <= round_index)

    def forgive(self) -> None:
        """Nobody is left out, until the next silence: without them it did not go better."""
        self._back_in.clear()
