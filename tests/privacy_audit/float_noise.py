"""Is there another source of chance than the injected bytes? Asked of the source text that private training can reach.

A floating-point Gaussian leaks through its low bits (Mironov, CCS 2012), and a library's generator is none for secrets.
So no module of `privacy` and `tasks`, and none that they import, may name one. What is looked for is names: the tests
of the noise itself (`residuals`) see what this one cannot.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

from foedus_common.randomness import system_random
from privacy_audit.verdicts import Verdict

ROOT = Path(__file__).parents[2]
COMMON = ROOT / "common"
TRAINER = ROOT / "client" / "foedus_client" / "training" / "trainer.py"
PLACES = ("foedus_common/privacy", "foedus_common/tasks")

MODULES_OF_CHANCE = ("random", "secrets")
NAMES_OF_CHANCE = re.compile(
    r"(numpy|np|torch)\.random\b|torch\.(distributions|manual_seed|Generator|seed)\b|scipy\.stats\b"
    r"|torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson)(_like)?\b"
    r"|\b(default_rng|RandomState|Philox|PCG64|MT19937|ndtri|erfinv)\b|\.(gauss|normalvariate|rvs|ppf)$"
    r"|\.(normal|uniform|random|bernoulli|exponential|cauchy|log_normal|geometric)_$"
)


def reachable() -> list[Path]:
    """The modules of `PLACES`, and of our own whatever they import, directly or not."""
    waiting = [path for place in PLACES for path in (COMMON / place).glob("*.py")]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += [found for name in _imports(ast.parse(path.read_text())) if (found := _file_of(name)).is_file()]
    return sorted(seen)


def other_chance(source: str) -> list[str]:
    """What a module's text names of other sources of chance, with the line."""
    tree = ast.parse(source)
    modules = [name for name in _imports(tree) if name in MODULES_OF_CHANCE or NAMES_OF_CHANCE.search(name)]
    names = [
        f"{ast.unparse(node)} (line {node.lineno})"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute | ast.Name) and NAMES_OF_CHANCE.search(ast.unparse(node))
    ]
    return modules + names


def draws_from_the_system() -> bool:
    """Whether a site's trainer trains with the operating system's generator and nothing else."""
    calls = [node for node in ast.walk(ast.parse(TRAINER.read_text())) if isinstance(node, ast.Call)]
    trains = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("_local.train")]
    return system_random is os.urandom and bool(trains) and all("system_random)" in call for call in trains)


def verdicts() -> list[Verdict]:
    paths = reachable()
    found = [f"{path.name}: {name}" for path in paths for name in other_chance(path.read_text())]
    said = ", ".join(found) or f"none in {len(paths)} modules"
    return [
        Verdict("other sources of chance in the code", said, "none", not found),
        Verdict("a site's noise comes from the system", "os.urandom", "os.urandom", draws_from_the_system()),
    ]


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _file_of(module: str) -> Path:
    path = COMMON / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
