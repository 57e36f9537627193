"""`foedus-site`, rigged (see `rigged`). With FOEDUS_KNOWN=1 its trainer is `known_sites.KnownTrainer`: no torch.

POINTS are further places, in the order of a run. Every answer in the secure sum is noted in the home, in the file
`answers`, when it is stored and again whenever it is about to be sent: what left this site is known whatever becomes of
the process.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from foedus_client import round as site_round
from foedus_client.approval import Approval
from foedus_client.cli import site as cli
from foedus_client.daemon import Daemon
from foedus_client.ledger.ledger import Ledger
from foedus_client.link.site_link import SiteLink
from foedus_client.round import SiteRounds
from foedus_client.store import SiteStore
from foedus_common.plan import AgreedPlan
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.effects import Answered
from foedus_common.randomness import system_random
from known_sites import KnownTrainer
from rigged import STAGES, after, before, pass_through, reached, skew

POINTS = {
    "plan stored": "the plan is in the database, and nothing is decided",
    "policy checked": "policy allows the plan, and nothing is reserved",
    "reserved": "the round's training is charged, and the data unopened",
    "training": "training begins",
    "mid-training": "training is half done",
    "noised": "the vector is there, noise and all, in memory alone",
    "outbox stored": "the vector is in the outbox, and Ready not said",
    "sent": "the coordinator has the masked vector, and was not told which it is",
    "acknowledged": "the coordinator says that it has the vector, and the ledger knows",
    "unmask stored": "the shares of the masks are stored, and not sent",
    "unmask sent": "they are sent",
    "committed": "the run is over, its ledger closed, and its plan not",
}


def rig_requests(name: str) -> None:
    original = getattr(SiteRounds, name)

    def rigged(self: SiteRounds, request: bytes) -> Any:
        pass_through(request)
        answer = original(self, request)
        if name == "step":
            note(self._site.store.path, hashlib.sha256(request).digest(), answer)
        return answer

    setattr(SiteRounds, name, rigged)


def note(database: Path, request: bytes, answer: bytes) -> None:
    """One line: which request of which attempt it was, its hash, and that of the answer."""
    opened = wire.parse_envelope(answer)
    line = {
        "attempt": [*opened.header.attempt_id],
        "sequence": opened.header.sequence,
        "message": type(opened.message).__name__,
        "process": os.getpid(),
        "request": request.hex(),
        "answer": hashlib.sha256(answer).hexdigest(),
    }
    descriptor = os.open(database.with_name("answers"), os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    os.write(descriptor, json.dumps(line).encode() + b"\n")
    os.close(descriptor)


def rig_decisions() -> None:
    after(SiteStore, "put_plan", "plan stored", lambda _, store, digest, run_id, *rest: (run_id, 0))
    after(Approval, "lasting_reasons", "policy checked", lambda _, approval, agreed: (agreed.run_id, 0))
    after(Ledger, "close_run", "committed", lambda _, ledger, run_id, *rest: (run_id, 0))


def rig_training() -> None:
    def made(_: Any, update: Any, agreed: AgreedPlan, round_plan: Any, *rest: Any) -> tuple[int, int]:
        return agreed.run_id, round_plan.index

    before(KnownTrainer, "train", "training", lambda trainer, *rest: (trainer._agreed.run_id, rest[-1].index))
    before(KnownTrainer, "keep", "mid-training", lambda trainer, index, steps: (trainer._agreed.run_id, index))
    after(site_round, "encoded", "noised", made)


def rig_ledger() -> None:
    def charged(_: Any, ledger: Ledger, run_id: int, index: int, *rest: Any) -> tuple[int, int]:
        return run_id, index

    after(Ledger, "reserve_round", "reserved", charged)
    after(Ledger, "release", "outbox stored", lambda _, ledger, charge, terms, *rest: (terms.run_id, terms.round))
    after(Ledger, "commit", "acknowledged", charged)


def rig_sending() -> None:
    def named(_: Any, rounds: SiteRounds, run_id: int, answer: bytes) -> tuple[int, int] | None:
        opened = wire.parse_envelope(answer)
        return (run_id, opened.header.round) if isinstance(opened.message, m.MaskedInput) else None

    def unmasking(_: Any, store: SiteStore, records: Any) -> tuple[int, int] | None:
        for record in records:
            if isinstance(record, Answered):
                note(store.path, record.request, record.answer)
                return record.attempt[:2] if record.sequence == len(STAGES) - 1 else None
        return None

    after(SiteRounds, "_push_what_it_names", "sent", named)
    after(SiteStore, "persist", "unmask stored", unmasking)
    speak = SiteLink._speak

    async def rigged(self: SiteLink, call: Any) -> None:
        await speak(self, Told(call))

    SiteLink._speak = rigged  # type: ignore[method-assign]


class Told:
    """A stream of which is known when a site's last word in a round has gone out."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def write(self, message: Any) -> None:
        await self._call.write(message)
        if message.WhichOneof("part") == "reply" and message.reply.body:
            opened = wire.parse_envelope(message.reply.body)
            if isinstance(opened.message, m.Unmask):
                reached("unmask sent", opened.header.run_id, opened.header.round)


def known_trainer(self: Daemon, agreed: AgreedPlan) -> KnownTrainer:
    return KnownTrainer(self._home.path, agreed, system_random)


if __name__ == "__main__":
    rig_requests("invite")
    rig_requests("step")
    rig_decisions()
    rig_training()
    rig_ledger()
    rig_sending()
    skew()
    if os.environ.get("FOEDUS_KNOWN"):
        Daemon._open_trainer = known_trainer  # type: ignore[assignment,method-assign]
    cli.main()
