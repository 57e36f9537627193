"""From a database's URL to a SQLAlchemy engine whose transactions mean the same on SQLite and on PostgreSQL.

A transaction that writes takes the one writer's lock when it begins: what it reads is still true when it commits, and
then it is on disk. One that reads sees one snapshot. Knows no tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from foedus_common.errors import LocalError

BUSY_SECONDS = 10
CONNECT_SECONDS = 10
WRITER_LOCK = 0x666F65647573  # "foedus": any constant that every process of ours agrees on
SERVICE_LOCK = WRITER_LOCK + 1
NOTICE_A_DEAD_CLIENT = (
    "SET tcp_keepalives_idle TO 30",
    "SET tcp_keepalives_interval TO 10",
    "SET tcp_keepalives_count TO 3",
)
"""For a session that holds a lock: when its machine dies, the server lets go of it within a minute, not hours."""
_SECRETS = ("password", "sslpassword")


class DatabaseAway(LocalError):
    """The database server does not answer now: nothing was decided, and the same again may work later."""


def parse_url(url: str) -> URL:
    """Raises LocalError for what is no URL of SQLite or PostgreSQL, and for one with a password in it: URLs lie in
    foedus.toml and on command lines, passwords in a file that PostgreSQL's own library reads."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the latter for a port that is no number
        raise LocalError("The database's URL is malformed; write sqlite:////path or postgresql://host/name.") from None
    if parsed.password is not None or any(name in parsed.query for name in _SECRETS):
        raise LocalError(
            "The database's URL holds a password, which others could read; leave it out and put it into ~/.pgpass, or "
            "into a file of that form that the URL names with ?passfile=FILE."
        )
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise LocalError(f"A database of the kind {parsed.get_backend_name()!r} is not known here; use postgresql://.")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def sqlite_path(url: str) -> Path | None:
    """Where a SQLite database lies; None for another kind."""
    parsed = parse_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def open_engine(url: str) -> Engine:
    """Connects to nothing yet. Raises LocalError where the driver is not installed, and as `parse_url`."""
    parsed = parse_url(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    patience = {} if sqlite else {"pool_pre_ping": True, "connect_args": _POSTGRESQL}
    try:
        engine = create_engine(parsed, hide_parameters=True, **patience)
    except (NoSuchModuleError, ModuleNotFoundError):
        raise LocalError(
            "This Python lacks the driver of the database; pip install 'foedus[postgresql]' brings it."
        ) from None
    if sqlite:
        event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite if sqlite else _begin_postgresql)
    return engine


def explained(error: DBAPIError, what: str) -> LocalError:
    """One sentence for what a driver raised; `what` could not be done."""
    sentence = f"The database could not {what}: {said(error)}."
    server_is_away = isinstance(error, OperationalError) and not str(type(error.orig)).startswith("<class 'sqlite3.")
    return DatabaseAway(sentence) if server_is_away or error.connection_invalidated else LocalError(sentence)


def is_lock_timeout(error: DBAPIError) -> bool:
    """Whether PostgreSQL gave up waiting for a lock (SQLSTATE 55P03, lock_not_available)."""
    return getattr(error.orig, "sqlstate", None) == "55P03"


def said(error: DBAPIError) -> str:
    """The first line of a driver's words."""
    return (str(error.orig).strip().splitlines() or [type(error.orig).__name__])[0].rstrip(".")


_POSTGRESQL = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "foedus",
    "tcp_user_timeout": CONNECT_SECONDS * 1000,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}


def _set_up_sqlite(connection: Any, _: object) -> None:
    """Write-ahead log, so that readers do not wait; every commit on disk before it returns."""
    connection.isolation_level = None  # the driver begins nothing by itself: `_begin_sqlite` does
    for pragma in (f"busy_timeout = {BUSY_SECONDS * 1000}", "journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("PRAGMA foreign_keys = ON")


def _purpose(connection: Connection) -> str:
    """ "read" unless the connection's option `foedus` says "write", or "session" for one outside of transactions."""
    return str(connection.get_execution_options().get("foedus", "read"))


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE" if _purpose(connection) == "write" else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    """A reader has one snapshot for all its statements. A writer has one for each, so that it sees what was committed
    before it got the lock."""
    purpose = _purpose(connection)
    if purpose == "read":
        connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
    elif purpose == "write":
        connection.execute(text("SET LOCAL synchronous_commit TO on"))
        connection.execute(text(f"SET LOCAL lock_timeout TO '{BUSY_SECONDS}s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": WRITER_LOCK})
