"""How a site joins: the token that is pasted once, the site's request and the coordinator's reply.

The operator's token goes to the site by a way of their own (mail, telephone). It carries the certificate authority and
the root's public key, so that the site knows whom it talks to from the first byte, and a secret of which the
coordinator keeps only the hash. The request travels over TLS that authenticates the coordinator, hence the secret may
go in it as it is; it binds the token to the site's keys. The same request again asks how things stand.

Knows no transport, no disk and no database.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.canonical import digest, enc, labelled, unenc
from foedus_common.certificates import (
    MAX_CERTIFICATE_BYTES,
    check_request,
    check_site_certificate,
    parse_certificate,
    pem,
    request_certificate,
)
from foedus_common.clock import iso
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import (
    MAX_ROSTER_BYTES,
    SIGNATURE_BYTES,
    Roster,
    SignedRoster,
    check_org,
    check_site_name,
    public_bytes,
    verify,
)

PREFIX = "foedus1-"
SECRET_BYTES = 32
MAX_TOKEN_HOURS = 24
MAX_TOKEN_CHARACTERS = 4_096
MAX_REQUEST_BYTES = 8_192
MAX_REASON_CHARACTERS = 400
MAX_AUTHORITIES = 3
MAX_REPLY_BYTES = MAX_ROSTER_BYTES + SIGNATURE_BYTES + (1 + MAX_AUTHORITIES) * MAX_CERTIFICATE_BYTES + 64
_CHECKSUM_BYTES = 4
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")


# --- The token ---


@dataclass(frozen=True)
class Token:
    """What an operator hands to one site.

    name, org: whom it is for; the coordinator knows them by the secret.
    link_address, enrolment_address: "host:port" of the coordinator.
    authority: the certificate authority's certificate, DER; gRPC cannot pin a fingerprint.
    root_public_key: 32 raw bytes; the roster has to be signed with it.
    expires: Unix seconds; the request has to arrive before.
    """

    name: str
    org: str
    link_address: str
    enrolment_address: str
    authority: bytes
    root_public_key: bytes
    expires: int
    secret: bytes = field(repr=False)

    def encode(self) -> str:
        """One string to paste: the prefix, then base64url (RFC 4648) of the fields and a checksum over them."""
        body = enc(
            self.name,
            self.org,
            self.link_address,
            self.enrolment_address,
            self.authority,
            self.root_public_key,
            self.expires,
            self.secret,
        )
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @property
    def authority_pem(self) -> bytes:
        return pem(self.authority)


def decode_token(text: str) -> Token:
    """The token in a pasted string; blanks and line breaks that a mail program put in do not matter.

    Raises:
        LocalError: it is no token, it was cut or mistyped, or its fields are malformed.
    """
    text = "".join(text.split())
    if not text.startswith(PREFIX):
        raise LocalError(f"This is no Foedus token; paste the string that begins with {PREFIX!r}.")
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise LocalError("The token is too long; paste the token alone.")
    try:
        coded = text.removeprefix(PREFIX)
        data = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except ValueError:
        data = b""
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if checksum != _checksum(body):
        raise LocalError("The token is incomplete or was altered on the way; paste it whole, or ask for a new one.")
    try:
        return _token(body)
    except (RemoteError, ValueError):
        raise LocalError("The token's contents are malformed; ask the operator for a new one.") from None


def _token(body: bytes) -> Token:
    name, org, link, enrolment, authority, root, expires, secret = unenc(body)
    token = Token(
        name.decode(), org.decode(), link.decode(), enrolment.decode(), authority, root, int.from_bytes(expires), secret
    )
    check_site_name(token.name)
    check_org(token.org)
    check_address(token.link_address)
    check_address(token.enrolment_address)
    parse_certificate(authority)
    if (len(root), len(expires), len(secret)) != (32, 8, SECRET_BYTES):
        raise ValueError
    return token


def check_address(address: str) -> None:
    """Raises LocalError unless the address reads "host:port", IPv6 hosts in brackets."""
    match = _ADDRESS.fullmatch(address)
    if not match or not 0 < int(match[2]) < 65_536:
        raise LocalError(f"{address[:80]!r} is no address; write host:port, and an IPv6 address in brackets.")


def hash_secret(secret: bytes) -> bytes:
    """What the coordinator keeps of a token's secret (32 bytes); 256 random bits need no slow hash."""
    return digest("enrolment-secret", secret)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_CHECKSUM_BYTES]


# --- The site's request ---


@dataclass(frozen=True)
class EnrolRequest:
    """The token's secret and the site's keys, each with proof that the site holds its private half."""

    secret: bytes = field(repr=False)
    public_key: bytes
    certificate_request: bytes
    signature: bytes

    @classmethod
    def make(cls, token: Token, key: Ed25519PrivateKey, tls_key: EllipticCurvePrivateKey) -> EnrolRequest:
        certificate_request = request_certificate(token.name, tls_key)
        signature = key.sign(_proof(token.secret, public_bytes(key), certificate_request))
        return cls(token.secret, public_bytes(key), certificate_request, signature)

    def to_bytes(self) -> bytes:
        return enc(self.secret, self.public_key, self.certificate_request, self.signature)

    @classmethod
    def from_bytes(cls, data: bytes) -> EnrolRequest:
        """Raises RemoteError(BAD_MESSAGE) unless the bytes are a request; nothing in it is verified yet."""
        try:
            if len(data) > MAX_REQUEST_BYTES:
                raise ValueError
            request = cls(*unenc(data))
            sizes = len(request.secret), len(request.public_key), len(request.signature)
            if sizes != (SECRET_BYTES, 32, SIGNATURE_BYTES):
                raise ValueError
        except (ValueError, TypeError):
            raise RemoteError(Reason.BAD_MESSAGE, "the enrolment request is malformed.") from None
        return request

    def verify(self, name: str) -> None:
        """Check that the site holds both keys, and asks to be the `name` that its token is for.

        Raises:
            RemoteError: BAD_SIGNATURE or BAD_MESSAGE.
        """
        proof = _proof(self.secret, self.public_key, self.certificate_request)
        verify(self.public_key, self.signature, proof, "the enrolment request")
        check_request(self.certificate_request, name)


def _proof(secret: bytes, public_key: bytes, certificate_request: bytes) -> bytes:
    return labelled("enrolment-proof", hash_secret(secret), public_key, certificate_request)


# --- The coordinator's reply ---


@dataclass(frozen=True)
class Waiting:
    """The keys are bound to the token; the operator has not approved them, or the root not signed, yet."""


@dataclass(frozen=True)
class Approved:
    """The site's certificate (DER), the signed roster (bytes of a SignedRoster) that lists it, and the authorities
    (DER) that may sign what the coordinator shows from now on. Those are believed because the answer came from a
    coordinator that an authority before them vouched for."""

    certificate: bytes
    signed_roster: bytes
    authorities: tuple[bytes, ...]

    def verify(
        self, token: Token, public_key: bytes, tls_key: EllipticCurvePrivateKey, *, now: float, highest_epoch: int
    ) -> Roster:
        """What the site checks before it believes that it is in; gives the roster.

        Raises:
            RemoteError: BAD_SIGNATURE, BAD_MESSAGE, ROSTER_STALE, or UNKNOWN_SITE when the roster lists the site not
                at all, or with another key or organisation.
        """
        check_site_certificate(self.certificate, self.authorities, token.name, tls_key.public_key(), now)
        signed = SignedRoster.from_bytes(self.signed_roster)
        roster = signed.verify(token.root_public_key, now=now, highest_epoch=highest_epoch)
        listed = roster.site(token.name)
        if (listed.public_key, listed.org) != (public_key, token.org):
            raise RemoteError(
                Reason.UNKNOWN_SITE, f"the roster lists {token.name} with another key or organisation than its own."
            )
        return roster


@dataclass(frozen=True)
class Refused:
    """One sentence for the person at the site."""

    reason: str


EnrolReply = Waiting | Approved | Refused


def reply_to_bytes(reply: EnrolReply) -> bytes:
    match reply:
        case Waiting():
            return enc("waiting")
        case Approved(certificate, signed_roster, authorities):
            return enc("approved", certificate, signed_roster, enc(*authorities))
        case Refused(reason):
            return enc("refused", reason)


def reply_from_bytes(data: bytes) -> EnrolReply:
    """Raises RemoteError(BAD_MESSAGE) unless the bytes are a reply; a reason is cut to what fits a line or two."""
    try:
        if len(data) > MAX_REPLY_BYTES:
            raise ValueError
        match unenc(data):
            case (b"waiting",):
                return Waiting()
            case (b"approved", certificate, signed_roster, listed):
                authorities = unenc(listed)
                if not 1 <= len(authorities) <= MAX_AUTHORITIES:
                    raise ValueError
                return Approved(certificate, signed_roster, authorities)
            case (b"refused", reason):
                text = reason.decode()
                if len(text) > MAX_REASON_CHARACTERS or not text.isprintable():
                    raise ValueError
                return Refused(text)
    except ValueError:
        pass
    raise RemoteError(Reason.BAD_MESSAGE, "the coordinator's enrolment reply is malformed.")


def check_expiry(token: Token, now: float) -> None:
    """Raises LocalError for a token whose time is over, before any key is made for it."""
    if now > token.expires:
        raise LocalError(
            f"The token expired at {iso(token.expires)}, and this clock says {iso(now)}; ask the operator for a new "
            "one or, if the clock is wrong, set it."
        )
