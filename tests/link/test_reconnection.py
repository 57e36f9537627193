"""Cuts, restarts and silence: what is asked again, what is not, and how soon an absence is noticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from foedus_client.link.site_link import LinkState
from foedus_common.allowance import Allowance
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.contents import body_of
from foedus_common.link.transport import PROTOCOL_VERSION, Timing
from foedus_server.link import service
from foedus_server.link.grid import SiteGrid
from loopback import RUN, SECONDS, Federation, body, reply_with


class Slow:
    """An app whose `query.keys` waits until it is let go, and counts how often it was called."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = threading.Event()
        self.let_go = threading.Event()
        self.app = ClientApp()

        @self.app.query("keys")
        def keys(message: Message, context: Context) -> Message:
            self.calls += 1
            self.called.set()
            assert self.let_go.wait(SECONDS)
            return reply_with(body(message) + b"!", message)


def pull(grid: SiteGrid, ids: list[str]) -> list[bytes]:
    """All replies, in order of arrival."""
    replies: list[Message] = []
    while len(replies) < len(ids):
        replies += grid.pull_messages(ids)
        grid.wait(0.05 if len(replies) < len(ids) else 0.0)
    return [body_of(reply) for reply in replies]


def test_a_site_finds_a_restarted_coordinator_and_is_asked_by_it(federation: Federation) -> None:
    first = federation.coordinator()
    _, states = federation.site("alpha")
    states.wait_for(LinkState.CONNECTED)
    first.drain_and_stop(1.0)
    assert "is stopping" in states.wait_for(LinkState.AWAY)
    second = federation.coordinator()
    grid = second.grid(RUN, 0)
    ids = grid.push_messages([grid.message("alpha", "query.keys", b"again", ttl=30)])
    assert pull(grid, ids)[0].startswith(b"again")
    assert states.wait_for(LinkState.CONNECTED)


def test_a_request_at_work_during_a_cut_is_handled_once_and_answered_on_the_new_stream(
    federation: Federation,
) -> None:
    server, slow = federation.coordinator(), Slow()
    _, states = federation.site("alpha", slow.app)
    states.wait_for(LinkState.CONNECTED)
    grid = server.grid(RUN, 0)
    ids = grid.push_messages([grid.message("alpha", "query.keys", b"once", ttl=30)])
    assert slow.called.wait(SECONDS)
    server.disconnect("alpha")
    states.wait_for(LinkState.REFUSED)
    states.wait_for(LinkState.CONNECTED)
    slow.let_go.set()
    assert pull(grid, ids) == [b"once!"]
    assert slow.calls == 1


def test_an_answer_that_was_lost_with_its_stream_is_given_again_without_the_app(federation: Federation) -> None:
    server, slow = federation.coordinator(), Slow()
    _, states = federation.site("alpha", slow.app)
    states.wait_for(LinkState.CONNECTED)
    grid = server.grid(RUN, 0)
    slow.let_go.set()
    question = grid.message("alpha", "query.keys", b"once", ttl=30)
    ids = grid.push_messages([question])
    assert pull(grid, ids) == [b"once!"]
    # As after a reply that the coordinator never saw: the same request goes out on the next stream.
    server.mailbox.post("alpha", pb.Request(id=ids[0], run_id=RUN, created_at=question.metadata.created_at, ttl=30))
    while not server.mailbox.take(ids):
        grid.wait(0.05)
    assert slow.calls == 1


def test_a_site_that_restarts_handles_its_open_request_again(federation: Federation) -> None:
    server, stuck, fresh = federation.coordinator(), Slow(), Slow()
    tls = federation.tls_of("alpha")
    link, states = federation.site("alpha", stuck.app, tls=tls)
    states.wait_for(LinkState.CONNECTED)
    grid = server.grid(RUN, 0)
    ids = grid.push_messages([grid.message("alpha", "query.keys", b"twice", ttl=30)])
    assert stuck.called.wait(SECONDS)
    link.stop()
    states.wait_for(LinkState.STOPPED)
    stuck.let_go.set()
    fresh.let_go.set()
    federation.site("alpha", fresh.app, tls=tls)
    assert pull(grid, ids) == [b"twice!"]
    assert (stuck.calls, fresh.calls) == (1, 1)


def test_the_newer_of_two_streams_of_a_site_stays(federation: Federation) -> None:
    server = federation.coordinator()
    tls = federation.tls_of("alpha")
    hello = pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))
    ended = threading.Event()

    def parts() -> Iterator[pb.FromSite]:
        yield hello
        ended.wait(SECONDS)

    old = federation.stub(tls).Control(parts())
    assert next(old).WhichOneof("part") == "hello"
    new = federation.stub(tls).Control(parts())
    assert next(new).WhichOneof("part") == "hello"
    with pytest.raises(grpc.RpcError, match="newer connection"):
        list(old)
    assert list(server.connected()) == ["alpha"]
    ended.set()


def test_a_site_that_falls_silent_is_noticed(federation: Federation) -> None:
    federation.timing = Timing(heartbeat=0.05, silence=0.2)
    server = federation.coordinator()
    grid = server.grid(RUN, 0)
    silent = threading.Event()

    def parts() -> Iterator[pb.FromSite]:
        yield pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))
        silent.wait(SECONDS)

    stream = federation.stub(federation.tls_of("alpha")).Control(parts())
    next(stream)
    with pytest.raises(grpc.RpcError, match="fell silent"):
        list(stream)
    while server.connected():
        grid.wait(1.0)
    silent.set()


def test_both_ends_speak_while_nobody_has_anything_to_say(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or they would give each other up: see the two tests before and after this one."""
    heard, over = threading.Semaphore(0), threading.Event()

    class Hearing(Allowance):
        def take(self) -> bool:
            heard.release()
            return super().take()

    def parts() -> Iterator[pb.FromSite]:
        yield pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))
        over.wait(SECONDS)

    monkeypatch.setattr(service, "Allowance", Hearing)  # what a site may say that nobody asked for
    federation.timing = Timing(heartbeat=0.05, silence=SECONDS)
    federation.coordinator()
    stream = federation.stub(federation.tls_of("alpha")).Control(parts())
    assert [next(stream).WhichOneof("part") for _ in range(5)] == ["hello", *["heartbeat"] * 4]
    over.set()
    federation.site("beta")
    assert all(heard.acquire(timeout=SECONDS) for _ in range(3))


def test_a_coordinator_that_falls_silent_is_noticed(federation: Federation) -> None:
    federation.timing = Timing(heartbeat=30.0, silence=30.0)
    federation.coordinator()
    _, states = federation.site("alpha", timing=Timing(heartbeat=0.05, silence=1.0))
    states.wait_for(LinkState.CONNECTED)
    assert "fell silent" in states.wait_for(LinkState.AWAY)


def test_the_times_keep_the_promise_of_fifteen_seconds() -> None:
    assert Timing().heartbeat * 3 < Timing().silence < 15


def test_another_version_is_refused_with_a_sentence(federation: Federation) -> None:
    federation.coordinator()
    stub = federation.stub(federation.tls_of("alpha"))
    with pytest.raises(grpc.RpcError, match="install the same release on both"):
        list(stub.Control(iter([pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION + 1))])))
    with pytest.raises(grpc.RpcError, match="begins with a hello"):
        list(stub.Control(iter([pb.FromSite(heartbeat=pb.Heartbeat())])))
