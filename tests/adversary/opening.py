"""The best attack on a transcript that we can write: everything a coordinator saw, put together to open one vector.

    opened = open_transcript(exchanges, vectors, private_keys)

It knows the key schedule and does all that can be done without breaking a primitive:

1. opens every sealed share that was sealed to a key whose private half it has (a colluder's, or a substituted one);
2. pools these with all shares that sites ever sent, over all attempts, and tries every subset of them on every secret;
3. takes off each masked vector whatever masks follow from the secrets and private keys that it then has;
4. what is left are linear equations modulo 2^64 over vectors and unknown masks. It eliminates the masks exactly, over
   all attempts at once (as if a site had masked the same vector in each attempt of a round) and over each alone:
   differences of sums, sums over different survivors and masks that cancel are all combinations of rows;
5. believes only what decodes: an encoding counts its own summands.

Tests feed it with what would suffice, so that "it failed" means something.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from foedus_common.errors import RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import primitives, shamir, wire
from foedus_common.protocol.masks import Words, apply_masks
from foedus_common.protocol.primitives import KeyPair, Parcel

WORD = 1 << 64


@dataclass(frozen=True)
class Exchange:
    """One request of the coordinator's, and what the site answered (bytes of envelopes)."""

    site: str
    request: bytes
    answer: bytes


@dataclass
class Opened:
    """vectors: by (site, round), what was recovered of one site alone, int64 (d,) steps of the encoding.
    sums: the sites of every sum of several that could be opened, with what it was."""

    vectors: dict[tuple[str, int], NDArray[np.int64]] = field(default_factory=dict)
    sums: dict[tuple[str, ...], NDArray[np.int64]] = field(default_factory=dict)


@dataclass
class Seen:
    """What one site was shown and said in one attempt."""

    site: str
    config: m.RoundConfig
    ctx: bytes
    own: m.Advertise
    shown: dict[str, m.Advertise] = field(default_factory=dict)
    u1: bytes = b""
    sealed: dict[str, bytes] = field(default_factory=dict)
    dealers: tuple[str, ...] = ()
    words: Words | None = None
    shares: list[tuple[str, m.UnmaskShare]] = field(default_factory=list)


def open_transcript(
    exchanges: Iterable[Exchange], vectors: Mapping[bytes, bytes], private_keys: Iterable[bytes]
) -> Opened:
    """vectors: uploaded objects by digest. private_keys: X25519, 32 bytes: of colluding sites, and of the coordinator's
    own making."""
    attempts = _follow(exchanges, vectors)
    private = {(pair := KeyPair.from_private(key)).public: pair for key in private_keys}
    seeds = _recover_secrets(attempts, private)
    opened = Opened()
    for ids in ({seen.config.attempt_id for seen in attempts}, *({seen.config.attempt_id} for seen in attempts)):
        _solve([seen for seen in attempts if seen.config.attempt_id in ids], seeds, private, opened)
    return opened


def _follow(exchanges: Iterable[Exchange], vectors: Mapping[bytes, bytes]) -> list[Seen]:
    attempts: dict[tuple[str, m.AttemptId], Seen] = {}
    for exchange in exchanges:
        asked, said = wire.parse_envelope(exchange.request), wire.parse_envelope(exchange.answer)
        key = (exchange.site, asked.header.attempt_id)
        request, answer = asked.message, said.message
        if isinstance(request, m.RoundConfig) and isinstance(answer, m.Advertise):
            attempts[key] = Seen(exchange.site, request, wire.round_context(asked.body), answer)
        seen = attempts.get(key)
        if seen is None:
            continue
        if isinstance(request, m.PeerKeys) and isinstance(answer, m.ShareKeys):
            envelopes = [wire.parse_envelope(data) for data in request.envelopes]
            seen.shown = {e.header.source: e.message for e in envelopes if isinstance(e.message, m.Advertise)}
            seen.u1 = wire.key_set_digest(seen.shown)
            peers = [site for site in sorted(seen.shown) if site != seen.site]
            seen.sealed = dict(zip(peers, answer.sealed, strict=True))
        elif isinstance(request, m.PeerShares) and isinstance(answer, m.MaskedInput):
            seen.dealers = tuple(sorted({seen.site, *(site for site, _ in request.sealed)}))
            seen.words = np.frombuffer(vectors[answer.vector.digest], dtype="<u8").astype(np.uint64)
        elif isinstance(answer, m.Unmask):
            seen.shares += zip(seen.dealers, answer.shares, strict=True)
    return list(attempts.values())


# --- 1 and 2: shares, wherever they come from ---


def _recover_secrets(attempts: Sequence[Seen], private: dict[bytes, KeyPair]) -> dict[bytes, bytes]:
    """Self-mask seeds by their commitments; recovered mask keys are put into `private`."""
    pool: dict[bytes, dict[int, set[bytes]]] = defaultdict(lambda: defaultdict(set))
    for seen in attempts:
        for peer, sealed in seen.sealed.items():
            if pair := private.get(seen.shown[peer].share_key):
                secret = pair.shared_secret(seen.own.share_key, seen.site)
                salt = primitives.pair_salt(seen.ctx, seen.u1, seen.site, peer)
                key = primitives.share_key(secret, salt, seen.site, peer)
                both = primitives.unseal(key, sealed, Parcel(seen.ctx, seen.u1, seen.site, peer))
                x = seen.config.x(peer)
                pool[seen.own.commitment][x].add(both[: shamir.SHARE_BYTES])
                pool[seen.own.mask_key][x].add(both[shamir.SHARE_BYTES :])
        for dealer, share in seen.shares:
            dealt = seen.shown[dealer]
            target = dealt.commitment if isinstance(share, m.SelfMaskShare) else dealt.mask_key
            pool[target][seen.config.x(seen.site)].add(share.value)

    seeds: dict[bytes, bytes] = {}
    for target, shares in pool.items():
        for secret in _combined({x: min(values) for x, values in shares.items()}):
            if primitives.commitment(secret) == target:
                seeds[target] = secret
            elif (pair := KeyPair.from_private(secret)).public == target:
                private[target] = pair
    return seeds


def _combined(shares: Mapping[int, bytes]) -> Iterable[bytes]:
    """What every subset of the shares would give, whatever the threshold was."""
    for size in range(1, len(shares) + 1):
        for xs in combinations(sorted(shares), size):
            if secret := shamir.recover(shamir.lagrange_at_zero(xs), [shares[x] for x in xs]):
                yield secret


# --- 3 to 5: equations ---


def _solve(
    attempts: Sequence[Seen], seeds: Mapping[bytes, bytes], private: Mapping[bytes, KeyPair], opened: Opened
) -> None:
    masked = [seen for seen in attempts if seen.words is not None]
    rows, right = [], []
    for seen in masked:
        unknown, words = _without_known_masks(seen, seeds, private)
        rows.append({("vector", seen.site, seen.config.terms.round): 1, **unknown})
        right.append(words)
    for vectors, combination in _eliminate(rows):
        used = [(seen, words, _modulo(w)) for seen, words, w in zip(masked, right, combination, strict=True) if w]
        if any(weight is None for _, _, weight in used) or len({len(words) for _, words, _ in used}) > 1:
            continue
        total = np.zeros_like(used[0][1])
        for _, words, weight in used:
            total += np.uint64(weight or 0) * words
        layout = used[0][0].config.terms.layout
        try:
            steps = layout.unpack_sum(total, len(vectors))
        except RemoteError:
            continue  # not what it was taken for
        sites = tuple(sorted(site for _, site, _ in vectors))
        if len(vectors) == 1:
            ((_, site, round_),) = vectors
            opened.vectors[site, round_] = steps
        else:
            opened.sums[sites] = steps


def _without_known_masks(
    seen: Seen, seeds: Mapping[bytes, bytes], private: Mapping[bytes, KeyPair]
) -> tuple[dict[Hashable, int], Words]:
    """The masked vector less every mask that can be computed, and a name for each that cannot, with its sign."""
    assert seen.words is not None
    words, unknown = seen.words.copy(), dict[Hashable, int]()
    if seed := seeds.get(seen.own.commitment):
        apply_masks(words, subtract=[primitives.self_mask_key(seed, seen.ctx)])
    else:
        unknown["self", seen.own.commitment, seen.ctx] = 1
    for peer in seen.dealers:
        if peer == seen.site:
            continue
        sign, theirs = (1 if peer < seen.site else -1), seen.shown[peer].mask_key
        salt = primitives.pair_salt(seen.ctx, seen.u1, seen.site, peer)
        if pair := private.get(theirs):
            secret = pair.shared_secret(seen.own.mask_key, seen.site)
        elif pair := private.get(seen.own.mask_key):
            secret = pair.shared_secret(theirs, peer)
        else:
            unknown["pair", frozenset((seen.own.mask_key, theirs)), salt] = sign
            continue
        key = [primitives.pair_mask_key(secret, salt)]
        apply_masks(words, add=key if sign < 0 else (), subtract=key if sign > 0 else ())
    return unknown, words


def _eliminate(rows: Sequence[Mapping[Hashable, int]]) -> Iterable[tuple[list[Hashable], list[Fraction]]]:
    """Combinations of the rows in which no mask is left and every vector counts once: (vectors, weight of each row).

    Gauss-Jordan over the rationals, masks first: a unit vector is in the row space exactly when it is a row of the
    reduced form.
    """
    names = sorted({name for row in rows for name in row}, key=lambda name: (name[0] == "vector", str(name)))
    table = [
        [Fraction(row.get(name, 0)) for name in names] + [Fraction(i == j) for j in range(len(rows))]
        for i, row in enumerate(rows)
    ]
    done = 0
    for column in range(len(names)):
        pivot = next((i for i in range(done, len(table)) if table[i][column]), None)
        if pivot is None:
            continue
        table[done], table[pivot] = table[pivot], table[done]
        table[done] = [value / table[done][column] for value in table[done]]
        for i, row in enumerate(table):
            if i != done and row[column]:
                table[i] = [a - row[column] * b for a, b in zip(row, table[done], strict=True)]
        done += 1
    for row in table:
        left = {name: value for name, value in zip(names, row, strict=False) if value}
        if left and all(name[0] == "vector" and value == 1 for name, value in left.items()):
            yield list(left), row[len(names) :]


def _modulo(weight: Fraction) -> int | None:
    """The weight modulo 2^64; None where it has no inverse."""
    if weight.denominator % 2 == 0:
        return None
    return weight.numerator * pow(weight.denominator, -1, WORD) % WORD
