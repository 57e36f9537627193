"""Certificates that OpenSSL accepts for mutual TLS 1.3, and every way in which one is not the right one."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.certificates import (
    MAX_CERTIFICATE_BYTES,
    Authority,
    check_request,
    check_site_certificate,
    fingerprint_of,
    generate_tls_key,
    lasts_for,
    parse_certificate,
    pem,
    read_certificate,
    read_tls_key,
    request_certificate,
    site_of,
    tls_key_pem,
)
from foedus_common.clock import DAY, SystemClock
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import generate_key, write_key
from foedus_common.private_files import create_private
from seeded import seeded

RANDOM = seeded("certificates")
NOW = SystemClock().now()  # OpenSSL reads the machine's clock
AUTHORITY = Authority.create("Test", RANDOM, NOW)
STRANGER = Authority.create("Test", RANDOM, NOW)
KEY = generate_tls_key(RANDOM)
CERTIFICATE = AUTHORITY.issue_site("north", KEY.public_key(), RANDOM, NOW)
REQUEST = request_certificate("north", KEY)


def check(
    certificate: bytes = CERTIFICATE, authority: Authority = AUTHORITY, name: str = "north", now: float = NOW
) -> x509.Certificate:
    return check_site_certificate(certificate, [authority.der], name, KEY.public_key(), now)


# --- The handshake ---


def handshake(tmp_path: Path, site_authority: Authority, host: str, listed: list[str]) -> str:
    """TLS 1.3 in memory between a coordinator for `listed` and a site that dials `host`; the site's URI as seen."""
    server_key = generate_tls_key(RANDOM)
    server_der = AUTHORITY.issue_server(listed, server_key.public_key(), RANDOM, NOW)
    site_der = site_authority.issue_site("north", KEY.public_key(), RANDOM, NOW)
    server = context(tmp_path / "server", ssl.PROTOCOL_TLS_SERVER, server_der, server_key)
    server.verify_mode = ssl.CERT_REQUIRED
    site = context(tmp_path / "site", ssl.PROTOCOL_TLS_CLIENT, site_der, KEY)
    to_server, to_site = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_site, server_side=True),
        site.wrap_bio(to_site, to_server, server_hostname=host),
    ]
    for _ in range(3):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    seen = ends[0].getpeercert()
    assert seen
    return str(seen["subjectAltName"][0][1])


def context(folder: Path, protocol: int, der: bytes, key: ec.EllipticCurvePrivateKey) -> ssl.SSLContext:
    folder.mkdir()
    (folder / "crt").write_bytes(pem(der))
    (folder / "key").write_bytes(tls_key_pem(key))
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(folder / "crt", folder / "key")
    context.load_verify_locations(cadata=pem(AUTHORITY.der).decode())
    return context


@pytest.mark.parametrize("host", ["coordinator.example", "127.0.0.1", "::1"])
def test_openssl_accepts_both_ends(tmp_path: Path, host: str) -> None:
    assert handshake(tmp_path, AUTHORITY, host, ["coordinator.example", "127.0.0.1", "::1"]) == "foedus://site/north"


def test_openssl_refuses_another_host(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(tmp_path, AUTHORITY, "other.example", ["coordinator.example"])


def test_openssl_refuses_a_site_of_another_authority(tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, STRANGER, "coordinator.example", ["coordinator.example"])


# --- What a certificate says ---


def test_a_sites_certificate_is_for_clients_for_90_days_and_no_authority() -> None:
    certificate = check()
    extensions = certificate.extensions
    assert site_of(certificate) == "north"
    assert list(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert abs((certificate.not_valid_after_utc.timestamp() - NOW) / DAY - 90) < 1e-4
    assert fingerprint_of(CERTIFICATE) == certificate.fingerprint(SHA256())


def test_keys_follow_from_the_random_bytes_given() -> None:
    # 48 zero bytes give the scalar 1, whose public point is the generator of P-256 (FIPS 186-5, SP 800-186).
    assert generate_tls_key(bytes).private_numbers().private_value == 1
    generator = generate_tls_key(bytes).public_key().public_numbers()
    assert f"{generator.x:064x}" == "6b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"


@pytest.mark.parametrize(
    ("certificate", "authority", "name", "now", "reason"),
    [
        (CERTIFICATE, STRANGER, "north", NOW, Reason.BAD_SIGNATURE),
        (CERTIFICATE, AUTHORITY, "south", NOW, Reason.BAD_MESSAGE),
        (CERTIFICATE, AUTHORITY, "north", NOW + 91 * DAY, Reason.BAD_MESSAGE),
        (CERTIFICATE, AUTHORITY, "north", NOW - DAY, Reason.BAD_MESSAGE),
        (
            AUTHORITY.issue_site("north", generate_tls_key(RANDOM).public_key(), RANDOM, NOW),
            AUTHORITY,
            "north",
            NOW,
            Reason.BAD_MESSAGE,
        ),
        (AUTHORITY.issue_server(["north"], KEY.public_key(), RANDOM, NOW), AUTHORITY, "north", NOW, Reason.BAD_MESSAGE),
        (AUTHORITY.der, AUTHORITY, "north", NOW, Reason.BAD_MESSAGE),
    ],
    ids=["stranger", "other name", "ended", "not begun", "other key", "server", "authority"],
)
def test_a_site_refuses_a_certificate_that_is_not_its_own(
    certificate: bytes, authority: Authority, name: str, now: float, reason: Reason
) -> None:
    with pytest.raises(RemoteError) as error:
        check(certificate, authority, name, now)
    assert error.value.reason is reason


@given(st.integers(0, len(CERTIFICATE) - 1), st.integers(1, 255))
def test_no_byte_of_a_certificate_can_be_changed(position: int, change: int) -> None:
    data = bytearray(CERTIFICATE)
    data[position] ^= change
    with pytest.raises(RemoteError):
        check(bytes(data))


# --- A site's request ---


def test_a_request_proves_its_key_and_its_name() -> None:
    assert check_request(REQUEST, "north") == KEY.public_key()
    with pytest.raises(RemoteError, match="another site than the token"):
        check_request(REQUEST, "south")


@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_no_byte_of_a_request_can_be_changed(position: int, change: int) -> None:
    data = bytearray(REQUEST)
    data[position] ^= change
    with pytest.raises(RemoteError):
        check_request(bytes(data), "north")


@given(st.binary(max_size=64))
def test_bytes_that_are_no_certificate_are_bad_messages(data: bytes) -> None:
    for parse in (parse_certificate, lambda data: check_request(data, "north")):
        with pytest.raises(RemoteError):
            parse(data)


def signed_request(
    *names: x509.GeneralName, key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey = KEY
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    algorithm = SHA256() if isinstance(key, ec.EllipticCurvePrivateKey) else None
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


NORTH = x509.UniformResourceIdentifier("foedus://site/north")


@pytest.mark.parametrize(
    "request_der",
    [
        signed_request(),
        signed_request(x509.DNSName("north")),
        signed_request(NORTH, NORTH),
        signed_request(NORTH, x509.DNSName("coordinator.example")),
        signed_request(x509.UniformResourceIdentifier("https://north")),
        signed_request(x509.UniformResourceIdentifier("foedus://site/")),
        signed_request(x509.UniformResourceIdentifier("foedus://site/north/x")),
        signed_request(NORTH, key=ec.generate_private_key(ec.SECP384R1())),
        signed_request(NORTH, key=generate_key(RANDOM)),
        bytes(MAX_CERTIFICATE_BYTES + 1),
    ],
)
def test_requests_for_other_names_or_kinds_of_key_are_bad_messages(request_der: bytes) -> None:
    with pytest.raises(RemoteError) as error:
        check_request(request_der, "north")
    assert error.value.reason is Reason.BAD_MESSAGE


# --- The coordinator's own ---


def test_a_servers_certificate_lasts_for_its_hosts_and_its_time() -> None:
    hosts = ["coordinator.example", "127.0.0.1"]
    certificate = parse_certificate(AUTHORITY.issue_server(hosts, KEY.public_key(), RANDOM, NOW))
    assert lasts_for(certificate, hosts, 396 * DAY, NOW)
    assert not lasts_for(certificate, hosts, 398 * DAY, NOW)
    assert not lasts_for(certificate, hosts[:1], DAY, NOW)
    assert not lasts_for(certificate, ["other.example", "127.0.0.1"], DAY, NOW)


def test_files_that_hold_something_else_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="cannot be read"):
        read_certificate(tmp_path / "crt")
    (tmp_path / "crt").write_bytes(b"x")
    with pytest.raises(LocalError, match="holds no certificate"):
        read_certificate(tmp_path / "crt")
    write_key(tmp_path / "key", generate_key(RANDOM))
    with pytest.raises(LocalError, match=r"holds no P-256 private key"):
        read_tls_key(tmp_path / "key")
    create_private(tmp_path / "tls", tls_key_pem(KEY))
    assert read_tls_key(tmp_path / "tls").public_key() == KEY.public_key()
