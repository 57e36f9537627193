"""Training without differential privacy: epochs of shuffled batches by SGD or AdamW, as PEFT and torch do it alone.

For plans with [privacy] unit = "none", whose updates are bounded in range (`update_bound`) and in nothing else, and
with unit = "site", whose updates are clipped and noised before they leave (`foedus_common.privacy.site_level`). A batch
is what a step of the optimiser sees; its gradient is added up over as many rows at a time as the machine holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from foedus_common.adapters import Tensors
from foedus_common.errors import LocalError
from foedus_common.plan import Phase, RoundPlan
from foedus_common.randomness import RandomBytes
from foedus_common.tasks.head import HEAD
from foedus_common.tasks.rows import EncodedRows
from foedus_common.tasks.text_classification import Progress, TextClassifier

DEFAULT_UPDATE_BOUND = 1.0

BatchFeatures = Callable[[NDArray[np.int64]], torch.Tensor]


def plain_update(
    classifier: TextClassifier,
    adapter: Tensors,
    rows: EncodedRows,
    round_plan: RoundPlan,
    random: RandomBytes,
    progress: Progress,
) -> NDArray[np.float64]:
    """The update of one round, float64 (d,); without DP each coordinate is within +-update_bound.

    Batches take the rows in one shuffled order per epoch; a fraction of an epoch stops part-way. The optimiser starts
    afresh in every round; its rates go on where the round before stopped. Without DP, raises LocalError when training
    diverges to numbers that are not finite; under it nothing is refused that only the data decides.
    """
    settings, spec = round_plan.settings, classifier.spec
    features_of, physical = _feature_source(classifier, adapter, rows, settings.train, progress)
    names = [tensor.name for tensor in spec.trained(settings.train) if tensor.name != HEAD]
    head = torch.nn.Parameter(torch.from_numpy(adapter[HEAD].copy()).to(classifier.device))
    weights = [classifier.factors[name].weight.requires_grad_(True) for name in names]
    optimizer = _optimizer(settings, head, weights)
    batches = _shuffled_batches(settings, len(rows), random)
    for done, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = round_plan.learning_rate(group["group"], done / len(batches))
        optimizer.zero_grad()
        for part in physical(batch):
            labels = torch.from_numpy(rows.labels[part]).to(classifier.device)
            loss = torch.nn.functional.cross_entropy(features_of(part) @ head.T, labels, reduction="sum")
            torch.autograd.backward(loss / len(batch))
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([head, *weights], settings.max_grad_norm)
        optimizer.step()
        progress("steps", done + 1, len(batches))
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None
    trained = dict(zip([HEAD, *names], [head, *weights], strict=True))
    after = {name: value.detach().cpu().numpy() for name, value in trained.items()}
    update = spec.vector(after, settings.train).astype(np.float64) - spec.vector(adapter, settings.train)
    if settings.steps is not None:  # the site is the unit of privacy
        return update
    if not np.isfinite(update).all():
        raise LocalError("Training diverged: the update is not finite; lower the plan's learning_rate.")
    bound = settings.update_bound or DEFAULT_UPDATE_BOUND
    return np.clip(update, -bound, bound)


def _feature_source(
    classifier: TextClassifier, adapter: Tensors, rows: EncodedRows, train: str, progress: Progress
) -> tuple[BatchFeatures, Callable[[NDArray[np.int64]], Iterable[NDArray[np.int64]]]]:
    """How a batch's features are had (from the cache while the encoder stands still), and how a batch is cut up."""
    if train == "head":
        cached = classifier.features(adapter, rows, progress)
        return (lambda batch: cached[torch.from_numpy(batch)]), (lambda batch: [batch])
    classifier.load_factors(adapter)
    return (lambda batch: classifier.pooled(*rows.inputs(batch))), rows.batches


def _optimizer(settings: Phase, head: torch.nn.Parameter, weights: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Its parameters in the plan's groups; their rates are set before each step."""
    groups = [{"params": [head], "group": "head"}]
    if weights:
        groups.append({"params": weights, "group": "adapter"})
    make = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.SGD
    return make(groups, weight_decay=settings.weight_decay or 0.0)


def _shuffled_batches(settings: Phase, rows: int, random: RandomBytes) -> list[NDArray[np.int64]]:
    """`steps` batches, however many rows there are, or those of `epochs` over them."""
    size = settings.batch_size or 1
    wanted = settings.steps or max(1, round((settings.epochs or 0.0) * math.ceil(rows / size)))
    batches: list[NDArray[np.int64]] = []
    while len(batches) < wanted:
        order = np.argsort(np.frombuffer(random(8 * rows), np.dtype("<u8")), kind="stable")
        batches += [order[start : start + size] for start in range(0, rows, size)]
    return batches[:wanted]
