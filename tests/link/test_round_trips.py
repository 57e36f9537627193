"""Flower messages over real mTLS on loopback: a ServerApp on one side, ClientApps on the other."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from foedus_client.link.site_link import LinkState
from foedus_common.errors import LocalError
from foedus_common.link.contents import body_of, content_of, context_of
from foedus_common.link.transport import MAX_BODY, node_id
from foedus_server.link.grid import SITE_FAILED, LinkStopping, SiteGrid
from loopback import RUN, SECONDS, Federation, body, reply_with


def connected(federation: Federation, *sites: str, app: ClientApp | None = None) -> None:
    for name in sites:
        _, states = federation.site(name, app)
        states.wait_for(LinkState.CONNECTED)


def ask(grid: SiteGrid, site: str, text: bytes, message_type: str = "query.keys") -> Message:
    [reply] = grid.send_and_receive([grid.message(site, message_type, text, ttl=SECONDS)], timeout=SECONDS)
    return reply


def test_a_server_app_drives_four_stages_with_three_client_apps(federation: Federation) -> None:
    names = ["alpha", "beta", "gamma"]
    server = federation.coordinator()
    app = ClientApp()
    for stage in ("keys", "shares", "mask", "unmask"):

        @app.query(stage)
        def answer(message: Message, context: Context, stage: str = stage) -> Message:
            assert context.run_id == RUN
            return reply_with(body(message) + f" {stage} {message.metadata.dst_node_id}".encode(), message)

    connected(federation, *names, app=app)
    engine, said = ServerApp(), {}

    @engine.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, SiteGrid)
        assert sorted(grid.get_node_ids()) == sorted(node_id(name) for name in names)
        for stage in ("keys", "shares", "mask", "unmask"):
            questions = [grid.message(name, f"query.{stage}", b"go", ttl=SECONDS, group_id="5") for name in names]
            for reply in grid.send_and_receive(questions, timeout=SECONDS):
                assert reply.metadata.group_id == "5"
                said[stage, grid.site(reply.metadata.src_node_id)] = body_of(reply)

    engine(grid=server.grid(RUN, 0), context=context_of(RUN))
    assert said == {
        (stage, name): f"go {stage} {node_id(name)}".encode()
        for stage in ("keys", "shares", "mask", "unmask")
        for name in names
    }


def test_the_largest_body_travels_and_a_larger_one_is_refused_before_it_leaves(federation: Federation) -> None:
    grid = federation.coordinator().grid(RUN, 0)
    app = ClientApp()

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        return reply_with(body(message), message)

    @app.query("mask")
    def mask(message: Message, context: Context) -> Message:
        return reply_with(body(message) + b"!", message)

    connected(federation, "alpha", app=app)
    largest = bytes(MAX_BODY)
    assert body_of(ask(grid, "alpha", largest)) == largest
    with pytest.raises(LocalError, match="send a reference"):
        ask(grid, "alpha", largest + b"!")
    assert ask(grid, "alpha", largest, "query.mask").has_error()


def test_a_program_that_fails_at_the_site_says_so_without_its_text(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    app = ClientApp()

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        raise ValueError(body(message).decode())

    @app.query("mask")
    def mask(message: Message, context: Context) -> Message:
        raise LocalError("The model folder is missing.")

    grid = federation.coordinator().grid(RUN, 0)
    connected(federation, "alpha", app=app)
    for message_type in ("query.keys", "query.mask", "query.unheard"):
        reply = ask(grid, "alpha", b"row 3: Jane Roe", message_type)
        assert reply.error.code == SITE_FAILED
        assert reply.error.reason == "The site's program failed; the log of the site says why."
    assert "ValueError" in caplog.text
    assert "The model folder is missing." in caplog.text
    assert "Jane" not in caplog.text


def test_one_run_is_served_in_order_and_others_meanwhile(federation: Federation) -> None:
    approved = threading.Event()
    seen = []
    app = ClientApp()

    @app.query("propose")
    def propose(message: Message, context: Context) -> Message:
        assert approved.wait(SECONDS)
        seen.append("approved")
        return reply_with(b"yes", message)

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        seen.append(f"keys of {message.metadata.run_id}")
        return reply_with(b"", message)

    server = federation.coordinator()
    slow, quick = server.grid(1, 0), server.grid(2, 0)
    connected(federation, "alpha", app=app)
    waiting = slow.push_messages(
        [slow.message("alpha", "query.propose", b"", ttl=30), slow.message("alpha", "query.keys", b"", ttl=30)]
    )
    ask(quick, "alpha", b"")
    assert seen == ["keys of 2"]
    assert slow.pull_messages(waiting) == []
    approved.set()
    while len(seen) < 3:
        slow.wait(1.0)
    assert seen == ["keys of 2", "approved", "keys of 1"]


def test_a_request_that_nobody_waits_for_any_more_is_not_sent(federation: Federation) -> None:
    app, asked = ClientApp(), []

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        asked.append(body(message))
        return reply_with(b"", message)

    grid = federation.coordinator().grid(RUN, 0)
    question = grid.message("alpha", "query.keys", b"too late", ttl=30)
    assert grid.send_and_receive([question], timeout=0.01) == []
    connected(federation, "alpha", app=app)
    ask(grid, "alpha", b"in time")
    assert asked == [b"in time"]
    assert grid.pull_messages(["unknown"]) == []


def test_the_grid_refuses_what_it_cannot_send(federation: Federation) -> None:
    server = federation.coordinator()
    grid = server.grid(RUN, 0)
    with pytest.raises(LocalError, match="knows no site"):
        grid.push_messages([grid.create_message(content_of(b""), "query.keys", 12345, "1")])
    with pytest.raises(LocalError, match="already being driven"):
        server.grid(RUN, 0)
    grid.close()
    server.grid(RUN, 0).close()


def test_a_stop_wakes_the_run_and_is_quick(federation: Federation) -> None:
    server = federation.coordinator()
    grid = server.grid(RUN, 0)
    connected(federation, "alpha")
    grid.get_node_ids()
    woken = []

    def drive() -> None:
        try:
            while True:
                grid.wait(2 * SECONDS)
        except LinkStopping as stopping:
            woken.append(str(stopping))

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    stopping = threading.Thread(target=server.drain_and_stop, args=(2 * SECONDS,), daemon=True)
    stopping.start()
    # A drain that waited for the live stream would take the whole grace.
    stopping.join(SECONDS)
    assert not stopping.is_alive()
    thread.join(SECONDS)
    assert woken == ["The coordinator is stopping; the run goes on after the next start."]
    with pytest.raises(LinkStopping):
        grid.push_messages([grid.message("alpha", "query.keys", b"", ttl=1)])
    with pytest.raises(LinkStopping):
        server.grid(RUN + 1, 0)
    server.drain_and_stop(1.0)


def test_a_port_in_use_is_one_sentence(federation: Federation) -> None:
    federation.coordinator()
    with pytest.raises(LocalError, match=r"^Cannot listen on 127\.0\.0\.1:\d+: the port is in use"):
        federation.coordinator()


@pytest.mark.parametrize("module", ["foedus_server.link.grid", "foedus_client.link.site_link"])
def test_flower_is_silenced_before_it_is_imported(module: str) -> None:
    code = f"import {module}, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FLWR")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
