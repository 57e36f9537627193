"""A site's home folder: settings, database, objects, and the lock that lets one daemon use it.

    site.toml       settings and policy, for people to edit
    identity/       what makes this site a member (`enrol`)
    site.db         plans, ledger, outbox (`store`); objects/ holds adapters and vectors
    daemon.lock     held while the daemon runs

Knows nothing of the federation.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from foedus_client.ledger.high_water import HighWater
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_client.training.computing import Computing
from foedus_common.certificates import read_authorities
from foedus_common.clock import Clock
from foedus_common.enrolment import check_address
from foedus_common.errors import LocalError
from foedus_common.link.transport import TlsIdentity, check_proxy
from foedus_common.private_files import create_private, private_folder
from foedus_common.tables import parse, read_toml

SETTINGS = "site.toml"
TRIES, INSTANT = 10, 0.05
"""How often the daemon asks for its lock, and how many seconds apart."""


@dataclass(frozen=True, kw_only=True)
class SiteSettings(Computing):
    """site.toml. Raises LocalError for values that cannot be.

    coordinator, enrolment: "host:port" of its two ports; "" for those in the token. proxy: "http://host:port" through
    which both are reached; "" for what the environment's https_proxy and no_proxy say. authorities: a PEM file of those
    that, besides the federation's own, may vouch for the coordinator. max_storage_gb: of adapters and vectors, in 10^9
    bytes; above it nothing is downloaded. max_trainers: processes that hold a model, however many runs there are.
    """

    coordinator: str = ""
    enrolment: str = ""
    proxy: str = field(default="", repr=False)  # it may hold a password
    authorities: str = ""
    max_storage_gb: float = 16.0
    max_trainers: int = 2
    policy: SitePolicy = field(default_factory=SitePolicy)

    def __post_init__(self) -> None:
        super().__post_init__()
        for address in filter(None, (self.coordinator, self.enrolment)):
            check_address(address)
        if self.proxy:
            check_proxy(self.proxy)
        if not 0 < self.max_storage_gb < 1e9:
            raise LocalError("max_storage_gb must be above 0.")
        if self.max_trainers < 1:
            raise LocalError("max_trainers must be 1 or more.")

    def to_toml(self) -> str:
        """The file that `foedus-site join` writes. A JSON text is a TOML text too."""
        policy = self.policy
        return (
            f"coordinator = {json.dumps(self.coordinator)}  # host:port; empty: as in the token\n"
            f"enrolment = {json.dumps(self.enrolment)}  # host:port; empty: as in the token\n"
            f"proxy = {json.dumps(self.proxy)}  # http://host:port; empty: as https_proxy and no_proxy say\n"
            f"authorities = {json.dumps(self.authorities)}  # PEM file of others that may vouch for the coordinator\n"
            f"device = {json.dumps(self.device)}  # auto, cpu or cuda:0\n"
            f"dtype = {json.dumps(self.dtype)}  # auto, float32 or bfloat16\n"
            f"base_weights = {json.dumps(self.base_weights)}  # float32, bfloat16 or 4bit: less memory each\n"
            f"gradient_checkpointing = {json.dumps(self.gradient_checkpointing)}  # less memory, more time\n"
            f"tokens_per_batch = {self.tokens_per_batch}  # 0: 2048 on a CPU, on a GPU as many as fit\n"
            f"threads = {self.threads}  # 0: as many as there are cores\n"
            f"niceness = {self.niceness}  # 0 to 19: how far training stands back for other programs\n"
            f"max_trainers = {self.max_trainers}  # that hold a model at a time; with more runs they take turns\n"
            f"max_storage_gb = {self.max_storage_gb}  # of adapters and vectors; above it nothing is downloaded\n"
            "\n"
            "[policy]  # a plan above any of these is refused\n"
            f"max_epsilon_per_run = {policy.max_epsilon_per_run}\n"
            f"max_epsilon_per_day = {policy.max_epsilon_per_day}  # per dataset, within any 24 hours\n"
            f"max_epsilon_lifetime = {policy.max_epsilon_lifetime}  # per dataset, all runs together\n"
            f"delta = {policy.delta}  # at which all three are meant\n"
            f"min_sites = {policy.min_sites}\n"
            f"colluding = {policy.colluding}  # so many organisations that help the coordinator must learn nothing\n"
            f"must_include = {json.dumps(policy.must_include)}  # other organisations that have to be in every sum\n"
            f"base_models = {json.dumps(policy.base_models)}  # manifest hashes; empty: every model added here\n"
            f"tasks = {json.dumps(policy.tasks)}\n"
            f"max_rank = {policy.max_rank}\n"
            f"require_approval = {json.dumps(policy.require_approval)}  # a person approves every plan\n"
            f"secure_aggregation = {json.dumps(policy.secure_aggregation)}\n"
            f"allow_without_privacy = {json.dumps(policy.allow_without_privacy)}\n"
        )


def home_path(option: Path | None, environment: Mapping[str, str]) -> Path:
    """`--home`, else FOEDUS_HOME, else ./foedus-site-home; absolute."""
    return (option or Path(environment.get("FOEDUS_HOME") or "foedus-site-home")).absolute()


@dataclass(frozen=True)
class SiteHome:
    """A site's home that exists."""

    path: Path
    settings: SiteSettings

    @classmethod
    def create(cls, path: Path, settings: SiteSettings | None = None) -> SiteHome:
        """Make the folder (mode 0700) and its settings; a home that exists stays as it is."""
        private_folder(path)
        if not (path / SETTINGS).exists():
            create_private(path / SETTINGS, (settings or SiteSettings()).to_toml().encode())
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> SiteHome:
        """Raises LocalError when there is no home, its settings are wrong, or others can look into it."""
        if not (path / SETTINGS).exists():
            raise LocalError(f"There is no site home at {path}; `foedus-site join` makes one, --home names another.")
        private_folder(path)
        return cls(path, parse(SiteSettings, read_toml(path / SETTINGS), str(path / SETTINGS)))

    @property
    def database(self) -> Path:
        return self.path / "site.db"

    @property
    def objects(self) -> Path:
        return self.path / "objects"

    def store(self, clock: Clock, state: Path, mark: str) -> SiteStore:
        """The database, opened, with the high-water mark that belongs to it in `state`. mark: what it is called; a home
        keeps the one that it had first."""
        with closing(SiteStore(self.database, clock)) as store:
            if (name := store.meta("high_water")) is None:
                store.set_meta("high_water", name := mark)
        return SiteStore(self.database, clock, HighWater(state, name))

    def trusting(self, tls: TlsIdentity) -> TlsIdentity:
        """What also trusts the settings' own `authorities`. Raises LocalError when they cannot be read."""
        if not self.settings.authorities:
            return tls
        found = read_authorities(self.path / self.settings.authorities)  # a relative name is meant from the home
        return dataclasses.replace(tls, authority=tls.authority + found)

    def daemon_runs(self) -> bool:
        with self._lock_file() as descriptor:
            return not _locked(descriptor, fcntl.LOCK_SH)

    @contextmanager
    def daemon_lock(self) -> Iterator[None]:
        """Held while the daemon runs; the system lets go of it when the process ends, however it ends.

        `daemon_runs` holds it for an instant, and is waited for. Raises LocalError when another daemon has this home.
        """
        with self._lock_file() as descriptor:
            for _ in range(TRIES):
                if _locked(descriptor, fcntl.LOCK_EX):
                    break
                _instant()
            else:
                raise LocalError(f"A daemon is running on {self.path} already; stop it first, or use another --home.")
            yield

    @contextmanager
    def _lock_file(self) -> Iterator[int]:
        descriptor = os.open(self.path / "daemon.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _locked(descriptor: int, kind: int) -> bool:
    """Whether this process has the lock now. kind: for one alone (LOCK_EX) or for all who only look (LOCK_SH)."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _instant() -> None:
    threading.Event().wait(INSTANT)
