"""A daemon's daily question: a failure is asked again, and is a warning only once the certificate runs out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from foedus_client.enrol import Call, Membership, join
from foedus_client.link.renewal import WARN_DAYS, Renewal
from foedus_common.clock import DAY
from foedus_common.errors import LocalError
from operators import Operator


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[Operator]:
    operator = Operator(tmp_path / "operator")
    yield operator
    operator.close()


@pytest.fixture
def member(operator: Operator, tmp_path: Path) -> Membership:
    def approve(public_key: bytes) -> None:
        operator.registry.approve("north", public_key)
        operator.sign_roster()

    (tmp_path / "north").mkdir(mode=0o700)
    token = operator.registry.invite("north", "Nordklinik")
    call = operator.registry.enrol
    return join(tmp_path / "north", token, call, approve, random=operator.random, clock=operator.clock)


def failing(error: Exception) -> Call:
    def call(request: bytes) -> bytes:
        raise error

    return call


@pytest.mark.parametrize("error", [LocalError("The coordinator is down."), OSError(28, "No space left on device")])
@pytest.mark.parametrize(("days", "level"), [(0, logging.INFO), (90 - WARN_DAYS + 1, logging.WARNING)])
def test_a_question_that_fails_is_told_as_loud_as_it_matters(
    operator: Operator, member: Membership, caplog: pytest.LogCaptureFixture, error: Exception, days: int, level: int
) -> None:
    operator.clock.advance(days * DAY)
    renewal = Renewal(member, failing(error), operator.clock)
    with caplog.at_level(logging.INFO):
        assert not renewal.ask()
    assert [record.levelno for record in caplog.records] == [level]
    assert not renewal.changed


def test_an_answer_without_news_changes_nothing_and_brings_the_newest_roster(
    operator: Operator, member: Membership
) -> None:
    renewal = Renewal(member, operator.registry.enrol, operator.clock)
    operator.sign_roster()
    assert renewal.ask()
    assert (member.roster_epoch, renewal.changed) == (2, False)
    operator.clock.advance(61 * DAY)
    assert renewal.ask()
    assert renewal.changed
