"""However many runs a site approved, few models are in its memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from foedus_client.training.turns import Turns
from foedus_common.errors import LocalError
from plans import agreed_plan

SECONDS = 60.0


class Model:
    """Counts how many of it are in memory."""

    alive: set[int]

    def __init__(self, run: int, alive: set[int]) -> None:
        self.run, self.alive = run, alive
        alive.add(run)

    def stop(self) -> None:
        self.alive.discard(self.run)


@pytest.fixture
def alive() -> set[int]:
    return set()


def turns(alive: set[int], places: int = 2) -> Turns[Model]:
    return Turns(lambda agreed: Model(agreed.run_id, alive), places)


def run(number: int):
    return replace(agreed_plan(), run_id=number)


def started(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_of_many_runs_few_have_a_trainer_in_memory(alive: set[int]) -> None:
    trainers = turns(alive)
    most = 0
    for number in [1, 2, 3, 4, 1, 3]:
        with trainers.trainer(run(number)) as model:
            assert model.run == number
            most = max(most, len(alive))
    assert (most, alive) == (2, {1, 3})


def test_a_run_keeps_its_trainer_between_rounds(alive: set[int]) -> None:
    trainers = turns(alive)
    with trainers.trainer(run(1)) as first:
        pass
    with trainers.trainer(run(2)), trainers.trainer(run(1)) as second:
        assert second is first


def test_a_run_waits_for_its_turn_and_a_failed_one_gives_it_up(alive: set[int]) -> None:
    trainers, came = turns(alive, places=1), threading.Event()
    threads: list[threading.Thread] = []

    def second() -> None:
        with trainers.trainer(run(2)):
            came.set()

    def train() -> None:
        with trainers.trainer(run(1)):
            threads.append(started(second))
            assert not came.wait(0.05)
            raise ValueError("training failed")

    with pytest.raises(ValueError, match="training failed"):
        train()
    assert came.wait(SECONDS)
    threads[0].join(SECONDS)
    assert alive == {2}


def test_one_that_cannot_be_made_takes_no_place(alive: set[int]) -> None:
    def make(agreed: object) -> Model:
        raise LocalError("The model is not at this site.")

    trainers = Turns(make, 1)
    for _ in range(3):
        with pytest.raises(LocalError, match="not at this site"), trainers.trainer(run(1)):
            pass


def test_a_run_that_is_over_and_a_stop_leave_no_trainer_and_nobody_waiting(alive: set[int]) -> None:
    trainers, told = turns(alive, places=1), []

    def second() -> None:
        try:
            with trainers.trainer(run(2)):
                pass
        except LocalError as error:
            told.append(str(error))

    with trainers.trainer(run(1)):
        pass
    trainers.stop(1)
    assert alive == set()
    with trainers.trainer(run(1)):
        waiting = started(second)
        trainers.close()
        waiting.join(SECONDS)
        assert alive == set()
    assert told == ["the site's daemon is stopping."]
