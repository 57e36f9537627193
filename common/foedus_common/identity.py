"""Who is who: identity keys, the fingerprints that people compare, the root-signed roster and the signed plan.

The consortium's root key, kept offline, signs the roster: which sites there are, of which organisation and with which
key, and the key with which the coordinator signs plans. Everything here is Ed25519 (RFC 8032). Certificates, which
only open the link, are in `certificates`; nothing here knows them.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from foedus_common.canonical import canonical_json, digest, labelled
from foedus_common.clock import iso
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.plan import MAX_PLAN_BYTES, AgreedPlan, parse_agreed_plan
from foedus_common.private_files import create_private, read_private
from foedus_common.randomness import RandomBytes

SITE_NAME = re.compile(r"[a-z0-9-]{1,40}")
MAX_ORG_CHARACTERS = 120
MAX_ROSTER_BYTES = 208 * 1024
"""A thousand sites and more; with the certificates beside it in an answer to an enrolment it fits into one message of
the link."""

SIGNATURE_BYTES = 64
_KEY_FILE_BYTES = 4096
_INT63 = 1 << 63


# --- Keys ---


def generate_key(random: RandomBytes) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(random(32))


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """The public half as the 32 raw bytes that rosters and requests carry."""
    return key.public_key().public_bytes_raw()


def write_key(path: Path, key: Ed25519PrivateKey) -> None:
    """A new PEM file (PKCS #8), mode 0600. Raises LocalError where a file of that name exists."""
    create_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def read_key(path: Path) -> Ed25519PrivateKey:
    """Raises LocalError when the file is missing, can be read by others, or holds no Ed25519 private key."""
    try:
        key = load_pem_private_key(read_private(path, _KEY_FILE_BYTES), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):  # the last for a key of another kind
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise LocalError(f"{path} holds no Ed25519 private key in PEM.")
    return key


def public_pem(public_key: bytes) -> bytes:
    """32 raw bytes as PEM (SubjectPublicKeyInfo)."""
    return Ed25519PublicKey.from_public_bytes(public_key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def read_public_key(path: Path) -> bytes:
    """The 32 raw bytes of a public key in PEM. Raises LocalError when the file is missing or holds something else."""
    try:
        with path.open("rb") as file:
            key = load_pem_public_key(file.read(_KEY_FILE_BYTES))
    except OSError as error:
        raise LocalError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, UnsupportedAlgorithm, InternalError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise LocalError(f"{path} holds no Ed25519 public key in PEM.")
    return key.public_bytes_raw()


def fingerprint(public_key: bytes) -> str:
    """What two people read to each other: 160 bits of a hash as eight groups of four letters and digits (a-z, 2-7)."""
    text = base64.b32encode(digest("fingerprint", public_key)[:20]).decode().lower()
    return " ".join(text[start : start + 4] for start in range(0, len(text), 4))


def verify(public_key: bytes, signature: bytes, message: bytes, what: str) -> None:
    """Raise RemoteError(BAD_SIGNATURE) unless `signature` (64 bytes) over `message` is by `public_key` (32 bytes).

    `what` begins the sentence, e.g. "the roster".
    """
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise RemoteError(Reason.BAD_SIGNATURE, f"{what} is not signed by the key that vouches for it.") from None


def check_site_name(name: str) -> None:
    """Raises LocalError unless the name is fit for certificates, file names and messages."""
    if not SITE_NAME.fullmatch(name):
        raise LocalError(f"{name!r} is no site name; use 1 to 40 small letters, digits and dashes.")


def check_org(org: str) -> None:
    """Raises LocalError unless the organisation's name can be shown on one line."""
    if not (0 < len(org) <= MAX_ORG_CHARACTERS and org.isprintable() and org == org.strip()):
        raise LocalError(f"{org[:40]!r} is no organisation's name; use 1 to {MAX_ORG_CHARACTERS} printable characters.")


# --- The roster ---


@dataclass(frozen=True)
class RosterSite:
    """One member: its name, the organisation it counts for, and its identity key (32 raw bytes)."""

    name: str
    org: str
    public_key: bytes

    def __post_init__(self) -> None:
        check_site_name(self.name)
        check_org(self.org)
        if len(self.public_key) != 32:
            raise LocalError(f"The identity key of {self.name} is not 32 bytes long.")


@dataclass(frozen=True)
class Roster:
    """The members of the federation, sorted by name; a site that was revoked is no longer in it.

    epoch: counts the rosters from 1; a site refuses one older than it has seen.
    not_after: Unix seconds; the roster is refused after it.
    plan_key: the coordinator's plan-signing key, 32 raw bytes.
    """

    epoch: int
    not_after: int
    plan_key: bytes
    sites: tuple[RosterSite, ...]

    def __post_init__(self) -> None:
        if not all(type(number) is int and 0 < number < _INT63 for number in (self.epoch, self.not_after)):
            raise LocalError("A roster's epoch and expiry must be positive whole numbers.")
        if len(self.plan_key) != 32:
            raise LocalError("The roster's plan-signing key is not 32 bytes long.")
        names = [site.name for site in self.sites]
        if names != sorted(set(names)) or len({site.public_key for site in self.sites}) != len(names):
            raise LocalError("A roster lists each site once, each with a key of its own, sorted by name.")

    def canonical(self) -> bytes:
        """The bytes that the root signs: canonical JSON, keys in hexadecimal."""
        sites = [{"name": s.name, "org": s.org, "public_key": s.public_key.hex()} for s in self.sites]
        return canonical_json(
            {"epoch": self.epoch, "not_after": self.not_after, "plan_key": self.plan_key.hex(), "sites": sites}
        )

    def digest(self) -> bytes:
        """32 bytes that name this roster in a round's configuration."""
        return digest("roster", self.canonical())

    def site(self, name: str) -> RosterSite:
        """Raises RemoteError(UNKNOWN_SITE) when the root does not vouch for a site of this name."""
        for site in self.sites:
            if site.name == name:
                return site
        raise RemoteError(Reason.UNKNOWN_SITE, f"{name[:40]!r} is not in the roster of epoch {self.epoch}.")

    @property
    def public_keys(self) -> Mapping[str, bytes]:
        return {site.name: site.public_key for site in self.sites}

    @property
    def organisations(self) -> Mapping[str, str]:
        return {site.name: site.org for site in self.sites}

    @property
    def members(self) -> str:
        """For people: 12 sites of 3 organisations (up to 10 each)."""
        counts = Counter(site.org for site in self.sites)
        most = max(counts.values(), default=1)
        return f"{len(self.sites)} sites of {len(counts)} organisations" + (f" (up to {most} each)" if most > 1 else "")


def parse_roster(canonical: bytes) -> Roster:
    """A roster from its canonical bytes, which say nothing yet about who signed them.

    Raises:
        RemoteError: BAD_MESSAGE when they are too long, of another schema, or not the canonical form of what they say.
    """
    try:
        if len(canonical) > MAX_ROSTER_BYTES:
            raise ValueError
        table = json.loads(canonical)
        sites = tuple(RosterSite(s["name"], s["org"], bytes.fromhex(s["public_key"])) for s in table["sites"])
        roster = Roster(table["epoch"], table["not_after"], bytes.fromhex(table["plan_key"]), sites)
        if roster.canonical() != canonical:
            raise ValueError
    except (LocalError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RemoteError(Reason.BAD_MESSAGE, "the roster is not in canonical form.") from None
    return roster


# --- What is signed ---


@dataclass(frozen=True)
class _Signed:
    """Canonical bytes and the Ed25519 signature over them under the domain label of their kind."""

    canonical: bytes
    signature: bytes

    kind: ClassVar[str]
    limit: ClassVar[int]

    def to_bytes(self) -> bytes:
        return self.signature + self.canonical

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Splits only. Raises RemoteError(BAD_MESSAGE) for a length that cannot be."""
        if not SIGNATURE_BYTES < len(data) <= SIGNATURE_BYTES + cls.limit:
            raise RemoteError(Reason.BAD_MESSAGE, f"the signed {cls.kind} is too short or too long.")
        return cls(data[SIGNATURE_BYTES:], data[:SIGNATURE_BYTES])

    @classmethod
    def _sign(cls, canonical: bytes, key: Ed25519PrivateKey) -> Self:
        return cls(canonical, key.sign(labelled(f"signed-{cls.kind}", canonical)))

    def _verify(self, public_key: bytes) -> None:
        verify(public_key, self.signature, labelled(f"signed-{self.kind}", self.canonical), f"the {self.kind}")


@dataclass(frozen=True)
class SignedRoster(_Signed):
    """A roster under the root's signature. A root key serves one federation: the signature names no other."""

    kind = "roster"
    limit = MAX_ROSTER_BYTES

    @classmethod
    def sign(cls, roster: Roster, root_key: Ed25519PrivateKey) -> SignedRoster:
        """Raises LocalError for a roster too long to be read by sites."""
        canonical = roster.canonical()
        if len(canonical) > MAX_ROSTER_BYTES:
            raise LocalError(f"The roster would be {len(canonical)} bytes long; sites read {MAX_ROSTER_BYTES}.")
        return cls._sign(canonical, root_key)

    def verify(self, root_public_key: bytes, *, now: float, highest_epoch: int) -> Roster:
        """The roster, once all is well with it. `highest_epoch` is the highest the caller has seen; 0 for none.

        Raises:
            RemoteError: BAD_SIGNATURE, BAD_MESSAGE, or ROSTER_STALE when it has expired or a newer one was seen.
        """
        self._verify(root_public_key)
        roster = parse_roster(self.canonical)
        if roster.epoch < highest_epoch:
            raise RemoteError(
                Reason.ROSTER_STALE, f"the roster is of epoch {roster.epoch}, but one of {highest_epoch} was seen."
            )
        if now > roster.not_after:
            raise RemoteError(
                Reason.ROSTER_STALE,
                f"the roster expired at {iso(roster.not_after)}, and this clock says {iso(now)}; the root has to sign "
                "a new one or, if the clock is wrong, it has to be set.",
            )
        return roster


@dataclass(frozen=True)
class SignedPlan(_Signed):
    """An agreed plan under the signature of the coordinator's plan-signing key."""

    kind = "plan"
    limit = MAX_PLAN_BYTES

    @classmethod
    def sign(cls, agreed: AgreedPlan, plan_key: Ed25519PrivateKey) -> SignedPlan:
        return cls._sign(agreed.canonical(), plan_key)

    def verify(self, plan_public_key: bytes) -> AgreedPlan:
        """The plan, once its signature and its form are right.

        Raises:
            RemoteError: BAD_SIGNATURE, or BAD_MESSAGE when the signed bytes are no plan.
        """
        self._verify(plan_public_key)
        try:
            return parse_agreed_plan(self.canonical)
        except LocalError as error:
            raise RemoteError(Reason.BAD_MESSAGE, str(error)) from None
