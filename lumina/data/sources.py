"""Where documents come from: the standard library, a synthetic grammar, .txt and .jsonl files.

A record that cannot be a document is counted, named and skipped. Which documents are held out is decided by the hash of
their text alone, so it depends neither on their order nor on what else is in the corpus.
"""

import glob
import hashlib
import json
import os
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from lumina.config import DataConfig
from lumina.errors import DataError

TEXT_FIELDS = ("text", "content", "message", "body", "output")
EXAMPLES_PER_KIND = 3
SYNTHETIC_DOCUMENTS = 2000
# Installed packages differ from machine to machine, and tests hold files that are broken on purpose.
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

# What a part of a source yields: the record's name, its text, and why it is rejected ("" when it is not).
Record = tuple[str, str, str]


@dataclass(frozen=True)
class Document:
    """One text, with the name that errors use for it."""

    name: str
    text: str


@dataclass
class Rejects:
    """Records that could not be read as documents: how many of each kind, and the first few of each by name."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, kind: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if self.counts[kind] <= EXAMPLES_PER_KIND:
            self.examples.append(f"{name}: {kind}")

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        total = sum(self.counts.values())
        return f"{total} record{'s' if total > 1 else ''} rejected: {kinds}; such as {'; '.join(self.examples)}"


def place(text: str) -> float:
    """Where a document falls in [0, 1), by the sha256 of its text; below `data.held_out` it is held out."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: exact in a float


class Source:
    """Documents in a fixed order. `rejects` describes the latest iteration, once that has ended."""

    def __init__(self, spec: str, parts: "list[_Part]"):
        self.spec = spec
        self.rejects = Rejects()
        self._parts = parts

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over what the parts hold, wherever their files lie."""
        digest = hashlib.sha256()
        for part in self._parts:
            with _readable(self.spec):
                digest.update(part.digest())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        self.rejects = Rejects()
        for part in self._parts:
            with _readable(self.spec):
                for name, text, kind in part.records():
                    kind = kind or _unusable(text)
                    if kind:
                        self.rejects.add(name, kind)
                    else:
                        yield Document(name, text)


def open_source(data: DataConfig) -> Source:
    """The documents that `data.source` names: comma-separated stdlib, synthetic, .txt and .jsonl files and globs.

    Raises:
        DataError: a file is missing, cannot be read, is of another kind or is named twice; or a glob matches nothing.
    """
    parts: dict[str, _Part] = {}
    for spec in filter(None, (spec.strip() for spec in data.source.split(","))):
        for name in [spec] if spec in ("stdlib", "synthetic") else _files(spec):
            identity = os.path.realpath(name)
            if identity in parts:
                raise DataError(f"data.source = {data.source!r}: names {name} twice; name it once")
            parts[identity] = _part(name, data.text_field)
    if not parts:
        raise DataError(f"data.source = {data.source!r}: names nothing; use stdlib, synthetic, or .txt and .jsonl files")
    return Source(data.source, list(parts.values()))


def _files(spec: str) -> list[str]:
    spec = os.path.expanduser(spec)
    names = [spec] if os.path.exists(spec) else [name for name in glob.glob(spec, recursive=True) if os.path.isfile(name)]
    if not names:
        what = "no file matches" if glob.has_magic(spec) else "no such file"
        raise DataError(f"data.source: {spec}: {what}; use stdlib, synthetic, or .txt and .jsonl files such as texts/*.jsonl")
    for name in names:
        if os.path.isdir(name):
            raise DataError(f"data.source: {name}: is a directory; name its files, such as {os.path.join(name, '*.txt')}")
        if not name.lower().endswith((".txt", ".jsonl")):
            raise DataError(f"data.source: {name}: must end in .txt (a document a file) or .jsonl (a document a line)")
        with _readable(name), open(name, "rb"):  # refuse now, not after the files before it were tokenised
            pass
    return sorted(names)


def _part(name: str, text_field: str) -> "_Part":
    if name in ("stdlib", "synthetic"):
        return _Stdlib() if name == "stdlib" else _Synthetic()
    return _TextFile(Path(name)) if name.lower().endswith(".txt") else _JsonLines(Path(name), text_field)


@contextmanager
def _readable(spec: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"data.source: {error.filename or spec}: cannot be read: {error.strerror}") from error


def _unusable(text: str) -> str:
    if not text.strip():
        return "empty text"
    if "\0" in text:
        return "NUL byte"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate"
    return ""


def _file_digest(path: Path) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


class _Part(Protocol):
    def digest(self) -> bytes: ...  # sha256 over everything that decides the records

    def records(self) -> Iterator[Record]: ...


class _Stdlib:
    """The running Python's own library, a document a file, by relative path."""

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for directory, children, names in os.walk(self.root):
            children[:] = [child for child in children if child not in NOT_STDLIB]
            here = Path(directory).relative_to(self.root)
            found += [(here / name).as_posix() for name in names if name.endswith(".py")]
        if not found:
            raise DataError(f"data.source = 'stdlib': {self.root} has no .py files; use synthetic, or files of your own")
        self.names = sorted(found)

    def digest(self) -> bytes:
        digest = hashlib.sha256(b"stdlib")
        for name in self.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + _file_digest(self.root / name))
        return digest.digest()

    def records(self) -> Iterator[Record]:
        for name in self.names:
            try:
                with tokenize.open(self.root / name) as file:  # decodes as the coding cookie says
                    yield name, file.read(), ""
            except (SyntaxError, UnicodeDecodeError):
                yield name, "", "not in its declared encoding"


class _TextFile:
    """A whole file is a document."""

    def __init__(self, path: Path):
        self.path = path

    def digest(self) -> bytes:
        return hashlib.sha256(b"txt" + _file_digest(self.path)).digest()

    def records(self) -> Iterator[Record]:
        try:
            yield str(self.path), self.path.read_bytes().decode("utf-8-sig"), ""
        except UnicodeDecodeError:
            yield str(self.path), "", "not UTF-8"


class _JsonLines:
    """A line is a document; blank lines are none."""

    def __init__(self, path: Path, text_field: str):
        self.path = path
        self.fields = (text_field,) if text_field else TEXT_FIELDS

    def digest(self) -> bytes:
        return hashlib.sha256(b"jsonl" + _file_digest(self.path)).digest()

    def records(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield (f"{self.path}:{number}", *self._text(line))

    def _text(self, line: bytes) -> tuple[str, str]:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            return "", "not UTF-8"
        except (ValueError, RecursionError):  # brackets can be nested deeper than Python's stack
            return "", "not JSON"
        if not isinstance(record, dict):
            return "", "not an object"
        for name in self.fields:
            if name in record:
                text = record[name]
                return (text, "") if isinstance(text, str) else ("", f"{name} not a string")
        return "", "no text field" if self.fields is TEXT_FIELDS else f"no field {self.fields[0]}"


class _Synthetic:
    """Small functions and their values: a seeded grammar with the same text on every machine and Python."""

    def digest(self) -> bytes:
        digest = hashlib.sha256(b"synthetic")
        for _, text, _ in self.records():
            digest.update(text.encode("utf-8") + b"\0")
        return digest.digest()

    def records(self) -> Iterator[Record]:
        # random() is the one method whose sequence Python promises never to change.
        rng = random.Random(0)  # noqa: S311

        def draw(count: int) -> int:
            return int(rng.random() * count)

        for number in range(SYNTHETIC_DOCUMENTS):
            yield f"synthetic/{number}", _program(draw), ""


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
