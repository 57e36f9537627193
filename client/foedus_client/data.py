"""A site's rows: read from CSV, TSV, JSONL, Parquet or SQLite, every row checked, and never quoted.

Errors name the file, the row and the column; a value from the data stands in none of them, for they end in logs. All
that can be wrong with a file is found when it is added, so that nothing about it shows during a run. Knows no plan and
no database.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_common.canonical import digest
from foedus_common.errors import LocalError

KEY_BYTES = 16
MAX_FIELD_CHARACTERS = 1 << 24

_HALVES = re.compile("[\ud800-\udfff]")
"""Surrogates: JSON can hold one of a pair without the other, which is no character and which no tokenizer takes."""

csv.field_size_limit(MAX_FIELD_CHARACTERS)

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Survey:
    """What was found out about a file when it was added.

    file_sha256, rows_sha256: 64 hexadecimal digits; the rows' does not depend on their order or on the file's format.
    row_keys: KEY_BYTES per different text, sorted. label_counts: label -> rows; shown at this machine only.
    """

    file_sha256: str
    rows_sha256: str
    row_keys: bytes
    rows: int
    label_counts: Mapping[str, int]


def read_rows(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """Every (text, label) of the file, in its order; labels without blanks around them.

    text, label: column names (keys in JSONL; TABLE.COLUMN in SQLite where several tables have them). Raises LocalError
    with one sentence for the first row that cannot be trained on, or for a file that cannot be read or has no rows.
    """
    if text == label:
        raise LocalError(f"Text and label are both read from column {text!r} of {path.name}; name two columns.")
    try:
        with path.open("rb") as file:
            file.read(1)
        rows = [_row(path, number, record, text, label) for number, record in _records(path, (text, label))]
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}.") from None
    if not rows:
        raise LocalError(f"{path.name} has no rows.")
    return rows


def survey(path: Path, text: str, label: str) -> Survey:
    """Read and check every row now, and find out what names and counts them. Raises LocalError as `read_rows` does."""
    rows = read_rows(path, text, label)
    with path.open("rb") as file:
        file_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    in_any_order = hashlib.sha256(b"".join(sorted(digest("row", *row) for row in rows)))
    return Survey(
        file_sha256=file_sha256,
        rows_sha256=in_any_order.hexdigest(),
        row_keys=b"".join(sorted({_key(content) for content, _ in rows})),
        rows=len(rows),
        label_counts=dict(sorted(Counter(name for _, name in rows).items())),
    )


def share_rows(one: bytes, other: bytes) -> bool:
    """Whether two datasets, given by their row keys, have a text in common."""
    return not _keys(one).isdisjoint(_keys(other))


def foreign_labels(label_counts: Mapping[str, int], labels: Sequence[str]) -> dict[str, int]:
    """Labels of the data that a plan does not list, with their rows. For this machine's screen, never for a log."""
    return {label: rows for label, rows in label_counts.items() if label not in labels}


def _key(text: str) -> bytes:
    """Names a text whatever its case and spacing."""
    return digest("text", " ".join(text.split()).casefold())[:KEY_BYTES]


def _keys(joined: bytes) -> set[bytes]:
    return {joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)}


# --- One row ---


def _row(path: Path, number: int, record: Record, text: str, label: str) -> tuple[str, str]:
    where = f"Row {number} of {path.name}"
    content, name = (_value(where, record, column) for column in (text, label))
    if not isinstance(content, str):
        raise LocalError(f"{where} has something other than text in column {text!r}.")
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise LocalError(f"{where} has a label in column {label!r} that is neither text nor a whole number.")
    return content, str(name).strip()


def _value(where: str, record: Record, column: str) -> Any:
    value = record.get(column)
    if value is None:
        raise LocalError(f"{where} has no value in column {column!r}; fill it or leave the row out.")
    if (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and value.strip().lower() == "nan"):
        raise LocalError(f"{where} has NaN in column {column!r}; fill it or leave the row out.")
    if isinstance(value, str) and _HALVES.search(value):
        raise LocalError(f"{where} holds half a character (a lone surrogate) in column {column!r}; repair its text.")
    if isinstance(value, str) and not value.strip():
        raise LocalError(f"{where} is empty in column {column!r}; fill it or leave the row out.")
    return value


# --- Formats: (number of the row from 1, its record) ---


def _records(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    match path.suffix.lower():
        case ".csv":
            return _csv(path, columns, ",")
        case ".tsv":
            return _csv(path, columns, "\t")
        case ".jsonl" | ".ndjson":
            return _jsonl(path, columns)
        case ".parquet":
            return _parquet(path, columns)
        case ".sqlite" | ".sqlite3" | ".db":
            return _sqlite(path, columns)
    raise LocalError(
        f"{path.name} is of no known format; its name must end in .csv, .tsv, .jsonl, .parquet or .sqlite."
    )


def _csv(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[tuple[int, Record]]:
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not header:
            raise LocalError(f"{path.name} is empty; its first line must name the columns.")
        _require_columns(path, columns, header)
        number = 0
        for fields in reader:
            if not fields:
                continue
            number += 1
            if len(fields) > len(header):
                raise LocalError(
                    f"Row {number} of {path.name} has more fields than the header; put text that holds the "
                    "delimiter into double quotes."
                )
            yield number, dict(zip(header, fields, strict=False))
    except csv.Error:
        raise LocalError(f"Line {reader.line_num} of {path.name} is not valid CSV; check its quotes.") from None


def _jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise LocalError(f"Line {number} of {path.name} is not valid JSON; each line must be one object.") from None
        if not isinstance(record, dict):
            raise LocalError(f"Line {number} of {path.name} is not a JSON object such as {{...}}.")
        if number == 1:
            _require_columns(path, columns, list(record))
        yield number, record


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise LocalError(
            f"Reading {path.name} needs pyarrow; pip install 'foedus[parquet]', or export the rows as CSV or JSONL."
        ) from None
    try:
        with parquet.ParquetFile(path) as file:
            _require_columns(path, columns, file.schema_arrow.names)
            records = [record for batch in file.iter_batches(columns=list(columns)) for record in batch.to_pylist()]
    except (ValueError, OSError):  # what pyarrow raises for a file that is none of its own
        raise LocalError(f"{path.name} is not a valid Parquet file.") from None
    yield from enumerate(records, start=1)


def _sqlite(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, Record]]:
    """A table or view of the file alone, of which the dataset's hash is: nothing is read from a log beside it."""
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise LocalError(f"{path.name} has changes that lie beside it still; close the program that writes it.")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as db:
            tables = db.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')")
            names = [name for (name,) in tables if isinstance(name, str)]  # a damaged file may have bytes there
            fields = {name: [row[1] for row in db.execute(f"PRAGMA table_info({_quoted(name)})")] for name in names}
            table = _table(path, columns, fields)
            selected = ", ".join(_quoted(column.rpartition(".")[2]) for column in columns)
            for number, values in enumerate(db.execute(f"SELECT {selected} FROM {_quoted(table)}"), start=1):
                yield number, dict(zip(columns, values, strict=True))
    except (sqlite3.Error, UnicodeDecodeError, MemoryError):  # names that are no text; a field that claims to be huge
        raise LocalError(f"{path.name} is not a valid SQLite database, or not all of its text is UTF-8.") from None


def _table(path: Path, columns: Sequence[str], fields: Mapping[str, Sequence[str]]) -> str:
    """The one table with all the columns, each given as COLUMN or TABLE.COLUMN."""
    wanted = [column.rpartition(".") for column in columns]
    fitting = [
        name
        for name, has in fields.items()
        if all(table in ("", name) and column in has for table, _, column in wanted)
    ]
    if len(fitting) > 1:
        raise LocalError(f"{len(fitting)} tables of {path.name} have these columns; write them as TABLE.COLUMN.")
    if not fitting:
        raise LocalError(f"{path.name} has no table with all of these columns: {', '.join(columns)}; a view will do.")
    return fitting[0]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _lines(path: Path) -> Iterator[str]:
    """The file's lines as text, a byte-order mark removed."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise LocalError(f"Line {number} of {path.name} is not UTF-8; save the file as UTF-8.") from None


def _require_columns(path: Path, columns: Iterable[str], header: Sequence[str]) -> None:
    """Names of other columns are given only where one is close: a file without a header begins with data."""
    for column in columns:
        close = difflib.get_close_matches(column, header, n=1, cutoff=0.6)
        if column not in header:
            hint = f"did you mean {close[0]!r}?" if close else f"its first line names {len(header)} other columns."
            raise LocalError(f"{path.name} has no column {column!r}; {hint}")
        if header.count(column) > 1:
            raise LocalError(f"{path.name} has more than one column {column!r}; rename all but one.")
