"""`foedus`, rigged (see `rigged`): a stage's place is where its first request is about to be sent.

POINTS are further places, in the order of a round.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from foedus_common.link.contents import body_of
from foedus_common.protocol import wire
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession
from foedus_server.cli import operator as cli
from foedus_server.link.grid import SiteGrid
from foedus_server.rounds import Committed, Round
from foedus_server.store.database import Database
from foedus_server.store.runs import Runs
from rigged import after, before, pass_through, reached, skew

POINTS = {
    "round row": "the attempt is in the database, and nobody was asked",
    "cohort frozen": "the cohort is in the database",
    "some keys": "two sites' keys have arrived",
    "shares forwarded": "every site was sent the shares that the others dealt it",
    "some vectors": "two masked vectors have arrived, and are added up",
    "survivors": "it is settled whose vectors are in the sum, and nobody was told",
    "some shares": "two sites' shares of the masks have arrived",
    "summed": "the sum is open, in memory alone",
    "adapter advanced": "the next adapter is on disk, and the database does not know",
    "journal head": "the journal's entry is written, and its transaction not yet committed",
    "committed": "the round is committed",
    "published": "every site was invited to the next round, and may fetch the new adapter",
}
SOME = 2
"""Of three sites or more."""


def rig_messages() -> None:
    push_messages = SiteGrid.push_messages

    def rigged(self: SiteGrid, messages: Iterable[Any]) -> list[str]:
        asked = list(messages)
        for message in asked:
            pass_through(body_of(message))
        pushed = push_messages(self, asked)
        for message in asked[:1]:
            header = wire.parse_envelope(body_of(message)).header
            if message.metadata.message_type == "query.mask":
                reached("shares forwarded", header.run_id, header.round)
            elif message.metadata.message_type == "train.invite":
                reached("published", header.run_id, header.round - 1)
        return pushed

    SiteGrid.push_messages = rigged  # type: ignore[method-assign]


def some(sequence: int) -> Any:
    """Where SOME answers to the requests of this number are in."""

    def where(stepped: Any, session: CoordinatorSession, *_: Any) -> tuple[int, int] | None:
        state = stepped[0]
        if isinstance(state, Awaiting) and (state.sequence, len(state.answers)) == (sequence, SOME):
            return session.config.terms.run_id, session.config.terms.round
        return None

    return where


def rig_database() -> None:
    def started(attempt: Any, *_: Any) -> tuple[int, int]:
        return attempt.run_id, attempt.round

    def frozen(_: Any, runs: Runs, attempt: Any) -> tuple[int, int] | None:
        return (attempt.run_id, attempt.round) if attempt.cohort and "keys" not in attempt.seconds else None

    def logged(_: Any, database: Database, connection: Any, event: str, **details: Any) -> tuple[int, int] | None:
        return (int(details["run"]), details["round"]) if event == "round.committed" else None

    after(Runs, "start_attempt", "round row", started)
    after(Runs, "save_attempt", "cohort frozen", frozen)
    before(Runs, "commit_attempt", "adapter advanced", lambda runs, attempt: (attempt.run_id, attempt.round))
    after(Database, "log", "journal head", logged)
    after(Runs, "commit_attempt", "committed", started)


def rig_rounds() -> None:
    def opened(result: Any, one: Round) -> tuple[int, int] | None:
        return (one._terms.run_id, one._terms.round) if isinstance(result, Committed) else None

    after(CoordinatorSession, "step", "some keys", some(0))
    after(CoordinatorSession, "step", "some vectors", some(2))
    after(CoordinatorSession, "step", "some shares", some(4))
    after(Round, "run", "summed", opened)


if __name__ == "__main__":
    rig_messages()
    rig_database()
    rig_rounds()
    skew()
    cli.main()
