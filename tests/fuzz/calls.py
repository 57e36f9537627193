"""Both ends of the link as gRPC would call them, on one loop and without a network: what comes in is what was mutated.

The services are the real ones; the context and the channel are stand-ins. A list of calls is an `enc` of its parts.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from foedus_client.link.state import clocks_apart
from foedus_client.link.transfers import Transfers
from foedus_common.canonical import enc, unenc
from foedus_common.clock import ManualClock
from foedus_common.errors import FoedusError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CLOCK_KEY, PROTOCOL_VERSION, Timing
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.protocol import wire
from foedus_server.link.mailbox import Mailbox, RunFiles
from foedus_server.link.service import LinkService
from mutations import framed, frames, in_parts, raw
from seeded import seeded
from sessions import Attempt
from workshop import Target

RUN, SITE, NOW = 7, "north", 1_800_000_000.0
WAIT_SECONDS = 30.0
UPLOAD, DOWNLOAD = bytes(range(80)), b"an adapter" * 9
CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
PROVED = {
    "ssl_tls_version": [b"TLSv1.3"],
    "peer_uri": [b"foedus://site/" + SITE.encode()],
    "x509_pem_cert": [CERTIFICATE],
}


class Refused(Exception):
    """The call ended with a status, or its frames are not what gRPC hands on."""


class Loop(asyncio.SelectorEventLoop):
    """Does at once what is given to a thread."""

    def complete(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Raises TimeoutError for what waits without end; nothing here has anything to wait for."""
        return self.run_until_complete(asyncio.wait_for(work, WAIT_SECONDS))

    def run_in_executor(self, executor: object, function: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        future = self.create_future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


class Context:
    """A servicer's context of a site that is admitted; `parts` are what it sends, then it ends."""

    def __init__(self, parts: Sequence[object] = ()) -> None:
        self._parts = iter(parts)
        self.written: list[Any] = []

    def auth_context(self) -> dict[str, list[bytes]]:
        return PROVED

    def set_trailing_metadata(self, metadata: object) -> None:
        pass

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    async def read(self) -> object:
        return next(self._parts, grpc.aio.EOF)

    async def write(self, message: object) -> None:
        self.written.append(message)

    async def abort(self, code: grpc.StatusCode, sentence: str) -> None:
        assert code is not grpc.StatusCode.INTERNAL, f"the coordinator failed: {sys.exc_info()[1]!r}"
        raise Refused(sentence)


class Directory:
    """Admits everybody."""

    def refresh(self) -> None:
        pass

    def site_for(self, san_name: str, certificate_sha256: bytes) -> bool:
        return True


def _parts(data: bytes) -> tuple[bytes, ...]:
    try:
        return unenc(data)
    except ValueError:
        raise Refused from None


def reference(data: bytes) -> pb.Object:
    return pb.Object(run_id=RUN, sha256=hashlib.sha256(data).hexdigest(), size=len(data))


class Coordinator:
    """Takes uploads, gives downloads, holds control streams."""

    def __init__(self, folder: Path) -> None:
        self._run = Loop().complete
        self._mailbox = Mailbox(ManualClock())
        self._uploads = folder / "uploads" / SITE
        files, objects = RunFiles(folder / "uploads", 1 << 20), ObjectStore(folder / "objects")
        files.expect(SITE)
        files.allow(objects.put(DOWNLOAD), [SITE])
        self._service = LinkService(
            Directory(), self._mailbox, objects, {RUN: files}, Timing(), ManualClock(), lambda *_: None
        )

    def uploads(self) -> list[bytes]:
        """Good inputs: one in two calls, asked about in between; one at once."""
        header = pb.PushPart(header=pb.PushHeader(object=reference(UPLOAD)))
        later = pb.PushPart(header=pb.PushHeader(object=reference(UPLOAD), offset=30))
        first, second = pb.PushPart(chunk=UPLOAD[:30]), pb.PushPart(chunk=UPLOAD[30:])
        asked = reference(UPLOAD).SerializeToString()
        return [
            enc(asked, _call(header, first, second)),
            enc(asked, _call(header, first), asked, _call(later, second)),
        ]

    def take_uploads(self, data: bytes) -> None:
        """Questions and uploads in turn. Whatever they were, what lies there whole has its hash for a name."""
        try:
            for asked, call in zip(*[iter(_parts(data)[:4])] * 2, strict=False):
                frames = [pb.PushPart.FromString(part) for part in _parts(call)]
                self._run(self._service.Stat(None, Context([pb.Object.FromString(asked)])))  # type: ignore[arg-type]
                try:
                    self._run(self._service.Push(None, Context(frames)))  # type: ignore[arg-type]
                except Refused:
                    if not os.listdir(self._uploads / "partial"):
                        raise
        finally:
            for path in _files(self._uploads):
                assert path.parent.name == "partial" or hashlib.sha256(path.read_bytes()).hexdigest() == path.name
                path.unlink()

    def downloads(self) -> list[bytes]:
        wanted = (pb.PullRequest(object=reference(DOWNLOAD), offset=offset) for offset in (0, 7))
        return [request.SerializeToString() for request in wanted]

    def give_download(self, data: bytes) -> None:
        wanted = pb.PullRequest.FromString(data)
        context = Context([wanted])
        self._run(self._service.Pull(None, context))  # type: ignore[arg-type]
        assert b"".join(part.chunk for part in context.written) == DOWNLOAD[wanted.offset :]

    def streams(self, reply: bytes) -> list[bytes]:
        hello = pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))
        beat, said = pb.FromSite(heartbeat=pb.Heartbeat()), pb.FromSite(reply=pb.Reply(id="1", body=reply))
        return [_call(hello), _call(hello, beat, said)]

    def hold_stream(self, data: bytes) -> None:
        frames = [pb.FromSite.FromString(part) for part in _parts(data)]
        self._mailbox.post(SITE, pb.Request(id="1", run_id=RUN, created_at=ManualClock().now(), ttl=9.0))
        self._run(self._service.Control(None, Context(frames)))  # type: ignore[arg-type]
        self._mailbox.take(["1"])
        assert self._mailbox.connected() == {}


def _call(*frames: Any) -> bytes:
    return enc(*(frame.SerializeToString() for frame in frames))


def _files(folder: Path) -> Iterator[Path]:
    for where in (folder, folder / "partial"):
        for entry in os.scandir(where):
            if entry.is_file():
                yield Path(entry.path)


class Site:
    """Fetches one object and pushes another; what the coordinator answers is mutated."""

    def __init__(self, folder: Path) -> None:
        self._run = Loop().complete
        self._folder = folder / "site"
        self._objects = ObjectStore(self._folder)
        self._own = self._objects.put(UPLOAD)
        self._wanted = ObjectRef(hashlib.sha256(DOWNLOAD).hexdigest(), len(DOWNLOAD))

    def answers(self) -> list[bytes]:
        """Good inputs: what a coordinator says of an upload, and the parts of a download."""
        parts = _call(pb.PullPart(chunk=DOWNLOAD[:30]), pb.PullPart(chunk=DOWNLOAD[30:]))
        held = (pb.StatReply(), pb.StatReply(received=30), pb.StatReply(received=80, whole=True))
        return [enc(stat.SerializeToString(), parts) for stat in held]

    def take_answers(self, data: bytes) -> None:
        stat, *downloads = _parts(data)[:2] or (b"",)
        parts = [pb.PullPart.FromString(part) for each in downloads for part in _parts(each)]
        channel = Channel(pb.StatReply.FromString(stat), parts)
        transfers = Transfers(
            channel,  # type: ignore[arg-type]
            self._objects,
            patience=0.0,
            random=seeded("pauses"),
            timing=Timing(),
        )
        try:
            self._run(transfers.push(RUN, self._own))
            self._run(transfers.fetch(RUN, self._wanted))
            assert self._objects.read(self._wanted) == DOWNLOAD
        finally:
            self._objects.delete(self._wanted)


class Channel:
    """Answers every call of a site's transfers; makes what gRPC's stubs ask a channel for."""

    def __init__(self, stat: pb.StatReply, download: Sequence[pb.PullPart]) -> None:
        self._stat = stat
        self._download = iter(download)

    def stream_stream(self, path: str, **_: object) -> None:
        pass

    def unary_unary(self, path: str, **_: object) -> Callable[..., Any]:
        async def stat(wanted: pb.Object, timeout: float) -> pb.StatReply:
            return self._stat

        return stat

    def stream_unary(self, path: str, **_: object) -> Callable[[], Channel]:
        return lambda: self

    def unary_stream(self, path: str, **_: object) -> Callable[[pb.PullRequest], Channel]:
        return lambda wanted: self

    async def read(self) -> object:
        return next(self._download, grpc.aio.EOF)

    async def write(self, part: pb.PushPart) -> None:
        pass

    async def done_writing(self) -> None:
        pass

    def __await__(self) -> Iterator[None]:
        yield from asyncio.sleep(0).__await__()

    def cancel(self) -> None:
        pass


# --- What is searched ---


def of_the_link(folder: Path, attempt: Attempt) -> list[Target]:
    """Frames as they come, and calls with such frames in them."""
    coordinator, site = Coordinator(folder), Site(folder)
    asked, said = attempt.requests[2], attempt.answers[2]
    request = pb.Request(id="1", run_id=RUN, message_type="query.keys", created_at=NOW, ttl=9.0, body=asked)
    hello = pb.FromCoordinator(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))
    to_site = [pb.FromCoordinator(request=request).SerializeToString(), hello.SerializeToString()]
    reply, beat = pb.FromSite(reply=pb.Reply(id="1", body=said)), pb.FromSite(heartbeat=pb.Heartbeat())
    to_coordinator = [reply.SerializeToString(), beat.SerializeToString()]
    of_uploads, of_answers = in_parts(frames(pb.PushPart, pb.Object)), in_parts(frames(pb.StatReply, pb.PullPart))
    errors = (FoedusError, DecodeError, Refused)
    return [
        Target("frames to a site", to_site, [frames(pb.FromCoordinator), raw], _site_reads, errors),
        Target("frames to a coordinator", to_coordinator, [frames(pb.FromSite), raw], _coordinator_reads, errors),
        Target("uploads", coordinator.uploads(), [framed, of_uploads], coordinator.take_uploads, errors),
        Target("downloads", coordinator.downloads(), [frames(pb.PullRequest), raw], coordinator.give_download, errors),
        Target(
            "control streams",
            coordinator.streams(said),
            [framed, in_parts(frames(pb.FromSite))],
            coordinator.hold_stream,
            errors,
        ),
        Target("transfers at a site", site.answers(), [framed, of_answers], site.take_answers, errors),
        Target("a coordinator's clock", [b"%.3f" % NOW], [raw, _times], _clock_at_a_site, ()),
    ]


def _site_reads(data: bytes) -> None:
    frame = pb.FromCoordinator.FromString(data)
    if frame.WhichOneof("part") == "request":
        wire.parse_envelope(frame.request.body)


def _coordinator_reads(data: bytes) -> None:
    frame = pb.FromSite.FromString(data)
    if frame.WhichOneof("part") == "reply":
        wire.parse_envelope(frame.reply.body)


_ODD_TIMES = (b"nan", b"-inf", b"1e999", b"-1", b"", b"9" * 400 + b".000", b"\xd9\xa1.500", b" 1.000", b"1_0.000")


def _times(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    odd = random.choice(_ODD_TIMES)
    return raw(random, odd, others) if random.random() < 0.5 else odd


def _clock_at_a_site(data: bytes) -> None:
    sentence = clocks_apart([(CLOCK_KEY, data.decode("utf-8", "replace"))], ManualClock(NOW))
    assert sentence is None or "clock" in sentence
