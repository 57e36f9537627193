"""Known answers of a second implementation (tests/vectors/generate.py), wrong ones too.

Failure: a byte that differs, a wrong answer that is accepted, or committed vectors that the generator does not make.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.canonical import digest, enc, sha256_hex
from foedus_common.errors import Reason, RemoteError
from foedus_common.protocol import messages, primitives, shamir, wire
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import apply_masks
from foedus_common.protocol.primitives import KeyPair, Parcel

VECTORS = Path(__file__).parents[2] / "vectors"


def load(name: str) -> Any:
    return json.loads((VECTORS / name).read_text())


def unhex(table: dict[str, str], *names: str) -> list[bytes]:
    return [bytes.fromhex(table[name]) for name in names]


def words_of(numbers: list[str]) -> np.ndarray:
    return np.array([int(number) for number in numbers], dtype=np.uint64)


def test_the_generator_makes_the_committed_vectors():
    spec = importlib.util.spec_from_file_location("generate_vectors", VECTORS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, text in module.rendered().items():
        assert (VECTORS / name).read_text() == text


def test_the_generator_shares_no_code():
    assert "foedus_common" not in (VECTORS / "generate.py").read_text()


def test_canonical():
    table = load("canonical.json")
    for case in table["enc"]:
        assert enc(*case["parts"]).hex() == case["enc"]
    for case in table["digest"]:
        assert digest(case["domain"], *case["parts"]).hex() == case["digest"]


class TestKeys:
    def test_schedule(self):
        case = load("keys.json")["schedule"]
        site, peer = case["site"], case["peer"]
        ctx, u1, salt, seed = unhex(case, "ctx", "u1", "salt", "self_mask_seed")
        share_private, peer_share_public = unhex(case, "share_private", "peer_share_public")
        mask_private, peer_mask_public = unhex(case, "mask_private", "peer_mask_public")

        assert KeyPair.from_private(bytes.fromhex(case["peer_share_private"])).public == peer_share_public
        assert primitives.pair_salt(ctx, u1, site, peer) == primitives.pair_salt(ctx, u1, peer, site) == salt
        share_secret = KeyPair.from_private(share_private).shared_secret(peer_share_public, peer)
        mask_secret = KeyPair.from_private(mask_private).shared_secret(peer_mask_public, peer)
        assert [share_secret, mask_secret] == unhex(case, "share_secret", "mask_secret")
        assert primitives.share_key(share_secret, salt, site, peer).hex() == case["share_key"]
        assert primitives.share_key(share_secret, salt, peer, site).hex() == case["share_key_back"]
        assert primitives.pair_mask_key(mask_secret, salt).hex() == case["pair_mask_key"]
        assert primitives.self_mask_key(seed, ctx).hex() == case["self_mask_key"]
        assert primitives.commitment(seed).hex() == case["commitment"]

    def test_sealed_shares(self):
        table = load("keys.json")
        ctx, u1, key, shares = unhex(table["schedule"], "ctx", "u1", "share_key", "shares")
        for case in table["sealed"]:
            parcel = Parcel(ctx, u1, case["source"], case["destination"])
            sealed = bytes.fromhex(case["sealed"])
            if case["accept"]:
                assert primitives.unseal(key, sealed, parcel) == shares
                assert primitives.seal(key, shares, parcel) == sealed
            else:
                with pytest.raises(RemoteError) as caught:
                    primitives.unseal(key, sealed, parcel)
                assert caught.value.reason is Reason.BAD_SHARE

    def test_weak_public_keys(self):
        for key in load("keys.json")["weak_public_keys"]:
            with pytest.raises(RemoteError) as caught:
                KeyPair.from_private(bytes(range(32))).shared_secret(bytes.fromhex(key), "beta")
            assert (caught.value.reason, caught.value.suspects) == (Reason.WEAK_KEY, ("beta",))


class TestShamir:
    def test_split(self):
        table = load("shamir.json")
        assert int(table["prime"]) == shamir.PRIME
        for case in table["split"]:
            secret, drawn = unhex(case, "secret", "random")
            shares = shamir.split(secret, case["t"], range(1, case["n"] + 1), lambda size, drawn=drawn: drawn[:size])
            assert [share.hex() for share in shares] == case["shares"]

    def test_correct(self):
        for case in load("shamir.json")["correct"]:
            shares = {x: bytes.fromhex(share) for x, share in enumerate(case["shares"], start=1)}
            if case["accept"]:
                corrected = shamir.correct(shares, case["t"])
                assert (corrected.secret.hex(), sorted(corrected.wrong)) == (case["secret"], case["wrong"])
            else:
                with pytest.raises(RemoteError) as caught:
                    shamir.correct(shares, case["t"])
                assert caught.value.reason is Reason.BAD_SHARE


def test_masks():
    table = load("masks.json")
    words = words_of(table["before"])
    apply_masks(words, add=map(bytes.fromhex, table["add"]), subtract=map(bytes.fromhex, table["subtract"]))
    np.testing.assert_array_equal(words, words_of(table["after"]))
    long = np.zeros(table["long"]["words"], dtype=np.uint64)
    apply_masks(long, add=[bytes.fromhex(table["long"]["key"])])
    assert sha256_hex(long.tobytes()) == table["long"]["sha256"]


class TestEncoding:
    def test_both_ways(self):
        for case in load("encoding.json")["cases"]:
            layout = FieldLayout(case["bits"], case["max_sites"], tuple(map(tuple, case["segments"])))
            values = np.array([float.fromhex(value) for value in case["values"]])
            assert layout.half_range == case["half_range"]
            integers = layout.quantise(values, lambda size, case=case: bytes.fromhex(case["random"])[:size])
            np.testing.assert_array_equal(integers, case["integers"])
            np.testing.assert_array_equal(layout.pack(integers), words_of(case["words"]))
            np.testing.assert_array_equal(layout.unpack_sum(words_of(case["words"]), 1), case["integers"])
            np.testing.assert_array_equal(layout.unpack_sum(words_of(case["sum_of_two"]), 2), case["integers_of_two"])

    def test_bad_sums(self):
        table = load("encoding.json")
        case = table["cases"][0]
        layout = FieldLayout(case["bits"], case["max_sites"], tuple(map(tuple, case["segments"])))
        for bad in table["bad_sums"]:
            with pytest.raises(RemoteError) as caught:
                layout.unpack_sum(words_of(bad["words"]), bad["survivors"])
            assert caught.value.reason is Reason.BAD_SUM, bad["why"]


class TestEnvelope:
    table = load("envelope.json")

    def test_both_ways(self):
        header = wire.Header(**self.table["header"] | {"binding": bytes.fromhex(self.table["header"]["binding"])})
        message = messages.Advertise(**{name: bytes.fromhex(key) for name, key in self.table["advertise"].items()})
        sign = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.table["private_key"])).sign
        data = wire.build_envelope(header, message, sign)
        assert data.hex() == self.table["wire"]
        envelope = wire.parse_envelope(data)
        assert (envelope.header, envelope.message) == (header, message)
        assert (envelope.signed.hex(), envelope.signature.hex()) == (self.table["signed"], self.table["signature"])
        envelope.verify(bytes.fromhex(self.table["public_key"]))

    def test_survivors_statement(self):
        ctx, u1, statement = unhex(self.table["survivors"], "ctx", "u1", "statement")
        assert wire.survivors_statement(ctx, u1, ("alpha", "beta", "gamma")) == statement

    def test_forged(self):
        for data in self.table["forged"]:
            with pytest.raises(RemoteError) as caught:
                wire.parse_envelope(bytes.fromhex(data)).verify(bytes.fromhex(self.table["public_key"]))
            assert caught.value.reason is Reason.BAD_SIGNATURE

    @pytest.mark.parametrize("why", table["malformed"])
    def test_malformed(self, why):
        with pytest.raises(RemoteError) as caught:
            wire.parse_envelope(bytes.fromhex(self.table["malformed"][why]))
        assert caught.value.reason is Reason.BAD_MESSAGE
