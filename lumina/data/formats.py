"""The records of a file, by its format."""

import json
from collections.abc import Iterator

from lumina.data.conversations import document
from lumina.data.recipe import Recipe
from lumina.data.records import Document, Reject
from lumina.data.streams import lines, open_range, sample, shown

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def limit(recipe: Recipe) -> int:
    """Bytes that a record may have."""
    return int(recipe.max_record_mb * 1e6)


def too_large(name: str, recipe: Recipe, beginning: bytes | str) -> Reject:
    return Reject(name, f"larger than {recipe.max_record_mb:g} MB", sample(beginning))


def text(path: str, recipe: Recipe) -> Iterator[Document | Reject]:
    """A whole file is a document."""
    name = shown(path)
    with open(path, "rb") as file:
        content = file.read(limit(recipe) + 1)
    if len(content) > limit(recipe):
        yield too_large(name, recipe, content)
        return
    try:
        yield usable(Document(name, content.decode("utf-8-sig")), content)
    except UnicodeDecodeError:
        yield Reject(name, "not UTF-8", sample(content))


def by_line(
    path: str, format_: str, recipe: Recipe, start: int = 0, stop: int = 0, first: int = 1
) -> Iterator[Document | Reject]:
    """A line of bytes [start, stop) is a document, or a JSON record of one; blank lines are none. `first` is the first's number."""
    name, bound = shown(path), limit(recipe)
    with open_range(path, start) as file:
        for number, (line, whole) in enumerate(lines(file, stop - start if stop else 0, bound), first):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not whole:
                yield too_large(f"{name}:{number}", recipe, line)
            elif line and not line.isspace():
                yield (_json if format_ == "jsonl" else _plain)(line, f"{name}:{number}", recipe)


def _plain(line: bytes, name: str, recipe: Recipe) -> Document | Reject:
    try:
        return usable(Document(name, line.decode("utf-8").rstrip("\r\n")), line)
    except UnicodeDecodeError:
        return Reject(name, "not UTF-8", sample(line))


def _json(line: bytes, name: str, recipe: Recipe) -> Document | Reject:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Reject(name, "not UTF-8", sample(line))
    except (ValueError, RecursionError):  # brackets can be nested deeper than Python's stack, integers longer than it reads
        return Reject(name, "not JSON", sample(line))
    if not isinstance(value, dict):
        return Reject(name, "not an object", sample(line))
    return usable(document(value, name, recipe.text_field), line)


def usable(record: Document | Reject, source: bytes | str) -> Document | Reject:
    """The document, or why its text cannot be used; a reject gets its sample of the bytes that it was read from."""
    if isinstance(record, Reject):
        return record if record.sample else record._replace(sample=sample(source))
    said = record.text
    kind = ""
    if not said or said.isspace():
        kind = "empty text"
    elif "\0" in said:
        kind = "NUL byte"
    elif not said.isascii():
        try:
            said.encode("utf-8")
        except UnicodeEncodeError:
            kind = "lone surrogate"
    return Reject(record.name, kind, sample(source)) if kind else record
