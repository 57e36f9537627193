"""Everything that a site must still know after a crash: one SQLite file, and the only SQL of the site.

One `SiteStore` may be used from several threads, and several processes may open one file. It keeps facts and refuses to
overwrite those that are write-once; what they mean is for `ledger`, `policy` and `round`.
"""

from __future__ import annotations

from foedus_client.store.belongings import Belongings, Dataset, StoredModel
from foedus_client.store.outbox import Vectors
from foedus_client.store.plans import Plans, StoredPlan
from foedus_client.store.schema import OVER, PlanState

__all__ = ["OVER", "Dataset", "PlanState", "SiteStore", "StoredModel", "StoredPlan"]


class SiteStore(Belongings, Plans, Vectors):
    """The site's database file. Raises LocalError when it cannot be used, and when a write-once fact would change."""
