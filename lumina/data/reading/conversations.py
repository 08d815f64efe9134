"""Records of many forms as documents: messages, question and answer, preference pairs, and plain text.

Texts are taken as they are, but for the blank lines around each turn of a dialogue in one string.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from lumina.data.reading.trees import PASSED_OVER, is_tree, trees
from lumina.data.reading.turns import Fault, role_of, validated
from lumina.data.records import Document, Reject, Turn

__all__ = ["PASSED_OVER", "TEXT_FIELDS", "document", "form", "is_tree", "trees"]

TEXT_FIELDS = ("text", "content", "message", "body", "output")
MESSAGE_FIELDS = ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns")
QUESTION_FIELDS = ("instruction", "prompt", "question", "query")
CONTEXT_FIELDS = ("input", "context")  # what an instruction is about, below it
ANSWER_FIELDS = ("output", "response", "completion", "answer")
SYSTEM_FIELDS = ("system", "system_prompt")
TURNS_FIELDS = frozenset({"chosen", *MESSAGE_FIELDS, *ANSWER_FIELDS})  # a record without any of them is a text
ROLE_KEYS, TEXT_KEYS = ("role", "from", "author", "speaker"), ("content", "value", "text", "message")

_DIALOGUE = re.compile(r"(?:^|\n\n)(Human|Assistant):")  # how a whole conversation is one string in Anthropic's pairs


def document(value: Any, name: str, text_field: str = "") -> Document | Reject:
    """What a record says: a preference, a conversation or a text, whichever its fields make in this order.

    Args:
        value: of a line of JSON, a row of a table: fields by name, or the list of a conversation's messages.
        name: what errors and reports call it.
        text_field: the field that holds its text, which then is a text and nothing else.
    """
    try:
        if isinstance(value, list):
            if value and not any(isinstance(message, Mapping) for message in value):
                raise Fault("a list without messages")
            return Document(name, turns=validated(_messages(value)))
        if not isinstance(value, Mapping):
            raise Fault("not an object")
        return _document(value, name, text_field)
    except Fault as fault:
        return Reject(name, str(fault))


def form(value: Any, text_field: str = "") -> str:
    """How `document` reads such a record, in words: what is told of a file by its first record."""
    if isinstance(value, list):
        return "conversations (lists of messages)"
    if not isinstance(value, Mapping):
        return "no objects"
    if is_tree(value):
        return "conversations (trees of replies)"
    if text_field:
        return f"texts ({text_field})"
    if _is_preference(value):
        return "preferences (chosen, rejected)"
    if field := _messages_field(value):
        return f"conversations ({field})"
    if pair := _pair(value):
        return f"conversations ({', '.join(pair)})"
    field = next((field for field in TEXT_FIELDS if field in value), "")
    return f"texts ({field})" if field else _no_text(value)


# ----------------------------------------------------------------------------------------------------------- records


def _document(value: Mapping[str, Any], name: str, text_field: str) -> Document:
    if text_field:
        return _text(value, name, (text_field,))
    if TURNS_FIELDS.isdisjoint(value):
        return _text(value, name, TEXT_FIELDS)
    if _is_preference(value):
        return _preference(value, name)
    if field := _messages_field(value):
        return Document(name, turns=validated([*_system(value), *_messages(value[field])]))
    if pair := _pair(value):
        question, answer = (_said(value[field], field) for field in pair)
        return Document(name, turns=validated([*_system(value), *_asked(value, question), *_answered(answer)]))
    return _text(value, name, TEXT_FIELDS)


def _text(value: Mapping[str, Any], name: str, fields: tuple[str, ...]) -> Document:
    for field in fields:
        if field in value:
            if isinstance(value[field], str):
                return Document(name, value[field])
            raise Fault(f"{field} not a string")
    raise Fault(_no_text(value) if fields is TEXT_FIELDS else f"no field {fields[0]}")


def _no_text(value: Mapping[str, Any]) -> str:
    """Why a record without a field for its text cannot be used: half a preference is none."""
    sides = [side for side in ("chosen", "rejected") if value.get(side) is not None]
    return f"{sides[0]} without {'rejected' if sides == ['chosen'] else 'chosen'}" if sides else "no text field"


def _messages_field(value: Mapping[str, Any]) -> str:
    return next((field for field in MESSAGE_FIELDS if _is_messages(value.get(field))), "")


def _is_messages(found: Any) -> bool:
    """Whether a field holds messages: a list, or in a table of strings a list as JSON."""
    return isinstance(found, list) or (isinstance(found, str) and found.lstrip()[:2] == "[{")


def _pair(value: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of a question and of its answer."""
    question = next((field for field in QUESTION_FIELDS if isinstance(value.get(field), str | list)), "")
    answer = next((field for field in ANSWER_FIELDS if isinstance(value.get(field), str | list)), "")
    if not question and answer == "output" and isinstance(value.get("input"), str):
        question = "input"
    return (question, answer) if question and answer else None


def _system(value: Mapping[str, Any]) -> list[Turn]:
    found = next((value[field] for field in SYSTEM_FIELDS if isinstance(value.get(field), str)), "")
    return [Turn("system", found)] if found.strip() else []  # a column that is empty where there is none


def _said(found: Any, field: str) -> str | list[Turn]:
    """A text, or the turns of a list of messages or of a dialogue in one string."""
    if _is_messages(found):
        return _messages(found)
    if not isinstance(found, str):
        raise Fault(f"{field} not a string")
    return _dialogue(found) or found


def _asked(value: Mapping[str, Any], question: str | list[Turn]) -> list[Turn]:
    if isinstance(question, list):
        return question
    context = next((value[field] for field in CONTEXT_FIELDS if isinstance(value.get(field), str)), "")
    return [Turn("user", f"{question}\n\n{context}" if context.strip() and context != question else question)]


def _answered(answer: str | list[Turn]) -> list[Turn]:
    return answer if isinstance(answer, list) else [Turn("assistant", answer)]


def _dialogue(text: str) -> list[Turn]:
    """The turns of "\\n\\nHuman: ... \\n\\nAssistant: ..."; none in any other text."""
    if not text.lstrip().startswith(("Human:", "Assistant:")):
        return []
    parts = _DIALOGUE.split("\n\n" + text.lstrip())
    return [Turn(role_of(who), said.strip()) for who, said in zip(parts[1::2], parts[2::2], strict=True)]


# ---------------------------------------------------------------------------------------------------------- messages


def _messages(found: Any) -> list[Turn]:
    """The turns of messages, whatever their keys are called. Raises Fault for one that has no role or no text."""
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise Fault("messages not JSON") from error
    if not found:
        raise Fault("no turns")
    return [_message(message) for message in found]


def _message(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise Fault("a message not an object")
    role = next((message[key] for key in ROLE_KEYS if message.get(key) is not None), None)
    if isinstance(role, Mapping):  # author: {"role": ...}
        role = role.get("role")
    if not isinstance(role, str):
        raise Fault("a message without a role")
    role = role_of(role)
    content = next((message[key] for key in TEXT_KEYS if message.get(key) is not None), None)
    if content is None and (message.get("tool_calls") or message.get("function_call")):
        raise Fault("role tool")
    return Turn(role, _content(content))


def _content(content: Any) -> str:
    """A string, or its parts, of which each must be text: an image between them would be lost."""
    if isinstance(content, Mapping) and isinstance(content.get("parts"), list):
        content = content["parts"]
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else part for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise Fault("a message with other parts than text")
        return "".join(map(str, parts))
    if not isinstance(content, str):
        raise Fault("a message without text")
    return content


# ------------------------------------------------------------------------------------------------------- preferences


def _is_preference(value: Mapping[str, Any]) -> bool:
    return value.get("chosen") is not None and value.get("rejected") is not None


def _preference(value: Mapping[str, Any], name: str) -> Document:
    """Two conversations that are the same up to an answer."""
    chosen, rejected = (validated(_side(value, field)) for field in ("chosen", "rejected"))
    if chosen == rejected:
        raise Fault("chosen the same as rejected")
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    if not any(turn.role == "user" for turn in chosen[:same]):
        raise Fault("chosen and rejected answer different prompts")
    if same == min(len(chosen), len(rejected)) or chosen[same].role != "assistant":
        raise Fault("chosen and rejected part at a question")
    return Document(name, turns=chosen, rejected=rejected)


def _side(value: Mapping[str, Any], field: str) -> list[Turn]:
    turns = _answered(_said(value[field], field))
    if turns[0].role != "assistant":  # it says the prompt itself
        return turns if turns[0].role == "system" else [*_system(value), *turns]
    prompt = next((each for each in QUESTION_FIELDS if isinstance(value.get(each), str | list)), "")
    if not prompt:
        raise Fault("chosen and rejected without a prompt")
    return [*_system(value), *_asked(value, _said(value[prompt], prompt)), *turns]
