"""A plan before the site: what policy says, and what saying yes sets in motion. Used by the daemon and by people.

Approval, the ledger's reservation and the plan's new state are one transaction: there is no approved plan without its
budget set aside, nor without an entry that says who agreed to what, until when, under the site's signature.
"""

from __future__ import annotations

import dataclasses

from foedus_client.data import foreign_labels
from foedus_client.ledger.accounts import Account, Commitment
from foedus_client.ledger.ledger import Ledger
from foedus_client.policy import Allowed, Facts, Refused, SitePolicy, capped, decide
from foedus_client.store import SiteStore, StoredPlan
from foedus_common.errors import LocalError, PolicyRefusal
from foedus_common.identity import Roster
from foedus_common.plan import AgreedPlan, parse_agreed_plan

POLICY = "policy"
"""Who decides where no person has to."""


@dataclasses.dataclass(frozen=True)
class Approval:
    """Decides on plans for one site. `roster`: the newest one; `site`: this site's name in it."""

    site: str
    roster: Roster
    policy: SitePolicy
    store: SiteStore
    ledger: Ledger

    def reasons(self, agreed: AgreedPlan, by: str = "") -> tuple[str, ...]:
        """Everything that stands against the plan now; empty when `by` may approve it.

        Labels of the data that the plan does not list stand against it for people only. What policy answers by itself
        the coordinator learns at once and may ask as often as it likes, with any list of labels: such rows then take no
        part, and nothing tells that they are there (docs/decisions/0033).
        """
        facts = self._facts(agreed)
        if by == POLICY:
            facts = dataclasses.replace(facts, foreign_rows=0)
        return _reasons(decide(agreed, facts, self.policy, self._account(agreed)))

    def left_out(self, agreed: AgreedPlan) -> int:
        """Rows of the plan's dataset that take no part, for their label is not the plan's. For this machine's eyes."""
        return self._facts(agreed).foreign_rows

    def lasting_reasons(self, agreed: AgreedPlan) -> tuple[str, ...]:
        """What stands against it whatever is added here: not that the model or the data is still missing."""
        facts = self._facts(agreed)
        prepared = dataclasses.replace(facts, models=facts.models | {agreed.plan.model.sha256}, foreign_rows=0)
        account = self._account(agreed) or Account("", (), {})
        return _reasons(decide(agreed, prepared, self.policy, account))

    def approve(
        self, digest: bytes, by: str, expires_at: float | None = None, epsilon_cap: float | None = None
    ) -> AgreedPlan:
        """Say yes to a pending plan and set its budget aside, or to an approved one anew, which replaces what was said.

        by: POLICY, or the person's name. expires_at: Unix seconds; None for never. epsilon_cap: of what the run may
        release, at the policy's delta; None for all that the plan asks for. Raises PolicyRefusal with every reason
        against it, LocalError when no such plan waits or is approved, or for a cap that a plan cannot have.
        """
        with self.store.transaction("approve"):
            stored = self.store.plan(digest)
            agreed = self._waiting(digest) if stored is None or stored.state != "approved" else _plan(stored)
            asked = self.epsilon(agreed)
            if epsilon_cap is not None and (asked is None or not epsilon_cap > 0):
                raise LocalError("A cap on epsilon has to be above 0, and the plan has to have privacy.")
            if reasons := self.reasons(agreed, by):
                raise PolicyRefusal(reasons)
            limited = capped(agreed, self.policy, self.ledger.account(agreed.plan.data.name))
            self.ledger.reserve_run(agreed, self.policy.budget, capped=limited)
            self.ledger.approve(
                agreed, by, self.policy.delta, asked if epsilon_cap is None else epsilon_cap, expires_at
            )
            self.store.decide_plan(digest, "approved", by)
        return agreed

    def needs_person(self, agreed: AgreedPlan) -> bool:
        """Whether only a person may say yes: policy asks for one, or one has spoken before. The coordinator can have a
        run decided anew, by stopping it, and must not get rid of a person's cap or date that way."""
        runs = (account.runs.get(agreed.run_id) for account in self.ledger.accounts().values())
        consents = [run.consent for run in runs if run and run.consent]
        return self.policy.require_approval or any(consent.by != POLICY for consent in consents)

    def epsilon(self, agreed: AgreedPlan) -> float | None:
        """Of all that the run may release, at the policy's delta; None without privacy."""
        commitment = Commitment.of(agreed)
        return commitment.epsilon(self.policy.delta) if commitment.private else None

    def decline(self, digest: bytes, by: str) -> None:
        """Say no; the coordinator learns only that the site does not take part. Raises LocalError as `approve`."""
        self._waiting(digest)
        self.store.decide_plan(digest, "declined", by)

    def withdraw(self, digest: bytes, by: str) -> None:
        """Leave an approved plan for good: no further round is trained, and what was never released returns.

        Raises LocalError when the plan is not approved.
        """
        with self.store.transaction("withdraw"):
            stored = self.store.plan(digest)
            if stored is None or stored.state != "approved":
                state = "unknown here" if stored is None else stored.state
                raise LocalError(f"The plan is {state}, so there is nothing to withdraw from; see `foedus-site plans`.")
            self.ledger.close_run(stored.run_id)
            self.store.decide_plan(digest, "withdrawn", by)

    def _waiting(self, digest: bytes) -> AgreedPlan:
        stored = self.store.plan(digest)
        if stored is None or stored.state != "pending":
            state = "unknown here" if stored is None else stored.state
            raise LocalError(f"The plan is {state}, so there is nothing to decide; see `foedus-site plans`.")
        return _plan(stored)

    def _facts(self, agreed: AgreedPlan) -> Facts:
        dataset = self.store.dataset(agreed.plan.data.name)
        foreign = foreign_labels(dataset.label_counts, agreed.plan.task.labels) if dataset else {}
        return Facts(
            organisation=self.roster.site(self.site).org,
            organisations=self.roster.organisations,
            models=frozenset(model.manifest_sha256 for model in self.store.models()),
            foreign_rows=sum(foreign.values()),
        )

    def _account(self, agreed: AgreedPlan) -> Account | None:
        if self.store.dataset(agreed.plan.data.name) is None:
            return None
        return self.ledger.account(agreed.plan.data.name)


def _plan(stored: StoredPlan) -> AgreedPlan:
    return parse_agreed_plan(stored.canonical)


def _reasons(decision: Allowed | Refused) -> tuple[str, ...]:
    return decision.reasons if isinstance(decision, Refused) else ()
