"""The records of a file, by its format, and the documents that they are."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from lumina.data.reading.conversations import document, form
from lumina.data.reading.json_values import is_too_deep, values
from lumina.data.reading.streams import called, lines, opened, sample
from lumina.data.reading.tables import arrow_rows, csv_rows, parquet_rows
from lumina.data.reading.trees import trees
from lumina.data.recipe import Recipe
from lumina.data.records import CONVERSATION, TEXT, Document, Reject

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PEEKED_RECORDS = 20

# A record's name, its value, and what a sample of it is made of.
Record = tuple[str, Any, Any]


class Part(NamedTuple):
    """A file, or of it the bytes, row groups or batches from `start` to `stop`."""

    path: str
    format: str
    encoding: str = ""
    start: int = 0
    stop: int = 0  # 0 is the end
    first: int = -1  # number of the first record; -1 is that of a whole file
    trees: bool = False


def documents(part: Part, recipe: Recipe) -> Iterator[Document | Reject]:
    """What each record says, or why it says nothing; one of them for each record."""
    if part.format == "text":
        yield _text(part, recipe)
    elif part.trees:
        yield from _trees(part, recipe)
    else:
        for record in records(part, recipe):
            if isinstance(record, Reject):
                yield record
            elif part.format == "lines":
                yield usable(Document(record[0], record[1]), recipe, record[2])
            else:
                yield usable(document(record[1], record[0], recipe.text_field), recipe, record[2])


def records(part: Part, recipe: Recipe) -> Iterator[Record | Reject]:
    """The records of any format but text."""
    if part.format in ("lines", "jsonl"):
        return _by_line(part, recipe)
    if part.format == "json":
        return _json(part, recipe)
    return _table(part, recipe)


class Way(NamedTuple):
    """How a file is read, by its first records."""

    words: str
    kinds: frozenset[str]  # of its documents, as of `lumina.data.records`; none where the first records are all bad


def way(part: Part, recipe: Recipe) -> Way:
    """How the file is read."""
    said, kinds = [part.format, *([part.encoding] if part.encoding else [])], {TEXT}
    if part.format == "text" and not part.encoding and os.path.getsize(part.path) > limit(recipe):
        said.append(f"larger than {recipe.max_record_mb:g} MB and thus rejected; with --format lines a line is a document")
    elif part.format in ("text", "lines"):
        said.append(f"a document a {'file' if part.format == 'text' else 'line'}")
    elif part.trees:
        said.append("conversations (trees of replies)")
        kinds = {CONVERSATION}
    else:
        found = [each for each in islice(records(part, recipe), PEEKED_RECORDS) if not isinstance(each, Reject)]
        forms = Counter(form(value, recipe.text_field) for _, value, _ in found).most_common()
        said += [name for name, _ in forms] or [f"no record in the first {PEEKED_RECORDS}"]
        read = [document(value, name, recipe.text_field) for name, value, _ in found]
        kinds = {each.kind for each in read if isinstance(each, Document)}
    return Way(", ".join(said), frozenset(kinds))


def field_names(part: Part, recipe: Recipe) -> list[str]:
    """The fields of the first records, in order of appearance; none of a file whose records have no fields."""
    if part.format in ("text", "lines"):
        return []
    found = islice(records(part, replace(recipe, text_field="")), PEEKED_RECORDS)
    values = [each[1] for each in found if not isinstance(each, Reject)]
    return list(dict.fromkeys(str(name) for value in values if isinstance(value, Mapping) for name in value))


def usable(record: Document | Reject, recipe: Recipe, source: Any) -> Document | Reject:
    """The document, or why its text cannot be used; a reject gets its sample of what it was read from."""
    if isinstance(record, Reject):
        return record if record.sample else record._replace(sample=sample(source))
    said = record.text
    if not said or said.isspace():
        return Reject(record.name, "empty text", sample(source))
    if "\0" in said:
        return Reject(record.name, "NUL byte", sample(source))
    size = len(said)
    if not said.isascii():
        try:
            size = len(said.encode("utf-8"))
        except UnicodeEncodeError:
            return Reject(record.name, "lone surrogate", sample(source))
    return too_large(record.name, recipe, source) if size > limit(recipe) else record


def limit(recipe: Recipe) -> int:
    """Bytes that a record may have."""
    return int(recipe.max_record_mb * 1e6)


def too_large(name: str, recipe: Recipe, source: Any) -> Reject:
    return Reject(name, f"larger than {recipe.max_record_mb:g} MB", sample(source))


# ---------------------------------------------------------------------------------------------------------- formats


def _text(part: Part, recipe: Recipe) -> Document | Reject:
    """A whole file is a document."""
    name = called(part.path)
    with opened(part.path, part.encoding) as stream:
        content = stream.file.read(limit(recipe) + 1)
        if damage := stream.damage():
            return Reject(name, damage, sample(content))
    if len(content) > limit(recipe):
        return too_large(name, recipe, content)
    try:
        return usable(Document(name, content.decode("utf-8-sig")), recipe, content)
    except UnicodeDecodeError:
        return Reject(name, "not UTF-8", sample(content))


def _by_line(part: Part, recipe: Recipe) -> Iterator[Record | Reject]:
    """Each line that is not blank: its text, or the JSON value that it is."""
    shown_path, number = called(part.path), max(part.first, 1)
    with opened(part.path, part.encoding, part.start) as stream:
        for line, is_whole in lines(stream.file, part.stop - part.start if part.stop else 0, limit(recipe)):
            if not line.endswith(b"\n") and stream.damage():
                break
            line = line.removeprefix(BYTE_ORDER_MARK)  # of any line: files that begin with one may have been joined
            name = f"{shown_path}:{number}"
            number += 1
            if not is_whole:
                yield too_large(name, recipe, line)
            elif line and not line.isspace():
                yield _value(line, name, part.format)
        if damage := stream.damage():
            yield Reject(f"{shown_path}:{number}", damage)


def _value(line: bytes, name: str, format_: str) -> Record | Reject:
    try:
        text = line.decode("utf-8")
        if format_ == "lines":
            return name, text.rstrip("\r\n"), line
        value = json.loads(text)
        if not is_too_deep(text, value):
            return name, value, line
    except UnicodeDecodeError:
        return Reject(name, "not UTF-8", sample(line))
    except (ValueError, RecursionError):  # brackets can be nested deeper than Python's stack, integers longer than it reads
        pass
    return Reject(name, "not JSON", sample(line))


def _json(part: Part, recipe: Recipe) -> Iterator[Record | Reject]:
    """The elements of an array, or the values in a row, named by their place from 0."""
    place = -1
    with opened(part.path, part.encoding) as stream:
        for place, found in enumerate(values(stream.file, limit(recipe))):
            name = f"{called(part.path)}[{place}]"
            if found.fault and stream.damage():
                yield Reject(name, stream.damage(), sample(found.source))
                return
            if found.fault:
                yield _fault(name, found.fault, recipe, found.source)
            elif not found.source.isascii() and not _is_utf8(found.source):
                yield Reject(name, "not UTF-8", sample(found.source))
            else:
                yield name, found.value, found.source
        if stream.damage():
            yield Reject(f"{called(part.path)}[{place + 1}]", stream.damage())


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _fault(name: str, fault: str, recipe: Recipe, source: Any) -> Reject:
    return too_large(name, recipe, source) if fault == "too large" else Reject(name, fault, sample(source))


def _table(part: Part, recipe: Recipe) -> Iterator[Record | Reject]:
    """Rows of csv files, named by their first line; of others, by their place from 0."""
    path = called(part.path)
    if part.format == "csv":
        with opened(part.path, part.encoding) as stream:
            for row in csv_rows(stream, limit(recipe)):
                name = f"{path}:{row.number}"
                yield _fault(name, row.fault, recipe, row.source) if row.fault else (name, row.value, row.source)
    else:
        read = parquet_rows if part.format == "parquet" else arrow_rows
        text_field = "" if part.trees else recipe.text_field
        for row in read(part.path, part.start, part.stop, max(part.first, 0), text_field):
            name = f"{path}[{row.number}]"
            yield _fault(name, row.fault, recipe, row.source) if row.fault else (name, row.value, row.source)


def _trees(part: Part, recipe: Recipe) -> Iterator[Document | Reject]:
    """The conversations of a file of trees, which are known when the last of its records is read."""
    rejects: list[Reject] = []

    def good() -> Iterator[tuple[str, Any]]:
        for record in records(part, recipe):
            if isinstance(record, Reject):
                rejects.append(record)
            else:
                yield record[:2]

    for found in trees(good(), recipe):
        yield usable(found, recipe, "")
    yield from rejects
