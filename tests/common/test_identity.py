"""Keys, fingerprints, the root-signed roster and the signed plan: known answers, and that nothing altered passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.canonical import canonical_json
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import (
    MAX_ROSTER_BYTES,
    Roster,
    RosterSite,
    SignedPlan,
    SignedRoster,
    check_org,
    check_site_name,
    fingerprint,
    generate_key,
    parse_roster,
    public_bytes,
    public_pem,
    read_key,
    read_public_key,
    verify,
    write_key,
)
from foedus_common.protocol.draw import MAX_SITES
from plans import agreed_plan
from seeded import seeded

# RFC 8032, section 7.1, test 1.
RFC_SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
RFC_SIGNATURE_OF_NOTHING = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
    "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
)

ROOT = Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
OTHER = generate_key(seeded("other"))
NOW = 1_800_000_000.0
ROSTER = Roster(
    epoch=7,
    not_after=1_800_000_100,
    plan_key=bytes(range(32)),
    sites=(RosterSite("north", "Nordklinik", b"n" * 32), RosterSite("south", "Hôpital du Sud", b"s" * 32)),
)
SIGNED = SignedRoster.sign(ROSTER, ROOT)


def opened(signed: SignedRoster, *, root: bytes = RFC_PUBLIC, now: float = NOW, highest_epoch: int = 0) -> Roster:
    return signed.verify(root, now=now, highest_epoch=highest_epoch)


def reason_of(error: pytest.ExceptionInfo[RemoteError]) -> Reason:
    return error.value.reason


# --- Keys ---


def test_keys_are_ed25519_as_in_the_rfc() -> None:
    assert public_bytes(ROOT) == RFC_PUBLIC
    verify(RFC_PUBLIC, RFC_SIGNATURE_OF_NOTHING, b"", "the test vector")
    with pytest.raises(RemoteError, match="the test vector is not signed") as error:
        verify(RFC_PUBLIC, RFC_SIGNATURE_OF_NOTHING, b"x", "the test vector")
    assert reason_of(error) is Reason.BAD_SIGNATURE


@pytest.mark.parametrize(
    ("key", "signature"), [(b"short", bytes(64)), (bytes(32), b"short"), (b"\xff" * 32, bytes(64))]
)
def test_malformed_keys_and_signatures_are_bad_signatures(key: bytes, signature: bytes) -> None:
    with pytest.raises(RemoteError) as error:
        verify(key, signature, b"", "it")
    assert reason_of(error) is Reason.BAD_SIGNATURE


def test_a_fingerprint_is_eight_groups_to_read_aloud() -> None:
    assert fingerprint(RFC_PUBLIC) == "xk5c bb4l 45g4 4vvl 7h44 iise vf7c eikl"
    assert fingerprint(RFC_PUBLIC) != fingerprint(bytes(32))


def test_a_key_survives_its_file_which_only_the_owner_can_read(tmp_path: Path) -> None:
    write_key(tmp_path / "k", ROOT)
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert public_bytes(read_key(tmp_path / "k")) == RFC_PUBLIC
    with pytest.raises(LocalError, match="not overwritten"):
        write_key(tmp_path / "k", OTHER)
    assert public_bytes(read_key(tmp_path / "k")) == RFC_PUBLIC


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    write_key(tmp_path / "k", ROOT)
    (tmp_path / "k").chmod(mode)
    with pytest.raises(LocalError, match="chmod 600"):
        read_key(tmp_path / "k")


def test_what_is_no_key_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="does not exist"):
        read_key(tmp_path / "k")
    (tmp_path / "k").touch(mode=0o600)
    (tmp_path / "k").write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(LocalError, match="holds no Ed25519 private key"):
        read_key(tmp_path / "k")
    (tmp_path / "k").write_bytes(b"k" * 5000)
    with pytest.raises(LocalError, match="longer than 4096 bytes"):
        read_key(tmp_path / "k")
    with pytest.raises(LocalError, match="holds no Ed25519 public key"):
        read_public_key(tmp_path / "k")
    with pytest.raises(LocalError, match="cannot be read"):
        read_public_key(tmp_path / "absent")


def test_a_public_key_survives_its_file(tmp_path: Path) -> None:
    (tmp_path / "root.pub").write_bytes(public_pem(RFC_PUBLIC))
    assert read_public_key(tmp_path / "root.pub") == RFC_PUBLIC


@pytest.mark.parametrize("name", ["", "North", "a_b", "a/b", "..", "a" * 41, "north\n", "é"])
def test_names_that_are_unfit_for_files_and_certificates_are_refused(name: str) -> None:
    with pytest.raises(LocalError, match="no site name"):
        check_site_name(name)


@pytest.mark.parametrize("org", ["", " x", "x\n", "x\x1b[31m", "\u202eevil", "x" * 121])
def test_organisations_that_would_not_show_on_one_line_are_refused(org: str) -> None:
    with pytest.raises(LocalError, match="no organisation's name"):
        check_org(org)


# --- The roster ---


def test_the_rosters_bytes_and_digest_are_pinned() -> None:
    assert ROSTER.canonical().decode() == (
        '{"epoch":7,"not_after":1800000100,'
        '"plan_key":"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f","sites":['
        f'{{"name":"north","org":"Nordklinik","public_key":"{"6e" * 32}"}},'
        f'{{"name":"south","org":"Hôpital du Sud","public_key":"{"73" * 32}"}}]}}'
    )
    assert ROSTER.digest().hex() == "286459a001075333607fa506b97a902d0a0601cfb462fac53bd4534458e10ef7"
    assert SIGNED.signature.hex() == (
        "bb35220e2284ee2355eedc8066d62d3ad59e64746b2346b4313f6a53b805ae01"
        "e67ff23f2b00cf7b26321174f00fb7b9a35590e5157e24baf8562d952e6f6905"
    )


def test_a_signed_roster_opens_to_what_was_signed() -> None:
    assert opened(SignedRoster.from_bytes(SIGNED.to_bytes()), highest_epoch=7) == ROSTER
    assert ROSTER.site("south").org == "Hôpital du Sud"
    assert ROSTER.public_keys == {"north": b"n" * 32, "south": b"s" * 32}
    assert ROSTER.organisations == {"north": "Nordklinik", "south": "Hôpital du Sud"}


def test_a_site_that_is_not_listed_is_unknown() -> None:
    with pytest.raises(RemoteError, match="epoch 7") as error:
        ROSTER.site("west")
    assert reason_of(error) is Reason.UNKNOWN_SITE


@pytest.mark.parametrize(
    "changed",
    [
        replace(ROSTER, epoch=8),
        replace(ROSTER, not_after=ROSTER.not_after + 1),
        replace(ROSTER, plan_key=bytes(32)),
        replace(ROSTER, sites=ROSTER.sites[:1]),
        replace(ROSTER, sites=(replace(ROSTER.sites[0], name="nord"), ROSTER.sites[1])),
        replace(ROSTER, sites=(replace(ROSTER.sites[0], org="Südklinik"), ROSTER.sites[1])),
        replace(ROSTER, sites=(replace(ROSTER.sites[0], public_key=b"x" * 32), ROSTER.sites[1])),
    ],
)
def test_no_field_of_a_roster_can_be_changed_after_the_root_signed(changed: Roster) -> None:
    with pytest.raises(RemoteError) as error:
        opened(SignedRoster(changed.canonical(), SIGNED.signature))
    assert reason_of(error) is Reason.BAD_SIGNATURE


@given(st.integers(0, 8 * len(SIGNED.to_bytes()) - 1))
def test_no_bit_of_a_signed_roster_can_be_flipped(bit: int) -> None:
    data = bytearray(SIGNED.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(RemoteError) as error:
        opened(SignedRoster.from_bytes(bytes(data)))
    assert reason_of(error) is Reason.BAD_SIGNATURE


def test_another_root_and_another_kind_of_document_do_not_vouch() -> None:
    with pytest.raises(RemoteError) as error:
        opened(SignedRoster.sign(ROSTER, OTHER))
    assert reason_of(error) is Reason.BAD_SIGNATURE
    as_plan = SignedPlan._sign(ROSTER.canonical(), ROOT)
    with pytest.raises(RemoteError) as error:
        opened(SignedRoster(as_plan.canonical, as_plan.signature))
    assert reason_of(error) is Reason.BAD_SIGNATURE


def test_an_older_or_expired_roster_is_stale() -> None:
    with pytest.raises(RemoteError, match="of epoch 7, but one of 8 was seen") as error:
        opened(SIGNED, highest_epoch=8)
    assert reason_of(error) is Reason.ROSTER_STALE
    assert opened(SIGNED, now=ROSTER.not_after) == ROSTER
    with pytest.raises(RemoteError, match="expired at 2027-01-15T08:01:40") as error:
        opened(SIGNED, now=ROSTER.not_after + 1)
    assert reason_of(error) is Reason.ROSTER_STALE


def malformed(**changes: object) -> bytes:
    return canonical_json(json.loads(ROSTER.canonical()) | changes)


NORTH = json.loads(ROSTER.canonical())["sites"][0]


@pytest.mark.parametrize(
    "canonical",
    [
        b"",
        b"null",
        b"[" * 100_000,
        b'{"epoch":1}',
        ROSTER.canonical().replace(b",", b", ", 1),
        ROSTER.canonical() + b" ",
        malformed(extra=1),
        malformed(epoch=0),
        malformed(epoch=True),
        malformed(epoch=7.0),
        malformed(epoch="7"),
        malformed(epoch=2**63),
        malformed(not_after=-1),
        malformed(plan_key="00"),
        malformed(plan_key="zz" * 32),
        malformed(plan_key="AB" * 32),
        malformed(sites={}),
        malformed(sites=[NORTH, NORTH]),
        malformed(sites=[NORTH | {"name": "z"}, NORTH | {"name": "a", "public_key": "61" * 32}]),
        malformed(sites=[NORTH, NORTH | {"name": "o"}]),
        malformed(sites=[NORTH | {"name": "NORTH"}]),
        malformed(sites=[NORTH | {"org": "two\nlines"}]),
        malformed(sites=[NORTH | {"public_key": "6e" * 31}]),
        malformed(sites=[NORTH | {"extra": 1}]),
        malformed(sites=["north"]),
        b"[" + b" " * MAX_ROSTER_BYTES + b"]",
    ],
)
def test_bytes_that_are_no_canonical_roster_are_bad_messages(canonical: bytes) -> None:
    with pytest.raises(RemoteError) as error:
        parse_roster(canonical)
    assert reason_of(error) is Reason.BAD_MESSAGE


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_parsing_raises_nothing_but_remote_errors(data: bytes) -> None:
    with pytest.raises(RemoteError):
        parse_roster(data)
    with pytest.raises(RemoteError):
        opened(SignedRoster.from_bytes(data))


def test_a_roster_too_long_for_the_link_is_not_signed() -> None:
    sites = tuple(RosterSite(f"site-{i:04}", "x" * 120, i.to_bytes(32, "big")) for i in range(1000))
    with pytest.raises(LocalError, match="bytes long; sites read"):
        SignedRoster.sign(replace(ROSTER, sites=sites), ROOT)


def test_the_largest_round_that_a_plan_allows_fits_a_roster() -> None:
    sites = tuple(
        RosterSite(f"branch-{i:04}", "Savings Bank of Somewhere, plc", i.to_bytes(32)) for i in range(MAX_SITES)
    )
    assert opened(SignedRoster.sign(replace(ROSTER, sites=sites), ROOT)).sites == sites


# --- The plan ---


def test_a_signed_plan_opens_to_what_was_signed() -> None:
    agreed = agreed_plan()
    signed = SignedPlan.from_bytes(SignedPlan.sign(agreed, OTHER).to_bytes())
    assert signed.verify(public_bytes(OTHER)) == agreed


def test_a_plan_that_was_changed_or_signed_by_another_is_refused() -> None:
    agreed = agreed_plan()
    signed = SignedPlan.sign(agreed, OTHER)
    with pytest.raises(RemoteError) as error:
        signed.verify(RFC_PUBLIC)
    assert reason_of(error) is Reason.BAD_SIGNATURE
    with pytest.raises(RemoteError) as error:
        SignedPlan(replace(agreed, run_id=agreed.run_id + 1).canonical(), signed.signature).verify(public_bytes(OTHER))
    assert reason_of(error) is Reason.BAD_SIGNATURE


def test_a_signed_text_that_is_no_plan_is_a_bad_message() -> None:
    with pytest.raises(RemoteError, match="not canonical JSON") as error:
        SignedPlan._sign(b"not a plan", OTHER).verify(public_bytes(OTHER))
    assert reason_of(error) is Reason.BAD_MESSAGE


@pytest.mark.parametrize("size", [0, 63, 64, 64 + 128 * 1024 + 1])
def test_a_signed_plan_of_an_impossible_size_is_a_bad_message(size: int) -> None:
    with pytest.raises(RemoteError, match="too short or too long"):
        SignedPlan.from_bytes(bytes(size))
