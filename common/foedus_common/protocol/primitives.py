"""The round's cryptography: thin wrappers over pyca/cryptography, and the key schedule built from them.

Everything here takes and gives bytes. It knows no message, no session and no vector. Which standard each wrapper is:
Ed25519 (RFC 8032), X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), AES-256-GCM (NIST SP 800-38D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from foedus_common.canonical import digest, enc, labelled
from foedus_common.errors import Reason, RemoteError
from foedus_common.randomness import RandomBytes

SUITE = 1
"""Stands for Ed25519, X25519, HKDF-SHA256, AES-256-GCM and AES-256-CTR. The id travels as the first byte of every
envelope; a parser that knows only this one refuses others."""

KEY_BYTES = 32
SIGNATURE_BYTES = 64
DIGEST_BYTES = 32
TAG_BYTES = 16

Sign = Callable[[bytes], bytes]
"""Signs with a site's identity key: `Ed25519PrivateKey.sign`, or a token that never shows the key."""

_ONE_USE_NONCE = bytes(12)


# --- Signatures ---


def verify_signature(public_key: bytes, signature: bytes, message: bytes, whose: str) -> None:
    """Raise RemoteError(BAD_SIGNATURE) unless `signature` (64 bytes) is Ed25519 by `public_key` (32 bytes)."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise RemoteError(
            Reason.BAD_SIGNATURE, f"the signature of {whose} does not verify under its key in the roster", (whose,)
        ) from None


# --- Key agreement ---


@dataclass(frozen=True)
class KeyPair:
    """A fresh X25519 pair, 32 bytes each; one pair serves one attempt."""

    private: bytes = field(repr=False)
    public: bytes
    _key: X25519PrivateKey = field(repr=False, compare=False)

    @classmethod
    def generate(cls, random: RandomBytes) -> KeyPair:
        return cls.from_private(random(KEY_BYTES))

    @classmethod
    def from_private(cls, private: bytes) -> KeyPair:
        key = X25519PrivateKey.from_private_bytes(private)
        return cls(private, key.public_key().public_bytes_raw(), key)

    def shared_secret(self, peer_public: bytes, peer: str) -> bytes:
        """X25519 with the key of a peer, 32 bytes. RemoteError(WEAK_KEY) where it is all zero (RFC 7748, 6.1)."""
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:
            raise RemoteError(Reason.WEAK_KEY, f"a public key of {peer} gives an all-zero secret", (peer,)) from None


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256, 32 bytes out."""
    return HKDF(SHA256(), KEY_BYTES, salt, info).derive(secret)


# --- The key schedule of a round (docs/protocol.md section 2, A1 to A3) ---


def commitment(self_mask_seed: bytes) -> bytes:
    """H(b): published at A1, checked by the coordinator when it has put b together again."""
    return digest("self-mask-seed", self_mask_seed)


def pair_salt(ctx: bytes, u1: bytes, site: str, peer: str) -> bytes:
    """H(ctx, u1, sorted ids): two sites that were shown different rounds or key sets never derive equal keys."""
    return digest("pair", ctx, u1, sorted((site, peer)))


def self_mask_key(self_mask_seed: bytes, ctx: bytes) -> bytes:
    return hkdf(self_mask_seed, salt=ctx, info=labelled("self-mask"))


def pair_mask_key(secret: bytes, salt: bytes) -> bytes:
    return hkdf(secret, salt=salt, info=labelled("pair-mask"))


def share_key(secret: bytes, salt: bytes, source: str, destination: str) -> bytes:
    """One key per direction, so that each is used once and a fixed nonce is sound."""
    return hkdf(secret, salt=salt, info=labelled("share-enc", source, destination))


@dataclass(frozen=True)
class Parcel:
    """Where sealed shares belong: authenticated with them, so that they open nowhere else."""

    ctx: bytes
    u1: bytes
    source: str
    destination: str

    @property
    def associated_data(self) -> bytes:
        return enc(self.ctx, self.u1, self.source, self.destination)


def seal(key: bytes, plaintext: bytes, parcel: Parcel) -> bytes:
    """AES-256-GCM under a key used once, hence the zero nonce. Gives len(plaintext) + 16 bytes."""
    return AESGCM(key).encrypt(_ONE_USE_NONCE, plaintext, parcel.associated_data)


def unseal(key: bytes, ciphertext: bytes, parcel: Parcel) -> bytes:
    """The inverse of `seal`. RemoteError(BAD_SHARE) if anything was altered on the way."""
    try:
        return AESGCM(key).decrypt(_ONE_USE_NONCE, ciphertext, parcel.associated_data)
    except InvalidTag:
        raise RemoteError(
            Reason.BAD_SHARE,
            f"the shares that {parcel.source} sealed for {parcel.destination} were altered or are not its own",
            (parcel.source,),
        ) from None
