"""How many must take part: thresholds of a cohort, and what a site demands of every set of sites it is shown.

Pure arithmetic and set rules; knows no message and no key. Source: docs/protocol.md section 2, "Thresholds".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from foedus_common.errors import LocalError, Reason, RemoteError

MAX_COHORT = 128
"""The complete graph ends here; larger rounds are split into several cohorts (`draw`)."""


@dataclass(frozen=True)
class Thresholds:
    """threshold (t): shares that open a secret, signatures that prove a survivor set. minimum (m_min): least sum."""

    threshold: int
    minimum: int

    @property
    def quorum(self) -> int:
        """Fewer sites than this end the attempt, at every stage."""
        return max(self.threshold, self.minimum)


def thresholds(sites: int, colluding: int) -> Thresholds:
    """t = floor((n + c) / 2) + 1 and m_min = max(3, c + 2), for a cohort of n of which c may help the coordinator.

    Two survivor sets with t signatures each would need 2t - n > c sites to sign twice, so honest sites cannot be
    split. LocalError where a cohort cannot be safe: n = 2 (the sum would reveal the other site), c too large, n > 128.
    """
    if sites > MAX_COHORT:
        raise LocalError(f"a cohort has at most {MAX_COHORT} sites, not {sites}; a larger round is drawn into several")
    if sites < 3:
        raise LocalError(
            f"a cohort needs at least 3 sites, not {sites}: a sum of two would reveal the other site's part"
        )
    if colluding < 0:
        raise LocalError(f"the number of colluding sites cannot be {colluding}")
    result = Thresholds((sites + colluding) // 2 + 1, max(3, colluding + 2))
    if result.quorum > sites:
        raise LocalError(
            f"a cohort of {sites} sites cannot stand {colluding} that collude: it would need {result.quorum} sites"
        )
    return result


def tolerated_drops(sites: int, colluding: int) -> int:
    """How many of a cohort may vanish at any stage while the sum still opens."""
    return sites - thresholds(sites, colluding).quorum


class Member(NamedTuple):
    """One site of the roster: its Ed25519 identity key (32 bytes) and the organisation that answers for it."""

    public_key: bytes
    organisation: str


@dataclass(frozen=True)
class Roster:
    """The root-signed list of sites, verified elsewhere. `digest` is 32 bytes over its signed form."""

    epoch: int
    digest: bytes
    members: Mapping[str, Member]

    def member(self, site: str) -> Member:
        """RemoteError(UNKNOWN_SITE) if the roster does not hold the site."""
        try:
            return self.members[site]
        except KeyError:
            raise RemoteError(
                Reason.UNKNOWN_SITE, f"{site} is not in the roster of epoch {self.epoch}", (site,)
            ) from None

    def organisations(self, sites: Iterable[str]) -> set[str]:
        return {self.member(site).organisation for site in sites}


@dataclass(frozen=True)
class PeerRule:
    """Site policy: at least `minimum` of the organisations it names, its own not counted, must take part.

    Organisations count, not sites: a named one cannot stand in for another by bringing two sites of its own.
    """

    organisations: frozenset[str] = frozenset()
    minimum: int = 0


def require_quorum(sites: Iterable[str], stage: str, limits: Thresholds, roster: Roster) -> None:
    """RemoteError(TOO_FEW_SITES) unless enough sites, of at least `limits.minimum` organisations, are still there."""
    present = set(sites)
    if len(present) < limits.quorum:
        raise RemoteError(
            Reason.TOO_FEW_SITES, f"{len(present)} sites are left at {stage}, and {limits.quorum} are needed"
        )
    organisations = roster.organisations(present)
    if len(organisations) < limits.minimum:
        raise RemoteError(
            Reason.TOO_FEW_SITES,
            f"the sites left at {stage} belong to {len(organisations)} organisations, and {limits.minimum} are needed",
        )


def require_peers(sites: Iterable[str], stage: str, rule: PeerRule, own: str, roster: Roster) -> None:
    """RemoteError(COHORT_LACKS_PEERS) unless the peers that this site's policy asks for are there."""
    named = rule.organisations - {roster.member(own).organisation}
    peers = len(named & roster.organisations(sites))
    if peers < rule.minimum:
        raise RemoteError(
            Reason.COHORT_LACKS_PEERS,
            f"{peers} of the organisations that site policy names have sites at {stage}, and {rule.minimum} must",
        )
