"""What one step a round buys: accuracy and both epsilons of a head that three hospitals train, against several steps.

Sixty steps on the demonstration's rows, by the plan `icd-chapters-one-step.toml`, as 60 rounds of one step and as 20
rounds of three; every run goes through the round code of production, masks and all. Not a claim with a goal: a table.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded

from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import read_plan
from foedus_common.privacy.accounting import epsilons
from foedus_common.tasks.rows import EncodedRows
from foedus_common.tasks.text_classification import TextClassifier
from foedus_simulations.alone import pairs
from foedus_simulations.cli import share_out
from foedus_simulations.corpora import default_cache, icd10, minilm
from foedus_simulations.editions import PLANS, SEED
from foedus_simulations.federation import simulate

TEMPLATE = (PLANS / "icd-chapters-one-step.toml").read_text(encoding="utf-8")
SEVERAL = {"rounds = 60": "rounds = 20", "steps = 1 ": "steps = 3 "}
CASES = (
    ("60 rounds of 1 step, epsilon 8", {}),
    ("20 rounds of 3 steps, epsilon 8", SEVERAL),
    ("60 rounds of 1 step, epsilon 3", {"epsilon = 8.0": "epsilon = 3.0"}),
    ("20 rounds of 3 steps, epsilon 3", SEVERAL | {"epsilon = 8.0": "epsilon = 3.0"}),
)


class EncodedOnce:
    """`TextClassifier.encode`, remembering: sites have the same rows in every case, and features take longest."""

    def __init__(self, classifier: TextClassifier) -> None:
        self._encode = classifier.encode
        self._known: dict[tuple[tuple[str, str | None], ...], EncodedRows] = {}

    def __call__(self, rows: Sequence[tuple[str, str | None]]) -> EncodedRows:
        key = tuple(rows)
        if key not in self._known:
            self._known[key] = self._encode(rows)
        return self._known[key]


def main() -> int:
    model = minilm(default_cache())
    corpus = icd10(default_cache(), SEED)
    shares = share_out(corpus.train, "dirichlet:0.5", 3, SEED)
    labels = json.dumps(list(corpus.labels), ensure_ascii=False)
    filled_in = TEMPLATE.replace('"MODEL"', json.dumps(manifest_sha256(model))).replace('["LABELS"]', labels)
    print(f"{len(corpus.train):,} rows at {', '.join(f'{len(part):,}' for part in shares.values())}; accuracy on")
    print(
        f"{len(corpus.held_out):,} held-out rows, with one standard error; epsilons at delta 1e-5, retries included\n"
    )
    print(f"{'':34}accuracy       local  central  seconds")
    classifier = None
    with tempfile.TemporaryDirectory(prefix="foedus-") as folder:
        plan = Path(folder) / "plan.toml"
        for name, changes in CASES:
            text = filled_in
            for old, new in changes.items():
                text = text.replace(old, new)
            plan.write_text(text, encoding="utf-8")
            if classifier is None:
                classifier = TextClassifier.load(model, read_plan(plan))
                classifier.encode = EncodedOnce(classifier)  # type: ignore[method-assign]
            began = time.monotonic()
            outcome = simulate(plan, model, shares, SEED, classifier)
            accuracy = classifier.accuracy(outcome.adapters[-1], classifier.encode(pairs(corpus.held_out)))
            error = (accuracy * (1 - accuracy) / len(corpus.held_out)) ** 0.5
            found = epsilons(outcome.agreed)
            assert found is not None
            seconds = time.monotonic() - began
            print(f"{name:32}  {accuracy:.3f} ± {error:.3f}  {found.local:5.2f}  {found.central:7.2f}  {seconds:7.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
