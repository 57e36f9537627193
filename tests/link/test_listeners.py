"""What the coordinator shows changes while strangers and sites come, and nothing is lost by it."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address

from cryptography.x509 import IPAddress

from foedus_client.link.site_link import LinkState
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CHUNK
from foedus_common.objects import ObjectRef
from loopback import RUN, SECONDS, Authority, Federation, certificate_shown


def test_certificates_change_under_many_handshakes_and_what_is_shown_is_new_at_once(federation: Federation) -> None:
    """gRPC's own exchange of certificates crashed the process within some 200 handshakes."""
    server, here = federation.coordinator(), [IPAddress(ip_address("127.0.0.1"))]
    other = Authority("other")
    identities = [other.issue(here, trusts=other.certificate) for _ in range(3)]

    def handshakes(count: int) -> None:
        for _ in range(count):
            certificate_shown(server.enrol_address)

    with ThreadPoolExecutor(8) as strangers:
        under_way = [strangers.submit(handshakes, 150) for _ in range(8)]
        for tls in itertools.cycle(identities):
            server.show(tls)
            if all(each.done() for each in under_way):
                break
    before = certificate_shown(server.enrol_address)
    server.show(other.issue(here, trusts=other.certificate))
    assert certificate_shown(server.enrol_address) != before


def test_streams_come_back_and_a_transfer_goes_on_when_the_certificate_changes(federation: Federation) -> None:
    server = federation.coordinator()
    _, states = federation.site("alpha")
    states.wait_for(LinkState.CONNECTED)
    grid = server.grid(RUN, 10 * CHUNK)
    grid.push_messages([grid.message("alpha", "query.keys", b"", ttl=30)])
    data = bytes(3 * CHUNK)
    ref = ObjectRef(hashlib.sha256(data).hexdigest(), len(data))
    half, changed = threading.Event(), threading.Event()

    def parts() -> Iterator[pb.PushPart]:
        yield pb.PushPart(header=pb.PushHeader(object=pb.Object(run_id=RUN, sha256=ref.sha256, size=ref.size)))
        yield pb.PushPart(chunk=data[:CHUNK])
        half.set()
        changed.wait(SECONDS)
        yield pb.PushPart(chunk=data[CHUNK : 2 * CHUNK])
        yield pb.PushPart(chunk=data[2 * CHUNK :])

    tls = federation.tls_of("beta")
    grid.push_messages([grid.message("beta", "query.keys", b"", ttl=30)])
    upload = federation.stub(tls).Push.future(parts())
    assert half.wait(SECONDS)
    server.show(federation.server_tls)
    assert "is stopping" in states.wait_for(LinkState.AWAY)
    states.wait_for(LinkState.CONNECTED)
    changed.set()
    upload.result(SECONDS)
    assert grid.upload("beta", ref).read_bytes() == data
