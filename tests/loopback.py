"""A federation's certificates, a coordinator's link and sites' links on loopback, all real and all short-lived."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from foedus_client.link.site_link import LinkState, SiteLink
from foedus_common.link import foedus_pb2_grpc as pb_grpc
from foedus_common.link.contents import content_of, context_of
from foedus_common.link.transport import CHANNEL_OPTIONS, Timing, TlsIdentity
from foedus_common.objects import ObjectStore
from foedus_server.link.grid import LinkServer
from foedus_simulations.parties import free_ports

RUN = 4711
SECONDS = 60.0
"""In which whatever is to happen has happened, on a busy machine, too."""


class Authority:
    """A certificate authority with ECDSA P-256 keys."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = _pem(self._sign(self._name, self._key, None, authority=True))

    def issue(self, names: list[x509.GeneralName], trusts: bytes) -> TlsIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "foedus")])
        certificate = self._sign(subject, key, names, authority=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return TlsIdentity(certificate=_pem(certificate), private_key=private, authority=trusts)

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        names: list[x509.GeneralName] | None,
        *,
        authority: bool,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(tls: TlsIdentity) -> bytes:
    return x509.load_pem_x509_certificate(tls.certificate).fingerprint(hashes.SHA256())


def certificate_shown(address: str) -> bytes:
    """The certificate (DER) that a stranger is shown who trusts anybody."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    trusting.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    while True:
        with (
            suppress(OSError),  # between two listeners, as a cut line: whoever connects asks again
            socket.create_connection((host, int(port)), SECONDS) as plain,
            trusting.wrap_socket(plain) as secured,
        ):
            return secured.getpeercert(binary_form=True) or b""


@dataclass
class Directory:
    """Which certificate may speak for which site."""

    approved: dict[str, bytes] = field(default_factory=dict)

    def refresh(self) -> None:
        pass

    def site_for(self, san_name: str, certificate_sha256: bytes) -> bool:
        return self.approved.get(san_name) == certificate_sha256


class States:
    """What a site's link said about itself, to wait for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.seen: list[tuple[LinkState, str]] = []
        self._awaited = 0

    def __call__(self, state: LinkState, sentence: str) -> None:
        with self._changed:
            self.seen.append((state, sentence))
            self._changed.notify_all()

    def wait_for(self, state: LinkState) -> str:
        """The sentence that came with the first change to `state` after the change that was awaited last, however soon
        another one followed."""

        def reached() -> bool:
            return any(seen is state for seen, _ in self.seen[self._awaited :])

        with self._changed:
            assert self._changed.wait_for(reached, SECONDS), self.seen
            while self.seen[self._awaited][0] is not state:
                self._awaited += 1
            self._awaited += 1
            return self.seen[self._awaited - 1][1]


class Federation:
    """Starts coordinators and sites that know each other, and stops whatever is still up at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority("federation")
        here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        self.server_tls = self.authority.issue(here, self.authority.certificate)
        self.directory = Directory()
        self.objects = ObjectStore(folder / "coordinator" / "objects")
        self.address, self.enrol_address = (f"127.0.0.1:{port}" for port in free_ports(2))
        self.enrol: Callable[[bytes], bytes] = bytes
        self.timing = Timing()
        self._stops: list[Callable[[], None]] = []

    def tls_of(self, site: str, *, approved: bool = True) -> TlsIdentity:
        name = x509.UniformResourceIdentifier(f"foedus://site/{site}")
        tls = self.authority.issue([name], self.authority.certificate)
        if approved:
            self.directory.approved[site] = fingerprint(tls)
        return tls

    def coordinator(self) -> LinkServer:
        """A started link server; a later one listens where the first one did, and has the same files."""
        server = LinkServer(
            address=self.address,
            enrol_address=self.enrol_address,
            tls=self.server_tls,
            directory=self.directory,
            objects=self.objects,
            uploads=self.folder / "coordinator" / "uploads",
            enrol=lambda body: self.enrol(body),
            timing=self.timing,
        )
        server.start()
        self._stops.append(lambda: server.drain_and_stop(1.0))
        return server

    def site(
        self,
        name: str,
        app: ClientApp | None = None,
        *,
        tls: TlsIdentity | None = None,
        start: bool = True,
        **options: Any,
    ) -> tuple[SiteLink, States]:
        """A site's link, started with `app` (default: one that echoes)."""
        states = States()
        link = SiteLink(
            site=name,
            address=self.address,
            tls=tls or self.tls_of(name),
            objects=ObjectStore(self.folder / name / "objects"),
            on_state=states,
            **({"timing": self.timing} | options),
        )
        if start:
            link.start(app or echo(), context_of)
            self._stops.append(link.stop)
        return link, states

    def stub(self, tls: TlsIdentity | None) -> pb_grpc.LinkStub:
        """A client that plays by no rules; without `tls` it shows no certificate."""
        credentials = (
            grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)
            if tls
            else grpc.ssl_channel_credentials(self.authority.certificate)
        )
        channel = grpc.secure_channel(self.address, credentials, CHANNEL_OPTIONS)
        self._stops.append(channel.close)
        return pb_grpc.LinkStub(channel)

    def close(self) -> None:
        for stop in reversed(self._stops):
            stop()


def reply_with(body: bytes, message: Message) -> Message:
    return Message(content_of(body), reply_to=message)


def body(message: Message) -> bytes:
    value = message.content["foedus"]["body"]
    assert isinstance(value, bytes)
    return value


def echo() -> ClientApp:
    """An app that answers `query.keys` with the request's body, and its hash after it."""
    app = ClientApp()

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        return reply_with(body(message) + hashlib.sha256(body(message)).digest(), message)

    return app
