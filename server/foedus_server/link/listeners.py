"""The coordinator's two ports, a gRPC server on each: one for sites with certificates, one for who wants to join.

What a server shows and whom it believes is fixed when it begins to listen. For another certificate, or another
authority, a second pair listens on the same ports and the first one drains: gRPC 1.85 can also exchange both under a
server that listens, without waiting for handshakes that use them, and crashes (docs/decisions/0016). Knows neither
sites nor messages.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from contextlib import suppress

import grpc
import grpc.aio

from foedus_common.errors import LocalError
from foedus_common.link.transport import ENROLMENT_OPTIONS, SERVER_OPTIONS, TlsIdentity

MAX_CONNECTIONS, MAX_STRANGERS = 4096, 512
"""Connections at the link, and at enrolment, handshakes among them; others are hung up on. A site needs two."""
DRAIN_SECONDS = 60.0
"""What transfers under way have to end at the old pair; one that is cut goes on at the new one where it was."""


class Listeners:
    """`link` and `enrolment` register the services with a server. All methods on the link's loop."""

    def __init__(self, link: Callable[[grpc.aio.Server], None], enrolment: Callable[[grpc.aio.Server], None]) -> None:
        self._register = link, enrolment
        self._servers: list[grpc.aio.Server] = []
        self._draining: set[asyncio.Task[None]] = set()
        self.addresses: tuple[str, str] = ("", "")
        """"host:port" of the link and of enrolment, as they were taken."""

    async def listen(self, tls: TlsIdentity, link: str, enrolment: str) -> None:
        """Raises LocalError when a port is in use, or cannot be listened on."""
        for address in (link, enrolment):
            _require_free(address)
        self._servers = await self._pair(tls, link, enrolment)

    async def exchange(self, tls: TlsIdentity) -> None:
        """New connections are shown `tls` and checked by it; calls under way have DRAIN_SECONDS to end.

        Raises LocalError when the ports cannot be listened on a second time; the first pair goes on.
        """
        before, self._servers = self._servers, await self._pair(tls, *self.addresses)
        for server in before:
            task = asyncio.create_task(server.stop(DRAIN_SECONDS))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def close(self, grace: float) -> None:
        """Calls under way get `grace` seconds to end."""
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        for task in list(self._draining):
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        self._servers = []

    async def _pair(self, tls: TlsIdentity, link: str, enrolment: str) -> list[grpc.aio.Server]:
        pairs = [(tls.private_key, tls.certificate)]
        mutual = grpc.ssl_server_credentials(pairs, tls.authority, require_client_auth=True)
        at_link, at_enrolment = (
            grpc.aio.server(options=[*SERVER_OPTIONS, _at_most(MAX_CONNECTIONS)]),
            grpc.aio.server(options=[*ENROLMENT_OPTIONS, _at_most(MAX_STRANGERS)]),
        )
        self._register[0](at_link)
        self._register[1](at_enrolment)
        self.addresses = (
            _bind(at_link, link, mutual),
            _bind(at_enrolment, enrolment, grpc.ssl_server_credentials(pairs)),
        )
        await at_link.start()
        await at_enrolment.start()
        return [at_link, at_enrolment]


def allow_many_files() -> None:
    """Every connection is an open file, and many systems allow a process 1,024 unless it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (MAX_CONNECTIONS + MAX_STRANGERS)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _at_most(connections: int) -> tuple[str, int]:
    """As many, but of the files that this process may open no more than a quarter: runs need some, too."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = connections if soft == resource.RLIM_INFINITY else min(connections, soft // 4)
    return ("grpc.max_allowed_incoming_connections", allowed)


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials) -> str:
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        raise _cannot_listen(address) from None
    return f"{address.rpartition(':')[0]}:{port}"


def _require_free(address: str) -> None:
    """The pairs share their ports by SO_REUSEPORT, hence a second coordinator of this user would share them as well,
    without an error. Raises LocalError when anybody listens at `address`."""
    host, _, port = address.rpartition(":")
    with suppress(socket.gaierror):  # gRPC says what is amiss with an address
        for family, kind, protocol, _, at in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended do not count
                try:
                    probe.bind(at)
                except OSError as error:
                    if error.errno == errno.EADDRINUSE:
                        raise _cannot_listen(address) from None


def _cannot_listen(address: str) -> LocalError:
    return LocalError(
        f"Cannot listen on {address}: the port is in use or the address is not of this machine; "
        "stop the other program or choose another port."
    )
