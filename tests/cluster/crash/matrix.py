"""`make crash-matrix`: kill -9 at each of 24 points of a run, and what becomes of it; prints points x outcome.

TROUBLES="disk ahead behind" does something else there than kill -9: for three seconds the disk fails, or the clock is a
day ahead or behind. SEEDS="1 2 3" chooses seeds (default: 1 to 5): which of the sites it is, and in which round.
DATABASE=sqlite or DATABASE=postgresql is the coordinator's (default: both, where PostgreSQL is installed). Exit code 1
when a run did not come to its end by itself, or any rule of `judging` was broken; the logs are kept then.
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
from itertools import count, product, repeat

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import postgresql
import rigged_coordinator
import rigged_site
from crashing import COORDINATOR, TROUBLES, Case, cases, federation
from foedus_common.terminal import console

DATABASES = ("sqlite", "postgresql")


@dataclass
class Matrix:
    """What became of each point under one trouble, in all the runs so far."""

    trouble: str
    outcomes: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, case: Case, outcome: str) -> None:
        self.outcomes.setdefault((_party(case), case.point), Counter())[outcome] += 1

    def table(self) -> Table:
        title = f"{self.trouble}: {TROUBLES[self.trouble]}"
        table = Table("party", "when", "runs", "what became of them", title=title, box=None, header_style="bold")
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
                    matrix.add(case, four.suffer(case, matrix.trouble))
                except Exception as error:  # whatever it was, the other points are still of interest
                    kept = tempfile.mkdtemp(prefix="crash-matrix-")
                    shutil.copytree(four.cluster.folder / "logs", kept, dirs_exist_ok=True)
                    what = f"{matrix.trouble}, {database}, seed {seed}, {case}"
                    matrix.failures.append(f"{what}: {type(error).__name__}: {error} ({kept})")
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


def chosen() -> tuple[list[str], list[int], list[str]]:
    """Troubles, seeds and databases, as the environment says."""
    troubles = os.environ.get("TROUBLES", "kill").split()
    seeds = [int(seed) for seed in os.environ.get("SEEDS", "1 2 3 4 5").split()]
    kinds = [kind for kind in DATABASES if kind == os.environ.get("DATABASE", kind)]
    if "postgresql" in kinds and (reason := postgresql.missing()):
        console.print(f"{reason}, so its half is left out.")
        kinds.remove("postgresql")
    return troubles, seeds, kinds


def main() -> int:
    troubles, seeds, kinds = chosen()
    matrices = [Matrix(trouble) for trouble in troubles]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        total = len(troubles) * len(kinds) * sum(len(cases(seed)) for seed in seeds)
        task = progress.add_task("", total=total)
        for matrix, kind in product(matrices, kinds):
            with databases(kind) as urls:
                for seed in seeds:
                    progress.update(task, description=f"{matrix.trouble}, {kind}, seed {seed}")
                    suffer_all(matrix, seed, kind, urls, lambda: progress.advance(task))
    for matrix in matrices:
        console.print(matrix.table())
        for failure in matrix.failures:
            console.print(failure, style="red", markup=False)
    return int(any(matrix.failures or not matrix.outcomes for matrix in matrices))


def _party(case: Case) -> str:
    return COORDINATOR if case.victim == COORDINATOR else "site"


if __name__ == "__main__":
    sys.exit(main())
