"""What both programs do at a terminal: exit codes, one sentence for an error, tables for people and JSON for machines.

Exit codes: 0 done, 1 it ran and failed, 2 asked for something that cannot be, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, NoReturn

import click
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foedus_common.errors import FoedusError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
"""The option of every command that prints a result."""

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def run(app: typer.Typer, name: str) -> NoReturn:
    """Runs the program and exits: an expected error prints its one sentence and no traceback."""
    try:
        _command(app)(prog_name=name, standalone_mode=True)
    except FoedusError as error:
        errors.print(f"{name}: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
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
    """Rows for a person; `empty` is the sentence shown when there are none."""
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # as it is: a name may look like markup
    console.print(table)


def print_line(text: str) -> None:
    """A sentence as it is: brackets are no markup, and only a terminal breaks lines."""
    console.print(text, markup=False, soft_wrap=True)


def print_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print_line(f"{name:<{width}}  {value}")
