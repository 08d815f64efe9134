"""Which files a source names, and the format of each."""

import codecs
import glob
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from lumina.data.corpus import is_prepared, is_unfinished
from lumina.data.reading.conversations import is_tree
from lumina.data.reading.formats import PEEKED_RECORDS, Part, records
from lumina.data.reading.json_values import values
from lumina.data.reading.streams import COMPRESSIONS, called, encoding_of, opened, shown
from lumina.data.recipe import Recipe
from lumina.data.records import Reject
from lumina.errors import DataError, UsageError

PROSE = ".txt .text .md .markdown .mdx .rst .tex .adoc .asciidoc .org .textile .wiki .srt .vtt"
CODE = (
    ".ada .adb .ads .agda .asm .awk .bas .bash .bat .c .cc .cfg .clj .cljs .cmake .coffee .cpp .cr .cs .css .cu .cuh .cxx .d "
    ".dart .diff .el .elm .erl .ex .exs .f .f03 .f08 .f77 .f90 .f95 .fish .for .fs .fsx .glsl .go .gradle .graphql .groovy .h "
    ".hcl .hh .hlsl .hpp .hrl .hs .htm .html .hxx .idr .ini .java .jl .js .jsx .kt .kts .l .lean .less .lhs .lisp .ll .lua .m "
    ".make .metal .mjs .mk .ml .mli .mm .mojo .nim .nix .pas .patch .php .pl .pm .prolog .proto .ps1 .pxd .py .pyi .pyx .r .rb "
    ".rkt .rs .s .sass .scala .scm .scss .sh .sml .sol .sql .sv .svelte .swift .t .tcl .tf .thrift .toml .ts .tsx .v .vb .vhd "
    ".vhdl .vim .vue .wat .xml .y .yaml .yml .zig .zsh"
)
TEXT_EXTENSIONS = frozenset((*PROSE.split(), *CODE.split()))
TEXT_NAMES = frozenset(("readme", "license", "licence", "copying", "changelog", "makefile", "dockerfile", "authors", "news"))
JSON_EXTENSIONS = (".json", ".jsonl", ".ndjson")
EXTENSIONS = {
    "text": TEXT_EXTENSIONS,
    "lines": TEXT_EXTENSIONS,
    "jsonl": JSON_EXTENSIONS,
    "json": JSON_EXTENSIONS,
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
    "oasst": (*JSON_EXTENSIONS, ".csv", ".parquet"),
}
BY_EXTENSION = {extension: name for name in ("text", "jsonl", "csv", "parquet", "arrow") for extension in EXTENSIONS[name]}
EMBEDDED = ("stdlib", "synthetic", "docstrings", "preferences")
SNIFFED_BYTES = 2**16


class Found(NamedTuple):
    """A file to read, and as what."""

    path: str
    format: str
    encoding: str = ""
    trees: bool = False  # its records are of trees of replies, which only all of them together make

    @property
    def part(self) -> Part:
        return Part(self.path, self.format, self.encoding, trees=self.trees)


def find(spec: str, recipe: Recipe) -> tuple[list[Found], Counter[str]]:
    """The files that `spec` names, in order; and how many files of a directory were passed over, by the reason.

    Raises:
        DataError: nothing is there, a file cannot be read, or is of no known format.
        UsageError: the recipe's format does not exist.
    """
    if recipe.format and recipe.format not in EXTENSIONS:
        raise UsageError(f"--format: {recipe.format!r} is no format; there are {', '.join(EXTENSIONS)}")
    passed: Counter[str] = Counter()
    named = os.path.expanduser(spec)
    if os.path.isdir(named):
        _require_source(spec, Path(named))
        return list(_of_directory(named, recipe, passed)), passed
    return [_named(path, recipe) for path in _matches(spec, named)], passed


def _require_source(spec: str, path: Path) -> None:
    """Raise a DataError for a directory that `lumina data prepare` makes: its shards are no documents, its manifest is none."""
    if is_unfinished(path):
        raise DataError(f"{called(spec)}: is being prepared, or was stopped; the command that began it goes on with it")
    if is_prepared(path):
        works = f"train on it alone, or in a mixture such as {called(spec)}@1,OTHER@1; else name what it was made of"
        raise DataError(f"{called(spec)}: is a prepared directory, which holds no documents to read; {works}")


def _matches(spec: str, named: str) -> list[str]:
    if os.path.lexists(named):
        return [named]
    if found := sorted(name for name in glob.glob(named, recursive=True) if os.path.isfile(name)):
        return found
    what = "no file matches" if glob.has_magic(named) else "no such file"
    works = f"name files, directories, globs such as texts/*.jsonl, hf: data sets, or {', '.join(EMBEDDED)}"
    raise DataError(f"{called(spec)}: {what}; {works}")


def _named(path: str, recipe: Recipe) -> Found:
    """A file that the user named: of what it is by its name, or else by what it holds."""
    with readable(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{called(path)}: is a socket, pipe or device; give its contents as - (stdin)")
        encoding = encoding_of(path)  # an unreadable file is refused now, not after the files before it were read
        format_ = _container(path, encoding, recipe) or _sniffed(path, encoding)
    if not format_:
        raise DataError(f"{called(path)}: of no known format; where it is one, name it with --format: {', '.join(EXTENSIONS)}")
    return _with_trees(Found(path, format_, encoding), recipe)


def _of_directory(top: str, recipe: Recipe, passed: Counter[str]) -> Iterator[Found]:
    """The files of known extensions."""
    for path in _walk(top, passed):
        stem, extension = _extension(path)
        named = extension in EXTENSIONS[recipe.format] if recipe.format else extension in BY_EXTENSION
        if not named and not (stem in TEXT_NAMES and not extension and recipe.format in ("", "text", "lines")):
            passed[extension or "no extension"] += 1
            continue
        with readable(path):
            encoding = encoding_of(path)
            format_ = _container(path, encoding, recipe)
        yield _with_trees(Found(path, format_, encoding), recipe)


def _container(path: str, encoding: str, recipe: Recipe) -> str:
    """The format by the recipe or the file's name; "" where they do not tell."""
    if recipe.format and recipe.format != "oasst":
        return recipe.format
    stem, extension = _extension(path)
    if extension == ".json":  # as often a JSON value a line
        return "jsonl" if _sniffed(path, encoding) == "jsonl" else "json"
    return BY_EXTENSION.get(extension, "text" if stem in TEXT_NAMES and not extension else "")


def _extension(path: str) -> tuple[str, str]:
    """The name and its extension, without that of a compression."""
    name = os.path.basename(path).lower()
    stem, extension = os.path.splitext(name)
    return os.path.splitext(stem) if extension[1:] in COMPRESSIONS else (stem, extension)


def _sniffed(path: str, encoding: str) -> str:
    """The format by what the file begins with; "" where it is nothing known."""
    with opened(path, encoding) as stream:
        beginning = stream.file.read(SNIFFED_BYTES)
    if beginning.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return "parquet" if beginning.startswith(b"PAR1") else "arrow"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(beginning).lstrip()
    except UnicodeDecodeError:
        return ""
    if "\0" in text:
        return ""
    line, _, more = text.partition("\n")
    if line.startswith("{") and (_is_json(line) or (not more and len(beginning) == SNIFFED_BYTES)):
        return "jsonl"
    first = next(values(io.BytesIO(text.encode("utf-8")), SNIFFED_BYTES), None) if text.startswith(("{", "[")) else None
    return "json" if first and not first.fault and isinstance(first.value, dict | list) else "text"


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _with_trees(found: Found, recipe: Recipe) -> Found:
    """The same, marked where the recipe or the first record says that it is of trees of replies."""
    if found.format in ("text", "lines"):
        return found
    if recipe.format == "oasst":
        return found._replace(trees=True)
    with readable(found.path):
        first = next(
            (each[1] for each in islice(records(found.part, recipe), PEEKED_RECORDS) if not isinstance(each, Reject)), None
        )
    return found._replace(trees=not recipe.text_field and isinstance(first, dict) and is_tree(first))


def _walk(top: str, passed: Counter[str]) -> Iterator[str]:
    """Files below a directory in order of their names, without hidden ones; each once, whatever links lead to it."""
    seen = {os.path.realpath(top)}

    def is_new(here: str, name: str, what: str) -> bool:
        real = os.path.realpath(os.path.join(here, name))
        reason = "hidden" if name.startswith(".") else f"link to a {what} already taken" if real in seen else ""
        if reason:
            passed[reason] += 1
        else:
            seen.add(real)
        return not reason

    def is_source(here: str, name: str) -> bool:
        path = Path(here, name)
        if is_prepared(path) or is_unfinished(path):
            passed["prepared directory"] += 1
            return False
        return True

    def fail(error: OSError) -> None:
        raise DataError(f"{shown(error.filename)}: cannot be read: {error.strerror}") from error

    for here, children, names in os.walk(top, onerror=fail, followlinks=True):
        children[:] = [child for child in sorted(children) if is_source(here, child) and is_new(here, child, "directory")]
        for name in sorted(names):
            path = os.path.join(here, name)
            if not os.path.exists(path):
                passed["broken link"] += 1
            elif not os.path.isfile(path):
                passed["socket, pipe or device"] += 1
            elif is_new(here, name, "file"):
                yield path


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns an OSError into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{called(str(error.filename or path))}: cannot be read: {error.strerror}") from error
