"""Conversations and preferences made of the docstrings of the running Python's library, which is parsed and never imported.

What is asked of a function, and in which words, is decided by the sha256 of its name: the same on every machine that has the
same library. What is asked of one docstring is a group, so that the held-out side is of functions that nobody has asked about.
"""

import ast
import hashlib
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lumina.data.reading.embedded import stdlib_names, stdlib_root
from lumina.data.records import Document, Turn, place

LEAST, MOST = 20, 2000  # characters of a docstring; shorter ones say nothing, longer ones fill a row of a small model
LONGEST_CODE = 1500  # characters of a function that is shown whole
SIDES = 50  # parts of [0, 1) in which wrong answers stay: any split of whole fiftieths keeps them apart
GARBLED = 4  # one preference in so many has a damaged docstring rejected, the others that of another function

SYSTEM = (
    "You answer questions about Python's standard library.",
    "You are a careful Python programmer.",
    "Explain the Python standard library briefly and exactly.",
)
WHAT = (
    "What does `{name}` do?",
    "What is `{name}` for?",
    "Explain `{name}` from Python's standard library.",
    "I found `{name}` in some code. What is it?",
    "Give me the documentation of `{name}`.",
)
WRITE = (
    "Write a docstring for this {kind}:\n\n```python\n{code}\n```",
    "Document this {kind} of the module `{module}`.\n\n```python\n{code}\n```",
    "What does this {kind} do?\n\n```python\n{code}\n```",
)
SIGNATURE = ("What is the signature of `{name}`?", "How is `{name}` called?", "Which arguments does `{name}` take?")
THEN = ("And what does it do?", "What is it for?", "Explain it.")
WHERE = (
    "Which {kind} of `{module}` has this documentation?\n\n{text}",
    "Name the {kind} in `{module}` that does this:\n\n{text}",
)


Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Definition(NamedTuple):
    """A function, method or class, and what it says of itself."""

    name: str  # json.JSONEncoder.encode
    module: str
    kind: str  # function, method or class
    signature: str  # as in its source: encode(self, o)
    code: str  # without the docstring; empty where it is long or is a class
    text: str  # the docstring
    file: str = ""  # what its file says: a file is on one side of the held-out split, also as a document of `stdlib`

    @property
    def number(self) -> int:
        """A number that its name alone decides, for choices."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")


def definitions() -> Iterator[Definition]:
    """What the library defines and documents, in the order of its files and lines; the first of a name."""
    root = stdlib_root()
    for path in stdlib_names():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        try:
            with tokenize.open(root / path) as file:  # decodes as the coding cookie says
                source = file.read()
            found = list(_of_module(module, source))
        except (SyntaxError, ValueError):  # what tools keep for other Pythons; `stdlib` counts what is not in its encoding
            continue
        yield from (each._replace(file=source) for each in found)


def conversations() -> Iterator[Document]:
    """A conversation of one or two rounds about each definition, some after a system turn."""
    for definition in definitions():
        yield Document(f"docstrings:{definition.name}", turns=_conversation(definition), group=definition.file)


def preferences() -> Iterator[Document]:
    """For each definition a question, its docstring as the chosen answer, and a wrong or damaged one that is rejected."""
    found = list(definitions())
    sides: dict[int, list[Definition]] = {}  # nobody's answer is held out where it is another's wrong one
    for definition in sorted(found, key=lambda each: (len(each.text), each.number)):
        sides.setdefault(int(place(definition.file) * SIDES), []).append(definition)
    at = {each.name: (side, i) for side in sides.values() for i, each in enumerate(side)}
    for definition in found:
        asked = _asked(definition)
        rejected = _damaged(definition) if definition.number % GARBLED == 0 else _another(*at[definition.name])
        chosen, wrong = ((*asked, Turn("assistant", text)) for text in (definition.text, rejected))
        yield Document(f"preferences:{definition.name}", turns=chosen, rejected=wrong, group=definition.file)


# ----------------------------------------------------------------------------------------------------------- questions


def _pick(choices: Sequence[str], number: int) -> str:
    return choices[number % len(choices)]


def _system(number: int) -> list[Turn]:
    """One conversation in four begins with a system turn."""
    return [Turn("system", _pick(SYSTEM, number // 4))] if number % 4 == 0 else []


def _conversation(definition: Definition) -> tuple[Turn, ...]:
    form, number = definition.number % 4, definition.number // 4
    words = number // 64
    documentation, signature = definition.text, f"`{definition.signature}`"
    if form == 0 and definition.code:
        rounds = [(_pick(WRITE, words), documentation)]
    elif form == 1 and definition.signature:
        rounds = [(_pick(SIGNATURE, words), signature), (_pick(THEN, words // 8), documentation)]
    elif form == 2:
        rounds = [(_pick(WHERE, words), f"`{definition.name}`")]
        rounds += [(_pick(SIGNATURE, words // 8), signature)] if definition.signature else []
    else:
        rounds = [(_pick(WHAT, words), documentation)]
    return (*_system(number), *(turn for question, answer in rounds for turn in _round(question, answer, definition)))


def _round(question: str, answer: str, definition: Definition) -> tuple[Turn, Turn]:
    return Turn("user", question.format(**definition._asdict())), Turn("assistant", answer)


def _asked(definition: Definition) -> tuple[Turn, ...]:
    number = definition.number // GARBLED
    form = WRITE if definition.code and number % 2 else WHAT
    return (*_system(number // 2), Turn("user", _pick(form, number // 128).format(**definition._asdict())))


def _another(by_length: list[Definition], own_place: int) -> str:
    """The docstring of near length that another definition has, of those before and after it in turn."""
    own = by_length[own_place].text
    for distance in range(1, len(by_length)):
        for other in (own_place + distance, own_place - distance):
            if 0 <= other < len(by_length) and by_length[other].text != own:
                return by_length[other].text
    return _damaged(by_length[own_place])


def _damaged(definition: Definition) -> str:
    """The docstring with its words in reverse order, or cut off in its middle."""
    words = definition.text.split(" ")
    if definition.number // GARBLED % 2 and words != words[::-1]:
        return " ".join(reversed(words))
    return definition.text[: len(definition.text) // 2].rstrip()


# ----------------------------------------------------------------------------------------------------------- sources


def _of_module(module: str, source: str) -> Iterator[Definition]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that will be errors one day
        body = ast.parse(source).body
    lines = source.split("\n")
    seen = set()
    for owners, node in _defined(body):
        name = ".".join((module, *owners, node.name))
        text = ast.get_docstring(node) or ""
        if name not in seen and LEAST <= len(text) <= MOST and _is_utf8(text):
            seen.add(name)
            yield _definition(name, module, bool(owners), node, lines, text)


def _defined(body: list[ast.stmt], owners: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Defined]]:
    """Functions and classes, with the classes that they are in; what is inside of a function is its own affair."""
    for node in body:
        if isinstance(node, Defined):
            yield owners, node
        if isinstance(node, ast.ClassDef):
            yield from _defined(node.body, (*owners, node.name))
        elif isinstance(node, ast.If | ast.Try):
            handlers = node.handlers if isinstance(node, ast.Try) else []
            yield from _defined([*node.body, *(each for handler in handlers for each in handler.body), *node.orelse], owners)


def _definition(name: str, module: str, owned: bool, node: Defined, lines: list[str], text: str) -> Definition:
    if isinstance(node, ast.ClassDef):
        return Definition(name, module, "class", "", "", text)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"{node.name}({ast.unparse(node.args)}){returns}"
    return Definition(name, module, "method" if owned else "function", signature, _code(node, lines), text)


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The function without its docstring, to the left; empty where nothing else is in it, or too much."""
    docstring, *others = node.body
    if not others or others[0].lineno <= (docstring.end_lineno or 0) or docstring.lineno <= node.lineno:
        return ""
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    code = textwrap.dedent("\n".join(kept)).strip()
    return code if len(code) <= LONGEST_CODE and _is_utf8(code) else ""


def _is_utf8(text: str) -> bool:
    try:
        return "\0" not in text and bool(text.encode())
    except UnicodeEncodeError:
        return False
