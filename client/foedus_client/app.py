"""A site as a Flower ClientApp: message types on one side, the pages of `round` on the other."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from foedus_client.round import SiteRounds
from foedus_common.errors import Reason, RemoteError
from foedus_common.link.contents import body_of, content_of
from foedus_common.protocol import wire

STAGES = ("commit", "reveal", "keys", "shares", "mask", "survivors", "unmask")


def client_app(rounds: SiteRounds) -> ClientApp:
    """A ClientApp that answers the coordinator for one site."""
    app = ClientApp()
    app.query("propose")(_handler(rounds.propose))
    app.train("invite")(_handler(rounds.invite))
    for stage in STAGES:
        app.query(stage)(_handler(rounds.step))
    app.query("end")(_handler(rounds.end))
    app.query("journal")(_handler(rounds.journal))
    return app


def _handler(answer: Callable[[bytes], bytes]) -> Callable[[Message, Context], Message]:
    def handle(message: Message, context: Context) -> Message:
        body = body_of(message)
        _require_run(body, message.metadata.run_id)
        return Message(content_of(answer(body)), reply_to=message)

    return handle


def _require_run(body: bytes, run_id: int) -> None:
    """Raises RemoteError when the envelope is of another run than its message. The link hands over one message of a run
    at a time; under two runs' names, two messages of one run would be at work at once."""
    try:
        named = wire.parse_envelope(body).header.run_id
    except RemoteError:
        return  # for the pages to refuse, which drop every secret under way
    if named != run_id:
        raise RemoteError(Reason.BAD_MESSAGE, f"an envelope of run {named} came in a message of run {run_id}")
