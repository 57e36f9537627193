"""Work divided between cores. Failure: a run left out or done twice, or a result that depends on how many there are."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.protocol import cores
from foedus_common.protocol.cores import LEAST, in_parts
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.masks import apply_masks
from seeded import seeded


@pytest.fixture(params=[1, 2, 3, 8])
def _so_many_cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_cores", lambda: request.param)


@pytest.mark.usefixtures("_so_many_cores")
@given(length=st.integers(0, 5000), least=st.integers(1, 700), multiple=st.sampled_from([1, 2, 64]))
def test_runs_cover_everything_once_and_start_where_they_may(length: int, least: int, multiple: int) -> None:
    done, lock, starts = np.zeros(length, int), threading.Lock(), []

    def work(start: int, stop: int) -> None:
        with lock:
            starts.append(start)
            done[start:stop] += 1

    in_parts(length, work, least, multiple)
    assert (done == 1).all()
    assert all(start % multiple == 0 for start in starts)
    assert 1 <= len(starts) <= max(1, length // least)


@pytest.mark.usefixtures("_so_many_cores")
@pytest.mark.parametrize("failing", [0, 3 * LEAST])
def test_what_a_run_raises_is_raised_when_all_have_ended(failing: int) -> None:
    ended = []

    def work(start: int, stop: int) -> None:
        ended.append(start)
        if start <= failing < stop:
            raise ValueError(start)

    with pytest.raises(ValueError):  # noqa: PT011
        in_parts(4 * LEAST, work)
    assert len(ended) == min(4, cores._cores())


def test_vectors_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, and three parts that end in the middle of a block, of a segment and of a group of coins."""
    layout = FieldLayout(21, 16, ((250_001, 1.0), (900_003, 7.0), (2, 0.5)))
    vector = np.random.default_rng(0).uniform(-0.5, 0.5, layout.dimension)
    keys = [bytes([number]) * 32 for number in range(5)]

    def made() -> tuple[np.ndarray, np.ndarray]:
        words = layout.encode(vector, seeded("cores"))
        plain = words.copy()
        apply_masks(words, add=keys[:3], subtract=keys[3:])
        return plain, words

    results = []
    for count in (1, 2, 3):
        monkeypatch.setattr(cores, "_cores", lambda count=count: count)
        results.append(made())
    assert layout.words // LEAST >= 3
    assert np.array_equal(results[0][0], layout.pack(layout.quantise(vector, seeded("cores"))))
    for plain, masked in results[1:]:
        assert np.array_equal(plain, results[0][0])
        assert np.array_equal(masked, results[0][1])
