"""`make fuzz`: gives every parser many mutated inputs; prints target, inputs, rate, slowest, growth and outcome.

    python tests/fuzz/fuzz.py [--inputs 1000000] [--only NAME] [--cores 1]

A target fails on an exception that it may not raise, on an input that takes more than a second of CPU, when its process
dies, and when the process grows by more than 200 MB. Inputs come in blocks of 1000, each from a seed of its own: the
same command meets the same inputs. The input that failed is printed in hexadecimal digits.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from targets import by_name
from workshop import Target, Workshop

BLOCK = 1000
TICK = 0.02
HANG_TICKS = 50
GROWTH_MB = 200.0


class Hang(BaseException):
    """An input took more than a second; not an Exception, so that no parser takes it for its own."""


class Watch:
    """Counts ticks of this process's CPU, and stops an input that takes a second of them. One timer for all inputs:
    to set one for each, and to ask for the time, would cost more than most parsers do."""

    def __init__(self) -> None:
        self.ticks = 0

    def __enter__(self) -> Watch:
        self._previous = signal.signal(signal.SIGPROF, self._tick)
        signal.setitimer(signal.ITIMER_PROF, TICK, TICK)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self._previous)

    def _tick(self, number: int, frame: FrameType | None) -> None:
        self.ticks += 1
        if self.ticks > HANG_TICKS:
            raise Hang(f"more than {HANG_TICKS * TICK:g} s of CPU")


@dataclass(frozen=True)
class Outcome:
    """accepted: inputs that were refused by nothing. slowest: at most so many seconds of CPU, in ticks. growth: MB.
    failure: empty when well."""

    name: str
    inputs: int
    accepted: int
    seconds: float
    slowest: float
    growth: float
    failure: str = ""


def fuzz(target: Target, first_block: int, inputs: int) -> Outcome:
    """So many inputs from this block on, in this process and thread."""
    began, slowest, accepted = time.perf_counter(), 0, 0
    _run(target, target.good[0])
    with suppress(OSError):  # or what this process did before would hide how much it grows (proc(5), since Linux 4.0)
        Path("/proc/self/clear_refs").write_text("5")
    before = _megabytes()
    data, number, failure = b"", 0, ""
    try:
        with Watch() as watch:
            for number in range(inputs):
                if number % BLOCK == 0:
                    random = Random(f"{target.name}/{first_block + number // BLOCK}")
                data = random.choice(target.mutate)(random, random.choice(target.good), target.good)
                watch.ticks = 0
                accepted += _run(target, data)
                slowest = max(slowest, watch.ticks)
    except (Exception, Hang) as error:
        failure = f"{type(error).__name__}: {str(error)[:200]} on {data.hex() if len(data) < 5000 else len(data)}"
    gc.collect()
    growth = _megabytes() - before
    if not failure and growth > GROWTH_MB:
        failure = f"grew by {growth:.0f} MB"
    seconds = time.perf_counter() - began
    return Outcome(target.name, number + 1, accepted, seconds, (slowest + 1) * TICK, growth, failure)


def _run(target: Target, data: bytes) -> bool:
    try:
        target.run(data)
    except target.allowed:
        return False
    return True


def _megabytes() -> float:
    """The most that this process held since that was last forgotten."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


# --- All targets, on all cores ---


def _job(name: str, first_block: int, inputs: int) -> Outcome:
    workshop = Workshop()
    try:
        return fuzz(by_name(workshop)[name], first_block, inputs)
    finally:
        workshop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1_000_000, help="mutated inputs for each target")
    parser.add_argument("--only", help="the target of this name alone")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    arguments = parser.parse_args()

    workshop = Workshop()
    names = [name for name in by_name(workshop) if arguments.only in (None, name)]
    workshop.close()
    each = -(-arguments.inputs // (arguments.cores * BLOCK)) * BLOCK
    print(_line("target", "inputs", "accepted", "a second", "slowest", "growth"), " outcome", flush=True)
    began, failed = time.perf_counter(), 0
    for name in names:
        outcome = _all_cores(name, arguments.cores, each, arguments.inputs)
        failed += bool(outcome.failure)
        figures = (
            f"{outcome.inputs:,}",
            f"{outcome.accepted / outcome.inputs:.1%}",
            f"{outcome.inputs / outcome.seconds:,.0f}",
            f"<{outcome.slowest * 1e3:.0f} ms",
            f"{outcome.growth:.0f} MB",
        )
        print(_line(name, *figures), "", outcome.failure or "holds", flush=True)
    print(f"\n{len(names)} parsers, {len(names) - failed} hold, in {(time.perf_counter() - began) / 60:.1f} minutes")
    sys.exit(bool(failed))


def _all_cores(name: str, cores: int, each: int, inputs: int) -> Outcome:
    """A process for each core, each with blocks of its own; a new one for each target, so that its growth counts."""
    shares = [min(each, inputs - start) for start in range(0, inputs, each)]
    began = time.perf_counter()
    parts: list[Outcome] = []
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(_job, name, index * each // BLOCK, share) for index, share in enumerate(shares)]
        try:
            parts = [job.result() for job in as_completed(jobs)]
        except BrokenProcessPool:
            return Outcome(name, inputs, 0, time.perf_counter() - began, 0.0, 0.0, "its process died")
    return Outcome(
        name,
        sum(part.inputs for part in parts),
        sum(part.accepted for part in parts),
        time.perf_counter() - began,
        max(part.slowest for part in parts),
        max(part.growth for part in parts),
        next((part.failure for part in parts if part.failure), ""),
    )


def _line(name: str, *figures: str) -> str:
    return "  ".join([name.ljust(26), *(figure.rjust(9) for figure in figures)])


if __name__ == "__main__":
    main()
