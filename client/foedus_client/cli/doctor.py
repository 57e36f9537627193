"""`foedus-site doctor`: whether this site can take part in a run now. Looks at everything once and changes nothing.

The coordinator is reached as the daemon reaches it, step by step, so that a closed firewall, a foreign certificate and
a revoked membership are told apart. A daemon that is running is not disturbed. Torch is looked for and not imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from foedus_client.config import SiteHome
from foedus_client.enrol import Membership
from foedus_client.ledger.high_water import mark_name
from foedus_client.ledger.ledger import Ledger
from foedus_client.store import Dataset, SiteStore, StoredModel
from foedus_common.checks import Finding, Note, examine, lasts, private, room
from foedus_common.clock import Clock, apart
from foedus_common.errors import LocalError
from foedus_common.link.transport import TlsIdentity, proxy_for
from foedus_common.model_folder import manifest_sha256

CONNECT_SECONDS = 5.0
TRAINER = ("torch", "transformers", "peft")

Admission = Callable[[str, TlsIdentity, str], float]
"""`link.site_link.admission`: given the address, what is shown there and the proxy, the coordinator's clock."""


def findings(path: Path, state: Path, clock: Clock, admission: Admission) -> Iterator[Finding]:
    """Each check as it is made. What cannot be looked at, because something before it is amiss, is left out.

    state: folder of high-water marks.
    """
    yield (settings := examine("settings", lambda: _settings(path)))
    if settings.state == "problem":
        return
    home = SiteHome.open(path)
    yield examine("files", lambda: private(path))
    yield examine("disk", lambda: room(path))
    yield examine("device", lambda: _device(home))
    yield (membership := examine("membership", lambda: _membership(home)))
    if membership.state == "problem":
        return
    member = Membership(path)
    yield examine("certificate", lambda: _certificate(member, clock))
    yield examine("roster", lambda: _roster(member, clock))
    yield examine("organisation", lambda: _organisation(member))
    address = home.settings.coordinator or member.token.link_address
    proxy = proxy_for(address, home.settings.proxy, os.environ)
    yield (network := examine("network", lambda: _reachable(address, proxy)))
    if network.state == "ok":
        yield examine("coordinator", lambda: _admitted(address, member, home, clock, admission))
    yield (database := examine("database", lambda: _database(home, clock)))
    if database.state != "ok":
        return
    store = home.store(clock, state, mark_name(member.name, member.token.root_public_key))
    yield examine("ledger", lambda: _ledger(store, member, clock))
    yield examine("approvals", lambda: _approvals(store, member, clock))
    for dataset in store.datasets():
        yield examine(f"data {dataset.name}", partial(_dataset, dataset))
    for model in store.models():
        yield examine(f"model {model.name}", partial(_model, model))
    yield examine("daemon", lambda: _daemon(home, store))
    store.close()


# --- The machine and the home ---


def _settings(path: Path) -> str:
    SiteHome.open(path)
    return f"{path / 'site.toml'} says nothing that cannot be."


def _device(home: SiteHome) -> str:
    """Raises LocalError when what the settings ask for is not there."""
    if missing := [name for name in TRAINER if importlib.util.find_spec(name) is None]:
        raise LocalError(f"{', '.join(missing)} cannot be imported, so nothing trains; pip install 'foedus[client]'.")
    if home.settings.base_weights == "4bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise LocalError("base_weights = \"4bit\" in site.toml needs bitsandbytes; pip install 'foedus[gpu]'.")
    wanted = home.settings.device
    if wanted == "cpu":
        return "Training is on the CPU, as the settings say."
    cards = _cards()
    if wanted == "auto":
        return f"Training is on {cards[0]}." if cards else "Training is on the CPU: there is no NVIDIA card."
    number = int(wanted.partition(":")[2] or 0)
    if number >= len(cards):
        raise LocalError(f"The settings ask for {wanted}, and nvidia-smi lists {len(cards)} cards; change site.toml.")
    return f"Training is on {cards[number]}."


def _cards() -> list[str]:
    """The NVIDIA cards of this machine, as their driver names them."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    try:
        told = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        raise LocalError('nvidia-smi does not answer; restart the card\'s driver, or set device = "cpu".') from None
    return [line.partition(" (UUID")[0] for line in told.stdout.splitlines() if line.startswith("GPU ")]


def _daemon(home: SiteHome, store: SiteStore) -> str:
    if by := store.paused():
        raise Note(f"{by} paused this site; `foedus-site resume` brings it back to work.")
    if not home.daemon_runs():
        raise Note("It is not running; start it with `foedus-site run`, best under a service manager.")
    return "It is running."


# --- Membership ---


def _membership(home: SiteHome) -> str:
    if not (home.path / "identity").exists() and (home.path / "joining").exists():
        raise LocalError("This site waits to be approved; run `foedus-site join` again with the same token.")
    member = Membership(home.path)
    return f"This is the site {member.name} of {member.token.org}."


def _certificate(member: Membership, clock: Clock) -> str:
    advice = "the daemon renews it over the enrolment port; if it says why it cannot, ask the operator"
    return lasts("This site's certificate", member.certificate_ends(), clock.now(), soon_days=30, advice=advice)


def _roster(member: Membership, clock: Clock) -> str:
    roster = member.roster(now=0)
    if roster.site(member.name).public_key != member.public_key:
        raise LocalError(f"The roster lists {member.name} with another key than this site's; ask the operator.")
    what = f"Epoch {roster.epoch} with {roster.members}"
    return lasts(what, roster.not_after, clock.now(), soon_days=30, advice="the operator has to sign a new one")


def _organisation(member: Membership) -> str:
    """Whoever answers for the organisation knows which sites it has; nobody else can tell that one is not."""
    roster = member.roster(now=0)
    own = roster.site(member.name).org
    kin = [site.name for site in roster.sites if site.org == own and site.name != member.name]
    if not kin:
        return f"No other site is listed as one of {own}."
    return f"Listed as sites of {own}, too: {', '.join(kin)}; if one is not, tell whoever keeps the root key."


# --- The coordinator, one step after the other ---


def _reachable(address: str, proxy: str) -> str:
    """Raises LocalError when no connection can be made at all, and says at which step. proxy: "host:port", or ""."""
    host, _, port = (proxy or address).rpartition(":")
    whom = "whoever runs the proxy" if proxy else "the operator"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except socket.gaierror:
        raise LocalError(f"The name {host} does not resolve; ask {whom} whether it is right.") from None
    except TimeoutError:
        raise LocalError(
            f"{host}:{port} does not answer; let outgoing connections to it through the firewall."
        ) from None
    except ConnectionRefusedError:
        running = "whether it is up" if proxy else "whether `foedus up` is running"
        raise LocalError(f"Nothing listens at {host}:{port}; ask {whom} {running}.") from None
    except OSError as error:
        raise LocalError(f"{host}:{port}: {error.strerror}; look after this machine's own network.") from None
    return f"The proxy {proxy} answers." if proxy else f"{address} answers."


def _admitted(address: str, member: Membership, home: SiteHome, clock: Clock, admission: Admission) -> str:
    """Raises LocalError when the coordinator is not trusted, does not let this site in, or lives in another time."""
    try:
        theirs = admission(address, home.trusting(member.tls()), home.settings.proxy)
    except LocalError as error:
        raise LocalError(f"{error} At the coordinator `foedus doctor` and `foedus site list` say more.") from None
    if amiss := apart(clock.now(), theirs):
        raise LocalError(amiss)
    return f"It shows a certificate that this site trusts, and lets {member.name} in. Both clocks agree."


# --- What is in the home ---


def _database(home: SiteHome, clock: Clock) -> str:
    if not home.database.exists():
        raise Note("There is none yet; `foedus-site model add` and `foedus-site data add` begin it.")
    SiteStore(home.database, clock).close()
    return "It opens."


def _ledger(store: SiteStore, member: Membership, clock: Clock) -> str:
    end = Ledger(store, clock, member.key.sign).verify(member.public_key)
    return f"Its {end.number} entries are where and what they were."


def _approvals(store: SiteStore, member: Membership, clock: Clock) -> str:
    ledger, ended = Ledger(store, clock, member.key.sign), []
    approved = [plan.run_id for plan in store.plans() if plan.state == "approved"]
    for run_id in approved:
        consent = ledger.run(run_id).consent
        if consent is None or not consent.holds(clock.now()):
            ended.append(str(run_id))
    if ended:
        raise Note(f"Approvals have ended, of run {', '.join(ended)}; `foedus-site approve` renews one.")
    return f"{len(approved)} plans are approved now."


def _dataset(dataset: Dataset) -> str:
    advice = "put it back as it was, or add it under another name"
    try:
        with dataset.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LocalError(f"{dataset.path}: {error.strerror}; {advice}.") from None
    if found != dataset.file_sha256:
        raise LocalError(f"{dataset.path} is not what was added; {advice}.")
    return f"{dataset.path} is what was added, {dataset.rows} rows."


def _model(model: StoredModel) -> str:
    if manifest_sha256(model.path) != model.manifest_sha256:
        raise LocalError(f"{model.path} is not what was added; put it back as it was, or add it under another name.")
    return f"{model.path} is what was added."
