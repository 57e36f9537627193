"""A PostgreSQL server of one's own for as long as tests need it: on a Unix socket, as a user without rights.

PostgreSQL refuses to run as root; its processes then belong to `postgres` or `nobody`. Nothing is left on the disk.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foedus_simulations.parties import until

OWNER = "foedus"
READY = "ready to accept connections"
_numbers = itertools.count()


class Server:
    """Listens in `folder`. `database` makes a new, empty database and gives its URL."""

    def __init__(self, folder: Path, programs: Path, account: dict[str, Any], durable: bool) -> None:
        self.folder = folder
        self._durable = durable
        self._programs = programs
        self._account = account
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when connections are accepted."""
        options = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.folder),
            "fsync": "on" if self._durable else "off",
            "max_connections": "60",
        }
        settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        log = self.folder / "log"  # in a pipe that nobody empties, what it says would stop it in the end
        with log.open("wb") as output:
            process = self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.folder / "data", *settings],
                stderr=output,
                cwd="/",
                **self._account,
            )
        until(lambda: process.poll() is not None or READY in log.read_text(), 60, READY)
        assert process.poll() is None, log.read_text()

    def stop(self) -> None:
        """At once, and without a goodbye to those who are connected."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # "fast": a "smart" stop, SIGTERM, would wait for connections
            self._process.wait()
            self._process = None

    def database(self) -> str:
        import psycopg

        name = f"test_{next(_numbers)}"
        with psycopg.connect(host=str(self.folder), user=OWNER, dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return f"postgresql://{OWNER}@/{name}?host={self.folder}"


def missing() -> str | None:
    """Why there can be no server here; None when there can."""
    if _programs() is None:
        return "PostgreSQL's programs are not installed here"
    if importlib.util.find_spec("psycopg") is None:
        return "psycopg is not installed here; the extra `postgresql` brings it"
    if _account() is None:
        return "PostgreSQL does not run as root, and there is neither `postgres` nor `nobody` here"
    return None


@contextmanager
def server(durable: bool = False) -> Iterator[Server]:
    """durable: as in earnest, where crashes are what is tested."""
    programs, account = _programs(), _account()
    assert programs is not None
    assert account is not None
    with tempfile.TemporaryDirectory(prefix="foedus-pg-", dir="/tmp") as name:  # a socket's path is short
        folder = Path(name)
        if account:
            os.chown(folder, account["user"], account["group"])
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", OWNER, "-A", "trust", "-E", "UTF8", "--no-sync", "-N"],
            check=True,
            capture_output=True,
            cwd="/",
            **account,
        )
        running = Server(folder, programs, account, durable)
        running.start()
        try:
            yield running
        finally:
            running.stop()


def _programs() -> Path | None:
    """The folder of initdb and postgres, the newest; Debian keeps them out of PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    newest = found[-1] if found else shutil.which("initdb")
    return None if newest is None else Path(newest).resolve().parent


def _account() -> dict[str, Any] | None:
    """As whom its processes run: nobody else, unless this is root."""
    if os.getuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    return None
