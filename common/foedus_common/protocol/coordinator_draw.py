"""The coordinator's part in drawing the cohorts of a round: collect commitments, show them, collect seeds.

    state, effects = session.begin()
    state, effects = session.step(state, Arrived(site, envelope) | Deadline(sequence))

A pure state machine like `coordinator_session`, which follows it once for each cohort. A site that does not commit in
time is not in the draw. One that committed and does not reveal ends the attempt: a draw that went on without it would
let whoever keeps a seed back choose among splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from foedus_common.errors import FoedusError, Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_session import Event, Failed, OpenStage, answer_to, send_each, take_in
from foedus_common.protocol.draw import RoundSize, drawn_cohorts, seed_commitment
from foedus_common.protocol.effects import Abort, Arrived, Effects
from foedus_common.protocol.thresholds import Roster


@dataclass(frozen=True)
class Drawing(OpenStage):
    """Commitments (sequence 0) or seeds (sequence 1) are awaited; `told` are in, 32 bytes each."""

    told: Mapping[str, bytes] = field(default_factory=dict)
    commitments: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """The cohorts, and the seeds that give them, by site name."""

    cohorts: tuple[tuple[str, ...], ...]
    seeds: tuple[tuple[str, bytes], ...]


DrawState = Drawing | Drawn | Failed


@dataclass(frozen=True)
class DrawSession:
    """What stays the same from step to step. sites: those that are ready."""

    terms: m.RoundTerms
    attempt: int
    sites: tuple[str, ...]
    size: RoundSize
    roster: Roster

    @property
    def attempt_id(self) -> m.AttemptId:
        return m.AttemptId(self.terms.run_id, self.terms.round, self.attempt)

    def begin(self) -> tuple[Drawing, Effects]:
        return self._ask(Drawing(0, frozenset(self.sites)), m.Draw())

    def step(self, state: DrawState, event: Event) -> tuple[DrawState, Effects]:
        """Take in one event. Never raises FoedusError; what came too late, twice or unasked changes nothing."""
        if not isinstance(state, Drawing):
            return state, ()
        taken, effects = take_in(state, event, ("D1", "D2")[state.sequence], self._accept)
        if taken.waiting or not effects:
            return taken, effects
        return self._close(taken, effects)

    def _accept(self, state: Drawing, event: Arrived) -> Drawing:
        asked = self._header(event.site, state.sequence)
        if state.sequence == 0:
            told = cast(m.Commitment, answer_to(asked, m.Commitment, event, self.roster)).commitment
        else:
            told = cast(m.Seed, answer_to(asked, m.Seed, event, self.roster)).seed
            if seed_commitment(*self.attempt_id, event.site, told) != state.commitments[event.site]:
                raise RemoteError(Reason.SEED_ALTERED, f"{event.site} revealed another seed", (event.site,))
        return replace(state, told={**state.told, event.site: told})

    def _close(self, state: Drawing, effects: Effects) -> tuple[DrawState, Effects]:
        try:
            following, requests = self._show(state) if state.sequence == 0 else (self._cut(state), ())
        except FoedusError as error:
            return Failed(error), (*effects, Abort(error))
        return following, (*effects, *requests)

    def _show(self, state: Drawing) -> tuple[Drawing, Effects]:
        commitments, fewest = dict(sorted(state.told.items())), max(self.size.fewest, self.size.largest_cohort + 1)
        if len(commitments) < fewest:
            raise RemoteError(
                Reason.TOO_FEW_SITES, f"{len(commitments)} sites are left for a draw, and {fewest} are needed"
            )
        following = Drawing(1, frozenset(commitments), commitments=commitments)
        return self._ask(following, m.Commitments(tuple(commitments.items())))

    def _cut(self, state: Drawing) -> Drawn:
        if silent := sorted(set(state.commitments) - set(state.told)):
            raise RemoteError(
                Reason.TOO_FEW_SITES, f"{', '.join(silent)} committed to a seed and did not reveal it", silent
            )
        cohorts = drawn_cohorts(self.terms.plan_digest, *self.attempt_id, state.told, self.size.largest_cohort)
        return Drawn(cohorts, tuple(sorted(state.told.items())))

    def _ask(self, state: Drawing, request: m.ToSite) -> tuple[Drawing, Effects]:
        requests = dict.fromkeys(sorted(state.waiting), request)
        return state, send_each(requests, lambda site: self._header(site, state.sequence))

    def _header(self, site: str, sequence: int) -> wire.Header:
        return wire.Header(*self.attempt_id, self.terms.plan_digest, wire.COORDINATOR, site, sequence)
