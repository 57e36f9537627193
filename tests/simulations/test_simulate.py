"""`foedus simulate` as a person uses it, on a model of two layers: its files, its sentences, its figures by seed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click.testing
import pytest
import typer
from typer.testing import CliRunner

from foedus_common.errors import LocalError
from foedus_common.model_folder import manifest_sha256
from foedus_simulations import cli as simulation
from foedus_simulations.cli import set_up, simulate, site_names
from foedus_simulations.corpora import Row
from plans import TABLE, plan_table
from tiny_model import LABELS, rows, tiny_plan, without_dp, write_tiny_model

APP = typer.Typer()
APP.command()(simulate)

CLINICS = ("St. Mary", "Lakeside", "North")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 rows; the text, its label, and the clinic that it comes from."""
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("note", "chapter", "clinic"))
        writer.writerows((text, label, CLINICS[n // 3 % 3]) for n, (text, label) in enumerate(rows(100)))
    return path


def write_plan(path: Path, model: Path, **changes: Any) -> Path:
    """A plan of two head rounds for the tiny model, as TOML; JSON values are TOML values."""
    usual = {
        "model__sha256": manifest_sha256(model),
        "task__labels": LABELS,
        "adapter__rank": 2,
        "phase": [{**TABLE["phase"][0], "rounds": 2, "budget_share": 1.0}],
        "privacy__divisor": 30,
    }
    table = plan_table(**(usual | changes))
    lines = [f"[[phase]]\n{_keys(phase)}" for phase in table.pop("phase")]
    path.write_text("\n".join([*(f"[{name}]\n{_keys(section)}" for name, section in table.items()), *lines]))
    return path


def _keys(section: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())


@pytest.fixture(scope="module")
def plan(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.toml", model)


@pytest.fixture(scope="module")
def usual(plan: Path, model: Path, data: Path) -> dict[str, str]:
    """The options of a simulation that works; "" is the plan."""
    return {"": str(plan), "--model": str(model), "--data": str(data), "--text": "note", "--label": "chapter"}


def run(options: Mapping[str, str], *more: str) -> click.testing.Result:
    arguments = [part for name, value in options.items() for part in (name, value) if part]
    return CliRunner().invoke(APP, [*arguments, *more])


def figures(options: Mapping[str, str], *more: str) -> dict[str, Any]:
    result = run(options, *more, "--json")
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return {key: value for key, value in found.items() if not key.startswith("seconds")}


@pytest.fixture(scope="module")
def compared(usual: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, click.testing.Result]:
    """The folder and the output of a simulation with everything that can be asked for."""
    folder = tmp_path_factory.mktemp("reports") / "new" / "first"
    result = run(usual | {"--compare": "alone,central", "--report": str(folder)})
    assert result.exit_code == 0, result.exception
    return folder, result


def test_a_simulation_leaves_its_report_as_json_csv_and_page(compared: tuple[Path, click.testing.Result]) -> None:
    folder, result = compared
    report = json.loads((folder / "report.json").read_text())
    assert report["rounds"] == 2
    assert len(report["accuracy_alone"]) == 3
    assert 0 <= report["accuracy_central"] <= 1
    assert report["rows_held_out"] == 10  # of 20 held out, ten chose learning rates
    assert sum(report["rows"].values()) == 80
    assert all(0 < spent <= 8 for spent in report["epsilon_local"])
    assert report["epsilon_central"] == report["epsilon_local"]
    with (folder / "rounds.csv").open(newline="") as file:
        assert [line["round"] for line in csv.DictReader(file)] == ["1", "2"]
    html = (folder / "report.html").read_text()
    assert html.count("<svg") == 5
    assert "3 simulated sites" in html
    assert "report.json, rounds.csv and report.html are in" in result.stdout


def test_progress_goes_to_standard_error(compared: tuple[Path, click.testing.Result]) -> None:
    _, result = compared
    told = ["round 1 of 2", "round 2 of 2", "site-001 alone", "site-002 alone", "site-003 alone"]
    assert result.stderr.splitlines()[-6:] == [*told, "all rows in one place"]


def test_the_same_seed_gives_the_same_figures(
    usual: dict[str, str], compared: tuple[Path, click.testing.Result]
) -> None:
    report = json.loads((compared[0] / "report.json").read_text())
    once = {key: value for key, value in report.items() if not key.startswith("seconds")}
    assert once == figures(usual | {"--compare": "alone,central"})


def test_a_column_names_the_sites(usual: dict[str, str]) -> None:
    found = figures(usual | {"--partition": "column:clinic"})
    assert sorted(found["rows"]) == ["lakeside", "north", "st-mary"]
    assert found["accuracy_alone"] == []
    assert found["accuracy_central"] is None


def test_without_privacy_no_epsilon_is_given(usual: dict[str, str], model: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", model, **without_dp())
    found = figures(usual | {"": str(plan)})
    assert found["privacy"] == "none"
    assert found["epsilon_local"] == [None, None, None]
    assert found["releases_without_privacy"] == [2, 2, 2]


def test_where_the_site_is_the_unit_both_epsilons_are_of_a_site(
    usual: dict[str, str], model: Path, tmp_path: Path
) -> None:
    phase = {"train": "head", "rounds": 2, "learning_rate": 0.1, "steps": 3, "batch_size": 4, "budget_share": 1.0}
    privacy = {"unit": "site", "epsilon": 8.0, "delta": 1e-5, "clip": 0.5}
    plan = {"": str(write_plan(tmp_path / "plan.toml", model, phase=[phase], privacy__divisor=None, privacy=privacy))}
    found = figures(usual | plan, "--report", str(tmp_path / "report"))
    assert found["privacy"] == "site"
    both = list(zip(found["epsilon_central"], found["epsilon_local"], strict=True))
    assert all(0 < central < min(8, local) for central, local in both)
    assert "per site" in (tmp_path / "report" / "report.html").read_text()
    refused = run(usual | plan | {"--compare": "alone"}).exception
    assert re.search("nothing alike to compare with", str(refused))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"": "absent.toml"}, "absent.toml"),
        ({"--model": "absent"}, "absent"),
        ({"--data": "absent.csv"}, r"absent\.csv cannot be read: No such file"),
        ({"--held-out": "absent.csv"}, r"absent\.csv cannot be read: No such file"),
        ({"--text": "notes"}, "did you mean 'note'"),
        ({"--label": "clinic"}, "The data has 3 labels that the plan does not list"),
        ({"--partition": "dirichlett:0.5"}, "'dirichlett:0.5' is not known; did you mean 'dirichlet:0.5'"),
        ({"--partition": "dirichlet:none"}, "needs a number above 0"),
        ({"--partition": "column:clinics"}, "did you mean 'clinic'"),
        ({"--partition": "column:clinic", "--sites": "5"}, "has 3 values, so it makes 3 sites, not 5"),
        ({"--sites": "2"}, r"The rows go to 2 sites, and \[secure_aggregation\] of the plan lets 3 to 16 take part"),
        ({"--sites": "12"}, "leaves one of 12 sites with 6 rows, fewer than 10; use fewer sites"),
        ({"--compare": "alone,together"}, "--compare 'together' is not known"),
    ],
    ids=str,
)
def test_what_cannot_be_simulated_is_said_in_one_sentence(
    usual: dict[str, str], options: dict[str, str], sentence: str
) -> None:
    result = run(usual | options)
    assert isinstance(result.exception, LocalError), result.exception
    assert re.search(sentence, str(result.exception)), result.exception
    assert "\n" not in str(result.exception)


def test_another_model_than_the_plans_is_refused(usual: dict[str, str], model: Path, tmp_path: Path) -> None:
    other = write_plan(tmp_path / "plan.toml", model, model__sha256="0" * 64)
    assert re.search("but the plan asks for 000000000000", str(run(usual | {"": str(other)}).exception))


def test_a_report_that_cannot_be_written_stops_it_before_the_first_round(
    usual: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulation, "played", lambda *_: pytest.fail("the rounds were played"))
    result = run(usual | {"--report": usual["--data"]})
    assert isinstance(result.exception, FileExistsError), result.exception  # `terminal.run` makes a sentence of it


# --- Which rows do what ---


def many(count: int) -> list[Row]:
    return [Row(f"text {n}", LABELS[n % 3], "") for n in range(count)]


def test_rows_that_choose_do_not_count_and_no_row_has_two_uses(model: Path) -> None:
    given = many(200)
    study = set_up(tiny_plan(model), given, None, "iid", 4, 0, ("alone",))
    parts = [*study.shares.values(), study.validation, study.test]
    assert [len(part) for part in parts] == [40, 40, 40, 40, 20, 20]
    assert len({row.text for part in parts for row in part}) == 200


def test_another_seed_deals_other_rows(model: Path) -> None:
    once, again, other = (set_up(tiny_plan(model), many(100), None, "iid", 3, seed, ()) for seed in (0, 0, 1))
    assert once == again
    assert once.test != other.test
    assert once.shares != other.shares


def test_with_nothing_to_compare_every_row_held_out_counts(model: Path) -> None:
    study = set_up(tiny_plan(model), many(100), None, "iid", 3, 0, ())
    assert (len(study.validation), len(study.test)) == (0, 20)


def test_rows_held_out_by_hand_are_split_at_random(model: Path) -> None:
    """In their own order, every other row of a file sorted by label in turn would have a label of its own."""
    held_out = [Row(f"held out {n}", LABELS[n % 2], "") for n in range(60)]
    study = set_up(tiny_plan(model), many(90), held_out, "iid", 3, 0, ("central",))
    assert {row.text for row in (*study.validation, *study.test)} == {row.text for row in held_out}
    for part in (study.validation, study.test):
        assert {row.label for row in part} == set(LABELS[:2])


def test_too_few_rows_to_judge_by(model: Path) -> None:
    with pytest.raises(LocalError, match="There are 1 rows to judge by, too few"):
        set_up(tiny_plan(model), many(9), None, "iid", 3, 0, ())


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["Lakeside", "St. Mary"], ["lakeside", "st-mary"]),
        (["a b", "a-b"], ["site-001", "site-002"]),
        (["北", "south"], ["site-001", "site-002"]),
        ([""], ["site-001"]),
    ],
)
def test_names_of_sites(values: list[str], names: list[str]) -> None:
    assert site_names(values, len(values)) == names
