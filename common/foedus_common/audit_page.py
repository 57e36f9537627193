"""What `audit` prints, in both programs alike. What is verified, and against what, is for the caller."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from foedus_common.checkpoints import Head, Verified, sheet
from foedus_common.clock import iso
from foedus_common.journal import Checkpoint, Entry
from foedus_common.private_files import create_private
from foedus_common.terminal import print_facts, print_json, print_line, print_table

DIGEST = re.compile("[0-9a-f]{40,}")
SHOWN_DIGITS = 8

Against = Annotated[
    Path | None, typer.Option("--against", help="Compare also with what `audit export` wrote on the other side.")
]
Last = Annotated[int, typer.Option("--last", min=1, help="How many of the newest entries.")]
Sheet = Annotated[Path, typer.Argument(help="Where the list goes. It holds signed heads and no entries.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def show_verified(journal: Verified, more: Mapping[str, Any], as_json: bool) -> None:
    """A journal that was found whole; `more` are facts of this side only."""
    witnessed = journal.witnessed
    facts = {
        "entries": journal.end.number,
        "head": journal.end.head.hex(),
        "signed here up to": journal.signed,
        "countersigned up to": max(witnessed.values(), default=0),
        "countersigned by": witnessed
        if as_json
        else ", ".join(f"{name} ({witnessed[name]})" for name in witnessed) or "nobody",
        "heads that were lost": len(journal.losses),
        **more,
    }
    if as_json:
        return print_json(facts)
    print_facts({**facts, "result": "every entry is where and what it was"})


def show_entries(entries: Sequence[Entry], as_json: bool) -> None:
    if as_json:
        return print_json([{"number": entry.number, **entry.event} for entry in entries])
    rows = [_row(entry.number, entry.event) for entry in entries]
    print_table(["entry", "at", "event", "what"], rows, "The journal is empty.")


def _row(number: int, event: Mapping[str, Any]) -> tuple[Any, ...]:
    told = {name: value for name, value in event.items() if name not in ("at", "event") and value is not None}
    what = (f"{name}={_short(name, value)}" for name, value in told.items())
    return number, iso(event["at"]), event["event"], ", ".join(what)


def _short(name: str, value: Any) -> Any:
    """Times as dates, lists without brackets, and of digests and keys the first digits; `--json` has all."""
    if name.endswith("_at") and isinstance(value, int | float):
        return iso(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value[:SHOWN_DIGITS]}…" if isinstance(value, str) and DIGEST.fullmatch(value) else value


def write_sheet(file: Path, party: str, heads: Sequence[Head], there: str, as_json: bool) -> None:
    """Raises LocalError where the file exists. there: the other side's program."""
    create_private(file, sheet(party, heads))
    if as_json:
        return print_json({"file": str(file.absolute()), "heads": len(heads)})
    print_line(f"{file} holds {len(heads)} signed heads. There: {there} audit verify --against {file.name}")


def confirm_loss(yes: bool) -> None:
    if not yes:
        typer.confirm(
            "Are entries missing because a backup was restored, and for no other reason?", abort=True, err=True
        )


def show_losses(lost: Sequence[Checkpoint], as_json: bool) -> None:
    if as_json:
        return print_json({"lost": [mark.number for mark in lost]})
    print_line(f"{len(lost)} heads are entered as lost. The journal goes on from here.")
