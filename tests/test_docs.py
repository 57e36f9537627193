"""The documents as tests: links resolve, samples parse, commands and named tests exist, tables equal the code.

What counts as a document: every Markdown file of the repository. A TOML sample says what it is after the language,
```toml plan, ```toml site or ```toml coordinator; a sample that says nothing only has to be TOML.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from foedus_client.config import SiteSettings
from foedus_common.errors import Reason
from foedus_common.plan import RunPlan
from foedus_common.protocol.draw import RoundSize, withstood
from foedus_common.protocol.thresholds import thresholds, tolerated_drops
from foedus_common.tables import parse
from foedus_server.config import Settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAMPLES: dict[str, type] = {"plan": RunPlan, "coordinator": Settings, "site": SiteSettings}
PROGRAMS = {"foedus": "foedus_server.cli.operator", "foedus-site": "foedus_client.cli.site"}


def fences(path: Path) -> list[tuple[str, str]]:
    """(info string, body) of every fenced block."""
    return FENCE.findall(path.read_text(encoding="utf-8"))


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


# --- Links ---


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_every_relative_link_resolves(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), f"{path.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}, which has no such heading"


# --- Samples ---


@each_document
def test_every_toml_sample_parses(path: Path) -> None:
    for info, body in fences(path):
        if not info.startswith("toml"):
            continue
        table = tomllib.loads(body)
        if kind := info.removeprefix("toml").strip():
            parse(SAMPLES[kind], table, f"the {kind} in {path.name}")


def keys(kind: Any) -> set[str]:
    """Every key that a table of this dataclass can have, those of tables within it as `table.key`."""
    found: set[str] = set()
    for name, hint in typing.get_type_hints(kind).items():
        inner = [hint, *typing.get_args(hint)]
        table = next((each for each in inner if dataclasses.is_dataclass(each)), None)
        found |= {f"{name}.{key}" for key in keys(table)} if table else {name}
    return found


def used(table: Mapping[str, Any]) -> Iterator[str]:
    for name, value in table.items():
        rows = value if isinstance(value, list) else [value]
        if rows and all(isinstance(row, dict) for row in rows):
            yield from (f"{name}.{key}" for row in rows for key in used(row))
        else:
            yield name


@pytest.mark.parametrize("kind", SAMPLES)
def test_every_key_is_shown_in_a_sample(kind: str) -> None:
    samples = [body for path in DOCUMENTS for info, body in fences(path) if info == f"toml {kind}"]
    shown = {key for body in samples for key in used(tomllib.loads(body))}
    assert keys(SAMPLES[kind]) - shown == set()


# --- Commands ---


def commands(path: Path) -> list[str]:
    """Every call of our two programs that the document shows: lines of console blocks, and code within sentences."""
    lines = [line for info, body in fences(path) if info == "console" for line in body.splitlines()]
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    shown += [line for info, body in fences(path) if info == "sh" for line in body.splitlines()]  # to be pasted
    shown += re.findall(r"`(foedus(?:-site)? [^`\n]+)`", prose(path))
    return [re.split(r"\s+#|\s*[|>&]", call)[0].strip() for call in shown if re.match(r"foedus(-site)? ", call)]


@functools.cache
def program(name: str) -> click.Group:
    app = importlib.import_module(PROGRAMS[name]).app
    for command in entry_points(group=f"{name}.commands"):  # as the program itself does when it starts
        app.command(command.name)(command.load())
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group


def check_call(call: str) -> None:
    """Walk the program's commands by the words of `call`; an option must belong to a command that came before it."""
    name, *words = call.split()
    command: click.Command = program(name)
    options = takes(command)
    for word in (rest := iter(words)):
        if word == "--help":
            return
        if word.startswith("-") and word != "-":  # a lone dash is standard input
            option, _, value = word.partition("=")
            assert option in options, f"`{call}`: there is no option {option}"
            if options[option] and not value:
                next(rest, None)
        elif isinstance(command, click.Group):
            assert word in command.commands, f"`{call}`: there is no {word!r}"
            command = command.commands[word]
            options |= takes(command)
    assert not isinstance(command, click.Group), f"`{call}` is not a whole command"


def takes(command: click.Command) -> dict[str, bool]:
    """The command's options, and whether each is followed by a value."""
    return {
        name: not parameter.is_flag
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for name in parameter.opts + parameter.secondary_opts
    }


@each_document
def test_every_command_exists(path: Path) -> None:
    for call in commands(path):
        check_call(call)


def leaves(group: click.Group, *names: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, *names, name)
        elif not command.hidden:
            yield " ".join((*names, name))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_command_is_documented(name: str) -> None:
    shown = [f"{call} " for path in DOCUMENTS for call in commands(path)]
    assert [leaf for leaf in leaves(program(name)) if not any(c.startswith(f"{name} {leaf} ") for c in shown)] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_has_an_example_that_can_be_typed(name: str) -> None:
    for leaf in leaves(program(name)):
        command: click.Command = program(name)
        for word in leaf.split():
            assert isinstance(command, click.Group)
            command = command.commands[word]
        if all(parameter.name in ("as_json", "yes") for parameter in command.params):
            continue  # nothing to be shown
        example = re.search(r"^For example: (.+)$", inspect.getdoc(command.callback) or "", re.MULTILINE)
        assert example, f"`{name} {leaf} --help` shows no example"
        check_call(call := re.split(r" [<>] ", example[1])[0])
        assert f" {leaf} " in call
        command.make_context(leaf, shlex.split(call.partition(f" {leaf} ")[2]))  # raises where something is missing


# --- Tables ---


def first_cells(path: Path, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its two top lines."""
    text = path.read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    rows = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_refusals_is_complete() -> None:
    named = [row[0].strip("`") for row in first_cells(ROOT / "docs/protocol.md", "Named refusals")]
    assert len(named) == len(set(named))
    assert set(named) == {reason.value for reason in Reason}


def test_the_table_of_thresholds_is_what_is_computed() -> None:
    rows = [tuple(map(int, (row[0], *row[2:]))) for row in first_cells(ROOT / "docs/protocol.md", "Thresholds")]
    assert len(rows) >= 5
    for n, c, s, t, m_min, drops in rows:
        limits = thresholds(n, c, s)
        assert (limits.threshold, limits.minimum, tolerated_drops(n, c, s)) == (t, m_min, drops)


def test_the_table_of_colluders_is_what_is_computed() -> None:
    rows = [tuple(map(int, row)) for row in first_cells(ROOT / "docs/protocol.md", "How many may collude")]
    assert len(rows) >= 5
    for sites, cohort, c, together, t, drops in rows:
        size = RoundSize(sites, sites)
        assert size.smallest_sum == size.largest_sum == cohort
        assert withstood(c, size=size, rounds=100) == together
        assert (thresholds(cohort, c).threshold, tolerated_drops(cohort, c)) == (t, drops)


# --- What is named must be there ---


@functools.cache
def defined_tests() -> set[str]:
    return {
        node.name
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }


@each_document
def test_every_test_and_file_that_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named - defined_tests() == set()
    for file in re.findall(r"`((?:common|client|server|simulations|tests|docs)/[\w./]+\.\w+)`", text):
        assert (ROOT / file).is_file(), f"{path.name} names {file}"


def test_the_tree_in_the_readme_is_there() -> None:
    tree = next(body for info, body in fences(ROOT / "README.md") if info == "text" and "foedus_common" in body)
    folders: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in re.split(r"\s{2,}", line.strip())[0].split(" · "):
            place = "/".join([*folders[:depth], name.rstrip("/")])
            assert list(ROOT.glob(place)), f"the README's tree names {place}"
            if name.endswith("/"):
                folders[depth:] = [name.rstrip("/")]
