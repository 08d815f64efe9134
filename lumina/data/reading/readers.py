"""Sources -> a plan of units of work -> documents.

`plan` finds and reads every file once, for its fingerprint and for where to cut it. `read` gives the records of one unit:
unit by unit they are those of the whole, in the same order with the same names, on any machine that has the files.
"""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from lumina.data.reading import embedded, huggingface
from lumina.data.reading.conversations import document
from lumina.data.reading.finding import EMBEDDED, Found, find, readable
from lumina.data.reading.formats import Part, documents, field_names, usable, way
from lumina.data.reading.huggingface import PREFIX
from lumina.data.reading.streams import STDIN, called, expansion, shown
from lumina.data.reading.tables import arrow_batches, parquet_groups
from lumina.data.recipe import Recipe
from lumina.data.records import CONVERSATION, PREFERENCE, TEXT, Document, Reject
from lumina.errors import DataError

UNIT_BYTES = 16 * 2**20
UNIT_FILES = 2000  # of a few bytes each, so that many workers have something to read
READ_BYTES = 2**20
FIELDS_TOLD = 12
PROGRESS_SECONDS = 2.0
TAGS = {"text": "txt"}  # in fingerprints, for those that manifests of the first releases hold

Cut = tuple[int, int, int, int]  # start, stop, number of the first line or row, bytes


class Unit(NamedTuple):
    """A part of the sources that one worker reads."""

    number: int
    spec: str  # as the user named it
    name: str  # what errors call it
    format: str
    start: int = 0  # the part of the file: bytes of lines, row groups of Parquet, batches of Arrow; 0, 0 is all of it
    stop: int = 0
    first: int = -1  # number of the first line or row; -1 is that of a whole file
    paths: tuple[str, ...] = ()  # small files share a unit
    bytes: int = 0  # as they are stored
    encoding: str = ""  # what the files are compressed or encoded in
    trees: bool = False  # the records are of trees of replies


class Plan(NamedTuple):
    """What is read, cut in units."""

    units: list[Unit]
    fingerprint: str  # sha256 over contents and formats, wherever the files lie; what the recipe decides is not in it
    formats: list[str]  # what was found, and how it is read, a line each
    bytes: int
    kinds: dict[str, str]  # kinds of documents that are seen already, and the first file or source of each


def plan(specs: Sequence[str], recipe: Recipe, progress: Callable[[str], None] | None = None) -> Plan:
    """The units of all sources, in the order named.

    Args:
        specs: files, directories, globs, stdlib, synthetic, docstrings, preferences, hf:DIR[:SPLIT] and
            hf:NAME@REVISION[:CONFIG][:SPLIT]. What stdin holds is named as the file that `spool` makes of it.
        recipe: its format is that of all files; where it has none, each file's is found.
        progress: is given a line now and then while it takes long.

    Raises:
        DataError: a source is missing, cannot be read, is of no known format, is named twice, or holds no file.
        UsageError: the recipe names a format that does not exist, or a library is missing.
    """
    sources: list[tuple[str, list[Found]]] = []
    said: list[str] = []
    taken: set[str] = set()
    kinds: dict[str, str] = {}
    for spec in specs:
        found, about = _found(spec, recipe, kinds)
        said += about
        for identity in [os.path.realpath(each.path) for each in found] or [spec]:
            if identity in taken:
                raise DataError(f"{called(spec)}: names {called(identity)} twice; name it once")
            taken.add(identity)
        sources.append((spec, found))
    if recipe.text_field and not kinds:
        for _, found in sources[:1]:
            _require_text_field(found[:1], recipe)
    if not sources:
        raise DataError(f"the sources name nothing; name files, directories, globs, or {', '.join(EMBEDDED)}")
    survey = _Survey(sum(os.path.getsize(each.path) for _, found in sources for each in found), progress)
    digest = hashlib.sha256()
    units: list[Unit] = []
    for spec, found in sources:
        if found:
            units += _shared(_cut(spec, found, survey, digest.update))
        else:
            units += _of_hub(spec, digest.update, said) if spec.startswith(PREFIX) else _embedded(spec, digest.update, said)
    units = [unit._replace(number=number) for number, unit in enumerate(units)]
    return Plan(units, digest.hexdigest(), said, sum(unit.bytes for unit in units), kinds)


def text_bytes(planned: Plan) -> int:
    """About how many bytes the files hold, decoded: of those that are compressed as their beginnings tell. Raises as `read`."""
    total = 0
    for unit in planned.units:
        with readable(unit.name):
            total += round(unit.bytes * expansion(unit.paths, unit.encoding)) if unit.encoding else unit.bytes
    return total


def read(unit: Unit, recipe: Recipe) -> Iterator[Document | Reject]:
    """The unit's records in order. Raises DataError where a file is no longer there, or the network is not."""
    if unit.format == "stdlib":
        with readable(unit.name):
            yield from (usable(each, recipe, each.name) for each in embedded.stdlib_documents(unit.paths))
    elif unit.format == "synthetic":
        yield from embedded.synthetic_documents()
    elif unit.format in EMBEDDED:
        yield from _docstrings(unit.format)
    elif unit.format == "hub":
        for name, value in huggingface.rows(huggingface.parse(unit.name), unit.start, unit.stop):
            yield usable(document(value, name, recipe.text_field), recipe, value)
    else:
        for path in unit.paths:
            with readable(path):
                part = Part(path, unit.format, unit.encoding, unit.start, unit.stop, unit.first, unit.trees)
                yield from documents(part, recipe)


def _found(spec: str, recipe: Recipe, kinds: dict[str, str]) -> tuple[list[Found], list[str]]:
    """The files of a source, none where it has none, and what to tell of them; kinds that are new go to `kinds`."""
    if spec in EMBEDDED:
        kinds.setdefault({"docstrings": CONVERSATION, "preferences": PREFERENCE}.get(spec, TEXT), spec)
        return [], []
    if spec == "-":
        raise DataError("-: stdin can be read only once; save it to a file, and name that")
    passed: Counter[str] = Counter()
    split = ""
    if not spec.startswith(PREFIX):
        found, passed = find(spec, recipe)
    elif huggingface.local(spec)[0]:
        paths, split = huggingface.files(spec)
        found = [each for path in paths for each in find(path, replace(recipe, format=""))[0]]
    else:
        return [], []
    said = _statements(spec, found, passed, recipe, kinds)
    return found, [*said, *([f"{called(spec)}: {split}"] if split else [])]


def spool(stream: BinaryIO, directory: str | os.PathLike[str]) -> Path:
    """A file below `directory` with all of the stream, such as stdin: it can be read again."""
    path = Path(directory) / STDIN
    partial = path.with_name(f"{STDIN}.partial")
    with open(partial, "wb") as file:
        while chunk := stream.read(READ_BYTES):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


# ------------------------------------------------------------------------------------------------------- statements


def _statements(spec: str, found: list[Found], passed: Counter[str], recipe: Recipe, kinds: dict[str, str]) -> list[str]:
    """A line for each way that files of `spec` are read, and one about those that are not."""
    ways: dict[str, list[str]] = {}
    for each in found:
        with readable(each.path):
            words, of = way(each.part, recipe)
        ways.setdefault(words, []).append(each.path)
        for kind in sorted(of):
            kinds.setdefault(kind, called(each.path))
    said = [
        f"{called(paths[0]) if len(paths) == 1 else f'{called(spec)}: {len(paths):,} files'}: {way}"
        for way, paths in ways.items()
    ]
    if passed:
        why = ", ".join(f"{count:,} {shown(reason)}" for reason, count in sorted(passed.items()))
        said.append(f"{called(spec)}: {passed.total():,} passed over: {why}")
    if not found:
        raise DataError(f"{called(spec)}: holds no file that can be read{'; ' + said[-1] if said else ''}")
    return said


def _require_text_field(found: list[Found], recipe: Recipe) -> None:
    """Raise a DataError with the fields that there are where the first records of a file have others than the recipe's."""
    for each in found:
        with readable(each.path):
            names = field_names(each.part, recipe)
        if names and recipe.text_field not in names:
            works = f"leave it out, or name one of: {shown(', '.join(names[:FIELDS_TOLD]))}"
            raise DataError(f"--text-field {recipe.text_field}: the first records of {called(each.path)} have none; {works}")


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


def _cut(spec: str, found: list[Found], survey: _Survey, update: Callable[[bytes], None]) -> Iterator[Unit]:
    """A unit a file, but for large ones: parts of about UNIT_BYTES."""
    for each in found:
        contents, cuts = _ranges(survey.chunks(each.path))
        tag = "oasst" if each.trees else TAGS.get(each.format, each.format)
        if each.encoding:
            tag = f"{tag}.{each.encoding}"  # by a file's name the same bytes may be compressed or not
        update(hashlib.sha256(tag.encode() + contents).digest())
        if each.trees or each.encoding or each.format not in ("lines", "jsonl"):
            cuts = _groups(each) if each.format in ("parquet", "arrow") and not each.trees else []
        unit = Unit(0, spec, called(each.path), each.format, paths=(each.path,), encoding=each.encoding, trees=each.trees)
        if len(cuts) > 1:
            for start, stop, first, size in cuts:
                yield unit._replace(start=start, stop=stop, first=first, bytes=size)
        else:
            yield unit._replace(bytes=os.path.getsize(each.path))


def _shared(units: Iterable[Unit]) -> list[Unit]:
    """The same units in the same order, with small files in a row in one unit: UNIT_BYTES and UNIT_FILES at most."""
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if groups and _is_alike(groups[-1][0], unit) and size + unit.bytes <= UNIT_BYTES and len(groups[-1]) < UNIT_FILES:
            groups[-1].append(unit)
            size += unit.bytes
        else:
            groups.append([unit])
            size = unit.bytes
    return [
        group[0]._replace(paths=tuple(path for unit in group for path in unit.paths), bytes=sum(unit.bytes for unit in group))
        for group in groups
    ]


def _is_alike(unit: Unit, more: Unit) -> bool:
    """Whether both are whole files that are read in the same way."""
    alike = (unit.format, unit.encoding, unit.trees) == (more.format, more.encoding, more.trees)
    return alike and not unit.stop and not more.stop


def _groups(found: Found) -> list[Cut]:
    """Ranges of row groups or batches of at least UNIT_BYTES."""
    with readable(found.path):
        groups = (parquet_groups if found.format == "parquet" else arrow_batches)(found.path)
    cuts: list[Cut] = []
    start, row, rows, size = 0, 0, 0, 0
    for index, (count, stored) in enumerate(groups, 1):
        rows, size = rows + count, size + stored
        if size >= UNIT_BYTES or index == len(groups):
            cuts.append((start, index, row, size))
            start, row, size = index, rows, 0
    return cuts


def _ranges(chunks: Iterator[bytes]) -> tuple[bytes, list[Cut]]:
    """sha256 of the chunks, and ranges of at least UNIT_BYTES that end with a line."""
    digest = hashlib.sha256()
    cuts: list[Cut] = []
    start, first, line, position = 0, 1, 1, 0
    for chunk in chunks:
        digest.update(chunk)
        counted = 0
        while (end := chunk.find(b"\n", max(counted, start + UNIT_BYTES - 1 - position))) >= 0:
            line += chunk.count(b"\n", counted, end + 1)
            counted = end + 1
            cuts.append((start, position + counted, first, position + counted - start))
            start, first = position + counted, line
        line += chunk.count(b"\n", counted)
        position += len(chunk)
    if position > start:
        cuts.append((start, position, first, position - start))
    return digest.digest(), cuts


def _embedded(spec: str, update: Callable[[bytes], None], said: list[str]) -> list[Unit]:
    if spec == "synthetic":
        update(embedded.synthetic_digest())
        said.append(f"synthetic: {embedded.SYNTHETIC_DOCUMENTS:,} small programs of a seeded grammar")
        return [Unit(0, spec, spec, spec)]
    names, root = embedded.stdlib_names(), embedded.stdlib_root()
    with readable(spec):
        contents = embedded.stdlib_digest(names)
        if spec != "stdlib":
            update(hashlib.sha256(spec.encode() + contents).digest())
            said.append(f"{spec}: made of the docstrings of {len(names):,} files of {root}")
            return [Unit(0, spec, spec, spec, bytes=sum(os.path.getsize(root / name) for name in names))]
        update(contents)
        said.append(f"stdlib: {len(names):,} files of {root}, a document a file")
        return _shared(Unit(0, spec, spec, spec, paths=(name,), bytes=os.path.getsize(root / name)) for name in names)


def _docstrings(spec: str) -> Iterator[Document]:
    from lumina.data.reading.docstrings import conversations, preferences

    return conversations() if spec == "docstrings" else preferences()


def _of_hub(spec: str, update: Callable[[bytes], None], said: list[str]) -> list[Unit]:
    """A unit a shard."""
    dataset, shards = huggingface.pinned(spec)
    update(hashlib.sha256("\0".join(("hub", *dataset)).encode()).digest())
    said.append(f"{dataset}: {shards:,} shards, downloaded from the Hugging Face Hub as they are read")
    return [Unit(0, spec, str(dataset), "hub", shard, shards) for shard in range(shards)]
