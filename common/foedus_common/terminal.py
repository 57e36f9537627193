"""What both programs do at a terminal: exit codes, one sentence for an error, tables for people and JSON for machines.

Exit codes: 0 done, 1 it ran and failed, 2 asked for something that cannot be, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NoReturn

import click
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foedus_common.errors import FoedusError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
"""The option of every command that prints a result."""

console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)
GAP = "  "
NO_TERMINAL = 10_000
"""Columns of what is no terminal: a pipe or a file breaks no lines."""


def run(app: typer.Typer, name: str) -> NoReturn:
    """Runs the program and exits: an expected error prints its one sentence and no traceback."""
    try:
        _command(app)(prog_name=name, standalone_mode=True)
    except FoedusError as error:
        errors.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        errors.print(f"{name}: {error.filename}: {error.strerror}.", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


@cache
def _command(app: typer.Typer) -> click.Command:
    """Typer reads every annotation of every command for it, and would do so again at each call: a tenth of a second."""
    return typer.main.get_command(app)


def print_json(value: Any) -> None:
    """One JSON document on standard output; dataclasses become objects, bytes hexadecimal."""
    print(json.dumps(value, default=_plain, indent=None, ensure_ascii=False), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str) -> None:
    """Rows for a person; `empty` is the sentence shown when there are none.

    Nothing is cut off: where the columns do not fit side by side without breaking a word, such as a hash that a plan
    has to name, each row is a block of lines.
    """
    if not rows:
        return print_line(empty)
    cells = [[_shown(value) for value in row] for row in rows]
    contents = list(zip(columns, *cells, strict=True))
    longest_words = [max(cell_len(word) for cell in column for word in cell.split()) for column in contents]
    if sum(longest_words) + len(GAP) * (len(columns) - 1) > _room():
        return _print_blocks(columns, cells)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, len(GAP), 0, 0))
    for (name, *column), least in zip(contents, longest_words, strict=True):
        table.add_column(name, min_width=least, no_wrap=not any(" " in cell for cell in column))
    for row in cells:
        table.add_row(*map(Text, row))  # as it is: a name may look like markup
    print_wide(table)


def _print_blocks(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for number, row in enumerate(rows):
        if number:
            print_line("")
        print_facts(dict(zip(columns, row, strict=True)))


def print_wide(table: Table) -> None:
    """A table, which only a terminal makes narrower than it is."""
    (console if console.is_terminal else Console(file=console.file, width=NO_TERMINAL)).print(table)


def _room() -> int:
    """Columns that a line may have."""
    return console.width if console.is_terminal else NO_TERMINAL


def print_line(text: str, style: str | None = None) -> None:
    """A sentence as it is: brackets are no markup, `:x:` is no emoji, and only a terminal breaks lines."""
    console.print(text, style=style, markup=False, soft_wrap=not console.is_terminal)


def print_aside(text: str) -> None:
    """What is told or asked while a command works: on standard error, so that a pipe gets the result alone."""
    errors.print(text, markup=False, soft_wrap=not errors.is_terminal)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line; a terminal breaks a long value below itself."""
    width = max(map(len, facts), default=0)
    indent = " " * (width + len(GAP))
    for name, value in facts.items():
        lines = textwrap.wrap(
            _shown(value), max(20, _room() - len(indent)), break_long_words=False, break_on_hyphens=False
        )
        print_as_is(f"{name:<{width}}{GAP}" + f"\n{indent}".join(lines))


def print_as_is(text: str) -> None:
    """Lines that are made already: a chart, a hash."""
    console.print(text, markup=False, soft_wrap=True)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
