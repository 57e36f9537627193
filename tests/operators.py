"""An operator's home with its store and registry, and sites that ask to join it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.certificates import generate_tls_key
from foedus_common.clock import Clock, ManualClock
from foedus_common.enrolment import EnrolReply, EnrolRequest, Token, reply_from_bytes
from foedus_common.identity import Roster, generate_key, public_bytes
from foedus_server.config import Settings, init
from foedus_server.members.registry import Registry
from seeded import seeded


class Operator:
    """A demonstration's operator: the root key is at hand. The clock moves when told to, unless another is given."""

    def __init__(self, folder: Path, clock: Clock | None = None, settings: Settings | None = None) -> None:
        self.clock: Any = clock or ManualClock()
        self.random = seeded(folder.name)
        self.home = init(
            folder, settings or Settings("Test"), root_public_key=None, random=self.random, clock=self.clock
        )
        self.store = self.home.store(self.clock)
        self.registry = Registry(self.home, self.store, self.clock, self.random)

    def sign_roster(self) -> Roster:
        return self.registry.sign_roster(self.home.root_key())

    def events(self) -> list[str]:
        return [entry.event["event"] for entry in self.store.database.entries()]

    def close(self) -> None:
        self.store.close()


class Applicant:
    """A site's keys and the request it makes with a token, without a disk."""

    def __init__(self, operator: Operator, token: Token, *, key: Ed25519PrivateKey | None = None) -> None:
        self.operator = operator
        self.token = token
        self.key = key or generate_key(operator.random)
        self.public_key = public_bytes(self.key)
        self.tls_key = generate_tls_key(operator.random)
        self.request = EnrolRequest.make(token, self.key, self.tls_key)

    def ask(self) -> EnrolReply:
        return reply_from_bytes(self.operator.registry.enrol(self.request.to_bytes()))

    def is_approved(self) -> None:
        self.operator.registry.approve(self.token.name, self.public_key)
