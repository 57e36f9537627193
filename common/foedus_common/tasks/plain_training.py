"""Training without differential privacy: epochs of shuffled batches by SGD or AdamW, as PEFT and torch do it alone.

For plans with [privacy] unit = "none", whose updates are bounded in range (`update_bound`) and in nothing else, and
with unit = "site", whose updates are clipped and noised before they leave (`foedus_common.privacy.site_level`). A batch
is what a step of the optimiser sees; its gradient is added up over as many rows at a time as the machine holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

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

Batch = NDArray[np.int64]
Shares = tuple[torch.Tensor | None, ...]


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
    if not len(rows):
        return np.zeros(spec.size(settings.train))
    names = [tensor.name for tensor in spec.trained(settings.train) if tensor.name != HEAD]
    head = torch.nn.Parameter(torch.from_numpy(adapter[HEAD].copy()).to(classifier.device))
    trained = {HEAD: head} | {name: classifier.factors[name].weight.requires_grad_(True) for name in names}
    gradients = _gradient_source(classifier, adapter, rows, trained, progress)
    optimizer = _optimizer(settings, head, [trained[name] for name in names])
    batches = _shuffled_batches(settings, len(rows), random)
    for done, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = round_plan.learning_rate(group["group"], done / len(batches))
        optimizer.zero_grad()
        for shares in gradients(batch):
            for (name, weight), share in zip(trained.items(), shares, strict=True):
                if share is None:
                    raise LocalError(f"No gradient comes to {name}; the model does not use it, name other targets.")
                weight.grad = share if weight.grad is None else weight.grad + share
        if settings.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), settings.max_grad_norm)
        optimizer.step()
        progress("steps", done + 1, len(batches))
    for name in names:
        trained[name].requires_grad_(False)
        trained[name].grad = None
    after = {name: value.detach().cpu().numpy() for name, value in trained.items()}
    update = spec.vector(after, settings.train).astype(np.float64) - spec.vector(adapter, settings.train)
    if settings.steps is not None:  # the site is the unit of privacy
        return update
    if not np.isfinite(update).all():
        raise LocalError("Training diverged: the update is not finite; lower the plan's learning_rate.")
    bound = settings.update_bound or DEFAULT_UPDATE_BOUND
    return np.clip(update, -bound, bound)


def _gradient_source(
    classifier: TextClassifier,
    adapter: Tensors,
    rows: EncodedRows,
    trained: Mapping[str, torch.Tensor],
    progress: Progress,
) -> Callable[[Batch], Iterator[Shares]]:
    """A function from a batch to shares of its mean loss's gradient, by each trained tensor, that add up to it.

    While the encoder stands still features come from the cache and a batch is one share; else one for each physical
    batch.
    """

    def shares(part: Batch, features: torch.Tensor, batch: Batch) -> Shares:
        labels = torch.from_numpy(rows.labels[part]).to(features.device)
        loss = torch.nn.functional.cross_entropy(features @ trained[HEAD].T, labels, reduction="sum") / len(batch)
        return torch.autograd.grad(loss, list(trained.values()), allow_unused=True)

    if len(trained) == 1:
        cached = classifier.features(adapter, rows, progress)
        return lambda batch: iter([shares(batch, cached[torch.from_numpy(batch)], batch)])
    classifier.load_factors(adapter)
    return lambda batch: (
        found
        for _, found in classifier.batches.each(
            rows, batch, lambda part: shares(part, classifier.pooled(rows, part)[: len(part)], batch)
        )
    )


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
