"""The plan that many tests start from, and a way to change one number of it."""

from __future__ import annotations

import copy
import json
from typing import Any

from foedus_common.plan import AgreedPlan, Part, RunPlan
from foedus_common.tables import parse

TABLE: dict[str, Any] = {
    "run": {"name": "icd-chapters", "purpose": "Suggest the ICD-10 chapter of a coding term."},
    "model": {"name": "all-MiniLM-L6-v2", "sha256": "a" * 64},
    "data": {"name": "coding-terms"},
    "task": {"kind": "text-classification", "labels": ["Eye", "Ear", "Skin"], "max_length": 32},
    "adapter": {"method": "ffa-lora", "rank": 4, "alpha": 8.0, "targets": ["query", "value"]},
    "phase": [
        {
            "train": "head",
            "rounds": 20,
            "steps": 3,
            "sampling_rate": 1.0,
            "learning_rate": 24.0,
            "decay": "linear",
            "budget_share": 0.3,
        },
        {
            "train": "adapter",
            "rounds": 8,
            "steps": 2,
            "sampling_rate": 0.17,
            "learning_rate": 8.0,
            "decay": "linear",
            "budget_share": 0.7,
        },
    ],
    "aggregation": {"optimizer": "fedavgm", "momentum": 0.5, "average_last": 4},
    "secure_aggregation": {"min_sites": 3, "max_sites": 16, "colluding": 1, "field_bits": 21, "retries": 2},
    "privacy": {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip": 1.0, "divisor": 2000},
}


def plan_table(**changes: Any) -> dict[str, Any]:
    """The table with changes such as `privacy__epsilon=3.0` or `phase__1__steps=5`; the value None removes the key."""
    table = copy.deepcopy(TABLE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = table
        for key in parents:
            place = place[int(key)] if key.isdigit() else place.setdefault(key, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return table


def plan_toml(**changes: Any) -> str:
    """The same as the file that an operator writes. JSON values are TOML values."""

    def lines(part: dict[str, Any]) -> str:
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in part.items())

    table = plan_table(**changes)
    phases = "".join(f"[[phase]]\n{lines(phase)}" for phase in table.pop("phase"))
    return "".join(f"[{name}]\n{lines(part)}" for name, part in table.items()) + phases


def run_plan(**changes: Any) -> RunPlan:
    return parse(RunPlan, plan_table(**changes), "the plan")


def agreed_plan(**changes: Any) -> AgreedPlan:
    """The plan as agreed for an encoder with a head of 60 numbers and adapters of 40."""
    plan = run_plan(**changes)
    layouts = {"head": (Part("head", 60),), "adapter": (Part("head", 60), Part("adapter", 40))}
    return AgreedPlan(
        run_id=7,
        plan=plan,
        noise_multipliers=(13.1, 1.0)[: len(plan.phase)] if plan.privacy.on else (),
        trained=tuple(layouts[phase.train] for phase in plan.phase),
        spec_sha256="b" * 64,
        first_adapter_sha256="c" * 64,
    )


def by_site() -> dict[str, Any]:
    """Changes that make the site the plan's unit of privacy; further changes go on top."""
    return {
        "privacy__unit": "site",
        "privacy__divisor": None,
        "phase__0__sampling_rate": None,
        "phase__0__batch_size": 8,
        "phase__1__sampling_rate": None,
        "phase__1__batch_size": 8,
    }
