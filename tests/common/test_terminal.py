"""What a person reads: nothing cut off on a narrow screen, nothing broken in a pipe, one sentence for an error."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from io import StringIO

import pytest
import typer
from rich.console import Console

from foedus_common import terminal
from foedus_common.errors import LocalError

SHA256 = "0123456789abcdef" * 4


@pytest.fixture(params=[None, 80, 120])
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[StringIO]:
    """What is printed: to a pipe, or to a terminal of so many columns, none of whose lines may be longer."""
    written = StringIO()
    columns = request.param
    shown = Console(file=written, width=columns, force_terminal=bool(columns), color_system=None, highlight=False)
    monkeypatch.setattr(terminal, "console", shown)
    yield written
    assert columns is None or max(map(len, plain(written))) <= columns


def plain(written: StringIO) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[\d*m", "", written.getvalue()).splitlines()]


def test_a_table_breaks_no_word(screen: StringIO) -> None:
    rows = [("all-MiniLM-L6-v2", SHA256, "/srv/models/[all]-MiniLM-L6-v2"), ("bert", SHA256[::-1], "/srv/models/bert")]
    terminal.print_table(["model", "sha256", "folder"], rows, "None.")
    words = {word for line in plain(screen) for word in line.split()}
    assert {cell for row in rows for cell in row} <= words


def test_letters_of_double_width_cut_nothing_off(screen: StringIO) -> None:
    terminal.print_table(["key", "organisation"], [(SHA256, "東京大学医学部附属病院")], "None.")
    words = {word for line in plain(screen) for word in line.split()}
    assert {SHA256, "東京大学医学部附属病院"} <= words


def test_what_is_broken_is_a_sentence(screen: StringIO) -> None:
    sentence = " ".join(["It waits for the sites' administrators."] * 4)
    row = ("icd-chapters", "2026-11-22T10:53:29+00:00", True, sentence)
    terminal.print_table(["run", "ends", "shown", "reason"], [row], "None.")
    lines = plain(screen)
    assert lines[0].split() == ["run", "ends", "shown", "reason"]
    assert lines[1].split()[:3] == ["icd-chapters", "2026-11-22T10:53:29+00:00", "yes"]
    told = " ".join(line[lines[0].index("reason") :] for line in lines[1:])
    assert " ".join(told.split()) == sentence


def test_facts_stand_beside_their_names(screen: StringIO) -> None:
    sentence = " ".join(["Both epsilons are the same."] * 6)
    terminal.print_facts({"head": SHA256, "about_epsilons": sentence, "by": None})
    lines = plain(screen)
    assert lines[0] == f"head            {SHA256}"
    assert {line[:16].strip() for line in lines[2:-1]} <= {""}
    assert " ".join(line[16:].strip() for line in lines[1:-1]) == sentence
    assert lines[-1].split() == ["by", "-"]


def test_only_a_terminal_breaks_a_sentence(screen: StringIO) -> None:
    terminal.print_line("[all] " + "word " * 60)
    assert plain(screen)[0].startswith("[all] word")
    assert (len(plain(screen)) == 1) is (not terminal.console.is_terminal)


def test_what_others_wrote_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A name, a purpose or a path may have any printable characters."""
    terminal.print_line("ward:x:7 [red]")
    terminal.print_facts({"purpose": "ward:x:7 [red]"})
    terminal.print_aside("ward:x:7 [red]")
    shown = capsys.readouterr()
    assert shown.out.count("ward:x:7 [red]") == 2
    assert shown.err.count("ward:x:7 [red]") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalError("There is no run 'x'."), "There is no run 'x'."),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "no/plan.toml"), "no/plan.toml: No such file"),
    ],
)
def test_an_error_is_one_sentence(
    error: Exception, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr("sys.argv", ["foedus"])
    with pytest.raises(SystemExit) as exited:
        terminal.run(app, "foedus")
    assert exited.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"foedus: {sentence}")
    assert len(said.err.splitlines()) == 1
