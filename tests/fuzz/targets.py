"""Every parser that faces the network or a file: its good inputs, how to mutate them, and what it may raise.

Which parsers there are is read off the code: whatever calls json.loads, tomllib, csv, safetensors, x509, protobuf or
our own formats on bytes that came from elsewhere.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import io
import json
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from calls import NOW, of_the_link
from foedus_client.condition import FILE as CONDITION
from foedus_client.condition import read_condition
from foedus_client.config import SiteSettings
from foedus_client.data import read_rows
from foedus_client.ledger.high_water import HighWater
from foedus_client.training.process import read_message
from foedus_common import certificates, checkpoints, enrolment, identity, journal, model_folder
from foedus_common.adapters import AdapterSpec, TensorSpec, load_adapter, parse_spec, save_adapter
from foedus_common.backup import restore_backup, write_backup
from foedus_common.canonical import canonical_json, labelled
from foedus_common.objects import ObjectRef
from foedus_common.plan import parse_agreed_plan, read_plan, schedule
from foedus_common.protocol import wire
from foedus_common.tables import parse, read_toml
from foedus_common.terms import round_terms
from foedus_server.config import Settings
from foedus_server.release.evaluation import Example, OfClass, Score, parse_score
from foedus_server.release.held_out import held_out_rows
from foedus_server.store import parse_url
from mutations import (
    PEM_WORDS,
    ROW_WORDS,
    TOML_WORDS,
    Mutator,
    framed,
    json_tree,
    lines,
    raw,
    tar_entries,
)
from plans import agreed_plan, plan_toml
from seeded import seeded
from sessions import Attempt
from workshop import Target, Workshop

RANDOM = seeded("fuzz")
PYARROW = importlib.util.find_spec("pyarrow") is not None
"""Parquet is read where this package is; it is no dependency."""


def targets(workshop: Workshop) -> list[Target]:
    attempt = Attempt()
    return [
        *_of_the_protocol(attempt),
        *of_the_link(workshop.folder / "link", attempt),
        *_of_enrolment(workshop),
        *_of_plans(workshop),
        *_of_models_and_data(workshop),
        *_of_homes(workshop),
    ]


# --- Messages of a round, and the sessions that take them ---


def _of_the_protocol(attempt: Attempt) -> list[Target]:
    terms = wire.terms_bytes(attempt.config.terms)
    changed, damaged = attempt.changed, attempt.damaged
    return [
        Target("messages", attempt.envelopes, [changed, changed, damaged, raw], wire.parse_envelope),
        Target("terms of a vector", [terms], [raw], wire.parse_terms),
        Target("a site's session", attempt.requests, [changed, changed, damaged, raw], attempt.site_takes, ()),
        Target(
            "a coordinator's session", attempt.answers, [changed, changed, damaged, raw], attempt.coordinator_takes, ()
        ),
    ]


# --- Joining ---


def _of_enrolment(workshop: Workshop) -> list[Target]:
    root, site = (Ed25519PrivateKey.from_private_bytes(RANDOM(32)) for _ in range(2))
    authority = certificates.Authority.create("Test", RANDOM, NOW)
    tls_key = certificates.generate_tls_key(RANDOM)
    token = enrolment.Token(
        name="north",
        org="North Hospital",
        link_address="127.0.0.1:8443",
        enrolment_address="[::1]:8444",
        authority=authority.der,
        root_public_key=identity.public_bytes(root),
        expires=int(NOW + 3600),
        secret=RANDOM(32),
    )
    request = enrolment.EnrolRequest.make(token, site, tls_key)
    csr = certificates.request_certificate("north", tls_key)
    own = authority.issue_site("north", tls_key.public_key(), RANDOM, NOW)
    member = identity.RosterSite("north", "North Hospital", identity.public_bytes(site))
    roster = identity.Roster(3, int(NOW + 3600), identity.public_bytes(root), (member,))
    signed = identity.SignedRoster.sign(roster, root)
    replies = [
        enrolment.Waiting(),
        enrolment.Approved(own, signed.to_bytes(), (authority.der,)),
        enrolment.Refused("This token was used before."),
    ]
    key_pem = certificates.tls_key_pem(tls_key)
    identity.write_key(workshop.folder / "site.key", site)
    identity_pem = (workshop.folder / "site.key").read_bytes()

    def refuse_or_verify(data: bytes) -> None:
        enrolment.EnrolRequest.from_bytes(data).verify("north")

    def reply_as_a_site_does(data: bytes) -> None:
        reply = enrolment.reply_from_bytes(data)
        if isinstance(reply, enrolment.Approved):
            reply.verify(token, identity.public_bytes(site), tls_key, now=NOW, highest_epoch=0)

    def take_certificate(data: bytes) -> None:
        certificates.check_site_certificate(data, (authority.der,), "north", tls_key.public_key(), NOW)

    def take_signed_roster(data: bytes) -> None:
        identity.SignedRoster.from_bytes(data).verify(identity.public_bytes(root), now=NOW, highest_epoch=0)

    def take_roster(data: bytes) -> None:
        """As if the root had signed anything."""
        assert identity.parse_roster(data).canonical() == data

    return [
        Target("tokens", [token.encode().encode()], [raw, _token_fields], lambda d: enrolment.decode_token(_text(d))),
        Target("enrolment requests", [request.to_bytes()], [framed, raw], refuse_or_verify),
        Target("enrolment replies", [*map(enrolment.reply_to_bytes, replies)], [framed, raw], reply_as_a_site_does),
        Target("certificates", [own], [raw], take_certificate),
        Target("certificate requests", [csr], [raw], partial(certificates.check_request, name="north")),
        Target("rosters", [roster.canonical()], [json_tree, raw], take_roster),
        Target("signed rosters", [signed.to_bytes()], [_signed_anew("roster", root), raw], take_signed_roster),
        Target(
            "certificate files",
            [certificates.pem(own)],
            [lines(*PEM_WORDS)],
            workshop.given("tls.crt", certificates.read_certificate),
        ),
        Target(
            "bundles of authorities",
            [certificates.pem(authority.der) * 2],
            [lines(*PEM_WORDS)],
            workshop.given("authorities.pem", certificates.read_authorities),
        ),
        Target("key files", [key_pem], [lines(*PEM_WORDS)], workshop.given("a.key", certificates.read_tls_key)),
        Target("identity files", [identity_pem], [lines(*PEM_WORDS)], workshop.given("b.key", identity.read_key)),
        Target(
            "public key files",
            [identity.public_pem(identity.public_bytes(root))],
            [lines(*PEM_WORDS), raw],
            workshop.given("root.pem", identity.read_public_key),
        ),
    ]


def _signed_anew(kind: str, key: Ed25519PrivateKey) -> Mutator:
    """Changes what is signed, and signs it again as its owner could."""

    def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
        changed = json_tree(random, data[identity.SIGNATURE_BYTES :], others)
        return key.sign(labelled(f"signed-{kind}", changed)) + changed

    return mutate


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _token_fields(random: object, data: bytes, others: Sequence[bytes]) -> bytes:
    """Changes the fields of a token and puts its checksum right again."""
    coded = _text(data).removeprefix(enrolment.PREFIX)
    body = base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4))[:-4]
    body = framed(random, body, [body])  # type: ignore[arg-type]
    whole = body + hashlib.sha256(body).digest()[:4]
    return enrolment.PREFIX.encode() + base64.urlsafe_b64encode(whole).rstrip(b"=")


# --- Plans and settings ---


def _of_plans(workshop: Workshop) -> list[Target]:
    agreed = [agreed_plan().canonical(), agreed_plan(privacy={"unit": "none"}, phase=[_WITHOUT_DP]).canonical()]
    plans = [plan_toml().encode(), plan_toml(adapter__rank=2, aggregation=None).encode()]
    site, coordinator = SiteSettings().to_toml().encode(), Settings("Test").to_toml().encode()

    def settings(kind: type, path: Path) -> object:
        return parse(kind, read_toml(path), str(path))

    def take_agreed(data: bytes) -> None:
        agreed = parse_agreed_plan(data)
        assert agreed.canonical() == data
        first = schedule(agreed.plan)[0]
        wire.terms_bytes(round_terms(agreed, first, ObjectRef(agreed.first_adapter_sha256, 1)))

    toml, signer = [lines(*TOML_WORDS)], Ed25519PrivateKey.from_private_bytes(RANDOM(32))
    urls = [b"sqlite:////var/lib/foedus/foedus.db", b"postgresql://db.example:5432/foedus?sslmode=require&passfile=/p"]
    return [
        Target("agreed plans", agreed, [json_tree, json_tree, raw], take_agreed),
        Target(
            "signed plans",
            [identity.SignedPlan.sign(agreed_plan(), signer).to_bytes()],
            [_signed_anew("plan", signer), raw],
            lambda data: identity.SignedPlan.from_bytes(data).verify(identity.public_bytes(signer)),
        ),
        Target("plans", plans, toml, workshop.given("plan.toml", read_plan)),
        Target("a site's settings", [site], toml, workshop.given("site.toml", partial(settings, SiteSettings))),
        Target("a coordinator's settings", [coordinator], toml, workshop.given("f.toml", partial(settings, Settings))),
        Target("databases' URLs", urls, [raw], lambda data: parse_url(_text(data))),
    ]


_WITHOUT_DP = {"train": "head", "rounds": 3, "learning_rate": 8.0, "epochs": 1.0, "batch_size": 4}


# --- Models, adapters, rows ---


def _of_models_and_data(workshop: Workshop) -> list[Target]:
    spec = AdapterSpec((TensorSpec("head.weight", (3, 4), "head"), TensorSpec("A", (2, 2), "frozen")))
    tensors = {t.name: np.full(t.shape, 0.5, np.float32) for t in spec.tensors}
    adapter = save_adapter(tensors, spec)
    config = json.dumps({"model_type": "bert", "hidden_size": 32, "layers": [1, 2], "id2label": {"0": "a"}}).encode()
    workshop.file("model/model.safetensors", adapter)
    csv = b'text,label\none,a\n"two, words",b\n"three ""quoted""\nlines",a\n'
    jsonl = b'{"text": "one", "label": "a"}\n{"text": "two", "label": 2, "more": [1]}\n'

    def take_spec(data: bytes) -> None:
        assert parse_spec(data).canonical() == data

    def model(data: bytes) -> None:
        workshop.file("model/config.json", data)
        model_folder.manifest_sha256(workshop.folder / "model")

    example, of_class = Example("one", "a", "a", 0.75), OfClass(4, 3)
    score = Score("round-1.safetensors", 4, 3, {"a": of_class}, (example,)).to_json().encode()

    def held_out(path: Path) -> object:
        return held_out_rows(path, "text", "label")

    def rows(path: Path) -> object:
        return read_rows(path, "text", "label")

    return [
        Target("adapters", [adapter], [raw], lambda data: load_adapter(data, spec)),
        Target("adapter specifications", [spec.canonical()], [json_tree, raw], take_spec),
        Target("a model's config.json", [config], [json_tree], model),
        Target("scores", [score], [json_tree, raw], lambda data: parse_score(_text(data))),
        Target("rows in CSV", [csv], [lines(*ROW_WORDS)], workshop.given("rows.csv", rows)),
        Target("held-out rows", [csv], [lines(*ROW_WORDS)], workshop.given("held-out.csv", held_out)),
        Target("rows in JSONL", [jsonl], [lines(*ROW_WORDS), json_tree], workshop.given("rows.jsonl", rows)),
        Target("rows in SQLite", _sqlite(workshop), [raw], workshop.given("rows.sqlite", rows)),
        *([Target("rows in Parquet", _parquet(), [raw], workshop.given("rows.parquet", rows))] if PYARROW else []),
    ]


def _sqlite(workshop: Workshop) -> list[bytes]:
    """A table; a view of one with an index."""
    made = []
    for number, more in enumerate(
        ("", "CREATE VIEW seen AS SELECT text AS t, label AS l FROM rows; CREATE INDEX i ON rows (label)")
    ):
        path = workshop.folder / f"good-{number}.sqlite"
        with closing(sqlite3.connect(path)) as db:
            db.executescript(f"PRAGMA page_size = 512; CREATE TABLE rows (text TEXT, label TEXT); {more};")
            db.executemany("INSERT INTO rows VALUES (?, ?)", [("one", "a"), ("two words", "b")])
            db.commit()
        made.append(path.read_bytes())
    return made


def _parquet() -> list[bytes]:
    pyarrow, parquet = (importlib.import_module(name) for name in ("pyarrow", "pyarrow.parquet"))
    table = pyarrow.table({"text": ["one", "two words", "three"], "label": ["a", "b", "a"]})
    made = [io.BytesIO() for _ in ("none", "snappy")]
    for target, compression in zip(made, ("none", "snappy"), strict=True):
        parquet.write_table(table, target, compression=compression)
    return [target.getvalue() for target in made]


# --- What lies in homes ---


def _of_homes(workshop: Workshop) -> list[Target]:
    home = workshop.folder / "home"
    workshop.file("home/site.toml", b"threads = 1\n")
    workshop.file("home/key", b"secret")
    archive = workshop.folder / "archive"
    write_backup(
        archive,
        home,
        "site",
        leave_out=frozenset(),
        database="site.db",
        copy_database=lambda path: path.write_bytes(b"a copy") and None,
        now=NOW,
    )
    mark = json.dumps({"entries": 3, "head": "a" * 64, "masked": 1}).encode()
    entries = [journal.next_entry(journal.START, NOW, "add_dataset", {"dataset": "terms", "rows": 7})]
    entries.append(journal.next_entry(journal.Checkpoint(1, entries[0].head), NOW, "close_run", {"run_id": 7}))
    chain = canonical_json([[e.number, e.body.decode(), e.head.hex()] for e in entries])
    signer = Ed25519PrivateKey.from_private_bytes(RANDOM(32))
    public_key = identity.public_bytes(signer)
    mark_of = [journal.Checkpoint(entry.number, entry.head) for entry in entries]
    heads = [
        checkpoints.Head("north", at.number, at.head, signer.sign(checkpoints.statement("north", at)), public_key)
        for at in mark_of
    ]
    sheet = checkpoints.sheet("coordinator", heads)
    facts = json.dumps({"link": "connected: since noon", "trouble": "2026-11-22 none"}).encode()
    pipe = b'{"say": "progress", "what": "training", "done": 1, "total": 2, "bytes": 4}\nabcd'

    def restore(path: Path) -> None:
        try:
            restore_backup(path, workshop.folder / "restored", "site")
        finally:
            shutil.rmtree(workshop.folder / "restored", ignore_errors=True)
        left = {each.name for each in workshop.folder.iterdir()}
        assert left <= {"home", "archive", "archive.tar", "model", "link"} | {n for n in left if "." in n}

    def read_mark(path: Path) -> object:
        return HighWater(path.parent, path.stem).read()

    return [
        Target("backups", [archive.read_bytes()], [tar_entries], workshop.given("archive.tar", restore)),
        Target("high-water marks", [mark], [json_tree, raw], workshop.given("mark.json", read_mark)),
        Target(
            "conditions of a site",
            [facts],
            [json_tree, raw],
            workshop.given(CONDITION, lambda path: read_condition(path.parent)),
            (),
        ),
        Target("journals", [chain], [_chain], _verify_chain),
        Target(
            "lists of signed heads",
            [sheet],
            [json_tree, raw],
            lambda data: checkpoints.heads_in(data, "north", [public_key]),
        ),
        Target(
            "a trainer's messages",
            [pipe],
            [lines(b'{"bytes": -1}', b'"bytes": 99999999999', b"[", b"{}"), raw],
            lambda data: read_message(io.BytesIO(data), limit=1 << 20),
            (ValueError, EOFError),
        ),
    ]


def _chain(random: object, data: bytes, others: Sequence[bytes]) -> bytes:
    """Changes an entry's fields; stays a list of entries, as a database would give them."""
    changed = json_tree(random, data, others)  # type: ignore[arg-type]
    try:
        entries = json.loads(changed)
        well = all(type(n) is int and isinstance(b, str) and len(bytes.fromhex(h)) >= 0 for n, b, h in entries)
    except (ValueError, TypeError, RecursionError):
        well = False
    return changed if well else data


def _verify_chain(data: bytes) -> None:
    entries = [journal.Entry(n, b.encode("utf-8", "surrogatepass"), bytes.fromhex(h)) for n, b, h in json.loads(data)]
    journal.verify(entries)
    assert all(entry.event["event"] for entry in entries)


def by_name(workshop: Workshop) -> Mapping[str, Target]:
    return {target.name: target for target in targets(workshop)}
