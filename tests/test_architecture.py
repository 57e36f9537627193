"""The rules of the house, as a test: who may import whom, and where torch, Flower, SQL and the clock live."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOTS = {
    "foedus_common": ROOT / "common",
    "foedus_client": ROOT / "client",
    "foedus_server": ROOT / "server",
    "foedus_simulations": ROOT / "simulations",
}
MAY_IMPORT = {
    "foedus_common": {"foedus_common"},
    "foedus_client": {"foedus_common", "foedus_client"},
    "foedus_server": {"foedus_common", "foedus_server"},
    "foedus_simulations": set(ROOTS),
}


def modules() -> list[tuple[str, str, Path]]:
    """(package, path within it, file) of every module that people wrote."""
    found = []
    for package, root in ROOTS.items():
        for path in sorted((root / package).rglob("*.py")):
            if "_pb2" not in path.name:
                found.append((package, path.relative_to(root / package).as_posix(), path))
    return found


def imports(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, with its full dotted name."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


def imports_any(path: Path, *packages: str) -> bool:
    return any(name.split(".")[0] in packages for name in imports(path))


MODULES = modules()


@pytest.mark.parametrize(("package", "name", "path"), MODULES, ids=[f"{p}/{n}" for p, n, _ in MODULES])
def test_module_keeps_the_rules(package: str, name: str, path: Path) -> None:
    ours = {imported.split(".")[0] for imported in imports(path)} & set(ROOTS)
    assert ours <= MAY_IMPORT[package], f"{name} imports {ours - MAY_IMPORT[package]}"

    place = f"{package}/{name}"
    if imports_any(path, "torch", "transformers", "peft"):
        assert package == "foedus_simulations" or place.startswith(
            (
                "foedus_common/tasks/",
                "foedus_client/training/trainer.py",
                "foedus_server/prepare.py",
                "foedus_server/release/",
            )
        ), f"{place} imports torch"
    if imports_any(path, "flwr"):
        assert package == "foedus_simulations" or name.startswith("link/") or name in {"app.py", "aggregation.py"}, (
            place
        )
        assert all(
            imported.startswith(("flwr.app", "flwr.clientapp", "flwr.serverapp"))
            for imported in imports(path)
            if imported.split(".")[0] == "flwr"
        ), f"{place} uses more than Flower's public API"
    if imports_any(path, "sqlite3", "sqlalchemy"):
        assert place.startswith(("foedus_client/data.py", "foedus_client/store/", "foedus_server/store/")), (
            f"{place} speaks SQL"
        )
    if imports_any(path, "time", "datetime"):
        assert place in {"foedus_common/clock.py"} or package == "foedus_simulations", f"{place} reads the clock"
    if imports_any(path, "random", "secrets"):
        raise AssertionError(f"{place}: randomness is an argument (foedus_common.randomness)")
    assert not imports_any(path, "pickle", "marshal", "shelve", "dill", "cloudpickle"), f"{place} can run what it reads"


def test_nobody_imports_the_simulations() -> None:
    for package, name, path in MODULES:
        if package != "foedus_simulations":
            assert not any(i.startswith("foedus_simulations") for i in imports(path)), name


@pytest.mark.parametrize(("package", "name", "path"), MODULES, ids=[f"{p}/{n}" for p, n, _ in MODULES])
def test_every_module_says_what_it_is(package: str, name: str, path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{package}/{name} opens without a docstring"


def test_no_module_outgrows_a_sitting() -> None:
    lengths = {f"{package}/{name}": len(path.read_text().splitlines()) for package, name, path in MODULES}
    assert {place: lines for place, lines in lengths.items() if lines > 500} == {}
