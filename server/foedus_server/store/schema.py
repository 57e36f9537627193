"""The tables of the coordinator's database. Which process may write them, and when, is not known here."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

from foedus_common.objects import ObjectRef

VERSION = 2
"""Of these tables; kept in `meta`. `migrations` turns older ones into these."""


class Reference(TypeDecorator[ObjectRef]):
    """An ObjectRef as "sha256:size"."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: ObjectRef | None, dialect: Dialect) -> str | None:
        return None if value is None else f"{value.sha256}:{value.size}"

    def process_result_value(self, value: str | None, dialect: Dialect) -> ObjectRef | None:
        if value is None:
            return None
        sha256, size = value.split(":")
        return ObjectRef(sha256, int(size))


class Names(TypeDecorator[tuple[str, ...]]):
    """Sites' names as a JSON list."""

    impl = JSON
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> tuple[str, ...]:
        return tuple(value)


schema = MetaData()


def _required(name: str, kind: Any, **options: Any) -> Column[Any]:
    return Column(name, kind, nullable=False, **options)


meta = Table("meta", schema, _required("key", Text, primary_key=True), _required("value", Text))

sites = Table(
    "sites",
    schema,
    _required("name", Text, primary_key=True),
    _required("org", Text),
    _required("state", Text),
    _required("invited_at", Float),
    Column("public_key", LargeBinary),
    Column("certificate_request", LargeBinary),
    Column("waiting_key", LargeBinary),
    Column("waiting_request", LargeBinary),
    Column("approved_at", Float),
    Column("revoked_at", Float),
)

tokens = Table(
    "tokens",
    schema,
    _required("secret_hash", LargeBinary, primary_key=True),
    _required("name", Text, index=True),
    _required("org", Text),
    _required("expires_at", Float),
    Column("voided_at", Float),
    Column("used_at", Float),
    Column("public_key", LargeBinary),
    Column("certificate_request", LargeBinary),
)

certificates = Table(
    "certificates",
    schema,
    _required("sha256", LargeBinary, primary_key=True),
    Column("site", Text, ForeignKey("sites.name"), nullable=False),
    _required("der", LargeBinary),
    _required("not_after", Float),
    Column("retired_at", Float),
)

rosters = Table(
    "rosters",
    schema,
    Column("epoch", BigInteger, primary_key=True, autoincrement=False),
    _required("signed", LargeBinary),
)

models = Table(
    "models",
    schema,
    _required("name", Text, primary_key=True),
    _required("manifest_sha256", Text),
    _required("path", Text),
    _required("added_at", Float),
)

runs = Table(
    "runs",
    schema,
    Column("run_id", BigInteger, primary_key=True, autoincrement=False),
    _required("name", Text, index=True),
    _required("state", Text),
    _required("plan_toml", Text),
    _required("rounds", Integer),
    _required("submitted_at", Float),
    _required("updated_at", Float),
    _required("rounds_done", Integer),
    Column("signed_plan", LargeBinary),
    Column("plan_digest", LargeBinary),
    Column("spec", LargeBinary),
    Column("reason", Text),
)

attempts = Table(
    "attempts",
    schema,
    Column("run_id", BigInteger, ForeignKey("runs.run_id"), primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    _required("state", Text),
    _required("started_at", Float),
    Column("ended_at", Float),
    _required("cohort", Names),
    _required("survivors", Names),
    _required("seconds", JSON),
    _required("bytes_up", BigInteger),
    _required("bytes_down", BigInteger),
    Column("adapter", Reference),
    Column("optimizer", Reference),
    Column("reason", Text),
)

evaluations = Table(
    "evaluations",
    schema,
    Column("run_id", BigInteger, ForeignKey("runs.run_id"), primary_key=True, autoincrement=False),
    Column("round", Integer, primary_key=True, autoincrement=False),
    _required("data", Text, primary_key=True),
    _required("rows", Integer),
    _required("accuracy", Float),
    _required("at", Float),
)

journal = Table(
    "journal",
    schema,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    _required("body", LargeBinary),
    _required("head", LargeBinary),
)

heads = Table(
    "heads",
    schema,
    _required("owner", Text, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    _required("head", LargeBinary, primary_key=True),
    _required("signature", LargeBinary),
    _required("public_key", LargeBinary),
)

countersignatures = Table(
    "countersignatures",
    schema,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    _required("head", LargeBinary, primary_key=True),
    _required("witness", Text, primary_key=True),
    _required("signature", LargeBinary),
    _required("public_key", LargeBinary),
)
