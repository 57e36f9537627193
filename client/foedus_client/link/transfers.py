"""Objects to and from the coordinator: chunk by chunk, on from where the last try was cut, patient for a while.

Runs on the link's event loop, over a connection of its own. Knows no Flower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from weakref import WeakValueDictionary

import grpc
import grpc.aio

from foedus_client.link.state import said
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link import foedus_pb2_grpc as pb_grpc
from foedus_common.link.transport import CHUNK, Timing
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.randomness import RandomBytes

_STAT_SECONDS = 10.0
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Trying again cannot help. NOT_FOUND is not among them: a restarted coordinator offers its objects a little later."""


def pauses(random: RandomBytes) -> Iterator[float]:
    """Seconds to wait before each next try: doubling, with jitter, so that a hundred sites do not return as one."""
    pause = _FIRST_PAUSE
    while True:
        yield pause * (0.5 + random(1)[0] / 510)
        pause = min(2 * pause, _LONGEST_PAUSE)


class Transfers:
    """Moves objects between a site's store and the coordinator, over `channel`."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        objects: ObjectStore,
        *,
        patience: float,
        random: RandomBytes,
        timing: Timing,
    ) -> None:
        self._stub = pb_grpc.LinkStub(channel)
        self._objects = objects
        self._patience = patience
        self._random = random
        self._timing = timing
        self._fetching: WeakValueDictionary[ObjectRef, asyncio.Lock] = WeakValueDictionary()

    async def fetch(self, run_id: int, ref: ObjectRef) -> None:
        """Have the object in the store.

        Raises:
            RemoteError: BAD_MESSAGE when what came is not what the reference says.
            LocalError: the coordinator would not give it.
        """
        async with self._fetching.setdefault(ref, asyncio.Lock()):
            if not self._objects.has(ref):
                await self._patiently(lambda moved: self._pull(run_id, ref, moved))

    async def push(self, run_id: int, ref: ObjectRef) -> None:
        """Have the object at the coordinator, whole and checked there.

        Raises:
            RemoteError: BAD_MESSAGE when the coordinator says that it holds more of it than there is.
            LocalError: the coordinator would not take it.
        """
        await self._patiently(lambda moved: self._push(run_id, ref, moved))

    async def _patiently(self, attempt: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Repeat the attempt until it succeeds, cannot succeed, or nothing has moved for as long as patience lasts."""
        loop = asyncio.get_running_loop()
        last_moved = loop.time()

        def moved() -> None:
            nonlocal last_moved
            last_moved = loop.time()

        for pause in pauses(self._random):
            try:
                return await attempt(moved)
            except grpc.aio.AioRpcError as error:
                if error.code() in _FINAL or loop.time() - last_moved > self._patience:
                    raise LocalError(f"The coordinator would not move an object: {said(error)}") from None
            except TimeoutError:
                if loop.time() - last_moved > self._patience:
                    raise LocalError("The coordinator stopped moving an object.") from None
            await asyncio.sleep(pause)

    async def _pull(self, run_id: int, ref: ObjectRef, moved: Callable[[], None]) -> None:
        with self._objects.receive(ref) as partial:
            offset = await asyncio.to_thread(partial.resume)
            call = self._stub.Pull(pb.PullRequest(object=_address(run_id, ref), offset=offset))
            try:
                while (part := await self._within_progress(call.read())) is not grpc.aio.EOF:
                    await asyncio.to_thread(partial.append, part.chunk)
                    moved()
            finally:
                call.cancel()
            await asyncio.to_thread(partial.finish)

    async def _push(self, run_id: int, ref: ObjectRef, moved: Callable[[], None]) -> None:
        held = await self._stub.Stat(_address(run_id, ref), timeout=_STAT_SECONDS)
        if held.whole:
            return
        if held.received > ref.size:
            raise RemoteError(Reason.BAD_MESSAGE, "the coordinator says it holds more of an object than there is.")
        call = self._stub.Push()
        try:
            # A call that the coordinator has ended takes no more writes; awaiting it says why, as well as can be.
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError), self._objects.path(ref).open("rb") as file:
                header = pb.PushHeader(object=_address(run_id, ref), offset=held.received)
                await self._within_progress(call.write(pb.PushPart(header=header)))
                file.seek(held.received)
                while chunk := await asyncio.to_thread(file.read, CHUNK):
                    await self._within_progress(call.write(pb.PushPart(chunk=chunk)))
                    moved()
                await call.done_writing()
            await self._within_progress(call)
        finally:
            call.cancel()

    async def _within_progress(self, step: Awaitable[pb.PullPart]) -> pb.PullPart:
        async with asyncio.timeout(self._timing.progress):
            return await step


def _address(run_id: int, ref: ObjectRef) -> pb.Object:
    return pb.Object(run_id=run_id, sha256=ref.sha256, size=ref.size)


def check_size(ref: ObjectRef, limit: int) -> None:
    """Refuse to download what this site would not keep.

    Raises:
        RemoteError: BAD_MESSAGE.
    """
    if ref.size > limit:
        raise RemoteError(Reason.BAD_MESSAGE, f"an object of {ref.size} bytes is above this site's limit of {limit}.")
