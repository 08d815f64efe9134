"""Conversations and preferences of docstrings: real, in order, the same each time."""

import ast
import hashlib
import inspect
import json
import os
import subprocess
import sys

import pytest

from lumina.data.reading import docstrings
from lumina.data.reading.docstrings import LEAST, MOST, conversations, definitions, preferences
from lumina.data.reading.embedded import stdlib_documents, stdlib_names
from lumina.data.reading.turns import validated
from lumina.data.records import Document, Turn, place

SOURCE = '''
import os
def plain(a, *, b: int = 2) -> str:
    """What plain does, with an ünusual letter."""
    return f"{a}{b}"  # {name}
class Owner(object):
    """A class that owns a method, and more."""
    @property
    def method(self):
        r"""A method's own documentation\\s.

        In two paragraphs.
        """
        def inner():
            """Inside of a function: nobody's affair."""
        return inner
    async def later(self): "Documented on its own line only."
    class Deep:
        def method(self):
            """A method of a class in a class."""
            pass
if os:
    def either():
        """The first of two definitions."""
        return 1
else:
    def either():
        """The second of two definitions."""
        return 2
def short():
    """Too short."""
def surrogate():
    """A lone surrogate: \\udc80 is no character."""
    return 1
def nothing():
    return 1
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of three files, one of which is no Python."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "bad.py").write_text("def (:", encoding="utf-8")
    long = "\n".join(f"    x = {i}" for i in range(500))
    (tmp_path / "long.py").write_text(f'def long():\n    """A function whose code is long."""\n{long}\n', encoding="utf-8")
    monkeypatch.setattr(docstrings, "stdlib_root", lambda: tmp_path)
    monkeypatch.setattr(docstrings, "stdlib_names", lambda: ["bad.py", "long.py", "package/__init__.py"])


@pytest.fixture(scope="module")
def made():
    read = list(definitions())  # once for both
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstrings, "definitions", lambda: iter(read))
        return list(conversations()), list(preferences())


def test_definitions_are_functions_methods_and_classes_with_what_they_say(library):
    found = {each.name: each for each in definitions()}
    assert list(found) == [
        "long.long",
        "package.plain",
        "package.Owner",
        "package.Owner.method",
        "package.Owner.later",
        "package.Owner.Deep.method",
        "package.either",
    ]
    assert found["package.plain"].file == SOURCE
    assert found["package.plain"]._replace(file="") == docstrings.Definition(
        "package.plain",
        "package",
        "function",
        "plain(a, *, b: int=2) -> str",
        'def plain(a, *, b: int = 2) -> str:\n    return f"{a}{b}"  # {name}',
        "What plain does, with an ünusual letter.",
    )
    assert found["package.Owner.method"].code == (
        'def method(self):\n    def inner():\n        """Inside of a function: nobody\'s affair."""\n    return inner'
    )
    assert found["package.Owner.method"].text == "A method's own documentation\\s.\n\nIn two paragraphs."
    assert found["package.either"].text == "The first of two definitions."
    assert [each.kind for each in found.values()] == ["function", "function", "class", "method", "method", "method", "function"]
    assert found["package.Owner.later"].code == found["long.long"].code == ""


def test_the_library_makes_thousands_of_conversations_in_order(made):
    talks, _ = made
    assert len(talks) > 5000
    assert len({each.name for each in talks}) == len(talks)
    for each in talks:
        assert validated(each.turns) == each.turns
    roles = {tuple(turn.role for turn in each.turns) for each in talks}
    ask = ("user", "assistant")
    assert roles == {ask, ask * 2, ("system", *ask), ("system", *ask * 2)}
    assert sum(each.turns[0].role == "system" for each in talks) / len(talks) == pytest.approx(0.25, abs=0.03)


def test_answers_are_the_docstrings_of_the_running_library(made):
    talks, pairs = made
    for name, owner in (("json.loads", json.loads), ("ast.walk", ast.walk), ("inspect.getdoc", inspect.getdoc)):
        (talk,) = [each for each in talks if each.name == f"docstrings:{name}"]
        (pair,) = [each for each in pairs if each.name == f"preferences:{name}"]
        assert any(inspect.getdoc(owner) in turn.text for turn in talk.turns)
        assert pair.turns[-1] == Turn("assistant", inspect.getdoc(owner))
        assert name.rsplit(".")[-1] in talk.text


def test_preferences_reject_another_answer_to_the_same_question(made):
    talks, pairs = made
    assert [each.name.replace("preferences:", "docstrings:") for each in pairs] == [each.name for each in talks]
    own = [each.turns[-1].text for each in pairs]
    known, ratios, others = set(own), [], 0
    for each in pairs:
        assert validated(each.turns)
        assert validated(each.rejected)
        assert each.turns[:-1] == each.rejected[:-1]
        chosen, rejected = each.turns[-1].text, each.rejected[-1].text
        assert chosen != rejected
        others += rejected in known
        ratios += [len(rejected) / len(chosen)] if rejected in known else []
        assert LEAST <= len(chosen) <= MOST
    assert others / len(pairs) == pytest.approx(0.75, abs=0.03)
    assert sorted(ratios)[len(ratios) // 20] > 0.85
    assert sorted(ratios)[-len(ratios) // 20] < 1.15


def test_a_file_is_on_one_side_of_a_split_and_so_are_wrong_answers(made):
    talks, pairs = made
    assert all(talk.place == pair.place for talk, pair in zip(talks, pairs, strict=True))
    files = {place(document.text) for document in stdlib_documents(stdlib_names()) if isinstance(document, Document)}
    assert {each.place for each in talks} <= files
    sides = {}  # of each right answer, those of the questions that it is for
    for each in pairs:
        sides.setdefault(each.turns[-1].text, set()).add(each.place < 0.02)
    for each in pairs:
        if each.rejected[-1].text in sides:
            assert (each.place < 0.02) in sides[each.rejected[-1].text]
    assert 0.002 < sum(each.place < 0.02 for each in talks) / len(talks) < 0.06


def test_another_process_with_other_hashing_makes_the_same_and_imports_nothing(made):
    script = (
        "import hashlib, sys; from lumina.data.reading.docstrings import preferences; "
        "print(hashlib.sha256(repr(list(preferences())).encode()).hexdigest(), *sys.modules.keys() & {'this', 'antigravity'})"
    )
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    assert told.stdout.strip() == hashlib.sha256(repr(made[1]).encode()).hexdigest()
