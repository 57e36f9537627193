"""How this site joins, and the folder that holds what makes it a member: `identity/` in the site's home.

    token           what it joined by: addresses, first authority, root; the secret in it is bound to these keys
    identity.key    signs what the site says in a round
    tls.key, tls.crt    open the link
    request         what was sent to enrol; sent again, it brings newer certificates and a newer roster
    authorities     who may sign what the coordinator shows
    roster          the newest roster seen, under the root's signature

While a site waits to be approved the same files are in `joining/`; one rename makes it a member. Every file has mode
0600 and is whole or not there, so `join` may be cut anywhere and run again. Knows no transport: a call is bytes to
bytes.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from foedus_common.certificates import (
    MAX_CERTIFICATE_BYTES,
    generate_tls_key,
    parse_certificate,
    pem,
    read_certificate,
    read_tls_key,
    tls_key_pem,
)
from foedus_common.clock import Clock
from foedus_common.enrolment import (
    MAX_AUTHORITIES,
    MAX_REQUEST_BYTES,
    MAX_TOKEN_CHARACTERS,
    Approved,
    EnrolRequest,
    Refused,
    Token,
    check_expiry,
    decode_token,
    reply_from_bytes,
)
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import (
    MAX_ROSTER_BYTES,
    SIGNATURE_BYTES,
    Roster,
    SignedRoster,
    generate_key,
    public_bytes,
    read_key,
    write_key,
)
from foedus_common.link.transport import TlsIdentity
from foedus_common.private_files import create_private, private_folder, read_private, replace_private
from foedus_common.randomness import RandomBytes

Call = Callable[[bytes], bytes]
"""Takes an enrolment request to the coordinator and gives its answer."""

Wait = Callable[[bytes], None]
"""Told the site's own public key, whose fingerprint a person reads to the operator; returns when to ask again, or
raises to give up. The keys stay, and `join` with the same token goes on from there."""


def join(home: Path, token: Token, call: Call, wait: Wait, *, random: RandomBytes, clock: Clock) -> Membership:
    """Become the site that the token names; at once when this home is that site already.

    A new token for a site that is a member makes new keys; the old ones serve until the new ones are approved.

    Raises:
        LocalError: the token has expired, was refused, or is for another site or federation than this home's.
        RemoteError: the coordinator's answer does not fit the token: the certificate, the root or the roster.
    """
    folder, joining = home / "identity", home / "joining"
    current = Membership(home) if folder.exists() else None
    if current is not None and current.token == token:
        return current
    if current is not None and not current.succeeded_by(token):
        raise LocalError(f"This home is the site {current.token.name} already; use another --home for another site.")
    request = _prepare(joining, token, random, clock)
    highest_epoch = 0 if current is None else current.roster_epoch
    while not (approved := _ask(call, request)):
        wait(request.public_key)
    _accept(joining, token, approved, clock.now(), highest_epoch)
    if current is not None:
        folder.rename(home / "retired")
    joining.rename(folder)
    shutil.rmtree(home / "retired", ignore_errors=True)
    return Membership(home)


def leave(home: Path) -> None:
    """Stop being the site: its keys, certificate and roster are deleted here. What the operator has is not changed."""
    for folder in ("retired", "joining", "identity"):
        if (home / folder).exists():
            (home / folder).rename(home / "retired")
            shutil.rmtree(home / "retired")


class Membership:
    """What this site is in the federation: read once from its folder, and kept up to date there. Thread-safe.

    token: what it joined by; key: signs what the site says in a round.
    """

    def __init__(self, home: Path) -> None:
        """Raises LocalError when the site has not joined, or a file is damaged or can be read by others."""
        self._folder = home / "identity"
        if not self._folder.exists():
            raise LocalError(
                "This site has joined no federation yet; run `foedus-site join` with the operator's token."
            )
        private_folder(self._folder)
        self._lock = threading.Lock()
        self.token: Token = _read_token(self._folder)
        self.key: Ed25519PrivateKey = read_key(self._folder / "identity.key")
        self._tls_key = read_tls_key(self._folder / "tls.key")
        self._certificate = read_certificate(self._folder / "tls.crt")
        self._authorities = _read_authorities(self._folder, self.token)
        self._request = _read_request(self._folder)

    @property
    def name(self) -> str:
        return self.token.name

    @property
    def public_key(self) -> bytes:
        return public_bytes(self.key)

    @property
    def roster_epoch(self) -> int:
        """The highest epoch seen."""
        return self._stored_roster(now=0).epoch

    def succeeded_by(self, token: Token) -> bool:
        """Whether the token is for the same site of the same federation."""
        ours = self.token
        return (token.name, token.org, token.root_public_key) == (ours.name, ours.org, ours.root_public_key)

    def tls(self) -> TlsIdentity:
        """What the link shows and trusts."""
        with self._lock:
            shown = self._certificate.public_bytes(Encoding.PEM)
            return TlsIdentity(shown, tls_key_pem(self._tls_key), self._authorities)

    @property
    def superseded(self) -> bool:
        """Whether `join` has put newer keys into the folder since this was read from it."""
        try:
            return _read_token(self._folder) != self.token
        except LocalError:  # `join` is at its two renames
            return False

    def certificate_ends(self) -> float:
        """Unix seconds."""
        with self._lock:
            return self._certificate.not_valid_after_utc.timestamp()

    def roster(self, now: float) -> Roster:
        """The newest roster seen. Raises RemoteError(ROSTER_STALE) when it has expired."""
        return self._stored_roster(now)

    def accept_roster(self, signed: bytes, now: float) -> Roster:
        """Take a roster that the coordinator shows, and keep it if it is newer than what was seen.

        Raises:
            RemoteError: BAD_SIGNATURE, BAD_MESSAGE, ROSTER_STALE, or UNKNOWN_SITE when this site is no longer in it.
        """
        with self._lock:
            highest = self.roster_epoch
            roster = SignedRoster.from_bytes(signed).verify(self.token.root_public_key, now=now, highest_epoch=highest)
            if roster.epoch > highest:
                replace_private(self._folder / "roster", signed)
        if roster.site(self.name).public_key != self.public_key:
            raise RemoteError(Reason.UNKNOWN_SITE, f"the roster lists {self.name} with another key than this site's.")
        return roster

    def renew(self, call: Call, clock: Clock) -> None:
        """Fetch what holds now: roster, authorities, and the certificate, which comes back renewed if it nears its end.

        Raises:
            LocalError: the coordinator refused, or waits for a new roster.
            RemoteError: its answer does not fit, as for `join`.
        """
        approved = _ask(call, self._request)
        if approved is None:
            raise LocalError("The coordinator has no valid roster with this site in it; ask the operator to sign one.")
        with self._lock:
            _accept(self._folder, self.token, approved, clock.now(), self.roster_epoch)
            self._certificate = parse_certificate(approved.certificate)
            self._authorities = _pems(approved.authorities)

    def _stored_roster(self, now: float) -> Roster:
        signed = read_private(self._folder / "roster", MAX_ROSTER_BYTES + SIGNATURE_BYTES)
        return SignedRoster.from_bytes(signed).verify(self.token.root_public_key, now=now, highest_epoch=0)


def _prepare(folder: Path, token: Token, random: RandomBytes, clock: Clock) -> EnrolRequest:
    """Keys, once; and the request for this token, once: the coordinator knows only the same bytes again."""
    if (folder / "request").exists() and (request := _read_request(folder)).secret == token.secret:
        return request
    check_expiry(token, clock.now())
    private_folder(folder)
    if not (folder / "identity.key").exists():
        write_key(folder / "identity.key", generate_key(random))
    if not (folder / "tls.key").exists():
        create_private(folder / "tls.key", tls_key_pem(generate_tls_key(random)))
    request = EnrolRequest.make(token, read_key(folder / "identity.key"), read_tls_key(folder / "tls.key"))
    replace_private(folder / "token", token.encode().encode())
    replace_private(folder / "request", request.to_bytes())  # last: where it is, everything is
    return request


def _ask(call: Call, request: EnrolRequest) -> Approved | None:
    """The approval, or None while the coordinator waits for a person. Raises LocalError when it refuses."""
    reply = reply_from_bytes(call(request.to_bytes()))
    if isinstance(reply, Refused):
        raise LocalError(f"The coordinator refuses this site: {reply.reason}")
    return reply if isinstance(reply, Approved) else None


def _accept(folder: Path, token: Token, approved: Approved, now: float, highest_epoch: int) -> None:
    key, tls_key = read_key(folder / "identity.key"), read_tls_key(folder / "tls.key")
    approved.verify(token, public_bytes(key), tls_key, now=now, highest_epoch=highest_epoch)
    replace_private(folder / "roster", approved.signed_roster)
    replace_private(folder / "authorities", _pems(approved.authorities))
    replace_private(folder / "tls.crt", pem(approved.certificate))


def _pems(certificates: Sequence[bytes]) -> bytes:
    return b"".join(map(pem, certificates))


def _read_token(folder: Path) -> Token:
    return decode_token(read_private(folder / "token", MAX_TOKEN_CHARACTERS).decode())


def _read_authorities(folder: Path, token: Token) -> bytes:
    """PEM, one after the other; the token's until the coordinator has named others."""
    if not (folder / "authorities").exists():
        return token.authority_pem
    return read_private(folder / "authorities", MAX_AUTHORITIES * 2 * MAX_CERTIFICATE_BYTES)


def _read_request(folder: Path) -> EnrolRequest:
    return EnrolRequest.from_bytes(read_private(folder / "request", MAX_REQUEST_BYTES))
