"""Membership as the operator runs it and strangers try it: every way in but the one is refused, and leaves a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foedus_common.certificates import fingerprint_of, issued_by, parse_certificate, pem
from foedus_common.clock import DAY
from foedus_common.enrolment import Approved, EnrolRequest, Refused, Waiting, reply_from_bytes
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.identity import SignedRoster, generate_key
from foedus_common.journal import verify
from foedus_server.members.registry import AWAY_SECONDS, ApprovedSites
from foedus_server.store import DatabaseAway
from operators import Applicant, Operator
from seeded import seeded


def member(operator: Operator, name: str = "north") -> Applicant:
    """A site that was invited, enrolled, approved and listed."""
    applicant = Applicant(operator, operator.registry.invite(name, "Nordklinik"))
    assert applicant.ask() == Waiting()
    applicant.is_approved()
    operator.sign_roster()
    return applicant


def certificate_of(applicant: Applicant) -> bytes:
    reply = applicant.ask()
    assert isinstance(reply, Approved)
    return reply.certificate


def refusal(reply: object) -> str:
    assert isinstance(reply, Refused)
    return reply.reason


# --- The one way in ---


def test_a_site_joins_by_token_approval_and_roster(operator: Operator) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    assert token.expires == operator.clock.now() + 24 * 3600
    assert (token.link_address, token.enrolment_address) == ("127.0.0.1:8443", "127.0.0.1:8444")
    assert token.root_public_key == operator.home.root_public_key()
    applicant = Applicant(operator, token)
    assert operator.registry.site("north").state == "invited"

    assert applicant.ask() == Waiting()
    site = operator.registry.site("north")
    assert (site.state, site.waiting_key, site.public_key) == ("waiting", applicant.public_key, None)

    applicant.is_approved()
    assert operator.registry.site("north").state == "approved"
    assert applicant.ask() == Waiting()  # the root has not signed

    roster = operator.sign_roster()
    reply = applicant.ask()
    assert isinstance(reply, Approved)
    now = operator.clock.now()
    assert reply.verify(token, applicant.public_key, applicant.tls_key, now=now, highest_epoch=0) == roster
    assert applicant.ask() == reply  # asking again makes no second certificate
    assert operator.events() == [
        "site.invited",
        "site.enrolled",
        "site.approved",
        "roster.installed",
        "certificate.issued",
    ]
    verify(operator.store.database.entries())


def test_the_journal_and_the_database_hold_no_secret(operator: Operator) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    Applicant(operator, token).ask()
    operator.close()
    for path in operator.home.path.glob("foedus.db*"):
        assert token.secret not in path.read_bytes()
        assert token.secret.hex().encode() not in path.read_bytes()


# --- Every other way ---


def test_an_expired_token_is_refused(operator: Operator) -> None:
    applicant = Applicant(operator, operator.registry.invite("north", "Nordklinik", hours=1))
    operator.clock.advance(3601)
    assert "expired" in refusal(applicant.ask())
    assert operator.registry.site("north").waiting_key is None


def test_a_token_that_was_used_in_time_may_ask_after_it_expired(operator: Operator) -> None:
    applicant = Applicant(operator, operator.registry.invite("north", "Nordklinik"))
    applicant.ask()
    operator.clock.advance(3 * DAY)
    applicant.is_approved()
    operator.sign_roster()
    assert isinstance(applicant.ask(), Approved)


def test_a_used_token_serves_no_other_keys(operator: Operator) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    first, second = Applicant(operator, token), Applicant(operator, token)
    first.ask()
    assert "used already, by other keys" in refusal(second.ask())
    same_identity = Applicant(operator, token, key=first.key)
    assert "used already, by other keys" in refusal(same_identity.ask())
    assert operator.registry.site("north").waiting_key == first.public_key


def test_a_guessed_token_and_one_of_another_federation_are_refused(operator: Operator) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    guessed = Applicant(operator, replace(token, secret=bytes(32)))
    assert "no such token" in refusal(guessed.ask())
    assert operator.registry.site("north").state == "invited"


def test_a_token_serves_only_the_site_it_was_made_for(operator: Operator) -> None:
    token = operator.registry.invite("north", "Nordklinik")
    assert "another site" in refusal(Applicant(operator, replace(token, name="south")).ask())
    assert isinstance(Applicant(operator, token).ask(), Waiting)  # the attempt did not use it up


def test_a_request_without_proof_of_its_keys_does_not_use_the_token_up(operator: Operator) -> None:
    applicant = Applicant(operator, operator.registry.invite("north", "Nordklinik"))
    thief = generate_key(seeded("thief"))
    forged = replace(applicant.request, public_key=thief.public_key().public_bytes_raw())
    assert "BAD_SIGNATURE" in refusal(reply_from_bytes(operator.registry.enrol(forged.to_bytes())))
    assert applicant.ask() == Waiting()


def test_a_newer_token_ends_the_older_one_and_what_came_of_it(operator: Operator) -> None:
    old = Applicant(operator, operator.registry.invite("north", "Nordklinik"))
    old.ask()
    new = Applicant(operator, operator.registry.invite("north", "Nordklinik AG"))
    assert "newer token replaced" in refusal(old.ask())
    with pytest.raises(LocalError, match="does not wait for approval"):
        old.is_approved()
    new.ask()
    new.is_approved()
    assert operator.registry.site("north").org == "Nordklinik AG"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=200))
def test_whatever_a_stranger_sends_gets_an_answer(operator: Operator, data: bytes) -> None:
    assert "BAD_MESSAGE" in refusal(reply_from_bytes(operator.registry.enrol(data)))


def test_every_refused_token_is_journalled(operator: Operator) -> None:
    """Replayed, expired, foreign, guessed and replaced: each leaves its own entry, however much else is refused."""
    token = operator.registry.invite("north", "Nordklinik")
    Applicant(operator, token).ask()
    expired = operator.registry.invite("east", "Ostklinik", hours=1)
    replaced = operator.registry.invite("south", "Südklinik")
    operator.registry.invite("south", "Südklinik")
    operator.clock.advance(3601)
    asked = {
        "used already": token,
        "has expired": expired,
        "no such token": replace(token, secret=bytes(32)),
        "another site than the token": replace(token, name="west"),
        "newer token replaced": replaced,
    }
    for _ in range(3):
        operator.registry.enrol(b"knock")
        for shown in asked.values():
            assert isinstance(Applicant(operator, shown).ask(), Refused)
    entries = [entry.event for entry in operator.store.database.entries()]
    reasons = [event["reason"] for event in entries if event["event"] == "enrolment.refused"]
    assert len(reasons) == len(asked) + 1
    for sentence in asked:
        assert any(sentence in reason for reason in reasons), sentence


def test_refusals_are_journalled_but_do_not_fill_the_disk(operator: Operator) -> None:
    for _ in range(5):
        operator.registry.enrol(b"knock")
    assert operator.events() == ["enrolment.refused"]
    operator.clock.advance(60)
    operator.registry.enrol(b"knock")
    last = operator.store.database.entries()[-1].event
    assert (last["event"], last["count"]) == ("enrolment.refused", 5)
    assert "BAD_MESSAGE" in last["reason"]


def test_only_the_key_that_was_shown_can_be_approved(operator: Operator) -> None:
    Applicant(operator, operator.registry.invite("north", "Nordklinik")).ask()
    with pytest.raises(LocalError, match="does not wait for approval with that key"):
        operator.registry.approve("north", bytes(32))
    with pytest.raises(LocalError, match="does not wait"):
        operator.registry.approve("west", bytes(32))
    assert operator.registry.site("north").state == "waiting"


@pytest.mark.parametrize(
    ("name", "org", "hours", "message"),
    [
        ("North", "Nordklinik", 24, "no site name"),
        ("north", "", 24, "no organisation's name"),
        ("north", "Nordklinik", 25, "at most 24 hours"),
        ("north", "Nordklinik", 0, "at most 24 hours"),
    ],
)
def test_an_invitation_that_cannot_be_is_refused(
    operator: Operator, name: str, org: str, hours: float, message: str
) -> None:
    with pytest.raises(LocalError, match=message):
        operator.registry.invite(name, org, hours)
    assert operator.registry.sites() == []


@pytest.mark.parametrize("spelling", ["nordfiliale", "NORDFILIALE", "Nord\ufb01liale", "Nord filiale", "Nord  Filiale"])
def test_an_organisation_is_spelt_alike_at_all_its_sites(operator: Operator, spelling: str) -> None:
    """It counts with all its sites, so one spelt in two ways would count as two."""
    name = "Nord Filiale" if " " in spelling else "Nordfiliale"
    operator.registry.invite("north", name)
    with pytest.raises(LocalError, match="would count as another; write it alike"):
        operator.registry.invite("north-2", spelling)
    assert operator.registry.invite("north-2", name).org == name


def test_the_spelling_of_an_only_site_s_organisation_can_be_put_right(operator: Operator) -> None:
    operator.registry.invite("north", "NORDKLINIK")
    assert operator.registry.invite("north", "Nordklinik").org == "Nordklinik"


def test_a_site_that_is_not_there_is_said_so(operator: Operator) -> None:
    for action in (operator.registry.site, operator.registry.rotate, operator.registry.revoke):
        with pytest.raises(LocalError, match="no site 'west'"):
            action("west")


# --- The roster ---


def test_a_draft_lists_the_approved_sites_under_the_next_epoch(operator: Operator) -> None:
    south, north = member(operator, "south"), member(operator, "north")
    Applicant(operator, operator.registry.invite("west", "Westklinik")).ask()
    draft = operator.registry.draft_roster(days=10)
    assert draft.epoch == 3
    assert draft.not_after == operator.clock.now() + 10 * DAY
    assert draft.public_keys == {"north": north.public_key, "south": south.public_key}


def test_a_roster_is_installed_only_under_our_root(operator: Operator) -> None:
    draft = operator.registry.draft_roster()
    with pytest.raises(RemoteError) as error:
        operator.registry.install_roster(SignedRoster.sign(draft, generate_key(seeded("other"))))
    assert error.value.reason is Reason.BAD_SIGNATURE
    assert operator.registry.roster() is None


def test_a_roster_that_was_overtaken_is_refused(operator: Operator) -> None:
    root = operator.home.root_key()
    member(operator)
    draft = operator.registry.draft_roster()
    operator.registry.revoke("north")
    with pytest.raises(LocalError, match=r"sites that are not approved \(north\)"):
        operator.registry.install_roster(SignedRoster.sign(draft, root))
    with pytest.raises(LocalError, match="another plan-signing key"):
        operator.registry.install_roster(
            SignedRoster.sign(replace(operator.registry.draft_roster(), plan_key=bytes(32)), root)
        )
    for epoch in (1, 3):
        with pytest.raises(LocalError, match="2 comes next"):
            operator.registry.install_roster(
                SignedRoster.sign(replace(operator.registry.draft_roster(), epoch=epoch), root)
            )
    assert operator.sign_roster().epoch == 2


def test_nobody_is_let_in_on_an_expired_roster(operator: Operator) -> None:
    applicant = member(operator)
    operator.clock.advance(181 * DAY)
    assert applicant.ask() == Waiting()
    operator.sign_roster()
    assert isinstance(applicant.ask(), Approved)


# --- A new authority ---


def test_a_new_authority_takes_over_and_no_site_is_lost(operator: Operator) -> None:
    """One that asks every day has what it needs before the coordinator shows anything that it does not trust."""
    north, authorities = member(operator), operator.registry.authorities
    first = authorities.shown
    shown = authorities.tls()
    old = certificate_of(north)
    second = authorities.rotate()
    for rotated in (False, True):  # the coordinator may be started anew in between
        with pytest.raises(LocalError, match="taking over already; it waits for north"):
            authorities.rotate()
        assert (authorities.tls().certificate, authorities.shown.der) == (shown.certificate, first.der)
        assert authorities.tls().authority == pem(first.der) + pem(second.der)
        reply = north.ask()
        assert isinstance(reply, Approved)
        assert reply.authorities == (first.der, second.der)
        assert issued_by(parse_certificate(reply.certificate), second.certificate)
        assert operator.registry.invite("east", "Ostklinik").authority == first.der
        operator.clock.advance(6 * DAY if not rotated else DAY)

    assert authorities.lacking() == ()
    assert authorities.tls().certificate != shown.certificate
    assert (authorities.shown.der, authorities.tls().authority) == (second.der, pem(second.der))
    reply = north.ask()
    assert isinstance(reply, Approved)
    assert reply.authorities == (second.der,)
    assert reply.certificate != old
    assert operator.registry.invite("east", "Ostklinik").authority == second.der
    member(operator, "south")  # who came later does not bring the old one back
    assert authorities.tls().authority == pem(second.der)


def test_a_new_authority_waits_for_a_site_that_is_away_until_it_is_revoked(operator: Operator) -> None:
    north, authorities = member(operator), operator.registry.authorities
    member(operator, "south")
    shown = authorities.tls()
    authorities.rotate()
    north.ask()
    operator.clock.advance(40 * DAY)
    assert (authorities.lacking(), authorities.tls().certificate) == (("south",), shown.certificate)
    operator.registry.revoke("south")
    assert (authorities.lacking(), authorities.tls().certificate != shown.certificate) == ((), True)


# --- Afterwards ---


class Directory(ApprovedSites):
    """As the link asks: what other processes wrote first, then who may speak."""

    def admits(self, site: str, sha256: bytes) -> bool:
        self.refresh()
        return self.site_for(site, sha256)


def test_a_certificate_is_renewed_when_it_nears_its_end(operator: Operator) -> None:
    applicant = member(operator)
    first = certificate_of(applicant)
    operator.clock.advance(59 * DAY)
    assert certificate_of(applicant) == first
    operator.clock.advance(2 * DAY)
    second = certificate_of(applicant)
    assert second != first
    directory = Directory(operator.store, operator.clock)
    assert directory.admits("north", fingerprint_of(first))  # until the site has fetched the new one
    assert directory.admits("north", fingerprint_of(second))
    operator.clock.advance(30 * DAY)
    assert not directory.admits("north", fingerprint_of(first))
    assert directory.admits("north", fingerprint_of(second))


def test_a_certificate_opens_the_link_for_its_own_site_only(operator: Operator) -> None:
    north, south = member(operator, "north"), member(operator, "south")
    directory = Directory(operator.store, operator.clock)
    sha256 = fingerprint_of(certificate_of(north))
    certificate_of(south)
    assert directory.admits("north", sha256)
    assert not directory.admits("south", sha256)
    assert not directory.admits("west", sha256)
    assert not directory.admits("north", bytes(32))


def test_a_revocation_counts_within_250_ms_and_ends_everything(operator: Operator) -> None:
    applicant = member(operator)
    directory = Directory(operator.store, operator.clock)
    sha256 = fingerprint_of(certificate_of(applicant))
    assert directory.admits("north", sha256)
    operator.registry.revoke("north")
    operator.clock.advance(0.25)
    assert not directory.admits("north", sha256)
    assert "revoked" in refusal(applicant.ask())
    assert operator.sign_roster().sites == ()
    assert operator.registry.site("north").revoked_at == operator.clock.now() - 0.25


def test_the_directory_asks_the_database_at_most_every_250_ms(operator: Operator) -> None:
    applicant = member(operator)
    directory = Directory(operator.store, operator.clock)
    sha256 = fingerprint_of(certificate_of(applicant))
    assert directory.admits("north", sha256)
    operator.registry.revoke("north")
    operator.clock.advance(0.2)
    assert directory.admits("north", sha256)


def test_a_database_that_is_away_holds_nobody_up_and_vouches_for_nobody_for_long(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    applicant = member(operator)
    directory = Directory(operator.store, operator.clock)
    sha256 = fingerprint_of(certificate_of(applicant))
    assert directory.admits("north", sha256)
    monkeypatch.delattr(operator.store.members, "_database")
    operator.clock.advance(AWAY_SECONDS)
    assert directory.site_for("north", sha256)  # without a query: the link's loop asks at every chunk
    operator.clock.advance(0.1)
    with pytest.raises(DatabaseAway):
        directory.site_for("north", sha256)


def test_a_site_that_was_revoked_comes_back_only_with_new_keys_approved_anew(operator: Operator) -> None:
    old = member(operator)
    operator.registry.revoke("north")
    new = Applicant(operator, operator.registry.invite("north", "Nordklinik"))
    assert new.ask() == Waiting()
    new.is_approved()
    operator.sign_roster()
    assert isinstance(new.ask(), Approved)
    assert isinstance(old.ask(), Refused)
    assert operator.registry.site("north").revoked_at is None


def test_rotation_keeps_the_old_keys_until_the_new_ones_are_in_the_roster(operator: Operator) -> None:
    old = member(operator)
    directory = Directory(operator.store, operator.clock)
    sha256 = fingerprint_of(certificate_of(old))
    with pytest.raises(LocalError, match="member already"):
        operator.registry.invite("north", "Nordklinik")
    new = Applicant(operator, operator.registry.rotate("north"))
    assert new.ask() == Waiting()
    site = operator.registry.site("north")
    assert (site.state, site.public_key, site.waiting_key) == ("approved", old.public_key, new.public_key)
    operator.clock.advance(1)
    assert directory.admits("north", sha256)

    new.is_approved()
    operator.clock.advance(1)
    assert new.ask() == Waiting()  # the roster lists the old key, under which the site goes on
    assert directory.admits("north", sha256)
    assert operator.sign_roster().public_keys == {"north": new.public_key}
    operator.clock.advance(1)
    assert directory.admits("north", sha256)
    newer = fingerprint_of(certificate_of(new))
    operator.clock.advance(1)
    assert directory.admits("north", newer)
    assert not directory.admits("north", sha256)


def test_only_a_member_can_rotate(operator: Operator) -> None:
    operator.registry.invite("north", "Nordklinik")
    with pytest.raises(LocalError, match="north is invited, no member"):
        operator.registry.rotate("north")


def test_the_request_that_is_kept_is_the_one_that_was_sent(operator: Operator) -> None:
    applicant = member(operator)
    kept = operator.registry.site("north").certificate_request
    assert kept == EnrolRequest.from_bytes(applicant.request.to_bytes()).certificate_request
