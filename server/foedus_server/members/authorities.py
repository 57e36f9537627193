"""Who signs certificates for the link: one authority, or two while a new one takes over from the old.

A new authority signs sites' certificates at once, and the coordinator's own only when no member would be lost by that:
sites ask every day how things stand, and take the authorities that the answer names. Then the old one is named no
longer. Knows who is a member; how a site asks is in `registry`.
"""

from __future__ import annotations

from foedus_common.certificates import SITE_DAYS, Authority, issued_by, parse_certificate
from foedus_common.clock import DAY, Clock
from foedus_common.errors import LocalError
from foedus_common.link.transport import TlsIdentity
from foedus_common.randomness import RandomBytes
from foedus_server.config import Home
from foedus_server.store import Store

SETTLED_DAYS = 7
"""How long a member must have had a certificate of the new authority: in that time it has asked again, so it has the
answer, too, that named the authority."""


class Authorities:
    """The authorities of one home, and what the link shows."""

    def __init__(self, home: Home, store: Store, clock: Clock, random: RandomBytes) -> None:
        self._home = home
        self._store = store
        self._clock = clock
        self._random = random

    @property
    def newest(self) -> Authority:
        """It signs sites' certificates."""
        return self._home.authorities()[-1]

    @property
    def shown(self) -> Authority:
        """It signed what the coordinator shows; the newest, or the one before."""
        return self._home.shown_authority()

    def offered(self) -> tuple[bytes, ...]:
        """What sites should trust from now on, DER: the authority that is shown and any that will be."""
        return self._home.authorities_since(self.shown)

    def rotate(self) -> Authority:
        """Make the next authority; the change-over goes on by itself.

        Raises:
            LocalError: the one before has not ended.
        """
        if lacking := self.lacking():
            raise LocalError(f"A new authority is taking over already; it waits for {', '.join(lacking)}.")
        if self.settling:
            raise LocalError("A new authority is taking over already; `foedus up` shows it within the hour.")
        authority = self._home.add_authority(self._random, self._clock)
        self._store.database.record("authority.made", sha256=authority.sha256.hex())
        return authority

    @property
    def settling(self) -> bool:
        """Whether a new authority has been made that is not shown yet."""
        return self.shown.der != self.newest.der

    def lacking(self) -> tuple[str, ...]:
        """Members that would be lost if the newest authority were shown now."""
        if not self.settling:
            return ()
        settled = {
            certificate.site
            for certificate in self._store.members.certificates()
            if issued_by(parse_certificate(certificate.der), self.newest.certificate)
            and certificate.not_after - SITE_DAYS * DAY <= self._clock.now() - SETTLED_DAYS * DAY
        }
        members = [site.name for site in self._store.members.sites() if site.state == "approved"]
        return tuple(name for name in members if name not in settled)

    def tls(self) -> TlsIdentity:
        """What the link shows and trusts now; its certificate is made anew when it is time for that."""
        by = self.shown if self.lacking() else self.newest
        return self._home.tls(self._random, self._clock, by)
