"""A site's rows: read the same from every format, every mistake found at once, and no value ever quoted.

A failure means that a bad file would surface during a run, or that data would stand in a log.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foedus_client.data import foreign_labels, read_rows, share_rows, survey
from foedus_common.errors import LocalError

SECRET = "Xq7-patient-Doe"
"""Stands in every bad file; may stand in no sentence."""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_rows_come_in_the_file_s_order_with_other_columns_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", 'id,note,chapter\n1,"a, ""b""\nc",Eye\n2,ünïcode, Ear \n')
    assert read_rows(path, "note", "chapter") == [('a, "b"\nc', "Eye"), ("ünïcode", "Ear")]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_no_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", "\ufeffnote,chapter\r\na,Eye\r\n\r\nb,Ear\r\n")
    assert read_rows(path, "note", "chapter") == [("a", "Eye"), ("b", "Ear")]


def test_whole_numbers_may_be_labels(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", '{"note": "a", "chapter": 3}\n\n{"note": "b", "chapter": "3"}\n')
    assert read_rows(path, "note", "chapter") == [("a", "3"), ("b", "3")]


def test_long_texts_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, "d.csv", f"note,chapter\n{'x' * 500_000},Eye\n")
    assert len(read_rows(path, "note", "chapter")[0][0]) == 500_000


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
rows = st.lists(st.tuples(words, words), min_size=1, max_size=8).filter(
    lambda table: all(cell.strip() and cell.strip().lower() != "nan" for row in table for cell in row)
)


@given(table=rows)
@settings(max_examples=60, deadline=None)
def test_every_format_gives_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("formats")
    found = []
    for name, delimiter in (("d.csv", ","), ("d.tsv", "\t")):
        buffer = io.StringIO()
        csv.writer(buffer, delimiter=delimiter).writerows([("note", "chapter"), *table])
        found.append(survey(write(folder, name, buffer.getvalue()), "note", "chapter"))
        assert read_rows(folder / name, "note", "chapter") == [(text, label.strip()) for text, label in table]
    lines = (json.dumps({"chapter": label, "note": text}) for text, label in reversed(table))
    found.append(survey(write(folder, "d.jsonl", "\n".join(lines)), "note", "chapter"))
    assert len({one.rows_sha256 for one in found}) == 1
    assert len({one.row_keys for one in found}) == 1
    assert len({one.file_sha256 for one in found}) == 3


BAD: list[tuple[str, str, str | bytes, str]] = [
    ("missing column", "d.csv", f"notes,chapter\n{SECRET},Eye\n", "no column 'note'; did you mean 'notes'?"),
    ("no header", "d.csv", f"{SECRET},Eye\n{SECRET},Eye\n", "no column 'note'; its first line names 2 other columns"),
    ("column twice", "d.csv", f"note,note,chapter\n{SECRET},b,Eye\n", "more than one column 'note'"),
    ("nothing", "d.csv", "", "d.csv is empty"),
    ("header alone", "d.csv", "note,chapter\n", "d.csv has no rows"),
    ("empty text", "d.csv", f"note,chapter\n{SECRET},Eye\n  ,Eye\n", "Row 2 of d.csv is empty in column 'note'"),
    ("empty label", "d.csv", f"note,chapter\n{SECRET},\n", "Row 1 of d.csv is empty in column 'chapter'"),
    ("short row", "d.csv", f"note,chapter\n{SECRET}\n", "Row 1 of d.csv has no value in column 'chapter'"),
    ("long row", "d.csv", f"note,chapter\n{SECRET},more,Eye\n", "Row 1 of d.csv has more fields"),
    ("NaN", "d.csv", f"note,chapter\n{SECRET},NaN\n", "Row 1 of d.csv has NaN in column 'chapter'"),
    ("open quote", "d.csv", f'note,chapter\n"{SECRET},Eye\n', "Line 2 of d.csv is not valid CSV"),
    ("Latin-1", "d.csv", f"note,chapter\n{SECRET}\xe9,Eye\n".encode("latin-1"), "Line 2 of d.csv is not UTF-8"),
    ("malformed JSON", "d.jsonl", f'{{"note": "a", "chapter": "b"}}\n{{"note": "{SECRET}"\n', "Line 2 of d.jsonl"),
    ("JSON list", "d.jsonl", f'["{SECRET}"]\n', "Line 1 of d.jsonl is not a JSON object"),
    ("JSON NaN", "d.jsonl", '{"note": "a", "chapter": NaN}\n', "Row 1 of d.jsonl has NaN in column 'chapter'"),
    ("JSON null", "d.jsonl", '{"note": null, "chapter": "b"}\n', "Row 1 of d.jsonl has no value in column 'note'"),
    ("half a character", "d.jsonl", '{"note": "a\\ud800b", "chapter": "b"}\n', "half a character (a lone surrogate)"),
    ("number as text", "d.jsonl", '{"note": 5, "chapter": "b"}\n', "Row 1 of d.jsonl has something other than text"),
    ("fraction as label", "d.jsonl", '{"note": "a", "chapter": 0.5}\n', "neither text nor a whole number"),
    ("truth as label", "d.jsonl", '{"note": "a", "chapter": true}\n', "neither text nor a whole number"),
    ("missing key", "d.jsonl", '{"notes": "a", "chapter": "b"}\n', "no column 'note'; did you mean 'notes'?"),
    ("only blank lines", "d.jsonl", "\n\n", "d.jsonl has no rows"),
    ("unknown format", "d.xlsx", SECRET, "must end in .csv, .tsv, .jsonl, .parquet or .sqlite"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_file_gets_one_sentence_that_quotes_nothing(
    tmp_path: Path, name: str, content: str | bytes, sentence: str
) -> None:
    with pytest.raises(LocalError) as caught:
        read_rows(write(tmp_path, name, content), "note", "chapter")
    assert sentence in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="No such file"):
        read_rows(tmp_path / "missing.csv", "note", "chapter")
    with pytest.raises(LocalError, match="Is a directory"):
        read_rows(tmp_path, "note", "chapter")
    with pytest.raises(LocalError, match="name two columns"):
        read_rows(write(tmp_path, "d.csv", "note\na\n"), "note", "note")


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"needs pyarrow; pip install 'foedus\[parquet\]', or export"):
        read_rows(write(tmp_path, "d.parquet", b"PAR1"), "note", "chapter")


def test_parquet_is_read_as_csv_is(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(arrow.table({"note": ["a", "b"], "id": [1, 2], "chapter": ["Eye", "Ear"]}), path)
    same = write(tmp_path, "d.csv", "note,chapter\nb,Ear\na,Eye\n")
    assert survey(path, "note", "chapter").rows_sha256 == survey(same, "note", "chapter").rows_sha256
    with pytest.raises(LocalError, match="did you mean 'note'"):
        read_rows(path, "notes", "chapter")
    parquet.write_table(arrow.table({"note": ["a", None], "chapter": ["Eye", "Ear"]}), path)
    with pytest.raises(LocalError, match="has no value in column 'note'"):
        read_rows(path, "note", "chapter")
    with pytest.raises(LocalError, match="not a valid Parquet file"):
        read_rows(write(tmp_path, "e.parquet", b"PAR1 nothing"), "note", "chapter")


def test_a_survey_counts_labels_and_tells_one_row_more(tmp_path: Path) -> None:
    once = survey(write(tmp_path, "a.csv", "note,chapter\na,Eye\nb,Ear\n"), "note", "chapter")
    twice = survey(write(tmp_path, "b.csv", "note,chapter\na,Eye\nb,Ear\na,Eye\n"), "note", "chapter")
    assert (once.rows, dict(once.label_counts)) == (2, {"Ear": 1, "Eye": 1})
    assert (twice.rows, dict(twice.label_counts)) == (3, {"Ear": 1, "Eye": 2})
    assert once.rows_sha256 != twice.rows_sha256
    assert once.row_keys == twice.row_keys


def test_one_text_in_common_is_found_whatever_its_case_spacing_and_label(tmp_path: Path) -> None:
    one, same, other = (
        survey(write(tmp_path, "a.csv", f"note,chapter\n{text},{label}\n"), "note", "chapter").row_keys
        for text, label in (("Acute  pain", "Eye"), (" acute pain", "Ear"), ("acute pains", "Eye"))
    )
    assert share_rows(one, same)
    assert not share_rows(one, other)
    assert not share_rows(one, b"")


def test_labels_that_the_plan_lacks_are_counted() -> None:
    assert foreign_labels({"Eye": 3, "Ear": 2, "Skin": 1}, ("Eye", "Nose")) == {"Ear": 2, "Skin": 1}
    assert foreign_labels({"Eye": 3}, ("Eye", "Nose")) == {}


def database(path: Path, *statements: str) -> Path:
    with closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
        db.commit()
    return path


NOTES = (
    "CREATE TABLE notes (id INTEGER, note TEXT, chapter TEXT)",
    "INSERT INTO notes VALUES (1, 'a', 'Eye'), (2, 'b', 'Ear')",
)


def test_sqlite_is_read_as_csv_is(tmp_path: Path) -> None:
    path = database(tmp_path / "d.sqlite", *NOTES, "CREATE TABLE people (name TEXT)")
    same = write(tmp_path, "d.csv", "note,chapter\nb,Ear\na,Eye\n")
    assert survey(path, "note", "chapter").rows_sha256 == survey(same, "note", "chapter").rows_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.csv", "d.sqlite"]  # reading leaves nothing beside it


def test_a_table_or_view_is_named_where_several_would_do(tmp_path: Path) -> None:
    view = "CREATE VIEW eyes AS SELECT note, chapter FROM notes WHERE chapter = 'Eye'"
    path = database(tmp_path / "d.db", *NOTES, view)
    with pytest.raises(LocalError, match=r"2 tables of d\.db have these columns; write them as TABLE\.COLUMN"):
        read_rows(path, "note", "chapter")
    assert read_rows(path, "eyes.note", "eyes.chapter") == [("a", "Eye")]
    for columns in (("note", "chapters"), ("notes.note", "eyes.chapter"), ('"; DROP TABLE notes', "chapter")):
        with pytest.raises(LocalError, match="no table with all of these columns"):
            read_rows(path, *columns)


NAME_OF_BYTES = "UPDATE sqlite_master SET name = CAST(name AS BLOB)"


def test_a_bad_database_gets_one_sentence_that_quotes_nothing(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="not a valid SQLite database"):
        read_rows(write(tmp_path, "d.sqlite", SECRET * 100), "note", "chapter")
    gap = database(tmp_path / "gap.db", NOTES[0], f"INSERT INTO notes VALUES (1, '{SECRET}', NULL)")
    with pytest.raises(LocalError, match=r"Row 1 of gap\.db has no value in column 'chapter'"):
        read_rows(gap, "note", "chapter")
    latin = database(tmp_path / "latin.db", NOTES[0], "INSERT INTO notes VALUES (1, CAST(x'61e9' AS TEXT), 'Eye')")
    with pytest.raises(LocalError, match="not all of its text is UTF-8"):
        read_rows(latin, "note", "chapter")
    with pytest.raises(LocalError, match="not a valid SQLite database"):
        read_rows(
            Path(__file__).with_name("damaged.sqlite"), "text", "label"
        )  # of a length that SQLite cannot allocate
    odd = database(tmp_path / "odd.db", *NOTES, "PRAGMA writable_schema = ON", NAME_OF_BYTES)
    with pytest.raises(LocalError, match=r"odd\.db has no table with all of these columns"):
        read_rows(odd, "note", "chapter")


def test_a_database_that_is_being_written_is_refused(tmp_path: Path) -> None:
    path = database(tmp_path / "d.sqlite", "PRAGMA journal_mode=WAL", *NOTES)
    assert len(read_rows(path, "note", "chapter")) == 2
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("INSERT INTO notes VALUES (3, 'c', 'Eye')")
        writer.commit()
        with pytest.raises(LocalError, match="changes that lie beside it still"):
            read_rows(path, "note", "chapter")
