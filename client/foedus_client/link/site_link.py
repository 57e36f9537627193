"""A site's end of the link: one stream to the coordinator, and the messages on it handed to a Flower `ClientApp`.

The link's event loop keeps the stream up; the app runs in worker threads, one message at a time for
each run. Message bodies are opaque here. Lives in the daemon's process, which does not train: heartbeats never wait.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from flwr.app import Context, Message, Metadata
from flwr.clientapp import ClientApp

from foedus_client.link.state import LinkState, clocks_apart, coordinators_clock, explain
from foedus_client.link.transfers import Transfers, check_size, pauses
from foedus_common.certificates import CLOCK_SKEW
from foedus_common.clock import Clock, SystemClock
from foedus_common.errors import FoedusError, LocalError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link import foedus_pb2_grpc as pb_grpc
from foedus_common.link.contents import body_of, content_of, message_of
from foedus_common.link.loop import on_loop
from foedus_common.link.transport import (
    COORDINATOR_NODE,
    DEFAULT_TIMING,
    MAX_BODY,
    MAX_ENROL_BODY,
    PROTOCOL_VERSION,
    Timing,
    TlsIdentity,
    channel_options,
    node_id,
)
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.randomness import RandomBytes, system_random

logger = logging.getLogger(__name__)

_KEPT_REPLIES = 64
_MAX_AT_WORK = 64
_MAX_UNREAD = 256
"""Replies that the coordinator has not taken; one that asks on and does not read loses its stream."""
_ENROL_SECONDS = 30.0
_MACHINES_CLOCK = SystemClock()
_ADMISSION_SECONDS = 10.0

__all__ = ["LinkState", "SiteLink", "admission", "enrol"]


class SiteLink:
    """Keeps the site named `site` connected to its coordinator. All methods may be called from any thread.

    `on_state(state, sentence)` is called from the link's thread at every change, and must neither block nor raise;
    the sentence is for a person.
    A transfer gives up when nothing has moved for `patience` seconds; larger objects than `max_object_bytes` are
    not downloaded.
    """

    def __init__(
        self,
        *,
        site: str,
        address: str,
        tls: TlsIdentity,
        objects: ObjectStore,
        proxy: str = "",
        on_state: Callable[[LinkState, str], None] = lambda state, sentence: None,
        max_object_bytes: int = 4 << 30,
        patience: float = 120.0,
        random: RandomBytes = system_random,
        timing: Timing = DEFAULT_TIMING,
        clock: Clock | None = None,
    ) -> None:
        self._node = node_id(site)
        self._address = address
        self._credentials = grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)
        self._options = channel_options(proxy)
        self._proxy = proxy
        self._authority = tls.authority
        self._clock = clock or SystemClock()
        self._greeting = ""
        self._objects = objects
        self._on_state = on_state
        self._max_object_bytes = max_object_bytes
        self._patience = patience
        self._random = random
        self._timing = timing
        self._state = (LinkState.STOPPED, "")
        self._transfers: Transfers | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._replies: OrderedDict[str, pb.Reply] = OrderedDict()
        self._outgoing: asyncio.Queue[pb.Reply] = asyncio.Queue(_MAX_UNREAD)

    def start(self, app: ClientApp, context_for: Callable[[int], Context]) -> None:
        """Connect, and keep coming back until `stop`. `context_for(run_id)` gives the app its Flower context.

        The app is called in worker threads: for one run in the order of the requests and one at a time, for
        different runs at once. After a reconnection it is not called again for a request that it is still working
        on or has just answered; after a restart of the site it is.
        """
        self._app = app
        self._context_for = context_for
        on_loop(self._open()).result()

    def stop(self) -> None:
        """Hang up. Requests at work are abandoned; the coordinator repeats them after the next start."""
        on_loop(self._close()).result()

    def fetch(self, run_id: int, ref: ObjectRef) -> Path:
        """Download an object that the coordinator offers this site in this run, unless it is here; blocks.

        Raises:
            RemoteError: BAD_MESSAGE when it is too large, or not what its reference says.
            LocalError: the coordinator would not give it, or the link was stopped.
        """
        check_size(ref, self._max_object_bytes)
        self._await(lambda transfers: transfers.fetch(run_id, ref))
        return self._objects.path(ref)

    def push(self, run_id: int, ref: ObjectRef) -> None:
        """Upload an object of this site's store; blocks until the coordinator has it whole and checked.

        Raises:
            LocalError: the coordinator would not take it, or the link was stopped.
        """
        self._await(lambda transfers: transfers.push(run_id, ref))

    def _await(self, transfer: Callable[[Transfers], Coroutine[Any, Any, None]]) -> None:
        async def as_task() -> None:
            if self._transfers is None:
                raise LocalError("The link is stopped; no object can move.")
            await self._begin(transfer(self._transfers))

        try:
            on_loop(as_task()).result()
        except CancelledError:
            raise LocalError("The link was stopped while an object was moving.") from None

    async def _open(self) -> None:
        self._bulk = self._channel()
        self._transfers = Transfers(
            self._bulk, self._objects, patience=self._patience, random=self._random, timing=self._timing
        )
        self._at_work: set[str] = set()
        self._last_of_run: dict[int, asyncio.Task[None]] = {}
        self._begin(self._stay_connected())

    async def _close(self) -> None:
        if self._transfers is None:
            return
        self._transfers = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._bulk.close()
        self._tell(LinkState.STOPPED, "The link is stopped.")

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that ends with the link at the latest."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(self._address, self._credentials, self._options)

    async def _stay_connected(self) -> None:
        self._tell(LinkState.CONNECTING, f"Connecting to the coordinator at {self._address}.")
        loop, waits = asyncio.get_running_loop(), pauses(self._random)
        while True:
            began = loop.time()
            try:
                # A new channel each time makes every try a real one: an old one has a back-off of its own.
                async with self._channel() as channel:
                    await self._converse(channel)
                self._tell(LinkState.AWAY, f"The coordinator at {self._address} is stopping; waiting for it.")
            except grpc.aio.AioRpcError as error:
                self._tell(*await asyncio.to_thread(self._explain, error))
            except TimeoutError:
                self._tell(LinkState.AWAY, f"The coordinator at {self._address} fell silent; trying again.")
            except Exception as error:
                logger.error("the stream to the coordinator broke: %s", type(error).__name__)
                self._tell(LinkState.AWAY, f"The stream to {self._address} broke; trying again.")
            if loop.time() - began > self._timing.silence:  # it worked; two daemons that oust each other slow down
                waits = pauses(self._random)
            await asyncio.sleep(next(waits))

    async def _converse(self, channel: grpc.aio.Channel) -> None:
        call = pb_grpc.LinkStub(channel).Control()
        try:
            # The coordinator speaks first: writing into a call that it refuses would hide its reason.
            async with asyncio.timeout(self._timing.silence):
                if await call.read() is grpc.aio.EOF:
                    return
                self._greeting = f"Connected to the coordinator at {self._address}."
                if amiss := clocks_apart(await call.initial_metadata(), self._clock):
                    self._greeting += f" {amiss}"
            await call.write(pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION)))
            # Replies for an earlier stream are not lost: the coordinator asks again, and they are kept.
            self._outgoing = asyncio.Queue(_MAX_UNREAD)
            speaking = asyncio.create_task(self._speak(call))
            try:
                await self._listen(call)
            finally:
                speaking.cancel()
                await asyncio.gather(speaking, return_exceptions=True)
        finally:
            call.cancel()

    async def _listen(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            async with asyncio.timeout(self._timing.silence):
                message = await call.read()
            if message is grpc.aio.EOF:
                return
            self._tell(LinkState.CONNECTED, self._greeting)
            if message.WhichOneof("part") == "request":
                self._take(message.request)

    async def _speak(self, call: grpc.aio.StreamStreamCall) -> None:
        while True:
            try:
                async with asyncio.timeout(self._timing.heartbeat):
                    message = pb.FromSite(reply=await self._outgoing.get())
            except TimeoutError:
                message = pb.FromSite(heartbeat=pb.Heartbeat())
            await call.write(message)

    def _take(self, request: pb.Request) -> None:
        if request.id in self._at_work:
            return
        if request.id in self._replies:
            self._outgoing.put_nowait(self._replies[request.id])
        elif len(self._at_work) == _MAX_AT_WORK:
            self._outgoing.put_nowait(pb.Reply(id=request.id, failure="The site has too much to do."))
        else:
            self._at_work.add(request.id)
            before = self._last_of_run.get(request.run_id)
            self._last_of_run[request.run_id] = self._begin(self._work(request, before))

    async def _work(self, request: pb.Request, before: asyncio.Task[None] | None) -> None:
        """Answer one request, after the one `before` it in the same run."""
        if before:
            await asyncio.wait([before])
        reply = await self._in_thread(self._answer, request)
        self._at_work.remove(request.id)
        if self._last_of_run[request.run_id] is asyncio.current_task():
            del self._last_of_run[request.run_id]
        if reply.WhichOneof("outcome") == "body":
            self._replies[request.id] = reply
            if len(self._replies) > _KEPT_REPLIES:
                self._replies.popitem(last=False)
        with suppress(asyncio.QueueFull):  # the stream ends with the next request; this one is asked again after it
            self._outgoing.put_nowait(reply)

    async def _in_thread(self, function: Callable[[pb.Request], pb.Reply], request: pb.Request) -> pb.Reply:
        """Like `asyncio.to_thread`, without its limit on threads and without keeping the process from ending.

        A site's approval can take hours, and must hold up neither other runs nor a stop.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[pb.Reply] = loop.create_future()

        def finish(reply: pb.Reply) -> None:
            if not future.done():
                future.set_result(reply)

        def work() -> None:
            loop.call_soon_threadsafe(finish, function(request))

        threading.Thread(target=work, name=f"foedus-run-{request.run_id}", daemon=True).start()
        return await future

    def _answer(self, request: pb.Request) -> pb.Reply:
        try:
            body = _answered(self._app(self._message(request), self._context_for(request.run_id)))
            return pb.Reply(id=request.id, body=body)
        except FoedusError as error:
            logger.error("%.40r of run %d failed: %s", request.message_type, request.run_id, error)
        except Exception as error:
            # Where and what kind, without the text: a library's text may quote data.
            where = "".join(traceback.format_tb(error.__traceback__))
            logger.error(
                "%.40r of run %d failed: %s at\n%s", request.message_type, request.run_id, type(error).__name__, where
            )
        return pb.Reply(id=request.id, failure="The site's program failed; the log of the site says why.")

    def _message(self, request: pb.Request) -> Message:
        metadata = Metadata(
            run_id=request.run_id,
            message_id=request.id,
            src_node_id=COORDINATOR_NODE,
            dst_node_id=self._node,
            reply_to_message_id="",
            group_id=request.group_id,
            created_at=request.created_at,
            ttl=request.ttl,
            message_type=request.message_type,
        )
        return message_of(metadata, content_of(request.body))

    def _explain(self, error: grpc.RpcError) -> tuple[LinkState, str]:
        return explain(error, self._address, self._proxy, self._authority, self._clock)

    def _tell(self, state: LinkState, sentence: str) -> None:
        if (state, sentence) != self._state:
            self._state = (state, sentence)
            self._on_state(state, sentence)


def _answered(reply: Message) -> bytes:
    """The body of the app's reply. Raises LocalError when it is not ours, or too large for the control stream."""
    body = body_of(reply)
    if len(body) > MAX_BODY:
        raise LocalError(f"The app's reply of {len(body)} bytes is above {MAX_BODY}; push an object instead.")
    return body


def enrol(address: str, authority: bytes, body: bytes, proxy: str = "", clock: Clock = _MACHINES_CLOCK) -> bytes:
    """Hand an enrolment request to the coordinator and give its answer; `authority` (PEM) is the CA it must show.

    proxy: as for `transport.channel_options`; clock: compared with the coordinator's.

    Raises:
        LocalError: the coordinator cannot be reached, cannot be trusted, has another time, or refused; the sentence
            says which.
    """
    if len(body) > MAX_ENROL_BODY:
        raise LocalError(f"An enrolment request of {len(body)} bytes is above {MAX_ENROL_BODY}.")
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(authority), channel_options(proxy)) as channel:
        try:
            enrolment = pb_grpc.EnrolmentStub(channel)
            answer, call = enrolment.Enrol.with_call(pb.EnrolRequest(body=body), timeout=_ENROL_SECONDS)
        except grpc.RpcError as error:
            raise LocalError(explain(error, address, proxy, authority, clock)[1]) from None
    if amiss := clocks_apart(call.trailing_metadata(), clock, CLOCK_SKEW):
        raise LocalError(amiss)  # or tokens and certificates would be refused, for reasons that mislead
    return bytes(answer.body)


def admission(address: str, tls: TlsIdentity, proxy: str = "") -> float:
    """Ask the coordinator whether it lets this site in, without a word about any run; gives its clock in Unix seconds.

    A daemon that is connected meanwhile notices nothing. The question is for an object that nobody has: who is told so
    was let in.

    Raises:
        LocalError: the coordinator cannot be reached, cannot be trusted, or does not admit the site; the sentence says
            which.
    """
    credentials = grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)
    with grpc.secure_channel(address, credentials, channel_options(proxy)) as channel:
        try:
            pb_grpc.LinkStub(channel).Stat(pb.Object(), timeout=_ADMISSION_SECONDS)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise LocalError(explain(error, address, proxy, tls.authority, SystemClock())[1]) from None
            if (now := coordinators_clock(error.trailing_metadata())) is not None:
                return now
    raise LocalError(
        f"What answers at {address} is no coordinator of this release; install the same one on both sides."
    )
