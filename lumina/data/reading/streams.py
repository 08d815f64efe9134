"""Bytes of files, whatever they are compressed or encoded in, and lines of them of a bounded length."""

import codecs
import io
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple

from lumina.data.extras import need

SAMPLE_CHARACTERS = 80
STDIN = "<stdin>"  # the name of the file that `lumina data` makes of it
BUFFER_BYTES = 2**20
# What is decompressed at once. gz makes at most 1 MiB of it and zst 32 MiB, so that a bomb costs no more memory than that.
FEED_BYTES = 2**10
MEASURED_BYTES, MEASURED_TEXT = 2**20, 2**26  # of a file, as stored and decoded: what `expansion` looks at, at most
BEGINNINGS = {
    b"\x1f\x8b": "gz",
    b"\x28\xb5\x2f\xfd": "zst",
    b"\xfd7zXZ\0": "xz",
    b"\xff\xfe\0\0": "utf-32",
    b"\0\0\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
COMPRESSIONS = ("gz", "zst", "xz", "bz2")


def shown(text: str) -> str:
    """The same with what cannot be printed escaped: a name or a sample that fits in one line of a report."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def called(path: str) -> str:
    """What errors and reports call a file: stdin by that name, wherever it was spooled to."""
    return STDIN if path.rpartition("/")[2] == STDIN else shown(path)


def sample(record: Any) -> str:
    """The beginning of a record, printable; where it goes on, with an ellipsis."""
    if isinstance(record, bytes):
        record = record[: 4 * SAMPLE_CHARACTERS].decode("utf-8", "backslashreplace")
    whole = (record if isinstance(record, str) else repr(record)).rstrip()
    return shown(whole[:SAMPLE_CHARACTERS].rstrip()) + ("..." if len(whole) > SAMPLE_CHARACTERS else "")


def encoding_of(path: str) -> str:
    """What the file is compressed or encoded in, by its name and its first bytes: "" is neither, thus UTF-8 or binary."""
    for name in COMPRESSIONS:
        if path.lower().endswith(f".{name}"):
            return name
    with open(path, "rb") as file:
        beginning = file.read(10)
    if beginning.startswith(b"BZh") and beginning[4:] == b"1AY&SY":  # a text may begin with BZh
        return "bz2"
    return next((name for mark, name in BEGINNINGS.items() if beginning.startswith(mark)), "")


class Stream(NamedTuple):
    """Decoded bytes. Where they end early, `damage()` says why once all of them are read; else it is empty."""

    file: IO[bytes]
    damage: Callable[[], str]


@contextmanager
def opened(path: str, encoding: str = "", start: int = 0) -> Iterator[Stream]:
    """The file's decoded bytes; of a file in no encoding those from `start` on."""
    with open(path, "rb", buffering=BUFFER_BYTES) as file:
        if encoding:
            raw = _Decoded(file, encoding)
            yield Stream(io.BufferedReader(raw, BUFFER_BYTES), lambda: raw.damage)
        else:
            file.seek(start)
            yield Stream(file, lambda: "")


def expansion(paths: Iterable[str], encoding: str) -> float:
    """Decoded bytes over stored ones, of the beginnings of the files: those of MEASURED_BYTES together, or of MEASURED_TEXT."""
    made = stored = 0
    for path in paths:
        if stored >= MEASURED_BYTES or made >= MEASURED_TEXT:
            break
        with open(path, "rb") as file:
            own = at = 0
            try:
                for piece in _pieces(file, encoding):
                    if piece:  # a decoder may hold a block back: what it has read counts when that comes out
                        own, at = own + len(piece), file.tell()
                    if own and (stored + file.tell() >= MEASURED_BYTES or made + own >= MEASURED_TEXT):
                        break
            except _DamageError:
                pass
        made, stored = made + own, stored + at
    return made / stored if stored else 1.0


def lines(file: IO[bytes], size: int, limit: int) -> Iterator[tuple[bytes, bool]]:
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
                rest = file.readline(BUFFER_BYTES)
                read += len(rest)
        yield line, whole


# --------------------------------------------------------------------------------------------------------- decoding


class _Decoded(io.RawIOBase):
    """What a file decodes to. At damage it ends, so that what came before is not lost."""

    def __init__(self, file: IO[bytes], encoding: str):
        self.damage = ""
        self._pieces = _pieces(file, encoding)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._pieces))
            except StopIteration:
                return 0
            except _DamageError as error:
                self.damage = str(error)
                return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class _DamageError(Exception):
    """Nothing more can be decoded."""


def _pieces(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    return _decompressed(file, encoding) if encoding in COMPRESSIONS else _recoded(file, encoding)


def _decompressed(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    """The contents of one compressed stream, or of several in a row, as tools that compress in parallel write them."""
    make, bound, errors = _decompressor(encoding)
    decoder = None
    ends_whole = False
    while chunk := file.read(FEED_BYTES):
        while chunk or (decoder and not getattr(decoder, "needs_input", True)):
            if decoder is None:
                if ends_whole and not (chunk := chunk.lstrip(b"\0")):  # padding between streams
                    break
                decoder, ends_whole = make(), False
            try:
                piece = decoder.decompress(chunk, *bound)
            except errors as error:
                raise _DamageError(f"damaged {encoding}") from error
            chunk = b""
            if decoder.eof:
                chunk, decoder, ends_whole = decoder.unused_data, None, True
            yield piece
    if not ends_whole:
        raise _DamageError(f"damaged {encoding}")


def _decompressor(encoding: str) -> tuple[Callable[[], Any], tuple[int, ...], tuple[type[Exception], ...]]:
    """What makes a decoder of one stream, the most bytes that it may make at once, and the errors that it raises at damage."""
    if encoding == "gz":
        return lambda: zlib.decompressobj(wbits=31), (), (zlib.error,)
    if encoding == "xz":
        import lzma  # here, because not every Python is built with it

        return lzma.LZMADecompressor, (BUFFER_BYTES,), (lzma.LZMAError,)
    if encoding == "bz2":
        import bz2

        return bz2.BZ2Decompressor, (BUFFER_BYTES,), (OSError, ValueError)
    zstandard = need("zstandard", "reading .zst files")
    # As large as `zstd --long=31` makes them: dumps of forums are.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, (), (zstandard.ZstdError,)


def _recoded(file: IO[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while chunk := file.read(BUFFER_BYTES):
            yield decoder.decode(chunk).encode("utf-8")
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _DamageError(f"not {encoding.upper()}") from error
