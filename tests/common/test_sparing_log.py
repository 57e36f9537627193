"""A log that others cannot fill, and what it leaves in."""

from __future__ import annotations

import logging

import pytest

from foedus_common.allowance import Allowance
from foedus_common.clock import ManualClock
from foedus_common.sparing_log import APART_SECONDS, BURST, PEERS_KEPT, Sparing


class Kept(logging.Handler):
    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self.addFilter(Sparing(clock))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def kept(clock: ManualClock) -> Kept:
    return Kept(clock)


@pytest.fixture
def logger(kept: Kept) -> logging.Logger:
    logger = logging.Logger("sparing")
    logger.addHandler(kept)
    return logger


def test_a_line_speaks_so_often_and_then_says_how_many_were_left_out(
    logger: logging.Logger, kept: Kept, clock: ManualClock
) -> None:
    def repeat(times: int) -> None:
        for number in range(times):
            logger.warning("run %d failed", number)

    repeat(BURST + 40)
    logger.warning("another line")
    assert kept.lines[BURST:] == ["another line"]
    clock.advance(APART_SECONDS)
    repeat(2)
    assert kept.lines[BURST + 1 :] == ["run 0 failed [40 lines like this one were left out]"]


def test_a_peer_that_is_noisy_hides_no_other(logger: logging.Logger, kept: Kept) -> None:
    for peer in ["north"] * 1000 + ["south"]:
        logger.info("site %s connected", peer, extra={"peer": peer})
    assert kept.lines == ["site north connected"] * BURST + ["site south connected"]


def test_many_peers_take_no_memory_without_end(logger: logging.Logger, kept: Kept) -> None:
    for number in range(2 * PEERS_KEPT):
        logger.info("knock", extra={"peer": str(number)})
    [sparing] = kept.filters
    assert len(sparing._spoken) == PEERS_KEPT  # type: ignore[union-attr]


def test_an_allowance_is_used_up_and_comes_back(clock: ManualClock) -> None:
    allowance = Allowance(clock, burst=2, seconds=6.0)
    assert [allowance.take() for _ in range(3)] == [True, True, False]
    clock.advance(5.9)
    assert not allowance.take()
    clock.advance(0.2)
    assert [allowance.take(), allowance.take()] == [True, False]
    clock.advance(3600.0)
    assert [allowance.take() for _ in range(3)] == [True, True, False]
