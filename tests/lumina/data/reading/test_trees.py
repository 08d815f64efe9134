"""Trees of replies: the path that is taken, and an account of every line."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.reading.trees import BEYOND, DELETED, OFF_PATH, PASSED_OVER, UNANSWERED, is_tree, trees
from lumina.data.recipe import Recipe
from lumina.data.records import Document, Reject, Turn

ROLES = ("prompter", "assistant")


def message(number, parent=None, depth=0, **others):
    return {
        "message_id": f"m{number}",
        "parent_id": None if parent is None else f"m{parent}",
        "role": ROLES[depth % 2],
        "text": f"text {number}",
        **others,
    }


def read(messages, **options):
    return list(trees(((f"f:{i}", each) for i, each in enumerate(messages, 1)), Recipe(**options)))


def said(*numbers):
    return tuple(Turn(("user", "assistant")[i % 2], f"text {number}") for i, number in enumerate(numbers))


TREE = [
    message(0),
    message(1, 0, 1, rank=1),
    message(2, 0, 1, rank=0, deleted=True),
    message(3, 0, 1, rank=0),
    message(4, 3, 2, labels={"quality": {"count": 1}, "spam": {"count": 1}}),
    message(5, 3, 2, labels={"name": ["quality"], "value": [1], "count": [3]}),
    message(6, 5, 3),
    message(7, 5, 3),
    message(8, 6, 4),
]


def test_the_best_path_is_of_ranks_then_labels_then_order():
    found = read(TREE)
    assert found[0] == Document("f:1", turns=said(0, 3, 5, 6))
    assert {each.name: each.kind for each in found[1:]} == {
        "f:2": OFF_PATH,
        "f:3": DELETED,
        "f:5": OFF_PATH,
        "f:8": OFF_PATH,
        "f:9": OFF_PATH,  # a question that nobody answers
    }


def nested(messages):
    """The same as one record."""
    by_id = {each["message_id"]: {**each, "replies": []} for each in messages}
    for each in messages:
        if each["parent_id"]:
            by_id[each["parent_id"]]["replies"].append(by_id[each["message_id"]])
    return {"message_tree_id": "m0", "prompt": by_id["m0"]}


def test_a_whole_tree_on_one_line_gives_the_same():
    assert read([nested(TREE), nested(TREE[:1])]) == [Document("f:1", turns=said(0, 3, 5, 6)), Reject("f:2", UNANSWERED)]


def test_ranks_and_deletions_are_known_as_csv_spells_them():
    found = read([{key: "" if value is None else str(value) for key, value in each.items()} for each in TREE])
    assert found[0] == Document("f:1", turns=said(0, 3))  # of labels nothing is known there, so that 4 is taken


def test_what_is_a_tree():
    assert is_tree(TREE[0])
    assert is_tree(nested(TREE))
    assert not is_tree({"prompt": "a", "replies": []})
    assert not is_tree({"text": "a", "role": "user"})


def test_no_more_conversations_than_asked_for_are_taken():
    first, second, third = ([message(n, depth=0), message(n + 1, n, 1)] for n in (10, 20, 30))
    for records in (
        [*first, *second, *third],
        [{"prompt": {**each[0], "replies": each[1:]}} for each in (first, second, third)],
    ):
        found = read(records, max_conversations=2)
        assert [each.turns for each in found if isinstance(each, Document)] == [said(10, 11), said(20, 21)]
        assert {each.kind for each in found if isinstance(each, Reject)} == {BEYOND}


def test_lines_that_hang_on_no_tree_or_are_no_messages_are_rejected():
    loop = [message(1, 2, 1), message(2, 1)]
    broken = [3, {"message_id": "x", "parent_id": None, "role": "user"}, message(0), message(3, depth=0) | {"role": "tool"}]
    found = read([message(0), message(4, 9, 1), *loop, *broken])
    assert {each.name: each.kind for each in found} == {
        "f:1": UNANSWERED,
        "f:2": "a reply to no message of the file",
        "f:3": "a reply to no message of the file",
        "f:4": "a reply to no message of the file",
        "f:5": "not an object",
        "f:6": "a message without text",
        "f:7": "message_id twice",
        "f:8": "role tool",
    }


def test_deleted_roots_and_empty_replies_are_passed_over():
    found = read([message(0, deleted=True), message(1, 0, 1), message(2), message(3, 2, 1, text=" "), message(4, 2, 1)])
    assert [each for each in found if isinstance(each, Document)] == [Document("f:3", turns=said(2, 4))]
    assert {each.name: each.kind for each in found if isinstance(each, Reject)} == {
        "f:1": DELETED,
        "f:2": UNANSWERED,
        "f:4": OFF_PATH,
    }


parents = st.lists(st.tuples(st.integers(-1, 12), st.booleans(), st.integers(0, 2)), max_size=13)


@given(parents, st.integers(0, 3), st.integers(0, 5))
@settings(max_examples=150)
def test_every_line_is_a_turn_or_a_reject_whatever_the_order(parents, most, seed):
    depth, messages = {}, []
    for number, (parent, deleted, rank) in enumerate(parents):
        known = parent if parent in depth else None
        depth[number] = 0 if known is None else depth[known] + 1
        messages.append(message(number, known, depth[number], deleted=deleted, rank=rank))
    random.Random(seed).shuffle(messages)
    found = read(messages, max_conversations=most)
    used = [turn.text for each in found if isinstance(each, Document) for turn in each.turns]
    passed = [each for each in found if isinstance(each, Reject)]
    assert len(used) + len(passed) == len(messages)
    assert len({each.name for each in passed}) == len(passed)
    assert {each.kind for each in passed} <= PASSED_OVER
    assert not most or sum(isinstance(each, Document) for each in found) <= most


def test_a_very_deep_tree_is_walked_without_recursion():
    chain = [message(n, n - 1 if n else None, n) for n in range(5000)]
    (found,) = read(chain)
    assert len(found.turns) == 5000
