"""The demonstrations: every edition has rows, words and a plan that fit, and nothing but a demonstration is emptied."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from foedus_client.config import SiteHome, SiteSettings
from foedus_client.policy import SitePolicy
from foedus_common.errors import LocalError
from foedus_common.plan import RunPlan
from foedus_common.tables import parse, read_toml
from foedus_simulations import demo
from foedus_simulations.corpora import Corpus, Row
from foedus_simulations.editions import Edition, edition
from foedus_simulations.stopwatch import Stopwatch

EDITIONS = {
    "plain": edition("icd", private=True, small=False),
    "small": edition("icd", private=True, small=True),
    "without privacy": edition("icd", private=False, small=False),
    "credit": edition("credit", private=True, small=False),
}
each_edition = pytest.mark.parametrize("playing", EDITIONS.values(), ids=EDITIONS.keys())
LABELS = ("good", "bad")


def filled_in(playing: Edition, folder: Path, labels: tuple[str, ...] = LABELS) -> RunPlan:
    """The edition's plan as `fill_in_plan` leaves it, for a model that is not there."""

    class Operator:
        def ask(self, *arguments: str) -> dict[str, str]:
            return {"manifest_sha256": "a" * 64}

    corpus = Corpus(labels, (), (), ())
    demo.fill_in_plan(Operator(), playing.plan, folder, corpus, folder / "plan.toml")  # type: ignore[arg-type]
    return parse(RunPlan, read_toml(folder / "plan.toml"), "the plan")


@each_edition
def test_the_plan_is_whole_and_names_what_the_sites_have(playing: Edition, tmp_path: Path) -> None:
    plan = filled_in(playing, tmp_path)
    assert plan.data.name == playing.dataset
    assert plan.task.labels == LABELS
    assert plan.privacy.on is playing.private
    assert plan.secure_aggregation.min_sites <= len(playing.sites) == len(set(playing.sites))
    if plan.privacy.on:
        assert plan.privacy.epsilon == 8.0
        assert plan.privacy.delta == 1e-5


@each_edition
def test_every_site_gets_rows_and_every_row_a_site(playing: Edition) -> None:
    rows = tuple(Row(f"text {n}", LABELS[n % 2], str(n)) for n in range(90))
    shares = demo.share_out(playing, Corpus(LABELS, rows, (), ()))
    assert tuple(shares) == playing.sites
    assert Counter(row for part in shares.values() for row in part) == Counter(rows)


@pytest.mark.parametrize(("data", "private", "small"), [("credit", False, False), ("icd", False, True)])
def test_a_demonstration_that_there_is_not_is_refused(data: str, private: bool, small: bool) -> None:
    with pytest.raises(LocalError, match="There is no such demonstration"):
        edition(data, private, small)


def test_only_a_demonstration_is_emptied(tmp_path: Path) -> None:
    thesis = tmp_path / "documents" / "thesis.txt"
    thesis.parent.mkdir()
    demo.clear(thesis.parent)
    demo.clear(tmp_path / "absent")
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    with pytest.raises(LocalError, match="holds something else than a demonstration"):
        demo.clear(thesis.parent)
    assert thesis.read_text() == "years of work"
    earlier = tmp_path / "demo" / demo.HELD_OUT
    earlier.parent.mkdir(parents=True)
    earlier.touch()
    demo.clear(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_what_cannot_be_played_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path)])
    assert demo.main() == 2
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("demo: ")
    assert said.endswith("is not emptied; give another one.")


@pytest.mark.parametrize("name", ["credit", "without privacy"])
def test_the_report_says_what_the_programs_said(name: str, tmp_path: Path) -> None:
    """The programs' JSON, cut to what is read of it."""
    playing = EDITIONS[name]
    plan = filled_in(playing, tmp_path)
    step = {"noise_multiplier": 2.8, "sampling_rate": 1.0, "steps": 1}
    release = {"local": step, "central": step | {"noise_multiplier": 4.0}} if plan.privacy.on else None
    seconds = {"training": 1.0, "keys": 0.1}
    cohort = list(playing.sites)
    attempts = [
        {"state": "committed", "seconds": seconds, "cohort": cohort, "bytes_up": 30, "bytes_down": 60}
    ] * plan.rounds
    phases = [{"release": release, "parameters": 7_700 + 1_000 * number} for number in range(len(plan.phase))]
    example = {"text": "snoring", "label": "good", "predicted": "bad", "probability": 0.6}
    finished = demo.Finished(
        shown={"plan": {"phases": phases, "about_epsilons": "Why."}, "attempts": attempts},
        scores=[{"accuracy": n / plan.rounds, "examples": [example]} for n in range(plan.rounds)],
        ledgers={site: {"spent": 7.3, "releases_without_privacy": plan.rounds} for site in playing.sites},
    )
    held_out = tuple(Row("x", label, "") for label in ("good", "good", "bad", "good"))
    watch = Stopwatch()
    watch.seconds = {"set-up": 1.0, "run": 100.0, "evaluation": 2.0, "alone and central": 3.0}
    report = demo.as_report(
        tmp_path,
        playing,
        Corpus(LABELS, (), (), held_out),
        {site: [Row("x", "good", "")] * 5 for site in playing.sites},
        finished,
        demo.Compared(dict.fromkeys(playing.sites, 0.4), 0.8, "Alone: by itself."),
        watch,
    )
    assert report.accuracy_together == (plan.rounds - 1) / plan.rounds
    assert report.mean_alone == pytest.approx(0.4)
    assert report.accuracy_central == 0.8
    assert report.commonest == 0.75
    assert report.parameters == phases[-1]["parameters"]
    assert report.seconds_by_stage["secure aggregation"] == pytest.approx(0.1 * plan.rounds)
    assert [site.rows for site in report.sites] == [5, 5, 5]
    assert report.private is playing.private
    assert {site.epsilon for site in report.sites} == ({7.3} if playing.private else {None})
    assert {site.epsilon_central for site in report.sites} == {report.rounds[-1].epsilon_central}
    assert not playing.private or 0 < (report.sites[0].epsilon_central or 0) < 7.3
    assert report.about_epsilons == "Why."
    assert any("allow_without_privacy" in note for note in report.notes) is not playing.private
    assert any("root key" in note for note in report.notes)


def test_a_site_is_let_into_runs_without_privacy_by_its_own_settings_only_then(tmp_path: Path) -> None:

    class Site:
        home = tmp_path / "home"

        def finish(self, name: str) -> None:
            pass

        def ask(self, *arguments: str) -> None:
            pass

        def start(self, name: str, *arguments: str) -> None:
            pass

    SiteHome.create(Site.home)
    for playing in EDITIONS.values():
        demo.open_for_work(Site(), playing, tmp_path, tmp_path / "rows.csv")  # type: ignore[arg-type]
        assert SiteHome.open(Site.home).settings == SiteSettings(
            threads=1, policy=SitePolicy(allow_without_privacy=not playing.private)
        )


def test_what_lies_in_the_current_folder_is_named_as_a_person_would_type_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert demo.from_here(tmp_path / "demo" / "adapter") == Path("demo/adapter")
    assert demo.from_here(Path("/elsewhere/adapter")) == Path("/elsewhere/adapter")
