"""How many must take part: thresholds of a cohort, and what a site demands of every set of sites it is shown.

Pure arithmetic and set rules; knows no message and no key. Source: docs/protocol.md section 2, "Thresholds".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
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


def thresholds(sites: int, colluding: int, together: int | None = None) -> Thresholds:
    """t = floor((n + s) / 2) + 1 and m_min = max(3, c + 2), for a cohort of n of which c organisations may help the
    coordinator, with s = `together` sites at most; None: one site each.

    Two survivor sets with t signatures each would need 2t - n > s sites to sign twice, so honest sites cannot be
    split; and t >= s + 2, so none is alone in a sum. LocalError where a cohort cannot be safe: n = 2 (the sum would
    reveal the other site), s or c too large, n > 128.
    """
    if sites > MAX_COHORT:
        raise LocalError(f"a cohort has at most {MAX_COHORT} sites, not {sites}; a larger round is drawn into several")
    if sites < 3:
        raise LocalError(
            f"a cohort needs at least 3 sites, not {sites}: a sum of two would reveal the other site's part"
        )
    if colluding < 0:
        raise LocalError(f"the number of colluding organisations cannot be {colluding}")
    helpers = colluding if together is None else together
    result = Thresholds((sites + helpers) // 2 + 1, max(3, colluding + 2))
    if (needed := max(result.minimum, helpers + 2)) > sites:
        raise LocalError(
            f"a cohort of {sites} sites cannot stand {helpers} that collude: it would need {needed} sites at least"
        )
    return result


def tolerated_drops(sites: int, colluding: int, together: int | None = None) -> int:
    """How many of a cohort may vanish at any stage while the sum still opens."""
    return sites - thresholds(sites, colluding, together).quorum


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

    def organisations(self, sites: Iterable[str]) -> Counter[str]:
        """How many of these sites each organisation has."""
        return Counter(self.member(site).organisation for site in sites)

    def together(self, sites: Iterable[str], colluding: int) -> int:
        """s: how many of these sites any `colluding` organisations have at most."""
        return sum(count for _, count in self.organisations(sites).most_common(colluding))


@dataclass(frozen=True)
class PeerRule:
    """Site policy: at least `minimum` of the organisations it names, its own not counted, must take part.

    Organisations count, not sites: a named one cannot stand in for another by bringing two sites of its own.
    """

    organisations: frozenset[str] = frozenset()
    minimum: int = 0


def cohort_thresholds(cohort: Collection[str], colluding: int, honest: int, roster: Roster) -> Thresholds:
    """The thresholds of a cohort, whichever `colluding` of its organisations help the coordinator with all their sites.

    All is counted in the cohort of A0, whoever drops out later: a site that is gone can still sign a survivor set, and
    give away what it was dealt. honest: so many sites' noises, not of those organisations, have to be in every sum.

    Raises RemoteError: TOO_FEW_SITES for too few organisations, COHORT_SIZE where no thresholds make the cohort safe,
    or where they leave fewer honest sites in a sum.
    """
    try:
        require_quorum(cohort, "A0", thresholds(len(cohort), colluding), roster)
        together = roster.together(cohort, colluding)
        limits = thresholds(len(cohort), colluding, together)
    except LocalError as error:
        raise RemoteError(Reason.COHORT_SIZE, str(error)) from None
    if limits.quorum - together < honest:
        raise RemoteError(
            Reason.COHORT_SIZE,
            f"{colluding} of its organisations have {together} of the cohort's {len(cohort)} sites, which leaves the "
            f"noise of {limits.quorum - together} honest ones in a sum, and the plan counts {honest}; one with a "
            "smaller min_sites counts fewer",
        )
    return limits


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
    peers = len(named & roster.organisations(sites).keys())
    if peers < rule.minimum:
        raise RemoteError(
            Reason.COHORT_LACKS_PEERS,
            f"{peers} of the organisations that site policy names have sites at {stage}, and {rule.minimum} must",
        )
