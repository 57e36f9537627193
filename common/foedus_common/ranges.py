"""How far a coordinate of an update can reach: the public range in which it is encoded, noise included.

Everything follows from the plan alone, so that nothing about a site's data shows in what it refuses. Where noises are
to add up in the secure sum, the encoding's steps are the grid of the noise, too: with the site as the unit of privacy,
and with the record where a round is one step (docs/decisions/0028). Knows plans and numbers; no vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, Group, RoundPlan
from foedus_common.privacy.noise import GRID, NoiseGrid, fine_grid
from foedus_common.protocol.encoding import steps_of_half_range
from foedus_common.protocol.thresholds import thresholds

LEAST_SIGMA = 16
"""Grid units of one site's noise: narrower discrete Gaussians are less like what is accounted."""


def tail(agreed: AgreedPlan) -> float:
    """How many standard deviations no noise of the run exceeds but with probability 2^-40.

    Union bound over every coordinate, release and site, with P(|N| > t sigma) <= 2 exp(-t^2 / 2). Retries count where
    the vector is longest: they may fall in any phase.
    """
    sizes, secure = [agreed.size(phase) for phase in range(len(agreed.plan.phase))], agreed.plan.secure_aggregation
    rounds = sum(phase.rounds * size for phase, size in zip(agreed.plan.phase, sizes, strict=True))
    draws = (rounds + secure.retries * max(sizes)) * secure.max_sites
    return math.sqrt(2 * (math.log(2 * draws) + 40 * math.log(2)))


def half_range(agreed: AgreedPlan, round_plan: RoundPlan, group: Group) -> float:
    """The largest magnitude that a coordinate of an update in `group` can have in this round, noise included.

    Record: a step moves a coordinate by lr / scale * (clamped sum + noise) / divisor, where the sum of clipped
    gradients is clamped to +-divisor * clip (`foedus_common.privacy.noise`). In a linear phase, and with the site as
    the unit: all that a field holds, in units of `noise_grid` or `site_grid`. Without DP: the plan's `update_bound`, to
    which updates are clamped.
    """
    settings, privacy = round_plan.settings, agreed.plan.privacy
    match privacy.unit:
        case "record":
            steps, divisor = settings.steps or 0, privacy.divisor or 1
            step = round_plan.learning_rate(group) / round_plan.scale(group)
            if agreed.linear(round_plan.phase):
                unit = privacy.clip / noise_grid(agreed, round_plan.phase).units
                return step * _field_steps(agreed) * unit / divisor
            grid = noise_grid(agreed, round_plan.phase)
            noise = tail(agreed) * grid.sigma / grid.units * privacy.clip / divisor
            return step * (steps * privacy.clip + math.sqrt(steps) * noise)
        case "site":
            unit = privacy.clip / site_grid(agreed, round_plan.phase).units
            return _field_steps(agreed) * unit / round_plan.scale(group)
        case _:
            return settings.update_bound or 1.0


def honest_sites(agreed: AgreedPlan) -> int:
    """How many honest sites' noises are in every sum that the protocol opens, at least.

    A sum holds at least max(t, m_min) sites of the smallest cohort that the plan allows, of which c may keep their
    noise to themselves. For a site that is in the sum and honest, its own noise is one of them. So it is where the
    organisations that may collude have one site each; a cohort in which they have more is larger, or no site joins it
    (`counted_sites`).
    """
    secure = agreed.plan.secure_aggregation
    return thresholds(secure.size.smallest_sum, secure.colluding).quorum - secure.colluding


def counted_sites(agreed: AgreedPlan, phase: int) -> int:
    """How many honest sites' noises the plan counts in every sum of a phase, so that a site joins no cohort that could
    open a sum with fewer; 0 where it counts a site's own noise alone."""
    return honest_sites(agreed) if agreed.plan.privacy.unit == "site" or agreed.linear(phase) else 0


def noise_grid(agreed: AgreedPlan, phase: int) -> NoiseGrid:
    """In what a phase's sums of gradients are noised, where the record is the unit of privacy.

    In a linear phase: the finest grid in which a clamped sum and `tail` deviations of its noise fit a field, made
    finer by halves for rounding and noise until the clipping bound has at least GRID units. Raises LocalError if the
    fields are too narrow for a sum.
    """
    multiplier = agreed.noise_multipliers[phase]
    if not agreed.linear(phase):
        return fine_grid(multiplier)
    deviations, divisor = tail(agreed), agreed.plan.privacy.divisor or 1
    units = min(GRID, int((_field_steps(agreed) - deviations - 1) / (divisor + deviations * multiplier)))
    if units < 1:
        raise no_room(agreed)
    halvings = ((GRID - 1) // units).bit_length()
    return NoiseGrid(units, math.ceil(multiplier * (units << halvings)), halvings)


def no_room(agreed: AgreedPlan) -> LocalError:
    """What is said of fields that cannot hold the noise in at least LEAST_SIGMA steps."""
    divisor = " or [privacy] divisor" if agreed.plan.privacy.unit == "record" else ""
    return LocalError(
        f"The plan {agreed.plan.run.name!r} leaves no room for its noise in fields of "
        f"{agreed.plan.secure_aggregation.field_bits} bits; raise [secure_aggregation] field_bits, or lower "
        f"max_sites{divisor}."
    )


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

    Each site's share of the noise is the multiplier divided by sqrt(honest). Raises LocalError if the fields are too
    narrow.
    """
    honest = honest_sites(agreed)
    share, deviations = agreed.noise_multipliers[phase] / math.sqrt(honest), tail(agreed)
    units = int((_field_steps(agreed) - deviations) / (1 + deviations * share))
    sigma = math.ceil(share * units)
    if units < 1 or sigma < LEAST_SIGMA:
        raise no_room(agreed)
    return SiteGrid(units, sigma, honest)


def _field_steps(agreed: AgreedPlan) -> int:
    secure = agreed.plan.secure_aggregation
    return steps_of_half_range(secure.field_bits, secure.size.largest_sum)
