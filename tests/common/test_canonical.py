"""`enc` is injective and pinned: everything signed or hashed goes through it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.canonical import canonical_json, digest, enc, labelled


def test_known_answers():
    assert enc(b"a", 1, "é").hex() == "000000016100000008000000000000000100000002c3a9"
    assert enc([b"a", b""]).hex() == "00000009000000016100000000"
    assert labelled("round", b"x") == b"foedus/v1/" + enc("round", b"x")
    assert digest("round", b"x").hex() == "4fd04c811db1775c2d2f0cc0ad306cf9e8e00141c37ca5ea9c6f0be4201ae5c3"


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_two_lists_never_share_an_encoding(left, right):
    assert (enc(*left) == enc(*right)) == (left == right)


def test_negative_and_too_large_integers_are_refused():
    for number in (-1, 2**64):
        with pytest.raises(OverflowError):
            enc(number)


def test_canonical_json_is_sorted_and_refuses_nan():
    assert canonical_json({"b": 1.5, "a": ["é"]}) == '{"a":["é"],"b":1.5}'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))
