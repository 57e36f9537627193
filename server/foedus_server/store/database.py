"""One database, many readers, one writer at a time; and the journal, which is written with what it tells of.

SQLite in a file of mode 0600 is used by the threads of `foedus up` and by the operator's other processes together.
Each transaction that writes takes the lock when it begins, so what it has read is still true when it commits; on
PostgreSQL an advisory lock does the same. Knows tables `meta` and `journal` only.
"""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from foedus_common.clock import Clock
from foedus_common.errors import LocalError
from foedus_common.journal import START, Checkpoint, Entry, next_entry
from foedus_server.store.migrations import migrate
from foedus_server.store.schema import VERSION, journal, meta, schema

BUSY_SECONDS = 10
_WRITER_LOCK = 0x666F65647573  # "foedus": any constant that every process of ours agrees on


class Database:
    """An open database. Safe to share between threads; `close` it when done.

    url: as SQLAlchemy writes it, e.g. "sqlite:////home/x/foedus-home/foedus.db".
    """

    def __init__(self, url: str, clock: Clock) -> None:
        """Raises LocalError when there is no such database, or it is not one of this version of Foedus."""
        path = _sqlite_path(url)
        if path and not path.exists():
            raise LocalError(f"There is no database {path}; `foedus init` makes one.")
        self.clock = clock
        self._engine = _engine(url)
        try:
            with self.reading() as connection:
                version = _version(connection)
        except DBAPIError as error:
            raise LocalError(f"{path or 'What was found'} is no database of Foedus: {error.orig}.") from None
        if version != str(VERSION):
            with self.writing("be brought up to date") as connection:
                if migrate(connection, _version(connection)):  # again: another process may have done it meanwhile
                    self.log(connection, "database.migrated", before=version, to=VERSION)

    @classmethod
    def create(cls, url: str, clock: Clock) -> Database:
        """A new, empty database. Raises LocalError where a SQLite file of that name exists."""
        if path := _sqlite_path(url):
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except FileExistsError:
                raise LocalError(f"{path} exists already and is not overwritten.") from None
        engine = _engine(url)
        with engine.begin() as connection:
            schema.create_all(connection)
            connection.execute(insert(meta).values(key="schema", value=str(VERSION)))
        engine.dispose()
        return cls(url, clock)

    def close(self) -> None:
        self._engine.dispose()

    def copy_to(self, path: Path) -> None:
        """A copy of the SQLite file as it is now, whole, while others may go on writing it. Raises LocalError for a
        database of another kind."""
        if self._engine.dialect.name != "sqlite":
            raise LocalError(
                "The database is not a file of the home; back it up with its own tool (pg_dump), and with `foedus up` "
                "stopped copy the home's folder."
            )
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._engine.connect() as connection, closing(sqlite3.connect(path)) as copy:
            opened = connection.connection.driver_connection
            assert isinstance(opened, sqlite3.Connection)
            opened.backup(copy)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One snapshot of what was last committed."""
        with self._engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """A transaction that commits at the end, or not at all if anything is raised.

        Raises:
            LocalError: the database stayed busy for 10 seconds or cannot be written; `what` ends the sentence.
        """
        try:
            with self._engine.connect().execution_options(foedus_writes=True) as connection, connection.begin():
                yield connection
        except DBAPIError as error:
            raise LocalError(f"The database could not {what}: {error.orig}.") from None

    # --- Journal ---

    def log(self, connection: Connection, event_name: str, **details: Any) -> None:
        """Add an entry within the transaction of `connection`, which has to be one that writes."""
        row = connection.execute(select(journal).order_by(journal.c.number.desc()).limit(1)).one_or_none()
        last = START if row is None else Checkpoint(row.number, row.head)
        entry = next_entry(last, self.clock.now(), event_name, details)
        connection.execute(insert(journal).values(dataclasses.asdict(entry)))

    def record(self, event_name: str, **details: Any) -> None:
        """Add an entry that goes with no other change; `details` are JSON values, never secrets."""
        with self.writing("write the journal") as connection:
            self.log(connection, event_name, **details)

    def entries(self, after: int = 0, limit: int | None = None) -> list[Entry]:
        """The journal's entries numbered above `after`, in order, at most `limit`."""
        query = select(journal).where(journal.c.number > after).order_by(journal.c.number).limit(limit)
        with self.reading() as connection:
            return [Entry(**row._mapping) for row in connection.execute(query)]


def _version(connection: Connection) -> str | None:
    return connection.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar_one_or_none()


def _sqlite_path(url: str) -> Path | None:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise LocalError("The database's URL is malformed; write sqlite:////path or postgresql://host/name.") from None
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _engine(url: str) -> Engine:
    try:
        engine = create_engine(url, hide_parameters=True)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise LocalError(f"This Python lacks the driver of the database: {error}.") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgresql)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    """Write-ahead log, so that readers do not wait; every commit on disk before it returns."""
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin_sqlite` does
    for pragma in (f"busy_timeout = {BUSY_SECONDS * 1000}", "journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA foreign_keys = ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("foedus_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("foedus_writes"):
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITER_LOCK})
