"""What both ends of the link agree on: sizes, times, channel options, and how a site is named on it.

The times are measured choices (docs/decisions): a frozen peer or a cut cable is noticed within 15 s, and a client
pings no faster than the server allows, or the server would answer GOAWAY.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from foedus_common.errors import LocalError

PROTOCOL_VERSION = 2
"""Of the link and of the messages that travel over it: sides of different versions part at the first word."""

MAX_BODY = 256 * 1024
"""Bytes in the body of a control message; anything larger travels as an object."""
CHUNK = 256 * 1024
"""Bytes in one chunk of an object."""
MAX_ENROL_BODY = 16 * 1024
_FRAMING = 1024
"""Room for the other fields of a message that carries a body or a chunk."""

SITE_URI = "foedus://site/"
"""Prefix of the one URI in a site certificate's subject alternative name; the site's name follows."""
CLOCK_KEY = "foedus-clock"
"""Metadata of the coordinator's answers: its clock in Unix seconds, for a site to compare its own."""
COORDINATOR_NODE = 1
"""Flower node id of the coordinator."""


@dataclass(frozen=True)
class TlsIdentity:
    """What one end shows and trusts, all PEM: its chain, its private key, and the authority of the other end."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    authority: bytes


@dataclass(frozen=True)
class Timing:
    """Seconds."""

    heartbeat: float = 3.0
    """Each end says something at least this often."""
    silence: float = 10.0
    """An end that heard nothing for this long gives the stream up."""
    progress: float = 30.0
    """A transfer in which no chunk moves for this long is cut; it resumes where it was."""


DEFAULT_TIMING = Timing()


def node_id(site: str) -> int:
    """Flower node id of a site: 63 bits of SHA-256 over its name."""
    return int.from_bytes(hashlib.sha256(b"foedus-node/" + site.encode()).digest()[:8], "big") >> 1


_COMMON_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_BODY + _FRAMING),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]

CHANNEL_OPTIONS = [
    *_COMMON_OPTIONS,
    # Channels share connections, and their back-off, unless told not to: ours come back on our own schedule,
    # and bulk transfers do not queue in front of heartbeats.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.enable_retries", 0),
]


def channel_options(proxy: str) -> list[tuple[str, int | str]]:
    """A site's options. proxy: "http://host:port", or "" for what https_proxy and no_proxy say, as gRPC reads them."""
    return [*CHANNEL_OPTIONS, ("grpc.http_proxy", proxy)] if proxy else list(CHANNEL_OPTIONS)


def proxy_for(address: str, proxy: str, environment: Mapping[str, str]) -> str:
    """The proxy's own "host:port" where one stands between this machine and `address`, else "". As gRPC decides it."""
    direct = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    host = address.rpartition(":")[0].strip("[]")
    named = proxy or next(filter(None, map(environment.get, ("grpc_proxy", "https_proxy", "http_proxy"))), "")
    if not named or any(host.endswith(name.strip()) for name in direct.split(",") if name.strip()):
        return ""
    return named.rpartition("//")[2].rpartition("@")[2].strip("/")


def check_proxy(proxy: str) -> None:
    """Raises LocalError unless it is the address of a proxy that gRPC can use: CONNECT over plain HTTP (RFC 9110)."""
    if not re.fullmatch(r"http://([^\s/@]+@)?(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}/?", proxy):
        # its text may hold a password
        raise LocalError("proxy must read http://host:port, or http://user:password@host:port.")


SERVER_OPTIONS = [
    *_COMMON_OPTIONS,
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),
    ("grpc.max_concurrent_streams", 32),  # of one connection
    ("grpc.so_reuseport", 1),  # a new certificate comes with a new server, beside the old one for a moment
]

ENROLMENT_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_ENROL_BODY + 16),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 10_000),
    ("grpc.max_connection_age_ms", 60_000),  # a stranger has nothing to say that takes longer
    ("grpc.max_connection_age_grace_ms", 10_000),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.so_reuseport", 1),
]
