"""kill -9 with real processes: sites and the coordinator die at each stage, and every committed sum is still exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from foedus_client.policy import SitePolicy
from foedus_simulations.parties import until
from known_sites import plan_of
from processes import IMPATIENCE, Cluster, killed
from rigged import STAGES

ALWAYS, THIRD, FOURTH = ("north", "east"), "south", "west"
EVERYBODY = tuple(sorted((*ALWAYS, THIRD, FOURTH)))
WITHOUT_FOURTH = tuple(sorted((*ALWAYS, THIRD)))
POLICY = {
    "require_approval": False,
    "allow_without_privacy": True,
    "max_epsilon_lifetime": 200.0,
    "max_epsilon_per_day": 200.0,
}
FOR_THREE = {"adapter__rank": 8}
"""Changes to a plan that the fourth site's policy refuses."""


@pytest.fixture(scope="module")
def four(make_cluster: Callable[..., Cluster]) -> Cluster:
    """The first two sites run through all tests; the coordinator, the third and the fourth are the tests' own."""
    policies = {name: SitePolicy(**POLICY) for name in (*ALWAYS, THIRD)}
    cluster = make_cluster({**policies, FOURTH: SitePolicy(**POLICY, max_rank=4)}, patience=IMPATIENCE)
    for name in ALWAYS:
        cluster.start(name)
    return cluster


def test_a_site_killed_at_each_stage_does_not_stop_the_other_three(four: Cluster) -> None:
    with four.running("coordinator", THIRD):
        agreed = four.submit(plan_of(rounds=len(STAGES) + 1), run_id=1)
        for index, stage in enumerate(STAGES):
            killed(four.start(FOURTH, FOEDUS_KILL=f"{index}:{stage}"))
            four.await_rounds(1, index + 1)
        with four.running(FOURTH):
            four.await_state(1, "finished")

    assert [state for _, _, state in four.attempts(1)] == ["committed"] * (len(STAGES) + 1)
    delivered = ("survivors", "unmask")  # by then its vector was there
    by_stage = [EVERYBODY if stage in delivered else WITHOUT_FOURTH for stage in STAGES]
    assert four.survivors(1) == [*by_stage, EVERYBODY]
    four.assert_sums_are_exact(agreed)


def test_a_coordinator_killed_at_each_stage_goes_on_from_the_last_committed_round(four: Cluster) -> None:
    stages = ("invite", *STAGES)
    agreed = four.submit(plan_of(rounds=len(stages)), run_id=2)
    with four.running(THIRD, FOURTH):
        for index, stage in enumerate(stages):
            killed(four.start("coordinator", FOEDUS_KILL=f"{index}:{stage}"))
            assert four.rounds_done(2) == index
        with four.running("coordinator"):
            four.await_state(2, "finished")
            until(lambda: four.plan_state(THIRD, 2) == "finished", 60, "the site hearing that the run ended")

    assert four.attempts(2) == [
        (index, attempt, state)
        for index in range(len(stages))
        for attempt, state in enumerate(("aborted", "committed"))
    ]
    four.assert_sums_are_exact(agreed)
    retried = stages.index("survivors"), stages.index("unmask")  # vectors were masked: fresh ones, at a fresh charge
    for name in EVERYBODY:
        rounds = [index for index, _ in four.charges(name, 2)]
        assert rounds == sorted([*range(len(stages)), *retried])
    assert four.command("audit", "verify").returncode == 0


def test_two_runs_at_once_do_not_disturb_each_other(four: Cluster) -> None:
    both = [four.submit(plan_of(rounds=3), run_id=run_id) for run_id in (5, 6)]
    with four.running("coordinator", THIRD, FOURTH):
        for agreed in both:
            four.await_state(agreed.run_id, "finished")
    for agreed in both:
        assert four.survivors(agreed.run_id) == [EVERYBODY] * 3
        four.assert_sums_are_exact(agreed)


def test_one_of_three_killed_aborts_the_attempt_and_the_round_is_tried_again(four: Cluster) -> None:
    agreed = four.submit(plan_of(rounds=2, **FOR_THREE), run_id=3)
    with four.running("coordinator", FOURTH):
        killed(four.start(THIRD, FOEDUS_KILL="0:mask"))
        until(lambda: four.attempts(3) == [(0, 0, "aborted")], 60, "the attempt's end")
        with four.running(THIRD):
            four.await_state(3, "finished")

    assert four.attempts(3) == [(0, 0, "aborted"), (0, 1, "committed"), (1, 0, "committed")]
    four.assert_sums_are_exact(agreed)
    assert [index for index, _ in four.charges("north", 3)] == [0, 0, 1]  # it had masked its vector
    assert [index for index, _ in four.charges(THIRD, 3)] == [0, 1]  # it had not: the stored vector served


def test_without_privacy_the_others_refuse_to_try_again_and_the_run_fails_in_a_sentence(four: Cluster) -> None:
    four.submit(plan_of(rounds=2, private=False, **FOR_THREE), run_id=4)
    with four.running("coordinator", FOURTH):
        killed(four.start(THIRD, FOEDUS_KILL="0:mask"))
        with four.running(THIRD):
            watched = four.command("run", "watch", "4")

    assert watched.returncode == 1
    sentence = "Round 1 was given up after 6 attempts: Sites ready for the round: 1; the plan needs 3."
    assert watched.stdout == f"icd-chapters failed after 0 of 2 rounds: {sentence}\n"
    assert [index for index, _ in four.charges("north", 4)] == [0]
