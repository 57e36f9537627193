"""The object store: what is kept, what is refused, and what a cut leaves behind."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.errors import LocalError, RemoteError
from foedus_common.objects import SPARE_BYTES, ObjectRef, ObjectStore

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def ref_of(data: bytes) -> ObjectRef:
    return ObjectRef(hashlib.sha256(data).hexdigest(), len(data))


def test_an_object_is_named_by_its_sha256(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "objects")
    ref = store.put(memoryview(b"abc"))
    assert ref == ObjectRef(ABC, 3)
    assert store.put(b"abc") == ref
    assert store.path(ref).read_bytes() == store.read(ref) == b"abc"
    store.delete(ref)
    assert not store.has(ref)
    store.delete(ref)


def test_nobody_else_can_read_it(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "objects")
    path = store.path(store.put(b"abc"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("sha256", "size"), [("../" * 21 + "x", 1), (ABC.upper(), 3), (ABC[:-1], 3), (ABC, 0)])
def test_a_malformed_reference_is_refused(sha256: str, size: int) -> None:
    with pytest.raises(RemoteError, match="BAD_MESSAGE"):
        ObjectRef(sha256, size)


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    ref = store.put(b"abc")
    store.path(ref).write_bytes(b"abd")
    with pytest.raises(LocalError, match="damaged"):
        store.read(ref)
    store.delete(ref)
    with pytest.raises(LocalError, match="is not in"):
        store.read(ref)


@given(data=st.binary(min_size=1, max_size=300), cuts=st.lists(st.integers(1, 299), max_size=4))
def test_whatever_the_cuts_the_object_arrives(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("store")
    ref = ref_of(data)
    for end in [*sorted(cuts), len(data)]:
        with ObjectStore(folder).receive(ref) as partial:
            offset = partial.resume()
            partial.append(data[offset:end])
    assert ObjectStore(folder).received(ref) == len(data)
    with ObjectStore(folder).receive(ref) as partial:
        partial.resume()
        partial.finish()
    assert ObjectStore(folder).read(ref) == data


def test_other_bytes_are_thrown_away_and_can_be_sent_again(tmp_path: Path) -> None:
    store, ref = ObjectStore(tmp_path), ref_of(b"abc")
    with store.receive(ref) as partial:
        partial.append(b"abd")
        with pytest.raises(RemoteError, match="do not match"):
            partial.finish()
    assert store.received(ref) == 0
    with store.receive(ref) as partial:
        assert partial.resume() == 0
        partial.append(b"abc")
        partial.finish()
    assert store.read(ref) == b"abc"


def test_more_bytes_than_announced_are_refused(tmp_path: Path) -> None:
    with ObjectStore(tmp_path).receive(ref_of(b"abc")) as partial, pytest.raises(RemoteError, match="longer"):
        partial.append(b"abcd")


def test_one_object_arrives_once_at_a_time(tmp_path: Path) -> None:
    store, ref = ObjectStore(tmp_path), ref_of(b"abc")
    with store.receive(ref), pytest.raises(LocalError, match="already arriving"):
        store.receive(ref)
    with store.receive(ref) as partial:
        assert partial.resume() == 0


def test_room_is_claimed_as_announced_not_as_received(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    whole = store.put(b"abc")
    arriving, wanted = ref_of(b"x" * 100), ref_of(b"y" * 10)
    with store.receive(arriving) as partial:
        partial.append(b"x")
    assert store.claimed_bytes(wanted) == 113
    assert store.claimed_bytes(whole) == store.claimed_bytes(arriving) == 103


def test_a_full_disk_is_a_sentence_and_loses_nothing(tmp_path: Path) -> None:
    """The limit on a file's size makes writing fail in this process as on a disk that is full."""
    store, data = ObjectStore(tmp_path / "objects"), bytes(100_000)
    small = store.put(b"small")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(LocalError, match="An object cannot be stored: File too large; make room"):
            store.put(data)
        with pytest.raises(LocalError, match="make room"), store.receive(ObjectRef("0" * 64, 100_000)) as partial:
            partial.append(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert store.read(small) == b"small"
    assert store.read(store.put(data)) == data


def test_above_its_limit_a_store_receives_nothing(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path, limit=150)
    arriving = ref_of(b"x" * 100)
    with store.receive(arriving) as partial:
        partial.append(b"x")
    with pytest.raises(RemoteError, match="QUOTA: an object of 51 bytes"):
        store.receive(ref_of(b"y" * 51))
    with store.receive(ref_of(b"y" * 50)):
        pass
    store.delete(arriving)
    with store.receive(ref_of(b"z" * 100)):
        pass


def test_what_arrives_leaves_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, ref = ObjectStore(tmp_path), ref_of(b"x" * 100)
    free = SPARE_BYTES + 99
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with pytest.raises(LocalError, match="too little room"):
        store.receive(ref)
    free += 1
    with store.receive(ref) as partial:
        partial.append(b"x" * 60)
    free -= 60
    with store.receive(ref) as partial:
        assert partial.resume() == 60


def test_a_sweep_leaves_what_is_named_and_what_has_just_arrived(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    wanted, other = store.put(b"wanted"), store.put(b"other")
    partial, old = ref_of(b"p" * 10), ref_of(b"o" * 10)
    for arriving in (partial, old):
        with store.receive(arriving) as file:
            file.append(b"x")
    os.utime(tmp_path / "partial" / f"{old.sha256}-10", (1000, 1000))
    (tmp_path / "partial" / "tmpcut").touch()
    store.sweep({wanted.sha256}, before=2000.0)
    assert [store.has(wanted), store.has(other)] == [True, False]
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [f"{partial.sha256}-10"]
