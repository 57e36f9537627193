"""A plan is refused for its first mistake in one sentence, and its bytes mean one thing only."""

import dataclasses
import json
import math
from itertools import pairwise

import pytest

from foedus_common.canonical import canonical_json
from foedus_common.errors import LocalError
from foedus_common.objects import ObjectRef
from foedus_common.plan import parse_agreed_plan, read_plan, schedule
from foedus_common.protocol.thresholds import thresholds
from foedus_common.ranges import half_range, honest_sites, tail
from foedus_common.terms import round_terms
from plans import agreed_plan, by_site, plan_table, run_plan


def test_the_agreed_plan_survives_its_own_bytes():
    agreed = agreed_plan()
    assert parse_agreed_plan(agreed.canonical()) == agreed
    assert parse_agreed_plan(agreed.canonical()).digest() == agreed.digest()


def test_the_digest_is_pinned():
    assert agreed_plan().digest().hex() == "50c7b37868761cf2cd2b60b6565fd52ff08d726e1342106fc9d6c0f274e94069"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"privacy__epsilonn": 1.0}, "did you mean 'epsilon'"),
        ({"run__name": None}, "lacks the key 'name'"),
        ({"model__sha256": "abc"}, "64 hexadecimal digits"),
        ({"secure_aggregation__min_sites": 2}, "the sum of two reveals the other"),
        ({"secure_aggregation__max_sites": 1025}, "max_sites <= 1024"),
        ({"secure_aggregation__colluding": 2}, "colluding"),
        ({"phase__0__epochs": 2.0}, "gives epochs, which training under DP does not have"),
        ({"phase__1__warmup": 0.1, "phase__1__max_grad_norm": 1.0}, "gives max_grad_norm, warmup, which"),
        ({"phase__1__weight_decay": 0.0, "phase__1__optimizer": "sgd"}, "gives optimizer, weight_decay, which"),
        ({"phase__1__decay": "cosine"}, "decays by a cosine"),
        ({"phase__0__budget_share": 0.5}, "add up to 1"),
        ({"phase__0__steps": None}, "needs steps"),
        ({"phase__0__decay": "linaer"}, "did you mean 'linear'"),
        ({"privacy__epsilon": "eight"}, "must be a number"),
        ({"privacy__delta": 1e-13}, "delta between 1e-11 and 0.001"),
        ({"privacy__divisor": None}, "divisor"),
        ({"privacy__divisor": 10**11}, "divides, 1 to 68719476736"),
        ({"privacy__clip": 1e-250, "phase__0__learning_rate": 1e9}, "clip between 1e-30 and 1e+30"),
        ({"phase__1__learning_rate": 1e200}, "learning_rate between"),
        ({"phase__1__head_learning_rate": 0.0}, "head_learning_rate between"),
        ({"phase__1__head_scale": 1e200}, "head_scale between"),
        ({"adapter__alpha": 1e308}, "alpha between"),
        ({"privacy__unit": "none"}, "turns privacy off"),
        ({"privacy__unit": "site"}, 'which unit = "site" does not have'),
        (by_site() | {"phase__0__epochs": 1.0}, "give steps and batch_size"),
        (by_site() | {"phase__1__batch_size": 0}, "needs steps and batch_size"),
        (by_site() | {"phase__1__update_bound": 1.0}, "follows from the noise"),
        (by_site() | {"phase__1__budget_share": None}, "needs budget_share"),
        (by_site() | {"phase__1__warmup": 1.0}, "warmup in [0, 1)"),
        ({"task__labels": ["Eye", "Eye"]}, "different labels"),
        ({"phase": []}, "no [[phase]]"),
        ({"phase": [plan_table()["phase"][0]] * 9}, "at most 8 phases, not 9"),
        ({"phase__0__rounds": 10**12}, "at most 10000 rounds"),
        ({"phase__0__steps": 10**12}, "at most 1000000 steps"),
        ({"secure_aggregation__retries": 10**12}, "retries between 0 and 10000"),
    ],
)
def test_a_mistake_gets_one_sentence(changes, sentence):
    with pytest.raises(LocalError) as caught:
        run_plan(**changes)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_by_site_survives_its_canonical_form():
    agreed = agreed_plan(**by_site(), phase__0__optimizer="adamw", phase__0__decay="cosine")
    assert parse_agreed_plan(agreed.canonical()) == agreed


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + b" ",
        lambda text: text.replace(b'"run_id":7', b'"run_id": 7'),
        lambda text: text.replace(b'"run_id":7', b'"run_id":7,"extra":1'),
        lambda text: text.replace(b"13.1", b"13.10"),
        lambda text: text.replace(b"13.1", b"-1.0"),
        lambda text: b"[" * 20_000,
        lambda text: b"{}",
        lambda text: b"\xff" + text,
    ],
)
def test_only_the_canonical_form_is_read(change):
    with pytest.raises(LocalError):
        parse_agreed_plan(change(agreed_plan().canonical()))


def test_a_missing_layout_is_refused():
    table = json.loads(agreed_plan().canonical())
    table["trained"] = table["trained"][:1]
    with pytest.raises(LocalError, match="layout"):
        parse_agreed_plan(canonical_json(table))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 3}, "give epochs instead"),
        ({"epochs": None}, "needs epochs"),
        ({"epochs": 1e300}, "at most 1000"),
        ({"batch_size": 0}, "batch_size of 1 or more"),
        ({"warmup": 1.0}, "warmup in [0, 1)"),
        ({"warmup": -0.1}, "warmup in [0, 1)"),
        ({"weight_decay": -0.1}, "weight_decay between 0 and"),
        ({"weight_decay": 1e300}, "weight_decay between"),
        ({"max_grad_norm": 0.0}, "max_grad_norm between"),
        ({"update_bound": -1.0}, "update_bound between"),
    ],
)
def test_a_mistake_in_a_phase_without_dp_gets_one_sentence(changes, sentence):
    phase = {"train": "head", "rounds": 1, "learning_rate": 0.1, "epochs": 2.0, "batch_size": 4}
    given = {key: value for key, value in (phase | changes).items() if value is not None}
    with pytest.raises(LocalError) as caught:
        run_plan(privacy={"unit": "none"}, phase=[given])
    assert sentence in str(caught.value)
    assert str(caught.value).endswith("(phase 1)")
    run_plan(privacy={"unit": "none"}, phase=[phase])


def test_linear_decay_falls_to_one_part_within_each_phase():
    rounds = schedule(run_plan())
    assert [r.index for r in rounds] == list(range(28))
    assert rounds[0].learning_rate("head") == 24.0
    assert rounds[19].learning_rate("head") == pytest.approx(24.0 / 20)
    assert rounds[20].learning_rate("adapter") == 8.0
    assert all(a.learning_rate("head") > b.learning_rate("head") for a, b in pairwise(rounds[:20]))
    assert [r.learning_rate("head") for r in rounds[:20]] == [
        24.0 * ((20 - done) / 20) for done in range(20)
    ]  # exactly


def test_retries_are_charged_to_the_costliest_phase():
    agreed = agreed_plan()
    assert (agreed.releases(0), agreed.releases(1)) == (20, 8 + 2)


def test_the_half_range_covers_every_clamped_step_and_its_noise():
    agreed = agreed_plan()
    first = schedule(agreed.plan)[0]
    signal = 24.0 * 3 * 1.0
    assert half_range(agreed, first, "head") > signal
    noise = 24.0 * 3**0.5 * 13.1 / 2000 * tail(agreed)
    assert half_range(agreed, first, "head") == pytest.approx(signal + noise)


def test_the_range_holds_in_whichever_phase_the_retries_fall():
    """The head's releases cost most and are shortest: retries of the adapter draw more noise."""
    agreed = dataclasses.replace(agreed_plan(), noise_multipliers=(0.5, 20.0))
    assert agreed.releases(0) == 20 + 2
    draws = (20 * agreed.size(0) + (8 + 2) * agreed.size(1)) * 16
    assert 2 * draws * math.exp(-(tail(agreed) ** 2) / 2) * 2.0**40 == pytest.approx(1)


def test_the_range_is_that_of_the_noise_that_is_drawn():
    agreed = dataclasses.replace(agreed_plan(), noise_multipliers=(655.9 / 65536, 1.0))
    signal, drawn = 24.0 * 3 * 1.0, 24.0 * 3**0.5 * (656 / 65536) / 2000 * tail(agreed)
    assert half_range(agreed, schedule(agreed.plan)[0], "head") == pytest.approx(signal + drawn, rel=1e-12)


def test_read_plan_names_the_file(tmp_path):
    with pytest.raises(LocalError, match="does not exist"):
        read_plan(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nname = ")
    with pytest.raises(LocalError, match=r"broken\.toml is not valid TOML"):
        read_plan(broken)


def test_the_sums_of_a_large_round_are_those_of_its_cohorts():
    """Fields, thresholds, shares of noise and colluders are about cohorts of 64 to 128, not about 129 to 300 sites."""
    sizes = {"secure_aggregation__min_sites": 129, "secure_aggregation__max_sites": 300}
    agreed = agreed_plan(**sizes)
    terms = round_terms(agreed, schedule(agreed.plan)[0], ObjectRef("d" * 64, 400))
    assert (terms.min_sites, terms.layout.max_sites) == (64, 128)
    assert 2 * terms.layout.half_range * 128 < 2**terms.layout.bits
    assert honest_sites(agreed) == thresholds(64, 1).quorum - 1
    assert honest_sites(agreed_plan(**sizes, secure_aggregation__colluding=20)) == thresholds(64, 20).quorum - 20
    with pytest.raises(LocalError, match="colluding between 0 and 62"):
        agreed_plan(**sizes, secure_aggregation__colluding=63)
