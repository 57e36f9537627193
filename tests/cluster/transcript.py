"""A run in which every byte that two sites send is kept: real daemons and trainers, a real coordinator, the real link.

The recording point is the client's channel, where gRPC turns messages into bytes: what goes into HTTP/2 and TLS. There
is nothing of ours around these bytes: the site sends no metadata; the method's path and gRPC's own headers are fixed.
The two sites differ in one thing, how many rows they have. A third one, with made-up updates, completes the cohort.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc.aio
import numpy as np
from google.protobuf.message import Message as Frame
from numpy.typing import NDArray

from foedus_client import daemon as daemon_module
from foedus_client.config import SiteHome, SiteSettings
from foedus_client.daemon import Daemon
from foedus_client.link.site_link import SiteLink
from foedus_client.policy import SitePolicy
from foedus_client.store import SiteStore
from foedus_client.training.process import TrainerProcess
from foedus_common.link import foedus_pb2 as pb
from foedus_common.plan import AgreedPlan, RoundPlan
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_server.commands import Operator as Acting
from foedus_server.config import Link, Settings
from foedus_server.service import Service
from foedus_simulations.parties import free_ports, until
from known_sites import KnownDaemon, join_site
from operators import Operator
from plans import plan_toml
from processes import CLOCK
from tiny_model import LABELS, write_tiny_model

SMALL, LARGE, THIRD = "north", "south", "third"
ROWS = {SMALL: 100, LARGE: 200}
REQUESTS: dict[str, type[Frame]] = {
    "Control": pb.FromSite,
    "Stat": pb.Object,
    "Push": pb.PushPart,
    "Pull": pb.PullRequest,
}
"""What a site sends by each method of the link."""


@dataclass(frozen=True)
class Sent:
    """One message as serialised for the wire."""

    method: str
    data: bytes


class RecordingChannel:
    """A gRPC channel that keeps the bytes of all that is sent over it."""

    def __init__(self, channel: grpc.aio.Channel, sent: list[Sent]) -> None:
        self._channel = channel
        self._sent = sent

    def __getattr__(self, name: str) -> Any:
        made = getattr(self._channel, name)
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return made

        def callable_for(path: str, request_serializer: Callable[[Frame], bytes], **options: Any) -> Any:
            def serialise(message: Frame) -> bytes:
                data = request_serializer(message)
                self._sent.append(Sent(path.rpartition("/")[2], data))
                return data

            return made(path, request_serializer=serialise, **options)

        return callable_for

    async def __aenter__(self) -> RecordingChannel:
        await self._channel.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.__aexit__(kind, error, trace)


class ObservedTrainer(TrainerProcess):
    """The trainer as it is; what it reports and what limits its process has are kept."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.work: set[tuple[int, str, int]] = set()
        self.core_limit = (-1, -1)

    def train(
        self, adapter: Path, adapter_sha256: str, round_plan: RoundPlan, progress: Any = None
    ) -> NDArray[np.float64]:
        update = super().train(
            adapter,
            adapter_sha256,
            round_plan,
            lambda what, done, total: self.work.add((round_plan.index, what, total)),
        )
        assert self._child is not None
        self.core_limit = resource.prlimit(self._child.pid, resource.RLIMIT_CORE)
        return update


@dataclass
class Observed:
    """A site, all it sent, and its trainers."""

    sent: list[Sent] = field(default_factory=list)
    trainers: list[ObservedTrainer] = field(default_factory=list)
    daemon: Daemon | None = None


class Recording:
    """The run, at its end. `folder` holds everything that was written; rows are in `data/` and nowhere else."""

    def __init__(self, folder: Path, planted: Sequence[str]) -> None:
        self.folder = folder
        self.sites = {name: Observed() for name in ROWS}
        self.log = folder / "everything.log"
        port, enrolment = free_ports(2)
        settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment))
        self.operator = Operator(folder / "operator", CLOCK, settings)
        self._model = write_tiny_model(folder / "tiny")
        (folder / "data").mkdir()
        for number, name in enumerate((*ROWS, THIRD)):
            secrets = planted[number :: len(ROWS)] if name in ROWS else []
            self._join(name, ROWS.get(name, 20), secrets)
        self.run_id = self._conduct()

    def _join(self, name: str, count: int, secrets: Sequence[str]) -> None:
        """Every row holds some of the secrets, in the text that is trained on."""
        rows = [
            (" ".join([LABELS[i % 3].lower(), "of the eye", f"row{name}{i}", *secrets[i::count]]), LABELS[i % 3])
            for i in range(count)
        ]
        home = self.folder / name
        policy = SitePolicy(require_approval=False)
        SiteHome.create(home, SiteSettings(threads=1, policy=policy))
        join_site(self.operator, home, name, CLOCK, rows)
        (home / "rows.csv").rename(self.folder / "data" / f"{name}.csv")
        store = SiteStore(home / "site.db", CLOCK)
        store._db.execute("UPDATE datasets SET path = ?", (str(self.folder / "data" / f"{name}.csv"),))
        store.close()

    def _conduct(self) -> int:
        acting = Acting(self.operator.home, CLOCK, os.urandom)
        digest = acting.add_model(self._model).manifest_sha256
        for name in (*ROWS, THIRD):
            store = SiteStore(self.folder / name / "site.db", CLOCK)
            store.add_model("small", digest, self._model)
            store.close()
        plan = self.folder / "plan.toml"
        changes = {"phase__0__rounds": 1, "phase__1__rounds": 1, "phase__1__sampling_rate": 0.5}
        plan.write_text(
            plan_toml(model__sha256=digest, task__labels=LABELS, adapter__rank=2, privacy__divisor=60, **changes)
        )
        run = acting.submit(plan)
        service, stopping = Service(self.operator.home, CLOCK, os.urandom), threading.Event()
        service.start()
        serving = threading.Thread(target=service.serve, args=(stopping,))
        serving.start()
        daemons = [self._daemon(name) for name in (*ROWS, THIRD)]
        for each in daemons:
            each.start()
        try:
            until(lambda: acting.store.runs.run(run.run_id).state in ("finished", "failed"), 240, "the run's end")
            assert acting.store.runs.run(run.run_id).state == "finished", self.log.read_text()[-3000:]
            until(lambda: not service._threads[run.run_id].is_alive(), 60, "the sites' being told")
        finally:
            for each in daemons:
                each.stop()
            stopping.set()
            service.stop()
            serving.join()
            acting.store.close()
        return run.run_id

    def _daemon(self, name: str) -> Daemon:
        home = SiteHome.open(self.folder / name)
        state = self.folder / "state"
        if name == THIRD:
            return KnownDaemon(home, state, CLOCK, os.urandom)
        observed = self.sites[name]
        log = (self.folder / f"{name}-trainer.log").open("wb")

        class RecordedLink(SiteLink):
            def _channel(self) -> Any:
                return RecordingChannel(super()._channel(), observed.sent)

        class ObservedDaemon(Daemon):
            def _open_trainer(self, agreed: AgreedPlan) -> ObservedTrainer:
                trainer = super()._open_trainer(agreed)
                made = ObservedTrainer(trainer._settings, agreed, log)
                observed.trainers.append(made)
                return made

        original, daemon_module.SiteLink = daemon_module.SiteLink, RecordedLink  # type: ignore[misc]
        try:
            observed.daemon = ObservedDaemon(home, state, CLOCK, os.urandom)
        finally:
            daemon_module.SiteLink = original  # type: ignore[misc]
        return observed.daemon

    def close(self) -> None:
        self.operator.close()


def log_everything(path: Path) -> logging.Handler:
    """Every line that any library logs, at any level."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s %(args)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.DEBUG)
    return handler


# --- Every byte by the schema ---


def account(sent: Sent) -> Iterator[tuple[str, Any]]:
    """(name, value) of every field of one message, in order; raises AssertionError unless these make up all of it."""
    message = REQUESTS[sent.method].FromString(sent.data)
    message.DiscardUnknownFields()  # type: ignore[attr-defined]
    assert message.SerializeToString() == sent.data, "bytes beside the schema"
    for name, value in _frame(message, sent.method):
        if name == "Control.reply.body":
            yield from _envelope(name, value)
        else:
            yield name, value


def _frame(message: Frame, name: str) -> Iterator[tuple[str, Any]]:
    set_fields = message.ListFields()
    if not set_fields:
        yield name, None
    for descriptor, value in set_fields:
        if isinstance(value, Frame):
            yield from _frame(value, f"{name}.{descriptor.name}")
        else:
            yield f"{name}.{descriptor.name}", value


def _envelope(name: str, data: bytes) -> Iterator[tuple[str, Any]]:
    envelope = wire.parse_envelope(data)
    again = wire.build_envelope(envelope.header, envelope.message, lambda _: envelope.signature)
    assert again == data, "bytes beside the schema"
    for each in fields(envelope.header):
        yield f"envelope.{each.name}", getattr(envelope.header, each.name)
    yield "envelope.signature", envelope
    yield from _message(type(envelope.message).__name__, envelope.message)


def _message(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, m.VectorRef):
        yield f"{name}.digest", value.digest
        yield f"{name}.size", value.size
    elif is_dataclass(value):
        if not fields(value):
            yield name, None
        for each in fields(value):
            yield from _message(f"{name}.{each.name}", getattr(value, each.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _message(f"{name}[]", item)
    else:
        yield name, value
