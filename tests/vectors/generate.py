"""Known answers of the protocol, made by a second implementation: `python tests/vectors/generate.py` rewrites the JSON.

It imports nothing of Foedus and shares no code with it. Where it can it takes the long way: HKDF from HMAC, X25519 by
the Montgomery ladder of RFC 7748, AES-CTR block by block from AES, field packing with Python integers. Only AES,
AES-GCM and Ed25519 come from pyca/cryptography, as they do there. Cases with "accept": false must be refused.
"""

from __future__ import annotations

import decimal
import hashlib
import hmac
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FOLDER = Path(__file__).parent
LABEL = b"foedus/v1/"
PRIME = 2**256 + 297
SUITE = b"\1"
DECLINED, READY, ADVERTISE, UNMASK = b"\x05", b"\x06", b"\x08", b"\x10"


def seeded(name: str, size: int = 32) -> bytes:
    """Bytes that anybody can make again: SHAKE-128 of a name."""
    return hashlib.shake_128(name.encode()).digest(size)


# --- Section 1 ---


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def enc(*parts: bytes) -> bytes:
    out = b""
    for part in parts:
        out += u32(len(part)) + part
    return out


def h(domain: str, *parts: bytes) -> bytes:
    return hashlib.sha256(LABEL + enc(domain.encode(), *parts)).digest()


def canonical() -> dict:
    return {
        "enc": [
            {"parts": [], "enc": ""},
            {"parts": [""], "enc": enc(b"").hex()},
            {"parts": ["", ""], "enc": enc(b"", b"").hex()},
            {"parts": ["ab", "c"], "enc": enc(b"ab", b"c").hex()},
            {"parts": ["a", "bc"], "enc": enc(b"a", b"bc").hex()},
            {"parts": [7, ["x", [1, "y"]]], "enc": enc(u64(7), enc(b"x", enc(u64(1), b"y"))).hex()},
            {"parts": [2**64 - 1], "enc": enc(u64(2**64 - 1)).hex()},
        ],
        "digest": [
            {"domain": "round", "parts": ["cfg"], "digest": h("round", b"cfg").hex()},
            {"domain": "U1", "parts": [["a", "b"]], "digest": h("U1", enc(b"a", b"b")).hex()},
        ],
    }


# --- Keys ---


def x25519(private: bytes, public: bytes) -> bytes:
    """RFC 7748 section 5, the ladder."""
    p = 2**255 - 19
    k = bytearray(private)
    k[0] &= 248
    k[31] = k[31] & 127 | 64
    scalar = int.from_bytes(k, "little")
    u = int.from_bytes(public, "little") & (2**255 - 1)
    x1, x2, z2, x3, z3, swap = u, 1, 0, u, 1, 0
    for bit in reversed(range(255)):
        now = scalar >> bit & 1
        if swap ^ now:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = now
        a, b = (x2 + z2) % p, (x2 - z2) % p
        c, d = (x3 + z3) % p, (x3 - z3) % p
        da, cb = d * a % p, c * b % p
        x3, z3 = (da + cb) ** 2 % p, x1 * (da - cb) ** 2 % p
        aa, bb = a * a % p, b * b % p
        e = (aa - bb) % p
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def public_of(private: bytes) -> bytes:
    return x25519(private, (9).to_bytes(32, "little"))


def hkdf(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block of output."""
    extracted = hmac.new(salt, secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\1", hashlib.sha256).digest()


def keys() -> dict:
    ctx, u1 = seeded("ctx"), seeded("u1")
    csk_a, csk_b, ssk_a, ssk_b, seed = (seeded(name) for name in ("csk a", "csk b", "ssk a", "ssk b", "b"))
    salt = h("pair", ctx, u1, enc(b"alpha", b"beta"))
    share_secret = x25519(csk_a, public_of(csk_b))
    mask_secret = x25519(ssk_a, public_of(ssk_b))
    share_key = hkdf(share_secret, salt, LABEL + enc(b"share-enc", b"alpha", b"beta"))
    shares = seeded("shares", 66)
    associated = enc(ctx, u1, b"alpha", b"beta")
    sealed = AESGCM(share_key).encrypt(bytes(12), shares, associated)
    forged = bytes([sealed[0] ^ 1]) + sealed[1:]
    case = {
        "ctx": ctx.hex(),
        "u1": u1.hex(),
        "site": "alpha",
        "peer": "beta",
        "share_private": csk_a.hex(),
        "peer_share_private": csk_b.hex(),
        "mask_private": ssk_a.hex(),
        "peer_mask_private": ssk_b.hex(),
        "peer_share_public": public_of(csk_b).hex(),
        "peer_mask_public": public_of(ssk_b).hex(),
        "self_mask_seed": seed.hex(),
        "commitment": h("self-mask-seed", seed).hex(),
        "salt": salt.hex(),
        "share_secret": share_secret.hex(),
        "mask_secret": mask_secret.hex(),
        "share_key": share_key.hex(),
        "share_key_back": hkdf(share_secret, salt, LABEL + enc(b"share-enc", b"beta", b"alpha")).hex(),
        "pair_mask_key": hkdf(mask_secret, salt, LABEL + enc(b"pair-mask")).hex(),
        "self_mask_key": hkdf(seed, ctx, LABEL + enc(b"self-mask")).hex(),
        "shares": shares.hex(),
    }
    low_order = [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")]
    return {
        "schedule": case,
        "sealed": [
            {"sealed": sealed.hex(), "source": "alpha", "destination": "beta", "accept": True},
            {"sealed": forged.hex(), "source": "alpha", "destination": "beta", "accept": False},
            {"sealed": sealed.hex(), "source": "alpha", "destination": "gamma", "accept": False},
            {"sealed": sealed.hex(), "source": "beta", "destination": "alpha", "accept": False},
        ],
        "weak_public_keys": [key.hex() for key in low_order],
    }


# --- Shamir ---


def evaluate(coefficients: list[int], x: int) -> int:
    return sum(c * pow(x, power, PRIME) for power, c in enumerate(coefficients)) % PRIME


def shamir() -> dict:
    cases = []
    for n, t in ((3, 3), (5, 4), (10, 7), (20, 13)):
        secret = seeded(f"secret {n}")
        wide = seeded(f"coefficients {n}", 64 * (t - 1))
        drawn = [int.from_bytes(wide[64 * i : 64 * i + 64], "big") % PRIME for i in range(t - 1)]
        # Newton's form: the k-th draw belongs to binomial(x, k), the secret to binomial(x, 0).
        newton = [int.from_bytes(secret, "big"), *drawn]
        values = [sum(a * math.comb(x, k) for k, a in enumerate(newton)) % PRIME for x in range(1, n + 1)]
        shares = [value.to_bytes(33, "big") for value in values]
        cases.append(
            {
                "n": n,
                "t": t,
                "secret": secret.hex(),
                "random": wide.hex(),
                "shares": [share.hex() for share in shares],
            }
        )
    clean = [bytes.fromhex(share) for share in cases[2]["shares"]]
    wrong = list(clean)
    wrong[4] = (int.from_bytes(wrong[4], "big") ^ 5).to_bytes(33, "big")
    two_wrong = list(wrong)
    two_wrong[8] = bytes(33)
    return {
        "prime": str(PRIME),
        "split": cases,
        "correct": [
            {"t": 7, "shares": [s.hex() for s in clean], "secret": cases[2]["secret"], "wrong": [], "accept": True},
            {"t": 7, "shares": [s.hex() for s in wrong], "secret": cases[2]["secret"], "wrong": [5], "accept": True},
            {"t": 7, "shares": [s.hex() for s in two_wrong], "accept": False},
        ],
    }


# --- Masks and encoding ---


def counter_words(key: bytes, count: int) -> list[int]:
    """The keystream of AES-256-CTR with zero IV as little-endian words, one AES block at a time."""
    aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(aes.update(counter.to_bytes(16, "big")) for counter in range(count // 2 + 1))
    return list(struct.unpack(f"<{count}Q", stream[: 8 * count]))


def masks() -> dict:
    plus, minus, count = [seeded("plus 0"), seeded("plus 1")], [seeded("minus 0")], 21
    start = [int.from_bytes(seeded(f"word {index}", 8), "big") for index in range(count)]
    end = list(start)
    for key in plus:
        end = [(a + b) % 2**64 for a, b in zip(end, counter_words(key, count), strict=True)]
    for key in minus:
        end = [(a - b) % 2**64 for a, b in zip(end, counter_words(key, count), strict=True)]
    long = 200_000  # crosses the implementation's blocks, whatever their size
    far = hashlib.sha256(struct.pack(f"<{long}Q", *counter_words(plus[0], long))).hexdigest()
    return {
        "add": [key.hex() for key in plus],
        "subtract": [key.hex() for key in minus],
        "before": [str(word) for word in start],
        "after": [str(word) for word in end],
        "long": {"key": plus[0].hex(), "words": long, "sha256": far},
    }


def pack(integers: list[int], bits: int, max_sites: int) -> list[int]:
    half = (2**bits - 1) // (2 * max_sites)
    per_word = 64 // bits
    fields = [1] + [value + half for value in integers]
    count = math.ceil(len(fields) / per_word)
    fields += [0] * (count * per_word - len(fields))
    return [sum(fields[plane * count + word] << (plane * bits) for plane in range(per_word)) for word in range(count)]


def encoding() -> dict:
    cases = []
    for bits, max_sites, segments in ((21, 16, [(5, 1.0), (3, 0.25)]), (16, 10, [(9, 2.0)]), (32, 128, [(4, 0.5)])):
        half = (2**bits - 1) // (2 * max_sites)
        scales = [scale for length, scale in segments for _ in range(length)]
        key = seeded(f"coins {bits}")
        aes = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        stream = b"".join(aes.update(counter.to_bytes(16, "big")) for counter in range(len(scales)))
        coins = struct.unpack(f"<{len(scales)}I", stream[: 4 * len(scales)])
        draws = [int.from_bytes(seeded(f"value {bits} {index}", 4), "big") / 2**31 - 1 for index in range(len(scales))]
        values = [scale * draw for scale, draw in zip(scales, draws, strict=True)]
        values[0], values[-1] = scales[0], -scales[-1]  # both ends of the range fit
        integers = []
        for value, scale, coin in zip(values, scales, coins, strict=True):
            limit = float(half * 2**32)
            factor = limit / scale
            if factor * scale > limit:
                factor = math.nextafter(factor, 0.0)
            integers.append((math.trunc(value * factor) + coin) // 2**32)
        words = pack(integers, bits, max_sites)
        others = [-half, *integers[1:]]
        both = [(a + b) % 2**64 for a, b in zip(words, pack(others, bits, max_sites), strict=True)]
        cases.append(
            {
                "bits": bits,
                "max_sites": max_sites,
                "segments": segments,
                "half_range": half,
                "values": [value.hex() for value in values],
                "random": key.hex(),
                "integers": integers,
                "words": [str(word) for word in words],
                "sum_of_two": [str(word) for word in both],
                "integers_of_two": [a + b for a, b in zip(integers, others, strict=True)],
            }
        )
    base = cases[0]
    words = [int(word) for word in base["words"]]
    bad_sums = [
        {"why": "the header counts one site, not two", "words": base["words"], "survivors": 2},
        {"why": "no header", "words": [str(words[0] - 1), *base["words"][1:]], "survivors": 1},
        {"why": "a bit above all fields", "words": [str(words[0] | 1 << 63), *base["words"][1:]], "survivors": 1},
        {
            "why": "a field larger than one site makes it",
            "words": [base["words"][0], str(words[1] | 0x1FFFFF), *base["words"][2:]],
            "survivors": 1,
        },
    ]
    return {"cases": cases, "bad_sums": bad_sums}


# --- Envelopes ---


def short(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def envelope() -> dict:
    identity = Ed25519PrivateKey.from_private_bytes(seeded("identity"))
    body = seeded("cpk") + seeded("spk") + seeded("commitment")

    def told(
        suite: bytes = SUITE,
        kind: bytes = ADVERTISE,
        run_id: bytes = u64(11),
        round_: bytes = b"\2",
        attempt: bytes = b"",
        sequence: bytes = b"",
        binding: bytes = seeded("ctx"),
        source: bytes = b"alpha",
        destination: bytes = b"",
        body: bytes = body,
    ) -> bytes:
        counts = short(round_) + short(attempt) + short(sequence)
        return suite + kind + run_id + counts + binding + short(source) + short(destination) + body

    def unmask(*shares: bytes) -> bytes:
        return told(kind=UNMASK, sequence=b"\4", body=u32(len(b"".join(shares))) + b"".join(shares))

    def signed(told: bytes) -> bytes:
        return told + identity.sign(LABEL + enc(b"envelope", told))

    good = told()
    wire = signed(good)
    signature = wire[-64:]
    u3 = LABEL + enc(b"u3", seeded("ctx"), seeded("u1"), enc(b"alpha", b"beta", b"gamma"))
    malformed = {
        "cut short": wire[:-1],
        "one byte more": wire + b"\0",
        "empty": b"",
        "a suite and nothing else": SUITE,
        "no signature": good,
        "two signatures": wire + signature,
        "a signature of the coordinator's": signed(told(source=b"", destination=b"alpha")),
        "another suite": signed(told(suite=b"\2")),
        "an envelope of protocol v1": enc(LABEL + enc(b"envelope", b"ed25519/x25519", b"advertise"), signature),
        "unknown type": signed(told(kind=b"\xff")),
        "type zero": signed(told(kind=b"\0")),
        "the type of another message": signed(told(kind=UNMASK)),
        "a short run id": signed(told(run_id=u64(11)[1:])),
        "a run id that no database holds": signed(told(run_id=u64(1 << 63))),
        "a count with zeros in front": signed(told(round_=b"\0\2")),
        "a count of zero with a byte": signed(told(attempt=b"\0")),
        "a count that no database holds": signed(told(sequence=u64(1 << 63))),
        "a count of nine bytes": signed(told(sequence=b"\1" + bytes(8))),
        "a short binding": signed(told(binding=seeded("ctx", 31))),
        "a long binding": signed(told(binding=seeded("ctx", 33))),
        "the coordinator's name": signed(told(destination=b"@coordinator")),
        "a name in capitals": signed(told(source=b"Alpha")),
        "a name of 41 letters": signed(told(source=b"a" * 41)),
        "a name beyond the end": signed(told(source=b"", destination=b"", body=b"")[:-2] + b"\xff"),
        "a share of no kind": signed(unmask(b"\3" + bytes(33))),
        "a share with something more": signed(unmask(b"\1" + bytes(33) + b"\2")),
        "a short share": signed(unmask(b"\1" + bytes(32))),
        "a short key": signed(told(body=body[1:])),
        "a field missing": signed(told(body=body[32:])),
        "a field too many": signed(told(body=body + enc(b"metric=0.9"))),
        "length beyond the end": signed(told(kind=UNMASK, body=b"\xff\xff\xff\xff")),
        "length below the end": signed(told(kind=UNMASK, body=u32(0) + b"\1" + bytes(33))),
    }
    return {
        "public_key": identity.public_key().public_bytes_raw().hex(),
        "private_key": seeded("identity").hex(),
        "header": {
            "run_id": 11,
            "round": 2,
            "attempt": 0,
            "binding": seeded("ctx").hex(),
            "source": "alpha",
            "destination": "@coordinator",
            "sequence": 0,
        },
        "advertise": {
            "share_key": seeded("cpk").hex(),
            "mask_key": seeded("spk").hex(),
            "commitment": seeded("commitment").hex(),
        },
        "signed": (LABEL + enc(b"envelope", good)).hex(),
        "signature": signature.hex(),
        "wire": wire.hex(),
        "survivors": {"ctx": seeded("ctx").hex(), "u1": seeded("u1").hex(), "statement": u3.hex()},
        "forged": [
            (good + signature[:-1] + bytes([signature[-1] ^ 1])).hex(),
            (good[:-1] + bytes([good[-1] ^ 1]) + signature).hex(),
            (
                good
                + Ed25519PrivateKey.from_private_bytes(seeded("somebody else")).sign(LABEL + enc(b"envelope", good))
            ).hex(),
            (good + identity.sign(good)).hex(),
            (told(kind=READY, body=b"") + signed(told(kind=DECLINED, body=b""))[-64:]).hex(),
            *((change + signature).hex() for change in _changed_headers(told)),
        ],
        "malformed": {why: data.hex() for why, data in malformed.items()},
    }


def _changed_headers(told: Callable[..., bytes]) -> list[bytes]:
    """One for each field of the header, which the signature must cover."""
    return [
        told(run_id=u64(12)),
        told(round_=b"\3"),
        told(attempt=b"\1"),
        told(sequence=b"\1"),
        told(binding=seeded("another ctx")),
        told(source=b"beta"),
        told(destination=b"beta"),
    ]


# --- Discrete Gaussian noise ---


def discrete_gaussian() -> list:
    """Samples by the definition: one 256-bit number each, inverted by adding up probabilities of a hundred digits."""
    cases = []
    for variance, count in ((16**2, 400), (64**2, 300), (128**2 + 1, 40), ((13 * 65536) ** 2, 40)):
        key = seeded(f"noise {variance}")
        aes = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        drawn = [0] * count
        for factor, narrow in narrow_gaussians(variance):
            edges, lowest = gaussian_edges(narrow)
            cells = [int.from_bytes(aes.update(bytes(2)), "little") for _ in range(count)]
            undecided = {edge >> 240 for edge in edges}
            middles = [int.from_bytes(aes.update(bytes(8)), "little") >> 16 if c in undecided else 0 for c in cells]
            for index, (cell, middle) in enumerate(zip(cells, middles, strict=True)):
                uniform = (cell << 48 | middle) << 192  # no edge of these cases needs more
                drawn[index] += factor * (lowest + sum(edge <= uniform for edge in edges))
        cases.append({"variance": variance, "key": key.hex(), "samples": drawn})
    return cases


def narrow_gaussians(variance: int) -> list:
    """Pairs (factor, variance), narrowest first, with sum of factor^2 * variance as asked."""
    parts = []
    while variance > 128**2:
        factor = 1
        while variance > factor**2 * (128**2 + 8):
            factor += 1
        parts.append((factor, variance // factor**2 - 8))
        variance -= factor**2 * parts[-1][1]
    return [(1, variance), *reversed(parts)]


def gaussian_edges(variance: int) -> tuple:
    """floor(2^256 P(X <= k)) for k from `lowest` on."""
    with decimal.localcontext() as context:
        context.prec = 130
        bound = 1
        while (decimal.Decimal(-bound * bound) / (2 * variance)).exp() >= decimal.Decimal(2) ** -256:
            bound += 1
        weights = [(decimal.Decimal(-k * k) / (2 * variance)).exp() for k in range(-bound, bound + 1)]
        total, running, edges = sum(weights), decimal.Decimal(0), []
        for weight in weights[:-1]:
            running += weight
            edges.append(int(running / total * 2**256))
        return edges, -bound


GENERATORS = (canonical, keys, shamir, masks, encoding, envelope, discrete_gaussian)


def rendered() -> dict[str, str]:
    """Each file's name and text."""
    return {f"{make.__name__}.json": json.dumps(make(), indent=1) + "\n" for make in GENERATORS}


if __name__ == "__main__":
    for name, text in rendered().items():
        (FOLDER / name).write_text(text)
