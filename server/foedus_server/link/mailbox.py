"""What is under way between the coordinator and its sites: requests without a reply yet, and what a run may move.

Bookkeeping behind locks, shared by the link's loop and the runs' threads. Knows no sockets and no Flower.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from foedus_common.clock import Clock
from foedus_common.errors import LocalError, Reason, RemoteError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.objects import ObjectRef, ObjectStore, Partial

MAX_UPLOADS = 16
"""Of one site in one run; it has one for each attempt, and those that came late."""


class Stream(Protocol):
    """A site's open stream, as the mailbox sees it."""

    def deliver(self, request: pb.Request) -> None:
        """Send it, in order; from any thread."""


@dataclass
class _Asked:
    site: str
    request: pb.Request
    reply: pb.Reply | None = None


class Mailbox:
    """Requests to sites and their replies.

    A request stays until its reply is taken, its time to live has passed or it is forgotten, and goes out again
    whenever its site comes back; a reply counts only from the site that was asked, and only the first one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: dict[str, _Asked] = {}
        self._streams: dict[str, tuple[Stream, float]] = {}
        self._watchers: dict[int, Callable[[], None]] = {}

    def watch(self, run_id: int, changed: Callable[[], None]) -> None:
        """Call `changed` when a reply to this run arrives or any site comes or goes. One watcher for a run.

        Raises:
            LocalError: the run has a watcher.
        """
        with self._lock:
            if run_id in self._watchers:
                raise LocalError(f"Run {run_id} is already being driven.")
            self._watchers[run_id] = changed

    def close(self, run_id: int) -> None:
        """The run is over: nobody watches, and its requests are forgotten."""
        with self._lock:
            self._watchers.pop(run_id, None)
            self._asked = {key: asked for key, asked in self._asked.items() if asked.request.run_id != run_id}

    def post(self, site: str, request: pb.Request) -> None:
        """Ask `site`, now if it is connected and when it comes back otherwise."""
        with self._lock:
            self._drop_expired()
            self._asked[request.id] = _Asked(site, request)
            if site in self._streams:
                stream, _ = self._streams[site]
                stream.deliver(request)

    def connect(self, site: str, stream: Stream) -> None:
        """`site` is here: its stream gets every unanswered request, oldest first, and all later ones."""
        with self._lock:
            self._drop_expired()
            self._streams[site] = (stream, self._clock.now())
            for asked in self._asked.values():
                if asked.site == site and asked.reply is None:
                    stream.deliver(asked.request)
            self._tell(self._watchers)

    def disconnect(self, site: str, stream: Stream) -> None:
        """That stream is gone; a newer one of the same site stays."""
        with self._lock:
            if site in self._streams and self._streams[site][0] is stream:
                del self._streams[site]
                self._tell(self._watchers)

    def connected(self) -> dict[str, float]:
        """Sites with a stream, and since when (Unix seconds)."""
        with self._lock:
            return {site: since for site, (_, since) in self._streams.items()}

    def answer(self, site: str, reply: pb.Reply) -> bool:
        """Take a reply in; False when nothing like it is awaited from this site."""
        with self._lock:
            asked = self._asked.get(reply.id)
            if asked is None or asked.site != site or asked.reply is not None:
                return False
            asked.reply = reply
            self._tell([asked.request.run_id])
            return True

    def take(self, ids: Iterable[str]) -> list[pb.Reply]:
        """The replies that are here, in the order of `ids`; each is given once."""
        with self._lock:
            answered = {key: asked.reply for key in ids if (asked := self._asked.get(key)) and asked.reply is not None}
            for key in answered:
                del self._asked[key]
            return list(answered.values())

    def forget(self, ids: Iterable[str]) -> None:
        """Nobody waits for these any more."""
        with self._lock:
            for key in ids:
                self._asked.pop(key, None)

    def _tell(self, run_ids: Iterable[int]) -> None:
        for run_id in run_ids:
            if run_id in self._watchers:
                self._watchers[run_id]()

    def _drop_expired(self) -> None:
        now = self._clock.now()
        for key, asked in list(self._asked.items()):
            if asked.reply is None and asked.request.created_at + asked.request.ttl <= now:
                del self._asked[key]


class RunFiles:
    """The objects of one run: who may download what, and each site's uploads in a folder of its own.

    A site's uploads are apart from every other file, so that announcing a digest tells nothing about what others
    hold, and deleting a run's uploads cannot take anything else along.
    """

    def __init__(self, folder: Path, max_upload_bytes: int) -> None:
        self._folder = folder
        self._max_upload_bytes = max_upload_bytes
        self._lock = threading.Lock()
        self._readers: dict[ObjectRef, frozenset[str]] = {}
        self._uploads: dict[str, ObjectStore] = {}

    def allow(self, ref: ObjectRef, sites: Collection[str]) -> None:
        with self._lock:
            self._readers[ref] = self._readers.get(ref, frozenset()) | frozenset(sites)

    def may_download(self, site: str, ref: ObjectRef) -> bool:
        with self._lock:
            return site in self._readers.get(ref, ())

    def expect(self, site: str) -> None:
        """The run has asked this site something: from now on it may upload."""
        with self._lock:
            if site not in self._uploads:
                self._uploads[site] = ObjectStore(self._folder / site)

    def expects(self, site: str) -> bool:
        with self._lock:
            return site in self._uploads

    def received(self, site: str, ref: ObjectRef) -> tuple[int, bool]:
        """How many bytes of the site's upload are here, and whether it is whole and checked.

        Raises:
            RemoteError: BAD_MESSAGE when the site would hold more than the run's cap.
        """
        with self._lock:
            store = self._store_with_room(site, ref)
            return store.received(ref), store.has(ref)

    def receive(self, site: str, ref: ObjectRef) -> Partial:
        """Take in an upload.

        Raises:
            RemoteError: BAD_MESSAGE when the site would hold more than the run's cap.
            LocalError: the same object is arriving already.
        """
        with self._lock:
            return self._store_with_room(site, ref).receive(ref)

    def upload(self, site: str, ref: ObjectRef) -> Path:
        """Where the object is that `site` uploaded.

        Raises:
            RemoteError: BAD_MESSAGE when the site named an object that it has not uploaded.
        """
        with self._lock:
            store = self._uploads.get(site)
        if store is None or not store.has(ref):
            raise RemoteError(Reason.BAD_MESSAGE, f"{site} named an object that it has not uploaded.", [site])
        return store.path(ref)

    def discard(self, site: str, ref: ObjectRef) -> None:
        with self._lock:
            if site in self._uploads:
                self._uploads[site].delete(ref)

    def clear_uploads(self) -> None:
        """Delete every upload of the run, whole or not."""
        with self._lock:
            for site in self._uploads:
                shutil.rmtree(self._folder / site, ignore_errors=True)
                self._uploads[site] = ObjectStore(self._folder / site)

    def close(self) -> None:
        """Delete every upload of the run, and let nobody move anything any more."""
        with self._lock:
            self._readers.clear()
            self._uploads.clear()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _store_with_room(self, site: str, ref: ObjectRef) -> ObjectStore:
        store = self._uploads[site]
        if store.claimed_bytes(ref) > self._max_upload_bytes:
            raise RemoteError(
                Reason.BAD_MESSAGE, f"uploads are capped at {self._max_upload_bytes} bytes a site in this run."
            )
        if store.claimed_objects(ref) > MAX_UPLOADS:
            raise RemoteError(Reason.BAD_MESSAGE, f"uploads are capped at {MAX_UPLOADS} a site in this run.")
        return store
