"""Certificates and keys change while everything runs: coordinator and daemon are composed as the programs do it, with
real TLS between them, and nobody starts anything anew.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from foedus_client.config import SiteHome
from foedus_client.daemon import serve
from foedus_client.enrol import Membership, join
from foedus_client.ledger.ledger import KEY
from foedus_client.link import renewal
from foedus_client.link.site_link import admission
from foedus_client.store import SiteStore
from foedus_common.certificates import fingerprint_of, pem
from foedus_common.clock import DAY, SystemClock
from foedus_common.errors import LocalError
from foedus_common.link.transport import TlsIdentity
from foedus_common.randomness import system_random
from foedus_server import service
from foedus_server.config import Link, Settings
from foedus_server.service import Service
from foedus_simulations.parties import free_ports, until
from known_sites import join_site
from loopback import SECONDS, certificate_shown
from operators import Operator
from tiny_model import rows


class ShiftedClock(SystemClock):
    """The machine's clock, so many seconds off. TLS goes by the machine's own."""

    offset = 0.0

    def now(self) -> float:
        return super().now() + self.offset


class World:
    """A coordinator that is up since 61 days, with a certificate for 27 more, and a member since then."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(service, "RENEW_SECONDS", 0.0)
        monkeypatch.setattr(renewal, "AGAIN_SECONDS", 0.05)  # the question may come between two listeners
        self.folder, self.clock, self.home = folder, ShiftedClock(), folder / "north"
        self.clock.offset = -370 * DAY
        port, enrolment = free_ports(2)
        settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment))
        self.operator = Operator(folder / "operator", self.clock, settings)
        self.operator.home.tls(system_random, self.clock)
        self.clock.offset = -61 * DAY
        SiteHome.create(self.home)
        join_site(self.operator, self.home, "north", self.clock, rows())
        self.service = Service(self.operator.home, self.clock, system_random)
        self.stopping, self._threads = threading.Event(), []
        self.service.start()
        self.run(self.service.serve, self.stopping)

    def run(self, *call: object) -> None:
        self._threads.append(threading.Thread(target=call[0], args=call[1:]))  # type: ignore[arg-type]
        self._threads[-1].start()

    def start_daemon(self) -> None:
        self.run(serve, SiteHome.open(self.home), self.folder / "state", self.clock, system_random, self.stopping)

    def connected_with(self) -> bytes | None:
        """SHA-256 of the certificate that the site's stream was opened with."""
        stream = self.service.link._service._streams.get("north")
        return stream.peer.certificate_sha256 if stream else None

    def await_connection(self) -> None:
        """With the certificate that the site's home holds."""
        until(lambda: self.connected_with() == self.held(), SECONDS, "a connection with the newest certificate")

    def held(self) -> bytes:
        certificate = load_pem_x509_certificate((self.home / "identity" / "tls.crt").read_bytes())
        return fingerprint_of(certificate.public_bytes(Encoding.DER))

    def shown(self) -> bytes:
        """The coordinator's certificate, DER, as a new connection sees it."""
        return certificate_shown(self.service.link.enrol_address)

    def close(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join()
        self.service.stop(0.5)
        self.operator.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World(tmp_path, monkeypatch)
    yield world
    world.close()


def test_both_certificates_are_renewed_while_everything_runs(world: World) -> None:
    before, shown = world.held(), world.shown()
    world.clock.offset = 0.0  # the site's has 29 days left, the coordinator's 27
    world.operator.sign_roster()
    world.start_daemon()
    until(lambda: world.held() != before, SECONDS, "the site's renewal")
    world.await_connection()
    until(lambda: world.shown() != shown, SECONDS, "the coordinator's renewal")
    assert Membership(world.home).certificate_ends() > world.clock.now() + 89 * DAY
    assert Membership(world.home).roster_epoch == 2
    assert {certificate.sha256 for certificate in world.operator.store.members.certificates()} == {before, world.held()}


def test_new_keys_are_taken_up_by_the_daemon_that_runs(world: World) -> None:
    world.start_daemon()
    world.await_connection()
    before = Membership(world.home).public_key

    def approve(public_key: bytes) -> None:
        world.operator.registry.approve("north", public_key)
        assert world.connected_with() == world.held()  # the old keys hold until the roster lists the new ones
        world.operator.sign_roster()

    token = world.operator.registry.rotate("north")
    new = join(world.home, token, world.operator.registry.enrol, approve, random=system_random, clock=world.clock)
    world.await_connection()
    assert new.public_key != before
    store = SiteStore(world.home / "site.db", world.clock)
    until(lambda: store.meta(KEY) == new.public_key.hex(), SECONDS, "the ledger's change of keys")
    store.close()


def test_a_new_authority_is_taken_up_while_everything_runs(world: World) -> None:
    world.clock.offset = -8 * DAY
    old, address = world.operator.home.shown_authority(), world.service.link.address
    world.operator.registry.authorities.rotate()
    world.start_daemon()
    until(lambda: Membership(world.home).tls().authority.count(b"BEGIN") == 2, SECONDS, "the site's trusting both")
    world.await_connection()
    tls = Membership(world.home).tls()
    who_missed_it = dataclasses.replace(tls, authority=pem(old.der))
    assert is_trusted(address, who_missed_it)
    world.clock.offset = 0.0
    until(lambda: not is_trusted(address, who_missed_it), SECONDS, "the new authority's being shown")
    assert is_trusted(address, tls)
    world.await_connection()


def is_trusted(address: str, tls: TlsIdentity) -> bool:
    """Whether a site with these authorities believes that it speaks to the coordinator."""
    try:
        admission(address, tls)
    except LocalError as error:
        return "did not sign" not in str(error)
    return True


def test_a_revocation_ends_a_daemon_s_session(world: World) -> None:
    world.start_daemon()
    world.await_connection()
    world.operator.registry.revoke("north")
    until(lambda: world.connected_with() is None, SECONDS, "the end of the session")
    assert world.service.link.connected() == {}
