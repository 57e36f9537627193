"""The operator's home folder: settings, keys, certificates and where everything else lies.

    foedus.toml     settings, for people to edit
    authority.crt, authority.key     the certificate authority of the link; authority-2 is the next one
    server.crt, server.key           the coordinator's certificate, renewed by itself
    plan.key        signs plans; its public half is in the roster
    root.pub        the consortium's root; root.key lies beside it in a demonstration only
    foedus.db       the database; objects/ holds adapters and vectors

Knows no sites and no runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.certificates import (
    Authority,
    generate_tls_key,
    issued_by,
    lasts_for,
    pem,
    read_certificate,
    read_tls_key,
    tls_key_pem,
)
from foedus_common.clock import DAY, Clock
from foedus_common.enrolment import check_address
from foedus_common.errors import LocalError
from foedus_common.identity import generate_key, public_bytes, public_pem, read_key, read_public_key, write_key
from foedus_common.link.transport import TlsIdentity
from foedus_common.private_files import create_private, private_folder, read_private, replace_private
from foedus_common.randomness import RandomBytes
from foedus_common.tables import parse, read_toml
from foedus_server.store import Store, parse_url

SETTINGS = "foedus.toml"
DATABASE = "foedus.db"
RENEW_DAYS = 30


@dataclass(frozen=True)
class Link:
    """Where the coordinator listens for sites: certificates on `port`, tokens on `enrolment_port`.

    certificate, certificate_key: PEM files to show instead of a certificate of the home's own authority; sites then
    need `authorities` in their settings. "" for the home's own.
    """

    listen: str = "127.0.0.1"
    port: int = 8443
    enrolment_port: int = 8444
    certificate: str = ""
    certificate_key: str = ""

    def __post_init__(self) -> None:
        for name, port in (("port", self.port), ("enrolment_port", self.enrolment_port)):
            if not 0 < port < 1 << 16:
                raise LocalError(f"[link] {name} is {port}; a port is a number from 1 to 65535.")
        if bool(self.certificate) != bool(self.certificate_key):
            raise LocalError("[link] certificate and certificate_key belong together; give both or neither.")


@dataclass(frozen=True)
class Patience:
    """How long a round waits: `stage_seconds` for the answers of one cryptographic stage, `absent_seconds` in training
    for a site that has been away so long that the others should not wait for it, and `retry_seconds` before a round is
    tried again, twice as long each time."""

    stage_seconds: float = 20.0
    absent_seconds: float = 60.0
    retry_seconds: float = 2.0

    def __post_init__(self) -> None:
        if not all(0 < seconds < math.inf for seconds in (self.stage_seconds, self.absent_seconds, self.retry_seconds)):
            raise LocalError("[patience] stage_seconds, absent_seconds and retry_seconds must be above 0.")


@dataclass(frozen=True)
class Settings:
    """foedus.toml. host: the name or address under which sites reach the coordinator; database: a URL, "" for foedus.db
    in the home."""

    federation: str
    host: str = "127.0.0.1"
    database: str = ""
    link: Link = field(default_factory=Link)
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        if not (0 < len(self.federation) <= 48 and self.federation.isprintable()):
            raise LocalError("The federation's name must have 1 to 48 printable characters.")
        if self.database:
            parse_url(self.database)
        if self.link.port == self.link.enrolment_port:
            raise LocalError(f"The port {self.link.port} is given twice; link and enrolment need one each.")
        check_address(self.link_address)
        check_address(self.enrolment_address)

    def to_toml(self) -> str:
        """The file that `foedus init` writes. A JSON text is a TOML text too."""
        return (
            f"federation = {json.dumps(self.federation)}\n"
            f"host = {json.dumps(self.host)}  # the name or address under which sites reach this machine\n"
            f"database = {json.dumps(self.database)}  # URL; empty: foedus.db in this folder\n\n"
            f"[link]\n"
            f"listen = {json.dumps(self.link.listen)}\n"
            f"port = {self.link.port}\n"
            f"enrolment_port = {self.link.enrolment_port}\n"
            f"certificate = {json.dumps(self.link.certificate)}  # PEM file to show; empty: of this home's authority\n"
            f"certificate_key = {json.dumps(self.link.certificate_key)}\n\n"
            f"[patience]\n"
            f"stage_seconds = {self.patience.stage_seconds}  # for the answers of one cryptographic stage\n"
            f"absent_seconds = {self.patience.absent_seconds}  # in training, for a site that is away\n"
            f"retry_seconds = {self.patience.retry_seconds}  # before a round is tried again; doubles each time\n"
        )

    @property
    def link_address(self) -> str:
        """As sites dial it."""
        return f"{_bracketed(self.host)}:{self.link.port}"

    @property
    def enrolment_address(self) -> str:
        return f"{_bracketed(self.host)}:{self.link.enrolment_port}"

    @property
    def listen_address(self) -> str:
        """As the coordinator binds it."""
        return f"{_bracketed(self.link.listen)}:{self.link.port}"

    @property
    def enrolment_listen_address(self) -> str:
        return f"{_bracketed(self.link.listen)}:{self.link.enrolment_port}"


def home_path(option: Path | None, environment: Mapping[str, str]) -> Path:
    """`--home`, else FOEDUS_HOME, else ./foedus-home; absolute."""
    return (option or Path(environment.get("FOEDUS_HOME") or "foedus-home")).absolute()


@dataclass(frozen=True)
class Home:
    """An operator's home that exists. Every function that reads a key raises LocalError when others can read it."""

    path: Path
    settings: Settings

    @classmethod
    def open(cls, path: Path) -> Home:
        """Raises LocalError when there is no home, its settings are wrong, or others can look into it."""
        if not (path / SETTINGS).exists():
            raise LocalError(f"There is no Foedus home at {path}; `foedus init` makes one, --home names another.")
        private_folder(path)
        return cls(path, parse(Settings, read_toml(path / SETTINGS), str(path / SETTINGS)))

    @property
    def objects(self) -> Path:
        return self.path / "objects"

    @property
    def demonstration(self) -> bool:
        """Whether the root's private key lies on this machine, which is for demonstrations only."""
        return (self.path / "root.key").exists()

    def store(self, clock: Clock) -> Store:
        return Store.open(_database_url(self.path, self.settings), clock)

    def authorities(self) -> tuple[Authority, ...]:
        """Oldest first; the last one signs sites' certificates."""
        count = len(list(self.path.glob("authority*.crt")))
        return tuple(map(self._authority, range(1, count + 1)))

    def shown_authority(self) -> Authority:
        """The one that signed what the link shows; the oldest while it has shown nothing."""
        known, shown = self.authorities(), self.path / "server.crt"
        if not shown.exists():
            return known[0]
        certificate = read_certificate(shown)
        return next((each for each in known if issued_by(certificate, each.certificate)), known[0])

    def _given_certificate(self) -> tuple[bytes, bytes]:
        """What foedus.toml says is to be shown, and its key, PEM. Raises LocalError when either cannot be used."""
        link = self.settings.link
        chain, key = self.path / link.certificate, self.path / link.certificate_key
        read_certificate(chain)
        return chain.read_bytes(), read_private(key, 1 << 16)

    def authorities_since(self, first: Authority) -> tuple[bytes, ...]:
        """DER of `first` and those made after it."""
        known = [each.der for each in self.authorities()]
        return tuple(known[known.index(first.der) :])

    def add_authority(self, random: RandomBytes, clock: Clock) -> Authority:
        """Make the next authority's key and certificate."""
        number = len(self.authorities()) + 1
        authority = Authority.create(self.settings.federation, random, clock.now(), number)
        replace_private(self.path / f"{_authority_name(number)}.key", tls_key_pem(authority.key))
        create_private(self.path / f"{_authority_name(number)}.crt", pem(authority.der))  # last: it counts from here on
        return authority

    def _authority(self, number: int) -> Authority:
        stem = self.path / _authority_name(number)
        return Authority(read_certificate(stem.with_suffix(".crt")), read_tls_key(stem.with_suffix(".key")))

    def plan_key(self) -> Ed25519PrivateKey:
        return read_key(self.path / "plan.key")

    def root_public_key(self) -> bytes:
        return read_public_key(self.path / "root.pub")

    def root_key(self) -> Ed25519PrivateKey:
        """Raises LocalError unless this home is a demonstration."""
        if not self.demonstration:
            raise LocalError("The root key is not on this machine; give its file with --root-key.")
        return read_key(self.path / "root.key")

    def tls(self, random: RandomBytes, clock: Clock, by: Authority | None = None) -> TlsIdentity:
        """What the link shows to sites, and trusts of them. The certificate is issued anew when it nears its end, when
        `host` was changed, or when another authority than the one before is to sign it (`by`)."""
        key, now = read_tls_key(self.path / "server.key"), clock.now()
        shown, hosts = self.path / "server.crt", _hosts(self.settings)
        by = by or self.shown_authority()
        if (
            not shown.exists()
            or not lasts_for(read_certificate(shown), hosts, RENEW_DAYS * DAY, now)
            or not issued_by(read_certificate(shown), by.certificate)
        ):
            replace_private(shown, pem(by.issue_server(hosts, key.public_key(), random, now)))
        trusted = b"".join(map(pem, self.authorities_since(by)))
        if self.settings.link.certificate:
            return TlsIdentity(*self._given_certificate(), trusted)
        return TlsIdentity(shown.read_bytes(), tls_key_pem(key), trusted)


def init(
    path: Path,
    settings: Settings,
    *,
    root_public_key: bytes | None,
    random: RandomBytes,
    clock: Clock,
) -> Home:
    """Make a home: all of it or nothing.

    root_public_key: 32 bytes of the consortium's root, whose private half is elsewhere (`create_root_key`); None for a
    demonstration, which makes a root key and keeps it in the home.

    Raises:
        LocalError: something is at `path` already.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise LocalError(f"{path} exists and is not empty; choose another home with --home.")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        if root_public_key is None:
            root_public_key = create_root_key(draft / "root.key", random)
        create_private(draft / "root.pub", public_pem(root_public_key))
        write_key(draft / "plan.key", generate_key(random))
        authority = Authority.create(settings.federation, random, clock.now())
        create_private(draft / "authority.key", tls_key_pem(authority.key))
        create_private(draft / "authority.crt", pem(authority.der))
        create_private(draft / "server.key", tls_key_pem(generate_tls_key(random)))
        create_private(draft / SETTINGS, settings.to_toml().encode())
        Store.create(_database_url(draft, settings), clock).close()
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft)
        raise
    return Home(path, settings)


def put_database_back(draft: Path, database: str | None, clock: Clock) -> Store:
    """Bring the database of a restored home to where it belongs: out of the file that was in the backup, into the one
    that foedus.toml names, or `database` (None: as it was; a URL, "" for the file), which foedus.toml then names.

    Raises LocalError when that is not to be had, or holds a coordinator already.
    """
    file, settings = draft / DATABASE, draft / SETTINGS
    before = str(read_toml(settings).get("database", ""))
    url = before if database is None else database
    if url != before:
        kept = parse(Settings, read_toml(settings), str(settings))
        replace_private(settings, dataclasses.replace(kept, database=url).to_toml().encode())
    if not url:
        return Store.open(f"sqlite:///{file}", clock)
    with closing(Store.open(f"sqlite:///{file}", clock)) as restored:
        restored.database.copy_into(url)
    file.unlink()
    return Store.open(url, clock)


def create_root_key(path: Path, random: RandomBytes) -> bytes:
    """Make the consortium's root key in a file of mode 0600, on a machine that is kept offline; gives the public half.

    Raises:
        LocalError: the file exists.
    """
    key = generate_key(random)
    write_key(path, key)
    return public_bytes(key)


def _authority_name(number: int) -> str:
    return "authority" if number == 1 else f"authority-{number}"


def _database_url(home: Path, settings: Settings) -> str:
    return settings.database or f"sqlite:///{home / DATABASE}"


def _hosts(settings: Settings) -> list[str]:
    """What the server's certificate is for; the machine's own checks come in over the loopback address."""
    return list(dict.fromkeys([settings.host, "localhost", "127.0.0.1"]))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
