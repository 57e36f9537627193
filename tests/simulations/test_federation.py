"""A federation in one process, with the real trainer on a model of two layers: the same by seed, and exact.

What the coordinator opens is compared with what the sites put into their outboxes, which it never sees.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foedus_client.round import ObjectVectors
from foedus_common.model_folder import manifest_sha256
from foedus_common.plan import read_plan, schedule
from foedus_common.privacy.accounting import epsilon, epsilons, events_of
from foedus_common.protocol.masks import Words
from foedus_common.ranges import site_grid
from foedus_common.tasks.text_classification import TextClassifier
from foedus_common.terms import field_layout
from foedus_server.rounds import Committed
from foedus_server.runs import _Conductor
from foedus_simulations.corpora import Row
from foedus_simulations.federation import Outcome, simulate
from known_sites import step_sizes
from plans import by_site, plan_toml
from tiny_model import LABELS, rows, write_tiny_model

SITES = ("north", "east", "south")


class Study:
    """One small federation, simulated as often as a test likes."""

    def __init__(self, folder: Path) -> None:
        self.model = write_tiny_model(folder / "tiny")
        self.plan = folder / "plan.toml"
        self.plan.write_text(
            plan_toml(
                model__sha256=manifest_sha256(self.model),
                task__labels=LABELS,
                adapter__rank=2,
                privacy__divisor=30,
                phase__0__rounds=2,
                phase__1__rounds=2,
                phase__1__sampling_rate=0.5,
            )
        )
        self.classifier = TextClassifier.load(self.model, read_plan(self.plan), device="cpu", dtype="float32")
        dealt = [Row(text, label, "") for text, label in rows(60)]
        self.rows = {name: dealt[number::3] for number, name in enumerate(SITES)}

    def simulate(self, seed: int) -> Outcome:
        return simulate(self.plan, self.model, self.rows, seed, self.classifier)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"))


def adapters(outcome: Outcome) -> list[dict[str, bytes]]:
    return [{name: tensor.tobytes() for name, tensor in adapter.items()} for adapter in outcome.adapters]


def test_a_seed_gives_the_same_adapters_bit_for_bit_and_another_seed_gives_others(study: Study) -> None:
    first, again, other = (study.simulate(seed) for seed in (1, 1, 2))
    assert adapters(first) == adapters(again)
    assert first.agreed == again.agreed
    assert all(
        one["head.weight"] != two["head.weight"] for one, two in zip(adapters(first), adapters(other), strict=True)
    )


def test_where_the_site_is_the_unit_the_sum_has_the_noise_of_all_its_sites(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learning rate of nearly nothing, so that all that is opened is noise."""
    opened: list[NDArray[np.float64]] = []
    commit = _Conductor._commit

    def keep_mean(self: _Conductor, round_plan: Any, attempt: Any, result: Committed) -> None:
        opened.append(result.mean)
        commit(self, round_plan, attempt, result)

    monkeypatch.setattr(_Conductor, "_commit", keep_mean)
    plan = tmp_path / "by-site.toml"
    phase = {"train": "head", "rounds": 8, "learning_rate": 1e-12, "steps": 3, "batch_size": 4, "budget_share": 1.0}
    shape = {"model__sha256": manifest_sha256(study.model), "task__labels": LABELS, "adapter__rank": 2}
    plan.write_text(plan_toml(**{**by_site(), **shape, "phase": [phase]}))
    outcome = simulate(plan, study.model, study.rows, 4, study.classifier)

    grid = site_grid(outcome.agreed, 0)
    step = step_sizes(outcome.agreed, schedule(outcome.agreed.plan)[0])
    sums = np.concatenate([3 * mean / step for mean in opened])
    assert np.abs(sums - np.rint(sums)).max() < 1e-6
    assert sums.std() == pytest.approx(math.sqrt(3) * grid.sigma, rel=4 / math.sqrt(2 * sums.size))
    assert grid.honest == 2  # of three survivors one may collude: its noise is more than was promised
    for account in outcome.accounts.values():
        released = epsilon(events_of(outcome.agreed), 1e-5)
        assert account.epsilon(1e-5, held=True) <= released
        assert account.releases == 8
    found = epsilons(outcome.agreed, (8,))
    assert found is not None
    assert found.central < 8 < found.local < account.epsilon(1e-5)


def test_each_opened_sum_is_the_mean_of_what_the_sites_stored(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[Words] = []
    opened: list[NDArray[np.float64]] = []
    store, commit = ObjectVectors.store, _Conductor._commit

    def keep_words(self: ObjectVectors, words: Words) -> Any:
        stored.append(words.copy())
        return store(self, words)

    def keep_mean(self: _Conductor, round_plan: Any, attempt: Any, result: Committed) -> None:
        opened.append(result.mean)
        commit(self, round_plan, attempt, result)

    monkeypatch.setattr(ObjectVectors, "store", keep_words)
    monkeypatch.setattr(_Conductor, "_commit", keep_mean)
    outcome = study.simulate(3)

    rounds = schedule(outcome.agreed.plan)
    assert len(opened) == len(rounds) == 4
    for round_plan, mean in zip(rounds, opened, strict=True):
        vectors = stored[6 * round_plan.index :][:6]  # three into the outboxes, then the same three under masks
        layout = field_layout(outcome.agreed, round_plan)
        total = sum(layout.unpack_sum(vector, 1) for vector in vectors[:3])
        assert np.array_equal(mean, total * step_sizes(outcome.agreed, round_plan) / 3)
        assert not {vector.tobytes() for vector in vectors[:3]} & {vector.tobytes() for vector in vectors[3:]}
