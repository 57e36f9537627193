"""What a dataset has spent of its privacy, may yet spend and has left: plain values folded from the ledger's entries.

Everything here is pure, so that policy can decide on it and tests can enumerate it. An account stands for one dataset,
or for several that share rows. Source: docs/protocol.md section 4, docs/privacy.md. Knows no disk and no clock.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from foedus_common.clock import DAY
from foedus_common.errors import LocalError
from foedus_common.journal import Entry
from foedus_common.plan import LEAST_DELTA, AgreedPlan
from foedus_common.privacy import accounting
from foedus_common.privacy.accounting import Curve, GaussianSteps

RARELY = 1e-3
"""What a plan may spend at delta it may spend three times, and one more, at this part of delta. Else it could draw rows
so rarely that showing them plainly is within delta, and call that an epsilon of 0 (docs/privacy.md)."""


def rare_delta(delta: float) -> float:
    """At which a run is looked at once more."""
    return max(delta * RARELY, LEAST_DELTA)


@dataclass(frozen=True)
class Budget:
    """What a dataset may spend over its life, and within any 24 hours: epsilons at delta."""

    epsilon: float
    delta: float
    per_day: float = math.inf


@dataclass(frozen=True)
class Commitment:
    """The most that a run can release of one dataset.

    events: per phase, what one release costs; empty for a run without privacy. delta: the plan's; 0 without privacy.
    rounds: per phase. releases: per phase, rounds and the retries that calibration put there. retries: how many more
    trainings the run may need in all.
    """

    run_id: int
    plan_digest: str
    dataset: str
    events: tuple[GaussianSteps, ...]
    delta: float
    rounds: tuple[int, ...]
    releases: tuple[int, ...]
    retries: int

    @classmethod
    def of(cls, agreed: AgreedPlan) -> Commitment:
        plan, phases = agreed.plan, range(len(agreed.plan.phase))
        return cls(
            run_id=agreed.run_id,
            plan_digest=agreed.digest().hex(),
            dataset=plan.data.name,
            events=tuple(accounting.event_of_phase(agreed, phase) for phase in phases) if plan.privacy.on else (),
            delta=plan.privacy.delta or 0.0,
            rounds=tuple(phase.rounds for phase in plan.phase),
            releases=tuple(agreed.releases(phase) for phase in phases),
            retries=plan.secure_aggregation.retries,
        )

    @property
    def private(self) -> bool:
        return bool(self.events)

    def phase(self, round_index: int) -> int:
        """The phase of a round; rounds count from 0 over the whole run. Raises LocalError for one beyond the last."""
        for phase, rounds in enumerate(self.rounds):
            if 0 <= round_index < rounds:
                return phase
            round_index -= rounds
        raise LocalError(f"Run {self.run_id} has no such round.")

    def cost(self, times: Sequence[int]) -> list[GaussianSteps]:
        """The events of `times` releases per phase."""
        return [accounting.repeated(event, count) for event, count in zip(self.events, times, strict=False)]

    def epsilon(self, delta: float) -> float:
        """Epsilon of the whole run by PLD; infinity without privacy."""
        return accounting.epsilon(self.cost(self.releases), delta) if self.private else math.inf

    def curve(self) -> Curve:
        """Rényi curve of every round and of every retry, in whichever phases the retries fall."""
        rounds = accounting.rdp(self.cost(self.rounds))
        retry = map(max, zip(accounting.rdp([]), *(accounting.rdp([event]) for event in self.events), strict=True))
        return tuple(all_rounds + self.retries * one for all_rounds, one in zip(rounds, retry, strict=True))


@dataclass(frozen=True)
class Consent:
    """Somebody's yes to one plan, as the ledger keeps it under the site's signature. Times in Unix seconds.

    number: of its entry. by: "policy", or the person. epsilon_cap: of all that the run may release, at `delta`; None
    without privacy. expires_at: no round is trained after it; None for never.
    """

    number: int
    plan_digest: str
    dataset: str
    purpose: str
    by: str
    at: float
    epsilon_cap: float | None
    delta: float
    expires_at: float | None

    def holds(self, now: float) -> bool:
        return self.expires_at is None or now <= self.expires_at


@dataclass(frozen=True)
class Charge:
    """One training of one round. number: of its first entry in the ledger; at: Unix seconds."""

    number: int
    round: int
    phase: int
    at: float
    state: Literal["reserved", "released", "committed"] = "reserved"


@dataclass(frozen=True)
class Run:
    """A run on an account: what it may release, and what it has. delta: the site's own when it was last approved.

    lost_at: when its records were found lost, if they were: all that it might have released counts as released then.
    """

    commitment: Commitment
    delta: float
    charges: tuple[Charge, ...] = ()
    open: bool = True
    lost_at: float | None = None
    consent: Consent | None = None

    @property
    def lost(self) -> bool:
        return self.lost_at is not None

    @property
    def spent(self) -> tuple[int, ...]:
        """Releases per phase of which the coordinator has, or may have, the vector."""
        if self.lost:
            return self.commitment.releases
        phases = [charge.phase for charge in self.charges if charge.state != "reserved"]
        return tuple(phases.count(phase) for phase in range(len(self.commitment.rounds)))

    def spent_since(self, moment: float) -> tuple[int, ...]:
        """Trainings per phase after `moment` of which the coordinator has, may have or may yet get the vector."""
        if self.lost_at is not None:
            return self.commitment.releases if self.lost_at > moment else (0,) * len(self.commitment.rounds)
        late = [each for each in self.charges if each.at > moment and (self.open or each.state != "reserved")]
        return tuple(sum(each.phase == phase for each in late) for phase in range(len(self.commitment.rounds)))

    @property
    def counts(self) -> bool:
        """Whether the account has anything to bear for this run."""
        return self.open or any(self.spent)

    @property
    def retries(self) -> int:
        """Trainings beyond the first of their round."""
        return len(self.charges) - len({charge.round for charge in self.charges})

    def charges_of(self, round_index: int) -> tuple[Charge, ...]:
        return tuple(charge for charge in self.charges if charge.round == round_index)

    def after_retry(self, phase: int) -> tuple[int, ...]:
        """Releases per phase if every round is released, every retry so far, and one more retry in `phase`."""
        counts = list(self.commitment.rounds)
        counts[phase] += 1
        for charge in self.charges:
            counts[charge.phase] += 1
        for index in {charge.round for charge in self.charges}:
            counts[self.commitment.phase(index)] -= 1
        return tuple(counts)

    def cost(self, held: bool) -> list[GaussianSteps]:
        """What was released or, if `held` and the run is open, all that it may release in the end."""
        return self.commitment.cost(self.commitment.releases if held and self.open else self.spent)

    def curve(self, held: bool) -> Curve:
        return self.commitment.curve() if held and self.open else accounting.rdp(self.cost(held=False))


@dataclass(frozen=True)
class Account:
    """The ledger line of one dataset, or of several that share rows."""

    name: str
    datasets: tuple[str, ...] = ()
    runs: Mapping[int, Run] = dataclasses.field(default_factory=dict)

    @property
    def releases(self) -> int:
        return sum(sum(run.spent) for run in self.runs.values())

    @property
    def releases_without_privacy(self) -> int:
        return sum(sum(run.spent) for run in self.runs.values() if not run.commitment.private)

    def epsilon(self, delta: float, held: bool = False) -> float:
        """Epsilon of what was spent or, if `held`, of that and all that open runs may yet release.

        PLD for one run; several add up as Rényi curves. Infinity once anything was released without privacy.
        """
        runs = [run for run in self.runs.values() if any(run.spent) or (held and run.open)]
        if any(not run.commitment.private for run in runs):
            return math.inf
        if len(runs) == 1:
            return accounting.epsilon(runs[0].cost(held), delta)
        return accounting.epsilon_of_rdp(_total(run.curve(held) for run in runs), delta)

    def admits(self, commitment: Commitment, budget: Budget) -> bool:
        """Whether the run, all of it, stays within the budget together with everything spent and reserved.

        A dataset's first run needs its PLD to be within. Later runs were chosen after the first was seen: they pass
        the Rényi filter at the one order that the budget fixes, the first run included. One that only PLD admitted
        therefore leaves room for no other, for which proof holds must not depend on what was released.
        """
        if not commitment.private:
            return False
        runs = self._runs_that_count(besides=commitment.run_id)
        if not runs:
            return commitment.epsilon(budget.delta) <= budget.epsilon
        order, room = self._room(runs, budget)
        return commitment.curve()[order] <= room

    def spent_since(self, moment: float, delta: float) -> float:
        """Epsilon of what was trained after `moment`, without what had no privacy: no cap on a day can hold that."""
        late = self._costs_since(moment)
        if len(late) == 1:
            return accounting.epsilon(late[0], delta)
        return accounting.epsilon_of_rdp(_total(map(accounting.rdp, late)), delta)

    def admits_today(self, run_id: int, phase: int, budget: Budget, now: float) -> bool:
        """Whether one more training of this phase stays within what a day may spend, by the rules of `admits`."""
        moment, run = now - DAY, self.runs[run_id]
        if not run.commitment.private or budget.per_day == math.inf:
            return True
        counts = list(run.spent_since(moment))
        counts[phase] += 1
        others = dataclasses.replace(self, runs={key: each for key, each in self.runs.items() if key != run_id})
        costs = [run.commitment.cost(counts), *others._costs_since(moment)]
        if len(costs) == 1:
            return accounting.epsilon(costs[0], budget.delta) <= budget.per_day
        order, room = accounting.rdp_budget(budget.per_day, budget.delta)
        return _total(map(accounting.rdp, costs))[order] <= room

    def _costs_since(self, moment: float) -> list[list[GaussianSteps]]:
        """Per run with privacy that trained after `moment`."""
        late = [(run.commitment, run.spent_since(moment)) for run in self.runs.values() if run.commitment.private]
        return [commitment.cost(counts) for commitment, counts in late if any(counts)]

    def left(self, budget: Budget) -> float:
        """Epsilon of the largest further run that `admits` would let in, if it were one unsampled Gaussian."""
        runs = self._runs_that_count()
        if not runs:
            return budget.epsilon
        order, room = self._room(runs, budget)
        return accounting.gaussian_epsilon(max(0.0, room) / accounting.ORDERS[order], budget.delta)

    def _runs_that_count(self, besides: int | None = None) -> list[Run]:
        return [run for run_id, run in self.runs.items() if run.counts and run_id != besides]

    @staticmethod
    def _room(runs: Sequence[Run], budget: Budget) -> tuple[int, float]:
        """The filter's order, and what it leaves there; minus infinity once nothing more may be let in."""
        order, limit = accounting.rdp_budget(budget.epsilon, budget.delta)
        if any(not run.commitment.private or run.commitment.curve()[order] > limit for run in runs):
            return order, -math.inf
        return order, limit - _total(run.curve(held=True) for run in runs)[order]


def beyond(account: Account, commitment: Commitment, budget: Budget) -> str:
    """The sentence for a run that `Account.admits` refuses."""
    run, before = commitment.epsilon(budget.delta), account.epsilon(budget.delta, held=True)
    return (
        f"The run could spend epsilon {run:.4g} of dataset {commitment.dataset!r}, which has spent or reserved "
        f"{before:.4g}, and together they could pass the {budget.epsilon:.4g} (at delta {budget.delta:g}) of "
        "[policy] max_epsilon_lifetime."
    )


def fold(entries: Iterable[Entry]) -> dict[str, Account]:
    """The accounts, by name, that the entries amount to in their order."""
    accounts: dict[str, Account] = {}
    of_dataset: dict[str, str] = {}
    of_run: dict[int, str] = {}
    for entry in entries:
        event = entry.event
        if event["event"] == "add_dataset":
            name, dataset = event["account"], event["dataset"]
            of_dataset[dataset] = name
            account = accounts.get(name, Account(name))
            accounts[name] = dataclasses.replace(account, datasets=(*account.datasets, dataset))
            continue
        if event["event"] == "new_key":
            continue
        if event["event"] == "accept_loss":
            accounts = {name: _without(account, event["runs"], event["at"]) for name, account in accounts.items()}
            continue
        if event["event"] == "reserve_run":
            run = Run(_commitment(event), event["site_delta"])
            of_run[event["run_id"]] = of_dataset[event["dataset"]]
        else:
            run = _after(accounts[of_run[event["run_id"]]].runs[event["run_id"]], entry.number, event)
        account = accounts[of_run[event["run_id"]]]
        accounts[account.name] = dataclasses.replace(account, runs={**account.runs, event["run_id"]: run})
    return accounts


def approval(agreed: AgreedPlan, **decided: Any) -> dict[str, Any]:
    """The details of an `approve` entry: what was agreed to, and what was decided (the other fields of `Consent`)."""
    plan = agreed.plan
    about = {"plan_digest": agreed.digest().hex(), "dataset": plan.data.name, "purpose": plan.run.purpose}
    return {"run_id": agreed.run_id, **about, **decided}


def reservation(commitment: Commitment, site_delta: float) -> dict[str, Any]:
    """The details of a `reserve_run` entry; `fold` reads them back."""
    return {**dataclasses.asdict(commitment), "site_delta": site_delta}


def _commitment(event: Mapping[str, Any]) -> Commitment:
    fields = {field.name: event[field.name] for field in dataclasses.fields(Commitment)}
    fields["events"] = tuple(GaussianSteps(**table) for table in event["events"])
    return Commitment(**{**fields, "rounds": tuple(event["rounds"]), "releases": tuple(event["releases"])})


def _after(run: Run, number: int, event: Mapping[str, Any]) -> Run:
    match event["event"]:
        case "approve":
            fields = {field.name: event[field.name] for field in dataclasses.fields(Consent) if field.name != "number"}
            return dataclasses.replace(run, consent=Consent(number, **fields))
        case "reserve_round":
            charge = Charge(number, event["round"], event["phase"], event["at"])
            return dataclasses.replace(run, charges=(*run.charges, charge))
        case "release":
            return _marked(run, event["charge"], "released")
        case "commit":
            return _marked(run, event["charge"], "committed")
        case "close_run":
            return dataclasses.replace(run, open=False)
        case "reopen_run":
            return dataclasses.replace(run, open=True, delta=event["site_delta"])
        case unknown:
            raise LocalError(f"The ledger has an entry {unknown!r} that this program does not know.")


def _without(account: Account, lost: Sequence[int], at: float) -> Account:
    """The account when the records of these runs are no more."""
    runs = {
        run_id: dataclasses.replace(run, open=False, lost_at=at) if run_id in lost else run
        for run_id, run in account.runs.items()
    }
    return dataclasses.replace(account, runs=runs)


def _marked(run: Run, number: int, state: Literal["released", "committed"]) -> Run:
    charges = (dataclasses.replace(c, state=state) if c.number == number else c for c in run.charges)
    return dataclasses.replace(run, charges=tuple(charges))


def _total(curves: Iterable[Curve]) -> Curve:
    return tuple(map(math.fsum, zip(accounting.rdp([]), *curves, strict=True)))
