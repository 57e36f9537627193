"""A slice of `make privacy-audit` on the tiny model: what is correct passes, and every seeded fault is found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from foedus_common.randomness import RandomBytes
from foedus_common.ranges import noise_grid
from foedus_common.tasks.local_trainer import LocalTrainer
from foedus_common.tasks.text_classification import DType, TextClassifier
from privacy_audit import __main__, canary, float_noise, one_step, whole_site
from privacy_audit.bounds import Errors, at_most, epsilon_at_least, guess_at_most, mu_at_least
from privacy_audit.faults import FAULTS, noise_off
from privacy_audit.inversion import Setting, from_the_factors, from_the_head, label_and_features
from privacy_audit.membership import (
    Neighbours,
    distinguish,
    neighbours,
    rows_apart,
    sensitivity,
    tiny_plan_of_membership,
)
from privacy_audit.residuals import findings, residuals
from privacy_audit.specimens import Specimen, random_adapter, releases, tiny_plan_of_noise
from privacy_audit.verdicts import Finding, Verdict, alarms
from seeded import seeded
from tiny_model import rows, tiny_agreed, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def specimen(model: Path) -> Specimen:
    agreed = tiny_plan_of_noise(model)
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    return Specimen(LocalTrainer(classifier, agreed, rows(8)), agreed, random_adapter(classifier, 0))


@pytest.fixture(scope="module")
def pair(model: Path) -> Neighbours:
    agreed = tiny_plan_of_membership(model)
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    return neighbours(classifier, agreed, random_adapter(classifier, 0))


# Released noise


def test_correct_releases_raise_no_alarm(specimen: Specimen) -> None:
    found = findings(residuals(specimen, releases(specimen, seeded("clean"))))
    assert alarms(found) == []
    assert len(found) == 13


FOUND_BY = {
    "noise halved": "sigma in every tensor",
    "noise a tenth too small": "sigma in every tensor",
    "noise on the factors only": "sigma in every tensor",
    "noise that keeps a fifth of the last step's": "fresh from step to step",
    "noise the same in every step": "fresh in every pair of steps",
    "noise the same in every round": "fresh in every pair of steps",
    "noise repeated over the coordinates": "fresh in every coordinate",
    "noise in floating point": "sums are whole grid units",
    "noise cut off at two sigma": "tails",
    "no noise on an empty batch": "sigma on empty batches",
    "an empty batch is drawn again": "rows drawn at the stated rate",
    "rows drawn at twice the rate": "rows drawn at the stated rate",
    "clipped at 1.2 times the bound": "independent of the gradients",
    "clipped layer by layer": "independent of the gradients",
    "clipped before the scale": "independent of the gradients",
    "clipped after the division": "independent of the gradients",
    "divided by the site's own rows": "sums are whole grid units",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_the_releases_is_found_for_what_it_is(specimen: Specimen, fault: str) -> None:
    with FAULTS[fault]():
        released = releases(specimen, seeded("faulty"))
    assert FOUND_BY[fault] in alarms(findings(residuals(specimen, released)))


def test_a_whole_sites_vector_is_its_clipped_update_and_its_noise(model: Path) -> None:
    specimen = whole_site.tiny_specimen_of_site(model, 0)
    assert alarms(findings(whole_site.residuals(specimen, seeded("whole site")))) == []
    assert whole_site.shares_together(specimen.agreed).holds
    for fault in whole_site.SITE_FAULTS.values():
        with fault():
            assert alarms(findings(whole_site.residuals(specimen, seeded("whole site"))))


def test_rounds_of_one_step_send_the_stated_noise_and_secure_sums_have_all_of_it(model: Path) -> None:
    agreed = one_step.tiny_plan_of_one_step(model)
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    pair = neighbours(classifier, agreed, random_adapter(classifier, 0))
    assert one_step.honest(pair) == 2
    assert 16 * math.sqrt(2) < noise_grid(agreed, 0).sigma / 2 ** noise_grid(agreed, 0).halvings < 24
    for sites in (1, 2):
        assert alarms(one_step.found(pair, sites, 400, seeded("one step"))) == []
    told = distinguish(pair, 300, seeded("in a sum"), honest=2)
    assert not told.alarm
    assert 0.5 * told.accounted < told.shown < told.accounted
    for name in ("a site adds its share of the noise only", "noise the same at every site"):  # rounding takes 2,000
        with one_step.ONE_STEP_FAULTS[name]():
            assert alarms(one_step.found(pair, 2, 100, seeded("one step")))


def test_an_alarm_needs_a_p_value_that_is_rare_among_all_tests() -> None:
    assert alarms([Finding("rare", "", 4e-7), Finding("common", "", 0.01)]) == ["rare"]
    assert alarms([Finding("not rare among two", "", 6e-7), Finding("common", "", 0.01)]) == []


# One record


def test_a_record_shows_as_much_as_is_accounted_and_no_more(pair: Neighbours) -> None:
    found = distinguish(pair, 300, seeded("membership"))
    assert not found.alarm
    assert 0.5 * found.accounted < found.shown < found.accounted
    assert sensitivity([pair]).holds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_row_adds_does_not_depend_on_its_batch(model: Path, dtype: DType) -> None:
    """Rows that fill their padded length among others that do not: attention without a mask is rounded otherwise."""
    agreed = tiny_plan_of_membership(model)
    classifier = TextClassifier.load(model, agreed.plan, dtype=dtype)
    data = [("ear left", "Ear"), ("eye", "Eye"), ("skin injury", "Skin"), ("ear of right pain burn upper", "Ear")]
    assert rows_apart(classifier, agreed, random_adapter(classifier, 0), data) < 1e-9


@pytest.mark.parametrize("fault", ["noise halved", "clipped layer by layer", "clipped after the division"])
def test_a_record_that_shows_too_much_is_found(pair: Neighbours, fault: str) -> None:
    with FAULTS[fault]():
        assert distinguish(pair, 300, seeded("membership")).alarm
        assert sensitivity([pair]).holds == (fault == "noise halved")


# The released adapter


def test_a_canary_in_the_adapter_shows_only_without_the_noise() -> None:
    noised, bare = canary.verdicts(canary.study(target_epsilon=1.0), 40, seeded("canary"))
    assert noised.holds
    assert bare.holds


# Gradient inversion


def test_the_head_gradient_of_one_record_gives_its_label_and_features() -> None:
    features = np.array([0.6, -0.8, 0.0, 0.3])
    errors = np.array([0.2, -0.7, 0.5])  # p - y for the label 1
    label, found = label_and_features(0.01 * np.outer(errors, features))
    assert label == 1
    np.testing.assert_allclose(found, features)


@pytest.mark.parametrize("attacked", [from_the_head, from_the_factors])
def test_inversion_works_on_raw_gradients_and_fails_on_releases(
    model: Path, attacked: Callable[[Setting, Sequence[int], RandomBytes], list[Verdict]]
) -> None:
    phase = {"rounds": 1, "steps": 1, "sampling_rate": 1.0, "budget_share": 0.5, "learning_rate": 1.0}
    changes = {"phase": [phase | {"train": "head"}, phase | {"train": "adapter"}], "privacy__divisor": 1}
    agreed = dataclasses.replace(tiny_agreed(model, **changes), noise_multipliers=(4.0, 4.0))
    classifier = TextClassifier.load(model, agreed.plan, dtype="float32")
    setting = Setting(classifier, agreed, random_adapter(classifier, 0), rows(9))
    targets = [*range(9)] * 2
    assert [verdict.check for verdict in attacked(setting, targets, seeded("inversion")) if not verdict.holds] == []
    with noise_off():
        bare = attacked(setting, targets, seeded("inversion"))
    assert [verdict.holds for verdict in bare] == [not verdict.check.startswith("...") for verdict in bare]


# The command


@pytest.mark.parametrize("holds", [True, False])
def test_the_audit_fails_when_something_does_not_hold(
    holds: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "SECTIONS", {"noise": lambda bench: [Verdict("sigma", f"{bench.seed}", "3", holds)]})
    assert __main__.main(["--seed", "3", "--json"]) == (0 if holds else 1)
    shown = json.loads(capsys.readouterr().out)
    assert shown["holds"] is holds
    assert shown["sections"]["noise"] == [{"check": "sigma", "statistic": "3", "bound": "3", "holds": holds}]
    assert __main__.main([]) == (0 if holds else 1)
    assert ("NO" in capsys.readouterr().out) != holds


# Bounds


def test_clopper_pearson_is_the_binomial_turned_round() -> None:
    """The definition: at the upper end, so few successes are as rare as the confidence says."""
    for successes, trials, confidence in ((0, 20, 0.95), (3, 50, 0.975), (49, 50, 0.99)):
        assert stats.binom.cdf(successes, trials, at_most(successes, trials, confidence)) == pytest.approx(
            1 - confidence
        )
    assert at_most(20, 20, 0.95) == 1


def test_bounds_approach_the_truth_of_a_gaussian_from_below() -> None:
    size, mu = 10**7, 1.5
    wrong = round(size * stats.norm.sf(mu / 2))
    errors = Errors(wrong, size, wrong, size)
    assert mu * 0.995 < mu_at_least(errors, 0.95) < mu
    truth = np.log(stats.norm.cdf(mu / 2) / stats.norm.sf(mu / 2))
    assert truth * 0.995 < epsilon_at_least(errors, 0.0, 0.95) < truth
    assert epsilon_at_least(errors, 0.1, 0.95) < truth
    assert mu_at_least(Errors(5, 10, 5, 10), 0.95) == 0


def test_a_release_without_information_leaves_the_guess_to_chance() -> None:
    assert guess_at_most(0.001, 0.0) == pytest.approx(0.001)
    assert guess_at_most(0.001, 1.0) == pytest.approx(stats.norm.cdf(1 - 3.0902), rel=1e-4)


# The code


def test_private_training_has_no_other_source_of_chance() -> None:
    assert [verdict.statistic for verdict in float_noise.verdicts() if not verdict.holds] == []
    assert {"noise.py", "private_training.py", "plan.py"} <= {path.name for path in float_noise.reachable()}


@pytest.mark.parametrize(
    "line",
    [
        "import random",
        "import numpy.random as chance",
        "from numpy import random",
        "from numpy.random import default_rng",
        "from torch import randn",
        "noise = np.random.default_rng().normal(size=3)",
        "noise = torch.randn_like(total)",
        "noise = torch.zeros(3).normal_()",
        "noise = ndtri(uniform)",
        "noise = torch.distributions.Normal(0, 1).sample()",
    ],
)
def test_another_source_of_chance_is_seen(line: str) -> None:
    source = (float_noise.COMMON / "foedus_common/privacy/noise.py").read_text()
    assert float_noise.other_chance(source) == []
    assert float_noise.other_chance(f"{source}\n{line}\n")
