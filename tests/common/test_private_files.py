"""Private files: whole or not there, never wider than 0600, whatever the umask."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from foedus_common.errors import LocalError
from foedus_common.private_files import create_private, private_folder, read_private, replace_private


@pytest.fixture(autouse=True)
def _generous_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_file_is_created_once(tmp_path: Path) -> None:
    create_private(tmp_path / "key", b"first")
    with pytest.raises(LocalError, match="not overwritten"):
        create_private(tmp_path / "key", b"second")
    assert read_private(tmp_path / "key", 5) == b"first"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["key"]


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    for data in (b"first", b"second"):
        replace_private(tmp_path / "roster", data)
        assert read_private(tmp_path / "roster", 6) == data
    assert (tmp_path / "roster").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["roster"]


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    create_private(tmp_path / "file", b"12345")
    with pytest.raises(LocalError, match="longer than 4 bytes"):
        read_private(tmp_path / "file", 4)
    with pytest.raises(LocalError, match="cannot be read"):
        read_private(private_folder(tmp_path / "folder"), 4)


def test_a_folder_is_private_or_refused(tmp_path: Path) -> None:
    assert private_folder(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o755)
    with pytest.raises(LocalError, match="chmod 700"):
        private_folder(tmp_path / "shared")
    (tmp_path / "file").touch()
    with pytest.raises(LocalError, match="cannot be made"):
        private_folder(tmp_path / "file")
