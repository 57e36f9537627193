"""One file per claim: `benchmarks/results/NAME.json` with claim, value, unit, goal, holds; and a line on the screen."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def report(name: str, claim: str, value: float, goal: float, unit: str = "ratio", *, at_least: bool = True) -> bool:
    """Print the claim with its measured value, write it down, and say whether it holds."""
    holds = value >= goal if at_least else value <= goal
    result = {"claim": claim, "value": round(value, 4), "unit": unit, "goal": goal, "holds": holds}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    verdict = f"goal {'>=' if at_least else '<='} {goal:g}, {'holds' if holds else 'MISSED'}"
    print(f"{name}: {value:.3g} {unit} ({verdict}): {claim}")
    return holds
