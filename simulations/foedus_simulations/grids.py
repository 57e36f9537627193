"""A Flower Grid without a network: the same ServerApp and the same ClientApps in one process, one message at a time.

What the link would carry is handed over directly; everything before and after it is the code of production. Messages
are answered when they are pushed, in order, so a simulation with seeded randomness repeats exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from foedus_common.errors import FoedusError, Reason, RemoteError
from foedus_common.link.contents import content_of, context_of, message_of
from foedus_common.link.transport import COORDINATOR_NODE, node_id
from foedus_common.objects import ObjectRef, ObjectStore

SITE_FAILED = 1


class InProcessGrid(Grid):
    """Sites that were connected stay connected. `objects` is the coordinator's store."""

    def __init__(self, run_id: int, objects: ObjectStore) -> None:
        self._run_id = run_id
        self._objects = objects
        self._apps: dict[str, ClientApp] = {}
        self._stores: dict[str, ObjectStore] = {}
        self._names: dict[int, str] = {}
        self._numbers = itertools.count()
        self._replies: dict[str, Message] = {}
        self._allowed: dict[ObjectRef, set[str]] = {}
        self._pushed: set[tuple[str, ObjectRef]] = set()
        self._run: Any = None

    # Flower's contract

    def set_run(self, run: Any) -> None:
        self._run = run

    @property
    def run(self) -> Any:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Deprecated in Flower and never called by us; see `message`."""
        return self._message(content, message_type, dst_node_id)

    def get_node_ids(self) -> list[int]:
        return list(self._names)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Each message is answered before the next one is looked at."""
        ids = []
        for message in messages:
            request = self._message(
                message.content, message.metadata.message_type, message.metadata.dst_node_id, str(next(self._numbers))
            )
            ids.append(request.metadata.message_id)
            self._replies[ids[-1]] = self._answer(request)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(each) for each in list(message_ids) if each in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    # Beyond it, as `foedus_server.link.grid.SiteGrid`

    def message(self, site: str, message_type: str, body: bytes, *, ttl: float) -> Message:
        return self._message(content_of(body), message_type, node_id(site))

    def site(self, node: int) -> str:
        return self._names[node]

    def forget(self, message_ids: Iterable[str]) -> None:
        for each in message_ids:
            self._replies.pop(each, None)

    def wait(self, timeout: float) -> None:
        """Nothing is ever under way here."""

    def allow(self, ref: ObjectRef, sites: Collection[str]) -> None:
        self._allowed.setdefault(ref, set()).update(sites)

    def upload(self, site: str, ref: ObjectRef) -> Path:
        if (site, ref) not in self._pushed:
            raise RemoteError(Reason.BAD_MESSAGE, f"{site} named an object that it has not uploaded.", [site])
        return self._stores[site].path(ref)

    def discard(self, site: str, ref: ObjectRef) -> None:
        self._pushed.discard((site, ref))

    def clear_uploads(self) -> None:
        self._pushed.clear()

    # The sites' side of it

    def connect(self, site: str, app: ClientApp, objects: ObjectStore) -> None:
        """From now on `app` answers for the site; `objects` is its own store."""
        self._apps[site], self._stores[site], self._names[node_id(site)] = app, objects, site

    def courier(self, site: str) -> Courier:
        return Courier(self, site)

    def fetch(self, site: str, ref: ObjectRef) -> Path:
        if site not in self._allowed.get(ref, ()):
            raise RemoteError(Reason.BAD_MESSAGE, "the coordinator offers no such object to this site.")
        return self._objects.path(ref)

    def push(self, site: str, ref: ObjectRef) -> None:
        self._pushed.add((site, ref))

    def _answer(self, request: Message) -> Message:
        site = self._names[request.metadata.dst_node_id]
        try:
            return self._apps[site](request, context_of(self._run_id, request.metadata.dst_node_id))
        except FoedusError as error:
            return Message(Error(SITE_FAILED, str(error)), reply_to=request)

    def _message(self, content: RecordDict, message_type: str, node: int, message_id: str = "") -> Message:
        metadata = Metadata(
            run_id=self._run_id,
            message_id=message_id,
            src_node_id=COORDINATOR_NODE,
            dst_node_id=node,
            reply_to_message_id="",
            group_id="",
            created_at=0.0,
            ttl=0.0,
            message_type=message_type,
        )
        return message_of(metadata, content)


class Courier:
    """One site's way to move objects (`foedus_client.round.Courier`)."""

    def __init__(self, grid: InProcessGrid, site: str) -> None:
        self._grid = grid
        self._site = site

    def fetch(self, run_id: int, ref: ObjectRef) -> Path:
        return self._grid.fetch(self._site, ref)

    def push(self, run_id: int, ref: ObjectRef) -> None:
        self._grid.push(self._site, ref)
