"""The one port that anybody may call: small, rare, and trusted by nobody."""

from __future__ import annotations

from collections import deque

import grpc
import pytest

from foedus_client.link.site_link import enrol
from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link import foedus_pb2_grpc as pb_grpc
from foedus_common.link.transport import MAX_ENROL_BODY
from foedus_server.link.enrolment import RateLimit
from foedus_server.store import DatabaseAway
from loopback import Authority, Federation


def test_a_request_is_handed_on_and_answered(federation: Federation) -> None:
    federation.enrol = lambda body: body[::-1]
    federation.coordinator()
    largest = b"a" + bytes(MAX_ENROL_BODY - 1)
    assert enrol(federation.enrol_address, federation.authority.certificate, largest) == largest[::-1]


def test_what_is_too_large_is_refused_at_both_ends(federation: Federation) -> None:
    seen: list[bytes] = []
    federation.enrol = lambda body: seen.append(body) or b""
    federation.coordinator()
    with pytest.raises(LocalError, match="is above 16384"):
        enrol(federation.enrol_address, federation.authority.certificate, bytes(MAX_ENROL_BODY + 1))
    credentials = grpc.ssl_channel_credentials(federation.authority.certificate)
    with grpc.secure_channel(federation.enrol_address, credentials) as channel:
        stub = pb_grpc.EnrolmentStub(channel)
        for size in (MAX_ENROL_BODY + 20, 1 << 20):
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                stub.Enrol(pb.EnrolRequest(body=bytes(size)))
    assert seen == []


def test_a_refusal_is_the_sentence_of_whoever_decides(federation: Federation) -> None:
    def refuse(body: bytes) -> bytes:
        raise LocalError("This token was used already; ask the operator for a new one.")

    federation.enrol = refuse
    federation.coordinator()
    with pytest.raises(LocalError, match=r"^This token was used already; ask the operator for a new one\.$"):
        enrol(federation.enrol_address, federation.authority.certificate, b"")


def test_a_fault_of_the_coordinator_tells_a_stranger_nothing(federation: Federation) -> None:
    def fail(body: bytes) -> bytes:
        raise RuntimeError("database password is hunter2")

    federation.enrol = fail
    federation.coordinator()
    credentials = grpc.ssl_channel_credentials(federation.authority.certificate)
    with (
        grpc.secure_channel(federation.enrol_address, credentials) as channel,
        pytest.raises(grpc.RpcError, match="its log says why") as told,
    ):
        pb_grpc.EnrolmentStub(channel).Enrol(pb.EnrolRequest())
    assert "hunter2" not in str(told.value)


def test_a_database_that_is_away_is_none_of_a_stranger_s_business(federation: Federation) -> None:
    def fail(body: bytes) -> bytes:
        raise DatabaseAway("The database could not be read: connection to server at 10.0.0.7 failed.")

    federation.enrol = fail
    federation.coordinator()
    with pytest.raises(LocalError, match="cannot be reached") as told:
        enrol(federation.enrol_address, federation.authority.certificate, b"")
    assert "10.0.0.7" not in str(told.value)


def test_a_false_coordinator_and_an_absent_one_are_told_apart(federation: Federation) -> None:
    server = federation.coordinator()
    with pytest.raises(LocalError, match="that this site's authority did not sign"):
        enrol(federation.enrol_address, Authority("elsewhere").certificate, b"")
    server.drain_and_stop(1.0)
    with pytest.raises(LocalError, match="is down: nothing listens there"):
        enrol(federation.enrol_address, federation.authority.certificate, b"")


def test_the_link_is_not_offered_on_the_enrolment_port(federation: Federation) -> None:
    federation.coordinator()
    federation.address = federation.enrol_address
    with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
        federation.stub(None).Stat(pb.Object())


def test_a_stranger_who_insists_is_turned_away(federation: Federation) -> None:
    federation.coordinator()
    credentials = grpc.ssl_channel_credentials(federation.authority.certificate)
    with grpc.secure_channel(federation.enrol_address, credentials) as channel:
        stub = pb_grpc.EnrolmentStub(channel)
        with pytest.raises(grpc.RpcError, match="Too many attempts"):
            deque((stub.Enrol(pb.EnrolRequest()) for _ in range(1000)), maxlen=0)


def test_the_limit_is_for_each_address_and_wears_off() -> None:
    clock = ManualClock()
    limit = RateLimit(clock, burst=2, seconds=6.0)
    assert [limit.allows("a") for _ in range(3)] == [True, True, False]
    assert limit.allows("b")
    clock.advance(5.9)
    assert not limit.allows("a")
    clock.advance(0.2)
    assert [limit.allows("a"), limit.allows("a")] == [True, False]
    clock.advance(3600.0)
    assert [limit.allows("a") for _ in range(3)] == [True, True, False]
    for stranger in range(2000):
        assert limit.allows(str(stranger))
