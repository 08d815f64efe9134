"""Sources -> a plan of units of work -> documents.

`plan` finds and reads every file once, for its fingerprint and for where to cut it. `read` gives the records of one unit:
unit by unit they are those of the whole, in the same order with the same names, on any machine that has the files.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lumina.data import embedded, formats
from lumina.data.finding import EMBEDDED, Found, find, readable
from lumina.data.recipe import Recipe
from lumina.data.records import Document, Reject
from lumina.data.streams import shown
from lumina.errors import DataError

UNIT_BYTES = 16 * 2**20
READ_BYTES = 2**20
PROGRESS_SECONDS = 2.0


class Unit(NamedTuple):
    """A part of the sources that one worker reads."""

    number: int
    spec: str  # as the user named it
    name: str  # what errors call it
    format: str
    start: int = 0  # the part of the file: bytes of line formats; 0, 0 is all of it
    stop: int = 0
    first: int = 1  # line number of the first record
    paths: tuple[str, ...] = ()  # small files share a unit
    bytes: int = 0


class Plan(NamedTuple):
    """What is read, cut in units."""

    units: list[Unit]
    fingerprint: str  # sha256 over contents and formats, wherever the files lie; what the recipe decides is not in it
    formats: list[str]  # what was found, and how it is read, a line each
    bytes: int


def plan(specs: Sequence[str], recipe: Recipe, progress: Callable[[str], None] | None = None) -> Plan:
    """The units of all sources, in the order named.

    Args:
        specs: files, directories, globs, stdlib, synthetic.
        recipe: its format is that of all files; where it has none, each file's is found.
        progress: is given a line now and then while it takes long.

    Raises:
        DataError: a source is missing, cannot be read, is of no known format, is named twice, or holds no file.
        UsageError: the recipe names a format that does not exist.
    """
    sources: list[tuple[str, list[Found]]] = []
    said: list[str] = []
    taken: set[str] = set()
    for spec in specs:
        found: list[Found] = []
        if spec not in EMBEDDED:
            found, passed = find(spec, recipe)
            said += _statements(spec, found, passed)
        for identity in [os.path.realpath(each.path) for each in found] or [spec]:
            if identity in taken:
                raise DataError(f"{shown(spec)}: names {shown(identity)} twice; name it once")
            taken.add(identity)
        sources.append((spec, found))
    if not sources:
        raise DataError(f"the sources name nothing; name files, directories, globs, or {', '.join(EMBEDDED)}")
    survey = _Survey(sum(os.path.getsize(each.path) for _, found in sources for each in found), progress)
    digest = hashlib.sha256()
    units: list[Unit] = []
    for spec, found in sources:
        parts = _embedded(spec, digest.update, said) if spec in EMBEDDED else _cut(spec, found, survey, digest.update)
        units += parts
    units = [unit._replace(number=number) for number, unit in enumerate(units)]
    return Plan(units, digest.hexdigest(), said, sum(unit.bytes for unit in units))


def read(unit: Unit, recipe: Recipe) -> Iterator[Document | Reject]:
    """The unit's records in order. Raises DataError where a file is no longer there."""
    if unit.format == "stdlib":
        with readable(unit.name):
            yield from (formats.usable(each, "") for each in embedded.stdlib_documents(unit.paths))
    elif unit.format == "synthetic":
        yield from embedded.synthetic_documents()
    for path in unit.paths if unit.format not in EMBEDDED else ():
        with readable(path):
            if unit.format == "text":
                yield from formats.text(path, recipe)
            else:
                yield from formats.by_line(path, unit.format, recipe, unit.start, unit.stop, unit.first)


def spool(stream: BinaryIO, directory: str | os.PathLike[str]) -> Path:
    """A file below `directory` with all of the stream, such as stdin: it can be read again."""
    path = Path(directory) / "stdin"
    partial = path.with_name("stdin.partial")
    with open(partial, "wb") as file:
        while chunk := stream.read(READ_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


# ------------------------------------------------------------------------------------------------------- statements


def _statements(spec: str, found: list[Found], passed: Counter[str]) -> list[str]:
    """A line for each way that files of `spec` are read, and one about those that are not."""
    by_about: dict[str, list[Found]] = {}
    for each in found:
        by_about.setdefault(each.about, []).append(each)
    said = []
    for about, files in by_about.items():
        name = shown(files[0].path) if len(files) == 1 else f"{shown(spec)}: {len(files):,} files"
        said.append(f"{name}: {about}")
    if passed:
        why = ", ".join(f"{count:,} {shown(reason)}" for reason, count in sorted(passed.items()))
        said.append(f"{shown(spec)}: {passed.total():,} passed over: {why}")
    if not found:
        raise DataError(f"{shown(spec)}: holds no file that can be read{': ' + said[-1] if said else ''}")
    return said


# ------------------------------------------------------------------------------------------------------------ units


class _Survey:
    """Reads files once, and tells how far it is."""

    def __init__(self, total: int, progress: Callable[[str], None] | None):
        self.total, self.progress = total, progress
        self.read, self.started, self.said = 0, time.monotonic(), time.monotonic()

    def chunks(self, path: str) -> Iterator[bytes]:
        with readable(path), open(path, "rb", buffering=0) as file:
            while chunk := file.read(READ_BYTES):
                self._tell(len(chunk))
                yield chunk

    def _tell(self, size: int) -> None:
        self.read += size
        now = time.monotonic()
        if self.progress and now - self.said >= PROGRESS_SECONDS:
            self.said, rate = now, self.read / 1e6 / (now - self.started)
            self.progress(f"looked through {self.read / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {rate:,.0f} MB/s")


def _cut(spec: str, found: list[Found], survey: _Survey, update: Callable[[bytes], None]) -> list[Unit]:
    """Units of about UNIT_BYTES: ranges of large files of lines, groups of small files."""
    units: list[Unit] = []
    for each in found:
        size = os.path.getsize(each.path)
        last = units[-1] if units else None
        contents, cuts = _ranges(survey.chunks(each.path))
        # The tag of a text is that of the first release, whose fingerprints are in manifests.
        update(hashlib.sha256({"text": "txt"}.get(each.format, each.format).encode() + contents).digest())
        if each.format != "text" and len(cuts) > 1:
            parts = [Unit(0, spec, shown(each.path), each.format, *cut, (each.path,), cut[1] - cut[0]) for cut in cuts]
            units += parts
        elif last and last.format == each.format and not last.stop and last.bytes + size <= UNIT_BYTES:
            units[-1] = last._replace(paths=(*last.paths, each.path), bytes=last.bytes + size)
        else:
            units.append(Unit(0, spec, shown(each.path), each.format, 0, 0, 1, (each.path,), size))
    return units


def _ranges(chunks: Iterator[bytes]) -> tuple[bytes, list[tuple[int, int, int]]]:
    """sha256 of the chunks, and (start, stop, number of the first line) of ranges of at least UNIT_BYTES that end with a line."""
    digest = hashlib.sha256()
    cuts: list[tuple[int, int, int]] = []
    start, first, line, position = 0, 1, 1, 0
    for chunk in chunks:
        digest.update(chunk)
        counted = 0
        while (end := chunk.find(b"\n", max(counted, start + UNIT_BYTES - 1 - position))) >= 0:
            line += chunk.count(b"\n", counted, end + 1)
            counted = end + 1
            cuts.append((start, position + counted, first))
            start, first = position + counted, line
        line += chunk.count(b"\n", counted)
        position += len(chunk)
    if position > start:
        cuts.append((start, position, first))
    return digest.digest(), cuts


def _embedded(spec: str, update: Callable[[bytes], None], said: list[str]) -> list[Unit]:
    if spec == "synthetic":
        update(embedded.synthetic_digest())
        said.append(f"synthetic: {embedded.SYNTHETIC_DOCUMENTS:,} small programs of a seeded grammar")
        return [Unit(0, spec, spec, spec)]
    names, root = embedded.stdlib_names(), embedded.stdlib_root()
    with readable(spec):
        update(embedded.stdlib_digest(names))
        said.append(f"stdlib: {len(names):,} files of {root}, a document a file")
        units: list[Unit] = []
        for name in names:
            size = os.path.getsize(root / name)
            if units and units[-1].bytes + size <= UNIT_BYTES:
                units[-1] = units[-1]._replace(paths=(*units[-1].paths, name), bytes=units[-1].bytes + size)
            else:
                units.append(Unit(0, spec, spec, spec, paths=(name,), bytes=size))
    return units
