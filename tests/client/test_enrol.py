"""A site joins: cut anywhere and started again it ends the same, and it believes nobody but its token's root."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificate

from foedus_client.enrol import Membership, join
from foedus_common.certificates import fingerprint_of
from foedus_common.clock import DAY
from foedus_common.enrolment import Refused, Token, reply_to_bytes
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import Roster, RosterSite, SignedRoster, generate_key
from foedus_common.private_files import replace_private
from foedus_server.members.registry import ApprovedSites
from operators import Operator
from seeded import seeded


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(tmp_path / "operator")
    yield operator
    operator.close()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "north"
    home.mkdir(mode=0o700)
    return home


class GaveUpError(Exception):
    """The person at the site pressed Ctrl-C."""


def never(_: bytes) -> bytes:
    raise AssertionError("nothing should be asked here")


def give_up(_: bytes) -> None:
    raise GaveUpError


def approving(operator: Operator, name: str = "north") -> Callable[[bytes], None]:
    """Waits until the operator has approved the key that was read aloud and the root has signed."""

    def approve(public_key: bytes) -> None:
        operator.registry.approve(name, public_key)
        operator.sign_roster()

    return approve


def joined(operator: Operator, home: Path, token: Token) -> Membership:
    call = operator.registry.enrol
    return join(home, token, call, approving(operator), random=operator.random, clock=operator.clock)


def started(operator: Operator, home: Path, token: Token) -> None:
    with pytest.raises(GaveUpError):
        join(home, token, operator.registry.enrol, give_up, random=operator.random, clock=operator.clock)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Joining ---


def test_a_site_joins_once_it_is_approved(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    membership = joined(operator, home, token)
    assert (membership.name, membership.token) == ("north", token)
    assert membership.roster(operator.clock.now()).public_keys == {"north": membership.public_key}
    assert membership.roster_epoch == 1
    tls = membership.tls()
    assert tls.authority == token.authority_pem
    directory = ApprovedSites(operator.store, operator.clock)
    directory.refresh()
    assert directory.site_for("north", sha256_of(tls.certificate))
    assert membership.certificate_ends() == operator.clock.now() + 90 * DAY


def sha256_of(certificate_pem: bytes) -> bytes:
    return fingerprint_of(load_pem_x509_certificate(certificate_pem).public_bytes(Encoding.DER))


def test_only_the_owner_can_read_what_makes_a_member(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    started(operator, home, token)
    for folder in (home / "joining", home / "identity"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        if folder.name == "joining":
            joined(operator, home, token)


def test_joining_again_with_the_same_token_asks_nobody(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    joined(operator, home, token)
    before = files(home / "identity")
    again = join(home, token, never, give_up, random=operator.random, clock=operator.clock)
    assert again.name == "north"
    assert files(home / "identity") == before


def test_a_site_that_stopped_waiting_goes_on_with_the_same_keys(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    started(operator, home, token)
    waiting_key = operator.registry.site("north").waiting_key
    operator.clock.advance(2 * DAY)  # the token has expired, but was used in time
    assert joined(operator, home, token).public_key == waiting_key


@pytest.mark.parametrize("lost", [["request"], ["request", "token"], ["request", "token", "tls.key"]])
def test_a_join_that_was_cut_before_it_asked_is_made_whole(operator: Operator, home: Path, lost: list[str]) -> None:
    token = operator.registry.invite("north", "Nordklinik")

    def cut(_: bytes) -> bytes:
        raise GaveUpError

    with pytest.raises(GaveUpError):
        join(home, token, cut, give_up, random=operator.random, clock=operator.clock)
    for name in lost:
        (home / "joining" / name).unlink()
    assert joined(operator, home, token).name == "north"


def test_a_join_that_was_cut_while_it_took_a_new_token_is_made_whole(operator: Operator, home: Path) -> None:
    started(operator, home, operator.registry.invite("north", "Nordklinik"))
    token = operator.registry.invite("north", "Nordklinik")
    replace_private(home / "joining" / "token", token.encode().encode())  # and the request is still the first one's
    assert joined(operator, home, token).token == token


def test_a_site_that_has_not_joined_says_so(home: Path) -> None:
    with pytest.raises(LocalError, match="has joined no federation yet; run `foedus-site join`"):
        Membership(home)


def test_a_site_that_only_waits_has_not_joined(operator: Operator, home: Path) -> None:
    started(operator, home, operator.registry.invite("north", "Nordklinik"))
    with pytest.raises(LocalError, match="has joined no federation yet"):
        Membership(home)


def test_an_expired_token_makes_no_keys(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    operator.clock.advance(DAY + 1)
    with pytest.raises(LocalError, match="expired"):
        join(home, token, never, give_up, random=operator.random, clock=operator.clock)
    assert list(home.iterdir()) == []


def test_a_refusal_is_shown_with_its_reason(operator: Operator, home: Path, tmp_path: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    joined(operator, home, token)
    with pytest.raises(LocalError, match="refuses this site: The token was used already"):
        joined(operator, tmp_path / "thief", token)
    with pytest.raises(LocalError, match=r"refuses this site: No\."):
        join(
            tmp_path / "other",
            token,
            lambda _: reply_to_bytes(Refused("No.")),
            give_up,
            random=operator.random,
            clock=operator.clock,
        )


def test_a_new_token_after_a_refusal_keeps_the_keys(operator: Operator, home: Path) -> None:
    started(operator, home, operator.registry.invite("north", "Nordklinik"))
    waiting_key = operator.registry.site("north").waiting_key
    token = operator.registry.invite("north", "Nordklinik")
    assert joined(operator, home, token).public_key == waiting_key


# --- Whom it believes ---


def test_a_coordinator_under_another_root_is_not_believed(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    other_root = generate_key(seeded("another root")).public_key().public_bytes_raw()
    with pytest.raises(RemoteError) as error:
        joined(operator, home, replace(token, root_public_key=other_root))
    assert error.value.reason is Reason.BAD_SIGNATURE
    with pytest.raises(LocalError, match="has joined no federation yet"):
        Membership(home)


@pytest.mark.parametrize("answer", [b"", b"\0", b"x" * 2_000_000])
def test_an_answer_that_is_none_is_a_bad_message(operator: Operator, home: Path, answer: bytes) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    with pytest.raises(RemoteError) as error:
        join(home, token, lambda _: answer, give_up, random=operator.random, clock=operator.clock)
    assert error.value.reason is Reason.BAD_MESSAGE


def test_a_home_is_one_site_of_one_federation(operator: Operator, home: Path) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    joined(operator, home, token)
    for other in (operator.registry.invite("south", "Südklinik"), replace(token, root_public_key=bytes(32))):
        with pytest.raises(LocalError, match="is the site north already; use another --home"):
            join(home, other, never, give_up, random=operator.random, clock=operator.clock)


def test_a_key_that_others_can_read_is_refused(operator: Operator, home: Path) -> None:
    joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    (home / "identity" / "identity.key").chmod(0o644)
    with pytest.raises(LocalError, match="chmod 600"):
        Membership(home)


# --- Afterwards ---


def test_newer_rosters_are_kept_and_older_ones_refused(operator: Operator, home: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    now = operator.clock.now()
    first = operator.registry.roster()
    assert first is not None
    assert membership.accept_roster(first.to_bytes(), now).epoch == 1
    operator.sign_roster()
    second = operator.registry.roster()
    assert second is not None
    assert membership.accept_roster(second.to_bytes(), now).epoch == 2
    reopened = Membership(home)
    assert reopened.roster_epoch == 2
    for site in (membership, reopened):
        with pytest.raises(RemoteError) as error:
            site.accept_roster(first.to_bytes(), now)
        assert error.value.reason is Reason.ROSTER_STALE


def test_a_roster_of_another_root_is_not_kept(operator: Operator, home: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    forged = SignedRoster.sign(operator.registry.draft_roster(), generate_key(seeded("another root")))
    with pytest.raises(RemoteError) as error:
        membership.accept_roster(forged.to_bytes(), operator.clock.now())
    assert error.value.reason is Reason.BAD_SIGNATURE
    assert Membership(home).roster_epoch == 1


@pytest.mark.parametrize("listed", [(), (RosterSite("north", "Nordklinik", bytes(32)),)])
def test_a_site_that_left_the_roster_knows_and_stays_out(
    operator: Operator, home: Path, listed: tuple[RosterSite, ...]
) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    now = operator.clock.now()
    without = Roster(2, int(now) + 100, bytes(32), listed)
    with pytest.raises(RemoteError) as error:
        membership.accept_roster(SignedRoster.sign(without, operator.home.root_key()).to_bytes(), now)
    assert error.value.reason is Reason.UNKNOWN_SITE
    before = operator.registry.roster()
    assert before is not None
    with pytest.raises(RemoteError) as error:
        membership.accept_roster(before.to_bytes(), now)
    assert error.value.reason is Reason.ROSTER_STALE


def test_an_expired_roster_is_not_given_out(operator: Operator, home: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    with pytest.raises(RemoteError) as error:
        membership.roster(operator.clock.now() + 181 * DAY)
    assert error.value.reason is Reason.ROSTER_STALE


def test_a_certificate_is_renewed_over_the_enrolment_port(operator: Operator, home: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    first = membership.tls()
    operator.clock.advance(61 * DAY)
    operator.sign_roster()
    membership.renew(operator.registry.enrol, operator.clock)
    assert membership.certificate_ends() == operator.clock.now() + 90 * DAY
    assert membership.tls().private_key == first.private_key
    assert membership.roster_epoch == 2
    assert Membership(home).tls() == membership.tls()


def test_nothing_is_renewed_for_a_site_that_was_revoked(operator: Operator, home: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    before = files(home / "identity")
    operator.registry.revoke("north")
    with pytest.raises(LocalError, match="refuses this site"):
        membership.renew(operator.registry.enrol, operator.clock)
    assert files(home / "identity") == before


def test_nothing_is_renewed_while_the_roster_has_expired(operator: Operator, home: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    operator.clock.advance(181 * DAY)
    with pytest.raises(LocalError, match="no valid roster"):
        membership.renew(operator.registry.enrol, operator.clock)


# --- New keys ---


def test_rotation_makes_new_keys_and_keeps_the_old_until_approved(operator: Operator, home: Path) -> None:
    old = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    token = operator.registry.rotate("north")
    started(operator, home, token)
    assert Membership(home).public_key == old.public_key
    new = joined(operator, home, token)
    assert new.public_key != old.public_key
    assert new.tls().private_key != old.tls().private_key
    assert Membership(home).public_key == new.public_key
    assert sorted(path.name for path in home.iterdir()) == ["identity"]


def test_a_rotation_that_was_cut_between_its_renames_is_finished(operator: Operator, home: Path) -> None:
    old = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    token = operator.registry.rotate("north")
    started(operator, home, token)
    (home / "identity").rename(home / "retired")
    new = joined(operator, home, token)
    assert new.public_key != old.public_key
    assert sorted(path.name for path in home.iterdir()) == ["identity"]


def test_a_rotation_does_not_go_back_to_an_older_roster(operator: Operator, home: Path, tmp_path: Path) -> None:
    membership = joined(operator, home, operator.registry.invite("north", "Nordklinik"))
    newer = replace(operator.registry.draft_roster(), epoch=9)
    membership.accept_roster(SignedRoster.sign(newer, operator.home.root_key()).to_bytes(), operator.clock.now())
    with pytest.raises(RemoteError) as error:
        joined(operator, home, operator.registry.rotate("north"))
    assert error.value.reason is Reason.ROSTER_STALE
    assert Membership(home).roster_epoch == 9
