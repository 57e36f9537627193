"""`make privacy-audit`: every section, then a table of check, statistic, bound and whether it holds.

Exit codes: 0 everything holds, 1 something does not, 2 the audit could not be made.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on tiny models threads wait longer than they work
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from rich.console import Console
from rich.table import Table
from rich.text import Text

from foedus_common.errors import FoedusError
from foedus_common.terminal import errors, print_json
from privacy_audit.sections import SECTIONS, Bench
from privacy_audit.verdicts import Verdict
from tiny_model import write_tiny_model

WIDTH = 140
"""Columns of a table that goes to a file."""


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="privacy_audit", description="Audit the privacy of what training releases.")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another audit (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args(words)
    try:
        found = audit(arguments.seed)
    except FoedusError as error:
        errors.print(f"privacy-audit: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    holds = all(verdict.holds for part in found.values() for verdict in part)
    if arguments.json:
        print_json({"seed": arguments.seed, "holds": holds, "sections": found})
    else:
        show(found)
    return 0 if holds else 1


def audit(seed: int) -> dict[str, list[Verdict]]:
    """The verdicts of every section; how long each took goes to standard error."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="foedus-audit-") as folder:
        bench = Bench(write_tiny_model(Path(folder) / "model"), Path(folder), seed)
        for title, section in SECTIONS.items():
            began = time.perf_counter()
            found[title] = section(bench)
            errors.print(f"{title}: {time.perf_counter() - began:.0f} s", style="dim", markup=False)
    return found


def show(found: dict[str, list[Verdict]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("check", no_wrap=True)
    for column in ("statistic", "bound", "holds"):
        table.add_column(column, overflow="fold")
    for title, part in found.items():
        table.add_row(Text(title, style="bold cyan"))
        for each in part:
            holds = Text("yes") if each.holds else Text("NO", style="red")
            table.add_row(*(Text(cell) for cell in (f"  {each.check}", each.statistic, each.bound)), holds)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
