"""What a stranger, or one site, can take of the coordinator: connections, calls, messages, files. Never all of it."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from queue import SimpleQueue
from typing import Any

import grpc
import pytest

from foedus_client.link.site_link import LinkState, enrol
from foedus_common.errors import RemoteError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CHUNK, PROTOCOL_VERSION, Timing, TlsIdentity
from foedus_common.objects import ObjectRef
from foedus_server.link import enrolment, listeners
from foedus_server.link import service as link_service
from foedus_server.link.enrolment import network_of
from foedus_server.link.mailbox import MAX_UPLOADS
from loopback import RUN, SECONDS, Federation

HELLO = pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))


class Silence:
    """A request that never comes, until `end`."""

    def __init__(self) -> None:
        self._over = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        self._over.wait(SECONDS)
        yield from ()

    def end(self) -> None:
        self._over.set()


@pytest.fixture
def silence() -> Iterator[Silence]:
    silence = Silence()
    yield silence
    silence.end()


def silent_call(channel: grpc.Channel, method: str, silence: Silence) -> Any:
    """A call of the method whose request does not come."""
    return channel.stream_unary(f"/foedus.link.v1.{method}").future(iter(silence), timeout=SECONDS)


def channel_of(federation: Federation, stack: ExitStack, address: str, tls: TlsIdentity | None = None) -> grpc.Channel:
    """A connection of its own."""
    authority = federation.authority.certificate
    credentials = (
        grpc.ssl_channel_credentials(tls.authority, tls.private_key, tls.certificate)
        if tls
        else grpc.ssl_channel_credentials(authority)
    )
    options = [("grpc.use_local_subchannel_pool", 1)]
    return stack.enter_context(closing(grpc.secure_channel(address, credentials, options)))


def first_to_end(calls: list[Any]) -> Any:
    """Whichever of the calls ends first, within SECONDS."""
    ended: SimpleQueue[Any] = SimpleQueue()
    for call in calls:
        call.add_done_callback(ended.put)
    return ended.get(timeout=SECONDS)


def code_of(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as refused:
        call.result(SECONDS)
    assert refused.value.details() != "Deadline Exceeded"  # the caller's own
    code: grpc.StatusCode = refused.value.code()
    return code


def with_option(options: list[tuple[str, int]], name: str, value: int) -> list[tuple[str, int]]:
    """The options with another value for one that is among them."""
    assert name in dict(options)
    return [(each, value if each == name else usual) for each, usual in options]


# --- Strangers ---


def test_requests_that_do_not_come_keep_nobody_from_enrolling(
    federation: Federation, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "CALLS_OF_ONE", 1000)  # they would come from many addresses
    federation.coordinator()
    with ExitStack() as stack:
        for _ in range(10):
            channel = channel_of(federation, stack, federation.enrol_address)
            for _ in range(4):
                silent_call(channel, "Enrolment/Enrol", silence)
            grpc.channel_ready_future(channel).result(SECONDS)
        assert enrol(federation.enrol_address, federation.authority.certificate, b"me") == b"me"


def test_a_request_that_does_not_come_is_not_waited_for(
    federation: Federation, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "READ_SECONDS", 0.1)
    federation.coordinator()
    with ExitStack() as stack:
        channel = channel_of(federation, stack, federation.enrol_address)
        assert code_of(silent_call(channel, "Enrolment/Enrol", silence)) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_one_address_has_few_calls_open(
    federation: Federation, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment, "CALLS_OF_ONE", 2)
    monkeypatch.setattr(enrolment, "READ_SECONDS", 2 * SECONDS)
    federation.coordinator()
    with ExitStack() as stack:
        channel = channel_of(federation, stack, federation.enrol_address)
        calls = [silent_call(channel, "Enrolment/Enrol", silence) for _ in range(3)]
        assert code_of(first_to_end(calls)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        silence.end()
        codes = [code_of(call) for call in calls]
    assert sorted(code.name for code in codes) == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"]
    assert enrol(federation.enrol_address, federation.authority.certificate, b"me") == b"me"  # they are over


@pytest.mark.parametrize(
    ("peer", "network"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:4711", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:4711", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:4711", "fe80::/64"),
        ("unix:/tmp/socket", "unix"),
    ],
)
def test_addresses_that_are_one_customer_s_count_as_one(peer: str, network: str) -> None:
    assert network_of(peer) == network


def test_a_connection_that_says_nothing_is_hung_up_on(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = with_option(listeners.ENROLMENT_OPTIONS, "grpc.max_connection_idle_ms", 300)
    monkeypatch.setattr(listeners, "ENROLMENT_OPTIONS", impatient)
    federation.coordinator()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    trusting.set_alpn_protocols(["h2"])
    host, _, port = federation.enrol_address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=SECONDS) as plain, trusting.wrap_socket(plain) as wire:
        wire.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        while wire.recv(65536):
            pass


def test_connections_are_counted_and_one_more_is_hung_up_on(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = with_option(listeners.SERVER_OPTIONS, "grpc.server_handshake_timeout_ms", 4 * int(SECONDS * 1000))
    monkeypatch.setattr(listeners, "SERVER_OPTIONS", patient)
    monkeypatch.setattr(listeners, "MAX_CONNECTIONS", 4)
    federation.coordinator()
    host, _, port = federation.address.rpartition(":")
    strangers = [socket.create_connection((host, int(port)), timeout=SECONDS) for _ in range(5)]
    assert strangers[-1].recv(1) == b""  # the others are waited for
    for stranger in strangers:
        stranger.close()
    _, states = federation.site("alpha")
    states.wait_for(LinkState.CONNECTED)


def test_headers_and_messages_that_unfold_are_refused(federation: Federation) -> None:
    federation.enrol = lambda body: pytest.fail("it was handed on")
    federation.coordinator()
    with ExitStack() as stack:
        channel = channel_of(federation, stack, federation.enrol_address)
        call = channel.unary_unary("/foedus.link.v1.Enrolment/Enrol")
        headers = [("x-long", "a" * 8000) for _ in range(8)]
        assert code_of(call.future(b"", metadata=headers)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        bomb = pb.EnrolRequest(body=bytes(4 << 20)).SerializeToString()
        assert len(gzip.compress(bomb)) < 16 * 1024
        unfolding = call.future(bomb, compression=grpc.Compression.Gzip)
        assert code_of(unfolding) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_as_many_files_are_allowed_as_connections_need() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        assert listeners._at_most(4096)[1] == 256  # of the 1,024 some are for the runs
        listeners.allow_many_files()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert allowed == min(2 * (listeners.MAX_CONNECTIONS + listeners.MAX_STRANGERS), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- Sites ---


@pytest.mark.parametrize("method", ["Stat", "Pull"])
def test_who_is_not_admitted_is_told_so_before_anything_of_his_is_read(
    federation: Federation, silence: Silence, method: str
) -> None:
    federation.coordinator()
    with ExitStack() as stack:
        channel = channel_of(federation, stack, federation.address, federation.tls_of("alpha", approved=False))
        assert code_of(silent_call(channel, f"Link/{method}", silence)) is grpc.StatusCode.PERMISSION_DENIED


def test_an_upload_in_which_nothing_moves_is_not_waited_for(federation: Federation, silence: Silence) -> None:
    federation.timing = Timing(progress=0.1)
    federation.coordinator()
    with ExitStack() as stack:
        channel = channel_of(federation, stack, federation.address, federation.tls_of("alpha"))
        assert code_of(silent_call(channel, "Link/Push", silence)) is grpc.StatusCode.DEADLINE_EXCEEDED


def test_one_site_has_so_many_calls_open_over_all_its_connections(
    federation: Federation, silence: Silence, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_service, "CALLS_OF_ONE_SITE", 4)
    federation.timing = Timing(progress=2 * SECONDS)
    federation.coordinator()
    tls, others = federation.tls_of("alpha"), federation.tls_of("beta")
    with ExitStack() as stack:
        calls = [
            silent_call(channel_of(federation, stack, federation.address, tls), "Link/Push", silence) for _ in range(5)
        ]
        other = silent_call(channel_of(federation, stack, federation.address, others), "Link/Push", silence)
        assert code_of(first_to_end(calls)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        silence.end()
        codes = [code_of(call).name for call in calls]
        assert sorted(codes) == ["ABORTED"] * 4 + ["RESOURCE_EXHAUSTED"]
        assert code_of(other) is grpc.StatusCode.ABORTED  # for it ended early, as those four did


@pytest.mark.parametrize("said", [pb.FromSite(heartbeat=pb.Heartbeat()), pb.FromSite(reply=pb.Reply(id="?"))])
def test_a_site_that_says_much_that_nobody_awaits_loses_its_stream(federation: Federation, said: pb.FromSite) -> None:
    federation.coordinator()
    stub = federation.stub(federation.tls_of("alpha"))
    with pytest.raises(grpc.RpcError, match="nobody asked for"):
        list(stub.Control(iter([HELLO, *[said] * 1000]), timeout=SECONDS))


def test_a_site_s_uploads_are_counted_however_small(federation: Federation) -> None:
    grid = federation.coordinator().grid(RUN, 100 * CHUNK)
    grid.push_messages([grid.message("alpha", "query.keys", b"", ttl=30)])
    refs = [ObjectRef(hashlib.sha256(bytes([number])).hexdigest(), 1) for number in range(MAX_UPLOADS + 1)]
    for ref in refs[:-1]:
        with grid.files.receive("alpha", ref):
            pass
    with pytest.raises(RemoteError, match=f"capped at {MAX_UPLOADS} a site"):
        grid.files.receive("alpha", refs[-1])
    grid.discard("alpha", refs[0])
    with grid.files.receive("alpha", refs[-1]):
        pass


def test_a_coordinator_that_asks_and_does_not_read_loses_its_stream(federation: Federation) -> None:
    link, _ = federation.site("alpha", start=False, tls=federation.tls_of("alpha"))
    link._at_work = set()
    link._replies["1"] = pb.Reply(id="1")
    for _ in range(256):
        link._take(pb.Request(id="1"))
    with pytest.raises(asyncio.QueueFull):
        link._take(pb.Request(id="1"))
