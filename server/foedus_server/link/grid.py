"""The coordinator's end of the link: a gRPC server on the link's loop, and a Flower `Grid` for each run.

A run's thread pushes Flower messages and pulls the replies; the server carries them to the sites. Message bodies are
opaque here, identity is the business of `service`, and unanswered requests that of `mailbox`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.serverapp import Grid

from foedus_common.clock import DAY, Clock, SystemClock
from foedus_common.errors import LocalError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.contents import body_of, content_of, message_of
from foedus_common.link.loop import on_loop
from foedus_common.link.transport import (
    COORDINATOR_NODE,
    DEFAULT_TIMING,
    MAX_BODY,
    Timing,
    TlsIdentity,
    node_id,
)
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_common.randomness import RandomBytes, system_random
from foedus_server.link.enrolment import EnrolmentService
from foedus_server.link.listeners import Listeners
from foedus_server.link.mailbox import Mailbox, RunFiles
from foedus_server.link.service import LinkService, SiteDirectory, not_admitted

SITE_FAILED = 1
"""Code of a Flower `Error`: the site's program raised; its own log says what."""


class LinkStopping(LocalError):
    """The coordinator is going down in good order: a run's thread ends on it, and continues after the next start."""

    def __init__(self) -> None:
        super().__init__("The coordinator is stopping; the run goes on after the next start.")


class LinkServer:
    """Listens for sites and for enrolment. All methods may be called from any thread.

    `directory` says which certificate may speak for which site; `objects` holds what sites may download; uploads lie
    below `uploads`, per run and site. `enrol` answers an enrolment request, or raises a `FoedusError` whose sentence
    the caller sees. `not_admitted(site, sha256)` is told of each certificate that passed the handshake and is not in
    the directory. Addresses are `host:port`; port 0 takes a free one.
    """

    def __init__(
        self,
        *,
        address: str,
        enrol_address: str,
        tls: TlsIdentity,
        directory: SiteDirectory,
        objects: ObjectStore,
        uploads: Path,
        enrol: Callable[[bytes], bytes],
        not_admitted: Callable[[str, bytes], None] = lambda site, sha256: None,
        clock: Clock | None = None,
        random: RandomBytes = system_random,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self.address = address
        self.enrol_address = enrol_address
        self.clock = clock or SystemClock()
        self.random = random
        self.mailbox = Mailbox(self.clock)
        self._tls = tls
        self._uploads = uploads
        self._stopped = False
        self._grids: dict[int, SiteGrid] = {}
        self._files: dict[int, RunFiles] = {}
        self._service = LinkService(directory, self.mailbox, objects, self._files, timing, self.clock, not_admitted)
        self._enrolment = EnrolmentService(enrol, self.clock)
        self._listeners = Listeners(self._service.register, self._enrolment.register)

    def start(self) -> None:
        """Listen; `address` and `enrol_address` then name the ports that were taken.

        Raises:
            LocalError: a port is in use, or cannot be listened on.
        """
        on_loop(self._listen()).result()

    def show(self, tls: TlsIdentity) -> None:
        """Connections are shown this from now on, and have to be signed by one of its authorities.

        Sites' streams end, and they come back by themselves; transfers go on. Raises LocalError when the ports cannot
        be listened on anew: everything stays as it was.
        """
        on_loop(self._exchange(tls)).result()

    def drain_and_stop(self, grace: float = 5.0) -> None:
        """Wake the runs' threads with `LinkStopping`, say goodbye to the sites, then stop.

        Transfers under way get `grace` seconds to end.
        """
        self._stopped = True
        for grid in list(self._grids.values()):
            grid.stop()
        on_loop(self._close(grace)).result()

    def grid(self, run_id: int, max_upload_bytes: int) -> SiteGrid:
        """The grid of one run, until it is closed; each site may hold `max_upload_bytes` of uploads in it at a time.

        Raises:
            LinkStopping: see there.
            LocalError: the run has a grid already.
        """
        if self._stopped:
            raise LinkStopping
        grid = SiteGrid(run_id, self, RunFiles(self._uploads / str(run_id), max_upload_bytes))
        self.mailbox.watch(run_id, grid.changed.set)
        self._grids[run_id] = grid
        self._files[run_id] = grid.files
        return grid

    def forget_run(self, run_id: int) -> None:
        """`SiteGrid.close` calls it."""
        self.mailbox.close(run_id)
        self._grids.pop(run_id, None)
        self._files.pop(run_id, None)

    def connected(self) -> dict[str, float]:
        """Sites that are here, and since when (Unix seconds)."""
        return self.mailbox.connected()

    def disconnect(self, site: str) -> None:
        """End the site's stream at once: it was revoked."""
        on_loop(self._service.end_stream(site, not_admitted())).result()

    async def _listen(self) -> None:
        await self._listeners.listen(self._tls, self.address, self.enrol_address)
        self.address, self.enrol_address = self._listeners.addresses

    async def _exchange(self, tls: TlsIdentity) -> None:
        await self._listeners.exchange(tls)
        self._service.end_all_streams()

    async def _close(self, grace: float) -> None:
        # Streams first: `close` would wait for them through the whole grace.
        self._service.end_all_streams()
        await self._listeners.close(grace)


class SiteGrid(Grid):
    """Flower's `Grid` for one run, over the link. One thread drives it.

    Beyond Flower's contract: `wait` instead of sleeping, sites by name, and the run's objects. A request stays valid
    for its time to live, also across reconnections of its site.
    """

    def __init__(self, run_id: int, link: LinkServer, files: RunFiles) -> None:
        self.run_id = run_id
        self.files = files
        self.changed = threading.Event()
        self._link = link
        self._run: Any = None
        self._stopped = False
        self._names: dict[int, str] = {}
        self._requests: dict[str, Message] = {}

    # Flower's contract

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        """What `set_run` was given."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower and never called by us; see `message`."""
        return self._message(content, message_type, dst_node_id, group_id, DAY if ttl is None else ttl)

    def get_node_ids(self) -> list[int]:
        """Node ids of the connected sites, in the order of their names."""
        return [self.node(site) for site in sorted(self._link.connected())]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send requests on; returns at once. A site that is away gets its request when it comes back.

        Raises:
            LinkStopping: see there.
            LocalError: a body is too large, or a node id is no site that this grid has heard of.
        """
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived, each once; never waits. A site whose program failed gives a Flower `Error`.

        Raises:
            LinkStopping: see there.
        """
        self._check_running()
        return [_reply_message(reply, self._requests.pop(reply.id)) for reply in self._link.mailbox.take(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, and wait for all replies, at most `timeout` seconds (None: a day); the missing ones are forgotten."""
        waiting = set(self.push_messages(messages))
        deadline = self._link.clock.monotonic() + (DAY if timeout is None else timeout)
        replies: list[Message] = []
        while waiting:
            arrived = self.pull_messages(waiting)
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            left = deadline - self._link.clock.monotonic()
            if not waiting or left <= 0:
                break
            self.wait(left)
        self.forget(waiting)
        return replies

    # Beyond it

    def wait(self, timeout: float) -> None:
        """Sleep until a reply to this run arrives or a site comes or goes, at most `timeout` seconds.

        What happened since the last wait counts: pull, then wait, and nothing is missed.

        Raises:
            LinkStopping: see there.
        """
        self.changed.wait(timeout)
        self.changed.clear()
        self._check_running()

    def forget(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these replies any more; a site that comes back is not asked again."""
        for message_id in (ids := list(message_ids)):
            self._requests.pop(message_id, None)
        self._link.mailbox.forget(ids)

    def message(self, site: str, message_type: str, body: bytes, *, ttl: float, group_id: str = "") -> Message:
        """A request to `site`, valid for `ttl` seconds; push it to send it."""
        return self._message(content_of(body), message_type, self.node(site), group_id, ttl)

    def node(self, site: str) -> int:
        """Flower node id of a site."""
        node = node_id(site)
        self._names[node] = site
        return node

    def site(self, node: int) -> str:
        """Name of a site that is connected or that this grid has sent something to.

        Raises:
            LocalError: it is neither.
        """
        if node not in self._names:
            self.get_node_ids()
        if node not in self._names:
            raise LocalError(f"Run {self.run_id} knows no site with node id {node}.")
        return self._names[node]

    def allow(self, ref: ObjectRef, sites: Collection[str]) -> None:
        """Let these sites download an object of the coordinator's store, until the grid is closed."""
        self.files.allow(ref, sites)

    def upload(self, site: str, ref: ObjectRef) -> Path:
        """The file that `site` uploaded under this reference, checked when it arrived.

        Raises:
            RemoteError: BAD_MESSAGE when that site uploaded no such object in this run.
        """
        return self.files.upload(site, ref)

    def discard(self, site: str, ref: ObjectRef) -> None:
        """Delete an upload that is used up, which frees the site's room under the run's cap."""
        self.files.discard(site, ref)

    def clear_uploads(self) -> None:
        """Delete all uploads of the run, also what arrived too late to be named: call it when a round is over."""
        self.files.clear_uploads()

    def close(self) -> None:
        """The run is over: forget its requests, delete its uploads, allow nothing any more."""
        self._link.forget_run(self.run_id)
        self.files.close()

    def stop(self) -> None:
        """The link is stopping: whoever waits is woken, and every further call raises `LinkStopping`."""
        self._stopped = True
        self.changed.set()

    def _message(
        self,
        content: RecordDict,
        message_type: str,
        node: int,
        group_id: str,
        ttl: float,
        message_id: str = "",
    ) -> Message:
        metadata = Metadata(
            run_id=self.run_id,
            message_id=message_id,
            src_node_id=COORDINATOR_NODE,
            dst_node_id=node,
            reply_to_message_id="",
            group_id=group_id,
            created_at=self._link.clock.now(),
            ttl=ttl,
            message_type=message_type,
        )
        return message_of(metadata, content)

    def _push(self, message: Message) -> str:
        self._check_running()
        to = message.metadata
        site = self.site(to.dst_node_id)
        body = body_of(message)
        if len(body) > MAX_BODY:
            raise LocalError(f"A message of {len(body)} bytes is above {MAX_BODY}; send a reference to an object.")
        message_id = self._link.random(16).hex()
        request = pb.Request(
            id=message_id,
            run_id=self.run_id,
            message_type=to.message_type,
            group_id=to.group_id,
            created_at=to.created_at,
            ttl=to.ttl,
            body=body,
        )
        # Kept without its body, for the reply to refer to.
        self._requests[message_id] = self._message(
            RecordDict(), to.message_type, to.dst_node_id, to.group_id, to.ttl, message_id
        )
        self.files.expect(site)
        self._link.mailbox.post(site, request)
        return message_id

    def _check_running(self) -> None:
        if self._stopped:
            raise LinkStopping


def _reply_message(reply: pb.Reply, request: Message) -> Message:
    if reply.WhichOneof("outcome") == "failure":
        return Message(Error(SITE_FAILED, reply.failure[:300]), reply_to=request)
    return Message(content_of(reply.body), reply_to=request)
