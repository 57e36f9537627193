"""One database, many readers, one writer at a time; and the journal, which is written with what it tells of.

It is used by the threads of `foedus up` and by the operator's other processes together; only one `foedus up` at a time
may claim it. Knows tables `meta` and `journal` only.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError

from foedus_common.clock import Clock
from foedus_common.errors import LocalError
from foedus_common.journal import START, Checkpoint, Entry, next_entry
from foedus_server.store.engine import (
    NOTICE_A_DEAD_CLIENT,
    SERVICE_LOCK,
    DatabaseAway,
    explained,
    is_lock_timeout,
    open_engine,
    said,
    sqlite_path,
)
from foedus_server.store.migrations import migrate
from foedus_server.store.schema import VERSION, journal, meta, schema


class Database:
    """An open database. Safe to share between threads; `close` it when done.

    url: as SQLAlchemy writes it, e.g. "sqlite:////home/x/foedus-home/foedus.db" or "postgresql://host/foedus".
    """

    def __init__(self, url: str, clock: Clock) -> None:
        """Raises LocalError when there is no such database, or it is not one of this version of Foedus or an older one,
        whose tables are brought up to date."""
        path = sqlite_path(url)
        if path and not path.exists():
            raise LocalError(f"There is no database {path}; `foedus init` makes one.")
        self.clock = clock
        self._path = path
        self._engine = open_engine(url)
        self._claim: Connection | int | None = None
        version = self._version_found()
        if version != str(VERSION):
            with self.writing("be brought up to date") as connection:
                if migrate(connection, _version(connection)):  # again: another process may have done it meanwhile
                    self.log(connection, "database.migrated", before=version, to=VERSION)

    def _version_found(self) -> str | None:
        try:
            with self._engine.connect() as connection:
                return _version(connection)
        except DBAPIError as error:
            if isinstance(away := explained(error, "be opened"), DatabaseAway):
                raise away from None
            what = self._path or "What the URL names"
            raise LocalError(f"{what} is no database of Foedus: {said(error)}.") from None

    @classmethod
    def create(cls, url: str, clock: Clock) -> Database:
        """A new, empty database. Raises LocalError as `make_tables`."""
        with make_tables(url) as connection:
            connection.execute(insert(meta).values(key="schema", value=str(VERSION)))
        return cls(url, clock)

    def close(self) -> None:
        if isinstance(self._claim, int):
            os.close(self._claim)
        elif self._claim is not None:
            _let_go(self._claim)
        self._claim = None
        self._engine.dispose()

    def claim(self) -> None:
        """Be the one `foedus up` of this database until `close`, however the process ends; again makes sure of it.

        One that ended a moment ago is waited for: PostgreSQL takes its time to notice that a killed process hung up.
        Raises LocalError when another one is, and DatabaseAway when that cannot be found out.
        """
        if self._path:
            self._claim = self._claim or _lock_file(self._path.with_suffix(".lock"))
            return
        try:
            if isinstance(self._claim, Connection):
                self._claim.execute(select(1))
                return
        except DBAPIError as error:  # the server went down, and the lock with its session
            self._claim = None
            raise explained(error, "be held on to") from None
        try:
            held = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT", foedus="session")
            for statement in (*NOTICE_A_DEAD_CLIENT, f"SET lock_timeout TO '{GONE_SECONDS}s'"):
                held.execute(text(statement))
            held.execute(select(func.pg_advisory_lock(SERVICE_LOCK)))
        except DBAPIError as error:
            if not is_lock_timeout(error):
                raise explained(error, "be claimed") from None
            held.close()
            raise LocalError(_TAKEN) from None
        self._claim = held

    def copy_to(self, path: Path) -> None:
        """A copy as it is now, whole, while others may go on writing it: a SQLite file, whatever this database is."""
        if self._path is None:
            with self.reading("be copied") as source, make_tables(f"sqlite:///{path}") as copy:
                copy_rows(source, copy)
            return
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with self._engine.connect() as connection, closing(sqlite3.connect(path)) as copy:
            opened = connection.connection.driver_connection
            assert isinstance(opened, sqlite3.Connection)
            opened.backup(copy)

    def copy_into(self, url: str) -> None:
        """Everything here into a new database, or nothing of it. Raises LocalError as `make_tables`."""
        with self.reading("be copied") as source, make_tables(url) as copy:
            copy_rows(source, copy)

    @contextmanager
    def reading(self, what: str = "be read") -> Iterator[Connection]:
        """One snapshot of what was last committed. Raises LocalError, with `what` ending its sentence."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except DBAPIError as error:
            raise explained(error, what) from None

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """A transaction that commits at the end, or not at all if anything is raised.

        Raises:
            LocalError: the database stayed busy for 10 seconds or cannot be written; `what` ends the sentence.
        """
        with _writing(self._engine, what) as connection:
            yield connection

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


GONE_SECONDS = 5
_TAKEN = "Another `foedus up` works with this database; stop it first."


@contextmanager
def make_tables(url: str) -> Iterator[Connection]:
    """The tables of a new database, and a transaction to fill them in: all of it, or nothing.

    Raises LocalError where a SQLite file of that name exists, or where a PostgreSQL database, which has to be there,
    holds a coordinator already.
    """
    if path := sqlite_path(url):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            raise LocalError(f"{path} exists already and is not overwritten.") from None
    engine = open_engine(url)
    try:
        with _writing(engine, "take the tables of a coordinator") as connection:
            if inspect(connection).has_table(meta.name):
                raise LocalError("The database holds a coordinator already, and is not overwritten; make another one.")
            schema.create_all(connection)
            yield connection
    finally:
        engine.dispose()


def copy_rows(source: Connection, target: Connection) -> None:
    """Every row of every table, within the transactions of the two connections."""
    for table in schema.sorted_tables:
        for rows in source.execute(select(table)).mappings().partitions(500):
            target.execute(insert(table), [dict(row) for row in rows])


@contextmanager
def _writing(engine: Engine, what: str) -> Iterator[Connection]:
    try:
        with engine.connect().execution_options(foedus="write") as connection, connection.begin():
            yield connection
    except DBAPIError as error:
        raise explained(error, what) from None


def _let_go(claim: Connection) -> None:
    """Unlock, then hang up: the server takes a moment to notice a closed session, and refused the next `foedus up`."""
    with suppress(DBAPIError):
        claim.execute(select(func.pg_advisory_unlock(SERVICE_LOCK)))
    claim.close()


def _lock_file(path: Path) -> int:
    """Held by this process until it ends. Raises LocalError when another one holds it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LocalError(_TAKEN) from None
    return descriptor


def _version(connection: Connection) -> str | None:
    return connection.execute(select(meta.c.value).where(meta.c.key == "schema")).scalar_one_or_none()
