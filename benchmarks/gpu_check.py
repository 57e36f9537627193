"""`make gpu-check`: the checks that need an NVIDIA card, and what training takes on it; written to docs/results-gpu.md.

Exit code 2 and one sentence where there is no card; 1 when a check fails, which the page then says.
"""

from __future__ import annotations

import datetime
import importlib.util
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
import transformers

import training_memory
from foedus_common.tasks.memory import MODELS, estimate, shape_of

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results-gpu.md"


def checks(scratch: Path) -> list[tuple[str, str]]:
    """(check, "passed", "failed" or "skipped: why") of every test in tests/gpu."""
    report = scratch / "checks.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "gpu"), f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, check=False)
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if failed else "passed" if skipped is None else f"skipped: {skipped.get('message')}"
        found.append((case.get("name", "").removeprefix("test_").replace("_", " "), outcome))
    return found


def memory(scratch: Path) -> list[tuple[str, str, float, float]]:
    """(model, setting, measured, computed) in MB: the most that torch had allocated in one DP-SGD step."""
    found = []
    for model in ("MiniLM-L6", "BERT base", "BERT large"):
        folder = training_memory.write_model(scratch / model, MODELS[model])
        for name, settings in training_memory.SETTINGS.items():
            if settings.get("base_weights") == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
                continue
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            training_memory.train_one_step(folder, settings | {"tokens_per_batch": 2048}, "cuda:0")
            computed = estimate(shape_of(MODELS[model]), **training_memory.formula(settings), gpu=True).total
            found.append((model, name, torch.cuda.max_memory_allocated() / 1e6, computed / 1e6))
    return found


def page(found: list[tuple[str, str]], measured: list[tuple[str, str, float, float]]) -> str:
    card = torch.cuda.get_device_properties(0)
    failed = sum(outcome == "failed" for _, outcome in found)
    verdict = "All checks passed." if not failed else f"**{failed} checks failed.**"
    if skipped := sum(outcome.startswith("skipped") for _, outcome in found):
        verdict += f" {skipped} were skipped."
    lines = [
        "# Results on a GPU",
        "",
        f"Written by `make gpu-check` on {datetime.date.today()}: {card.name} with {card.total_memory / 1e9:.0f} GB, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}. {verdict}",
        "",
        "| check | outcome |",
        "|---|---|",
        *(f"| {name} | {outcome} |" for name, outcome in found),
        "",
        "Memory that torch had allocated at most, in one DP-SGD step on 48 rows of 128 tokens, 2,048 tokens at a time;",
        "models with random weights. The formula is `foedus_common.tasks.memory`'s; CUDA's own share comes on top.",
        "",
        "| model | setting | measured, MB | computed, MB |",
        "|---|---|---:|---:|",
        *(f"| {model} | {name} | {most:.0f} | {computed:.0f} |" for model, name, most, computed in measured),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    if not torch.cuda.is_available():
        print(f"This machine has no usable GPU, so nothing was checked and {PAGE.relative_to(ROOT)} is as it was.")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        found, measured = checks(Path(scratch)), memory(Path(scratch))
    PAGE.write_text(page(found, measured), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} says what was found.")
    return int(any(outcome == "failed" for _, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
