"""One site's training, round by round: the same object runs in a site's trainer process and in simulations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, RoundPlan, schedule
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.plain_training import plain_update
from foedus_common.tasks.private_training import AdapterGradients, ClippedSum, HeadGradients, private_update
from foedus_common.tasks.rows_apart import check_layers, check_rows_apart
from foedus_common.tasks.text_classification import Progress, TextClassifier, no_progress


class LocalTrainer:
    """Trains an agreed plan's rounds on one site's rows.

    classifier: the plan's model; several trainers may share one, in turn. rows: (text, label) pairs. Raises LocalError
    when the classifier's spec or a layout is not the agreed one, or a label is not the plan's; without privacy also
    when there are no rows. With it they are noise like any others: nothing is refused that only the data decides.
    """

    def __init__(
        self,
        classifier: TextClassifier,
        agreed: AgreedPlan,
        rows: Sequence[tuple[str, str]],
        progress: Progress = no_progress,
    ) -> None:
        check_spec(classifier, agreed)
        if not (rows or agreed.plan.privacy.on):
            raise LocalError("The data has no rows; there is nothing to train on.")
        self.classifier = classifier
        self.rows = classifier.encode(rows)
        self._agreed = agreed
        self._progress = progress
        if agreed.plan.privacy.unit == "record" and classifier.batches.one_shape:
            self._try_shapes()

    def train(self, adapter: Tensors, round_plan: RoundPlan, random: RandomBytes) -> NDArray[np.float64]:
        """The update of one round from `adapter`, float64 (d,), laid out as the phase's trained vector.

        Where the record is the unit of privacy its noise is in it; where the site is, its noise is still to come.
        """
        if self._agreed.plan.privacy.unit != "record":
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

    def _try_shapes(self) -> None:
        """Learn how much fits the device from rows that are nobody's: were it the site's own that did not fit, they
        would decide in which shapes the others are computed."""
        spec, stand_ins = self.classifier.spec, self.classifier.stand_ins()
        nothing = {tensor.name: np.zeros(tensor.shape, np.float32) for tensor in spec.tensors}
        for round_plan in schedule(self._agreed.plan):
            if round_plan.settings.train == "adapter":
                clip = self._agreed.plan.privacy.clip
                gradients = AdapterGradients(self.classifier, nothing, stand_ins, clip, round_plan)
                gradients(spec.vector(nothing, "adapter").astype(np.float64), np.arange(len(stand_ins)))
                return
        self.classifier.features(nothing, stand_ins)

    def _clipped_sum(self, adapter: Tensors, round_plan: RoundPlan) -> ClippedSum:
        clip = self._agreed.plan.privacy.clip
        if round_plan.settings.train == "head":
            features = self.classifier.features(adapter, self.rows, self._progress)
            return HeadGradients(features, self.rows.labels, clip)
        self.rows.features.clear()  # no longer of use, and how many there are must not decide what else fits the device
        return AdapterGradients(self.classifier, adapter, self.rows, clip, round_plan)


def check_spec(classifier: TextClassifier, agreed: AgreedPlan) -> None:
    """Raises LocalError unless the loaded model has the adapter that was agreed, in the agreed layout, and
    computes each row by itself where the row is the unit of privacy."""
    if classifier.spec.digest().hex() != agreed.spec_sha256:
        raise LocalError("The model does not give the adapter that the plan describes; compare the model's hash.")
    for number, (phase, parts) in enumerate(zip(agreed.plan.phase, agreed.trained, strict=True), start=1):
        if classifier.spec.parts(phase.train) != parts:
            raise LocalError(f"The plan's layout of the trained vector in phase {number} is not this model's.")
    if agreed.plan.privacy.unit == "record":
        check_rows_apart(classifier)
        if any(phase.train == "adapter" for phase in agreed.plan.phase):
            check_layers(classifier)
