"""Keeps a site's membership fresh while its daemon runs: asks the coordinator every day how things stand.

The answer brings the newest roster, whom to trust as the coordinator, and a new certificate once the old one nears its
end, weeks before it ends. What the link shows and trusts changes only when the link is opened anew: `changed` says that
it is time for that. Knows no transport: a call is bytes to bytes, as in `enrol`.
"""

from __future__ import annotations

import logging
import threading

from foedus_client.enrol import Call, Membership
from foedus_common.clock import DAY, Clock, iso
from foedus_common.errors import FoedusError

logger = logging.getLogger(__name__)

AGAIN_SECONDS = 3600.0
"""After a question that failed."""
WARN_DAYS = 21
"""A coordinator that renews at all does so 30 days before the end; from here on somebody should know."""


class Renewal:
    """Asks for one site. `keep` runs in a thread of its own until the daemon stops."""

    def __init__(self, member: Membership, call: Call, clock: Clock) -> None:
        self._member = member
        self._call = call
        self._clock = clock
        self._shown = member.tls()

    @property
    def changed(self) -> bool:
        """Whether there is something newer to show or to trust than when this began, or `join` has made new keys."""
        return self._member.tls() != self._shown or self._member.superseded

    def keep(self, stopping: threading.Event) -> None:
        while not stopping.wait(DAY if self.ask() else AGAIN_SECONDS):
            pass

    def ask(self) -> bool:
        """Whether the coordinator answered, and the answer was good."""
        try:
            self._member.renew(self._call, self._clock)
        except (FoedusError, OSError) as error:  # a full disk must not end the asking
            self._complain(error)
            return False
        if self._member.tls() != self._shown:
            logger.info("the certificate or the authority changed; good until %s", iso(self._member.certificate_ends()))
        return True

    def _complain(self, error: Exception) -> None:
        """A day without an answer is nothing; a certificate that runs out is."""
        ends = self._member.certificate_ends()
        urgent = ends < self._clock.now() + WARN_DAYS * DAY
        level = logging.WARNING if urgent else logging.INFO
        logger.log(level, "the certificate (good until %s) could not be renewed: %s", iso(ends), error)
