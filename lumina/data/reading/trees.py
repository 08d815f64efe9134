"""Trees of replies, as OpenAssistant publishes them, as conversations: of each tree the path of the best replies.

Every line is accounted for. In a file of messages a line is a turn of a conversation or a reject, many of a kind in
PASSED_OVER; in a file of whole trees a line is a conversation or a reject.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Union

from lumina.data.reading.turns import Fault, role_of
from lumina.data.recipe import Recipe
from lumina.data.records import Document, Reject, Turn

# Kinds of rejects of which nothing is wrong: of a good tree more messages are passed over than used.
DELETED, OFF_PATH, UNANSWERED, BEYOND = "deleted", "off the best path", "nobody answers", "beyond max_conversations"
PASSED_OVER = frozenset({DELETED, OFF_PATH, UNANSWERED, BEYOND})


class _Node(NamedTuple):
    """A message; its replies are not read yet where the record is a whole tree."""

    name: str
    role: str
    text: str
    deleted: bool
    rank: float  # 0 is best; infinite where nobody ranked it
    labels: float  # people who judged it
    replies: list[Union["_Node", Mapping[str, Any]]]


def is_tree(value: Mapping[str, Any]) -> bool:
    """Whether a record is a whole tree, or a message of one."""
    whole = isinstance(value.get("prompt"), Mapping) and "replies" in value["prompt"]
    return whole or {"message_id", "parent_id", "role", "text"} <= value.keys()


def trees(records: Iterable[tuple[str, Any]], recipe: Recipe) -> Iterator[Document | Reject]:
    """The conversations of a file, `recipe.max_conversations` at most, named after their first messages.

    Whole trees are read one by one. Of messages, whose order is free, all are held until the file ends.

    Args:
        records: the name and the value of each line, in order.
    """
    most = recipe.max_conversations
    taken = 0
    messages: dict[str, tuple[str, _Node]] = {}  # by their ids: the id of what they reply to, and they
    for name, value in records:
        try:
            if isinstance(value, Mapping) and isinstance(value.get("prompt"), Mapping):
                record = Reject(name, BEYOND) if 0 < most <= taken else _whole(name, value["prompt"])
                taken += isinstance(record, Document)
                yield record
                continue
            identity, parent, node = _message(name, value)
            if identity in messages:
                raise Fault("message_id twice")
            messages[identity] = parent, node
        except Fault as fault:
            yield Reject(name, str(fault))
    yield from _joined(messages, most)


def _whole(name: str, prompt: Mapping[str, Any]) -> Document | Reject:
    path = best_path(_node(name, prompt, prompt.get("replies")))
    return _document(path) if path else Reject(name, UNANSWERED)


def _document(path: list[_Node]) -> Document:
    return Document(path[0].name, turns=tuple(Turn(node.role, node.text) for node in path))


def _joined(messages: dict[str, tuple[str, _Node]], most: int) -> Iterator[Document | Reject]:
    """What the messages of a file make: tree by tree, then what hangs on none."""
    for parent, node in messages.values():
        if parent in messages:
            messages[parent][1].replies.append(node)
    taken = 0
    reached: set[str] = set()
    for parent, root in messages.values():
        if parent:
            continue
        path = [] if 0 < most <= taken else best_path(root)
        kind = BEYOND if 0 < most <= taken else OFF_PATH if path else UNANSWERED
        if path:
            taken += 1
            yield _document(path)
        used = {node.name for node in path}
        for node in _below(root):
            reached.add(node.name)
            if node.name not in used:
                yield Reject(node.name, DELETED if node.deleted else kind)
    for _, node in messages.values():
        if node.name not in reached:
            yield Reject(node.name, "a reply to no message of the file")


def best_path(root: _Node) -> list[_Node]:
    """From a user's first message along the best replies to the last answer; empty where there is none."""
    if root.role != "user" or root.deleted or not root.text.strip():
        return []
    path = [root]
    while best := _best(path[-1]):
        path.append(best)
    return path[: len(path) - len(path) % 2]  # they alternate, so that an answer is every second


def _best(node: _Node) -> _Node | None:
    """The reply of the best rank; of equal ranks that which most people judged, and of those the first."""
    replies = [each for each in map(_reply, node.replies) if each and not each.deleted and each.text.strip()]
    replies = [each for each in replies if {each.role, node.role} == {"user", "assistant"}]
    return min(replies, key=lambda each: (each.rank, -each.labels), default=None)


def _below(root: _Node) -> Iterator[_Node]:
    """The messages of a tree, each before its replies."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [each for each in reversed(node.replies) if isinstance(each, _Node)]


def _reply(value: _Node | Mapping[str, Any]) -> _Node | None:
    """A reply in a whole tree, whose own line has no name; None where it cannot be read."""
    if isinstance(value, _Node):
        return value
    try:
        return _node("", value, value.get("replies") if isinstance(value, Mapping) else None)
    except Fault:
        return None


def _message(name: str, value: Any) -> tuple[str, str, _Node]:
    """Its id, that of what it replies to or "", and the message."""
    node = _node(name, value, [])
    identity, parent = value.get("message_id"), value.get("parent_id")
    if not isinstance(identity, str) or not isinstance(parent, str | None):
        raise Fault("a message without message_id and parent_id")
    return identity, parent or "", node


def _node(name: str, value: Any, replies: Any) -> _Node:
    if not isinstance(value, Mapping):
        raise Fault("not an object")
    role, text = value.get("role"), value.get("text")
    if not isinstance(role, str):
        raise Fault("a message without a role")
    if not isinstance(text, str):
        raise Fault("a message without text")
    # As JSON or a table has them, or as csv spells them.
    deleted = str(value.get("deleted")).lower() == "true" or str(value.get("review_result")).lower() == "false"
    return _Node(
        name,
        role_of(role),
        text,
        deleted,
        _rank(value.get("rank")),
        _labels(value.get("labels")),
        replies if isinstance(replies, list) else [],
    )


def _rank(found: Any) -> float:
    try:
        rank = float(found)
    except (TypeError, ValueError):
        return math.inf
    return rank if rank >= 0 else math.inf


def _labels(labels: Any) -> float:
    """How many judgements a message has, in both forms that were published."""
    if not isinstance(labels, Mapping):
        return 0
    found = labels.get("count")
    counts = found if isinstance(found, list) else [each.get("count") for each in labels.values() if isinstance(each, Mapping)]
    return float(sum(count for count in counts if isinstance(count, int | float)))
