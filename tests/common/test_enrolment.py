"""The token that is pasted, the request and the reply: they survive the way, and what was altered on it does not."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import fields, replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from foedus_common.canonical import enc, unenc
from foedus_common.certificates import Authority, generate_tls_key, request_certificate
from foedus_common.enrolment import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PREFIX,
    Approved,
    EnrolRequest,
    Refused,
    Token,
    Waiting,
    check_address,
    check_expiry,
    decode_token,
    hash_secret,
    reply_from_bytes,
    reply_to_bytes,
)
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import Roster, RosterSite, SignedRoster, generate_key, public_bytes
from seeded import seeded

RANDOM = seeded("enrolment")
NOW = 1_800_000_000.0
AUTHORITY = Authority.create("Test", RANDOM, NOW)
ROOT, KEY, TLS_KEY = generate_key(RANDOM), generate_key(RANDOM), generate_tls_key(RANDOM)
TOKEN = Token(
    name="north",
    org="Nordklinik für Alle",
    link_address="coordinator.example:8443",
    enrolment_address="[::1]:8444",
    authority=AUTHORITY.der,
    root_public_key=public_bytes(ROOT),
    expires=int(NOW) + 86_400,
    secret=RANDOM(32),
)
TEXT = TOKEN.encode()
REQUEST = EnrolRequest.make(TOKEN, KEY, TLS_KEY)
ROSTER = Roster(3, int(NOW) + 1000, bytes(32), (RosterSite(TOKEN.name, TOKEN.org, public_bytes(KEY)),))
CERTIFICATE = AUTHORITY.issue_site("north", TLS_KEY.public_key(), RANDOM, NOW)
APPROVED = Approved(CERTIFICATE, SignedRoster.sign(ROSTER, ROOT).to_bytes(), (AUTHORITY.der,))


def text_of(body: bytes) -> str:
    """A token with a right checksum, whatever its body."""
    return PREFIX + base64.urlsafe_b64encode(body + hashlib.sha256(body).digest()[:4]).decode().rstrip("=")


def body_of(text: str) -> bytes:
    coded = text.removeprefix(PREFIX)
    return base64.urlsafe_b64decode(coded + "=" * (-len(coded) % 4))[:-4]


# --- The token ---


def test_a_token_survives_a_mail_program() -> None:
    assert decode_token(TEXT) == TOKEN
    wrapped = "\r\n  ".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60))
    assert decode_token(f"  {wrapped}\n") == TOKEN


def test_the_tokens_form_is_pinned() -> None:
    assert unenc(body_of(TEXT)) == (
        b"north",
        "Nordklinik für Alle".encode(),
        b"coordinator.example:8443",
        b"[::1]:8444",
        AUTHORITY.der,
        public_bytes(ROOT),
        (1_800_086_400).to_bytes(8, "big"),
        TOKEN.secret,
    )
    assert text_of(body_of(TEXT)) == TEXT


def test_a_token_and_a_request_do_not_show_their_secret() -> None:
    assert TOKEN.secret.hex() not in repr(TOKEN)
    assert "secret" not in repr(TOKEN)
    assert "secret" not in repr(REQUEST)


@given(st.integers(len(PREFIX), len(TEXT) - 1))
def test_a_cut_token_is_told_apart(length: int) -> None:
    with pytest.raises(LocalError, match="incomplete or was altered"):
        decode_token(TEXT[:length])


@given(st.integers(len(PREFIX), len(TEXT) - 1), st.sampled_from("ABab01-_.é"))
def test_a_mistyped_token_is_told_apart(position: int, character: str) -> None:
    typed = TEXT[:position] + character + TEXT[position + 1 :]
    if typed == TEXT:
        return
    if position == len(TEXT) - 1 and character in "ABab01-_":
        return  # the last character's spare bits carry nothing
    with pytest.raises(LocalError, match="incomplete or was altered"):
        decode_token(typed)


@given(st.text(max_size=80))
def test_any_other_text_is_no_token(text: str) -> None:
    with pytest.raises(LocalError):
        decode_token(text)
    with pytest.raises(LocalError):
        decode_token(PREFIX + text)


def test_what_is_no_token_is_said_so() -> None:
    with pytest.raises(LocalError, match="begins with 'foedus1-'"):
        decode_token("hello")
    with pytest.raises(LocalError, match="too long"):
        decode_token(TEXT + "A" * 4096)


@given(st.integers(0, 7), st.binary(max_size=40))
def test_a_malformed_field_under_a_right_checksum_is_refused(position: int, value: bytes) -> None:
    parts = list(unenc(body_of(TEXT)))
    parts[position] = value
    try:
        token = decode_token(text_of(enc(*parts)))
    except LocalError:
        return
    assert decode_token(token.encode()) == token


@pytest.mark.parametrize("body", [b"", b"\0\0\0", enc("north"), enc(*[b""] * 8), enc(*[b""] * 9)])
def test_a_malformed_body_under_a_right_checksum_is_refused(body: bytes) -> None:
    with pytest.raises(LocalError):
        decode_token(text_of(body))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "North"},
        {"org": ""},
        {"link_address": "no-port"},
        {"enrolment_address": "host:0"},
        {"authority": b"no certificate"},
        {"root_public_key": bytes(31)},
        {"secret": bytes(31)},
    ],
)
def test_a_token_with_one_bad_field_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(LocalError):
        decode_token(replace(TOKEN, **changes).encode())


@pytest.mark.parametrize(
    "address",
    ["", "host", ":1", "host:", "host:65536", "host:0", "ho st:1", "::1:80", "[host]:1", "http://host:1", "host:1/x"],
)
def test_addresses_that_nobody_can_dial_are_refused(address: str) -> None:
    with pytest.raises(LocalError, match="is no address"):
        check_address(address)


def test_addresses_with_names_and_numbers_pass() -> None:
    for address in ("localhost:8443", "10.0.0.1:1", "[2001:db8::1]:65535", "a-b.example:443"):
        check_address(address)


def test_an_expired_token_is_refused_at_the_site_already() -> None:
    check_expiry(TOKEN, TOKEN.expires)
    with pytest.raises(LocalError, match="expired at 2027-01-16T08:00:00"):
        check_expiry(TOKEN, TOKEN.expires + 1)


# --- The request ---


def test_a_request_proves_both_keys() -> None:
    request = EnrolRequest.from_bytes(REQUEST.to_bytes())
    assert request == REQUEST
    request.verify("north")
    assert request.public_key == public_bytes(KEY)


OTHER_TLS_REQUEST = request_certificate("north", generate_tls_key(RANDOM))
ALTERED = {
    "secret": bytes(32),
    "public_key": public_bytes(ROOT),
    "certificate_request": OTHER_TLS_REQUEST,
    "signature": bytes(64),
}


def test_the_alterations_cover_every_field() -> None:
    assert set(ALTERED) == {field.name for field in fields(EnrolRequest)}


@pytest.mark.parametrize("name", ALTERED)
def test_no_field_of_a_request_can_be_changed(name: str) -> None:
    with pytest.raises(RemoteError) as error:
        replace(REQUEST, **{name: ALTERED[name]}).verify("north")
    assert error.value.reason is Reason.BAD_SIGNATURE


def test_a_request_for_another_name_than_the_tokens_is_refused() -> None:
    with pytest.raises(RemoteError, match="another site"):
        REQUEST.verify("south")


@given(st.binary(max_size=300))
def test_bytes_that_are_no_request_are_bad_messages(data: bytes) -> None:
    with pytest.raises(RemoteError):
        EnrolRequest.from_bytes(data).verify("north")


@pytest.mark.parametrize(
    "data",
    [
        REQUEST.to_bytes()[:-1],
        REQUEST.to_bytes() + b"\0",
        REQUEST.to_bytes() + enc(b""),
        enc(REQUEST.secret[:31], REQUEST.public_key, REQUEST.certificate_request, REQUEST.signature),
        enc(REQUEST.secret, REQUEST.public_key, bytes(MAX_REQUEST_BYTES), REQUEST.signature),
    ],
)
def test_requests_of_another_shape_are_bad_messages(data: bytes) -> None:
    with pytest.raises(RemoteError) as error:
        EnrolRequest.from_bytes(data)
    assert error.value.reason is Reason.BAD_MESSAGE


def test_the_secrets_hash_is_pinned() -> None:
    body = b"foedus/v1/" + b"\0\0\0\x10enrolment-secret" + b"\0\0\0\x20" + bytes(32)
    assert hash_secret(bytes(32)) == hashlib.sha256(body).digest()


# --- The reply ---


@pytest.mark.parametrize("reply", [Waiting(), APPROVED, Refused("Ask the operator.")])
def test_replies_survive_the_way(reply: Waiting | Approved | Refused) -> None:
    assert reply_from_bytes(reply_to_bytes(reply)) == reply


@given(st.binary(max_size=100) | st.lists(st.binary(max_size=9), max_size=4).map(lambda parts: enc(*parts)))
@example(enc("refused", ""))
def test_bytes_are_one_reply_s_own_or_a_bad_message(data: bytes) -> None:
    try:
        reply = reply_from_bytes(data)
    except RemoteError:
        return
    assert reply_to_bytes(reply) == data


@pytest.mark.parametrize(
    "data",
    [
        enc("waiting", b""),
        enc("approved", b""),
        enc("approved", b"certificate", b"roster", b""),
        enc("approved", b"certificate", b"roster", enc(*[AUTHORITY.der] * 4)),
        enc("refused", b"\xff"),
        enc("refused", "two\nlines"),
        enc("refused", "\x1b[2J"),
        enc("refused", "x" * 401),
        bytes(MAX_REPLY_BYTES + 1),
    ],
)
def test_replies_of_another_shape_are_bad_messages(data: bytes) -> None:
    with pytest.raises(RemoteError) as error:
        reply_from_bytes(data)
    assert error.value.reason is Reason.BAD_MESSAGE


def verified(approved: Approved = APPROVED, token: Token = TOKEN, highest_epoch: int = 3) -> Roster:
    return approved.verify(token, public_bytes(KEY), TLS_KEY, now=NOW, highest_epoch=highest_epoch)


def test_an_approval_that_fits_gives_the_roster() -> None:
    assert verified() == ROSTER


def with_roster(**changes: object) -> Approved:
    return replace(APPROVED, signed_roster=SignedRoster.sign(replace(ROSTER, **changes), ROOT).to_bytes())


STRANGER = Authority.create("Test", RANDOM, NOW)


@pytest.mark.parametrize(
    ("approved", "reason"),
    [
        (replace(APPROVED, signed_roster=SignedRoster.sign(ROSTER, KEY).to_bytes()), Reason.BAD_SIGNATURE),
        (
            replace(APPROVED, certificate=STRANGER.issue_site("north", TLS_KEY.public_key(), RANDOM, NOW)),
            Reason.BAD_SIGNATURE,
        ),
        (
            replace(APPROVED, certificate=AUTHORITY.issue_site("south", TLS_KEY.public_key(), RANDOM, NOW)),
            Reason.BAD_MESSAGE,
        ),
        (with_roster(sites=()), Reason.UNKNOWN_SITE),
        (with_roster(sites=(replace(ROSTER.sites[0], public_key=bytes(32)),)), Reason.UNKNOWN_SITE),
        (with_roster(sites=(replace(ROSTER.sites[0], org="Other"),)), Reason.UNKNOWN_SITE),
        (with_roster(epoch=2), Reason.ROSTER_STALE),
        (with_roster(not_after=int(NOW) - 1), Reason.ROSTER_STALE),
        (replace(APPROVED, signed_roster=b""), Reason.BAD_MESSAGE),
        (replace(APPROVED, authorities=(STRANGER.der,)), Reason.BAD_SIGNATURE),
        (replace(APPROVED, authorities=(b"no certificate",)), Reason.BAD_MESSAGE),
    ],
)
def test_a_site_does_not_believe_an_approval_that_does_not_fit(approved: Approved, reason: Reason) -> None:
    with pytest.raises(RemoteError) as error:
        verified(approved)
    assert error.value.reason is reason


def test_either_of_two_authorities_may_have_signed() -> None:
    assert verified(replace(APPROVED, authorities=(STRANGER.der, AUTHORITY.der))) == ROSTER


def test_a_token_of_another_root_does_not_accept_this_roster() -> None:
    with pytest.raises(RemoteError) as error:
        verified(token=replace(TOKEN, root_public_key=public_bytes(KEY)))
    assert error.value.reason is Reason.BAD_SIGNATURE
