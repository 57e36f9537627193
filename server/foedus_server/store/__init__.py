"""The coordinator's database: the only SQL of the server. Typed rows in and out; every function is one transaction.

`Store` opens it for the threads of a process; other processes may have it open at the same time.
"""

from __future__ import annotations

from foedus_common.clock import Clock
from foedus_server.store.database import Database
from foedus_server.store.engine import DatabaseAway, parse_url
from foedus_server.store.journal import Journal
from foedus_server.store.members import Members
from foedus_server.store.rows import (
    Attempt,
    AttemptState,
    Certificate,
    Evaluation,
    Model,
    Run,
    RunState,
    Site,
    SiteState,
    TokenUse,
)
from foedus_server.store.runs import Runs

__all__ = [
    "Attempt",
    "AttemptState",
    "Certificate",
    "DatabaseAway",
    "Evaluation",
    "Model",
    "Run",
    "RunState",
    "Site",
    "SiteState",
    "Store",
    "TokenUse",
    "parse_url",
]


class Store:
    """The database at a SQLAlchemy URL: `members`, `runs`, and the `journal` of what was done to them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.members = Members(database)
        self.runs = Runs(database)
        self.journal = Journal(database)

    @classmethod
    def open(cls, url: str, clock: Clock) -> Store:
        """Raises LocalError when there is no such database, or it is of another version of Foedus."""
        return cls(Database(url, clock))

    @classmethod
    def create(cls, url: str, clock: Clock) -> Store:
        """A new, empty database. Raises LocalError where there is one already."""
        return cls(Database.create(url, clock))

    def close(self) -> None:
        self.database.close()
