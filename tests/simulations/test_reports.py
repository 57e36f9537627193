"""Reports: the agreed keys of report.json, a screen that needs no colour, and a page that needs nothing but itself."""

from __future__ import annotations

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
from foedus_simulations.reports import (
    DemoReport,
    Example,
    Hospital,
    Round,
    bar,
    duration,
    listed,
    plot,
    show,
    size,
    write_json,
)

REPORT = DemoReport(
    title="Three hospitals",
    data="Coding terms, not patients' notes.",
    model="all-MiniLM-L6-v2",
    labels=20,
    rows_held_out=2000,
    hospitals=(Hospital("north", 1000, 0.40, 7.9), Hospital("south", 2000, 0.50, 7.8)),
    rounds=(
        Round(1, "head", 0.30, 2.0, 1000, 4000),
        Round(2, "head", 0.55, 4.0, 1000, 4000),
        Round(3, "adapter", 0.65, 7.9, 4000, 9000),
    ),
    accuracy_together=0.66,
    examples=(Example("a <b>bold</b> claim", "eye", "ear", 0.4), Example("snoring", "ear", "ear", 0.9)),
    epsilon_budget=8.0,
    delta=1e-5,
    seconds_total=125.0,
    seconds_by_stage={"training": 100.0, "evaluation": 25.0},
    parameters=26132,
    secure_aggregation=True,
    adapter=Path("demo/adapter"),
    notes=("The root key stays here.",),
)


def test_report_json_has_the_agreed_keys_and_no_other(tmp_path: Path) -> None:
    write_json(REPORT, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "accuracy_together": 0.66,
        "accuracy_alone": [0.4, 0.5],
        "epsilon_local": [7.9, 7.8],
        "delta": 1e-5,
        "rounds": 3,
        "seconds_total": 125.0,
        "seconds_by_stage": {"training": 100.0, "evaluation": 25.0},
        "bytes_up_per_site_per_round": 2000,
        "parameters": 26132,
        "secure_aggregation": True,
        "adapter": "demo/adapter",
    }


def _screen(report: DemoReport, terminal: bool) -> str:
    file = io.StringIO()
    show(report, Console(file=file, width=80, force_terminal=terminal, color_system="truecolor" if terminal else None))
    return file.getvalue()


def test_the_screen_says_everything_and_without_colour_where_there_is_no_terminal() -> None:
    screen = _screen(REPORT, terminal=False)
    assert "\x1b" not in screen
    assert max(map(len, screen.splitlines())) <= 80
    for words in (
        "66.0 % ± 1.1",
        "north alone",
        "40.0 % ± 1.1",
        "21.0 points above the mean of alone",
        "north 7.90, south 7.80",
        "6 kB up, 17 kB down",
        "2 min 05 s in all",
        "demo/adapter",
        "ear (40%) ✗",
        "The root key stays here.",
    ):
        assert words in screen, words


def test_colour_adds_nothing_to_the_words() -> None:
    coloured = _screen(REPORT, terminal=True)
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == _screen(REPORT, terminal=False)


def test_a_loss_is_said_as_loudly_as_a_gain() -> None:
    worse = dataclasses.replace(REPORT, accuracy_together=0.30, secure_aggregation=False)
    assert "15.0 points BELOW the mean of alone" in _screen(worse, terminal=False)
    assert "secure sums     OFF" in re.sub(r"sums +", "sums     ", _screen(worse, terminal=False))
    assert "Together is 15.0 points below the mean of alone" in page(worse)
    assert "the coordinator saw each hospital's update" in page(worse)


def test_the_plot_is_as_high_as_the_accuracy() -> None:
    rows = [line.plain for line in plot(REPORT)]
    assert len(rows) == 7 + 2
    column = [line[9 + 59] for line in rows[:7]]  # of the last round: 0.65 is six and a half lines of ten points
    assert column == ["▄", "█", "█", "█", "█", "█", "█"]


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    write_page(REPORT, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(|src=|\bon[a-z]+=", html)
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "a &lt;b&gt;bold&lt;/b&gt; claim" in html
    assert "<b>bold</b>" not in html


def test_every_chart_is_well_formed_and_keeps_within_its_box() -> None:
    charts = re.findall(r"<svg.*?</svg>", page(REPORT), re.DOTALL)
    assert len(charts) == 5
    for chart in charts:
        root = ElementTree.fromstring(chart)
        _, _, width, height = map(float, root.attrib["viewBox"].split())
        for element in root.iter():
            for name, limit in {"x": width, "x1": width, "x2": width, "y": height, "y1": height, "y2": height}.items():
                assert 0 <= float(element.attrib.get(name, 0)) <= limit, (element.tag, element.attrib)


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
