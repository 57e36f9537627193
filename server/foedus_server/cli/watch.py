"""A run on the operator's screen: live while it goes, as a table when it is over. Changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from foedus_common.terminal import console, print_line, print_wide
from foedus_server.store import Attempt, Run, Store

LOOK_SECONDS = 0.25
ENDED = ("finished", "failed", "stopped")
SHOWN = 8


def follow(store: Store, run_id: int) -> Run:
    """Shows the run until it has ended, and gives it as it is then. Without a terminal: one line for each round."""
    if not console.is_terminal:
        return _follow_in_lines(store, run_id)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    )
    run = store.runs.run(run_id)
    task = bar.add_task(run.name, total=run.rounds, note="")
    with Live(bar, console=console, refresh_per_second=4) as live:
        while True:
            run, attempts = store.runs.run(run_id), store.runs.attempts(run_id)
            bar.update(task, completed=run.rounds_done, note=_note(run, attempts))
            live.update(Group(bar, rounds_table(attempts[-SHOWN:])))
            if run.state in ENDED:
                break
            threading.Event().wait(LOOK_SECONDS)
    print_line(_ending(run))
    return run


def _follow_in_lines(store: Store, run_id: int) -> Run:
    told = 0
    while True:
        run = store.runs.run(run_id)
        for attempt in store.runs.committed(run_id)[told:]:
            print_line(
                f"round {attempt.round + 1} of {run.rounds}: {len(attempt.survivors)} sites, "
                f"{sum(attempt.seconds.values()):.1f} s"
            )
            told += 1
        if run.state in ENDED:
            print_line(_ending(run))
            return run
        threading.Event().wait(LOOK_SECONDS)


def await_end(store: Store, run_id: int) -> Run:
    """The run when it has ended; shows nothing."""
    while (run := store.runs.run(run_id)).state not in ENDED:
        threading.Event().wait(LOOK_SECONDS)
    return run


def show(store: Store, run_id: int) -> None:
    """The whole run, once."""
    run = store.runs.run(run_id)
    print_line(_ending(run) if run.state in ENDED else f"{run.name}: {_note(run, store.runs.attempts(run_id))}")
    print_wide(rounds_table(store.runs.attempts(run_id)))


def rounds_table(attempts: Sequence[Attempt]) -> Table:
    """One line per attempt."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("round", "attempt", "state", "sites", "training", "secure sum", "up", "down"):
        table.add_column(column, justify="left" if column == "state" else "right")
    for attempt in attempts:
        training = attempt.seconds.get("training", 0.0)
        secure = sum(seconds for stage, seconds in attempt.seconds.items() if stage != "training")
        sites = f"{len(attempt.survivors)}/{len(attempt.cohort)}" if attempt.cohort else ""
        table.add_row(
            str(attempt.round + 1),
            str(attempt.attempt + 1),
            Text(attempt.state if attempt.reason is None else f"{attempt.state}: {attempt.reason}"),
            sites,
            f"{training:.2f} s",
            f"{secure:.2f} s",
            _bytes(attempt.bytes_up),
            _bytes(attempt.bytes_down),
        )
    return table


def _note(run: Run, attempts: Sequence[Attempt]) -> str:
    if run.state == "inviting":
        return "waits for the sites' administrators"
    under_way = f", round {attempts[-1].round + 1}" if attempts and attempts[-1].state == "open" else ""
    return f"{run.state}{under_way}: {run.rounds_done} of {run.rounds} rounds done"


def _ending(run: Run) -> str:
    reason = f": {run.reason}" if run.reason else ""
    return f"{run.name} {run.state} after {run.rounds_done} of {run.rounds} rounds{reason}"


def _bytes(count: int) -> str:
    return f"{count / 1024:.0f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"
