"""Whether the sites that are there make a round: asked before any of them is invited, so that none trains for nothing.

The same arithmetic by which each site judges the cohort that it is shown. Knows plans and rosters; no site is asked.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from foedus_common.checks import Note
from foedus_common.errors import RemoteError
from foedus_common.identity import Roster
from foedus_common.plan import AgreedPlan, SecureAggregation
from foedus_common.protocol.draw import drawn_cohorts
from foedus_common.protocol.thresholds import MAX_COHORT, cohort_thresholds
from foedus_common.ranges import counted_sites
from foedus_common.terms import protocol_roster


def strictest(agreed: AgreedPlan) -> int:
    """The honest sites whose noises the plan counts in the phase that counts most."""
    return max(counted_sites(agreed, phase) for phase in range(len(agreed.plan.phase)))


def shortfall(sites: Collection[str], agreed: AgreedPlan, roster: Roster, phase: int | None = None) -> str:
    """Why these sites make no round of the plan, without a stop at the end; "" where they do.

    phase: the round's, counted from 0; None for the phase that asks most. Of more sites than share a sum, only the
    number: who sums with whom is drawn later.
    """
    secure = agreed.plan.secure_aggregation
    if len(sites) < secure.min_sites:
        return f"its plan needs {secure.min_sites}"
    if len(sites) > secure.size.largest_cohort:
        return ""
    honest = strictest(agreed) if phase is None else counted_sites(agreed, phase)
    try:
        cohort_thresholds(sites, secure.colluding, honest, protocol_roster(roster))
    except RemoteError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class FullRound:
    """A round in which all sites of the roster take part as one cohort.

    largest: the organisations that count as colluding; together: how many sites they have. needed: sites that have to
    stay until the sum is opened.
    """

    sites: int
    largest: tuple[str, ...]
    together: int
    needed: int

    @property
    def strained(self) -> bool:
        """Whether organisations with many sites leave no room for a single dropout."""
        return self.together > len(self.largest) and self.needed == self.sites

    def __str__(self) -> str:
        said = f"A round of all {self.sites} sites needs {self.needed} of them until its end"
        if self.together == len(self.largest):
            return f"{said}."
        whoever = "organisation" if len(self.largest) == 1 else f"{len(self.largest)} organisations"
        said = f"{said}, so that any {whoever} may collude, with {self.together} sites at most."
        if not self.strained:
            return said
        whose = self.largest[0] if len(self.largest) == 1 else f"the largest {whoever}"
        return f"{said} With fewer sites of {whose}, or more of others, some could drop out."


def full_round(roster: Roster, colluding: int) -> FullRound:
    """What the roster's organisations make of a round of all sites, whichever `colluding` of them help the coordinator.

    Raises RemoteError, as `cohort_thresholds`, where such a round cannot be.
    """
    known, names = protocol_roster(roster), tuple(roster.public_keys)
    limits = cohort_thresholds(names, colluding, 0, known)
    largest = tuple(name for name, _ in known.organisations(names).most_common(colluding))
    return FullRound(len(names), largest, known.together(names, colluding), limits.quorum)


def outlook(agreed: AgreedPlan, roster: Roster) -> str:
    """What a round needs in which every site of the roster takes part, in a sentence or two."""
    secure, everybody = agreed.plan.secure_aggregation, roster.public_keys
    if short := shortfall(everybody, agreed, roster):
        return f"There are {roster.members}, which make no round: {short}."
    if len(everybody) > secure.size.most:
        return f"There are {roster.members}, and rounds of the plan have room for {secure.size.most}."
    if len(everybody) > secure.size.largest_cohort:
        return f"There are {roster.members}. {_trial_draw(agreed, roster)}"
    return f"There are {roster.members}. {full_round(roster, secure.colluding)}"


def _trial_draw(agreed: AgreedPlan, roster: Roster) -> str:
    """What one of the draws comes to that a round of all sites may have: whose sites meet in a cohort is chance."""
    secure, known, needed, refused = agreed.plan.secure_aggregation, protocol_roster(roster), [], []
    cohorts = drawn_cohorts(bytes(32), 0, 0, 0, dict.fromkeys(roster.public_keys, b""), secure.size.largest_cohort)
    for cohort in cohorts:
        try:
            needed.append(cohort_thresholds(cohort, secure.colluding, strictest(agreed), known).quorum)
        except RemoteError as error:
            refused.append(error)
    if refused:
        return f"Drawn for a trial, {len(refused)} of {len(cohorts)} cohorts open no sum: {refused[0]}."
    return (
        f"Drawn for a trial, cohorts of {len(cohorts[-1])} to {len(cohorts[0])} sites need {min(needed)} to "
        f"{max(needed)} of them until their end."
    )


def usual_round(roster: Roster) -> str:
    """`full_round` as `doctor` says it, for plans that leave `colluding` as it is.

    Raises Note where the members make no round yet, or none that stands a dropout because one of them has many sites.
    """
    if len(roster.sites) > MAX_COHORT:
        return f"There are {roster.members}; each sum counts the organisations of its own cohort."
    try:
        full = full_round(roster, SecureAggregation().colluding)
    except RemoteError as error:
        raise Note(f"There are {roster.members}, which make no round yet ({error}).") from None
    said = f"There are {roster.members}. {full}"
    if full.strained:
        raise Note(said)
    return said
