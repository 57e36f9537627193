"""A home in one file: what is packed comes back whole, with the same bytes and modes, or nothing does."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from foedus_common.backup import LIST, restore_backup, write_backup
from foedus_common.errors import LocalError

NOW = 1_800_000_000.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "objects" / "partial").mkdir(parents=True)
    (home / "identity").mkdir()
    (home / "site.db").write_bytes(b"in use")
    (home / "site.db-wal").write_bytes(b"in use")
    (home / "daemon.lock").touch()
    (home / ".hidden").write_bytes(b"temporary")
    (home / "objects" / "partial" / "half").write_bytes(b"half")
    (home / "objects" / ("a" * 64)).write_bytes(bytes(range(256)) * 5000)
    (home / "identity" / "key with a blank").write_bytes(b"secret")
    (home / "empty").touch()
    return home


def backup(home: Path, file: Path) -> Path:
    write_backup(
        file,
        home,
        "site",
        leave_out=frozenset({"daemon.lock", "partial"}),
        database="site.db",
        copy_database=lambda path: path.write_bytes(b"a copy") and None,
        now=NOW,
    )
    return file


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_home_comes_back_as_it_was(home: Path, tmp_path: Path) -> None:
    before = files(home)
    file = backup(home, tmp_path / "home.backup")
    assert files(home) == before
    assert file.stat().st_mode & 0o777 == 0o600

    restored = tmp_path / "deeper" / "restored"
    about = restore_backup(file, restored, "site")
    assert (about.kind, about.made_at, about.files, about.bytes) == ("site", NOW, 4, file.stat().st_size)
    left_out = {"daemon.lock", ".hidden", "site.db-wal", "objects/partial/half"}
    assert files(restored) == {n: b for n, b in before.items() if n not in left_out} | {"site.db": b"a copy"}
    modes = {path.is_dir(): path.stat().st_mode & 0o777 for path in [restored, *restored.rglob("*")]}
    assert modes == {True: 0o700, False: 0o600}


def test_nothing_is_overwritten(home: Path, tmp_path: Path) -> None:
    file = backup(home, tmp_path / "home.backup")
    with pytest.raises(LocalError, match="is not overwritten"):
        backup(home, file)
    with pytest.raises(LocalError, match="into a new home only"):
        restore_backup(file, home, "site")
    with pytest.raises(LocalError, match="cannot be written"):
        backup(home, tmp_path / "nowhere" / "home.backup")


def test_a_backup_that_fails_leaves_no_file(home: Path, tmp_path: Path) -> None:
    (home / "site.db").unlink()
    with pytest.raises(ZeroDivisionError):
        write_backup(
            tmp_path / "b",
            home,
            "site",
            leave_out=frozenset(),
            database="site.db",
            copy_database=lambda path: 1 / 0 and None,  # type: ignore[func-returns-value]
            now=NOW,
        )
    assert list(tmp_path.iterdir()) == [home]


def test_only_a_whole_backup_of_the_right_kind_is_restored(home: Path, tmp_path: Path) -> None:
    good = backup(home, tmp_path / "good").read_bytes()
    bad = tmp_path / "bad"
    flipped = bytearray(good)
    flipped[good.index(b"secret")] ^= 1
    for damaged in (b"", good[: good.index(b'"kind"')], good[: len(good) // 2], bytes(flipped), b"x" * 4096):
        bad.write_bytes(damaged)
        with pytest.raises(LocalError):
            restore_backup(bad, tmp_path / "restored", "site")
    with pytest.raises(LocalError, match="is the backup of a site; this program restores a coordinator"):
        restore_backup(tmp_path / "good", tmp_path / "restored", "coordinator")
    with pytest.raises(LocalError, match="cannot be restored"):
        restore_backup(tmp_path / "missing", tmp_path / "restored", "site")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "good", "bad"}


@pytest.mark.parametrize(
    "name", ["../escaped", "/tmp/escaped", "a/../../escaped", ".hidden", "a/.hidden", "line\nbreak"]
)
def test_nothing_is_written_outside_the_home(tmp_path: Path, name: str) -> None:
    assert_refused(tmp_path, tarfile.TarInfo(name))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_nothing_but_plain_files_is_restored(tmp_path: Path, kind: bytes) -> None:
    entry = tarfile.TarInfo("entry")
    entry.type, entry.linkname = kind, "/etc/passwd"
    assert_refused(tmp_path, entry)


def assert_refused(tmp_path: Path, entry: tarfile.TarInfo) -> None:
    about = json.dumps({"kind": "site", "made_at": NOW, "files": {}}).encode()
    listed = tarfile.TarInfo(LIST)
    listed.size = len(about)
    with tarfile.open(tmp_path / "crafted", "w") as tar:
        tar.addfile(entry)
        tar.addfile(listed, io.BytesIO(about))
    with pytest.raises(LocalError, match="which no backup of Foedus does"):
        restore_backup(tmp_path / "crafted", tmp_path / "restored", "site")
    assert [path.name for path in tmp_path.iterdir()] == ["crafted"]
