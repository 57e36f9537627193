"""An adapter built to overflow on one record alone, to see by a site's behaviour whether it holds that record.

Two sites, the same rows but for one. The adapter that the coordinator puts into its plan makes the attention of just
this row overflow in float32: its features, and so its gradient, are no numbers. Both sites have to behave alike.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cheating import HONEST, VICTIM, Cheat, Federation
from foedus_client.daemon import Daemon
from foedus_client.data import read_rows
from foedus_common.adapters import Tensors, save_adapter
from foedus_common.canonical import sha256_hex
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan
from foedus_common.privacy.accounting import calibrate
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import TextClassifier
from foedus_server.prepare import first_adapter
from foedus_simulations.federation import InProcessTrainer
from known_sites import MODEL
from tiny_model import rows, tiny_agreed, tiny_plan, write_tiny_model

RUN = 1
WITHOUT = "bravo"
"""A name as long as the victim's: it is in every message."""
QUERY = "layer.0.attention.self.query.lora_B"


@dataclass
class Probe:
    """The adapter, the row that it is built for, and rows that it does nothing to."""

    classifier: TextClassifier
    adapter: Tensors
    target: tuple[str, str]
    others: list[tuple[str, str]]

    def overflows(self, data: list[tuple[str, str]]) -> int:
        return _overflowing(self.classifier, self.adapter, data).sum()


def _overflowing(classifier: TextClassifier, adapter: Tensors, data: list[tuple[str, str]]) -> NDArray[np.bool_]:
    """Which rows have features that are no numbers."""
    features = classifier.features(adapter, classifier.encode(data))
    return (~torch.isfinite(features).all(dim=1)).numpy()


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """Turns a factor up until the first row overflows, by bisection, as a coordinator could at home."""
    folder = write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    classifier = TextClassifier.load(folder, tiny_plan(folder), device="cpu", dtype="float32")
    first, data = first_adapter(classifier.spec, 0), rows(12)

    def scaled(factor: float) -> Tensors:
        name = next(tensor.name for tensor in classifier.spec.tensors if QUERY in tensor.name)
        return {**first, name: np.full_like(first[name], factor)}

    low, high = 1e30, 1e38
    for _ in range(200):
        middle = (low * high) ** 0.5
        hit = _overflowing(classifier, scaled(middle), data)
        if hit.sum() == 1:
            target = int(hit.argmax())
            return Probe(classifier, scaled(middle), data[target], data[:target] + data[target + 1 :])
        low, high = (middle, high) if not hit.any() else (low, middle)
    raise LocalError("No factor makes just one row overflow.")


@dataclass
class Scene:
    """A coordinator with that adapter, and the newest update of each site."""

    cheat: Cheat
    trained: dict[str, NDArray[np.float64]]


@pytest.fixture(scope="module")
def scene(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Real training at every site, in this process; one of them has the row."""
    trained: dict[str, NDArray[np.float64]] = {}

    class Kept(InProcessTrainer):
        def __init__(self, name: str, *arguments: Any) -> None:
            super().__init__(*arguments)
            self._name = name

        def train(self, *arguments: Any) -> NDArray[np.float64]:
            trained[self._name] = super().train(*arguments)
            return trained[self._name]

    class Training(Daemon):
        def _open_trainer(self, agreed: AgreedPlan) -> Any:
            dataset = self._store.dataset(agreed.plan.data.name)
            assert dataset is not None
            local = LocalTrainer(probe.classifier, agreed, read_rows(dataset.path, "text", "label"))
            return Kept(self.name, local, os.urandom, lambda index: None)

    model = tmp_path_factory.mktemp("model") / "tiny"
    agreed = tiny_agreed(write_tiny_model(model), phase__0__rounds=1, phase__1__rounds=1, phase__1__sampling_rate=1.0)
    plan = replace(agreed.plan, model=replace(agreed.plan.model, sha256=MODEL))
    adapter = save_adapter(probe.adapter, probe.classifier.spec)
    agreed = replace(
        agreed,
        run_id=RUN,
        plan=plan,
        noise_multipliers=calibrate(plan, [agreed.size(0), agreed.size(1)]),
        first_adapter_sha256=sha256_hex(adapter),
    )
    data = dict.fromkeys(HONEST, probe.others) | {VICTIM: [*probe.others, probe.target]}
    federation = Federation(tmp_path_factory.mktemp("federation"), Training, data=data)
    made = Cheat(federation, RUN, (agreed, adapter))
    yield Scene(made, trained)
    made.close()
    federation.close()


def test_the_adapter_overflows_on_the_one_record_and_no_other(probe: Probe) -> None:
    assert probe.overflows(probe.others) == 0
    assert probe.overflows([*probe.others, probe.target]) == 1


def test_a_site_with_the_record_behaves_as_one_without_it(scene: Scene) -> None:
    """In a head round and an adapter round: both are ready, answer every stage, send as many bytes, and no number of
    theirs is out of range."""
    cheat = scene.cheat
    for round_ in (0, 1):
        cheat.begin(round_)
        cheat.attempt(cheat.config(round_=round_)).reach(5)
        sizes = {site: _sizes(cheat, site, round_) for site in (VICTIM, WITHOUT)}
        assert len(sizes[VICTIM]) == 5
        assert sizes[VICTIM] == sizes[WITHOUT]
        assert np.isfinite(scene.trained[VICTIM]).all()
        assert np.isfinite(scene.trained[WITHOUT]).all()
    assert cheat.open().vectors == {}


def _sizes(cheat: Cheat, site: str, round_: int) -> list[tuple[str, int, int]]:
    """What the site said in the round: kind of message, its bytes, those of the vector that it names."""
    found = []
    for exchange in cheat.exchanges:
        said = wire.parse_envelope(exchange.answer)
        if exchange.site == site and said.header.round == round_:
            vector = said.message.vector.size if isinstance(said.message, m.MaskedInput) else 0
            found.append((type(said.message).__name__, len(exchange.answer), vector))
    return found
