"""Every part of Flower's public API that the link and the round engine stand on: what `flwr==1.41.*` pins."""

from __future__ import annotations

import inspect
import os
from importlib.metadata import version

import flwr.serverapp
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from foedus_common.link.contents import body_of, content_of
from foedus_server.link.grid import SiteGrid

STAGES = [
    "query.propose",
    "train.invite",
    "query.keys",
    "query.shares",
    "query.mask",
    "query.survivors",
    "query.unmask",
    "query.outcome",
]


def metadata(message_type: str = "query.keys") -> Metadata:
    return Metadata(
        run_id=7,
        message_id="request",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="3",
        created_at=1_800_000_000.0,
        ttl=60.0,
        message_type=message_type,
    )


def context() -> Context:
    return Context(run_id=7, node_id=2, node_config={}, state=RecordDict(), run_config={})


def test_the_release_is_the_one_that_is_pinned() -> None:
    assert version("flwr").startswith("1.41.")


def test_flower_neither_phones_home_nor_looks_for_updates() -> None:
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_a_message_is_built_from_whole_metadata_and_bytes() -> None:
    message = Message(metadata=metadata(), content=content_of(b"\x00\xff"))  # type: ignore[call-overload]
    assert body_of(message) == b"\x00\xff"
    given = message.metadata
    assert (given.run_id, given.message_id, given.src_node_id, given.dst_node_id) == (7, "request", 1, 2)
    assert (given.group_id, given.ttl, given.created_at) == ("3", 60.0, 1_800_000_000.0)


def test_a_memoryview_is_no_body() -> None:
    with pytest.raises(TypeError):
        ConfigRecord({"body": memoryview(b"x")})  # type: ignore[dict-item]


def test_a_reply_turns_its_request_around() -> None:
    request = Message(metadata=metadata(), content=content_of(b"?"))  # type: ignore[call-overload]
    for reply in (Message(content_of(b"!"), reply_to=request), Message(Error(1, "why"), reply_to=request)):
        assert reply.metadata.reply_to_message_id == "request"
        assert (reply.metadata.src_node_id, reply.metadata.dst_node_id) == (2, 1)
        assert (reply.metadata.run_id, reply.metadata.group_id) == (7, "3")
        assert reply.metadata.message_type == "query.keys"
    assert reply.has_error()
    assert not reply.has_content()
    assert (reply.error.code, reply.error.reason) == (1, "why")


@pytest.mark.parametrize("message_type", STAGES)
def test_a_client_app_is_a_callable_that_finds_its_function_by_type(message_type: str) -> None:
    app = ClientApp()
    category, action = message_type.split(".")

    @{"query": app.query, "train": app.train}[category](action)
    def function(message: Message, context: Context) -> Message:
        return Message(content_of(body_of(message) + b"!"), reply_to=message)

    request = Message(metadata=metadata(message_type), content=content_of(b"?"))  # type: ignore[call-overload]
    assert body_of(app(request, context())) == b"?!"


def test_an_unknown_type_or_function_raises() -> None:
    with pytest.raises(ValueError, match="Invalid message type"):
        metadata("gossip.keys")
    request = Message(metadata=metadata(), content=content_of(b"?"))  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="No query function"):
        ClientApp()(request, context())


def test_a_server_app_is_a_callable_that_gets_our_grid() -> None:
    app, seen = ServerApp(), []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.append((grid, context))

    class NoGrid(SiteGrid):
        def __init__(self) -> None:
            pass

    grid, given = NoGrid(), context()
    app(grid=grid, context=given)
    assert seen == [(grid, given)]


def test_the_grid_asks_for_exactly_what_ours_gives() -> None:
    assert Grid.__abstractmethods__ == {
        "set_run",
        "run",
        "create_message",
        "get_node_ids",
        "push_messages",
        "pull_messages",
        "send_and_receive",
    }
    assert not SiteGrid.__abstractmethods__
    for name in Grid.__abstractmethods__ - {"run"}:
        theirs, ours = inspect.signature(getattr(Grid, name)), inspect.signature(getattr(SiteGrid, name))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_the_optimisers_of_the_server_are_where_we_take_them_from() -> None:
    assert {"FedAvg", "FedAvgM", "FedAdam", "FedYogi"} <= set(flwr.serverapp.strategy.__all__)
