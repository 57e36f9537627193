"""Accuracy on held-out rows, from the side that asks: starts the child process that holds the model, reads its answers.

No torch here; the child is `evaluate`.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.tables import parse


@dataclass(frozen=True)
class Example:
    """A held-out row, its label, and the adapter's answer with its softmax probability."""

    text: str
    label: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class OfClass:
    """Held-out rows of one label, and how many of them were answered right."""

    rows: int
    right: int


@dataclass(frozen=True)
class Score:
    """What one adapter reached. `adapter` is the file as it was given; `examples` are the first rows of the data."""

    adapter: str
    rows: int
    right: int
    classes: dict[str, OfClass]
    examples: tuple[Example, ...]

    @property
    def accuracy(self) -> float:
        return self.right / self.rows

    @property
    def standard_error(self) -> float:
        """Of the accuracy, were the rows independent (binomial)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.rows)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)


def parse_score(line: str) -> Score:
    """A score from its line. Raises LocalError for a line that is none, such as a library's word in between."""
    try:
        table = json.loads(line)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise LocalError(f"The evaluation's process said something that is no score: {line[:100]!r}.")
    return parse(Score, table, "the score")


def evaluate(
    model: Path,
    agreed: AgreedPlan,
    adapters: Sequence[Path],
    data: Path,
    *,
    text: str,
    label: str,
    examples: int = 3,
    on_score: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """The score of each adapter file on a CSV of held-out rows with the columns `text` and `label`, in order.

    `on_score` is told each as soon as it is known. Adapters whose factors are equal (the rounds of a head phase) cost
    next to nothing after the first, if they follow one another. Raises LocalError with the child's sentence when what
    was given cannot be evaluated, or when the child died.
    """
    with tempfile.TemporaryDirectory(prefix="foedus-evaluate-") as scratch:
        plan = Path(scratch) / "plan.json"
        plan.write_bytes(agreed.canonical())
        command = [sys.executable, "-m", "foedus_server.release.evaluate", "--model", str(model), "--plan", str(plan)]
        command += ["--data", str(data), "--text", text, "--label", label, "--examples", str(examples), "--"]
        command += map(str, adapters)
        scores = []
        with (
            (Path(scratch) / "errors").open("w+", encoding="utf-8", errors="replace") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8") as child,
        ):
            try:
                for line in child.stdout or ():
                    scores.append(parse_score(line))
                    on_score(scores[-1])
            except BaseException:
                child.kill()
                raise
            if child.wait() != 0:
                errors.seek(0)
                raise _why(child.returncode, errors.read())
        return scores


def _why(code: int, said: str) -> LocalError:
    sentence = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    if code == 2:
        return LocalError(sentence)
    return LocalError(f"The evaluation's process ended with status {code}: {sentence}")
