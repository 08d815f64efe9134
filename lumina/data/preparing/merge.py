"""The files of all units -> shards: duplicates, which only all documents together can show, the held-out split, and the index.

Units are taken in order, so that of equal documents the first of the sources stays.
"""

import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.data.cleaning.duplicates import NearDuplicates
from lumina.data.corpus import SIDES, kind_of
from lumina.data.preparing.tokenise import DOCUMENT, SAMPLES, Account
from lumina.data.recipe import Recipe
from lumina.data.records import KINDS, PREFERENCE, TEXT
from lumina.data.shards import ShardWriter
from lumina.errors import DataError

BLOCK_TOKENS = 2**22  # copied at once
ROLE_CODES = 256  # a code of `lumina.conversation` is a byte


class Merged(NamedTuple):
    """What a manifest says of the shards."""

    kind: str
    sides: dict[str, dict[str, Any]]  # train and held_out: documents, bytes, tokens, shards
    kinds: dict[str, int]  # documents of each
    account: Account  # of duplicates
    sources: dict[str, dict[str, int]]  # name of a source -> documents, bytes, tokens that were kept


def merge(
    units: Sequence[tuple[str, Path]],
    recipe: Recipe,
    held_out: float,
    vocab_size: int,
    dtype: str,
    directory: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Merged:
    """Write the shards and indices of all units, (source, files) in order, into `directory`.

    Raises:
        DataError: no document is left, or none on a side of the split, or, as a KindsError, preferences are mixed with others.
    """
    tables = [_Unit(source, path, dtype) for source, path in units]
    kind = kind_of(_kinds(tables))
    account = Account()
    kept = _kept(tables, recipe, account)
    held = [unit.documents["place"] < held_out for unit in tables]
    require_both_sides(
        np.concatenate([unit.documents["place"][keep] for unit, keep in zip(tables, kept, strict=True)]), held_out
    )
    sides = {side: _Side(directory, side, vocab_size, kind) for side in SIDES}
    sources: dict[str, dict[str, int]] = {}
    total, done = sum(unit.tokens.size for unit in tables), 0
    for unit, keep, out in zip(tables, kept, held, strict=True):
        for first, last in unit.blocks():
            for side, chosen in zip(SIDES, (keep & ~out, keep & out), strict=True):
                sides[side].write(unit, first, last, chosen[first:last])
            done += int(unit.offsets[last] - unit.offsets[first])
            progress(done, total)
        about = sources.setdefault(unit.source, {"documents": 0, "bytes": 0, "tokens": 0})
        about["documents"] += int(keep.sum())
        for name in ("bytes", "tokens"):
            about[name] += int(unit.documents[name][keep].sum())
    codes = np.concatenate([unit.documents["kind"][keep] for unit, keep in zip(tables, kept, strict=True)])
    counts = {name: int(count) for code, name in enumerate(KINDS) if (count := np.sum(codes == code))}
    return Merged(kind, {side: sides[side].finish() for side in SIDES}, counts, account, sources)


class _Unit:
    """The files of a unit, mapped into memory."""

    def __init__(self, source: str, path: Path, dtype: str):
        self.source, self.path = source, path
        self.documents: np.ndarray = _mapped(path / "documents.bin", DOCUMENT)
        self.tokens = _mapped(path / "tokens.bin", np.dtype(dtype))
        self.roles = _mapped(path / "roles.bin", np.dtype(np.uint8))
        self.turns = _mapped(path / "turns.bin", np.dtype("<i8"))
        self.offsets = np.concatenate([[0], np.cumsum(self.documents["tokens"])])
        if self.offsets[-1] != self.tokens.size or self.roles.size not in (0, self.tokens.size):
            raise DataError(f"{path}: its files do not fit together; delete it, and it is made again")

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Documents [first, last) of about `BLOCK_TOKENS` tokens."""
        first = 0
        while first < len(self.documents):
            last = int(np.searchsorted(self.offsets, self.offsets[first] + BLOCK_TOKENS))
            last = min(max(last, first + 1), len(self.documents))
            yield first, last
            first = last

    def signatures(self, permutations: int) -> np.ndarray:
        """[documents, permutations], of the width that was written."""
        path = self.path / "signatures.bin"
        width = path.stat().st_size // max(len(self.documents) * permutations, 1) if path.is_file() else 4
        return _mapped(path, np.dtype(f"<u{width or 4}")).reshape(-1, permutations)

    def name(self, index: int) -> str:
        with open(self.path / "names.jsonl", encoding="utf-8") as file:
            return str(json.loads(next(islice(file, index, None))))


def _kinds(units: list[_Unit]) -> dict[str, str]:
    """Each kind of documents, and the name of the first one."""
    found: dict[str, str] = {}
    for unit in units:
        for code, first in zip(*np.unique(unit.documents["kind"], return_index=True), strict=True):
            if KINDS[code] not in found:
                found[KINDS[code]] = unit.name(int(first))
    return found


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.is_file() or path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r")


# ------------------------------------------------------------------------------------------------------- duplicates


def _kept(units: list[_Unit], recipe: Recipe, account: Account) -> list[np.ndarray]:
    """Which documents of each unit stay: bool [documents]."""
    kept = [np.ones(len(unit.documents), bool) for unit in units]
    if "exact" in recipe.named_steps:
        _drop_equal(units, kept, account)
    if "near" in recipe.named_steps:
        _drop_near(units, kept, recipe, account)
    return kept


def _drop_equal(units: list[_Unit], kept: list[np.ndarray], account: Account) -> None:
    keys = np.concatenate([unit.documents["key"] for unit in units])
    order = np.lexsort(keys.T)  # stable: of equal ones the first comes first
    begins = np.ones(len(keys), bool)
    begins[1:] = (keys[order[1:]] != keys[order[:-1]]).any(1)
    earlier = np.empty(len(keys), np.int64)  # the first document with the same key
    earlier[order] = order[begins][np.cumsum(begins) - 1]
    gone = earlier != np.arange(len(keys))
    for keep, of_unit in zip(kept, np.split(gone, np.cumsum([len(keep) for keep in kept])[:-1]), strict=True):
        keep &= ~of_unit
    told = [(int(i), int(earlier[i])) for i in np.flatnonzero(gone)[:SAMPLES]]
    _record("exact", "repeats", int(gone.sum()), told, units, account)


def _drop_near(units: list[_Unit], kept: list[np.ndarray], recipe: Recipe, account: Account) -> None:
    seen, numbers, count, start = NearDuplicates(recipe), array("q"), 0, 0
    told: list[tuple[int, int]] = []
    for unit, keep in zip(units, kept, strict=True):
        signatures = unit.signatures(recipe.near_permutations)
        for index in np.flatnonzero(keep):
            earlier = seen.earlier(signatures[index])
            if earlier < 0:
                numbers.append(start + int(index))
                continue
            keep[index] = False
            count += 1
            if len(told) < SAMPLES:
                told.append((start + int(index), numbers[earlier]))
        start += len(keep)
    _record("near", "nearly repeats", count, told, units, account)


def _record(step: str, what: str, count: int, told: list[tuple[int, int]], units: list[_Unit], account: Account) -> None:
    starts = np.cumsum([0, *(len(unit.documents) for unit in units)])

    def name(number: int) -> str:
        which = int(np.searchsorted(starts, number, "right")) - 1
        return units[which].name(number - int(starts[which]))

    for number, earlier in told:
        account.remove(step, f"{what} an earlier document", name(number), partial("as {}".format, name(earlier)))
    if count:
        account.removed[step] = {f"{what} an earlier document": count}


# ------------------------------------------------------------------------------------------------------------ sides


def require_both_sides(places: "np.ndarray | array[float]", held_out: float) -> None:
    """Raise a DataError, with what works, where documents that fall at `places` are all on one side of the split."""
    found = np.asarray(places)
    for count, name in ((np.sum(found >= held_out), "left for training"), (np.sum(found < held_out), "held out")):
        if not count:
            works = "a single text cannot be split: give it as several files or .jsonl lines"
            if found.min() < found.max():
                works = f"data.held_out={between(float(found.min()), float(found.max()))} leaves some on both sides"
            raise DataError(f"data.held_out = {held_out}: none of {found.size} documents is {name}; {works}")


def between(lowest: float, highest: float) -> float:
    """A short number above `lowest` and at most `highest`."""
    for digits in range(2, 17):
        number = (int(lowest * 10**digits) + 1) / 10**digits
        if lowest < number <= highest:
            return number
    return highest


class _Side:
    """Shards and index of the training or of the held-out documents, as they grow."""

    def __init__(self, directory: Path, name: str, vocab_size: int, kind: str):
        self.directory, self.name, self.kind = directory, name, kind
        self.tokens = ShardWriter(directory, name, vocab_size)
        self.roles = None if kind == TEXT else ShardWriter(directory, f"{name}_roles", ROLE_CODES, "|u1")
        self.about = {"documents": 0, "bytes": 0, "characters": 0}
        self.end = 0  # of the stream
        self.documents, self.turns = _Index(directory / f"{name}-documents.npy"), _Index(directory / f"{name}-turns.npy")

    def write(self, unit: _Unit, first: int, last: int, chosen: np.ndarray) -> None:
        """Append those of documents [first, last) of a unit that are `chosen`."""
        records = unit.documents[first:last]
        for name in self.about:
            self.about[name] += int(chosen.sum()) if name == "documents" else int(records[name][chosen].sum())
        start, stop = int(unit.offsets[first]), int(unit.offsets[last])
        mine = np.repeat(chosen, records["tokens"])
        self.tokens.write(unit.tokens[start:stop][mine])
        if self.roles is not None:
            from lumina.conversation import TEXT as CODE

            roles = unit.roles[start:stop] if unit.roles.size else np.full(stop - start, CODE, np.uint8)
            self.roles.write(roles[mine])
        sizes = np.where(chosen, records["tokens"], 0)
        begins = self.end + np.concatenate([[0], np.cumsum(sizes)])  # of each document, in this side's stream
        here, rejected = begins[:-1][chosen], records["rejected"][chosen]
        if self.kind == PREFERENCE:
            here = np.stack([here, begins[1:][chosen] - rejected], 1).ravel()
        self.documents.write(here)
        turns = unit.turns[np.searchsorted(unit.turns, start) : np.searchsorted(unit.turns, stop)]
        of = np.searchsorted(unit.offsets, turns, "right") - 1  # which document a turn is in
        self.turns.write((turns - unit.offsets[of] + begins[of - first])[chosen[of - first]])
        self.end = int(begins[-1])

    def finish(self) -> dict[str, Any]:
        """What the manifest says of this side."""
        self.documents.write(np.array([self.end]))
        about = self.about | self.tokens.finish()
        if self.roles is not None:
            about["roles"] = self.roles.finish()
        return about | {"documents_indexed": self.documents.finish(), "turns_indexed": self.turns.finish()}


class _Index:
    """An int64 array that grows in a file beside its own, until its length, which begins the file, is known."""

    def __init__(self, path: Path):
        self.path, self.growing, self.count = path, path.with_suffix(".growing"), 0
        self.file = open(self.growing, "wb")  # noqa: SIM115 closed by finish

    def write(self, values: np.ndarray) -> None:
        self.file.write(values.astype("<i8").tobytes())
        self.count += values.size

    def finish(self) -> int:
        self.file.close()
        with open(self.path, "wb") as file, open(self.growing, "rb") as grown:
            np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": (self.count,)})
            shutil.copyfileobj(grown, file)
        self.growing.unlink()
        return self.count
