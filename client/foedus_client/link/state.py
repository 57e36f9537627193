"""How the link to the coordinator stands, in words: what a failed call means, and whether it is the clocks.

Certificates, rosters and tokens have their times, so a clock that is a day off looks like a lack of trust. What the
coordinator's certificate says of the time is read without trusting it for anything else.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature

from foedus_common.clock import APART_SECONDS, Clock, apart, iso, span
from foedus_common.link.transport import CLOCK_KEY, proxy_for

MOST_SAID = 400
"""Characters."""

_LOOK_SECONDS = 5.0
_CLOCK = re.compile(r"[0-9]{1,11}\.[0-9]{3}", re.ASCII)


class LinkState(StrEnum):
    """How the stream to the coordinator stands."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    REFUSED = "refused"
    """The coordinator is there, but trust is missing: a person has to act."""
    AWAY = "away"
    STOPPED = "stopped"


_SAID_BY_COORDINATOR = {
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}

_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
_HUNG_UP = "hung up: it is stopping, or its authority did not sign this site's certificate"
_SAID_BY_GRPC = [
    ("HTTP proxy returned response code", LinkState.AWAY, "cannot be reached: the proxy refuses to connect to it"),
    (_UNTRUSTED, LinkState.REFUSED, "shows a certificate that this site's authority did not sign"),
    ("Hostname Verification Check failed", LinkState.REFUSED, "shows a certificate for another name or address"),
    ("Connection refused", LinkState.AWAY, "is down: nothing listens there"),
    ("Socket closed", LinkState.AWAY, _HUNG_UP),
    ("Connection reset", LinkState.AWAY, _HUNG_UP),
    ("address lookup failed", LinkState.AWAY, "cannot be found: its name does not resolve"),
]


def explain(error: grpc.RpcError, address: str, proxy: str, authority: bytes, clock: Clock) -> tuple[LinkState, str]:
    """What a failed call means, in one sentence for a person; may look at the coordinator's certificate, and blocks.

    address, proxy: "host:port", the latter "" for none of our own. authority: PEM of whom the coordinator has to show.
    """
    details = said(error)
    if error.code() in _SAID_BY_COORDINATOR:
        return LinkState.REFUSED, details
    between = proxy_for(address, proxy, os.environ)
    if _UNTRUSTED in details and not between and (sentence := _wrong_time(address, authority, clock.now())):
        return LinkState.REFUSED, sentence
    route = f"{address}, through the proxy {between}," if between else address
    for mark, state, meaning in _SAID_BY_GRPC:
        if mark in details:
            return state, f"The coordinator at {route} {meaning}."
    return LinkState.AWAY, f"The coordinator at {route} cannot be reached ({error.code().name.lower()})."


def said(error: grpc.RpcError) -> str:
    """What the other end says of a failed call, as one line: it moves no cursor of a terminal, and begins no line of a
    log that seems to be ours."""
    details = (error.details() or "")[:MOST_SAID]
    return "".join(character if character.isprintable() else "?" for character in details)


def clocks_apart(
    metadata: Iterable[tuple[str, Any]] | None, clock: Clock, tolerance: float = APART_SECONDS
) -> str | None:
    """The sentence for a clock that differs from the coordinator's, which a call's metadata may tell, by more than
    `tolerance` seconds."""
    theirs = coordinators_clock(metadata)
    return None if theirs is None else apart(clock.now(), theirs, tolerance)


def coordinators_clock(metadata: Iterable[tuple[str, Any]] | None) -> float | None:
    """Unix seconds, where a call's metadata tells them; what is no time of ours counts as nothing told."""
    told = dict(metadata or ()).get(CLOCK_KEY)
    return float(told) if isinstance(told, str) and _CLOCK.fullmatch(told) else None


def _wrong_time(address: str, authority: bytes, now: float) -> str | None:
    """The sentence for a certificate that is the coordinator's and not valid by this machine's clock."""
    host, _, port = address.rpartition(":")
    try:
        shown = ssl.get_server_certificate((host.strip("[]"), int(port)), timeout=_LOOK_SECONDS)
        certificate = x509.load_pem_x509_certificate(shown.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    except (OSError, ValueError, TypeError, InvalidSignature):
        return None
    begins, ends = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    if now < begins:
        return (
            f"The coordinator's certificate is valid from {iso(begins)}, and this clock says {iso(now)}: it is at "
            f"least {span(begins - now)} behind the coordinator's; set both by a time server."
        )
    if now > ends:
        return (
            f"The coordinator's certificate ended on {iso(ends)}, and this clock says {iso(now)}; set the clock or, if "
            "it is right, have the operator start `foedus up` again, which renews the certificate."
        )
    return None
