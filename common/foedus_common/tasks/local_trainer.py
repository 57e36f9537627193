"""One site's training, round by round: the same object runs in a site's trainer process and in simulations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.per_example import PerExampleGradients
from foedus_common.tasks.plain_training import plain_update
from foedus_common.tasks.private_training import AdapterGradients, ClippedSum, HeadGradients, private_update
from foedus_common.tasks.text_classification import Progress, TextClassifier, no_progress


class LocalTrainer:
    """Trains an agreed plan's rounds on one site's rows.

    classifier: the plan's model; several trainers may share one, in turn. rows: (text, label) pairs. Raises LocalError
    when the classifier's spec or a layout is not the agreed one, when there are no rows, or a label is not the plan's.
    """

    def __init__(
        self,
        classifier: TextClassifier,
        agreed: AgreedPlan,
        rows: Sequence[tuple[str, str]],
        progress: Progress = no_progress,
    ) -> None:
        check_spec(classifier, agreed)
        if not rows:
            raise LocalError("The data has no rows; there is nothing to train on.")
        self.classifier = classifier
        self.rows = classifier.encode(rows)
        self._agreed = agreed
        self._progress = progress

    def train(self, adapter: Tensors, round_plan: RoundPlan, random: RandomBytes) -> NDArray[np.float64]:
        """The update of one round from `adapter`, float64 (d,), laid out as the phase's trained vector.

        Under DP its noise is in it; it may be encoded and sent as it is.
        """
        if not self._agreed.plan.privacy.on:
            return plain_update(self.classifier, adapter, self.rows, round_plan, random, self._progress)
        train = round_plan.settings.train
        start = self.classifier.spec.vector(adapter, train).astype(np.float64)
        return private_update(
            start,
            self._clipped_sum(adapter, round_plan),
            len(self.rows),
            self._agreed,
            round_plan,
            random,
            self._progress,
        )

    def _clipped_sum(self, adapter: Tensors, round_plan: RoundPlan) -> ClippedSum:
        clip = self._agreed.plan.privacy.clip
        if round_plan.settings.train == "head":
            features = self.classifier.features(adapter, self.rows, self._progress)
            return HeadGradients(features, self.rows.labels, clip)
        return AdapterGradients(self.classifier, adapter, self.rows, clip, round_plan)


def check_spec(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    """Raises LocalError unless the loaded model has the adapter that was agreed, in the agreed layout, and, under DP,
    uses every trained layer exactly once for each example."""
    if classifier.spec.digest().hex() != agreed.spec_sha256:
        raise LocalError("The model does not give the adapter that the plan describes; compare the model's hash.")
    for number, (phase, parts) in enumerate(zip(agreed.plan.phase, agreed.trained, strict=True), start=1):
        if classifier.spec.parts(phase.train) != parts:
            raise LocalError(f"The plan's layout of the trained vector in phase {number} is not this model's.")
    if agreed.plan.privacy.on and any(phase.train == "adapter" for phase in agreed.plan.phase):
        check_layers(classifier)


def check_layers(classifier: TextClassifier) -> None:
    """Raises LocalError, naming the layer, when a trained factor is unused, used twice, or mixes examples."""
    names = {tensor.name for tensor in classifier.spec.trained("adapter")}
    probe = classifier.encode([("a", None)])
    with PerExampleGradients({n: m for n, m in classifier.factors.items() if n in names}) as gradients:
        classifier.pooled(*probe.inputs(np.arange(1)))
        gradients.check_each_used_once()
