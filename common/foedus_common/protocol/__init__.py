"""Secure aggregation: the rules of one round, as pure state machines (docs/protocol.md)."""
