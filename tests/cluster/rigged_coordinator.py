"""`foedus`, rigged (see `rigged`): places are where it is about to send the first request of a stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from foedus_common.link.contents import body_of
from foedus_server import cli
from foedus_server.link import SiteGrid
from rigged import pass_through

push_messages = SiteGrid.push_messages


def rigged(self: SiteGrid, messages: Iterable[Any]) -> list[str]:
    asked = list(messages)
    for message in asked:
        pass_through(body_of(message))
    return push_messages(self, asked)


if __name__ == "__main__":
    SiteGrid.push_messages = rigged  # type: ignore[method-assign]
    cli.main()
