"""The one call that anybody may make: small, rare, and handed on as bytes.

Whoever reaches the port is a stranger. Each address may ask so often and hold so many calls open; a request that does
not come is not waited for; and however many ask, few at a time reach the database. Runs on the link's event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable
from urllib.parse import unquote

import grpc
import grpc.aio

from foedus_common.allowance import Allowance
from foedus_common.clock import Clock
from foedus_common.link import foedus_pb2 as pb
from foedus_server.link.service import Context, Refusal, clock_metadata, refusals

READ_SECONDS = 5.0
CALLS_OF_ONE = 16
AT_WORK = 8


class EnrolmentService:
    """`enrol` is called in a worker thread."""

    def __init__(self, enrol: Callable[[bytes], bytes], clock: Clock) -> None:
        self._enrol = enrol
        self._clock = clock
        self._limit = RateLimit(clock)
        self._open: Counter[str] = Counter()
        self._at_work = asyncio.Semaphore(AT_WORK)

    def register(self, server: grpc.aio.Server) -> None:
        """A request is one message, read here: a method of the unary kind would be called when it has come, and gRPC
        waits for it without end."""
        method = grpc.stream_unary_rpc_method_handler(
            self.Enrol, pb.EnrolRequest.FromString, pb.EnrolReply.SerializeToString
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("foedus.link.v1.Enrolment", {"Enrol": method}),)
        )

    async def Enrol(self, _: object, context: Context) -> pb.EnrolReply:  # noqa: N802
        async with refusals(context):
            address = network_of(context.peer())
            if self._open[address] >= CALLS_OF_ONE or not self._limit.allows(address):
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "Too many attempts; try again in a minute.")
            self._open[address] += 1
            try:
                return await self._answer(context)
            finally:
                self._open[address] -= 1
                self._open += Counter()  # forgets who has none

    async def _answer(self, context: Context) -> pb.EnrolReply:
        async with asyncio.timeout(READ_SECONDS):
            request = await context.read()
        if request is grpc.aio.EOF:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "The request is missing.")
        context.set_trailing_metadata(clock_metadata(self._clock))
        async with self._at_work:
            return pb.EnrolReply(body=await asyncio.to_thread(self._enrol, request.body))


def network_of(peer: str) -> str:
    """Whom a peer of gRPC's, "ipv4:127.0.0.1:443" or "ipv6:%5B::1%5D:443", is counted as: an IPv4 address, or the /64
    of an IPv6 address, which is one customer's (RFC 6177)."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return peer.rpartition(":")[0]
    if isinstance(address, ipaddress.IPv6Address):
        return str(address.ipv4_mapped or ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class RateLimit:
    """For each address: `burst` attempts at once, then one every `seconds`. Remembers 1024 addresses."""

    def __init__(self, clock: Clock, burst: int = 60, seconds: float = 1.0) -> None:
        self._clock = clock
        self._burst = burst
        self._seconds = seconds
        self._allowances: OrderedDict[str, Allowance] = OrderedDict()

    def allows(self, address: str) -> bool:
        fresh = Allowance(self._clock, self._burst, self._seconds)
        allowance = self._allowances[address] = self._allowances.pop(address, fresh)
        if len(self._allowances) > 1024:
            self._allowances.popitem(last=False)
        return allowance.take()
