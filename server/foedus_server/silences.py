"""Which sites a run does without for a while: those that committed to a seed of a draw and kept it back.

Keeps a coordinator's rounds going and is nothing that sites rely on: whom it leaves out, it could as well call absent
(docs/decisions/0035). Pure; knows sites and organisations by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

Whoever = tuple[str, str]
"""An organisation's name, and that of its site, or "" for all of its sites."""


class Silences:
    """Over all rounds of a run. A site that keeps a seed back is left out of what remains of the round, and so is a
    whole organisation whose sites spoilt two draws of it: `c` organisations spoil 2c draws of a round, however many
    sites they have. The second time it is left out of the next round, too, the third time of three more, and so on:
    whoever it is spoils few draws of a run."""

    def __init__(self) -> None:
        self._times: Counter[Whoever] = Counter()
        self._back_in: dict[Whoever, int] = {}
        self._last_spoilt: dict[str, int] = {}

    def note(self, sites: Iterable[str], round_index: int, organisations: Mapping[str, str]) -> None:
        """These kept back what they had committed to, in one draw of this round. organisations: by site."""
        names = {site: organisations[site] for site in sites}
        for site, organisation in names.items():
            self._leave_out((organisation, site), round_index)
        for organisation in set(names.values()):
            if self._last_spoilt.get(organisation) == round_index:
                self._leave_out((organisation, ""), round_index)
            self._last_spoilt[organisation] = round_index

    def without(self, sites: Iterable[str], round_index: int, organisations: Mapping[str, str]) -> tuple[str, ...]:
        """The sites, without those that this round leaves out."""
        return tuple(
            site
            for site in sites
            if max(self._back_in.get((organisations[site], whose), 0) for whose in (site, "")) <= round_index
        )

    def forgive(self) -> None:
        """Nobody is left out, until the next silence: without them it did not go better."""
        self._back_in.clear()

    def _leave_out(self, whoever: Whoever, round_index: int) -> None:
        self._times[whoever] += 1
        self._back_in[whoever] = round_index + 2 ** (self._times[whoever] - 1)
