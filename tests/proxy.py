"""A TCP proxy in user space between a site and its coordinator: counts what passes, and does what bad networks do.

It sees TLS records and knows nothing of what is in them. Each proxy has a thread with an event loop of its own; all
methods may be called from any thread and have taken effect when they return.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

UP, DOWN = "up", "down"
"""Towards the coordinator, and away from it."""
_READ_BYTES = 64 * 1024


class Proxy:
    """Listens on 127.0.0.1:`port`, and passes what comes to 127.0.0.1:`target` until it is told to do otherwise."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.passed = {UP: 0, DOWN: 0}
        """Bytes handed on, over all connections."""
        self.arrivals: list[float] = []
        """When somebody connected, by time.monotonic()."""
        self._delay = 0.0
        self._refusing = False
        self._cut_at: tuple[str, int] | None = None
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True).start()
        self.port: int = self._do(self._listen)

    # --- What bad networks do ---

    def delay(self, seconds: float) -> None:
        """Whatever passes takes so much longer, either way."""
        self._delay = seconds

    def stall(self) -> None:
        """Nothing passes any more and nobody is told; who connects now finds a door and silence behind it."""
        self._call(self._moving.clear)

    def cut(self) -> None:
        """Every connection is reset at both ends; new ones are welcome."""
        self._call(self._cut)

    def cut_after(self, direction: str, size: int) -> None:
        """As `cut`, once, when so many more bytes have passed in this direction."""
        self._cut_at = (direction, self.passed[direction] + size)

    def half_open(self, lost: str) -> None:
        """Every connection is reset at one end (UP: the coordinator's, DOWN: the site's); the other is not told."""
        self._call(lambda: [line.lose(lost) for line in self._lines])

    def refuse(self) -> None:
        """As `cut`, and new connections are reset as they come."""
        self._refusing = True
        self.cut()

    def heal(self) -> None:
        """As at first. What was held back arrives; what was reset stays so."""
        self._delay, self._refusing, self._cut_at = 0.0, False, None
        self._call(self._moving.set)

    def close(self) -> None:
        self._do(self._close)
        self._loop.call_soon_threadsafe(self._loop.stop)

    # --- On the loop ---

    async def _listen(self) -> int:
        self._moving = asyncio.Event()
        self._moving.set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.arrivals.append(time.monotonic())
        if self._refusing:
            return _reset(writer)
        await self._moving.wait()
        try:
            from_target, to_target = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return _reset(writer)
        line = _Line(site=writer, coordinator=to_target)
        self._lines.add(line)
        await asyncio.gather(self._pass_on(line, reader, to_target, UP), self._pass_on(line, from_target, writer, DOWN))
        self._lines.discard(line)

    async def _pass_on(
        self, line: _Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(_READ_BYTES):
                await asyncio.sleep(self._delay)
                await self._moving.wait()
                if line.half:
                    continue
                writer.write(data)
                await writer.drain()
                self.passed[direction] += len(data)
                if self._cut_at and self._cut_at[0] == direction and self.passed[direction] >= self._cut_at[1]:
                    self._cut_at = None
                    self._cut()
        if not line.half or line.half == direction:
            writer.close()

    def _cut(self) -> None:
        for line in self._lines:
            line.reset()

    def _call(self, function: Callable[[], Any]) -> None:
        async def called() -> None:
            function()

        self._do(called)

    def _do(self, work: Callable[[], Awaitable[Any]]) -> Any:
        async def done() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(60)


class _Line:
    """A connection of a site to its coordinator, in two halves."""

    def __init__(self, site: asyncio.StreamWriter, coordinator: asyncio.StreamWriter) -> None:
        self._ends = {UP: coordinator, DOWN: site}
        self.half = ""

    def lose(self, lost: str) -> None:
        self.half = lost
        _reset(self._ends[lost])

    def reset(self) -> None:
        for writer in self._ends.values():
            _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN: what was under way is lost."""
    if connection := writer.get_extra_info("socket"):
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
