"""The parent's side of the trainer: a child process started by exec, spoken to over its standard input and output.

Importing torch takes seconds and hundreds of megabytes, and training holds the interpreter; neither belongs in the
process that keeps the link alive. Knows the pipe's messages (one line of JSON, then as many raw bytes as it says) and
that a child may die at any time; knows no torch. docs/decisions holds why there is one trainer per run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from foedus_client.training.computing import Computing
from foedus_common.adapters import MAX_PARAMETERS
from foedus_common.errors import LocalError
from foedus_common.plan import MAX_PLAN_BYTES, AgreedPlan, RoundPlan

MAX_HEADER_BYTES = 64 * 1024
MAX_BODY_BYTES = max(MAX_PLAN_BYTES, 8 * MAX_PARAMETERS)

ENDS_WITHIN = 5.0
"""Seconds in which a child whose pipe broke must have ended by itself."""

Progress = Callable[[str, int, int], None]
"""progress(what, done, total): what is "features" or "steps"."""


@dataclass(frozen=True, kw_only=True)
class TrainerSettings(Computing):
    """What a trainer is told once, when it starts.

    dataset: a CSV, JSONL or Parquet file as `foedus_client.data.read_rows` reads it; dataset_sha256: 64 hex digits.
    """

    model_folder: str
    dataset: str
    dataset_sha256: str
    text: str
    label: str


class TrainerProcess:
    """One trainer for one run. `train` blocks; `stop` may be called from any thread and ends a `train` under way."""

    def __init__(self, settings: TrainerSettings, agreed: AgreedPlan, log: IO[bytes] | int | None = None) -> None:
        """log: where the child's standard error goes (default: this process's own)."""
        self._settings = settings
        self._agreed = agreed
        self._log = log
        self._child: subprocess.Popen[bytes] | None = None
        self._training = threading.Lock()
        self._stopped = False

    def open(self) -> None:
        """Have a child ready with the model on its device, so that what can go wrong there goes wrong before anything
        is charged; the dataset stays closed. Raises LocalError as `train` does."""
        with self._training:
            self._ready_child()

    def train(
        self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan, progress: Progress = lambda *_: None
    ) -> NDArray[np.float64]:
        """The update of one round from the adapter file, float64 (d,), noise included. Starts the child if need be;
        the child opens the dataset at the first call and not before.

        Raises LocalError with the child's own sentence, or with how the child ended; a later call starts a new one.
        """
        size = self._agreed.size(round_plan.phase)
        request = {"do": "train", "adapter": str(adapter), "sha256": adapter_sha256, "round": round_plan.index}
        with self._training:
            child = self._ready_child()
            with self._ended_when_broken(child):
                write_message(_pipe(child.stdin), request)
                return _await_update(_pipe(child.stdout), size, progress)

    def stop(self) -> None:
        """End the child, whatever it is doing; afterwards `train` refuses."""
        self._stopped = True
        child = self._child
        if child is not None:
            self._end(child)

    def _ready_child(self) -> subprocess.Popen[bytes]:
        if self._stopped:
            raise LocalError("The trainer of this run was stopped.")
        if self._child is None or self._child.poll() is not None:
            self._child = _start(self._settings.threads, self._log)
            with self._ended_when_broken(self._child):
                write_message(
                    _pipe(self._child.stdin), {"do": "open", **asdict(self._settings)}, self._agreed.canonical()
                )
                if self._stopped:  # `stop` came while the child was being started
                    self._end(self._child)
                self._await_open(self._child)
        return self._child

    def _await_open(self, child: subprocess.Popen[bytes]) -> None:
        match read_message(_pipe(child.stdout), limit=0)[0]:
            case {"say": "open"}:
                return
            case {"say": "error", "sentence": str(sentence)}:
                self._end(child)
                raise LocalError(sentence)
            case _:
                raise ValueError("unexpected message")

    @contextmanager
    def _ended_when_broken(self, child: subprocess.Popen[bytes]) -> Iterator[None]:
        """A pipe that broke, or an answer that is none, ends the child with one sentence."""
        try:
            yield
        except (BrokenPipeError, EOFError):
            raise self._death(child) from None
        except ValueError:
            self._end(child)
            raise LocalError("The trainer answered with something else than an update; see its log.") from None

    def _death(self, child: subprocess.Popen[bytes]) -> LocalError:
        by_itself = self._end(child)
        if self._stopped:
            return LocalError("The trainer of this run was stopped.")
        if child.returncode == -9 and by_itself:
            return LocalError("The trainer was killed, most likely because memory ran out; free memory, or raise it.")
        return LocalError(f"The trainer ended early (exit status {child.returncode}); see its log.")

    def _end(self, child: subprocess.Popen[bytes]) -> bool:
        """Wait for a child whose pipe is closed, and kill one that does not end by itself; whether it did."""
        try:
            child.wait(timeout=0 if self._stopped else ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return False
        return True


def _start(threads: int, log: IO[bytes] | int | None) -> subprocess.Popen[bytes]:
    """Exec, never a bare fork: forked children of a process with gRPC under way crash. -P: what lies in the folder in
    which the daemon was started is no module."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "foedus_client.training.trainer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        close_fds=True,
        env=environment,
    )


def _await_update(answers: IO[bytes], size: int, progress: Progress) -> NDArray[np.float64]:
    """Read progress until the update comes. EOFError: the child closed the pipe; ValueError: it broke the format."""
    while True:
        header, body = read_message(answers, limit=8 * size)
        match header:
            case {"say": "progress", "what": str(what), "done": int(done), "total": int(total)}:
                progress(what, done, total)
            case {"say": "error", "sentence": str(sentence)}:
                raise LocalError(sentence)
            case {"say": "update"} if len(body) == 8 * size:
                return np.frombuffer(body, np.dtype("<f8")).astype(np.float64)
            case _:
                raise ValueError("unexpected message")


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def write_message(pipe: IO[bytes], header: dict[str, Any], body: bytes = b"") -> None:
    """One line of JSON with the body's length in it, then the body."""
    pipe.write(json.dumps({**header, "bytes": len(body)}).encode() + b"\n")
    pipe.write(body)
    pipe.flush()


def read_message(pipe: IO[bytes], limit: int = MAX_BODY_BYTES) -> tuple[dict[str, Any], bytes]:
    """The next header and body. EOFError when the pipe is closed; ValueError for anything longer than `limit`,
    or that is not such a message."""
    line = pipe.readline(MAX_HEADER_BYTES)
    if not line:
        raise EOFError
    try:
        header = json.loads(line)
    except RecursionError:
        raise ValueError("a message nested too deep") from None
    length = header.pop("bytes") if isinstance(header, dict) and "bytes" in header else -1
    if not isinstance(length, int) or not 0 <= length <= limit:
        raise ValueError("a message of impossible length")
    body = pipe.read(length)
    if len(body) < length:
        raise EOFError
    return header, body
