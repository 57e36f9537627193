"""Large objects by digest: whole, resumed after cuts, refused when they are someone else's, too large or a lie."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import pytest

from foedus_client.link.site_link import LinkState, SiteLink
from foedus_common.errors import LocalError, RemoteError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.link.transport import CHUNK
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_server.link.grid import LinkServer, SiteGrid
from loopback import RUN, Federation
from proxy import DOWN, UP, Proxy

MIB = 1 << 20
DATA = bytes(range(256)) * (5 * MIB // 256) + b"a tail that fills no chunk"


def ref_of(data: bytes) -> ObjectRef:
    return ObjectRef(hashlib.sha256(data).hexdigest(), len(data))


def run_with(server: LinkServer, *sites: str, cap: int = 64 * MIB) -> SiteGrid:
    """A run that has asked these sites something."""
    grid = server.grid(RUN, cap)
    grid.push_messages([grid.message(site, "query.keys", b"", ttl=30) for site in sites])
    return grid


def connected(federation: Federation, name: str, **options: float) -> tuple[SiteLink, ObjectStore]:
    link, states = federation.site(name, **options)
    states.wait_for(LinkState.CONNECTED)
    return link, ObjectStore(federation.folder / name / "objects")


def address(ref: ObjectRef) -> pb.Object:
    return pb.Object(run_id=RUN, sha256=ref.sha256, size=ref.size)


def upload(ref: ObjectRef, data: bytes, offset: int = 0) -> Iterator[pb.PushPart]:
    yield pb.PushPart(header=pb.PushHeader(object=address(ref), offset=offset))
    for start in range(0, len(data), CHUNK):
        yield pb.PushPart(chunk=data[start : start + CHUNK])


def test_objects_travel_both_ways(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    link, objects = connected(federation, "alpha")
    down = federation.objects.put(DATA)
    grid.allow(down, ["alpha"])
    assert link.fetch(RUN, down).read_bytes() == DATA
    up = objects.put(DATA[::-1])
    link.push(RUN, up)
    link.push(RUN, up)
    assert grid.upload("alpha", up).read_bytes() == DATA[::-1]
    grid.discard("alpha", up)
    with pytest.raises(RemoteError, match="has not uploaded"):
        grid.upload("alpha", up)


def test_a_download_goes_on_where_it_was_cut(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    link, objects = connected(federation, "alpha")
    ref = federation.objects.put(DATA)
    grid.allow(ref, ["alpha"])
    with objects.receive(ref) as partial:
        partial.append(DATA[: 3 * MIB])
    # The coordinator's copy lost its beginning: only a download that begins later can succeed.
    with federation.objects.path(ref).open("r+b") as file:
        file.write(bytes(3 * MIB))
    assert link.fetch(RUN, ref).read_bytes() == DATA


def test_an_upload_goes_on_where_it_was_cut_also_after_a_restart(federation: Federation) -> None:
    first = federation.coordinator()
    run_with(first, "alpha")
    tls, ref = federation.tls_of("alpha"), ref_of(DATA)
    with pytest.raises(grpc.RpcError, match="ended early"):
        federation.stub(tls).Push(upload(ref, DATA[: 3 * MIB]))
    first.drain_and_stop(1.0)
    grid = run_with(federation.coordinator(), "alpha")
    held = federation.stub(tls).Stat(address(ref))
    assert (held.received, held.whole) == (3 * MIB, False)
    link, objects = federation.site("alpha", tls=tls)[0], ObjectStore(federation.folder / "alpha" / "objects")
    objects.put(DATA)
    with objects.path(ref).open("r+b") as file:
        file.write(bytes(3 * MIB))
    link.push(RUN, ref)
    assert grid.upload("alpha", ref).read_bytes() == DATA


def test_an_upload_that_arrived_but_was_not_checked_is_finished(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    link, objects = connected(federation, "alpha")
    ref = objects.put(DATA)
    with grid.files.receive("alpha", ref) as partial:
        partial.append(DATA)
    link.push(RUN, ref)
    assert grid.upload("alpha", ref).read_bytes() == DATA


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_64_mib_that_are_cut_in_the_middle_go_on_by_chunk(federation: Federation, direction: str) -> None:
    """Counted on the wire: after the cut, no more passes than was missing and what lay in buffers on the way."""
    data, size = bytes(range(256)) * (64 * MIB // 256), 64 * MIB
    grid = run_with(federation.coordinator(), "alpha", cap=size)
    with closing(Proxy(int(federation.address.rpartition(":")[2]))) as proxy:
        federation.address = f"127.0.0.1:{proxy.port}"
        link, objects = connected(federation, "alpha")
        ref = (objects if direction == UP else federation.objects).put(data)
        proxy.cut_after(direction, size // 2)
        if direction == UP:
            link.push(RUN, ref)
            arrived = grid.upload("alpha", ref)
        else:
            grid.allow(ref, ["alpha"])
            arrived = link.fetch(RUN, ref)
        passed = proxy.passed[direction]
    assert arrived.read_bytes() == data
    assert size < passed < 1.25 * size  # a loaded machine holds some 10 MiB in sockets; in whole it would be 1.5 times
    assert len(proxy.arrivals) > 2


def test_a_transfer_waits_for_a_coordinator_that_restarts(federation: Federation) -> None:
    first = federation.coordinator()
    link, _ = connected(federation, "alpha")
    first.drain_and_stop(1.0)
    ref = federation.objects.put(DATA)
    run_with(federation.coordinator(), "alpha").allow(ref, ["alpha"])
    assert link.fetch(RUN, ref).read_bytes() == DATA


def test_a_digest_is_for_those_who_were_allowed_and_nobody_learns_more(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha", "beta")
    ref = federation.objects.put(DATA)
    grid.allow(ref, ["alpha"])
    beta = federation.stub(federation.tls_of("beta"))
    answers = []
    in_another_run = pb.Object(run_id=1, sha256=ref.sha256, size=ref.size)
    for wanted in (address(ref), address(ref_of(b"no such object")), in_another_run):
        with pytest.raises(grpc.RpcError) as refused:
            list(beta.Pull(pb.PullRequest(object=wanted)))
        answers.append((refused.value.code(), refused.value.details()))
    assert len(set(answers)) == 1
    assert answers[0][0] is grpc.StatusCode.NOT_FOUND


def test_a_site_sees_only_its_own_uploads(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha", "beta")
    ref = ref_of(DATA)
    federation.stub(federation.tls_of("alpha")).Push(upload(ref, DATA))
    beta = federation.stub(federation.tls_of("beta"))
    assert beta.Stat(address(ref)) == pb.StatReply(received=0, whole=False)
    with pytest.raises(RemoteError, match="beta named an object"):
        grid.upload("beta", ref)
    with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
        federation.stub(federation.tls_of("gamma")).Stat(address(ref))


@pytest.mark.parametrize(
    ("ref", "data", "offset", "says"),
    [
        (ref_of(DATA), DATA[:-1] + b"!", 0, "do not match"),
        (ObjectRef("0" * 64, 10), b"more than ten bytes", 0, "longer than was announced"),
        (ObjectRef("0" * 64, 9 * MIB), b"", 0, "capped at"),
        (ref_of(DATA), DATA[5:], 5, "another offset"),
    ],
    ids=["other bytes", "longer", "above the cap", "other offset"],
)
def test_an_upload_that_lies_is_refused(
    federation: Federation, ref: ObjectRef, data: bytes, offset: int, says: str
) -> None:
    grid = run_with(federation.coordinator(), "alpha", cap=8 * MIB)
    stub = federation.stub(federation.tls_of("alpha"))
    with pytest.raises(grpc.RpcError, match=says):
        stub.Push(upload(ref, data, offset))
    with pytest.raises(RemoteError):
        grid.upload("alpha", ref)
    # Nothing of it blocks the honest upload.
    stub.Push(upload(ref_of(DATA), DATA))
    assert grid.upload("alpha", ref_of(DATA)).read_bytes() == DATA


def test_parts_that_move_nothing_do_not_hold_a_stream_open(federation: Federation) -> None:
    run_with(federation.coordinator(), "alpha")
    stub = federation.stub(federation.tls_of("alpha"))
    header = pb.PushPart(header=pb.PushHeader(object=address(ref_of(DATA))))
    for idle in (pb.PushPart(), pb.PushPart(chunk=b""), header):
        with pytest.raises(grpc.RpcError, match="moves nothing"):
            stub.Push(iter([header, idle]))


def test_a_fault_of_the_coordinator_tells_a_site_nothing(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    shutil.rmtree(federation.folder / "coordinator" / "uploads")
    with pytest.raises(grpc.RpcError, match="its log says why") as told:
        federation.stub(federation.tls_of("alpha")).Stat(address(ref_of(DATA)))
    assert str(federation.folder) not in str(told.value)
    grid.close()


def test_a_malformed_digest_reaches_no_file(federation: Federation) -> None:
    run_with(federation.coordinator(), "alpha")
    stub = federation.stub(federation.tls_of("alpha"))
    with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
        stub.Stat(pb.Object(run_id=RUN, sha256="../../../../etc/passwd", size=1))


def test_a_chunk_above_the_limit_is_refused_before_it_is_read(federation: Federation) -> None:
    run_with(federation.coordinator(), "alpha")
    header, ref = pb.PushHeader(object=address(ref_of(DATA))), ref_of(DATA)
    parts = [pb.PushPart(header=header), pb.PushPart(chunk=DATA[: 2 * CHUNK])]
    stub = federation.stub(federation.tls_of("alpha"))
    with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
        stub.Push(iter(parts))
    assert stub.Stat(address(ref)).received == 0


def test_what_the_site_would_not_keep_is_not_downloaded(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    link, objects = connected(federation, "alpha", max_object_bytes=MIB)
    ref = federation.objects.put(DATA)
    grid.allow(ref, ["alpha"])
    with pytest.raises(RemoteError, match="above this site's limit"):
        link.fetch(RUN, ref)
    assert objects.received(ref) == 0


def test_a_coordinator_that_sends_other_bytes_is_found_out(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    link, objects = connected(federation, "alpha")
    ref = federation.objects.put(DATA)
    federation.objects.path(ref).write_bytes(DATA[::-1])
    grid.allow(ref, ["alpha"])
    with pytest.raises(RemoteError, match="do not match"):
        link.fetch(RUN, ref)
    assert not objects.has(ref)


def test_patience_ends_with_one_sentence(federation: Federation) -> None:
    run_with(federation.coordinator(), "alpha", cap=MIB)
    link, objects = connected(federation, "alpha", patience=0.0)
    with pytest.raises(LocalError, match="nothing of that name"):
        link.fetch(RUN, ref_of(DATA))
    with pytest.raises(LocalError, match="capped at 1048576 bytes"):
        link.push(RUN, objects.put(DATA))


def test_two_threads_that_want_one_object_share_a_download(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha")
    link, _ = connected(federation, "alpha")
    ref = federation.objects.put(DATA)
    grid.allow(ref, ["alpha"])
    with ThreadPoolExecutor(4) as pool:
        assert {path.read_bytes() for path in pool.map(lambda _: link.fetch(RUN, ref), range(4))} == {DATA}


def test_a_round_leaves_no_uploads_behind(federation: Federation) -> None:
    grid = run_with(federation.coordinator(), "alpha", cap=8 * MIB)
    link, objects = connected(federation, "alpha")
    for data in (DATA, DATA[::-1]):
        ref = objects.put(data)
        link.push(RUN, ref)
        assert grid.upload("alpha", ref).read_bytes() == data
        grid.clear_uploads()
        with pytest.raises(RemoteError, match="has not uploaded"):
            grid.upload("alpha", ref)
    grid.close()
    assert not (federation.folder / "coordinator" / "uploads" / str(RUN)).exists()


def test_nothing_moves_over_a_stopped_link(federation: Federation) -> None:
    federation.coordinator()
    link, _ = connected(federation, "alpha")
    link.stop()
    with pytest.raises(LocalError, match="The link is stopped"):
        link.fetch(RUN, ref_of(DATA))
