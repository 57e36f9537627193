"""The gRPC service of the coordinator for its sites: control streams and objects.

Every call and every chunk is admitted by certificate. Runs on the link's event loop; knows no Flower.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio

from foedus_common.allowance import Allowance
from foedus_common.clock import Clock
from foedus_common.errors import LocalError, RemoteError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CHUNK, CLOCK_KEY, MAX_BODY, PROTOCOL_VERSION, SITE_URI, Timing
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_server.link.mailbox import Mailbox, RunFiles
from foedus_server.store import DatabaseAway

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext
_M = TypeVar("_M", pb.Object, pb.PushPart, pb.PullRequest)

REFRESH_SECONDS = 1.0
CALLS_OF_ONE_SITE = 64
UNAWAITED = (256, 1.0)
"""Messages of a site that nobody awaits, heartbeats among them: so many at once, then one a second."""


class SiteDirectory(Protocol):
    """Who may speak."""

    def refresh(self) -> None:
        """Learn of approvals and revocations elsewhere. May block; called off the loop, before each admission and with
        each heartbeat."""

    def site_for(self, san_name: str, certificate_sha256: bytes) -> bool:
        """Whether this site is approved with this certificate and not revoked, as far as is known. Asked at every call
        and every chunk, on the event loop: it never blocks."""


@dataclass(frozen=True)
class Peer:
    """The other end of a connection, as TLS proved it: the site's name, and SHA-256 of its certificate (DER)."""

    site: str
    certificate_sha256: bytes


def peer_of(context: Context) -> Peer | None:
    """Who the client certificate says is calling; None unless it names exactly one site, over TLS 1.3."""
    proved = context.auth_context()
    if proved.get("ssl_tls_version") != [b"TLSv1.3"]:
        return None
    names = [uri for uri in proved.get("peer_uri", []) if uri.startswith(SITE_URI.encode())]
    if len(names) != 1:
        return None
    pem = b"".join(proved["x509_pem_cert"]).decode()
    body = pem.split("-----BEGIN CERTIFICATE-----")[1].split("-----END CERTIFICATE-----")[0]
    return Peer(names[0].decode().removeprefix(SITE_URI), hashlib.sha256(base64.b64decode(body)).digest())


class Refusal(Exception):
    """Ends a call with this gRPC status and one sentence."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def not_admitted() -> Refusal:
    return Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        "The coordinator does not admit this site's certificate: it is not approved yet, or it was revoked.",
    )


def _nothing_here() -> Refusal:
    """One answer for "no such run", "not your run", "no such object" and "not your object": no probing."""
    return Refusal(grpc.StatusCode.NOT_FOUND, "The coordinator has nothing of that name for this site.")


@asynccontextmanager
async def refusals(context: Context) -> AsyncIterator[None]:
    """What a call refuses leaves as a status that says why."""
    try:
        yield
    except Refusal as error:
        await context.abort(error.code, str(error))
    except RemoteError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except DatabaseAway:  # its sentence names what is nobody else's business
        await context.abort(grpc.StatusCode.UNAVAILABLE, "The coordinator cannot answer now, and will soon.")
    except LocalError as error:
        await context.abort(grpc.StatusCode.ABORTED, str(error))
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "The site fell silent.")
    except Exception:
        # gRPC would send the exception's own text, which is nobody else's business.
        logger.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, "The coordinator failed; its log says why.")


class ControlStream:
    """One site's stream: the requests that are to be sent, and whether it has to end."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._loop = asyncio.get_running_loop()
        self.outgoing: asyncio.Queue[pb.Request] = asyncio.Queue()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def deliver(self, request: pb.Request) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self.outgoing.put_nowait, request)

    def end(self, refusal: Refusal | None = None) -> None:
        """On the loop."""
        if self.ended.done():
            return
        if refusal:
            self.ended.set_exception(refusal)
        else:
            self.ended.set_result(None)


class LinkService:
    """What sites call. `runs` holds the files of every run that is being driven, by run id."""

    def __init__(
        self,
        directory: SiteDirectory,
        mailbox: Mailbox,
        objects: ObjectStore,
        runs: dict[int, RunFiles],
        timing: Timing,
        clock: Clock,
        not_admitted: Callable[[str, bytes], None],
    ) -> None:
        self._note_not_admitted = not_admitted
        self._directory = directory
        self._mailbox = mailbox
        self._objects = objects
        self._runs = runs
        self._timing = timing
        self._clock = clock
        self._streams: dict[str, ControlStream] = {}
        self._open: Counter[str] = Counter()
        self._refreshing: asyncio.Future[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        """Each method reads what it is sent, also where that is one message: a method of the unary kind would be called
        when the message has come, before anybody was admitted."""
        stream, once = grpc.stream_stream_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        methods = {
            "Control": stream(self.Control, pb.FromSite.FromString, pb.FromCoordinator.SerializeToString),
            "Stat": once(self.Stat, pb.Object.FromString, pb.StatReply.SerializeToString),
            "Push": once(self.Push, pb.PushPart.FromString, pb.PushReply.SerializeToString),
            "Pull": stream(self.Pull, pb.PullRequest.FromString, pb.PullPart.SerializeToString),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("foedus.link.v1.Link", methods),))

    async def end_stream(self, site: str, refusal: Refusal) -> None:
        """End the site's stream, if it has one."""
        if site in self._streams:
            self._streams[site].end(refusal)

    def end_all_streams(self) -> None:
        """Say goodbye to everybody; sites come back by themselves."""
        for stream in self._streams.values():
            stream.end()

    # Control

    async def Control(self, _: object, context: Context) -> None:  # noqa: N802
        async with refusals(context), self._admitted(context) as peer:
            await self._greet(context)
            await self.end_stream(peer.site, Refusal(grpc.StatusCode.ABORTED, "A newer connection took over."))
            stream = self._streams[peer.site] = ControlStream(peer)
            self._mailbox.connect(peer.site, stream)
            logger.info("site %s connected", peer.site, extra={"peer": peer.site})
            try:
                self._check(peer)  # a revocation since `_admit` found no stream to end
                await _first_of(self._listen(stream, context), self._speak(stream, context), stream.ended)
            finally:
                self._mailbox.disconnect(peer.site, stream)
                if self._streams.get(peer.site) is stream:
                    del self._streams[peer.site]
                logger.info("site %s disconnected", peer.site, extra={"peer": peer.site})

    async def _greet(self, context: Context) -> None:
        await context.send_initial_metadata(clock_metadata(self._clock))
        await context.write(pb.FromCoordinator(hello=pb.Hello(protocol_version=PROTOCOL_VERSION)))
        async with asyncio.timeout(self._timing.silence):
            first = await context.read()
        if first is grpc.aio.EOF or first.WhichOneof("part") != "hello":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "A stream begins with a hello.")
        if first.hello.protocol_version != PROTOCOL_VERSION:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"The coordinator speaks version {PROTOCOL_VERSION} of the link and the site version "
                f"{first.hello.protocol_version}; install the same release on both.",
            )

    async def _listen(self, stream: ControlStream, context: Context) -> None:
        unawaited = Allowance(self._clock, *UNAWAITED)
        while True:
            async with asyncio.timeout(self._timing.silence):
                message = await context.read()
            if message is grpc.aio.EOF:
                return
            self._check(stream.peer)
            awaited = message.WhichOneof("part") == "reply" and self._take_reply(stream.peer.site, message.reply)
            if not awaited and not unawaited.take():
                raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "The site says much that nobody asked for.")

    def _take_reply(self, site: str, reply: pb.Reply) -> bool:
        """Whether somebody awaits it."""
        if len(reply.body) > MAX_BODY:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"A reply's body is above {MAX_BODY} bytes.")
        if self._mailbox.answer(site, reply):
            return True
        logger.info("ignored a reply of site %s that nobody awaits from it", site, extra={"peer": site})
        return False

    async def _speak(self, stream: ControlStream, context: Context) -> None:
        await context.write(pb.FromCoordinator(heartbeat=pb.Heartbeat()))  # now the site knows that it counts
        while True:
            try:
                async with asyncio.timeout(self._timing.heartbeat):
                    message = pb.FromCoordinator(request=await stream.outgoing.get())
            except TimeoutError:
                message = pb.FromCoordinator(heartbeat=pb.Heartbeat())
            # Also on every heartbeat: a revocation that another process wrote ends the stream as well.
            await self._refresh()
            self._check(stream.peer)
            await context.write(message)

    # Objects

    async def Stat(self, _: object, context: Context) -> pb.StatReply:  # noqa: N802
        async with refusals(context), self._admitted(context) as peer:
            run, ref = self._run_uploaded_to(peer, await self._next(context, pb.Object))
            received, whole = run.received(peer.site, ref)
            return pb.StatReply(received=received, whole=whole)

    async def Push(self, _: object, context: Context) -> pb.PushReply:  # noqa: N802
        async with refusals(context), self._admitted(context) as peer:
            header = (await self._next(context, pb.PushPart)).header
            run, ref = self._run_uploaded_to(peer, header.object)
            with run.receive(peer.site, ref) as partial:
                if await asyncio.to_thread(partial.resume) != header.offset:
                    raise Refusal(grpc.StatusCode.ABORTED, "The upload goes on from another offset.")
                while partial.offset < ref.size:
                    chunk = (await self._next(context, pb.PushPart)).chunk
                    self._check(peer)
                    if not chunk:
                        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "An empty chunk moves nothing.")
                    await asyncio.to_thread(partial.append, chunk)
                await asyncio.to_thread(partial.finish)
            return pb.PushReply()

    async def Pull(self, _: object, context: Context) -> None:  # noqa: N802
        async with refusals(context), self._admitted(context) as peer:
            wanted = await self._next(context, pb.PullRequest)
            ref = ObjectRef(wanted.object.sha256, wanted.object.size)
            run = self._runs.get(wanted.object.run_id)
            if run is None or not run.may_download(peer.site, ref) or not self._objects.has(ref):
                raise _nothing_here()
            if wanted.offset > ref.size:
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "The download goes on from beyond the object's end.")
            with self._objects.path(ref).open("rb") as file:
                file.seek(wanted.offset)
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    self._check(peer)
                    async with asyncio.timeout(self._timing.progress):
                        await context.write(pb.PullPart(chunk=chunk))

    async def _next(self, context: Context, kind: type[_M]) -> _M:
        async with asyncio.timeout(self._timing.progress):
            message = await context.read()
        if message is grpc.aio.EOF:
            raise Refusal(grpc.StatusCode.ABORTED, "The call ended early.")
        assert isinstance(message, kind)  # gRPC parses a method's messages as its own kind
        return message

    def _run_uploaded_to(self, peer: Peer, wanted: pb.Object) -> tuple[RunFiles, ObjectRef]:
        run = self._runs.get(wanted.run_id)
        if run is None or not run.expects(peer.site):
            raise _nothing_here()
        return run, ObjectRef(wanted.sha256, wanted.size)

    # Admission

    @asynccontextmanager
    async def _admitted(self, context: Context) -> AsyncIterator[Peer]:
        """The site that calls, for as long as it does; one site has only so many calls open, over any connections."""
        peer = await self._admit(context)
        if self._open[peer.site] >= CALLS_OF_ONE_SITE:
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "This site has too many calls open.")
        self._open[peer.site] += 1
        try:
            yield peer
        finally:
            self._open[peer.site] -= 1

    async def _admit(self, context: Context) -> Peer:
        peer = peer_of(context)
        if peer is None:
            raise not_admitted()
        await self._refresh()
        if not self._directory.site_for(peer.site, peer.certificate_sha256):
            await asyncio.to_thread(self._note_not_admitted, peer.site, peer.certificate_sha256)
            raise not_admitted()
        context.set_trailing_metadata(clock_metadata(self._clock))
        return peer

    async def _refresh(self) -> None:
        """A database that is slow or away holds nobody up: what is known serves meanwhile, for as long as the directory
        vouches for it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(asyncio.to_thread(self._directory.refresh))
            self._refreshing.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Not wait_for: in Python 3.11 it swallows a cancellation that comes when the answer does, and a stream that was
        # to end would stay.
        done, _ = await asyncio.wait([self._refreshing], timeout=REFRESH_SECONDS)
        with suppress(LocalError):
            for each in done:
                each.result()

    def _check(self, peer: Peer) -> None:
        if not self._directory.site_for(peer.site, peer.certificate_sha256):
            raise not_admitted()


def clock_metadata(clock: Clock) -> tuple[tuple[str, str], ...]:
    """Metadata by which a site sees whether its clock agrees."""
    return ((CLOCK_KEY, f"{clock.now():.3f}"),)


async def _first_of(*ways: Coroutine[None, None, None] | asyncio.Future[None]) -> None:
    """Wait for whichever ends first, cancel the others and raise what it raised."""
    tasks = [asyncio.ensure_future(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
