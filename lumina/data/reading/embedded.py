"""Sources that need no file: the running Python's library, and a seeded grammar of small programs."""

import hashlib
import os
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lumina.data.records import Document, Reject
from lumina.errors import DataError

SYNTHETIC_DOCUMENTS = 2000
# Installed packages differ from machine to machine, and tests hold files that are broken on purpose.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_names() -> list[str]:
    """The library's files, sorted, relative to `stdlib_root()`. Raises DataError where it has none."""
    root = stdlib_root()
    found = []
    for directory, children, names in os.walk(root):
        children[:] = [child for child in children if child not in NOT_STDLIB]
        here = Path(directory).relative_to(root)
        found += [(here / name).as_posix() for name in names if name.endswith(".py")]
    if not found:
        raise DataError(f"data.source = 'stdlib': {root} has no .py files; use synthetic, or files of your own")
    return sorted(found)


def stdlib_digest(names: Sequence[str]) -> bytes:
    """sha256 over the names and contents of those files."""
    digest, root = hashlib.sha256(b"stdlib"), stdlib_root()
    for name in names:
        with open(root / name, "rb") as file:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def stdlib_documents(names: Sequence[str]) -> Iterator[Document | Reject]:
    """A document a file."""
    root = stdlib_root()
    for name in names:
        try:
            with tokenize.open(root / name) as file:  # decodes as the coding cookie says
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            yield Reject(name, "not in its declared encoding")
        else:
            yield Document(name, text)


def synthetic_digest() -> bytes:
    """sha256 over the documents."""
    digest = hashlib.sha256(b"synthetic")
    for document in synthetic_documents():
        digest.update(document.plain.encode("utf-8") + b"\0")
    return digest.digest()


def synthetic_documents() -> Iterator[Document]:
    """Small functions and their values: the same text on every machine and Python."""
    # random() is the one method whose sequence Python promises never to change.
    rng = random.Random(0)  # noqa: S311

    def draw(count: int) -> int:
        return int(rng.random() * count)

    for number in range(SYNTHETIC_DOCUMENTS):
        yield Document(f"synthetic/{number}", _program(draw))


_VERBS = "add average balance bound clip combine count find join measure merge mix move price scale shift sort split sum trim"
_NOUNS = (
    "apples boxes chairs days edges files grams hours items jars keys lines miles notes orders pages roads steps trees words"
)
_SIGNS = (("+", "sum"), ("-", "difference"), ("*", "product"))


def _program(draw: Callable[[int], int]) -> str:
    verbs, nouns = _VERBS.split(), _NOUNS.split()
    verb, noun, other = verbs[draw(len(verbs))], nouns[draw(len(nouns))], nouns[draw(len(nouns))]
    (sign, called), bias = _SIGNS[draw(3)], draw(100)
    lines = [
        f"def {verb}_{noun}(first, {other}):",
        f'    """{verb.capitalize()} {noun}: the {called} of first and {other}, plus {bias}."""',
        f"    return first {sign} {other} + {bias}",
        "",
    ]
    for _ in range(2 + draw(7)):
        x, y = draw(100), draw(100)
        value = {"+": x + y, "-": x - y, "*": x * y}[sign] + bias
        lines.append(f"{verb}_{noun}({x}, {y}) == {value}")
    return "\n".join(lines) + "\n"
