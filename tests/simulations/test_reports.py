"""Reports: the agreed keys of report.json, a screen that needs no colour, and a page that needs nothing but itself."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from foedus_simulations.charts import Level, Mark, Series, bars, columns, dots, lines, ticks
from foedus_simulations.report_page import page, write_page
from foedus_simulations.report_screen import bar, plot, show
from foedus_simulations.reports import (
    Example,
    Noun,
    Report,
    Round,
    Site,
    duration,
    listed,
    size,
    write_json,
    write_rounds,
)

REPORT = Report(
    kind="demonstration",
    title="Two hospitals",
    data="Coding terms, not patients' notes.",
    model="all-MiniLM-L6-v2",
    labels=20,
    noun=Noun("hospital", "hospitals"),
    rows_held_out=2000,
    commonest=0.06,
    sites=(Site("north", 1000, 7.9, 7.9, accuracy_alone=0.40), Site("south", 2000, 7.8, 7.8, accuracy_alone=0.50)),
    rounds=(
        Round(1, "head", 0.30, 2.0, 1000, 4000, 2.0),
        Round(2, "head", 0.55, 4.0, 1000, 4000, 4.0),
        Round(3, "adapter", 0.66, 7.9, 4000, 9000, 7.9),
    ),
    epsilon_budget=8.0,
    delta=1e-5,
    seconds_total=125.0,
    seconds_by_stage={"training": 100.0, "evaluation": 25.0},
    parameters=26132,
    secure_aggregation=True,
    accuracy_central=0.70,
    compared="Alone: its own rows only.",
    examples=(Example("a <b>bold</b> claim", "eye", "ear", 0.4), Example("snoring", "ear", "ear", 0.9)),
    adapter=Path("demo/adapter"),
    notes=("The root key stays here.",),
)

WITHOUT_PRIVACY = dataclasses.replace(
    REPORT,
    sites=tuple(
        dataclasses.replace(site, epsilon=None, epsilon_central=None, releases_without_privacy=3)
        for site in REPORT.sites
    ),
    rounds=tuple(dataclasses.replace(played, epsilon=None, epsilon_central=None) for played in REPORT.rounds),
    epsilon_budget=None,
    delta=None,
)

ONLY_TOGETHER = dataclasses.replace(
    REPORT,
    kind="simulation",
    sites=tuple(dataclasses.replace(site, accuracy_alone=None) for site in REPORT.sites),
    accuracy_central=None,
    compared="",
    examples=(),
    adapter=None,
)

MANY = dataclasses.replace(
    REPORT,
    sites=tuple(Site(f"site-{n:03}", 10, 7.0 + n / 100, 7.0 + n / 100, accuracy_alone=n / 100) for n in range(100)),
)

BY_SITE = dataclasses.replace(
    REPORT,
    sites=tuple(dataclasses.replace(site, epsilon=11.5) for site in REPORT.sites),
    rounds=tuple(dataclasses.replace(played, epsilon=1.5 * (played.epsilon or 0.0)) for played in REPORT.rounds),
    unit="site",
)

NOISES_ADD_UP = dataclasses.replace(
    REPORT,
    sites=tuple(dataclasses.replace(site, epsilon_central=5.3) for site in REPORT.sites),
    rounds=tuple(
        dataclasses.replace(played, epsilon_central=0.7 * (played.epsilon or 0.0)) for played in REPORT.rounds
    ),
    about_epsilons="epsilon_central is smaller because there is more noise.",
)

ALL = pytest.mark.parametrize(
    "report",
    [REPORT, WITHOUT_PRIVACY, ONLY_TOGETHER, MANY, BY_SITE, NOISES_ADD_UP],
    ids=["usual", "without privacy", "only together", "many", "by site", "noises add up"],
)


# --- Files ---


def test_report_json_has_the_agreed_keys_and_no_other(tmp_path: Path) -> None:
    write_json(REPORT, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "accuracy_together": 0.66,
        "accuracy_alone": [0.4, 0.5],
        "accuracy_central": 0.7,
        "accuracy_of_commonest_label": 0.06,
        "accuracy_by_round": [0.3, 0.55, 0.66],
        "rows": {"north": 1000, "south": 2000},
        "rows_held_out": 2000,
        "privacy": "record",
        "epsilon_local": [7.9, 7.8],
        "epsilon_central": [7.9, 7.8],
        "epsilon_budget": 8.0,
        "about_epsilons": "",
        "delta": 1e-5,
        "releases_without_privacy": [0, 0],
        "rounds": 3,
        "seconds_total": 125.0,
        "seconds_by_stage": {"training": 100.0, "evaluation": 25.0},
        "bytes_up_per_site_per_round": 2000,
        "parameters": 26132,
        "secure_aggregation": True,
        "adapter": "demo/adapter",
    }


def test_without_privacy_there_is_no_number_that_could_be_taken_for_an_epsilon(tmp_path: Path) -> None:
    write_json(WITHOUT_PRIVACY, tmp_path / "report.json")
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["privacy"] == "none"
    assert figures["epsilon_local"] == [None, None]
    assert figures["epsilon_budget"] is None
    assert figures["delta"] is None
    assert figures["releases_without_privacy"] == [3, 3]


def test_rounds_csv_has_a_line_a_round(tmp_path: Path) -> None:
    write_rounds(REPORT, tmp_path / "rounds.csv")
    with (tmp_path / "rounds.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["phase"] for line in table] == ["head", "head", "adapter"]
    assert [float(line["accuracy"]) for line in table] == [0.30, 0.55, 0.66]
    assert table[2] == {
        "round": "3",
        "phase": "adapter",
        "accuracy": "0.66",
        "epsilon_local": "7.9",
        "epsilon_central": "7.9",
        "bytes_up": "4000",
        "bytes_down": "9000",
    }
    write_rounds(WITHOUT_PRIVACY, tmp_path / "rounds.csv")
    with (tmp_path / "rounds.csv").open(newline="") as file:
        assert {line["epsilon_local"] + line["epsilon_central"] for line in csv.DictReader(file)} == {""}


def test_where_the_site_is_the_unit_both_figures_say_so(tmp_path: Path) -> None:
    write_json(BY_SITE, tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (found["privacy"], found["epsilon_local"], found["epsilon_central"]) == ("site", [11.5] * 2, [7.9, 7.8])
    screen = _screen(BY_SITE)
    assert "north 11.50" in screen
    assert "north 7.90" in screen
    assert "per site" in screen
    assert "per site" in page(BY_SITE)


def test_a_smaller_epsilon_is_shown_with_its_reason_and_without_the_budget() -> None:
    """The budget of a record is local; that of a site cannot be."""
    screen, html = _words(_screen(NOISES_ADD_UP)), page(NOISES_ADD_UP)
    assert "even if everybody else colludes; budget 8)" in screen
    assert "north 5.30, south 5.30 (while secure sums hold)" in screen
    assert "epsilon_central is smaller because there is more noise." in screen
    assert "epsilon_central is smaller because there is more noise." in html
    assert "<dd>ε 7.90</dd>" in html
    assert "local, per record, at most; 5.30 central; budget 8" in html
    assert curves(NOISES_ADD_UP) == ["budget", "central", "local"]
    assert curves(REPORT) == ["budget", "local"]
    assert curves(BY_SITE) == ["budget", "central"]
    assert "while secure sums hold; budget 8)" in _words(_screen(BY_SITE))


def curves(report: Report) -> list[str]:
    """What is drawn of epsilon."""
    drawn = re.search(r"<svg[^>]*Epsilon spent.*?</svg>", page(report), re.DOTALL)
    assert drawn
    return sorted(re.findall(r'class="name [a-z]+"[^>]*>([^<]+)<', drawn[0]))


# --- The screen ---


def _screen(report: Report, terminal: bool = False) -> str:
    file = io.StringIO()
    show(report, Console(file=file, width=80, force_terminal=terminal, color_system="truecolor" if terminal else None))
    return file.getvalue()


def _words(text: str) -> str:
    """With every run of blanks and line breaks as one blank."""
    return " ".join(text.split())


def test_the_screen_says_everything_and_without_colour_where_there_is_no_terminal() -> None:
    screen = _screen(REPORT)
    assert "\x1b" not in screen
    for words in (
        "66.0 % ± 1.1",
        "north alone 1,000 rows 40.0 % ± 1.1",
        "central all 3,000 rows 70.0 % ± 1.0",
        "commonest label, always 6.0 %",
        "Alone: its own rows only.",
        "21.0 points above the mean of alone",
        "north 7.90, south 7.80",
        "6 kB up, 17 kB down",
        "2 min 05 s in all",
        "demo/adapter",
        "ear (40%) ✗",
        "The root key stays here.",
    ):
        assert words in _words(screen), words


@ALL
def test_the_screen_is_never_wider_than_a_terminal(report: Report) -> None:
    assert max(map(len, _screen(report).splitlines())) <= 80


@ALL
def test_colour_adds_nothing_to_the_words(report: Report) -> None:
    coloured = _screen(report, terminal=True)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == _screen(report)


def test_without_privacy_the_screen_says_so_and_gives_no_epsilon() -> None:
    screen = _words(_screen(WITHOUT_PRIVACY))
    assert "WITHOUT differential privacy" in screen
    assert "epsilon none: each hospital's ledger counts 3 releases without privacy" in screen
    assert "all without differential privacy" in screen
    assert "budget" not in screen
    assert "WITHOUT" not in _screen(REPORT)


def test_what_was_not_compared_is_not_shown() -> None:
    screen = _screen(ONLY_TOGETHER)
    assert "Together against alone" not in screen
    assert "mean of alone" not in screen
    assert "held-out rows and what" not in screen
    assert "Alone" not in page(ONLY_TOGETHER)
    assert "simulated on one machine" in page(ONLY_TOGETHER)


def test_of_many_sites_only_the_extremes_and_the_mean_are_shown() -> None:
    screen = _words(_screen(MANY))
    for words in ("best alone of 100 hospitals 99.0 %", "mean alone of 100 hospitals 49.5 %", "worst alone"):
        assert words in screen
    assert "7.00 to 7.99 at 100 hospitals" in screen
    assert "site-050" not in page(MANY)


def test_a_loss_is_said_as_loudly_as_a_gain() -> None:
    lost = dataclasses.replace(REPORT.rounds[-1], accuracy=0.30)
    worse = dataclasses.replace(REPORT, rounds=(*REPORT.rounds[:-1], lost), secure_aggregation=False)
    assert "15.0 points BELOW the mean of alone" in _screen(worse)
    assert "secure sums OFF" in _words(_screen(worse))
    assert "Together is 15.0 points below the mean of alone" in page(worse)
    assert "the coordinator saw each hospital&#x27;s update" in page(worse)


def test_the_plot_is_as_high_as_the_accuracy() -> None:
    rows = [line.plain for line in plot(REPORT)]
    assert len(rows) == 7 + 2
    column = [line[9 + 59] for line in rows[:7]]  # of the last round: 0.66 is six lines of ten points, and 5 eighths
    assert column == ["▅", "█", "█", "█", "█", "█", "█"]


@given(rounds=st.integers(1, 400))
def test_the_plot_fits_however_many_rounds_there_are_and_ends_with_the_last(rounds: int) -> None:
    played = [Round(number, "head", 0.4, 1.0, 1, 1, 1.0) for number in range(1, rounds)]
    last = Round(rounds, "head", 0.9, 1.0, 1, 1, 1.0)
    drawn = [line.plain for line in plot(dataclasses.replace(REPORT, rounds=(*played, last)))]
    assert max(map(len, drawn)) <= 80
    assert drawn[0].endswith("█")
    assert rounds == 1 or drawn[0].count("█") < len(drawn[-2]) - 8


# --- The page ---


@ALL
def test_the_page_needs_nothing_but_itself(report: Report, tmp_path: Path) -> None:
    write_page(report, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(|src=|\bon[a-z]+=", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "<b>bold</b>" not in html


def test_what_rows_say_is_escaped() -> None:
    assert "a &lt;b&gt;bold&lt;/b&gt; claim" in page(REPORT)


def test_the_page_draws_central_and_each_site_alone_beside_the_curve() -> None:
    curve = re.findall(r"<svg.*?</svg>", page(REPORT), re.DOTALL)[0]
    names = re.findall(r'class="name [a-z]+"[^>]*>([^<]+)<', curve)
    assert sorted(names) == ["central", "commonest label", "north alone", "south alone", "together"]


def test_without_privacy_the_page_says_so_and_draws_no_epsilon() -> None:
    html = page(WITHOUT_PRIVACY)
    assert "<dd>ε none</dd>" in html
    assert "There was no differential privacy" in html
    assert "Epsilon spent by round" not in html
    assert "holds 3 releases without privacy" in _words(html)


@ALL
def test_every_chart_is_well_formed_and_keeps_within_its_box(report: Report) -> None:
    charts = re.findall(r"<svg.*?</svg>", page(report), re.DOTALL)
    assert len(charts) == 5 - (not report.private) - (not report.alone)
    for chart in charts:
        root = ElementTree.fromstring(chart)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for name, limit in {"x": width, "x1": width, "x2": width, "y": height, "y1": height, "y2": height}.items():
                assert 0 <= float(element.attrib.get(name, 0)) <= limit, (element.tag, element.attrib)


# --- Charts ---


@given(high=st.floats(1e-3, 1e9))
def test_ticks_begin_at_zero_reach_the_value_and_are_few_and_even(high: float) -> None:
    marks = ticks(high)
    assert marks[0] == 0
    assert marks[-1] >= high * (1 - 1e-6)
    assert marks[-2] < high
    assert 3 <= len(marks) <= 6
    assert marks == pytest.approx([marks[1] * count for count in range(len(marks))])


@given(values=st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_names_at_the_edge_never_overlap(values: list[float]) -> None:
    levels = [Level(f"level {number}", value, "alone") for number, value in enumerate(values)]
    one = [Series("line", [0.5], "together")]
    chart = lines("", one, levels, [("head", 1, 1)], width=700, height=300, room=100, unit="", form=str)
    heights = sorted(float(y) for y in re.findall(r'class="name [a-z]+" x="[\d.]+" y="([-\d.]+)"', chart))
    assert len(heights) == len(values) + 1
    assert all(below - above >= 15.9 for above, below in itertools.pairwise(heights))


def test_marks_stand_where_their_values_say() -> None:
    chart = dots(
        "",
        [Mark("a", "", 0.2, "", "x", 0.1), Mark("b", "", 0.4, "", "x")],
        width=510,
        label_room=100,
        unit="",
        form=str,
    )
    places = [float(x) for x in re.findall(r'circle class="dot x" cx="([\d.]+)"', chart)]
    assert places == [100 + 300 * 0.2 / 0.4, 100 + 300]
    long = re.findall(
        r'<rect class="column x"[^>]*width="([\d.]+)"',
        bars("", [Mark("a", "", 1, "", "x"), Mark("b", "", 4, "", "x")], width=430, label_room=100),
    )
    assert [float(width) for width in long] == [50, 200]
    tall = re.findall(
        r'<rect class="column x" x="[\d.]+" y="[\d.]+" width="[\d.]+" height="([\d.]+)"',
        columns("", [Series("a", [5, 20], "x")], [("head", 1, 2)], width=400, height=300, unit="", form=str),
    )
    assert [float(height) for height in tall[-2:]] == [50, 200]


def test_figures_for_people() -> None:
    assert [size(count) for count in (7, 999, 20640, 999_600, 1_234_567)] == [
        "7 B",
        "999 B",
        "20.6 kB",
        "1 MB",
        "1.23 MB",
    ]
    assert [duration(s) for s in (0.42, 41, 59.6, 125)] == ["0.42 s", "41 s", "1 min 00 s", "2 min 05 s"]
    assert [listed(names) for names in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [bar(share, 4) for share in (0, 0.5, 1, 2)] == ["", "██", "████", "████"]
