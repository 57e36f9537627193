"""Why a plan's two epsilons differ, or do not: what is said to whoever judges them, the same wherever both stand.

Knows plans and `ranges`; the figures themselves are `accounting`'s. Source: docs/privacy.md, "Two epsilons".
"""

from __future__ import annotations

from foedus_common.plan import AgreedPlan
from foedus_common.ranges import honest_sites


def about_epsilons(agreed: AgreedPlan) -> str:
    """What epsilon_central counts beyond epsilon_local, and what has to hold for it; "" for a plan without privacy."""
    plan = agreed.plan
    if not plan.privacy.on:
        return ""
    linear = [number for number in range(len(plan.phase)) if agreed.linear(number)]
    if plan.privacy.unit == "record" and not linear:
        return (
            "Both epsilons are the same: no phase has one step a round, so that what a site sends is not a single "
            "noised sum, and only its own noise may be counted."
        )
    honest, colluding = honest_sites(agreed), plan.secure_aggregation.colluding
    whose = "of each round" if plan.privacy.unit == "site" or len(linear) == len(plan.phase) else f"of {_named(linear)}"
    helpers = _at_most(colluding) if colluding else "no organisation helps it"
    counted = "ledgers count" if plan.privacy.unit == "site" else "the plan's epsilon and all ledgers count"
    reason = (
        f"epsilon_central is smaller because the coordinator sees only totals {whose}, over {honest + colluding} sites "
        f"or more: each {plan.privacy.unit} is hidden by the noise of at least {honest} honest ones. That holds while "
        f"secure aggregation does and {helpers}; {counted} a site's own noise alone."
    )
    if whose == "of each round":
        return reason
    return f"{reason} The other phases have several steps a round; in both epsilons they count so."


def _at_most(colluding: int) -> str:
    if colluding == 1:
        return "at most 1 organisation helps it, with all its sites"
    return f"at most {colluding} organisations help it, with all their sites"


def _named(phases: list[int]) -> str:
    """phase 1; phases 1 and 3."""
    numbers = [str(phase + 1) for phase in phases]
    return f"phase {numbers[0]}" if len(numbers) == 1 else f"phases {', '.join(numbers[:-1])} and {numbers[-1]}"
