"""`foedus doctor`: whether this home can coordinate a run now. Looks at everything once and changes nothing.

Torch is looked for and not imported.
"""

from __future__ import annotations

import errno
import importlib.util
import socket
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding

from foedus_common.certificates import read_certificate
from foedus_common.checks import Finding, Note, examine, lasts, private, room
from foedus_common.clock import DAY, Clock, iso
from foedus_common.errors import LocalError
from foedus_common.identity import Roster, SignedRoster
from foedus_common.model_folder import manifest_sha256
from foedus_common.objects import ObjectStore
from foedus_server.audit import verify
from foedus_server.cohorts import usual_round
from foedus_server.config import Home
from foedus_server.store import Model, Run, Store

CONNECT_SECONDS = 3.0
SITES_SOON_DAYS = 21
PREPARE = ("torch", "transformers", "peft")


def findings(path: Path, clock: Clock) -> Iterator[Finding]:
    """Each check as it is made. What cannot be looked at, because something before it is amiss, is left out."""
    yield (settings := examine("settings", lambda: _settings(path)))
    if settings.state == "problem":
        return
    home = Home.open(path)
    yield examine("files", lambda: private(path))
    yield examine("disk", lambda: room(path))
    yield examine("root key", lambda: _root_key(home))
    yield examine("authority", lambda: _authority(home, clock))
    yield examine("certificate", lambda: _certificate(home, clock))
    link = home.settings.link
    yield examine("link port", lambda: _port(home, link.listen, link.port))
    yield examine("enrolment port", lambda: _port(home, link.listen, link.enrolment_port))
    yield examine("software", _software)
    yield (database := examine("database", lambda: _database(home, clock)))
    if database.state == "problem":
        return
    store = home.store(clock)
    yield examine("roster", lambda: _roster(home, store, clock))
    yield examine("organisations", lambda: _organisations(home, store))
    yield examine("sites", lambda: _sites(store, clock))
    for model in store.runs.models():
        yield examine(f"model {model.name}", partial(_model, model))
    for run in store.runs.all():
        yield examine(f"run {run.name}", partial(_run, home, store, run))
    store.close()


# --- The home ---


def _settings(path: Path) -> str:
    settings = Home.open(path).settings
    return f"{path} is the home of {settings.federation}, which sites reach at {settings.link_address}."


def _root_key(home: Home) -> str:
    home.root_public_key()
    if home.demonstration:
        raise Note(
            "The root's private key lies in this home, so whoever has this machine can invent sites; for more than a "
            "demonstration make a home with `foedus root new` on another machine and `foedus init --root-public-key`."
        )
    return "Only its public half is here."


def _authority(home: Home, clock: Clock) -> str:
    ends = home.shown_authority().certificate.not_valid_after_utc.timestamp()
    if clock.now() > ends:
        raise LocalError(
            f"The link's certificate authority ended on {iso(ends)}; make a new home for the sites to join."
        )
    advice = "make the next one with `foedus authority rotate`, well"
    return lasts("The link's certificate authority", ends, clock.now(), soon_days=365, advice=advice)


def _certificate(home: Home, clock: Clock) -> str:
    shown = home.path / (home.settings.link.certificate or "server.crt")
    if not shown.exists():
        return "`foedus up` issues it at its first start."
    ends = read_certificate(shown).not_valid_after_utc.timestamp()
    advice = "have it renewed" if home.settings.link.certificate else "keep `foedus up` running, which renews it"
    return lasts("What sites are shown", ends, clock.now(), soon_days=14, advice=advice)


def _port(home: Home, listen: str, port: int) -> str:
    """Raises LocalError unless the port is free for `foedus up`, or `foedus up` of this home has it."""
    try:
        family = socket.AF_INET6 if ":" in listen else socket.AF_INET
        socket.create_server((listen, port), family=family).close()
        return f"{port} is free; `foedus up` will listen there."
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise LocalError(f"{listen} port {port} cannot be had: {error.strerror}; change foedus.toml.") from None
    if _is_ours(home, listen, port):
        return f"`foedus up` is listening at {port}."
    raise LocalError(f"Another program has port {port}; stop it, or give this home another port in foedus.toml.")


def _is_ours(home: Home, listen: str, port: int) -> bool:
    """Whether what listens shows this home's certificate."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen, listen)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate itself is compared
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((reached, port), timeout=CONNECT_SECONDS) as plain,
            context.wrap_socket(plain) as secured,
        ):
            shown = secured.getpeercert(binary_form=True)
    except OSError:
        return False
    return shown == read_certificate(home.path / (home.settings.link.certificate or "server.crt")).public_bytes(
        Encoding.DER
    )


def _software() -> str:
    if missing := [name for name in PREPARE if importlib.util.find_spec(name) is None]:
        raise Note(
            f"{', '.join(missing)} cannot be imported, so plans are neither checked nor submitted nor evaluated here; "
            "pip install 'foedus[prepare]'."
        )
    return "Everything that preparing and evaluating take is installed."


# --- What is in the database ---


def _database(home: Home, clock: Clock) -> str:
    store = home.store(clock)
    try:
        end = verify(home, store).end
    finally:
        store.close()
    return f"It opens, and the journal's {end.number} entries are where and what they were."


def _roster(home: Home, store: Store, clock: Clock) -> str:
    roster = _newest_roster(home, store)
    approved = {site.name: site.public_key for site in store.members.sites() if site.state == "approved"}
    if astray := sorted({name for name, _ in approved.items() ^ roster.public_keys.items()}):
        raise LocalError(f"It does not say of {', '.join(astray)} what was decided since; `foedus roster sign` does.")
    what = f"Epoch {roster.epoch} with {len(approved)} sites"
    return lasts(what, roster.not_after, clock.now(), soon_days=30, advice="sign a new one with `foedus roster sign`")


def _newest_roster(home: Home, store: Store) -> Roster:
    newest = store.members.roster()
    if newest is None:
        raise Note("There is none yet; invite and approve sites, then `foedus roster sign`.")
    return SignedRoster.from_bytes(newest[1]).verify(home.root_public_key(), now=0, highest_epoch=0)


def _organisations(home: Home, store: Store) -> str:
    return usual_round(_newest_roster(home, store))


def _sites(store: Store, clock: Clock) -> str:
    """Raises Note when a member's certificate nears its end, which its daemon should have had renewed."""
    ends = store.members.certificate_ends()  # of members only: a revocation ends them all
    ending = sorted(name for name, end in ends.items() if end < clock.now() + SITES_SOON_DAYS * DAY)
    if ending:
        raise Note(
            f"Certificates end within {SITES_SOON_DAYS} days at {', '.join(ending)}; let the daemons there run and "
            "reach the enrolment port, which renews them."
        )
    return f"{len(ends)} sites hold certificates, and none ends soon."


def _model(model: Model) -> str:
    if manifest_sha256(Path(model.path)) != model.manifest_sha256:
        raise LocalError(
            f"What is in {model.path} is no longer what was added; put it back, or add the folder under another name."
        )
    return f"{model.path} is what was added."


def _run(home: Home, store: Store, run: Run) -> str:
    """Raises LocalError when an adapter of the run is damaged or gone."""
    objects, committed = ObjectStore(home.objects), store.runs.committed(run.run_id)
    for attempt in committed:
        for ref in (attempt.adapter, attempt.optimizer):
            if ref is not None:
                objects.read(ref)
    if run.state == "failed":
        raise Note(f"It failed: {run.reason} `foedus run resume {run.name}` takes it up again.")
    return f"It is {run.state}, with {len(committed)} of {run.rounds} rounds, each with its adapter."
