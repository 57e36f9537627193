"""Finds any of many secrets in any of many bytes, in whatever spelling a program would write them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

WINDOW = 8


def spellings(secret: str) -> Iterator[bytes]:
    """UTF-8, UTF-16 both ways, hexadecimal digits, escaped as in JSON, and base64 at each of its three alignments."""
    data = secret.encode()
    yield data
    yield secret.encode("utf-16-le")
    yield secret.encode("utf-16-be")
    yield data.hex().encode()
    yield data.hex().upper().encode()
    yield json.dumps(secret)[1:-1].encode()
    for lead in range(3):
        coded = base64.b64encode(b"\0" * lead + data)
        inner = coded[4 if lead else 0 :].rstrip(b"=")
        inner = inner[: len(inner) - 2]  # the last characters depend on what follows
        yield inner
        yield inner.translate(bytes.maketrans(b"+/", b"-_"))


class Needles:
    """All spellings of all secrets."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._needles = {needle for secret in secrets for needle in spellings(secret)}
        assert min(map(len, self._needles)) >= WINDOW
        self._heads = np.unique([int.from_bytes(needle[:WINDOW], "little") for needle in self._needles])

    def found_in(self, data: bytes) -> set[bytes]:
        """The needles that are in the data: by their first eight bytes at every offset, then in full."""
        heads = self._windows(data)
        places = np.flatnonzero(np.isin(heads, self._heads))
        starts = {data[place : place + WINDOW] for place in places}
        return {needle for needle in self._needles if needle[:WINDOW] in starts and needle in data}

    def _windows(self, data: bytes) -> NDArray[np.uint64]:
        size = len(data) - WINDOW + 1
        if size < 1:
            return np.zeros(0, np.uint64)
        flat = np.frombuffer(data, np.uint8)
        windows = np.zeros(size, np.uint64)
        for offset in range(WINDOW):
            windows |= flat[offset : offset + size].astype(np.uint64) << np.uint64(8 * offset)
        return windows
