"""Records of many forms as documents: messages, question and answer, preference pairs, and plain text."""

from collections.abc import Mapping
from typing import Any

from lumina.conversation import ALIASES
from lumina.data.records import Document, Reject, Turn

TEXT_FIELDS = ("text", "content", "message", "body", "output")
MESSAGE_FIELDS = ("messages", "conversation", "conversations")


def document(value: Any, name: str, text_field: str = "") -> Document | Reject:
    """What a record says: a conversation, a preference or a text."""
    if not isinstance(value, Mapping):
        return Reject(name, "not an object")
    if not text_field:
        for field in MESSAGE_FIELDS:
            if field in value:
                turns = tuple(Turn(ALIASES[m["role"]], m["content"]) for m in value[field])
                return Document(name, turns=turns)
    for field in (text_field,) if text_field else TEXT_FIELDS:
        if field in value:
            text = value[field]
            return Document(name, text) if isinstance(text, str) else Reject(name, f"{field} not a string")
    return Reject(name, f"no field {text_field}" if text_field else "no text field")
