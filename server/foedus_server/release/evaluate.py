"""Child process: the accuracy of adapters on held-out rows that the consortium owns.

    python -m foedus_server.release.evaluate --model DIR --plan AGREED.json --data ROWS.csv
        --text note --label chapter [--examples 3] ADAPTER.safetensors ...

Loads the model once and prints one line of JSON per adapter (`evaluation.Score`), as soon as it is known. All
arithmetic is in float32, so that a figure does not depend on the machine's instructions. Exit code 2 and one sentence
on standard error when what was given cannot be evaluated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from foedus_common.adapters import Tensors, read_adapter
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, parse_agreed_plan
from foedus_common.tasks.head import HEAD
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.release.evaluation import Example, OfClass, Score
from foedus_server.release.held_out import held_out_rows


class HeldOut:
    """Held-out rows under one model: encoded once, their features kept while an adapter's factors stay the same."""

    def __init__(self, classifier: TextClassifier, agreed: AgreedPlan, rows: Sequence[tuple[str, str]]) -> None:
        if classifier.spec.digest().hex() != agreed.spec_sha256:
            raise LocalError("The model does not give the adapter that the plan describes; compare the model's hash.")
        self.classifier = classifier
        self.labels = agreed.plan.task.labels
        self._rows = rows
        self._encoded = classifier.encode(rows)

    def probabilities(self, adapter: Tensors) -> torch.Tensor:
        """Softmax of the head's scores, float32 (n, labels)."""
        features = self.classifier.features(adapter, self._encoded)
        return torch.softmax(features @ torch.from_numpy(adapter[HEAD]).to(features.device).T, dim=1).cpu()

    def score(self, name: str, adapter: Tensors, examples: int = 3) -> Score:
        """What the adapter reaches; `name` is repeated in the score."""
        likeliest = self.probabilities(adapter).max(dim=1)
        predicted = [self.labels[index] for index in likeliest.indices.tolist()]
        classes = {}
        for label in self.labels:
            answers = [said for said, (_, true) in zip(predicted, self._rows, strict=True) if true == label]
            classes[label] = OfClass(len(answers), answers.count(label))
        return Score(
            name,
            len(self._rows),
            sum(of.right for of in classes.values()),
            classes,
            tuple(
                Example(text, label, predicted[row], round(likeliest.values[row].item(), 6))
                for row, (text, label) in enumerate(self._rows[:examples])
            ),
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m foedus_server.release.evaluate", description="See the module.")
    for name in ("--model", "--plan", "--data"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--text", "--label"):
        parser.add_argument(name, required=True)
    parser.add_argument("--examples", type=int, default=3)
    parser.add_argument("adapters", type=Path, nargs="+")
    given = parser.parse_args(arguments)
    try:
        rows = held_out_rows(given.data, given.text, given.label)
        agreed = _agreed(given.plan)
        held_out = HeldOut(TextClassifier.load(given.model, agreed.plan, dtype="float32"), agreed, rows)
        for path in given.adapters:
            adapter = read_adapter(path, held_out.classifier.spec)
            print(held_out.score(str(path), adapter, given.examples).to_json(), flush=True)
    except LocalError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _agreed(path: Path) -> AgreedPlan:
    try:
        return parse_agreed_plan(path.read_bytes())
    except OSError as error:
        raise LocalError(f"The plan {path} cannot be read: {error.strerror}.") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
