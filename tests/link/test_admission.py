"""Who gets in: certificates at the door and at every step after it, and what each refusal says."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from foedus_client.link.site_link import LinkState, admission
from foedus_common.errors import LocalError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CHUNK, MAX_BODY, PROTOCOL_VERSION, Timing, TlsIdentity
from foedus_common.objects import ObjectRef
from foedus_server.link import service as link_service
from loopback import RUN, SECONDS, Authority, Federation, fingerprint

HELLO = pb.FromSite(hello=pb.Hello(protocol_version=PROTOCOL_VERSION))


def calls(federation: Federation, tls: TlsIdentity | None) -> list[grpc.RpcError]:
    """What each call of the service answers to this certificate."""
    stub = federation.stub(tls)
    wanted = pb.Object(run_id=RUN, sha256="0" * 64, size=1)
    attempts = [
        lambda: next(stub.Control(iter([HELLO]))),
        lambda: stub.Stat(wanted),
        lambda: stub.Push(iter([pb.PushPart(header=pb.PushHeader(object=wanted))])),
        lambda: list(stub.Pull(pb.PullRequest(object=wanted))),
    ]
    errors = []
    for attempt in attempts:
        with pytest.raises(grpc.RpcError) as refused:
            attempt()
        errors.append(refused.value)
    return errors


def test_a_certificate_that_nobody_approved_gets_nothing(federation: Federation) -> None:
    federation.coordinator()
    for error in calls(federation, federation.tls_of("alpha", approved=False)):
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "not approved yet, or it was revoked" in error.details()


def test_a_second_certificate_in_the_same_name_gets_nothing(federation: Federation) -> None:
    federation.coordinator()
    federation.tls_of("alpha")
    for error in calls(federation, federation.tls_of("alpha", approved=False)):
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "names",
    [
        [],
        [x509.DNSName("alpha")],
        [x509.UniformResourceIdentifier("foedus://coordinator/alpha")],
        [x509.UniformResourceIdentifier(f"foedus://site/{name}") for name in ("alpha", "beta")],
    ],
    ids=["no name", "no URI", "no site", "two sites"],
)
def test_a_certificate_that_names_no_one_site_gets_nothing(
    federation: Federation, names: list[x509.GeneralName]
) -> None:
    federation.coordinator()
    tls = federation.authority.issue(names, federation.authority.certificate)
    federation.directory.approved.update(alpha=fingerprint(tls), beta=fingerprint(tls))
    for error in calls(federation, tls):
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED


def test_no_certificate_or_one_of_another_authority_does_not_pass_the_handshake(federation: Federation) -> None:
    federation.coordinator()
    name = x509.UniformResourceIdentifier("foedus://site/alpha")
    foreign = Authority("elsewhere").issue([name], federation.authority.certificate)
    federation.directory.approved["alpha"] = fingerprint(foreign)
    for tls in (None, foreign):
        for error in calls(federation, tls):
            assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_1_2_gets_nothing(federation: Federation, tmp_path: Path) -> None:
    federation.coordinator()
    tls = federation.tls_of("alpha")
    pair = tmp_path / "pair.pem"
    pair.write_bytes(tls.certificate + tls.private_key)
    old = ssl.create_default_context(cadata=tls.authority.decode())
    old.load_cert_chain(pair)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_alpn_protocols(["h2"])
    host, port = federation.address.split(":")
    with socket.create_connection((host, int(port))) as plain, old.wrap_socket(plain, server_hostname=host) as wire:
        assert wire.version() == "TLSv1.2"
        wire.sendall(STAT_OVER_HTTP2)
        received = b""
        while b"grpc-status" not in received and (part := wire.recv(65536)):
            received += part
    assert b"\x0bgrpc-status\x017" in received  # 7 is PERMISSION_DENIED


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame (RFC 9113, section 4.1)."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field without indexing, a new name, no Huffman code (RFC 7541, section 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


STAT_OVER_HTTP2 = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(4, 0, 0, b"")
    + _frame(
        1,
        4,
        1,
        _literal(b":method", b"POST")
        + _literal(b":scheme", b"https")
        + _literal(b":path", b"/foedus.link.v1.Link/Stat")
        + _literal(b":authority", b"localhost")
        + _literal(b"te", b"trailers")
        + _literal(b"content-type", b"application/grpc"),
    )
    + _frame(0, 1, 1, bytes(5))
)


def test_revocation_ends_the_stream_at_once_and_lets_nothing_back_in(federation: Federation) -> None:
    federation.timing = Timing(heartbeat=2 * SECONDS, silence=6 * SECONDS)  # no heartbeat comes before the end
    server = federation.coordinator()
    tls = federation.tls_of("alpha")
    _, states = federation.site("alpha", tls=tls)
    states.wait_for(LinkState.CONNECTED)
    del federation.directory.approved["alpha"]
    server.disconnect("alpha")
    assert "it was revoked" in states.wait_for(LinkState.REFUSED)
    assert server.connected() == {}
    assert calls(federation, tls)[0].code() is grpc.StatusCode.PERMISSION_DENIED
    server.disconnect("alpha")


def test_revocation_that_nobody_announced_ends_the_stream_with_the_next_heartbeat(federation: Federation) -> None:
    federation.timing = Timing(heartbeat=0.05)
    federation.coordinator()
    _, states = federation.site("alpha")
    states.wait_for(LinkState.CONNECTED)
    del federation.directory.approved["alpha"]
    assert "it was revoked" in states.wait_for(LinkState.REFUSED)


def test_a_directory_that_does_not_answer_holds_nobody_up(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(federation.directory, "refresh", answered.wait)
    monkeypatch.setattr(link_service, "REFRESH_SECONDS", 0.05)
    federation.timing = Timing(heartbeat=0.05)
    server = federation.coordinator()
    grid = server.grid(RUN, 0)
    _, states = federation.site("alpha")
    states.wait_for(LinkState.CONNECTED)
    ids = grid.push_messages([grid.message("alpha", "query.keys", b"?", ttl=30)])
    replies = []
    while not replies:
        grid.wait(5.0)
        replies = grid.pull_messages(ids)
    assert not replies[0].has_error()
    answered.set()


def test_revocation_stops_an_upload_in_the_middle(federation: Federation) -> None:
    server = federation.coordinator()
    grid = server.grid(RUN, 100 * CHUNK)
    grid.push_messages([grid.message("alpha", "query.keys", b"", ttl=30)])
    ref = ObjectRef("0" * 64, 3 * CHUNK)
    wanted = pb.Object(run_id=RUN, sha256=ref.sha256, size=ref.size)
    stub = federation.stub(federation.tls_of("alpha"))

    def parts() -> Iterator[pb.PushPart]:
        yield pb.PushPart(header=pb.PushHeader(object=wanted))
        yield pb.PushPart(chunk=bytes(CHUNK))
        while stub.Stat(wanted).received < CHUNK // 2:
            pass
        del federation.directory.approved["alpha"]
        yield pb.PushPart(chunk=bytes(CHUNK))
        yield pb.PushPart(chunk=bytes(CHUNK))

    with pytest.raises(grpc.RpcError, match="PERMISSION_DENIED"):
        stub.Push(parts())
    assert grid.files.received("alpha", ref) == (CHUNK, False)


def test_a_reply_counts_only_from_the_site_that_was_asked(federation: Federation) -> None:
    server = federation.coordinator()
    grid = server.grid(RUN, 0)
    [message_id] = grid.push_messages([grid.message("alpha", "query.keys", b"?", ttl=30)])
    done = threading.Event()

    def reply(text: bytes) -> Iterator[pb.FromSite]:
        yield HELLO
        yield pb.FromSite(reply=pb.Reply(id=message_id, body=text))
        done.wait(SECONDS)

    forger = federation.stub(federation.tls_of("beta")).Control(reply(b"forged"))
    next(forger)
    asked = federation.stub(federation.tls_of("alpha")).Control(reply(b"mine"))
    assert next(asked).WhichOneof("part") == "hello"
    replies = []
    while not replies:
        grid.wait(1.0)
        replies = grid.pull_messages([message_id])
    done.set()
    assert replies[0].content["foedus"]["body"] == b"mine"
    assert grid.site(replies[0].metadata.src_node_id) == "alpha"


def test_a_reply_above_the_limit_ends_the_stream(federation: Federation) -> None:
    federation.coordinator()
    stub = federation.stub(federation.tls_of("alpha"))
    for size in (MAX_BODY + 1, 4 * MAX_BODY):
        stream = stub.Control(iter([HELLO, pb.FromSite(reply=pb.Reply(id="1", body=bytes(size)))]))
        with pytest.raises(grpc.RpcError) as refused:
            list(stream)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("trouble", "state", "says"),
    [
        ("down", LinkState.AWAY, "is down: nothing listens there"),
        ("other authority", LinkState.REFUSED, "that this site's authority did not sign"),
        ("other name", LinkState.REFUSED, "for another name or address"),
        ("not ours", LinkState.AWAY, "did not sign this site's certificate"),
        ("not approved", LinkState.REFUSED, "not approved yet"),
    ],
)
def test_a_site_is_told_why_it_is_not_connected(
    federation: Federation, trouble: str, state: LinkState, says: str
) -> None:
    tls = federation.tls_of("alpha", approved=False)
    if trouble == "other name":
        federation.server_tls = federation.authority.issue(
            [x509.DNSName("elsewhere")], federation.authority.certificate
        )
    server = federation.coordinator()
    if trouble == "down":
        server.drain_and_stop(1.0)
    if trouble == "other authority":
        tls = TlsIdentity(tls.certificate, tls.private_key, Authority("elsewhere").certificate)
    if trouble == "not ours":
        name = x509.UniformResourceIdentifier("foedus://site/alpha")
        tls = Authority("elsewhere").issue([name], federation.authority.certificate)
    _, states = federation.site("alpha", tls=tls)
    assert says in states.wait_for(state)


def test_nothing_secret_is_printed(federation: Federation) -> None:
    assert "PRIVATE KEY" not in repr(federation.server_tls)


# --- What `foedus-site doctor` asks ---


def test_an_admitted_site_is_told_the_time_and_its_daemon_notices_nothing(federation: Federation) -> None:
    server = federation.coordinator()
    tls = federation.tls_of("alpha")
    _, states = federation.site("alpha", tls=tls)
    states.wait_for(LinkState.CONNECTED)
    before = server.clock.now()
    assert before - 1 <= admission(federation.address, tls) <= server.clock.now() + 1
    assert [state for state, _ in states.seen] == [LinkState.CONNECTING, LinkState.CONNECTED]


def test_each_way_of_not_getting_in_has_its_own_sentence(federation: Federation) -> None:
    tls = federation.tls_of("alpha")
    server = federation.coordinator()
    stranger = Authority("stranger").issue([x509.UniformResourceIdentifier("foedus://site/alpha")], tls.authority)
    misled = TlsIdentity(tls.certificate, tls.private_key, Authority("other").certificate)
    port = federation.address.rpartition(":")[2]

    def sentence(tls: TlsIdentity, address: str = federation.address) -> str:
        with pytest.raises(LocalError) as refused:
            admission(address, tls)
        return str(refused.value)

    assert "not approved yet, or it was revoked" in sentence(federation.tls_of("beta", approved=False))
    assert "its authority did not sign this site's certificate" in sentence(stranger)
    assert "that this site's authority did not sign" in sentence(misled)
    assert "its name does not resolve" in sentence(tls, f"nowhere.invalid:{port}")
    server.drain_and_stop(1.0)
    assert "nothing listens there" in sentence(tls)
    federation.server_tls = federation.authority.issue([x509.DNSName("elsewhere.org")], tls.authority)
    federation.coordinator()
    assert "for another name or address" in sentence(tls)
