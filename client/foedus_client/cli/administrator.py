"""What a command of `foedus-site` works with: the home of a site that has joined, opened as the daemon opens it."""

from __future__ import annotations

import os
from pathlib import Path

from foedus_client.approval import Approval
from foedus_client.audit import note_standing
from foedus_client.config import SiteHome
from foedus_client.enrol import Membership
from foedus_client.ledger.high_water import mark_name, state_folder
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import StoredPlan
from foedus_common.clock import SystemClock
from foedus_common.errors import LocalError
from foedus_common.plan import AgreedPlan, parse_agreed_plan

CLOCK = SystemClock()


class Administrator:
    """What commands need of a home that exists."""

    def __init__(self, path: Path) -> None:
        self.home = SiteHome.open(path)
        self.membership = Membership(path)
        member = self.membership
        mark = mark_name(member.name, member.token.root_public_key)
        self.store = self.home.store(CLOCK, state_folder(os.environ), mark)
        self.ledger = Ledger(self.store, CLOCK, member.key.sign, member.public_key)
        note_standing(self.store, member, self.home.settings.policy)

    def approval(self) -> Approval:
        roster = self.membership.roster(CLOCK.now())
        return Approval(self.membership.name, roster, self.home.settings.policy, self.store, self.ledger)

    def plan(self, text: str) -> tuple[StoredPlan, AgreedPlan]:
        """The plan that a person means: by run id, name, or the first digits of its digest; the newest that fits."""
        for stored in reversed(self.store.plans()):
            agreed = parse_agreed_plan(stored.canonical)
            if text in (str(stored.run_id), agreed.plan.run.name) or (
                len(text) >= 6 and stored.digest.hex().startswith(text)
            ):
                return stored, agreed
        raise LocalError(f"No plan {text!r} was received here; `foedus-site plans` shows those that were.")
