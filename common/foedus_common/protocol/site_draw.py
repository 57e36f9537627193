"""A site's part in drawing the cohorts of a round: commit to a seed, reveal it, find the own cohort.

The three transitions that come before A1 where a round has more sites than one cohort holds; `site_session` has the
rest, and carries them out. What a site relies on here is its own seed alone (docs/decisions/0027): nobody else's
commitment is believed to be anything but fixed before that seed was told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foedus_common.errors import Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.draw import MAX_DRAWS, SEED_BYTES, drawn_cohorts, seed_commitment
from foedus_common.protocol.effects import AttemptSeen
from foedus_common.protocol.site_stages import Committed, Revealed, Step

if TYPE_CHECKING:
    from foedus_common.protocol.site_session import SiteSession


def commit(session: SiteSession, header: wire.Header) -> Step:
    """A fresh seed for an attempt that this site may begin; what is durable of it is that the attempt was begun."""
    size, terms, attempt = session.size, session.outbox.terms, header.attempt_id
    if (header.run_id, header.round, header.binding) != (terms.run_id, terms.round, terms.plan_digest):
        raise RemoteError(Reason.CONFIG_MISMATCH, "the draw is for another round than this site's vector was made for")
    if not size.drawn:
        raise RemoteError(Reason.COHORT_SIZE, f"rounds of at most {size.most} sites are one cohort, and none is drawn")
    if len(session.outbox.attempts_seen) >= MAX_DRAWS:
        raise RemoteError(Reason.DRAWS_EXHAUSTED, f"cohorts of this round were asked for {MAX_DRAWS} times before")
    stage = Committed(attempt, session.random(SEED_BYTES))
    return Step(
        stage, m.Commitment(seed_commitment(*attempt, session.site, stage.seed)), records=(AttemptSeen(attempt),)
    )


def reveal(session: SiteSession, stage: Committed, header: wire.Header, told: m.Commitments) -> Step:
    """The seed, once everybody's commitment is fixed: from now on no other draw counts in this attempt."""
    _require_attempt(session, stage.attempt, header)
    commitments, size = dict(told.commitments), session.size
    if commitments.get(session.site) != seed_commitment(*stage.attempt, session.site, stage.seed):
        raise RemoteError(Reason.SEED_ALTERED, "this site's own commitment came back altered, or not at all")
    for site in commitments:
        session.roster.member(site)
    if not max(size.fewest, size.largest_cohort + 1) <= len(commitments) <= size.most:
        raise RemoteError(
            Reason.COHORT_SIZE,
            f"cohorts are to be drawn from {len(commitments)} sites, and the plan has rounds of {size.fewest} to "
            f"{size.most}, drawn above {size.largest_cohort}",
        )
    return Step(Revealed(stage.attempt, commitments), m.Seed(stage.seed))


def require_drawn(session: SiteSession, stage: Revealed, header: wire.Header, told: m.DrawnConfig) -> None:
    """RemoteError unless the cohort is the one in which the seeds that were committed to put this site."""
    _require_attempt(session, stage.attempt, header)
    seeds = dict(told.seeds)
    opened = {site: seed_commitment(*stage.attempt, site, seed) for site, seed in seeds.items()}
    if opened != stage.commitments:
        altered = sorted(
            site for site in {*opened, *stage.commitments} if opened.get(site) != stage.commitments.get(site)
        )
        raise RemoteError(
            Reason.SEED_ALTERED, f"{len(altered)} seeds are not what was committed to, the first of {altered[0]}"
        )
    cohorts = drawn_cohorts(header.binding, *stage.attempt, seeds, session.size.largest_cohort)
    if told.config.cohort != next(cohort for cohort in cohorts if session.site in cohort):
        raise RemoteError(Reason.COHORT_NOT_DRAWN, "the cohort is not the one into which the seeds put this site")


def _require_attempt(session: SiteSession, attempt: m.AttemptId, header: wire.Header) -> None:
    if (header.attempt_id, header.binding) != (attempt, session.outbox.terms.plan_digest):
        raise RemoteError(Reason.CONFIG_MISMATCH, "a message belongs to another attempt than the one of this draw")
