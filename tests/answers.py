"""What a site keeps of its answers in one attempt, as its session would have it kept."""

from __future__ import annotations

from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.effects import Answered


def answered(attempt: m.AttemptId, sequence: int, message: m.FromSite, request: bytes = bytes(32)) -> Answered:
    """request: its SHA-256. The envelope's signature verifies under no key."""
    header = wire.Header(*attempt, bytes(32), "north", wire.COORDINATOR, sequence)
    return Answered(attempt, sequence, request, wire.build_envelope(header, message, lambda _: bytes(64)))
