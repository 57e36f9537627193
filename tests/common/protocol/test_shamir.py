"""Shamir. Failure: a secret not recovered from t shares, one that t - 1 shares rule out, a wrong share missed."""

from __future__ import annotations

import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.protocol import shamir

SECRETS = st.binary(min_size=32, max_size=32)


@st.composite
def sharings(draw: st.DrawFn, most: int = 20) -> tuple[bytes, int, dict[int, bytes]]:
    """A secret, a threshold, and a share for each x."""
    secret, seed = draw(SECRETS), draw(st.integers(0, 2**32))
    xs = draw(st.lists(st.integers(1, 255), min_size=1, max_size=most, unique=True))
    threshold = draw(st.integers(1, len(xs)))
    shares = shamir.split(secret, threshold, xs, random.Random(seed).randbytes)
    return secret, threshold, dict(zip(xs, shares, strict=True))


def through(points: dict[int, int], x: int) -> int:
    """The value at x of the polynomial of least degree through the points, by the definition."""
    total = 0
    for i, y in points.items():
        for j in points:
            if j != i:
                y = y * (x - j) * pow(i - j, -1, shamir.PRIME) % shamir.PRIME
        total += y
    return total % shamir.PRIME


def test_the_modulus_is_prime_and_holds_every_secret():
    assert shamir.PRIME > 2**256 - 1
    even, twos = shamir.PRIME - 1, 0
    while even % 2 == 0:
        even, twos = even // 2, twos + 1
    for base in range(2, 50):  # Miller and Rabin
        power = pow(base, even, shamir.PRIME)
        squares = [pow(power, 2**k, shamir.PRIME) for k in range(twos)]
        assert power == 1 or shamir.PRIME - 1 in squares


DRAWS = st.integers(0, 2**512 - 1) | st.sampled_from([shamir.PRIME - 1, 2**512 - 1])


@given(SECRETS | st.just(b"\xff" * 32), st.data())
def test_shares_are_the_values_of_newtons_form_by_the_definition(secret, data):
    """Whatever is drawn, the largest coefficients at the last points included."""
    xs = data.draw(st.just(range(1, 256)) | st.lists(st.integers(1, 255), min_size=1, max_size=20, unique=True))
    threshold = data.draw(st.integers(1, len(xs)))
    few = data.draw(st.lists(DRAWS, min_size=1, max_size=5))
    drawn = [few[k % len(few)] for k in range(threshold - 1)]
    shares = shamir.split(secret, threshold, xs, lambda size: b"".join(a.to_bytes(64, "big") for a in drawn))
    newton = [int.from_bytes(secret, "big"), *drawn]
    values = [sum(a * math.comb(x, k) for k, a in enumerate(newton)) % shamir.PRIME for x in xs]
    assert shares == [value.to_bytes(33, "big") for value in values]


@given(sharings(), st.randoms(use_true_random=False))
def test_any_t_shares_give_the_secret(sharing, rng):
    secret, threshold, shares = sharing
    xs = rng.sample(sorted(shares), threshold)
    assert shamir.recover(shamir.lagrange_at_zero(xs), [shares[x] for x in xs]) == secret


@given(sharings(), SECRETS, st.randoms(use_true_random=False))
def test_any_secret_is_consistent_with_t_minus_1_shares(sharing, other, rng):
    """Whoever holds t - 1 shares can complete them to a sharing of any secret: they do not say which it was."""
    _, threshold, shares = sharing
    held = {x: int.from_bytes(shares[x], "big") for x in rng.sample(sorted(shares), threshold - 1)}
    points = {0: int.from_bytes(other, "big")} | held
    completed = {x: through(points, x).to_bytes(33, "big") for x in range(1, threshold + 1) if x not in held}
    xs = [*held, *completed][:threshold]
    values = [completed.get(x) or shares[x] for x in xs]
    assert shamir.recover(shamir.lagrange_at_zero(xs), values) == other


def test_single_bits_of_a_share_are_fair_coins_whatever_the_secret():
    """400 sharings each of two extreme secrets: every bit of a share is set about half the time (|z| < 5)."""
    for secret in (bytes(32), b"\xff" * 32):
        randbytes = random.Random(1).randbytes
        shares = [int.from_bytes(shamir.split(secret, 2, [1, 2], randbytes)[0], "big") for _ in range(400)]
        for bit in range(256):
            assert abs(sum(share >> bit & 1 for share in shares) - 200) < 50


@given(sharings(), st.data())
def test_wrong_shares_are_corrected_and_named(sharing, data):
    secret, threshold, shares = sharing
    most = (len(shares) - threshold) // 2
    wrong = data.draw(st.lists(st.sampled_from(sorted(shares)), max_size=most, unique=True))
    for x in wrong:
        shift = data.draw(st.integers(1, shamir.PRIME - 1))
        shares[x] = ((int.from_bytes(shares[x], "big") + shift) % shamir.PRIME).to_bytes(33, "big")
    corrected = shamir.correct(shares, threshold)
    assert (corrected.secret, corrected.wrong) == (secret, frozenset(wrong))


def test_too_many_wrong_shares_are_refused():
    randbytes = random.Random(2).randbytes
    shares = dict(zip(range(1, 11), shamir.split(bytes(32), 7, range(1, 11), randbytes), strict=True))
    shares |= {1: bytes(33), 2: b"\0" + b"\xff" * 32}
    with pytest.raises(RemoteError) as caught:
        shamir.correct(shares, 7)
    assert caught.value.reason is Reason.BAD_SHARE


def test_a_share_beyond_the_modulus_counts_as_wrong():
    randbytes = random.Random(3).randbytes
    shares = dict(zip(range(1, 6), shamir.split(bytes(32), 3, range(1, 6), randbytes), strict=True))
    shares[4] = b"\xff" * 33
    assert shamir.correct(shares, 3).wrong == {4}


class TestRecovery:
    def deal(self, secrets: int = 4) -> tuple[list[bytes], list[dict[int, bytes]]]:
        randbytes = random.Random(4).randbytes
        dealt = [randbytes(32) for _ in range(secrets)]
        return dealt, [
            dict(zip(range(1, 10), shamir.split(secret, 5, range(1, 10), randbytes), strict=True)) for secret in dealt
        ]

    def test_it_learns_which_points_are_wrong(self):
        secrets, shares = self.deal()
        recovery = shamir.Recovery(range(1, 10), 5)
        for secret, dealt in zip(secrets, shares, strict=True):
            dealt |= {2: bytes(33), 3: bytes(33)}
            assert recovery.secret(dealt, secret.__eq__) == secret
            assert recovery.wrong == {2, 3}

    def test_a_secret_that_nobody_committed_to_is_refused(self):
        _, shares = self.deal(1)
        with pytest.raises(RemoteError) as caught:
            shamir.Recovery(range(1, 10), 5).secret(shares[0], lambda secret: False)
        assert caught.value.reason is Reason.BAD_SHARE


@pytest.mark.parametrize(
    ("secret", "threshold", "xs"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(32), 0, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 2, [0, 1]),
        (bytes(32), 2, [1, 1]),
        (bytes(32), 2, [1, 256]),
    ],
)
def test_impossible_sharings_are_refused(secret, threshold, xs):
    with pytest.raises(LocalError):
        shamir.split(secret, threshold, xs, random.Random(0).randbytes)


def test_splitting_for_100_sites_takes_well_under_5_ms():
    randbytes, best = random.Random(5).randbytes, 1.0
    for _ in range(20):
        start = time.perf_counter()
        shamir.split(bytes(32), 61, range(1, 101), randbytes)
        best = min(best, time.perf_counter() - start)
    assert best < 0.005
