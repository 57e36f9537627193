"""Figures: what is shown of a run follows from what was recorded of it, attempt by attempt."""

from __future__ import annotations

from typing import Any

import pytest

from foedus_common.privacy.accounting import epsilon, event_of_phase, events_of
from foedus_server.commands import describe
from foedus_simulations import figures
from foedus_simulations.stopwatch import Stopwatch
from plans import agreed_plan

AGREED = agreed_plan(phase__0__rounds=2, phase__1__rounds=2, secure_aggregation__retries=0)
PHASES = describe(AGREED)["phases"]


def attempt(state: str = "committed", up: int = 3000) -> dict[str, Any]:
    seconds = {"training": 10.0, "keys": 0.25, "unmasking": 0.5}
    return {"state": state, "seconds": seconds, "cohort": ["a", "b", "c"], "bytes_up": up, "bytes_down": 9000}


def test_rounds_number_from_one_and_share_the_bytes_over_the_cohort() -> None:
    attempts = [attempt(), attempt("aborted"), attempt(), attempt(), attempt(up=6000)]
    found = figures.rounds(AGREED.plan, PHASES, attempts, [0.1, 0.2, 0.3, 0.4])
    assert [(r.number, r.phase, r.accuracy) for r in found] == [
        (1, "head", 0.1),
        (2, "head", 0.2),
        (3, "adapter", 0.3),
        (4, "adapter", 0.4),
    ]
    assert [r.bytes_up for r in found] == [1000, 1000, 1000, 2000]
    assert {r.bytes_down for r in found} == {3000}


def test_epsilon_by_round_grows_and_ends_at_that_of_the_whole_run() -> None:
    found = figures.rounds(AGREED.plan, PHASES, [attempt()] * 4, [0.5] * 4)
    spent = [played.epsilon or 0.0 for played in found]
    delta = AGREED.plan.privacy.delta or 0.0
    assert spent == sorted(spent)
    assert spent[0] == pytest.approx(epsilon([event_of_phase(AGREED, 0)], delta))
    assert spent[-1] == pytest.approx(epsilon(events_of(AGREED), delta))


def test_without_privacy_no_round_has_an_epsilon() -> None:
    phase = {"train": "head", "rounds": 2, "learning_rate": 0.1, "epochs": 1.0, "batch_size": 4}
    plan = agreed_plan(privacy={"unit": "none"}, phase=[phase]).plan
    phases = [{"noise_multiplier": None, "parameters": 60}]
    assert [r.epsilon for r in figures.rounds(plan, phases, [attempt()] * 2, [0.5] * 2)] == [None, None]


def test_a_round_without_a_score_is_a_mistake_and_not_left_out() -> None:
    with pytest.raises(ValueError, match="shorter"):
        figures.rounds(AGREED.plan, PHASES, [attempt()] * 4, [0.5] * 3)


def test_the_run_is_taken_apart_where_it_stood() -> None:
    seconds = {"set-up": 5.0, "run": 30.0, "evaluation": 2.0}
    found = figures.stages(seconds, [attempt(), attempt("aborted"), attempt()])
    assert list(found.items()) == [
        ("set-up", 5.0),
        ("local training", 28.5),
        ("secure aggregation", 1.5),
        ("evaluation", 2.0),
    ]


def test_retries_are_spoken_of_as_they_were() -> None:
    plan = agreed_plan().plan
    assert "reserved 2 retries, which no round needed" in figures.retries(plan, [attempt()])
    assert figures.retries(plan, [attempt("aborted"), attempt()]).startswith("1 attempts failed")
    assert figures.retries(AGREED.plan, [attempt()]) == ""


def test_the_commonest_label() -> None:
    assert figures.share_of_commonest(["good", "bad", "good", "good"]) == 0.75


def test_a_stage_that_is_entered_again_or_fails_adds_up_where_it_stood() -> None:
    watch = Stopwatch()
    with watch.stage("set-up"):
        pass
    first = watch.seconds["set-up"]
    with pytest.raises(KeyError), watch.stage("run"):
        raise KeyError
    with watch.stage("set-up"):
        pass
    assert list(watch.seconds) == ["set-up", "run"]
    assert watch.seconds["set-up"] > first > 0
    assert sum(watch.seconds.values()) <= watch.total
