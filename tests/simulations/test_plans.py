"""The plans that come with the program are whole, and mean what their comments say."""

from __future__ import annotations

import dataclasses
import tomllib

from foedus_common.plan import AgreedPlan, Part, RunPlan, schedule
from foedus_common.privacy.accounting import calibrate, epsilons
from foedus_common.ranges import noise_grid, site_grid
from foedus_common.tables import parse
from foedus_common.terms import field_layout
from foedus_simulations.editions import PLANS


def agreed_head(name: str) -> AgreedPlan:
    """The plan with its noise solved for a head of twenty labels over MiniLM's features."""
    text = (PLANS / name).read_text().replace("MODEL", "a" * 64)
    table = tomllib.loads(text)
    table["task"]["labels"] = [f"chapter {number}" for number in range(20)]
    plan = parse(RunPlan, table, "the plan")
    size = 20 * 385
    unsolved = AgreedPlan(1, plan, (1.0,), ((Part("head", size),),), spec_sha256="", first_adapter_sha256="")
    return dataclasses.replace(unsolved, noise_multipliers=calibrate(plan, (size,)))


def test_the_plan_of_one_step_a_round_has_a_smaller_central_epsilon() -> None:
    agreed = agreed_head("icd-chapters-one-step.toml")
    found = epsilons(agreed)
    assert found is not None
    assert 7.9 < found.local < 8
    assert 5.2 < found.central < 5.3  # as docs/privacy.md states it
    assert noise_grid(agreed, 0).units == 32  # as the plan's comment says


def test_the_plan_for_thirty_practices_hides_each_of_them() -> None:
    agreed = agreed_head("icd-chapters-by-site.toml")
    found = epsilons(agreed)
    assert found is not None
    assert 7.9 < found.central < 8 < found.local
    assert site_grid(agreed, 0).honest == 13
    assert field_layout(agreed, schedule(agreed.plan)[0]).size < 27_000
