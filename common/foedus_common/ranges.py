"""How far a coordinate of an update can reach: the public range in which it is encoded, noise included.

Everything follows from the plan alone, so that nothing about a site's data shows in what it refuses. With the site as
the unit of privacy the encoding's steps are the grid of the noise, too. Knows plans and numbers; no vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, Group, RoundPlan
from foedus_common.protocol.encoding import steps_of_half_range
from foedus_common.protocol.thresholds import thresholds

LEAST_SIGMA = 16
"""Grid units of one site's noise: narrower discrete Gaussians are less like what is accounted."""


def tail(agreed: AgreedPlan) -> float:
    """How many standard deviations no noise of the run exceeds but with probability 2^-40.

    Union bound over every coordinate, release and site, with P(|N| > t sigma) <= 2 exp(-t^2 / 2).
    """
    releases = sum(agreed.releases(p) * agreed.size(p) for p in range(len(agreed.plan.phase)))
    draws = releases * agreed.plan.secure_aggregation.max_sites
    return math.sqrt(2 * (math.log(2 * draws) + 40 * math.log(2)))


def half_range(agreed: AgreedPlan, round_plan: RoundPlan, group: Group) -> float:
    """The largest magnitude that a coordinate of an update in `group` can have in this round, noise included.

    Record: a step moves a coordinate by lr / scale * (clamped sum + noise) / divisor, where the sum of clipped
    gradients is clamped to +-divisor * clip (`foedus_common.privacy.noise`). Site: all that a field holds, in units of
    `site_grid`. Without DP: the plan's `update_bound`, to which updates are clamped.
    """
    settings, privacy = round_plan.settings, agreed.plan.privacy
    match privacy.unit:
        case "record":
            steps, divisor = settings.steps or 0, privacy.divisor or 1
            noise = tail(agreed) * agreed.noise_multipliers[round_plan.phase] * privacy.clip / divisor
            step = round_plan.learning_rate(group) / round_plan.scale(group)
            return step * (steps * privacy.clip + math.sqrt(steps) * noise)
        case "site":
            unit = privacy.clip / site_grid(agreed, round_plan.phase).units
            return _field_steps(agreed) * unit / round_plan.scale(group)
        case _:
            return settings.update_bound or 1.0


@dataclass(frozen=True)
class SiteGrid:
    """The integers in which a site's update is clipped, noised and packed, where the site is the unit of privacy.

    units: of the grid in one clipping bound. sigma: one site's noise, in units. honest: how many honest sites' noises
    are in every sum that the protocol opens.
    """

    units: int
    sigma: int
    honest: int


def site_grid(agreed: AgreedPlan, phase: int) -> SiteGrid:
    """The finest grid in which a clipped update and its noise, `tail` deviations of it, fit a field.

    A sum holds at least max(t, m_min) sites of the smallest cohort that the plan allows, of which c may keep their
    noise to themselves: each site's share is the multiplier divided by sqrt(honest). Raises LocalError if the fields
    are too narrow.
    """
    secure = agreed.plan.secure_aggregation
    honest = thresholds(secure.min_sites, secure.colluding).quorum - secure.colluding
    share, deviations = agreed.noise_multipliers[phase] / math.sqrt(honest), tail(agreed)
    units = int((_field_steps(agreed) - deviations) / (1 + deviations * share))
    sigma = math.ceil(share * units)
    if units < 1 or sigma < LEAST_SIGMA:
        raise LocalError(
            f"The plan {agreed.plan.run.name!r} leaves no room for its noise in fields of {secure.field_bits} bits; "
            "raise [secure_aggregation] field_bits, or lower max_sites."
        )
    return SiteGrid(units, sigma, honest)


def _field_steps(agreed: AgreedPlan) -> int:
    secure = agreed.plan.secure_aggregation
    return steps_of_half_range(secure.field_bits, secure.max_sites)
