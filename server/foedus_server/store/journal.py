"""The coordinator's journal as `foedus_common.checkpoints` needs it: its end, and the signed heads of all journals.

Entries are written by whoever changes what they tell of (`Database.log`). Each function is one transaction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, Table, insert, select

from foedus_common.checkpoints import Countersignature, Head
from foedus_common.journal import START, Checkpoint, Entry
from foedus_server.store.database import Database
from foedus_server.store.schema import countersignatures, heads, journal


class Journal:
    """The coordinator's `HeadBook`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def log(self, event: str, **details: Any) -> None:
        self._database.record(event, **details)

    def entries(self, after: int = 0) -> list[Entry]:
        return self._database.entries(after)

    def journal_end(self) -> Checkpoint:
        with self._database.reading() as connection:
            row = connection.execute(select(journal).order_by(journal.c.number.desc()).limit(1)).one_or_none()
        return START if row is None else Checkpoint(row.number, row.head)

    def journal_head(self, number: int) -> bytes | None:
        with self._database.reading() as connection:
            found: bytes | None = connection.execute(
                select(journal.c.head).where(journal.c.number == number)
            ).scalar_one_or_none()
        return found

    def heads(self, owner: str | None = None) -> list[Head]:
        """By number; of every journal unless `owner` is given."""
        query = select(heads).order_by(heads.c.number, heads.c.head)
        if owner is not None:
            query = query.where(heads.c.owner == owner)
        return self._heads(query)

    def newest_heads(self, owner: str, count: int) -> list[Head]:
        newest = select(heads).where(heads.c.owner == owner).order_by(heads.c.number.desc(), heads.c.head).limit(count)
        return self._heads(newest)[::-1]

    def heads_at(self, owner: str, number: int) -> list[Head]:
        return self._heads(select(heads).where(heads.c.owner == owner, heads.c.number == number))

    def _heads(self, query: Select[Any]) -> list[Head]:
        with self._database.reading() as connection:
            return [Head(**row._mapping) for row in connection.execute(query)]

    def countersignatures(self) -> list[Countersignature]:
        query = select(countersignatures).order_by(countersignatures.c.number, countersignatures.c.witness)
        with self._database.reading() as connection:
            return [Countersignature(**row._mapping) for row in connection.execute(query)]

    def keep(self, kept: Sequence[Head], marks: Sequence[Countersignature] = ()) -> None:
        with self._database.writing("keep the heads of journals") as connection:
            for head in kept:
                _insert_once(connection, heads, dataclasses.asdict(head))
            for mark in marks:
                _insert_once(connection, countersignatures, dataclasses.asdict(mark))


def _insert_once(connection: Connection, table: Table, row: dict[str, Any]) -> None:
    key = [column == row[column.name] for column in table.primary_key]
    if connection.execute(select(table).where(*key)).one_or_none() is None:
        connection.execute(insert(table).values(row))
