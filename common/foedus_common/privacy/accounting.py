"""What noisy training costs in privacy: epsilon of a list of steps, and the noise that meets a plan's epsilon.

Adjacency is adding or removing one row or, where a plan's unit is the site, zeroing one site's updates. Within a plan
the answer is Google's dp-accounting PLD, pessimistic (Doroshenko et al., PETS 2022); Rényi curves are for composing
plans that are chosen one after another, and as a cross-check. Knows plans and numbers; no ledger, no data.

Delta. Of every delta given here RESERVED_DELTA is set aside: 2^-40 for a noised sum that leaves its field's range
(protocol.md section 3), and 2^-60 for the distance between the noise that is drawn and the continuous Gaussian that is
accounted. Factors of 1 +- 2^-220 a coordinate (`noise.accounted_multiplier`, `gaussian`) add up to nothing; the 2^-240
in total variation that a sample may be off counts 1 + e^epsilon times, and so stays below 2^-60 for 2^60 coordinates at
epsilon 80.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import TYPE_CHECKING, Literal

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, Part, RunPlan
from foedus_common.privacy.noise import GRID, MAX_SIGMA, MIN_SIGMA, SMOOTHING, accounted_multiplier
from foedus_common.ranges import SiteGrid, honest_sites, no_room, noise_grid, site_grid

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# dp_accounting is imported where it is called: it takes two seconds, and most commands never account.

Curve = tuple[float, ...]

ORDERS: tuple[int, ...] = (*range(2, 33), 40, 48, 64, 96, 128, 256, 512)
"""Rényi orders at which curves are kept: whole ones, where the curve of a sampled Gaussian has a closed form."""

RESERVED_DELTA = 2.0**-40 + 2.0**-60

INTERVAL = 1e-4
"""Width of the PLD's buckets, in nats; wider for an epsilon beyond 16. Pessimistic at any width (connect the dots)."""

BEYOND_PLD = 250.0
"""An epsilon above which the Rényi bound is answered instead: such a PLD takes gigabytes, and a stranger's plan may
ask for it."""


@dataclass(frozen=True)
class GaussianSteps:
    """`steps` sums over a Poisson sample of the rows, each with Gaussian noise.

    noise_multiplier: accounted (`noise.accounted_multiplier`), in units of the sensitivity. sampling_rate: in (0, 1].
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int


View = Literal["row", "local", "central"]
"""Of whom a cost tells, and against whom. row: one row of a site's data, by this site's own noise; what ledgers charge.
local: the plan's unit of privacy, by this site's own noise, as if secure aggregation were broken. central: the plan's
unit, while secure aggregation holds and at most `colluding` organisations help the coordinator."""


def promised_view(plan: RunPlan) -> View:
    """Of which cost a plan states its epsilon. A record's does not rest on secure aggregation; a site's has to."""
    return "central" if plan.privacy.unit == "site" else "local"


def event_of_phase(agreed: AgreedPlan, phase: int, view: View = "row") -> GaussianSteps:
    """What one release in a phase (number from 0) costs; all its rounds cost the same.

    Raises LocalError for a plan without privacy, or whose noise cannot be drawn.
    """
    if agreed.plan.privacy.unit == "record" and not noise_grid(agreed, phase).drawable:
        if agreed.linear(phase):
            raise no_room(agreed)
        raise LocalError(f"The plan {agreed.plan.run.name!r} has less noise in a phase than can be drawn, or more.")
    return _event(agreed, phase, view)


def _event(agreed: AgreedPlan, phase: int, view: View) -> GaussianSteps:
    """The same, whether the noise can be drawn or not.

    Where the record is the unit the views differ in linear phases only: a round of several steps is not linear in its
    noise, so that no sum of noises is claimed. In a linear one the sum that is opened has the noise of all its honest
    sites, and one row moves it no further than it moves its own site's.
    """
    settings = agreed.plan.phase[phase]
    match agreed.plan.privacy.unit:
        case "record":
            noises = honest_sites(agreed) if view == "central" and agreed.linear(phase) else 1
            worth = accounted_multiplier(noise_grid(agreed, phase), agreed.size(phase), noises)
            return GaussianSteps(worth, settings.sampling_rate or 0.0, settings.steps or 0)
        case "site":
            return GaussianSteps(_site_multiplier(site_grid(agreed, phase), view), 1.0, 1)
        case _:
            raise LocalError(f"The plan {agreed.plan.run.name!r} has no privacy that could be accounted for.")


def _site_multiplier(grid: SiteGrid, view: View) -> float:
    """Noise over distance of neighbours: a clipped update's from zero or, for one row, from any other clipped update.

    The sum of `honest` discrete Gaussians is within a factor of 1 +- e^-2000 of one with the sum of their variances (as
    in `privacy.gaussian`, with t >= 16^2 / 2); whatever other sites add is post-processing.
    """
    variance = grid.sigma**2 * (grid.honest if view == "central" else 1) - SMOOTHING
    return math.sqrt(variance) / (grid.units * (2 if view == "row" else 1))


def events_of(agreed: AgreedPlan, view: View = "row") -> list[GaussianSteps]:
    """What the whole run may cost, its retries included."""
    return _with_retries(agreed, [event_of_phase(agreed, phase, view) for phase in range(len(agreed.plan.phase))], view)


def _with_retries(agreed: AgreedPlan, of_release: Sequence[GaussianSteps], view: View) -> list[GaussianSteps]:
    """Rounds per phase, and the retries where they cost most: which phase that is may differ by view.

    A ledger lets no retry take a run beyond what it is charged for, which is the row's view. Nothing holds retries to
    what the central view expects, so there the costliest phase is found by what the whole run costs.
    """
    phases, delta = range(len(of_release)), agreed.plan.privacy.delta

    def all_in(costliest: int) -> list[GaussianSteps]:
        retries = [agreed.plan.secure_aggregation.retries * (phase == costliest) for phase in phases]
        return [repeated(of_release[p], agreed.plan.phase[p].rounds + retries[p]) for p in phases]

    if view == "central" and any(agreed.linear(phase) for phase in phases) and delta is not None:
        return max((all_in(phase) for phase in phases), key=lambda events: epsilon(events, delta))
    return [repeated(of_release[phase], agreed.releases(phase)) for phase in phases]


@dataclass(frozen=True)
class Epsilons:
    """For a plan's unit of privacy, at its delta: what reports give. See `View`."""

    local: float
    central: float


def epsilons(agreed: AgreedPlan, releases: Sequence[int] | None = None) -> Epsilons | None:
    """Of so many releases per phase, or else of all that the run may make; None for a plan without privacy."""
    delta = agreed.plan.privacy.delta
    if not agreed.plan.privacy.on or delta is None:
        return None

    def of(view: View) -> float:
        if releases is None:
            return epsilon(events_of(agreed, view), delta)
        events = [repeated(event_of_phase(agreed, phase, view), count) for phase, count in enumerate(releases)]
        return epsilon(events, delta)

    return Epsilons(of("local"), of("central"))


def repeated(event: GaussianSteps, times: int) -> GaussianSteps:
    return GaussianSteps(event.noise_multiplier, event.sampling_rate, event.steps * times)


def epsilon(events: Sequence[GaussianSteps], delta: float) -> float:
    """Epsilon of all events together at `delta`, never below the truth; 0 for no steps, infinity if nothing holds.

    Raises LocalError for a delta that the reserve uses up.
    """
    return _epsilon(_merged(events), _usable(delta), INTERVAL)


def epsilon_of_rdp(curve: Sequence[float], delta: float) -> float:
    """Epsilon at `delta` of a Rényi curve over ORDERS, by the best order; 0 for a curve of zeros.

    Canonne, Kamath, Steinke 2020, proposition 12. Raises LocalError for a delta that the reserve uses up.
    """
    usable = _usable(delta)
    return _converted(curve, usable) if any(curve) else 0.0


def rdp(events: Sequence[GaussianSteps]) -> Curve:
    """The Rényi curve over ORDERS of all events together (Mironov, Talwar, Zhang 2019). Curves add up."""
    curves = [_rdp(event) for event in _merged(events)]
    return tuple(math.fsum(values) for values in zip(*curves, strict=True)) if curves else (0.0,) * len(ORDERS)


def rdp_budget(epsilon_cap: float, delta: float) -> tuple[int, float]:
    """(index into ORDERS, budget at that order) of the Rényi filter that keeps everything within (cap, delta)-DP.

    As long as the curves of adaptively chosen plans add up to no more than the budget at this one order, all of them
    together are within the cap (Feldman, Zrnic: Individual Privacy Accounting via a Rényi Filter, NeurIPS 2021,
    theorem 3.1). The order must not depend on data or on what was released: it is the one that admits the largest
    unsampled Gaussian, and follows from cap and delta alone. The budget is negative if no order admits anything.
    """
    usable = _usable(delta)
    budgets = [epsilon_cap - _conversion(order, usable) for order in ORDERS]
    best = max(range(len(ORDERS)), key=lambda index: budgets[index] / ORDERS[index])
    return best, budgets[best]


def gaussian_epsilon(rho: float, delta: float) -> float:
    """Epsilon at `delta` of one unsampled Gaussian whose curve is rho * order (Balle, Wang 2018, theorem 8)."""
    from dp_accounting import get_epsilon_gaussian

    return float(get_epsilon_gaussian(1 / math.sqrt(2 * rho), _usable(delta))) if rho > 0 else 0.0


def calibrate(plan: RunPlan, sizes: Sequence[int]) -> tuple[float, ...]:
    """One noise multiplier per phase, so that rounds and retries together just meet the plan's epsilon from below.

    Which epsilon that is says `promised_view`. sizes: d per phase. A phase gets its share of rho: its multiplier is
    proportional to sampling_rate * sqrt(steps * rounds / share), the zCDP of a Gaussian scaled by amplification (where
    the site is the unit, of one step without sampling); the factor is solved by PLD. Multipliers are whole grid units.
    The result lies within 0.2 % of epsilon and never closer than 1e-6 of it, so that the arithmetic of another machine
    cannot find it above. Returns () for a plan without privacy; raises LocalError if no noise in the sampler's range
    meets the plan, or its fields cannot hold it.
    """
    target, delta = plan.privacy.epsilon, plan.privacy.delta
    if not plan.privacy.on or target is None or delta is None:
        return ()
    usable, view = _usable(delta), promised_view(plan)

    def cost(factor: float, interval: float) -> float:
        agreed = _with_noise(plan, sizes, factor)
        of_release = [_event(agreed, phase, view) for phase in range(len(plan.phase))]
        return _epsilon(_merged(_with_retries(agreed, of_release, view)), usable, interval)

    factor = _solve(lambda candidate: cost(candidate, 10 * INTERVAL), target, 1 / target)
    factor = _solve(lambda candidate: cost(candidate, INTERVAL), target, factor)
    solved = _with_noise(plan, sizes, factor)
    events_of(solved, view)  # refuses what cannot be drawn
    return solved.noise_multipliers


def _with_noise(plan: RunPlan, sizes: Sequence[int], factor: float) -> AgreedPlan:
    """The plan as it would be agreed with this factor on every phase's noise; only its accounting is meaningful."""
    multipliers = []
    for phase in plan.phase:
        steps = 1 if plan.privacy.unit == "site" else phase.steps or 0
        share = steps * phase.rounds / (phase.budget_share or 1.0)
        sigma = math.ceil(factor * (phase.sampling_rate or 1.0) * math.sqrt(share) * GRID)
        if sigma > MAX_SIGMA:
            raise LocalError(
                f"The plan {plan.run.name!r} needs noise beyond {MAX_SIGMA / GRID:.0f} times the clipping bound; "
                "raise [privacy] epsilon, or lower steps, rounds or sampling_rate."
            )
        multipliers.append(max(sigma, MIN_SIGMA) / GRID)
    layout = tuple((Part("head", size),) for size in sizes)
    return AgreedPlan(1, plan, tuple(multipliers), layout, spec_sha256="", first_adapter_sha256="")


def _solve(cost: Callable[[float], float], target: float, factor: float) -> float:
    """A factor whose cost is just below the target: the secant method on logarithms, where cost is nearly a line."""
    ceiling, aim = math.log(target) + math.log1p(-1e-6), math.log(target) + math.log1p(-1e-3)
    place, slope = math.log(factor), -1.0
    value = math.log(cost(factor))
    for _ in range(40):
        if aim - 1e-3 <= value <= ceiling:
            return math.exp(place)
        step = min(1.0, max(-1.0, (aim - value) / slope))
        next_value = math.log(max(cost(math.exp(place + step)), 1e-9))
        if abs(step) > 1e-6:
            slope = min(-0.2, (next_value - value) / step)
        place, value = place + step, next_value
    while value > ceiling:
        place += 1e-3
        value = math.log(cost(math.exp(place)))
    return math.exp(place)


def _usable(delta: float) -> float:
    if delta <= 2 * RESERVED_DELTA:
        raise LocalError(f"A delta of {delta:g} is too small to account for; give one above {2 * RESERVED_DELTA:.0e}.")
    return delta - RESERVED_DELTA


def _conversion(order: float, delta: float) -> float:
    """What turning a Rényi bound at `order` into epsilon adds (Canonne, Kamath, Steinke 2020, proposition 12)."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def _merged(events: Iterable[GaussianSteps]) -> tuple[GaussianSteps, ...]:
    """The same events with equal ones counted together and all unsampled ones as one Gaussian, which is exact."""
    precision = math.fsum(event.steps / event.noise_multiplier**2 for event in events if event.sampling_rate == 1)
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        if event.sampling_rate < 1 and event.steps:
            counts[event.noise_multiplier, event.sampling_rate] += event.steps
    sampled = [GaussianSteps(*key, steps=counts[key]) for key in sorted(counts)]
    return (*sampled, GaussianSteps(1 / math.sqrt(precision), 1.0, 1)) if precision > 0 else tuple(sampled)


@lru_cache(maxsize=256)
def _epsilon(events: tuple[GaussianSteps, ...], delta: float, interval: float) -> float:
    if not events:
        return 0.0
    bound = _converted(rdp(events), delta)
    if bound > BEYOND_PLD:
        return bound
    width = interval * max(1.0, bound / 16)
    composed = reduce(lambda all_before, one: all_before.compose(one), (_losses(event, width) for event in events))
    return max(0.0, float(composed.get_epsilon_for_delta(delta)))


def _losses(event: GaussianSteps, width: float) -> PrivacyLossDistribution:
    step = _losses_of_step(event.noise_multiplier, event.sampling_rate, width)
    return step.self_compose(event.steps) if event.steps > 1 else step


@lru_cache(maxsize=4)
def _losses_of_step(noise_multiplier: float, sampling_rate: float, width: float) -> PrivacyLossDistribution:
    """Kept, for it takes longer than composing it, and a ledger asks for the same step again and again."""
    from foedus_common.privacy.loss import losses_of_step

    return losses_of_step(noise_multiplier, sampling_rate, width)


@lru_cache(maxsize=256)
def _rdp(event: GaussianSteps) -> Curve:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    step = GaussianDpEvent(event.noise_multiplier)
    accountant = RdpAccountant(ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(PoissonSampledDpEvent(event.sampling_rate, step), event.steps)
    return tuple(float(value) for value in accountant.rdp)


def _converted(curve: Sequence[float], usable_delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    return float(compute_epsilon(ORDERS, curve, usable_delta)[0])
