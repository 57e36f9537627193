"""What a site keeps of its coordinator's runs, and how long: what recovery may still need, and nothing else.

An adapter lies there while its round is trained from it, a run's first adapter until the run is over. A vector lies
there from training until it is masked; the masked one until the round is over. What a download brought before it was
cut stays a day for the next try, one of each run at most. A plan lies in the database while somebody may decide on it
or it was among the last that ended (`foedus_client.store.plans`).
"""

from __future__ import annotations

from foedus_client.store import OVER, SiteStore, StoredPlan
from foedus_common.clock import DAY, Clock
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.plan import AgreedPlan, parse_agreed_plan

PARTIAL_DAYS, STOPPED_DAYS = 1, 30
"""How long what was downloaded in part, and what a stopped run left, is kept for going on with it."""


def sweep(objects: ObjectStore, store: SiteStore, clock: Clock) -> None:
    """Erase what belongs to no run that may go on. Before the site is at work, for a download looks like nothing's."""
    objects.sweep(_wanted(store, clock), before=clock.now() - PARTIAL_DAYS * DAY)


def forget_run(objects: ObjectStore, store: SiteStore, clock: Clock, run_id: int) -> None:
    """Erase what the run left and nobody will ask for again; another run may start from the same adapter."""
    names = store.vectors_of(run_id)
    if plan := store.plan_of_run(run_id):
        names.add(_plan(plan).first_adapter_sha256)
    for name in names - _wanted(store, clock):
        objects.delete(ObjectRef(name, 1))


def let_lapse(store: SiteStore, clock: Clock) -> None:
    """Plans on which nobody decided in twice the time that they gave: the coordinator has gone on or given up, and asks
    anew if it still wants to know."""
    for stored in (plan for plan in store.plans() if plan.state == "pending"):
        asked_at, hours = stored.decided_at or stored.received_at, _plan(stored).plan.run.approval_hours
        if clock.now() - asked_at > 2 * 3600 * hours:
            store.decide_plan(stored.digest, "stopped", by="time")


def _wanted(store: SiteStore, clock: Clock) -> set[str]:
    since = clock.now() - STOPPED_DAYS * DAY
    going_on = [
        _plan(plan)
        for plan in store.plans()
        if plan.state not in OVER and not (plan.state == "stopped" and (plan.decided_at or 0.0) < since)
    ]
    return store.vectors_awaited(since) | {agreed.first_adapter_sha256 for agreed in going_on}


def _plan(stored: StoredPlan) -> AgreedPlan:
    return parse_agreed_plan(stored.canonical)
