"""What `doctor` finds, at the coordinator and at a site alike: one line for each check, and what to do about it.

A check looks and changes nothing. What it looks at is for the two `doctor` modules; here is what they share.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.table import Table
from rich.text import Text

from foedus_common.clock import DAY, iso
from foedus_common.errors import FoedusError, LocalError
from foedus_common.terminal import print_json, print_wide

LEAST_FREE = 1 << 30
"""Bytes. Below, a round could stop in the middle for want of room."""
AMPLE_FREE = 5 << 30
_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


@dataclass(frozen=True)
class Finding:
    """One check's result. A note is no fault but should be known; `sentence` says what was found and what to do."""

    check: str
    state: Literal["ok", "note", "problem"]
    sentence: str


class Note(Exception):
    """Raised by a look that found no fault, but something that a person should know."""


def examine(check: str, look: Callable[[], str]) -> Finding:
    """ok with what `look` returns, a note with what it raises as Note, a problem with the sentence of its error."""
    try:
        return Finding(check, "ok", look())
    except Note as note:
        return Finding(check, "note", str(note))
    except FoedusError as error:
        return Finding(check, "problem", str(error))
    except OSError as error:
        return Finding(check, "problem", f"{error.filename or check}: {error.strerror}; look into it by hand.")


def show(findings: Iterable[Finding], as_json: bool) -> int:
    """Prints the findings; gives the program's exit code: 1 if there is a problem."""
    found = list(findings)
    if as_json:
        print_json(found)
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column()
        table.add_column()
        table.add_column(overflow="fold")
        for each in found:
            table.add_row(Text(each.state, style=_STYLES[each.state]), Text(each.check), Text(each.sentence))
        print_wide(table)
    return int(any(each.state == "problem" for each in found))


# --- Looks that both sides share ---


def private(home: Path) -> str:
    """Raises LocalError when something in the home, or the home itself, is open to others on this machine."""
    for folder, _, files in os.walk(home):
        for path in [Path(folder), *(Path(folder, name) for name in files)]:
            mode = path.lstat().st_mode
            if mode & 0o077 and not stat.S_ISLNK(mode):
                raise LocalError(f"{path} is open to others (mode {mode & 0o777:o}); run `chmod -R go-rwx {home}`.")
    return f"Nobody else can look into {home}."


def lasts(what: str, ends: float, now: float, *, soon_days: float, advice: str) -> str:
    """Raises LocalError when it has ended, Note when it ends within `soon_days`."""
    if now > ends:
        raise LocalError(f"{what} ended on {iso(ends)}; {advice}.")
    if now > ends - soon_days * DAY:
        raise Note(f"{what} ends on {iso(ends)}; {advice} before then.")
    return f"{what} is good until {iso(ends)}."


def room(folder: Path) -> str:
    """Raises LocalError when the disk is almost full, Note when it is getting there."""
    free = shutil.disk_usage(folder).free
    sentence = f"{free / (1 << 30):.1f} GiB are free at {folder}"
    if free < LEAST_FREE:
        raise LocalError(f"{sentence}, too little for a run; make room.")
    if free < AMPLE_FREE:
        raise Note(f"{sentence}; make room before a large model's run.")
    return f"{sentence}."
