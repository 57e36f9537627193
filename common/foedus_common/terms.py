"""From the plan to the terms of one round: what a site's vector is made under and the coordinator must repeat at A0.

Both sides build the terms with this function from what they were shown, so that any difference between what two
parties were shown ends as CONFIG_MISMATCH, or as masks that do not cancel.
"""

from __future__ import annotations

from foedus_common import identity
from foedus_common.objects import ObjectRef
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.messages import Noise, RoundTerms
from foedus_common.protocol.thresholds import Member, Roster
from foedus_common.ranges import half_range


def field_layout(agreed: AgreedPlan, round_plan: RoundPlan) -> FieldLayout:
    """How the round's trained vector is encoded; every scale is public."""
    secure = agreed.plan.secure_aggregation
    parts = agreed.trained[round_plan.phase]
    segments = tuple((part.length, half_range(agreed, round_plan, part.group)) for part in parts)
    return FieldLayout(secure.field_bits, secure.size.largest_sum, segments)


def noise(agreed: AgreedPlan, round_plan: RoundPlan) -> Noise:
    privacy = agreed.plan.privacy
    if not privacy.on:
        return Noise()
    return Noise(privacy.unit, privacy.clip, agreed.noise_multipliers[round_plan.phase])


def round_terms(agreed: AgreedPlan, round_plan: RoundPlan, adapter: ObjectRef) -> RoundTerms:
    """The terms of a round that starts from `adapter`."""
    secure = agreed.plan.secure_aggregation
    return RoundTerms(
        run_id=agreed.run_id,
        round=round_plan.index,
        phase=round_plan.phase,
        plan_digest=agreed.digest(),
        base_model_hash=bytes.fromhex(agreed.plan.model.sha256),
        adapter_hash=bytes.fromhex(adapter.sha256),
        trainer_version=agreed.trainer_version,
        layout=field_layout(agreed, round_plan),
        noise=noise(agreed, round_plan),
        min_sites=secure.size.smallest_sum,
        colluding=secure.colluding,
    )


def protocol_roster(roster: identity.Roster) -> Roster:
    """The root-signed roster as the sessions see it."""
    members = {site.name: Member(site.public_key, site.org) for site in roster.sites}
    return Roster(roster.epoch, roster.digest(), members)
