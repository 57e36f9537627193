"""What is left of released vectors once the gradients are taken out, tested for being the stated noise and only that.

The gradients come from `reference`; the rest, divided by noise multiplier * clip, has to be standard normal, the same
in every tensor, independent of the gradients, of other coordinates, steps and rounds, and there on empty batches too.
The distributions of all statistics are known exactly: correlations are divided by the norm of the part that is
conditioned on (sum a_i b_i / |a| is standard normal given a, if b is), so there is nothing asymptotic but the
Kolmogorov-Smirnov test, and no threshold is tuned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.ranges import noise_grid
from foedus_common.terms import field_layout
from privacy_audit.reference import GRID, Reals, ReferenceSum, step_factors, tensor_slices
from privacy_audit.specimens import Release, Specimen
from privacy_audit.verdicts import Finding, worst_of

LAGS = 512
"""Distances up to which all are tested; between coordinates, beyond them those between the beginnings of tensors."""


@dataclass(frozen=True)
class Residuals:
    """The steps of one phase. noise: (steps, d), standardised; signal: the reference's sums, (steps, d); off_grid: how
    far the noised sums lie from whole grid units, in units, (steps, d); sizes: rows drawn, (steps,)."""

    noise: Reals
    signal: Reals
    off_grid: Reals
    sizes: Sequence[int]
    tensors: Mapping[str, slice]
    rate: float
    rows: int
    steps_due: int


def findings(phases: Sequence[Residuals]) -> list[Finding]:
    """Every test of what one run released."""
    tensors = [(phase, place) for phase in phases for place in phase.tensors.values()]
    return [
        _all_steps(phases),
        _on_grid(phases),
        _sampling(phases),
        _mean(tensors),
        _variance(tensors),
        _variance_step_by_step(phases),
        _variance_on_empty_batches(phases),
        _distribution(phases),
        _tails(phases),
        _independent_of_gradients(tensors),
        _independent_of_every_step(phases),
        _independent_over_time(phases),
        _independent_over_coordinates(phases),
    ]


def residuals(specimen: Specimen, released: Sequence[Release]) -> list[Residuals]:
    """Takes the gradients out of a run's releases, step by step; one of each phase."""
    phases = range(len(specimen.agreed.plan.phase))
    return [_of_phase(specimen, [each for each in released if each.round_plan.phase == phase]) for phase in phases]


def _of_phase(specimen: Specimen, released: Sequence[Release]) -> Residuals:
    agreed, rows, settings = specimen.agreed, specimen.trainer.rows, released[0].round_plan.settings
    phase, clip = released[0].round_plan.phase, agreed.plan.privacy.clip
    whole = noise_grid(agreed, phase).units if agreed.linear(phase) else GRID
    noise, signal, off_grid, sizes = [], [], [], []
    for release in released:
        factors = step_factors(agreed, release.round_plan)
        gradients = ReferenceSum(specimen.classifier, release.adapter, rows, clip, release.round_plan)
        begins = [step.vector for step in release.steps]
        sent, exact = ([*begins[1:], release.start + update] for update in (release.update, release.exact))
        for number, step in enumerate(release.steps):
            signal.append(gradients(step.vector, step.rows))
            left = (step.vector - sent[number]) / factors - signal[-1]
            encodings = 1 if number == len(begins) - 1 else 0
            noise.append(left / deviations(agreed, release.round_plan, 1, encodings))
            units = (step.vector - exact[number]) / factors * (whole / clip)
            off_grid.append(np.abs(units - np.rint(units)))
            sizes.append(len(step.rows))
    shape = (len(sizes), agreed.size(phase))
    return Residuals(
        noise=np.reshape(noise, shape),
        signal=np.reshape(signal, shape),
        off_grid=np.reshape(off_grid, shape),
        sizes=sizes,
        tensors=tensor_slices(specimen.classifier, settings.train),
        rate=settings.sampling_rate or 0.0,
        rows=len(rows),
        steps_due=(settings.steps or 0) * len(released),
    )


def deviations(agreed: AgreedPlan, round_plan: RoundPlan, sums: int, encodings: int) -> Reals:
    """The stated standard deviation of `sums` noised sums together, (d,), of which `encodings` were encoded after.

    The encoding rounds at random: a fraction f of its step, itself uniform, has the variance E[f (1 - f)] = 1/6. What
    is one step is encoded as it is.
    """
    if agreed.linear(round_plan.phase):
        encodings = 0
    noise = agreed.noise_multipliers[round_plan.phase] * agreed.plan.privacy.clip
    layout = field_layout(agreed, round_plan)
    steps = np.concatenate([np.full(length, scale / layout.half_range) for length, scale in layout.segments])
    rounding = steps / step_factors(agreed, round_plan)
    return np.sqrt(sums * noise**2 + encodings * rounding**2 / 6)


# --- Tests ---


Place = tuple[Residuals, slice]


def _all_steps(phases: Sequence[Residuals]) -> Finding:
    made, due = (sum(len(p.sizes) for p in phases), sum(p.steps_due for p in phases))
    return Finding("every step is made", f"{made} of {due} steps", float(made == due))


def _on_grid(phases: Sequence[Residuals]) -> Finding:
    furthest = max(float(phase.off_grid.max(initial=0.0)) for phase in phases)
    return Finding("sums are whole grid units", f"at most {furthest:.1g} units off", float(furthest < 1e-3))


def _sampling(phases: Sequence[Residuals]) -> Finding:
    """Poisson sampling: rows drawn and empty batches are binomial."""
    p_values, empty, drawn = [], 0, 0
    for phase in phases:
        steps, none = len(phase.sizes), sum(size == 0 for size in phase.sizes)
        p_values.append(_binomial(sum(phase.sizes), steps * phase.rows, phase.rate))
        p_values.append(_binomial(none, steps, (1 - phase.rate) ** phase.rows))
        empty, drawn = empty + none, drawn + sum(phase.sizes)
    return worst_of("rows drawn at the stated rate", p_values, f"{drawn} rows, {empty} empty batches")


def _mean(tensors: Sequence[Place]) -> Finding:
    scores = [float(part.sum() / np.sqrt(part.size)) for part in _noises(tensors)]
    return worst_of("mean 0 in every tensor", *_normal(scores))


def _variance(tensors: Sequence[Place]) -> Finding:
    parts = list(_noises(tensors))
    parts.append(np.concatenate(parts))
    ratios = [float(np.sqrt((part**2).mean())) for part in parts]
    text = f"{min(ratios):.3f} to {max(ratios):.3f} of sigma"
    return worst_of("sigma in every tensor", [_chi_square(part) for part in parts], text)


def _variance_step_by_step(phases: Sequence[Residuals]) -> Finding:
    steps = [step for phase in phases for step in phase.noise]
    ratios = [float(np.sqrt((step**2).mean())) for step in steps]
    text = f"{min(ratios, default=0):.2f} to {max(ratios, default=0):.2f} of sigma"
    return worst_of("sigma in every step", [_chi_square(step) for step in steps], text)


def _variance_on_empty_batches(phases: Sequence[Residuals]) -> Finding:
    chosen = [phase.noise[np.array(phase.sizes, int) == 0] for phase in phases]
    values = np.concatenate([part.ravel() for part in chosen])
    text = f"{np.sqrt((values**2).mean()) if values.size else 1.0:.3f} of sigma"
    return Finding("sigma on empty batches", text, _chi_square(values))


def _distribution(phases: Sequence[Residuals]) -> Finding:
    tests = [stats.kstest(phase.noise.ravel(), "norm") for phase in phases if phase.noise.size]
    furthest = max((float(test.statistic) for test in tests), default=0.0)
    return worst_of("Gaussian (Kolmogorov-Smirnov)", [float(t.pvalue) for t in tests], f"at most {furthest:.4f} apart")


def _tails(phases: Sequence[Residuals]) -> Finding:
    """The largest of n standard normal magnitudes is below x with probability (1 - 2 sf(x))^n: neither cut off nor
    heavy."""
    values = np.concatenate([np.abs(phase.noise).ravel() for phase in phases])
    largest = float(values.max(initial=0.0))
    log_below = values.size * np.log1p(-min(1.0, 2 * stats.norm.sf(largest)))
    p_value = 2 * float(min(np.exp(log_below), -np.expm1(log_below)))
    return Finding("tails", f"{values.size} numbers up to {largest:.1f} sigma", min(1.0, p_value))


def _independent_of_gradients(tensors: Sequence[Place]) -> Finding:
    """Each step's noise along its own gradient, tensor by tensor: standard normal, since the gradient came first."""
    scores = []
    for phase, place in tensors:
        norms = np.linalg.norm(phase.signal[:, place], axis=1)
        along = (phase.noise[:, place] * phase.signal[:, place]).sum(axis=1)[norms > 0] / norms[norms > 0]
        if along.size:
            scores.append(float(along.sum() / np.sqrt(along.size)))
    return worst_of("independent of the gradients", *_normal(scores))


def _independent_of_every_step(phases: Sequence[Residuals]) -> Finding:
    """Every pair of steps, over the coordinates that both have: those of the head come first in every phase."""
    scores: list[Reals] = []
    for number, later in enumerate(phases):
        for earlier in phases[: number + 1]:
            shared = min(later.noise.shape[1], earlier.noise.shape[1])
            norms = np.linalg.norm(earlier.noise[:, :shared], axis=1)
            pairs = np.tile(norms > 0, (len(later.noise), 1))
            if later is earlier:
                pairs = np.tril(pairs, -1)
            along = later.noise[:, :shared] @ earlier.noise[:, :shared].T
            scores.append((along / np.where(norms > 0, norms, 1.0))[pairs])
    return worst_of("fresh in every pair of steps", *_normal(np.concatenate(scores)))


def _independent_over_time(phases: Sequence[Residuals]) -> Finding:
    """Steps at each distance together, where a pair by itself would show little: noise that keeps some of the last."""
    scores = [_apart(phase.noise, lag) for phase in phases for lag in range(1, min(len(phase.noise), LAGS))]
    return worst_of("fresh from step to step", *_normal(scores))


def _independent_over_coordinates(phases: Sequence[Residuals]) -> Finding:
    scores = []
    for phase in phases:
        width = phase.noise.shape[1]
        starts = [place.start for place in phase.tensors.values()]
        between = {second - first for first in starts for second in starts if second > first}
        lags = sorted(between | set(range(1, min(width // 2, LAGS) + 1)))
        scores += [_apart(phase.noise.T, lag) for lag in lags]
    return worst_of("fresh in every coordinate", *_normal(scores))


def _apart(noise: Reals, lag: int) -> float:
    """A standard normal score of rows and those `lag` after them: rows of even blocks of `lag` are conditioned on, each
    with the one that far behind. 0 where the former are zero."""
    first = np.arange(len(noise) - lag)
    first = first[(first // lag) % 2 == 0]
    norm = float(np.linalg.norm(noise[first]))
    return float((noise[first] * noise[first + lag]).sum()) / norm if norm > 0 else 0.0


# --- Their p-values ---


def _noises(tensors: Sequence[Place]) -> Iterator[Reals]:
    yield from (phase.noise[:, place].ravel() for phase, place in tensors)


def _normal(scores: Sequence[float] | Reals) -> tuple[list[float], str]:
    """Two-sided p-values of standard normal scores, and the largest in words."""
    magnitudes = np.abs(np.array(scores))
    said = f"{len(scores)} scores up to {magnitudes.max(initial=0.0):.1f}"
    return (2 * stats.norm.sf(magnitudes)).tolist(), said


def _chi_square(values: Reals) -> float:
    """Two-sided p-value of a sum of squares of standard normal numbers."""
    total, size = float((values**2).sum()), values.size
    return min(1.0, 2 * float(min(stats.chi2.cdf(total, size), stats.chi2.sf(total, size)))) if size else 1.0


def _binomial(count: int, trials: int, probability: float) -> float:
    return float(stats.binomtest(count, trials, min(1.0, probability)).pvalue) if trials else 1.0
