"""Our content inside Flower's messages: one record, `foedus`, with one opaque body. The shape is the same at both ends.

Beside the link and the apps, this is the only place that imports Flower; it uses the public `flwr.app` alone.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict

from foedus_common.errors import LocalError


def content_of(body: bytes) -> RecordDict:
    return RecordDict({"foedus": ConfigRecord({"body": body})})


def body_of(message: Message) -> bytes:
    """The opaque body.

    Raises:
        LocalError: the message is not one of ours, or it carries an error.
    """
    record = message.content.get("foedus") if message.has_content() else None
    body = record.get("body") if isinstance(record, ConfigRecord) else None
    if not isinstance(body, bytes):
        raise LocalError("A Flower message without our record `foedus` cannot travel over the link.")
    return body


def message_of(metadata: Metadata, content: RecordDict) -> Message:
    """A message with its metadata given whole: `Message(content, node, type)` would read Flower's process globals."""
    message: Message = Message(metadata=metadata, content=content)  # type: ignore[call-overload]  # not in its stubs
    return message


def context_of(run_id: int, node_id: int = 0) -> Context:
    """Flower's context of a run; ours carries the run's id and nothing else."""
    return Context(run_id=run_id, node_id=node_id, node_config={}, state=RecordDict(), run_config={})
