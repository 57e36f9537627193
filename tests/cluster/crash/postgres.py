"""A PostgreSQL server for as long as a test needs one: on a socket of its own, with nothing on the disk afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")


def tools() -> Path | None:
    """The folder of initdb and pg_ctl; None where PostgreSQL is not installed. Debian keeps them out of PATH."""
    if found := shutil.which("initdb"):
        return Path(found).parent
    return max(DEBIAN.glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


@contextmanager
def server() -> Iterator[str]:
    """Gives the URL of its databases, without a name at its end. Durable as in earnest: what is tested are crashes."""
    folder = tools()
    assert folder is not None
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        data, log = Path(name, "data"), Path(name, "log")
        as_user = _unprivileged(Path(name))
        _run([*as_user, folder / "initdb", "-D", data, "-A", "trust", "-U", "foedus"])
        options = f"-k {name} -c listen_addresses='' -c max_connections=50"
        _run([*as_user, folder / "pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start"])
        try:
            yield f"postgresql://foedus@/{{}}?host={name}"
        finally:
            _run([*as_user, folder / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"])


def create(url: str, database: str) -> str:
    """A new, empty database; gives its URL."""
    folder = tools()
    assert folder is not None
    _run([folder / "createdb", "-U", "foedus", "-h", url.partition("host=")[2], database])
    return url.format(database)


def _unprivileged(folder: Path) -> list[str]:
    """What to put before a command, for PostgreSQL does not run as root."""
    if os.getuid() != 0:
        return []
    user = pwd.getpwnam("postgres" if _known("postgres") else "nobody")
    os.chown(folder, user.pw_uid, user.pw_gid)
    return ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]


def _known(user: str) -> bool:
    return any(each.pw_name == user for each in pwd.getpwall())


def _run(command: list[str | Path]) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, cwd="/")
