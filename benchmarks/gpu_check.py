"""`make gpu-check`: the checks that need an NVIDIA card, and what training takes on it; written to docs/results-gpu.md.

Exit code 2 and one sentence where there is no card; 1 when a check fails, which the page then says. A model that does
not fit the card is left out, which it says too.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import training_memory
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.tasks.memory import LENGTH, MODELS, estimate, shape_of
from foedus_common.tasks.physical_batches import ON_CPU
from foedus_common.tasks.text_classification import TextClassifier
from privacy_audit.membership import rows_apart
from privacy_audit.specimens import random_adapter

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results-gpu.md"

ROWS = 256
TOKENS = {"tokens_per_batch": ON_CPU}
LIMIT = 1e-9
"""Clips: sums of float64."""

EVERY, THRIFTY = tuple(training_memory.SETTINGS), ("bfloat16, checkpointing", "4bit, checkpointing")
MEASURED = [
    ("MiniLM-L6", ("query", "value"), EVERY),
    ("BERT base", ("query", "value"), EVERY),
    ("BERT large", ("query", "value"), EVERY),
    ("Llama 3.2 1B", ("q_proj", "v_proj"), THRIFTY),
    ("Llama 3.1 8B", ("q_proj", "v_proj"), THRIFTY),
]
"""Model, targets, settings."""


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


class Measured(NamedTuple):
    """measured, computed: bytes that torch had allocated at most in a step, and by the formula. rows_a_second: of
    LENGTH tokens, in a step after the first. apart: how far a sum over rows is from what they give singly, in clips."""

    model: str
    setting: str
    measured: float
    computed: float
    rows_a_second: float
    apart: float


class Missing(NamedTuple):
    """What was not measured, and why; failed: by a fault, not for want of room or of a package."""

    what: str
    why: str
    failed: bool = False


def training(scratch: Path) -> Iterator[Measured | Missing]:
    """What DP-SGD takes of the card, for models with random weights."""
    for model, targets, chosen in MEASURED:
        written = 2 * shape_of(MODELS[model]).parameters
        if 1.1 * written > min(torch.cuda.mem_get_info()[0], shutil.disk_usage(scratch).free):
            yield Missing(model, f"its {written / 1e9:.0f} GB do not fit the card, or the disk for temporary files")
            continue
        folder = training_memory.write_model(scratch / "model", MODELS[model], "cuda:0", torch.bfloat16)
        for name in chosen:
            yield try_setting(model, name, folder, targets)
            gc.collect()  # hooks and modules hold each other
            torch.cuda.empty_cache()
        shutil.rmtree(folder)


def try_setting(model: str, name: str, folder: Path, targets: tuple[str, ...]) -> Measured | Missing:
    what, settings = f"{model}, {name}", training_memory.SETTINGS[name]
    if settings.get("base_weights") == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        return Missing(what, "bitsandbytes is not installed")
    try:
        return measure(model, name, *training_memory.agree(folder, settings | TOKENS, "cuda:0", targets))
    except (RuntimeError, LocalError) as error:  # loading in four bits tells of memory in a LocalError
        if "out of memory" in str(error):
            return Missing(what, "it does not fit the card")
        return Missing(what, str(error).splitlines()[0], failed=True)


def measure(model: str, setting: str, classifier: TextClassifier, agreed: AgreedPlan) -> Measured:
    torch.cuda.reset_peak_memory_stats()
    training_memory.train_one_step(classifier, agreed, ROWS)
    most = torch.cuda.max_memory_allocated()
    begun = time.perf_counter()
    training_memory.train_one_step(classifier, agreed, ROWS)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    formula = training_memory.formula(training_memory.SETTINGS[setting])
    computed = estimate(shape_of(MODELS[model]), **formula, gpu=True).total
    some = [(" ".join(f"w{7 * row + word}" for word in range(1 + 3 * row)), "ab"[row % 2]) for row in range(20)]
    apart = rows_apart(classifier, agreed, random_adapter(classifier, 0), some)
    return Measured(model, setting, most, computed, ROWS / seconds, apart)


def told(each: Measured | Missing) -> str:
    if isinstance(each, Missing):
        return f"{each.what}: not measured, {each.why}"
    speed = f"{each.rows_a_second:,.0f} rows a second"
    return f"{each.model}, {each.setting}: {each.measured / 1e9:.2f} GB, {speed}, {each.apart:.0e} clips apart"


def failures(found: list[tuple[str, str]], results: list[Measured | Missing]) -> int:
    """How many tests failed, and settings that broke or let rows move one another."""
    settings = sum(each.failed if isinstance(each, Missing) else not each.apart < LIMIT for each in results)
    return sum(outcome == "failed" for _, outcome in found) + settings


def page(found: list[tuple[str, str]], results: list[Measured | Missing]) -> str:
    card = torch.cuda.get_device_properties(0)
    measured = [each for each in results if isinstance(each, Measured)]
    missing = [each for each in results if isinstance(each, Missing)]
    failed = failures(found, results)
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
        f"One DP-SGD step on {ROWS} rows of {LENGTH} tokens, {ON_CPU:,} tokens at a time, models with random weights:",
        "the memory that torch had allocated at most (the formula is `foedus_common.tasks.memory`'s; CUDA's own share",
        "comes on top), the speed, and how far the clipped sum over 20 rows of many lengths is from what they give one",
        f"by one: what a row adds must not depend on the others, so more than {LIMIT:.0e} fails.",
        "",
        "| model | setting | measured, GB | computed, GB | rows a second | apart, clips |",
        "|---|---|---:|---:|---:|---:|",
        *(
            f"| {each.model} | {each.setting} | {each.measured / 1e9:.2f} | {each.computed / 1e9:.2f} "
            f"| {each.rows_a_second:,.0f} | {each.apart:.0e} |"
            for each in measured
        ),
        *(f"\n{told(each)}." for each in missing),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    if not torch.cuda.is_available():
        print(f"This machine has no usable GPU, so nothing was checked and {PAGE.relative_to(ROOT)} is as it was.")
        return 2
    try:
        torch.ones(1, device="cuda:0").add_(1)
    except RuntimeError as error:  # a card that this torch was not built for, or that is full
        print(f"This machine's GPU cannot be used: {str(error).splitlines()[0]}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        found = checks(Path(scratch))
        results: list[Measured | Missing] = []
        for each in training(Path(scratch)):
            print(told(each), flush=True)
            results.append(each)
    PAGE.write_text(page(found, results), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} says what was found.")
    return int(failures(found, results) > 0)


if __name__ == "__main__":
    sys.exit(main())
