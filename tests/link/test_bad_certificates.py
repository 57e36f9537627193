"""Certificates that must not open the link: each is shown in a real handshake, and gets nothing. Where the handshake
lets it through, the journal says so.

A failure means that somebody without a membership could speak as a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from foedus_common.certificates import Authority, site_uri
from foedus_common.clock import SystemClock, utc
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link import foedus_pb2_grpc as pb_grpc
from foedus_common.link.transport import CHANNEL_OPTIONS, TlsIdentity
from foedus_common.objects import ObjectStore
from foedus_common.randomness import system_random
from foedus_server.link import service
from foedus_server.link.grid import LinkServer
from foedus_server.members.registry import ApprovedSites
from operators import Applicant, Operator

CLOCK = SystemClock()
NORTH = (x509.UniformResourceIdentifier(site_uri("north")),)


@dataclass
class Forgery:
    """A certificate as somebody might make it, with the key that it is for; by default one that looks right."""

    names: tuple[x509.GeneralName, ...] = NORTH
    begins: float = -3600
    ends: float = 86_400
    usages: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.CLIENT_AUTH,)
    authority: bool = False
    key: Any = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def signed(self, issuer: x509.Name, by: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
        """PEM of the certificate and of its key. Times are seconds from now."""
        now = utc(CLOCK.now())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")]))
            .issuer_name(issuer)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(seconds=self.begins))
            .not_valid_after(now + timedelta(seconds=self.ends))
            .add_extension(x509.BasicConstraints(ca=self.authority, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(self.usages), critical=True)
        )
        if self.names:
            builder = builder.add_extension(x509.SubjectAlternativeName(self.names), critical=False)
        private = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return builder.sign(by, SHA256()).public_bytes(Encoding.PEM), private


class World:
    """A coordinator with its link up, and the site north as a member."""

    def __init__(self, folder: Path) -> None:
        self.operator = Operator(folder / "operator", CLOCK)
        self.authority = self.operator.home.shown_authority()
        self.north = self.member(self.operator.registry.invite("north", "North Hospital"))
        self.link = LinkServer(
            address="127.0.0.1:0",
            enrol_address="127.0.0.1:0",
            tls=self.operator.registry.authorities.tls(),
            directory=ApprovedSites(self.operator.store, CLOCK),
            objects=ObjectStore(self.operator.home.objects),
            uploads=folder / "uploads",
            enrol=self.operator.registry.enrol,
            not_admitted=self.operator.registry.note_not_admitted,
        )
        self.link.start()

    def member(self, token: Any) -> TlsIdentity:
        applicant = Applicant(self.operator, token)
        applicant.ask()
        applicant.is_approved()
        self.operator.sign_roster()
        certificate = x509.load_der_x509_certificate(applicant.ask().certificate)  # type: ignore[union-attr]
        private = applicant.tls_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return TlsIdentity(certificate.public_bytes(Encoding.PEM), private, b"")

    def forged(self, forgery: Forgery, by: Authority | None = None) -> TlsIdentity:
        issuer = by or self.authority
        return TlsIdentity(*forgery.signed(issuer.certificate.subject, issuer.key), b"")

    def answer(self, shown: TlsIdentity) -> grpc.StatusCode:
        """What the coordinator says to who shows this; NOT_FOUND to who was let in."""
        trusted = self.operator.registry.authorities.tls().authority
        credentials = grpc.ssl_channel_credentials(trusted, shown.private_key, shown.certificate)
        with grpc.secure_channel(self.link.address, credentials, CHANNEL_OPTIONS) as channel:
            with pytest.raises(grpc.RpcError) as refused:
                pb_grpc.LinkStub(channel).Stat(pb.Object(), timeout=60)
            return refused.value.code()

    def journalled(self) -> list[str]:
        entries = [entry.event for entry in self.operator.store.database.entries()]
        return [event["site"] for event in entries if event["event"] == "link.refused"]

    def close(self) -> None:
        self.link.drain_and_stop(0.5)
        self.operator.close()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(service, "REFRESH_SECONDS", 60.0)  # or a busy machine's database would count as away
    world = World(tmp_path)
    yield world
    world.close()


def of_another_federation(world: World) -> TlsIdentity:
    return world.forged(Forgery(), Authority.create("Test", system_random, CLOCK.now()))


def self_signed(world: World) -> TlsIdentity:
    forgery = Forgery()
    return TlsIdentity(*forgery.signed(world.authority.certificate.subject, forgery.key), b"")


def signed_by_a_site(world: World) -> TlsIdentity:
    """A member's certificate is no authority's, whatever it signs."""
    issuer = x509.load_pem_x509_certificate(world.north.certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate, private = Forgery().signed(issuer.subject, key)
    return TlsIdentity(certificate + world.north.certificate, private, b"")


def revoked(world: World) -> TlsIdentity:
    world.operator.registry.revoke("north")
    return world.north


def superseded(world: World) -> TlsIdentity:
    world.member(world.operator.registry.rotate("north"))
    return world.north


def not_in_the_roster_yet(world: World) -> TlsIdentity:
    applicant = Applicant(world.operator, world.operator.registry.invite("south", "South Hospital"))
    applicant.ask()
    applicant.is_approved()
    return world.forged(Forgery(names=(x509.UniformResourceIdentifier(site_uri("south")),)))


def forged(**changes: Any) -> Callable[[World], TlsIdentity]:
    return lambda world: world.forged(Forgery(**changes))


HANDSHAKE, DENIED = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.PERMISSION_DENIED
BAD: dict[str, tuple[Callable[[World], TlsIdentity], grpc.StatusCode, list[str]]] = {
    "expired": (forged(begins=-7200, ends=-1), HANDSHAKE, []),
    "not valid yet": (forged(begins=3600), HANDSHAKE, []),
    "another federation's": (of_another_federation, HANDSHAKE, []),
    "self-signed": (self_signed, HANDSHAKE, []),
    "signed by a site": (signed_by_a_site, HANDSHAKE, []),
    "not for clients": (forged(usages=(ExtendedKeyUsageOID.SERVER_AUTH,)), HANDSHAKE, []),
    "without a name": (forged(names=()), DENIED, []),
    "a name that is no site's": (forged(names=(x509.DNSName("north"),)), DENIED, []),
    "two sites": (forged(names=(*NORTH, x509.UniformResourceIdentifier(site_uri("south")))), DENIED, []),
    "another site's name": (forged(names=(x509.UniformResourceIdentifier(site_uri("south")),)), DENIED, ["south"]),
    "the right name for another key": (forged(), DENIED, ["north"]),
    "an authority's": (forged(authority=True), DENIED, ["north"]),
    "a weak key": (forged(key=rsa.generate_private_key(65537, 1024)), DENIED, ["north"]),
    "revoked": (revoked, DENIED, ["north"]),
    "superseded by newer keys": (superseded, DENIED, ["north"]),
    "not in the roster yet": (not_in_the_roster_yet, DENIED, ["south"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_certificate_gets_nothing_and_is_journalled(world: World, case: str) -> None:
    shown, expected, journalled = BAD[case]
    assert world.answer(shown(world)) is expected
    assert world.journalled() == journalled


def test_the_right_certificate_is_let_in(world: World) -> None:
    """Or the table above would show nothing."""
    assert world.answer(world.north) is grpc.StatusCode.NOT_FOUND
    stolen = dataclasses.replace(world.north, private_key=Forgery().signed(x509.Name([]), Forgery().key)[1])
    assert world.answer(stolen) is HANDSHAKE
    assert world.journalled() == []
