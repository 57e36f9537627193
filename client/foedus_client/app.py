"""A site as a Flower ClientApp: message types on one side, the pages of `round` on the other."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from foedus_client.round import SiteRounds
from foedus_common.link.contents import body_of, content_of

STAGES = ("keys", "shares", "mask", "survivors", "unmask")


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
        return Message(content_of(answer(body_of(message))), reply_to=message)

    return handle
