"""How the tables of an older version become those of this one: a step for each version, each within one transaction.

A step is written once and works on what that version had; it is not changed when `schema` goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sqlalchemy import Connection, update

from foedus_common.errors import LocalError
from foedus_server.store.schema import VERSION, countersignatures, heads, meta


def _signed_heads(connection: Connection) -> None:
    for table in (heads, countersignatures):
        table.create(connection)


STEPS: Mapping[int, Callable[[Connection], None]] = {1: _signed_heads}
"""From that version to the next."""


def migrate(connection: Connection, version: str | None) -> bool:
    """Bring the tables up to date; whether there was anything to do. Raises LocalError for a version unknown here."""
    number = int(version) if version is not None and version.isdecimal() else 0
    if number != VERSION and number not in STEPS:
        raise LocalError(
            f"The database has tables of version {version}, and this Foedus knows {min(STEPS)} to {VERSION}; use the "
            "version of Foedus that wrote it."
        )
    for older in range(number, VERSION):
        STEPS[older](connection)
    connection.execute(update(meta).where(meta.c.key == "schema").values(value=str(VERSION)))
    return number != VERSION
