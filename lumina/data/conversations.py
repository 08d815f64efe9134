"""Records as people keep them -> documents."""

from typing import Any

from lumina.data.records import Document, Reject

TEXT_FIELDS = ("text", "content", "message", "body", "output")


def document(value: dict[str, Any], name: str, text_field: str) -> Document | Reject:
    """The document that a record holds, or why it holds none. `text_field` "" takes the first of TEXT_FIELDS that is there."""
    for field in (text_field,) if text_field else TEXT_FIELDS:
        if field in value:
            text = value[field]
            return Document(name, text) if isinstance(text, str) else Reject(name, f"{field} not a string")
    return Reject(name, f"no field {text_field}" if text_field else "no text field")
