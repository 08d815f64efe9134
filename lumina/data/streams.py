"""Bytes of files, and lines of them of a bounded length."""

from collections.abc import Iterator
from typing import BinaryIO

SAMPLE_CHARACTERS = 80
SKIP_BYTES = 2**20  # read at once of what is not kept


def shown(text: str) -> str:
    """The same with what cannot be printed escaped: a name or a sample that fits in one line of a report."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def sample(record: bytes | str) -> str:
    """The beginning of a record, printable."""
    if isinstance(record, bytes):
        record = record[: 4 * SAMPLE_CHARACTERS].decode("utf-8", "backslashreplace")
    return shown(record[:SAMPLE_CHARACTERS])


def open_range(path: str, start: int) -> BinaryIO:
    """The file's bytes from `start` on."""
    file = open(path, "rb", buffering=SKIP_BYTES)  # noqa: SIM115 (the caller closes it)
    file.seek(start)
    return file


def lines(file: BinaryIO, size: int, limit: int) -> Iterator[tuple[bytes, bool]]:
    """(line with its end, whole) of the next `size` bytes, or of all where that is 0.

    A line above `limit` bytes comes as its beginning, with whole=False; no more of it is held in memory.
    """
    read = 0
    while not size or read < size:
        line = file.readline(limit + 1)
        if not line:
            return
        read += len(line)
        whole = len(line) <= limit or line.endswith(b"\n")
        if not whole:
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(SKIP_BYTES)
                read += len(rest)
        yield line, whole
