"""The two programs called in the test's own process: words in, exit code and output out. And a walk over their help."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code in (0, 1), self
        return json.loads(self.out)


class Program:
    """One of the programs on one home. `main` is its entry point."""

    def __init__(
        self,
        main: Callable[[], Any],
        home: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self._main = main
        self.home = home
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *words: str) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["program", "--home", str(self.home), *words])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            self._main()
        printed = self._capsys.readouterr()
        assert "Traceback" not in printed.err
        return Ended(int(exit_.value.code or 0), printed.out, printed.err)


def commands(app: typer.Typer) -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by its words."""
    yield from _leaves(typer.main.get_command(app), ())


def _leaves(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        assert command.help, f"{' '.join(words)} says nothing about itself"
        for name, each in command.commands.items():
            yield from _leaves(each, (*words, name))
    else:
        yield " ".join(words), command


def assert_teaches(command: click.Command) -> None:
    """One sentence on what the command does, perhaps an example, and something on each of its arguments and options."""
    assert command.help is not None
    sentence, _, example = command.help.strip().partition("\n\n")
    assert sentence.endswith((".", "?"))
    assert example.startswith("For example: ") or not example
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{command.name} says nothing about {parameter.name}"


def takes_json(command: click.Command) -> bool:
    return any("--json" in parameter.opts for parameter in command.params)
