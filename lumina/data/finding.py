"""Which files a source names, and the format of each."""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lumina.data.recipe import Recipe
from lumina.data.streams import shown
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
RECORD_EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl"}
FORMATS = ("text", "lines", "jsonl")
EMBEDDED = ("stdlib", "synthetic")


class Found(NamedTuple):
    """A file to read, as what, and what to tell of it."""

    path: str
    format: str
    about: str


def find(spec: str, recipe: Recipe) -> tuple[list[Found], Counter[str]]:
    """The files that `spec` names, in order; and how many files of a directory were passed over, by the reason.

    Raises:
        DataError: nothing is there, a file cannot be read, or is of no known format.
        UsageError: the recipe's format does not exist.
    """
    if recipe.format and recipe.format not in FORMATS:
        raise UsageError(f"--format: {recipe.format!r} is no format; there are {', '.join(FORMATS)}")
    passed: Counter[str] = Counter()
    named = os.path.expanduser(spec)
    if os.path.isdir(named):
        paths = list(_walk(named, passed))
    elif os.path.exists(named):
        paths = [named]
    else:
        paths = sorted(name for name in glob.glob(named, recursive=True) if os.path.isfile(name))
        if not paths:
            what = "no file matches" if glob.has_magic(named) else "no such file"
            raise DataError(
                f"{shown(spec)}: {what}; name files, directories, globs such as texts/*.jsonl, or {', '.join(EMBEDDED)}"
            )
    found = []
    for path in paths:
        with readable(path), open(path, "rb"):  # refuse now, not after the files before it were read
            pass
        format_ = recipe.format or _format(path)
        if not format_:
            if os.path.isdir(named):
                passed[os.path.splitext(path)[1] or "no extension"] += 1
                continue
            raise DataError(f"{shown(path)}: of no known format; name it with --format, one of {', '.join(FORMATS)}")
        found.append(Found(path, format_, ABOUT[format_]))
    return found, passed


ABOUT = {"text": "text, a document a file", "lines": "lines, a document a line", "jsonl": "jsonl, a document a line"}


def _format(path: str) -> str:
    stem, extension = os.path.splitext(os.path.basename(path).lower())
    if extension in TEXT_EXTENSIONS or (not extension and stem in TEXT_NAMES):
        return "text"
    return RECORD_EXTENSIONS.get(extension, "")


def _walk(top: str, passed: Counter[str]) -> Iterator[str]:
    """Files below a directory in order of their names, without hidden ones; each directory once, whatever links lead to it."""
    seen: set[str] = set()

    def fail(error: OSError) -> None:
        raise DataError(f"{shown(error.filename)}: cannot be read: {error.strerror}") from error

    for here, children, names in os.walk(top, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(here))
        kept = []
        for child in sorted(children):
            if child.startswith("."):
                passed["hidden"] += 1
            elif os.path.realpath(os.path.join(here, child)) in seen:
                passed["link to a directory already taken"] += 1
            else:
                seen.add(os.path.realpath(os.path.join(here, child)))
                kept.append(child)
        children[:] = kept
        for name in sorted(names):
            path = os.path.join(here, name)
            if name.startswith("."):
                passed["hidden"] += 1
            elif not os.path.exists(path):
                passed["broken link"] += 1
            elif not stat.S_ISREG(os.stat(path).st_mode):
                passed["no file but a socket, pipe or device"] += 1
            else:
                yield path


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns an OSError into a DataError that names the file."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{shown(str(error.filename or path))}: cannot be read: {error.strerror}") from error
