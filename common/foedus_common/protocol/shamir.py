"""Shamir's secret sharing of 32-byte secrets, with Reed-Solomon correction of bad shares.

Shares are evaluations of a random polynomial of degree t - 1 over the integers modulo p = 2^256 + 297, the least
prime above every 32-byte secret, at x = 1..n (Shamir 1979). Shares of one secret are a Reed-Solomon codeword, so with
r of them floor((r - t) / 2) wrong ones are found and corrected (Gao 2003). Python integers beat vectorised GF(256)
here. The arithmetic is not constant-time: it runs once per attempt, on secrets of that attempt alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.randomness import RandomBytes

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33

_WIDE_BYTES = 64
"""Coefficients are drawn from this many bytes modulo PRIME: within 2^-255 of uniform."""


def split(secret: bytes, threshold: int, xs: Sequence[int], random: RandomBytes) -> list[bytes]:
    """Shares (33 bytes each) of a 32-byte secret, one for each x: any `threshold` of them give it back, fewer nothing.

    The polynomial is the secret + sum of a_k * binomial(X, k) with random a_k (Newton's form): as uniform as in powers
    of X, for the change of basis is triangular and k! has an inverse. The secret and the a_k are its value and its
    differences at 0. From x to x + 1 each difference grows by the next higher one; all of them, in lanes of one long
    integer, by a shift and an addition. `xs` are distinct and in 1..255 (they are index in cohort + 1). LocalError
    otherwise.
    """
    if len(secret) != SECRET_BYTES:
        raise LocalError(f"a shared secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not 1 <= threshold <= len(xs) or len(set(xs)) != len(xs) or min(xs) < 1 or max(xs) > 255:
        raise LocalError(f"cannot share a secret among {len(xs)} points with threshold {threshold}")
    draws = struct.iter_unpack(f"{_WIDE_BYTES}s", random(_WIDE_BYTES * (threshold - 1)))
    differences = [int.from_bytes(secret, "big"), *(int.from_bytes(wide, "big") % PRIME for (wide,) in draws)]
    last = max(xs)
    lane_bytes = -(-(PRIME.bit_length() + last) // 8)  # a step at most doubles a difference
    lane, lowest = 8 * lane_bytes, (1 << 8 * lane_bytes) - 1
    lanes = int.from_bytes(b"".join(each.to_bytes(lane_bytes, "little") for each in differences), "little")
    values = []
    for x in range(last + 1):
        if last - x < threshold and x % 8 == 0:  # drop differences of an order that no point left can reach
            lanes &= (1 << lane * (last + 1 - x)) - 1
        values.append(lanes & lowest)
        lanes += lanes >> lane
    return [(values[x] % PRIME).to_bytes(SHARE_BYTES, "big") for x in xs]


def lagrange_at_zero(xs: Sequence[int]) -> list[int]:
    """Coefficients w with secret = sum of w_i * share_i. Once per set of responders, then reused for every secret."""
    weights = []
    for x in xs:
        numerator = denominator = 1
        for other in xs:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        weights.append(numerator * pow(denominator, -1, PRIME) % PRIME)
    return weights


def recover(weights: Sequence[int], shares: Sequence[bytes]) -> bytes | None:
    """The secret (32 bytes) from exactly `threshold` shares and their Lagrange weights.

    None if the result is no 32-byte secret: then a share is wrong. A wrong share usually gives a wrong secret, so
    the caller compares what it gets with what the dealer published.
    """
    total = sum(weight * int.from_bytes(share, "big") for weight, share in zip(weights, shares, strict=True))
    return _as_secret(total % PRIME)


@dataclass(frozen=True)
class Corrected:
    """A secret found in spite of wrong shares, and the x of those that were wrong."""

    secret: bytes
    wrong: frozenset[int]

    def __repr__(self) -> str:
        return f"Corrected(wrong={sorted(self.wrong)})"


def correct(shares: Mapping[int, bytes], threshold: int) -> Corrected:
    """The secret from r >= threshold shares of which up to floor((r - threshold) / 2) are wrong.

    RemoteError(BAD_SHARE) if more are wrong. Source: S. Gao, A new algorithm for decoding Reed-Solomon codes, 2003.
    """
    xs = list(shares)
    values = [int.from_bytes(share, "big") % PRIME for share in shares.values()]
    vanishing = [1]
    for x in xs:
        vanishing = _times(vanishing, [-x % PRIME, 1])
    received = _interpolate(xs, values, vanishing)
    # Extended Euclid on (vanishing, received), stopped half-way: remainder = locator * polynomial of the dealer.
    before, remainder = vanishing, received
    locator_before, locator = [0], [1]
    while 2 * _degree(remainder) >= len(xs) + threshold:
        quotient, rest = _divide(before, remainder)
        before, remainder = remainder, rest
        locator_before, locator = locator, _minus(locator_before, _times(quotient, locator))
    polynomial, rest = _divide(remainder, locator)
    secret = _as_secret(polynomial[0])
    if any(rest) or _degree(polynomial) >= threshold or secret is None:
        raise RemoteError(Reason.BAD_SHARE, f"too many of {len(xs)} shares are wrong to find the secret")
    wrong = frozenset(x for x, value in zip(xs, values, strict=True) if _evaluate(polynomial, x) != value)
    return Corrected(secret, wrong)


class Recovery:
    """Recovers many secrets that were dealt to the same points, by the fast way while it works.

    `wrong` grows by every x that gave a wrong share; such points are passed over afterwards.
    """

    def __init__(self, xs: Sequence[int], threshold: int) -> None:
        self.wrong: frozenset[int] = frozenset()
        self._xs = tuple(xs)
        self._threshold = threshold
        self._choose()

    def secret(self, shares: Mapping[int, bytes], genuine: Callable[[bytes], bool]) -> bytes:
        """The secret that `genuine` accepts, from a share for every x. RemoteError(BAD_SHARE) if there is none."""
        candidate = recover(self._weights, [shares[x] for x in self._chosen])
        if candidate is not None and genuine(candidate):
            return candidate
        corrected = correct(shares, self._threshold)
        if not genuine(corrected.secret):
            raise RemoteError(Reason.BAD_SHARE, "the shares agree on a secret that is not the one committed to")
        self.wrong |= corrected.wrong
        self._choose()
        return corrected.secret

    def _choose(self) -> None:
        ranked = sorted(self._xs, key=lambda x: x in self.wrong)
        self._chosen = ranked[: self._threshold]
        self._weights = lagrange_at_zero(self._chosen)


def _as_secret(value: int) -> bytes | None:
    return value.to_bytes(SECRET_BYTES, "big") if value < 2 ** (8 * SECRET_BYTES) else None


# --- Polynomials modulo PRIME: coefficients from the constant up ---

_Polynomial = list[int]


def _degree(polynomial: _Polynomial) -> int:
    """-1 for the zero polynomial."""
    return next((power for power in reversed(range(len(polynomial))) if polynomial[power]), -1)


def _evaluate(polynomial: _Polynomial, x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def _times(left: _Polynomial, right: _Polynomial) -> _Polynomial:
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] = (product[i + j] + a * b) % PRIME
    return product


def _minus(left: _Polynomial, right: _Polynomial) -> _Polynomial:
    length = max(len(left), len(right))
    padded = (side + [0] * (length - len(side)) for side in (left, right))
    return [(a - b) % PRIME for a, b in zip(*padded, strict=True)]


def _divide(dividend: _Polynomial, divisor: _Polynomial) -> tuple[_Polynomial, _Polynomial]:
    """Quotient and remainder; the divisor is not zero."""
    degree = _degree(divisor)
    inverse = pow(divisor[degree], -1, PRIME)
    remainder = list(dividend)
    quotient = [0] * max(1, len(dividend) - degree)
    for shift in range(len(dividend) - degree - 1, -1, -1):
        factor = remainder[shift + degree] * inverse % PRIME
        quotient[shift] = factor
        for power in range(degree + 1):
            remainder[shift + power] = (remainder[shift + power] - factor * divisor[power]) % PRIME
    return quotient, remainder


def _interpolate(xs: Sequence[int], values: Sequence[int], vanishing: _Polynomial) -> _Polynomial:
    """The polynomial of degree below len(xs) through all points; `vanishing` is the product of (X - x)."""
    total = [0] * len(xs)
    for x, value in zip(xs, values, strict=True):
        basis, _ = _divide(vanishing, [-x % PRIME, 1])
        factor = value * pow(_evaluate(basis, x), -1, PRIME) % PRIME
        for power, coefficient in enumerate(basis[: len(xs)]):
            total[power] = (total[power] + factor * coefficient) % PRIME
    return total
