"""`make netfaults`: bad networks at each stage of a round, and what becomes of it; prints stage x fault x outcome.

Exit code 1 when a run did not come to its end by itself, or any rule of `judging` was broken.
"""

from __future__ import annotations

import sys

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from foedus_common.terminal import console
from networks import AT, FAULTS, networks


def main() -> int:
    table = Table("stage", *FAULTS, box=None, header_style="bold")
    failures: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with networks() as made, Progress(*columns, console=console) as progress:
        task = progress.add_task("bad networks", total=len(AT) * len(FAULTS))
        for stage in AT:
            became = []
            for name, fault in FAULTS.items():
                progress.update(task, description=f"{stage}, {name}")
                try:
                    became.append(made.suffer(stage, fault))
                except Exception as error:  # whatever it was, the other faults are still of interest
                    failures.append(f"{stage}, {name}: {type(error).__name__}: {error}")
                    became.append("FAILED")
                progress.advance(task)
            table.add_row(stage, *became)
    console.print(table)
    for name, fault in FAULTS.items():
        console.print(f"{name}: {fault.meaning}", style="dim")
    for failure in failures:
        console.print(failure, style="red", markup=False)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
