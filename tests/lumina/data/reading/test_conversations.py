"""Records of many forms: what each becomes, and why some become nothing."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.reading import conversations
from lumina.data.reading.conversations import document, form
from lumina.data.reading.turns import ALIASES, TOOLS, Fault, role_of, validated
from lumina.data.records import Document, Reject, Turn


def turns(*texts, system=""):
    """Texts of user and assistant by turns."""
    first = [Turn("system", system)] if system else []
    return (*first, *(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)))


def messages(*pairs, role="role", content="content"):
    return [{role: who, content: text} for who, text in pairs]


ASKED = (("user", "a"), ("assistant", "b"))

CONVERSATIONS = {
    "messages": ({"messages": messages(*ASKED)}, turns("a", "b")),
    "ShareGPT": (
        {"id": "1", "conversations": messages(("human", "a"), ("gpt", "b"), role="from", content="value")},
        turns("a", "b"),
    ),
    "author": (
        {"conversation": [{"author": {"role": "prompter"}, "content": {"parts": ["a", "c"]}}, {"author": "AI ", "text": "b"}]},
        turns("ac", "b"),
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "!"}]},
                *messages(ASKED[1]),
            ]
        },
        turns("a!", "b"),
    ),
    "a list as JSON": ({"messages": json.dumps(messages(*ASKED))}, turns("a", "b")),
    "a list alone": (messages(*ASKED), turns("a", "b")),
    "system message": ({"messages": messages(("developer", "s"), *ASKED)}, turns("a", "b", system="s")),
    "system field": ({"messages": messages(*ASKED), "system": "s"}, turns("a", "b", system="s")),
    "Alpaca": ({"instruction": "a", "input": "x", "output": "b", "text": "all of it"}, turns("a\n\nx", "b")),
    "Alpaca without input": ({"instruction": "a", "input": "", "output": "b"}, turns("a", "b")),
    "Dolly": ({"instruction": "a", "context": "x", "response": "b", "category": "c"}, turns("a\n\nx", "b")),
    "prompt and response": ({"prompt": " a\n", "response": "  b"}, turns(" a\n", "  b")),
    "prompt and completion of messages": ({"prompt": messages(ASKED[0]), "completion": messages(ASKED[1])}, turns("a", "b")),
    "question and answer": ({"system_prompt": "s", "question": "a", "answer": "b"}, turns("a", "b", system="s")),
    "empty system field": ({"system_prompt": "", "question": "a", "answer": "b"}, turns("a", "b")),
    "input and output": ({"input": "a", "output": "b"}, turns("a", "b")),
}


FIELDS = ("chosen", "rejected", "chat", "prompt", "input", "output", "answer", "text")


def test_a_record_that_can_only_be_a_text_is_what_it_is_when_all_else_is_asked_first(monkeypatch):
    records = [
        dict(zip(fields, values, strict=True))
        for count in range(4)
        for fields in itertools.combinations(FIELDS, count)
        for values in itertools.product(["a", None, messages(*ASKED)], repeat=count)
    ]
    found = [document(record, "name") for record in records]
    monkeypatch.setattr(conversations, "TURNS_FIELDS", frozenset(FIELDS))
    assert [document(record, "name") for record in records] == found


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_of_each_form(name):
    value, expected = CONVERSATIONS[name]
    assert document(value, "f:1") == Document("f:1", turns=expected)
    assert form(value).startswith("conversations (")


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: d\n\nAssistant:"
PREFERENCES = {
    "strings": ({"prompt": "a", "chosen": "b", "rejected": "c"}, turns("a", "b"), turns("a", "c")),
    "with a system field": (
        {"system": "s", "question": "a", "chosen": "b", "rejected": "c"},
        turns("a", "b", system="s"),
        turns("a", "c", system="s"),
    ),
    "dialogues": (
        {"chosen": f"{HH} e\nf", "rejected": f"{HH} g"},
        turns("a", "b", "c: d", "e\nf"),
        turns("a", "b", "c: d", "g"),
    ),
    "lists with their prompt": (
        {"prompt": "a", "chosen": messages(*ASKED), "rejected": messages(ASKED[0], ("assistant", "c")), "messages": []},
        turns("a", "b"),
        turns("a", "c"),
    ),
    "lists after a prompt": (
        {"prompt": messages(ASKED[0]), "chosen": messages(ASKED[1]), "rejected": messages(("assistant", "c"))},
        turns("a", "b"),
        turns("a", "c"),
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_of_each_form(name):
    value, chosen, rejected = PREFERENCES[name]
    assert document(value, "f:1") == Document("f:1", turns=chosen, rejected=rejected)
    assert form(value) == "preferences (chosen, rejected)"


@pytest.mark.parametrize(
    ("value", "text_field", "text"),
    [
        ({"text": "a"}, "", "a"),
        ({"body": " a ", "n": 1}, "", " a "),
        ({"content": "b", "text": "a"}, "", "a"),
        ({"prompt": "x", "text": "a"}, "", "a"),
        ({"output": "a"}, "", "a"),
        ({"messages": messages(*ASKED), "story": "a"}, "story", "a"),
        ({"chosen": "x", "rejected": "y", "prompt": "a"}, "prompt", "a"),
        ({"text": "", "messages": None}, "", ""),
    ],
)
def test_a_text(value, text_field, text):
    assert document(value, "f:1", text_field) == Document("f:1", text)


def say(*roles):
    return {"messages": messages(*((role, "x") for role in roles))}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "not an object"),
        ("text", "not an object"),
        ([], "no turns"),
        ([3], "a list without messages"),
        ([{"role": "user", "content": "a"}, 3], "a message not an object"),
        ({"prompt": "a", "chosen": "b"}, "chosen without rejected"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "rejected without chosen"),
        ({}, "no text field"),
        ({"text": 3}, "text not a string"),
        ({"instruction": "a"}, "no text field"),
        ({"messages": []}, "no turns"),
        (say("system"), "no turns"),
        (say("assistant"), "begins with assistant"),
        (say("system", "assistant"), "begins with assistant"),
        (say("user"), "ends with user"),
        (say("user", "assistant", "user"), "ends with user"),
        (say("user", "user", "assistant"), "two turns of user in a row"),
        (say("user", "assistant", "assistant"), "two turns of assistant in a row"),
        (say("user", "system", "assistant"), "system turn after the first"),
        (say("system", "system", "user", "assistant"), "system turn after the first"),
        (say("user", "tool", "assistant"), "role tool"),
        (say("user", "Function"), "role tool"),
        ({"messages": [*messages(ASKED[0]), {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "role tool"),
        (say("user", "narrator"), "unknown role"),
        ({"messages": [{"content": "a"}]}, "a message without a role"),
        ({"messages": [{"role": 3, "content": "a"}]}, "a message without a role"),
        ({"messages": [{"role": "user"}]}, "a message without text"),
        ({"messages": [{"role": "user", "content": 3}]}, "a message without text"),
        ({"messages": ["a", "b"]}, "a message not an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a message with other parts than text"),
        ({"messages": "[{"}, "messages not JSON"),
        ({"messages": messages(("user", " \n"), ASKED[1])}, "empty turn"),
        ({"question": "a", "answer": ""}, "empty turn"),
        ({"chosen": "a", "rejected": "b"}, "chosen and rejected without a prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen the same as rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "empty turn"),
        ({"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen not a string"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "chosen and rejected answer different prompts",
        ),
        ({"chosen": HH + " e", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "chosen and rejected part at a question"),
        (
            {"chosen": HH + " e", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: e"},
            "chosen and rejected part at a question",
        ),
    ],
)
def test_a_record_that_is_nothing_has_a_kind(value, kind):
    assert document(value, "f:1") == Reject("f:1", kind)


def test_a_named_text_field_is_all_that_is_looked_at():
    assert document({"messages": messages(*ASKED)}, "f:1", "story") == Reject("f:1", "no field story")
    assert document({"story": 3, "text": "a"}, "f:1", "story") == Reject("f:1", "story not a string")


def test_roles_by_their_names():
    assert {name: role_of(name.upper()) for name in ALIASES} == ALIASES
    assert {"human", "prompter", "gpt", "bot", "ai"} <= ALIASES.keys()
    for name in TOOLS:
        with pytest.raises(Fault, match="role tool"):
            role_of(name)


@given(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=6))
def test_conversations_in_order_are_those_of_a_regular_expression(roles):
    import re

    said = [Turn(role, "x") for role in roles]
    if re.fullmatch("s?(ua)+", "".join(role[0] for role in roles)):
        assert validated(said) == tuple(said)
    else:
        with pytest.raises(Fault):
            validated(said)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "user", "a", "[{", "tool"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "prompt", "chosen", "rejected", "text", "from", "replies"]), inner
        )
    ),
    max_leaves=12,
)


@given(json_values, st.sampled_from(["", "text"]))
def test_any_json_is_a_document_or_a_reject(value, text_field):
    found = document(value, "f:1", text_field)
    assert isinstance(found, Document | Reject)
    assert isinstance(form(value, text_field), str)
    if isinstance(found, Document) and found.turns:
        assert validated(found.turns) == found.turns
