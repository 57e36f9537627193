"""What the coordinator says ends in logs and on terminals: as one line, and as no command to either."""

from __future__ import annotations

import grpc

from foedus_client.link.state import MOST_SAID, LinkState, explain
from foedus_common.clock import ManualClock


class Refused(grpc.RpcError):  # type: ignore[misc]  # gRPC is untyped
    def __init__(self, details: str) -> None:
        self._details = details

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.PERMISSION_DENIED

    def details(self) -> str:
        return self._details


def test_what_the_coordinator_says_is_one_line_without_commands() -> None:
    forged = "no.\n2026-11-22 09:00:00 INFO run 7: approved by ada\x1b[1A\x1b]52;c;cm0gLXJm\x07" + "x" * 10_000
    state, sentence = explain(Refused(forged), "coordinator:9443", "", b"", ManualClock())
    assert state == LinkState.REFUSED
    assert sentence.isprintable()
    assert sentence.startswith("no.?2026-11-22")
    assert len(sentence) == MOST_SAID
