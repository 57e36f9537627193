"""`make crash-matrix`: kill -9 at each of 24 points of a run, and what becomes of it; prints points x outcome.

SEEDS="1 2 3" chooses seeds (default: 1 to 5): which of the sites it is, and in which round. DATABASE=sqlite or
DATABASE=postgresql is the coordinator's (default: both, where PostgreSQL is installed). Exit code 1 when a run did not
come to its end by itself, or any rule of `judging` was broken; the logs are kept then.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, repeat

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import postgresql
import rigged_coordinator
import rigged_site
from crashing import COORDINATOR, Case, cases, federation
from foedus_common.terminal import console

DATABASES = ("sqlite", "postgresql")


@dataclass
class Matrix:
    """What became of each point, in all the runs so far."""

    outcomes: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, case: Case, outcome: str) -> None:
        self.outcomes.setdefault((_party(case), case.point), Counter())[outcome] += 1

    def table(self) -> Table:
        table = Table("party", "killed when", "runs", "what became of them", box=None, header_style="bold")
        for (party, point), outcomes in self.outcomes.items():
            meaning = (rigged_coordinator.POINTS if party == COORDINATOR else rigged_site.POINTS)[point]
            became = [f"{count} {outcome}" if len(outcomes) > 1 else outcome for outcome, count in outcomes.items()]
            table.add_row(party, f"[bold]{point}[/]: {meaning}", str(outcomes.total()), "; ".join(became))
        return table


def suffer_all(matrix: Matrix, seed: int, database: str, urls: Iterator[str], done: Callable[[], None]) -> None:
    """Every case of a seed, in one federation; in another one after a case that failed. urls: of empty databases."""
    left = cases(seed)
    while left:
        with federation(next(urls)) as four:
            while left:
                case = left.pop(0)
                try:
                    matrix.add(case, four.suffer(case))
                except Exception as error:  # whatever it was, the other points are still of interest
                    kept = tempfile.mkdtemp(prefix="crash-matrix-")
                    shutil.copytree(four.cluster.folder / "logs", kept, dirs_exist_ok=True)
                    matrix.failures.append(f"{database}, seed {seed}, {case}: {type(error).__name__}: {error} ({kept})")
                    matrix.add(case, "FAILED")
                    break
                finally:
                    done()


@contextmanager
def databases(kind: str) -> Iterator[Iterator[str]]:
    """Empty databases of a kind, by what foedus.toml says of each."""
    if kind == "sqlite":
        yield repeat("")
        return
    with postgresql.server(durable=True) as server:
        yield (server.database() for _ in count())


def chosen() -> tuple[list[int], list[str]]:
    """Seeds and databases, as the environment says."""
    seeds = [int(seed) for seed in os.environ.get("SEEDS", "1 2 3 4 5").split()]
    kinds = [kind for kind in DATABASES if kind == os.environ.get("DATABASE", kind)]
    if "postgresql" in kinds and (reason := postgresql.missing()):
        console.print(f"{reason}, so its half is left out.")
        kinds.remove("postgresql")
    return seeds, kinds


def main() -> int:
    seeds, kinds = chosen()
    matrix = Matrix()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("kill -9", total=len(kinds) * sum(len(cases(seed)) for seed in seeds))
        for kind in kinds:
            with databases(kind) as urls:
                for seed in seeds:
                    progress.update(task, description=f"kill -9, {kind}, seed {seed}")
                    suffer_all(matrix, seed, kind, urls, lambda: progress.advance(task))
    console.print(matrix.table())
    for failure in matrix.failures:
        console.print(failure, style="red", markup=False)
    return int(bool(matrix.failures) or not matrix.outcomes)


def _party(case: Case) -> str:
    return COORDINATOR if case.victim == COORDINATOR else "site"


if __name__ == "__main__":
    sys.exit(main())
