"""The two programs as real processes on loopback: started, asked, awaited and stopped by pid.

Used by the demo and by the tests that need real processes. Nothing here sleeps to wait: it reads what the programs
print, or asks them until a condition holds within a deadline.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from foedus_common.errors import LocalError

OPERATOR = "foedus_server.cli"
SITE = "foedus_client.cli"


_held: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Free ports of 127.0.0.1 for programs of ours, who share them with a socket here that never listens: while this
    process lives, the system gives them to nobody who asks for any port, nor to a connection."""
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.bind(("127.0.0.1", 0))
    _held.extend(held)
    return [each.getsockname()[1] for each in held]


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns when the condition holds; raises LocalError naming `what` when it does not within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise LocalError(f"{what} did not happen within {seconds:.0f} seconds.")
        time.sleep(0.05)


class Party:
    """One home folder and the program that works on it."""

    def __init__(self, module: str, home: Path, environment: Mapping[str, str] | None = None) -> None:
        self.home = home
        self._module = module
        state = str(home.parent / "state")  # where high-water marks go: nothing is left in the user's own folders
        ours = {"FOEDUS_HOME": str(home), "XDG_STATE_HOME": state, "NO_COLOR": "1"}
        self._environment = {**os.environ, **ours, **(environment or {})}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", self._module, *arguments]

    def ask(self, *arguments: str) -> Any:
        """Runs one command with --json to its end and returns what it printed. Raises LocalError with its sentence."""
        result = self.attempt(*arguments, "--json")
        if result.returncode != 0:
            raise LocalError(f"`{' '.join(arguments)}` ended with {result.returncode}: {result.stderr.strip()}")
        return json.loads(result.stdout) if result.stdout.strip() else None

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs one command to its end, whatever the exit code."""
        return subprocess.run(
            self.command(*arguments), env=self._environment, capture_output=True, text=True, timeout=600, check=False
        )

    def show(self, *arguments: str) -> int:
        """Runs one command on this terminal, in its colours, to its end; gives its exit code."""
        environment = {key: value for key, value in self._environment.items() if key != "NO_COLOR"}
        return subprocess.run(self.command(*arguments), env=environment, check=False).returncode

    def start(self, name: str, *arguments: str, secret: str | None = None) -> subprocess.Popen[bytes]:
        """Starts a command in the background; its output goes to `log(name)`, beside the home folder.

        secret: one line that it reads from its standard input, which is empty otherwise.
        """
        log = self.log(name)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = self._running[name] = subprocess.Popen(
                self.command(*arguments),
                env=self._environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE if secret else subprocess.DEVNULL,
            )
        if secret and process.stdin:
            with process.stdin:
                process.stdin.write(secret.encode() + b"\n")
        return process

    def log(self, name: str) -> Path:
        return self.home.parent / "logs" / f"{self.home.name}-{name}.log"

    def await_line(self, name: str, text: str, seconds: float = 180) -> None:
        """Waits until the background command NAME has printed `text`; raises LocalError if it ends before."""

        def printed() -> bool:
            ended = self._running[name].poll() is not None
            if text in self.log(name).read_text(errors="replace"):
                return True
            if ended:
                tail = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-5:])
                raise LocalError(f"{self.home.name}: `{name}` ended before it was ready: {tail}")
            return False

        until(printed, seconds, f"{self.home.name}: {name!r} printing {text!r}")

    def finish(self, name: str, seconds: float = 180) -> None:
        """Waits for a background command to end with exit code 0."""
        code = self._running.pop(name).wait(timeout=seconds)
        if code != 0:
            tail = "\n".join(self.log(name).read_text(errors="replace").splitlines()[-5:])
            raise LocalError(f"{self.home.name}: `{name}` ended with {code}: {tail}")

    def kill(self, name: str) -> None:
        """kill -9, as a crash would."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def stop(self, name: str | None = None) -> None:
        """Interrupts what runs and waits for it; kills what has not ended after 15 seconds."""
        for each in [name] if name else list(self._running):
            process = self._running.pop(each)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(timeout=15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
