"""Corpora: only pinned bytes are opened, only named files come out, and no group of rows is in two parts.

The network is no part of this: wheels are small archives made here, and what pip says is read from a fake index folder
that does not exist.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_common.errors import LocalError
from foedus_simulations.corpora import (
    GERMAN,
    ICD10,
    Package,
    Row,
    fetch,
    german_credit,
    icd10,
    split,
    unpack,
    write_csv,
)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing/__init__.py", "raise SystemExit('imported')")
        archive.writestr("thing/data/rows.txt", "one\ntwo\n")
        archive.writestr("thing/..", "out")
    return path


def _package(wheel: Path, *members: str) -> Package:
    return Package("thing", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), 1, members)


def test_only_the_named_members_are_unpacked(wheel: Path, tmp_path: Path) -> None:
    unpack(_package(wheel, "thing/data/rows.txt"), wheel, tmp_path / "files")
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["rows.txt"]
    assert (tmp_path / "files" / "rows.txt").read_text() == "one\ntwo\n"


def test_other_bytes_than_the_pinned_ones_are_not_opened(wheel: Path, tmp_path: Path) -> None:
    package = dataclasses.replace(_package(wheel, "thing/data/rows.txt"), sha256="0" * 64)
    with pytest.raises(LocalError, match="not the pinned 0000000000000000"):
        unpack(package, wheel, tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_a_member_cannot_climb_out_of_the_folder(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="not a plain file name"):
        unpack(_package(wheel, "thing/.."), wheel, tmp_path / "files")


def test_a_package_that_the_index_lacks_is_said_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    said: list[str] = []
    with pytest.raises(LocalError, match=r"^pip could not download thing==1.0: [^\n]*$"):
        fetch(Package("thing", "1.0", "0" * 64, 1, ()), tmp_path / "cache", said.append)
    assert list((tmp_path / "cache").iterdir()) == []
    assert len(said) == 1


def test_a_cached_package_is_neither_fetched_nor_spoken_of(tmp_path: Path) -> None:
    (tmp_path / "thing-1.0").mkdir()
    said: list[str] = []
    assert fetch(Package("thing", "1.0", "0" * 64, 1, ()), tmp_path, said.append) == tmp_path / "thing-1.0"
    assert said == []


@settings(max_examples=50)
@given(
    sizes=st.lists(st.lists(st.integers(1, 9), min_size=8, max_size=20), min_size=2, max_size=4),
    seed=st.integers(0, 2**32),
)
def test_no_group_is_in_two_parts(sizes: list[list[int]], seed: int) -> None:
    labels = tuple("abcd"[: len(sizes)])
    rows = [
        Row(f"{label}{group}.{number}", label, f"{label}{group}")
        for label, groups in zip(labels, sizes, strict=True)
        for group, size in enumerate(groups)
        for number in range(size)
    ]
    corpus = split(rows, labels, (24, 6, 10), np.random.default_rng(seed))
    parts = (corpus.train, corpus.validation, corpus.held_out)
    drawn = [row for part in parts for row in part]
    assert len(set(drawn)) == len(drawn)
    assert set(drawn) <= set(rows)
    assert all(len(part) <= size for part, size in zip(parts, (24, 6, 10), strict=True))
    groups = [{row.group for row in part} for part in parts]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def _chapter(number: int, codes: int) -> str:
    categories = "".join(
        f"<diag><name>{number}C{category}</name><desc>parent</desc>"
        + "".join(
            f"<diag><name>{number}C{category}.{code}</name><desc>text {number} {category} {code}</desc></diag>"
            for code in range(4)
        )
        + "</diag>"
        for category in range(codes // 4)
    )
    return f"<chapter><name>{number}</name><desc>long</desc><section id='x'>{categories}</section></chapter>"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache whose tabular list has three chapters: 400, 200 and 40 leaf codes in categories of four."""
    folder = tmp_path / ICD10.folder
    folder.mkdir()
    chapters = _chapter(1, 400) + _chapter(2, 200) + _chapter(22, 40)
    (folder / Path(ICD10.members[0]).name).write_text(f"<ICD10CM.tabular>{chapters}</ICD10CM.tabular>")
    return tmp_path


def test_icd10_takes_leaf_codes_of_the_largest_chapters_capped_per_class(cache: Path) -> None:
    corpus = icd10(cache, 0, classes=2, train_rows=120, validation_rows=20, held_out_rows=60)
    assert corpus.labels == ("infections", "neoplasms")
    assert [len(part) for part in (corpus.train, corpus.validation, corpus.held_out)] == [120, 20, 60]
    assert Counter(row.label for row in corpus.train) == {"infections": 60, "neoplasms": 60}
    assert all(row.text.startswith("text ") and row.group.count("C") == 1 for row in corpus.train)
    assert not {row.group for row in corpus.train} & {row.group for row in corpus.held_out}


def test_icd10_is_the_same_for_the_same_seed_only(cache: Path) -> None:
    def once(seed: int) -> tuple[Row, ...]:
        return icd10(cache, seed, classes=2, train_rows=120, validation_rows=20, held_out_rows=60).train

    assert once(3) == once(3)
    assert once(3) != once(4)


def test_german_credit_is_text_without_sex_or_origin_and_as_often_bad_as_good(tmp_path: Path) -> None:
    """A stand-in for the file: 1,000 lines that differ in their months; 300 are bad."""
    folder = tmp_path / GERMAN.folder
    folder.mkdir()
    words = {
        "status": {"A11": "... < 0 DM"},
        "savings": {"A62": "100 <= ... < 500 DM"},
        "present_employment": {"A75": ".. >= 7 years"},
        "telephone": {"A192": True},
        "status_sex": {"A93": "male : single"},
    }
    (folder / "values_maps.json").write_text(json.dumps(words))
    lines = [
        f"A11 {months} A34 A43 1169 A62 A75 4 A93 A101 4 A121 67 A143 A152 2 A173 1 A192 A201 {1 + (months % 10 < 3)}"
        for months in range(1000)
    ]
    (folder / "german.data").write_text("\n".join(lines))
    corpus = german_credit(tmp_path, 0)
    parts = (corpus.train, corpus.validation, corpus.held_out)
    assert [Counter(row.label for row in part) for part in parts] == [
        {"good": half, "bad": half} for half in (190, 30, 80)
    ]
    drawn = [row for part in parts for row in part]
    assert len(set(drawn)) == 600
    for row in drawn:
        months = int(row.group)
        assert row.text.startswith(f"status: < 0 DM; duration: {months}; credit history: A34; ")
        assert "savings: 100 to 500 DM; present employment: >= 7 years; " in row.text
        assert row.text.endswith("telephone: yes")
        assert "sex" not in row.text
        assert "foreign" not in row.text
        assert row.label == ("bad" if months % 10 < 3 else "good")


def test_a_category_with_many_codes_does_not_fill_its_class() -> None:
    many = [Row(f"many {number}", "eye", "many") for number in range(400)]
    few = [Row(f"few {number}", "eye", f"few {number // 4}") for number in range(400)]
    for seed in range(5):  # the large one lands in another part each time
        corpus = split(many + few, ("eye",), (60, 20, 40), np.random.default_rng(seed))
        parts = (corpus.train, corpus.validation, corpus.held_out)
        drawn = [sum(row.group == "many" for row in part) for part in parts]
        assert sum(drawn) > 0
        assert all(count <= len(part) // 4 for count, part in zip(drawn, parts, strict=True))


def test_a_written_csv_reads_back(tmp_path: Path) -> None:
    rows = (Row('a "quoted", note', "eye", "H00"), Row("line\nbreak", "ear", "H60"))
    write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["note", "chapter"], [rows[0].text, "eye"], [rows[1].text, "ear"]]
