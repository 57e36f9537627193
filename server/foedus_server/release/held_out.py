"""Held-out rows from a CSV file of the consortium's own. Knows no model."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from pathlib import Path

from foedus_common.errors import LocalError

MAX_DATA_BYTES = 1 << 30


def held_out_rows(path: Path, text: str, label: str) -> list[tuple[str, str]]:
    """(text, label) of each row of a CSV file with a header.

    Raises LocalError for a file that is missing, empty, too large or not UTF-8, a missing column (naming the nearest),
    and a row with an empty text or label.
    """
    try:
        if path.stat().st_size > MAX_DATA_BYTES:
            raise LocalError(f"{path} is larger than {MAX_DATA_BYTES} bytes; give a sample of it.")
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames or []
            for name in (text, label):
                if name not in found:
                    raise LocalError(f"{path} has no column {name!r}{_nearest(name, found)}")
            rows = [(row[text] or "", row[label] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LocalError(f"{path} cannot be read as CSV: {getattr(error, 'strerror', None) or error}.") from None
    if not rows:
        raise LocalError(f"{path} has no rows below its header; there is nothing to evaluate on.")
    for number, row in enumerate(rows, start=1):
        if not all(value.strip() for value in row):
            raise LocalError(
                f"Row {number} of {path} has an empty {text!r} or {label!r}; fill it in or remove the row."
            )
    return rows


def _nearest(name: str, known: Sequence[str]) -> str:
    """Names of other columns are given only where one is close: a file without a header begins with data."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; its first line names {len(known)} other columns." if known else "; it is empty."
