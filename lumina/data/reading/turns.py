"""Who speaks in a conversation, by the names that files have for it, and which conversations are in order."""

from collections.abc import Iterable
from itertools import pairwise

from lumina.data.records import Turn

_NAMES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "person", "customer"),
    "assistant": ("assistant", "ai", "bot", "chatbot", "gpt", "chatgpt", "model", "agent"),
}
ALIASES = {name: role for role, names in _NAMES.items() for name in names}
TOOLS = {
    "tool",
    "tool_call",
    "tool_calls",
    "tool_response",
    "tool_result",
    "function",
    "function_call",
    "observation",
    "ipython",
}


class Fault(Exception):
    """What is wrong with a record, in the same words for each with the same fault."""


def role_of(name: str) -> str:
    """system, user or assistant. Raises Fault for a tool, which has no place in these conversations, and for other names."""
    name = name.strip().lower()
    if name in TOOLS:
        raise Fault("role tool")
    if name not in ALIASES:
        raise Fault("unknown role")
    return ALIASES[name]


def validated(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """`turns`: of user and assistant by turns, after at most one of the system, the last an answer.

    Raises:
        Fault: they are not, or one is empty.
    """
    turns = tuple(turns)
    if any(not turn.text.strip() for turn in turns):
        raise Fault("empty turn")
    spoken = [turn.role for turn in (turns[1:] if turns and turns[0].role == "system" else turns)]
    if "system" in spoken:
        raise Fault("system turn after the first")
    if not spoken:
        raise Fault("no turns")
    if spoken[0] != "user":
        raise Fault("begins with assistant")
    for before, role in pairwise(spoken):
        if before == role:
            raise Fault(f"two turns of {role} in a row")
    if spoken[-1] == "user":
        raise Fault("ends with user")
    return turns
