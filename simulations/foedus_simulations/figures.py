"""From what a coordinator recorded of a run to a report's figures, for the demonstration and for simulations alike.

Pure: takes the plan, the phases as `foedus_server.commands.describe` gives them, and the attempts as `run show` prints
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foedus_common.plan import RunPlan, schedule
from foedus_common.privacy.accounting import GaussianSteps, epsilon, repeated
from foedus_simulations.reports import Round

Attempts = Sequence[Mapping[str, Any]]


def committed(attempts: Attempts) -> Attempts:
    """The attempts that counted, one a round."""
    return [attempt for attempt in attempts if attempt["state"] == "committed"]


def stages(seconds: Mapping[str, float], attempts: Attempts) -> dict[str, float]:
    """Seconds by stage, in order, with "run" taken apart: secure sums, and local training with the wait for it."""
    secure = sum(
        taken for attempt in committed(attempts) for stage, taken in attempt["seconds"].items() if stage != "training"
    )
    run = {"local training": seconds["run"] - secure, "secure aggregation": secure}
    parts = {stage: run if stage == "run" else {stage: taken} for stage, taken in seconds.items()}
    return {name: taken for part in parts.values() for name, taken in part.items()}


def rounds(
    plan: RunPlan, phases: Sequence[Mapping[str, Any]], attempts: Attempts, accuracies: Sequence[float]
) -> tuple[Round, ...]:
    """Each round with its accuracy, the epsilon spent up to it, and its traffic per site."""
    spent = (_epsilon_by_round(plan, phases, view) for view in ("local", "central"))
    played = zip(schedule(plan), committed(attempts), accuracies, *spent, strict=True)
    return tuple(
        Round(
            number=round_plan.index + 1,
            phase=round_plan.settings.train,
            accuracy=accuracy,
            epsilon=local,
            epsilon_central=central,
            bytes_up=attempt["bytes_up"] // len(attempt["cohort"]),
            bytes_down=attempt["bytes_down"] // len(attempt["cohort"]),
        )
        for round_plan, attempt, accuracy, local, central in played
    )


def _epsilon_by_round(plan: RunPlan, phases: Sequence[Mapping[str, Any]], view: str) -> Iterator[float | None]:
    """Epsilon at the plan's delta of everything up to and with each round, none of which was retried."""
    delta = plan.privacy.delta
    if delta is None:
        yield from [None] * plan.rounds
        return
    releases = [0] * len(phases)
    for round_plan in schedule(plan):
        releases[round_plan.phase] += 1
        of_phases = zip(phases, releases, strict=True)
        yield epsilon([repeated(GaussianSteps(**each["release"][view]), count) for each, count in of_phases], delta)


def epsilon_central(shown: Mapping[str, Any], played: Sequence[Round], attempts: Attempts) -> float | None:
    """Spent over the run at any one site: what its rounds cost; if attempts failed, all that `shown`, the plan in
    numbers, lets the run release."""
    failed = any(attempt["state"] == "aborted" for attempt in attempts)
    return shown["epsilon_central"] if failed else played[-1].epsilon_central


def retries(plan: RunPlan, attempts: Attempts) -> str:
    """A sentence on the retries that the plan set aside, and on those that were needed; "" if there is none to say."""
    aborted = sum(attempt["state"] == "aborted" for attempt in attempts)
    if aborted:
        return f"{aborted} attempts failed and were retried; the ledgers count what they released, the curve does not."
    reserved = plan.secure_aggregation.retries
    if not plan.privacy.on or not reserved:
        return ""
    return f"A ledger counts what was released; the plan also reserved {reserved} retries, which no round needed."


def share_of_commonest(labels: Sequence[str]) -> float:
    """What always saying the commonest label would reach."""
    return Counter(labels).most_common(1)[0][1] / len(labels)
