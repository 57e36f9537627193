"""A site's own rules, and what they say to a plan: allowed, or refused with one sentence for each reason.

Policy is a ceiling: a plan above it is refused, never clamped. `decide` is pure: the plan, the facts, the policy and
the ledger's account are its arguments. The reasons are for this site's own eyes. Every default is on the safe side.
Knows no disk and no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from foedus_client.ledger.accounts import Account, Budget, Commitment, beyond, rare_delta
from foedus_common.errors import LocalError
from foedus_common.plan import TRAINER_VERSION, AgreedPlan
from foedus_common.privacy import accounting


@dataclass(frozen=True)
class SitePolicy:
    """`[policy]` of site.toml. Raises LocalError for values that cannot be.

    max_epsilon_per_run, max_epsilon_per_day, max_epsilon_lifetime: epsilon_local of one row at `delta`, the latter two
    per dataset; whatever a plan's unit of privacy is, for runs of both units may use the same rows. A day is any 24
    hours. min_sites: the least that a plan may allow in a sum. colluding: how many organisations that help the
    coordinator, each with all of its sites, a plan has to withstand at least. must_include: other organisations; at
    least as many of their sites as there are names have to be in every sum. base_models: manifest hashes; empty for
    every model that was added here. allow_without_privacy: lets plans with unit = "none" in, which no cap can
    hold.
    """

    max_epsilon_per_run: float = 8.0
    max_epsilon_per_day: float = 16.0
    max_epsilon_lifetime: float = 16.0
    delta: float = 1e-5
    min_sites: int = 3
    colluding: int = 1
    must_include: tuple[str, ...] = ()
    base_models: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("text-classification",)
    max_rank: int = 64
    require_approval: bool = True
    secure_aggregation: Literal["required"] = "required"
    allow_without_privacy: bool = False

    def __post_init__(self) -> None:
        caps = (self.max_epsilon_per_run, self.max_epsilon_per_day, self.max_epsilon_lifetime)
        if not all(0 < cap < math.inf for cap in caps):
            raise LocalError(
                "[policy] max_epsilon_per_run, max_epsilon_per_day and max_epsilon_lifetime must be above 0."
            )
        if not 1e-9 <= self.delta <= 1e-3:
            raise LocalError("[policy] delta must be between 1e-9 and 0.001.")
        if self.min_sites < 3:
            raise LocalError("[policy] min_sites must be 3 or more: the sum of two sites reveals the other one.")
        if self.colluding < 0:
            raise LocalError("[policy] colluding must be 0 or more.")
        if self.max_rank < 1:
            raise LocalError("[policy] max_rank must be 1 or more.")

    @property
    def budget(self) -> Budget:
        return Budget(self.max_epsilon_lifetime, self.delta, self.max_epsilon_per_day)


@dataclass(frozen=True)
class Facts:
    """What a decision rests on besides the plan.

    organisation: this site's own; organisations: of all sites in the root-signed roster, by site. models: manifest
    hashes of the models here. foreign_rows: rows of the dataset whose label the plan does not list.
    """

    organisation: str
    organisations: Mapping[str, str]
    models: frozenset[str]
    foreign_rows: int


@dataclass(frozen=True)
class Allowed:
    """Within policy. needs_approval: a person still has to say yes."""

    needs_approval: bool


@dataclass(frozen=True)
class Refused:
    """One sentence for each reason; at least one."""

    reasons: tuple[str, ...]


def decide(agreed: AgreedPlan, facts: Facts, policy: SitePolicy, account: Account | None) -> Allowed | Refused:
    """What the policy says to a plan. account: of the plan's dataset; None when the site has no such dataset."""
    reasons = (
        *_about_software(agreed, facts, policy),
        *_about_sites(agreed, facts, policy),
        *_about_data(agreed, facts, account),
        *_about_privacy(agreed, policy, account),
    )
    return Refused(reasons) if reasons else Allowed(policy.require_approval)


def capped(agreed: AgreedPlan, policy: SitePolicy, account: Account) -> bool:
    """Whether `max_epsilon_lifetime` applies: not to what policy lets go without privacy, nor once something went."""
    without = not agreed.plan.privacy.on or account.releases_without_privacy > 0
    return not (policy.allow_without_privacy and without)


def _about_software(agreed: AgreedPlan, facts: Facts, policy: SitePolicy) -> Iterator[str]:
    plan = agreed.plan
    if agreed.trainer_version != TRAINER_VERSION:
        yield f"The plan asks for {agreed.trainer_version}, and this site has {TRAINER_VERSION}."
    if plan.task.kind not in policy.tasks:
        yield f"The plan's task is {plan.task.kind}, which is not among [policy] tasks."
    if plan.adapter.rank > policy.max_rank:
        yield f"The plan's adapter has rank {plan.adapter.rank}, and [policy] max_rank is {policy.max_rank}."
    if policy.base_models and plan.model.sha256 not in policy.base_models:
        yield f"The plan's model {plan.model.sha256[:12]} is not among [policy] base_models."
    if plan.model.sha256 not in facts.models:
        yield f"The plan's model {plan.model.sha256[:12]} is not here; add it with `foedus-site model add`."


def _about_sites(agreed: AgreedPlan, facts: Facts, policy: SitePolicy) -> Iterator[str]:
    secure = agreed.plan.secure_aggregation
    fewest = secure.size.smallest_sum
    if fewest < policy.min_sites:
        yield f"The plan allows sums of {fewest} sites, and [policy] min_sites is {policy.min_sites}."
    if secure.colluding < policy.colluding:
        yield (
            f"The plan withstands {secure.colluding} colluding organisations, and [policy] colluding is "
            f"{policy.colluding}."
        )
    for organisation in policy.must_include:
        if organisation == facts.organisation:
            yield f"[policy] must_include names this site's own organisation, {organisation!r}; name others."
        elif organisation not in facts.organisations.values():
            yield f"The roster has no site of {organisation!r}, which [policy] must_include names."


def _about_data(agreed: AgreedPlan, facts: Facts, account: Account | None) -> Iterator[str]:
    name = agreed.plan.data.name
    if account is None:
        yield f"There is no dataset named {name!r} here; add it with `foedus-site data add`."
    elif facts.foreign_rows:
        yield f"Dataset {name!r} has {facts.foreign_rows} rows whose label is not among the plan's labels."


def _about_privacy(agreed: AgreedPlan, policy: SitePolicy, account: Account | None) -> Iterator[str]:
    commitment = Commitment.of(agreed)
    if not commitment.private:
        if not policy.allow_without_privacy:
            yield "The plan turns differential privacy off, and [policy] allow_without_privacy is false."
        return
    privacy = agreed.plan.privacy
    if privacy.epsilon is not None and privacy.delta is not None:
        truth = accounting.epsilon(accounting.events_of(agreed, accounting.promised_view(agreed.plan)), privacy.delta)
        if truth > privacy.epsilon:
            stated = f"epsilon {privacy.epsilon:g} at delta {privacy.delta:g}"
            yield f"The plan says {stated}, but its noise gives {truth:.4g}."
    epsilon = commitment.epsilon(policy.delta)
    if epsilon > policy.max_epsilon_per_run:
        yield (
            f"The plan can spend epsilon {epsilon:.4g} at delta {policy.delta:g}, and [policy] max_epsilon_per_run is "
            f"{policy.max_epsilon_per_run:.4g}."
        )
    else:
        yield from _about_rare_draws(commitment, policy)
    of_a_round = max(accounting.epsilon([event], policy.delta) for event in commitment.events)
    if of_a_round > policy.max_epsilon_per_day:
        yield (
            f"A single round of the plan can spend epsilon {of_a_round:.4g} at delta {policy.delta:g}, and [policy] "
            f"max_epsilon_per_day is {policy.max_epsilon_per_day:.4g}."
        )
    if account and capped(agreed, policy, account) and not account.admits(commitment, policy.budget):
        yield beyond(account, commitment, policy.budget)


def _about_rare_draws(commitment: Commitment, policy: SitePolicy) -> Iterator[str]:
    rare, bound = rare_delta(policy.delta), 3 * policy.max_epsilon_per_run + 1
    epsilon = commitment.epsilon(rare)
    if epsilon > bound:
        yield (
            f"The plan hides behind delta: at {rare:g} instead of {policy.delta:g} it can spend epsilon {epsilon:.4g}, "
            f"and {bound:.4g} is the most there; it draws rows rarely, and shows those with too little noise."
        )
