"""Who belongs to the federation: invite, enrol, approve, rotate, revoke, and the roster that the root signs.

Two decisions make a member: the operator approves the key whose fingerprint was read aloud, and the root signs a
roster that lists it. Only then does the site get a certificate. Knows no transport: `enrol` is bytes to bytes, and
`ApprovedSites` is what the link asks about every call.
"""

from __future__ import annotations

import threading
import unicodedata

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from foedus_common.certificates import check_request, fingerprint_of, issued_by, parse_certificate
from foedus_common.clock import DAY, Clock
from foedus_common.enrolment import (
    MAX_TOKEN_HOURS,
    SECRET_BYTES,
    Approved,
    EnrolReply,
    EnrolRequest,
    Refused,
    Token,
    Waiting,
    hash_secret,
    reply_to_bytes,
)
from foedus_common.errors import LocalError, RemoteError
from foedus_common.identity import (
    Roster,
    RosterSite,
    SignedRoster,
    check_org,
    check_site_name,
    fingerprint,
    public_bytes,
)
from foedus_common.journal import Refusals
from foedus_common.randomness import RandomBytes
from foedus_server.config import Home
from foedus_server.members.authorities import Authorities
from foedus_server.store import Certificate, DatabaseAway, Site, Store, TokenUse

ROSTER_DAYS = 180
RENEW_SITE_DAYS = 30
"""A site that asks gets a new certificate when its own ends within so many days."""
DIRECTORY_SECONDS = 0.25
AWAY_SECONDS = 30.0
"""How long the link goes on with what it knew when the database is away; a revocation counts within a minute."""


class Registry:
    """The operator's side of membership, over the home's keys and the store."""

    def __init__(self, home: Home, store: Store, clock: Clock, random: RandomBytes) -> None:
        self._settings = home.settings
        self.authorities = Authorities(home, store, clock, random)
        self._root_public_key = home.root_public_key()
        self._plan_public_key = public_bytes(home.plan_key())
        self._store = store
        self._members = store.members
        self._clock = clock
        self._random = random
        self._refusals = Refusals(store.database.record, clock)

    # --- The operator's actions ---

    def invite(self, name: str, org: str, hours: float = MAX_TOKEN_HOURS) -> Token:
        """A token for a new site; an earlier token for it ends.

        Raises:
            LocalError: the name or organisation is malformed, the organisation is another's but for its spelling, the
                site is a member already, or more than 24 hours.
        """
        check_site_name(name)
        check_org(org)
        self._check_spelling(name, org)
        site = self._members.site(name)
        if site is not None and site.state == "approved":
            raise LocalError(f"{name} is a member already; `foedus site rotate {name}` lets it make new keys.")
        return self._token(name, org, hours)

    def _check_spelling(self, name: str, org: str) -> None:
        """An organisation counts with all its sites, so all of them need its name in one spelling."""
        for site in self._members.sites():
            if site.name != name and site.state != "revoked" and site.org != org and _folded(site.org) == _folded(org):
                raise LocalError(f"{site.name} is of {site.org!r}, and {org!r} would count as another; write it alike.")

    def rotate(self, name: str, hours: float = MAX_TOKEN_HOURS) -> Token:
        """A token with which a member makes new keys; the old ones hold until the new ones are approved.

        Raises:
            LocalError: the site is no member, or more than 24 hours.
        """
        site = self.site(name)
        if site.state != "approved":
            raise LocalError(f"{name} is {site.state}, no member; `foedus site invite` gives it a token.")
        return self._token(name, site.org, hours)

    def site(self, name: str) -> Site:
        """Raises LocalError when there is none."""
        site = self._members.site(name)
        if site is None:
            raise LocalError(f"There is no site {name!r}; see `foedus site list`.")
        return site

    def sites(self) -> list[Site]:
        """Sorted by name. `identity.fingerprint(site.waiting_key)` is what to compare before `approve`."""
        return self._members.sites()

    def certificate_ends(self) -> dict[str, float]:
        """By member: when the newest certificate that it was given ends, Unix seconds."""
        return self._members.certificate_ends()

    def approve(self, name: str, public_key: bytes) -> None:
        """Accept the waiting key whose fingerprint was compared. The site is in once a roster with it is installed.

        Raises:
            LocalError: no such key is waiting at that site.
        """
        self._members.approve(name, public_key)

    def revoke(self, name: str) -> None:
        """End the site's membership; the link ends its session at once. A new roster should follow.

        Raises:
            LocalError: there is no such site.
        """
        self._members.revoke(name)

    # --- The roster ---

    def draft_roster(self, days: float = ROSTER_DAYS) -> Roster:
        """The roster that the root should sign now: every approved site, under the next epoch."""
        newest = self._members.roster()
        listed = [
            RosterSite(site.name, site.org, site.public_key)
            for site in self._members.sites()
            if site.state == "approved" and site.public_key is not None
        ]
        return Roster(
            epoch=1 if newest is None else newest[0] + 1,
            not_after=int(self._clock.now() + days * DAY),
            plan_key=self._plan_public_key,
            sites=tuple(listed),
        )

    def install_roster(self, signed: SignedRoster) -> Roster:
        """Give out this roster from now on.

        Raises:
            RemoteError: the home's root did not sign it, or it has expired.
            LocalError: it is not of the next epoch, or names a plan key or members that are not (any more) ours.
        """
        roster = signed.verify(self._root_public_key, now=self._clock.now(), highest_epoch=0)
        approved = {site.name: site.public_key for site in self._members.sites() if site.state == "approved"}
        strangers = [site.name for site in roster.sites if approved.get(site.name) != site.public_key]
        if strangers or roster.plan_key != self._plan_public_key:
            what = f"sites that are not approved ({', '.join(strangers)})" if strangers else "another plan-signing key"
            raise LocalError(f"The roster lists {what}; draft and sign it anew.")
        self._members.add_roster(roster.epoch, signed.to_bytes())
        return roster

    def sign_roster(self, root_key: Ed25519PrivateKey, days: float = ROSTER_DAYS) -> Roster:
        """Draft, sign and install in one step, where the root key is at hand.

        Raises:
            LocalError: the key is not the root's.
        """
        if public_bytes(root_key) != self._root_public_key:
            raise LocalError(
                "This is not the key of the consortium's root, whose fingerprint is "
                f"{fingerprint(self._root_public_key)}; give the file that `foedus root new` made for it."
            )
        return self.install_roster(SignedRoster.sign(self.draft_roster(days), root_key))

    def roster(self) -> SignedRoster | None:
        """The newest installed roster."""
        newest = self._members.roster()
        return None if newest is None else SignedRoster.from_bytes(newest[1])

    # --- What the enrolment port answers ---

    def enrol(self, body: bytes) -> bytes:
        """Answer an enrolment request from a stranger; the same request again asks how things stand. Never raises for
        what the stranger sent: a refusal is an answer too, and is journalled."""
        reply = self._answer(body)
        if isinstance(reply, Refused):
            self._refusals.note("enrolment.refused", reason=reply.reason)
        return reply_to_bytes(reply)

    def note_not_admitted(self, site: str, certificate_sha256: bytes) -> None:
        """A certificate of our authority that is not, or no longer, good for `site` knocked at the link: journal it."""
        self._refusals.note("link.refused", site=site, sha256=certificate_sha256.hex())

    def _answer(self, body: bytes) -> EnrolReply:
        try:
            request = EnrolRequest.from_bytes(body)
            secret_hash = hash_secret(request.secret)
            token = self._members.token(secret_hash)  # a look-up by the hash tells nothing of the secret by its time
            if token is None:
                return Refused("This coordinator gave out no such token; ask the operator for a new one.")
            request.verify(token.name)
        except RemoteError as error:
            return Refused(str(error))
        if token.used_at is None:
            token = self._members.use_token(secret_hash, request.public_key, request.certificate_request) or token
        if refusal := self._refusal(token, request):
            return refusal
        return self._standing(self.site(token.name), request)

    def _refusal(self, token: TokenUse, request: EnrolRequest) -> Refused | None:
        if token.voided_at is not None:
            return Refused("A newer token replaced this one, or the site was revoked; ask the operator for a new one.")
        if token.used_at is None:
            return Refused("The token has expired; ask the operator for a new one.")
        if (token.public_key, token.certificate_request) != (request.public_key, request.certificate_request):
            return Refused("The token was used already, by other keys; if that was not you, tell the operator now.")
        return None

    def _standing(self, site: Site, request: EnrolRequest) -> EnrolReply:
        if site.state != "approved" or site.public_key != request.public_key:
            return Waiting()
        signed = self.roster()
        listed = signed is not None and self._lists(signed, site)
        certificate = self._certificate(site) if listed else None
        if signed is None or certificate is None:
            return Waiting()
        return Approved(certificate, signed.to_bytes(), self.authorities.offered())

    def _lists(self, signed: SignedRoster, site: Site) -> bool:
        try:
            roster = signed.verify(self._root_public_key, now=self._clock.now(), highest_epoch=0)
        except RemoteError:  # it has expired: the site would refuse it
            return False
        return roster.public_keys.get(site.name) == site.public_key

    def _certificate(self, site: Site) -> bytes | None:
        """The site's certificate, a new one if it has none that lasts; None if it lost its approval meanwhile.

        Those for the same key go on beside it, those for the keys before end.
        """
        assert site.certificate_request is not None  # it is approved, hence it has both
        assert site.public_key is not None
        now, authority = self._clock.now(), self.authorities.newest
        key = check_request(site.certificate_request, site.name)
        ending = []
        for current in self._members.certificates():
            certificate = parse_certificate(current.der)
            if current.site != site.name:
                continue
            if certificate.public_key() != key:
                ending.append(current.sha256)
            elif current.not_after >= now + RENEW_SITE_DAYS * DAY and issued_by(certificate, authority.certificate):
                return current.der
        der = authority.issue_site(site.name, key, self._random, now)
        not_after = parse_certificate(der).not_valid_after_utc.timestamp()
        issued = Certificate(fingerprint_of(der), site.name, der, not_after)
        return der if self._members.add_certificate(issued, site.public_key, ending) else None

    def _token(self, name: str, org: str, hours: float) -> Token:
        if not 0 < hours <= MAX_TOKEN_HOURS:
            raise LocalError(f"A token lasts at most {MAX_TOKEN_HOURS} hours, not {hours:g}.")
        token = Token(
            name=name,
            org=org,
            link_address=self._settings.link_address,
            enrolment_address=self._settings.enrolment_address,
            authority=self.authorities.shown.der,
            root_public_key=self._root_public_key,
            expires=int(self._clock.now() + hours * 3600),
            secret=self._random(SECRET_BYTES),
        )
        self._members.add_token(hash_secret(token.secret), name, org, token.expires)
        return token


def _folded(org: str) -> str:
    """What two spellings of one name have in common: no case, no width of letters, single blanks."""
    return " ".join(unicodedata.normalize("NFKC", org).casefold().split())


class ApprovedSites:
    """The link's `SiteDirectory`: who may speak. `site_for` answers from memory, so that the link's loop may ask at
    every chunk and never waits for a database; `refresh` asks the database. Safe to share between threads."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._reading = threading.Lock()
        self._known: tuple[float, dict[tuple[str, bytes], float]] = (float("-inf"), {})

    def refresh(self) -> None:
        """Know what other processes have written, a revocation for one, unless it was read 250 ms ago. Blocks for as
        long as the database does, one caller at a time. Raises LocalError as the store does."""
        with self._reading:
            if self._age() >= DIRECTORY_SECONDS:
                asked_at = self._clock.monotonic()
                valid = {(c.site, c.sha256): c.not_after for c in self._store.members.certificates()}
                self._known = (asked_at, valid)

    def site_for(self, san_name: str, certificate_sha256: bytes) -> bool:
        """Whether this is an approved site with a certificate of its own that has neither ended nor expired.

        Raises DatabaseAway when what is known is more than 30 s old.
        """
        if self._age() > AWAY_SECONDS:
            raise DatabaseAway("Who is a member was not to be read for a while.")
        not_after = self._known[1].get((san_name, certificate_sha256))
        return not_after is not None and self._clock.now() <= not_after

    def _age(self) -> float:
        return self._clock.monotonic() - self._known[0]
