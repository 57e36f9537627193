"""What must hold of a run whatever crashed in it: looked up in the files that the processes left, not asked of them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from typing import Any

from foedus_client.audit import verify as verify_site
from foedus_client.enrol import Membership
from foedus_client.ledger.accounts import Commitment
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_common.plan import AgreedPlan
from foedus_common.privacy import accounting
from foedus_server.audit import verify as verify_coordinator
from processes import CLOCK, Cluster


def judge(cluster: Cluster, agreed: AgreedPlan, policy: SitePolicy) -> None:
    """Of a run that is over. Raises AssertionError, or what looking raises, for the first rule that does not hold."""
    judge_coordinator(cluster, agreed)
    for home in cluster.homes.values():
        judge_site(home, agreed, policy)


def judge_coordinator(cluster: Cluster, agreed: AgreedPlan) -> None:
    """Each round is committed once, up to the last or to that at which the run failed; each sum is exact; the journal
    says so, and is what the sites signed."""
    run, attempts = cluster.operator.store.runs.run(agreed.run_id), cluster.operator.store.runs.attempts(agreed.run_id)
    assert {attempt.state for attempt in attempts} <= {"committed", "aborted"}, "an attempt is still open"
    committed = [attempt.round for attempt in attempts if attempt.state == "committed"]
    assert committed == list(range(run.rounds_done)), f"committed were the rounds {committed}"
    assert run.state == "failed" or run.rounds_done == agreed.plan.rounds, f"the run is {run.state}"
    cluster.assert_sums_are_exact(agreed)
    verify_coordinator(cluster.operator.home, cluster.operator.store)
    events = [entry.event for entry in cluster.operator.store.journal.entries()]
    logged = [e["round"] for e in events if e["event"] == "round.committed" and e["run"] == str(agreed.run_id)]
    assert logged == committed, f"the journal has the rounds {logged}"


def judge_site(home: Path, agreed: AgreedPlan, policy: SitePolicy) -> None:
    """Journal and ledger are whole and tell the same; the ledger is within every cap and counts at least what left; and
    nothing was answered in two ways."""
    member = Membership(home)
    with closing(SiteStore(home / "site.db", CLOCK)) as store:
        ledger = Ledger(store, CLOCK, member.key.sign)
        verify_site(store, ledger, member.name, member.public_key)
        account, run = ledger.account(agreed.plan.data.name), ledger.run(agreed.run_id)
    noted = told(home, agreed.run_id)

    masked = {(line["attempt"][1], line["answer"]) for line in noted if line["message"] == "MaskedInput"}
    for index, count in Counter(index for index, _ in masked).items():
        charged = sum(charge.state != "reserved" for charge in run.charges_of(index))
        assert count <= charged, f"{count} vectors of round {index} were masked, and {charged} charged"
    left, spent = (epsilon(agreed, releases) for releases in (len(masked), sum(run.spent)))
    assert left <= spent <= agreed.plan.privacy.epsilon <= policy.max_epsilon_per_run, (left, spent)
    assert account.epsilon(policy.delta, held=True) <= policy.max_epsilon_lifetime
    assert run.retries <= agreed.plan.secure_aggregation.retries, f"{run.retries} retries"
    assert not run.open, "the run is still open in the ledger"

    answers: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for line in noted:
        if line["message"] != "Declined":
            answers[*line["attempt"], line["sequence"]].add(line["answer"])
    assert all(len(each) == 1 for each in answers.values()), "a question was answered in two ways"


def epsilon(agreed: AgreedPlan, releases: int) -> float:
    """What the accountant says of so many releases of a plan with one phase."""
    commitment = Commitment.of(agreed)
    return accounting.epsilon(commitment.cost([releases]), commitment.delta) if releases else 0.0


def told(home: Path, run_id: int) -> list[dict[str, Any]]:
    """What `rigged_site` noted of the run, in order."""
    path = home / "answers"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["attempt"][0] == run_id]


def outcome(cluster: Cluster, run_id: int) -> str:
    """What became of a run that is over, in a few words."""
    aborted = sum(state == "aborted" for _, _, state in cluster.attempts(run_id))
    without = sum(len(survivors) < len(cluster.homes) for survivors in cluster.survivors(run_id))
    again = resent(cluster, run_id)
    parts = {
        f"{aborted} attempt{'s' * (aborted > 1)} aborted": aborted,
        f"{without} round{'s' * (without > 1)} without the site": without,
        f"{again} resent": again,
    }
    return ", ".join([cluster.state(run_id), *(part for part, count in parts.items() if count)])


def resent(cluster: Cluster, run_id: int) -> int:
    """How many answers that one process stored another gave, byte for byte."""
    by_answer: dict[str, set[int]] = defaultdict(set)
    for home in cluster.homes.values():
        for line in told(home, run_id):
            by_answer[line["answer"]].add(line["process"])
    return sum(len(processes) > 1 for processes in by_answer.values())
