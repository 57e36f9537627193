"""The site's rows of model folders and datasets: what the hospital has put at the daemon's disposal."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from foedus_client.store.journal import Journal
from foedus_common.errors import LocalError


@dataclass(frozen=True)
class StoredModel:
    name: str
    manifest_sha256: str
    path: Path
    added_at: float


@dataclass(frozen=True)
class Dataset:
    """A file of rows that was checked when it was added. `account`: its line in the ledger."""

    name: str
    account: str
    path: Path
    text_column: str
    label_column: str
    file_sha256: str
    rows_sha256: str
    rows: int
    label_counts: Mapping[str, int]
    added_at: float


class Belongings(Journal):
    """Models and datasets of this machine."""

    def add_model(self, name: str, manifest_sha256: str, path: Path) -> StoredModel:
        """The model under its name, now at `path`. Raises LocalError for a name or a model that is here already."""
        added = StoredModel(name, manifest_sha256, path.absolute(), self._now())
        with self.transaction("add model"):
            known = self.model(manifest_sha256)
            if known and known.name == name:
                self._db.execute("UPDATE models SET path = ? WHERE name = ?", (str(added.path), name))
                return dataclasses.replace(known, path=added.path)
            if known:
                raise LocalError(f"This model was added already, as {known.name!r}.")
            if self._first("SELECT 1 FROM models WHERE name = ?", name):
                raise LocalError(f"Another model has the name {name!r}; choose another name.")
            self._db.execute(
                "INSERT INTO models VALUES (?, ?, ?, ?)", (manifest_sha256, name, str(added.path), added.added_at)
            )
            self.log("model.added", model=name, manifest_sha256=manifest_sha256)
        return added

    def models(self) -> list[StoredModel]:
        return [_model(row) for row in self._all("SELECT * FROM models ORDER BY name")]

    def model(self, manifest_sha256: str) -> StoredModel | None:
        row = self._first("SELECT * FROM models WHERE manifest_sha256 = ?", manifest_sha256)
        return _model(row) if row else None

    def add_dataset(self, dataset: Dataset, row_keys: bytes) -> None:
        """Raises LocalError for a name that is taken; `Ledger.add_dataset` has the rest of the rules."""
        with self.transaction("add dataset"):
            if self.dataset(dataset.name):
                raise LocalError(f"A dataset named {dataset.name!r} exists already; choose another name.")
            self._db.execute(
                "INSERT INTO datasets VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    dataset.name,
                    dataset.account,
                    str(dataset.path),
                    dataset.text_column,
                    dataset.label_column,
                    dataset.file_sha256,
                    dataset.rows_sha256,
                    dataset.rows,
                    json.dumps(dataset.label_counts),
                    row_keys,
                    dataset.added_at,
                ),
            )

    def datasets(self) -> list[Dataset]:
        return [_dataset(row) for row in self._all(f"SELECT {_DATASET} FROM datasets ORDER BY name")]

    def dataset(self, name: str) -> Dataset | None:
        row = self._first(f"SELECT {_DATASET} FROM datasets WHERE name = ?", name)
        return _dataset(row) if row else None

    def row_keys(self, name: str) -> bytes:
        return bytes(self._one("SELECT row_keys FROM datasets WHERE name = ?", name)["row_keys"])


_DATASET = "name, account, path, text_column, label_column, file_sha256, rows_sha256, rows, label_counts, added_at"


def _model(row: sqlite3.Row) -> StoredModel:
    return StoredModel(row["name"], row["manifest_sha256"], Path(row["path"]), row["added_at"])


def _dataset(row: sqlite3.Row) -> Dataset:
    return Dataset(**{**dict(row), "path": Path(row["path"]), "label_counts": json.loads(row["label_counts"])})
