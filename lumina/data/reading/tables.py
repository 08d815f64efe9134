"""Rows of csv, Parquet and Arrow files as records."""

import csv
import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any, NamedTuple

from lumina.data.extras import need
from lumina.data.reading.conversations import (
    ANSWER_FIELDS,
    CONTEXT_FIELDS,
    MESSAGE_FIELDS,
    QUESTION_FIELDS,
    SYSTEM_FIELDS,
    TEXT_FIELDS,
)
from lumina.data.reading.streams import Stream, lines

TREE_FIELDS = ("message_id", "parent_id", "role", "rank", "labels", "deleted", "replies")
FIELDS = frozenset(
    (*TEXT_FIELDS, *MESSAGE_FIELDS, *QUESTION_FIELDS, *CONTEXT_FIELDS, *ANSWER_FIELDS, *SYSTEM_FIELDS, *TREE_FIELDS)
) | {"chosen", "rejected"}
DELIMITERS = ",\t;|"
BATCH_BYTES = 4 * 2**20
BATCH_ROWS = 4096


class Row(NamedTuple):
    """A row, or the kind of fault that it has."""

    number: int  # of its first line in a csv file, else of the row, from 0
    value: dict[str, Any]
    fault: str = ""
    source: Any = ""  # what a sample is made of


def needed(columns: Sequence[str], text_field: str) -> list[str]:
    """Those of a table's columns that can decide what a row says."""
    wanted = {text_field} if text_field else FIELDS
    return [name for name in columns if name in wanted] or list(columns[:1])


# -------------------------------------------------------------------------------------------------------------- csv


def csv_rows(stream: Stream, limit: int) -> Iterator[Row]:
    """Rows after the first, which names the columns. Raises nothing: broken rows are faults.

    Where quotes are broken or a row is above `limit` bytes, its first line is the fault, and reading goes on at the line
    after it: a quote without an end costs no more than its own row.
    """
    csv.field_size_limit(max(csv.field_size_limit(), limit + 1))  # of the whole process; the lines' own limit holds here
    feed = _Lines(stream, limit)
    header: list[str] = []
    delimiter = ","
    reader = None
    while True:
        if reader is None:
            if not header and (line := feed.peek()):
                delimiter = delimiter_of(line)
            reader = csv.reader(feed, delimiter=delimiter, strict=True)
        feed.begin()
        fault = ""
        row: list[str] = []
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error:
            fault, reader = "broken quotes", None
        except _TooLargeError:
            fault, reader = "too large", None
        source, number = feed.taken[0] if feed.taken else "", feed.number
        if fault:
            feed.give_back()
        elif feed.fault:
            fault = feed.fault
        elif header and row and len(row) != len(header):
            fault = "not as many columns as the header"
        if fault or (header and row):
            yield Row(number, dict(zip(header, row, strict=False)), fault, source)
        elif row:
            header = row
    if damage := stream.damage():
        yield Row(feed.next_number, {}, damage)


def delimiter_of(line: str) -> str:
    """What most often divides the columns in a header."""
    return max(DELIMITERS, key=re.sub('"[^"]*"', "", line).count)


class _BadLine(str):
    """The beginning of a line that is too large, or a line that is not UTF-8 with its bytes escaped."""

    fault: str


class _TooLargeError(Exception):
    """A row is above the limit."""


class _Lines:
    """Lines for csv.reader, and those again that a broken row took beyond its first."""

    def __init__(self, stream: Stream, limit: int):
        self._stream, self._limit = stream, limit
        self._lines = lines(stream.file, 0, limit)
        self._ahead: deque[str] = deque()
        self._size = 0
        self.taken: list[str] = []
        self.fault = ""
        self.number, self.next_number = 1, 1

    def begin(self) -> None:
        """A row begins."""
        self.taken, self.fault, self._size, self.number = [], "", 0, self.next_number

    def give_back(self) -> None:
        """The row was its first line alone."""
        self._ahead.extendleft(reversed(self.taken[1:]))
        self.next_number -= len(self.taken) - 1

    def peek(self) -> str:
        if not self._ahead and (line := self._read()):
            self._ahead.append(line)
        return self._ahead[0] if self._ahead else ""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._ahead.popleft() if self._ahead else self._read()
        if not line:
            raise StopIteration
        self.taken.append(line)
        self.next_number += 1
        self._size += len(line)
        if isinstance(line, _BadLine):
            self.fault = line.fault
        if self._size > self._limit or self.fault == "too large":
            raise _TooLargeError
        return line

    def _read(self) -> str:
        """A line; "" at the end."""
        content, is_whole = next(self._lines, (b"", True))
        if not content.endswith(b"\n") and self._stream.damage():
            return ""
        if self.next_number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")
        fault = "" if is_whole else "too large"
        try:
            line = content.decode("utf-8")
        except UnicodeDecodeError:
            line, fault = content.decode("utf-8", "backslashreplace"), fault or "not UTF-8"
        if fault:
            line = _BadLine(line)
            line.fault = fault
        return line


# ------------------------------------------------------------------------------------------------- Parquet and Arrow


def parquet_groups(path: str) -> list[tuple[int, int]]:
    """(rows, share of the file's bytes) of each row group; none where the file is damaged."""
    with _parquet(path) as file:
        metadata = file.metadata if file else None
        # Not of the columns' own sizes: where their metadata is damaged, looking at it ends the process (pyarrow 26).
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)] if metadata else []
        sizes = [max(group.total_byte_size, 0) for group in groups]
        ends = [os.path.getsize(path) * end // max(sum(sizes), 1) for end in accumulate(sizes)]
        return [(group.num_rows, end - start) for group, start, end in zip(groups, [0, *ends], ends, strict=False)]


def parquet_rows(path: str, start: int, stop: int, first: int, text_field: str) -> Iterator[Row]:
    """Rows of row groups [start, stop), or of all where that is 0, 0, numbered from `first`. A damaged group is a fault."""
    with _parquet(path) as file:
        if file is None:
            yield Row(first, {}, "damaged Parquet")
            return
        columns = needed(file.schema_arrow.names, text_field)
        for index in range(start, stop or file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            batches = file.iter_batches(_rows_at_once(group.total_byte_size, group.num_rows), [index], columns)
            yield from _rows(batches, first, text_field, "damaged Parquet")
            first += group.num_rows


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    """The open file, or None where it is damaged. Raises OSError where it cannot be opened."""
    pyarrow, parquet = (need(name, "reading .parquet files") for name in ("pyarrow", "pyarrow.parquet"))
    with pyarrow.OSFile(os.fsencode(path)) as source:
        try:
            file = parquet.ParquetFile(source, buffer_size=2**20, pre_buffer=False)  # reads that much ahead, not a whole column
        except _damage():
            file = None
        yield file


def arrow_batches(path: str) -> list[tuple[int, int]]:
    """(rows, bytes) of each batch of an Arrow file or stream. Damage is a batch of no rows."""
    found: list[tuple[int, int]] = []
    with _arrow(path) as batches:
        try:
            for batch in batches:
                batch.validate()
                found.append((batch.num_rows, batch.nbytes))
        except _damage():
            found.append((0, 0))
    return found


def arrow_rows(path: str, start: int, stop: int, first: int, text_field: str) -> Iterator[Row]:
    """Rows of batches [start, stop), or of all where that is 0, 0, numbered from `first`. Damage ends them in a fault."""
    with _arrow(path) as batches:
        yield from _rows(islice(batches, start, stop or None), first, text_field, "damaged Arrow")


@contextmanager
def _arrow(path: str) -> Iterator[Iterator[Any]]:
    """The batches; they raise one of `_damage()` where they cannot be read. Raises OSError where the file cannot be opened."""
    pyarrow = need("pyarrow", "reading .arrow files")

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(os.fsencode(path)) as source:
            if source.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(source)
                yield from (file.get_batch(index) for index in range(file.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    with open(path, "rb"):
        yield batches()


def _rows(batches: Iterator[Any], first: int, text_field: str, damage: str) -> Iterator[Row]:
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch = batch.select(needed(batch.schema.names, text_field))
            batch.validate()
        except _damage():
            yield Row(first, {}, damage)
            return
        step = _rows_at_once(batch.nbytes, batch.num_rows)
        for start in range(0, batch.num_rows, step):
            for number, (value, fault) in enumerate(_values(batch.slice(start, step), damage), first + start):
                yield Row(number, value, fault, value)
        first += batch.num_rows


def _values(batch: Any, damage: str) -> list[tuple[dict[str, Any], str]]:
    """(value, fault) of each row."""
    try:
        batch.validate(full=True)  # or else offsets that are damaged end the process
        return [(value, "") for value in _strings(batch).to_pylist()]
    except _damage() as error:
        if batch.num_rows == 1:
            is_text = isinstance(error, UnicodeDecodeError) or "UTF8" in str(error)
            return [({}, "not UTF-8" if is_text else damage)]
        return [value for at in range(batch.num_rows) for value in _values(batch.slice(at, 1), damage)]


def _strings(batch: Any) -> Any:
    """The batch with strings for bytes: some writers do not mark text as such."""
    pyarrow, compute = need("pyarrow", "reading tables"), need("pyarrow.compute", "reading tables")
    options = compute.CastOptions(pyarrow.large_string(), allow_invalid_utf8=True)
    for at, field in enumerate(batch.schema):
        if pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type):
            batch = batch.set_column(at, field.name, compute.cast(batch.column(at), options=options))
    return batch


def _rows_at_once(size: int, rows: int) -> int:
    return int(min(BATCH_ROWS, max(1, BATCH_BYTES * rows // max(size, 1))))


def _damage() -> tuple[type[Exception], ...]:
    return need("pyarrow", "reading tables").ArrowException, OSError, KeyError, ValueError
