"""What came of an attack: which error the site named, whether its session is dead, what could be opened."""

from __future__ import annotations

from dataclasses import dataclass

from attacks import Attack, Refused
from cheating import COHORT, Cheat, reason_of
from foedus_common.protocol import messages as m
from foedus_common.protocol.site_stages import Failed, Finished, Lost, SiteStage

DEAD: tuple[type[SiteStage], ...] = (Failed, Finished, Lost)


@dataclass(frozen=True)
class Verdict:
    """named: what the site's log names. stage: what its session came to. opened: (site, round) of opened vectors;
    sums: the sites of each sum that could be opened."""

    named: Refused | None
    dead: bool
    stage: str
    opened: list[tuple[str, int]]
    sums: list[tuple[str, ...]]


def judge(cheat: Cheat, attack: Attack) -> Verdict:
    if attack.begun:
        cheat.begin()
    errors = cheat.federation.refusals.errors
    errors.clear()
    site = attack.play(cheat)
    named = reason_of(errors[-1] if errors else None)
    stage = cheat.stage(site)
    dead = (stage is None or isinstance(stage, DEAD)) and _answers_nothing(cheat, site)
    opened = cheat.open()
    return Verdict(named, dead, type(stage).__name__ if stage else "none", list(opened.vectors), list(opened.sums))


def _answers_nothing(cheat: Cheat, site: str) -> bool:
    """Every further stage of the first attempt, as a coordinator might go on to ask for it."""
    attempt = cheat.attempt()
    messages = (m.PeerKeys(()), m.PeerShares(()), m.Survivors(COHORT), m.Agreement(()))
    return all(attempt.ask(site, sequence, each) == m.Declined() for sequence, each in enumerate(messages, start=1))
