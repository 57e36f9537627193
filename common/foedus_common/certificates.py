"""The certificates that open the link: a small authority of the federation's own (X.509, RFC 5280; ECDSA P-256).

They say which site is calling and nothing more: what a site is trusted with follows from the roster (`identity`).
A site's certificate carries the URI `foedus://site/NAME` as its subject alternative name.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from foedus_common.clock import DAY, utc
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import check_site_name
from foedus_common.private_files import read_private
from foedus_common.randomness import RandomBytes

SITE_DAYS = 90
SERVER_DAYS = 397
AUTHORITY_DAYS = 3_650
CLOCK_SKEW = 3_600
"""Certificates begin an hour early, for machines whose clocks run behind."""

MAX_CERTIFICATE_BYTES = 4_096
_MALFORMED = (
    *(ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.UnsupportedGeneralNameType),
    InternalError,  # for a key of another kind than it says
)
SITE_URI = "foedus://site/"
"""What a site's URI begins with; its name follows."""
_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


# --- Keys ---


def generate_tls_key(random: RandomBytes) -> ec.EllipticCurvePrivateKey:
    """A P-256 key; 48 random bytes modulo the order leave a bias below 2^-128 (FIPS 186-5, A.2.1)."""
    return ec.derive_private_key(int.from_bytes(random(48)) % (_P256_ORDER - 1) + 1, ec.SECP256R1())


def tls_key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_tls_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Raises LocalError when the file is missing, can be read by others, or holds no P-256 private key."""
    try:
        key = load_pem_private_key(read_private(path, MAX_CERTIFICATE_BYTES), password=None)
    except _MALFORMED:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise LocalError(f"{path} holds no P-256 private key in PEM.")
    return key


# --- Names ---


def site_uri(name: str) -> str:
    return SITE_URI + name


def site_of(certificate: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The site that a certificate or a request for one names.

    Raises:
        RemoteError: BAD_MESSAGE unless its subject alternative name is exactly one site's URI.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        (uri,) = names
        name = uri.value if isinstance(uri, x509.UniformResourceIdentifier) else ""
        if not name.startswith(SITE_URI):
            raise ValueError
        check_site_name(name.removeprefix(SITE_URI))
    except (*_MALFORMED, x509.ExtensionNotFound, x509.DuplicateExtension, LocalError):
        raise RemoteError(Reason.BAD_MESSAGE, "the certificate names no site.") from None
    return name.removeprefix(SITE_URI)


def fingerprint_of(certificate_der: bytes) -> bytes:
    """SHA-256 of the certificate's DER bytes (32 bytes): how the coordinator's allow-list names it."""
    return hashlib.sha256(certificate_der).digest()


def pem(certificate_der: bytes) -> bytes:
    return parse_certificate(certificate_der).public_bytes(Encoding.PEM)


def parse_certificate(certificate_der: bytes) -> x509.Certificate:
    """Raises RemoteError(BAD_MESSAGE) when the bytes are too long or no X.509 certificate."""
    try:
        if len(certificate_der) > MAX_CERTIFICATE_BYTES:
            raise ValueError
        certificate = x509.load_der_x509_certificate(certificate_der)
        certificate.public_key()
    except _MALFORMED:
        raise RemoteError(Reason.BAD_MESSAGE, "the bytes are no X.509 certificate with a known kind of key.") from None
    return certificate


def read_certificate(path: Path) -> x509.Certificate:
    """Raises LocalError when the file is missing or holds no certificate in PEM."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}.") from None
    except _MALFORMED:
        raise LocalError(f"{path} holds no certificate in PEM.") from None


def read_authorities(path: Path) -> bytes:
    """The certificates of a bundle, PEM, and nothing else that the file may hold.

    Raises LocalError when it is missing, holds no certificate, or one that is no certificate authority's.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
        constraints = [each.extensions.get_extension_for_class(x509.BasicConstraints).value for each in found]
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}.") from None
    except (*_MALFORMED, x509.ExtensionNotFound, x509.DuplicateExtension):
        constraints = []
    if not constraints or not all(each.ca for each in constraints):
        raise LocalError(f"{path} holds something else than certificates of authorities in PEM.")
    return b"".join(each.public_bytes(Encoding.PEM) for each in found)


def lasts_for(certificate: x509.Certificate, hosts: Sequence[str], seconds: float, now: float) -> bool:
    """Whether a server's certificate is for exactly these hosts and stays valid for so many seconds."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names == _host_names(hosts) and certificate.not_valid_after_utc >= utc(now + seconds)


# --- A site's request ---


def request_certificate(name: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate signing request (PKCS #10, DER) for the site `name`."""
    check_site_name(name)
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return builder.add_extension(_site_names(name), critical=False).sign(key, SHA256()).public_bytes(Encoding.DER)


def check_request(request_der: bytes, name: str) -> ec.EllipticCurvePublicKey:
    """The key that asks to be certified as the site `name`.

    Raises:
        RemoteError: BAD_MESSAGE when the request is malformed, names someone else or is for no P-256 key;
            BAD_SIGNATURE when it is not signed with the key it is for.
    """
    try:
        if len(request_der) > MAX_CERTIFICATE_BYTES:
            raise ValueError
        request = x509.load_der_x509_csr(request_der)
        key, signed = request.public_key(), request.is_signature_valid
    except _MALFORMED:
        raise RemoteError(Reason.BAD_MESSAGE, "the bytes are no certificate signing request.") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RemoteError(Reason.BAD_MESSAGE, "the certificate request is not for a P-256 key.")
    if not signed:
        raise RemoteError(Reason.BAD_SIGNATURE, "the certificate request is not signed with the key it is for.")
    if site_of(request) != name:
        raise RemoteError(Reason.BAD_MESSAGE, "the certificate request names another site than the token.")
    return key


# --- The authority ---


@dataclass(frozen=True)
class Authority:
    """The federation's certificate authority: its certificate and the key that signs the others."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, federation: str, random: RandomBytes, now: float, number: int = 1) -> Authority:
        """number: counts a federation's authorities, so that no two have the same name."""
        key = generate_tls_key(random)
        subject = _subject(f"{federation} Foedus CA{f' {number}' if number > 1 else ''}")
        usage = _usage(key_cert_sign=True, crl_sign=True)
        certificate = (
            _builder(subject, subject, key.public_key(), AUTHORITY_DAYS, random, now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, SHA256())
        )
        return cls(certificate, key)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def sha256(self) -> bytes:
        return fingerprint_of(self.der)

    def issue_server(
        self, hosts: Sequence[str], key: ec.EllipticCurvePublicKey, random: RandomBytes, now: float
    ) -> bytes:
        """DER of a certificate for the coordinator under each of `hosts`, DNS names or IP addresses."""
        return self._issue(hosts[0], _host_names(hosts), ExtendedKeyUsageOID.SERVER_AUTH, key, SERVER_DAYS, random, now)

    def issue_site(self, name: str, key: ec.EllipticCurvePublicKey, random: RandomBytes, now: float) -> bytes:
        """DER of a client certificate for the site `name`, valid for 90 days."""
        names = _site_names(name)
        return self._issue(name, names, ExtendedKeyUsageOID.CLIENT_AUTH, key, SITE_DAYS, random, now)

    def _issue(
        self,
        subject: str,
        names: x509.SubjectAlternativeName,
        use: x509.ObjectIdentifier,
        key: ec.EllipticCurvePublicKey,
        days: int,
        random: RandomBytes,
        now: float,
    ) -> bytes:
        certificate = (
            _builder(_subject(subject), self.certificate.subject, key, days, random, now)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, SHA256())
        )
        return certificate.public_bytes(Encoding.DER)


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority's key signed the certificate, in the authority's name."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (*_MALFORMED, InvalidSignature):
        return False
    return True


def check_site_certificate(
    certificate_der: bytes, authorities: Sequence[bytes], name: str, key: ec.EllipticCurvePublicKey, now: float
) -> x509.Certificate:
    """What a site checks of the certificate it was given. authorities: those that may have signed it, DER.

    Raises:
        RemoteError: BAD_SIGNATURE when another authority signed it; BAD_MESSAGE when it names another site, is for
            another key, or is not valid now.
    """
    certificate = parse_certificate(certificate_der)
    if not any(issued_by(certificate, parse_certificate(authority)) for authority in authorities):
        raise RemoteError(Reason.BAD_SIGNATURE, "the certificate is not signed by the federation's authority.")
    if site_of(certificate) != name:
        raise RemoteError(Reason.BAD_MESSAGE, "the certificate names another site.")
    if certificate.public_key() != key:
        raise RemoteError(Reason.BAD_MESSAGE, "the certificate is for another key.")
    if not certificate.not_valid_before_utc <= utc(now) <= certificate.not_valid_after_utc:
        raise RemoteError(Reason.BAD_MESSAGE, "the certificate is not valid now; check this machine's clock.")
    return certificate


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _site_names(name: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(site_uri(name))])


def _host_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([_host_name(host) for host in hosts])


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    random: RandomBytes,
    now: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(int.from_bytes(random(20)) >> 1)
        .not_valid_before(utc(now - CLOCK_SKEW))
        .not_valid_after(utc(now + days * DAY))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
