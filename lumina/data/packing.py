"""Which pieces of which documents make up each row: best-fit packing, planned ahead into an index.

T positions a row. A document of L tokens, its end included, has L - 1 pairs of input and target: its end is a target and no
input. Documents with at most T pairs stay whole (Ding et al., Fewer Truncations Improve Language Modeling, 2024).
"""

import json
import os
import shutil
import uuid
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.data.rows import permute

FORMAT = 1  # part of every name: raise it when plans change meaning
ARRAYS = ("starts", "lengths", "rows")


@dataclass(frozen=True)
class PackingReport:
    """What became of the documents."""

    documents: int = 0
    rows: int = 0
    positions: int = 0  # of all rows
    filled: int = 0  # of them, those that have an input and a target
    cut_documents: int = 0  # texts longer than a row, cut into pieces: every token is a target still
    split_conversations: int = 0  # longer than a row, split where turns begin
    cut_turns: int = 0  # longer than a row by themselves, cut into pieces

    @property
    def waste(self) -> float:
        """Share of positions that hold nothing."""
        return 1 - self.filled / max(self.positions, 1)

    def __str__(self) -> str:
        told = [f"{self.documents:,} documents in {self.rows:,} packed rows, {100 * self.waste:.2f}% of them empty"]
        for count, what in (
            (self.cut_documents, "longer than a row, cut into pieces"),
            (self.split_conversations, "longer than a row, split between turns"),
            (self.cut_turns, "turns longer than a row, cut into pieces"),
        ):
            told += [f"{count:,} {what}"] if count else []
        return "; ".join(told)


@dataclass(frozen=True)
class Plan:
    """Pieces in the order of rows: row r has pieces rows[r] to rows[r + 1]; a piece is `lengths` pairs from token `starts`."""

    sequence_length: int
    starts: np.ndarray  # int64 [p]
    lengths: np.ndarray  # int32 [p]
    rows: np.ndarray  # int64 [r + 1]
    report: PackingReport
    path: Path | None = field(default=None, compare=False)  # of files that hold it

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process, such as one that makes batches, maps the files."""
        if self.path is not None:
            return load, (self.path,)
        return Plan, (self.sequence_length, self.starts, self.lengths, self.rows, self.report)


class Pieces(NamedTuple):
    """Parts of documents that each fit in a row."""

    starts: np.ndarray  # int64 [p]
    lengths: np.ndarray  # int64 [p]: pairs
    cut_documents: int = 0
    split_conversations: int = 0
    cut_turns: int = 0


def plan(
    documents: np.ndarray,
    sequence_length: int,
    turns: np.ndarray | None = None,
    is_user: Callable[[int, int], bool] | None = None,
) -> Plan:
    """The rows for documents [documents[i], documents[i + 1]) of a stream.

    Args:
        documents: int64 [n + 1], ascending.
        sequence_length: T.
        turns: int64 [m], ascending: where turns of conversations begin; None for texts.
        is_user: whether the turn of tokens [start, stop) is a user's: where a part preferably begins.
    """
    pieces = whole_or_cut(documents, sequence_length) if turns is None else _split(documents, turns, sequence_length, is_user)
    bins, count = best_fit(pieces.lengths, sequence_length)
    # The rows come in no order of size, so that the first ones of an evaluation are like all others.
    place = permute(np.arange(count), count, seed=0, epoch=0) if count else np.zeros(0, np.int64)
    order = np.argsort(place[bins], kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(place[bins], minlength=count))]).astype(np.int64)
    filled = int(pieces.lengths.sum())
    report = PackingReport(len(documents) - 1, count, count * sequence_length, filled, *pieces[2:])
    return Plan(sequence_length, pieces.starts[order], pieces.lengths[order].astype(np.int32), rows, report)


# --------------------------------------------------------------------------------------------------------------- pieces


def whole_or_cut(documents: np.ndarray, T: int) -> Pieces:
    """Each document as one piece, or as pieces of T pairs and what is left: every token but its first is a target once."""
    pairs = np.maximum(np.diff(documents) - 1, 0)
    counts = -(-pairs // T)
    of = np.repeat(np.arange(len(pairs)), counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Pieces(documents[of] + number * T, np.minimum(pairs[of] - number * T, T), int(np.sum(counts > 1)))


def _split(documents: np.ndarray, turns: np.ndarray, T: int, is_user: Callable[[int, int], bool] | None) -> Pieces:
    """Each conversation as one piece, or as parts that begin at turns; a turn too long by itself is cut as a text is."""
    long = np.diff(documents) - 1 > T
    short = ~long & (np.diff(documents) > 1)
    starts, lengths, cut = [documents[:-1][short]], [np.diff(documents)[short] - 1], 0
    for document in np.flatnonzero(long):
        begin, end = int(documents[document]), int(documents[document + 1])
        own = turns[np.searchsorted(turns, begin, "left") : np.searchsorted(turns, end, "left")].tolist()
        marks = [begin, *own[1:], end]  # what comes before the first turn belongs to it
        parts = _parts(marks, T, is_user)
        cut += sum(stop - start - 1 > T for start, stop in parts)
        pieces = whole_or_cut(np.array([part[0] for part in parts] + [end]), T)
        starts.append(pieces.starts)
        lengths.append(pieces.lengths)
    found, sizes = np.concatenate(starts).astype(np.int64), np.concatenate(lengths).astype(np.int64)
    order = np.argsort(found, kind="stable")
    return Pieces(found[order], sizes[order], 0, int(long.sum()), cut)


def _parts(marks: list[int], T: int, is_user: Callable[[int, int], bool] | None) -> list[tuple[int, int]]:
    """Tokens [start, stop) of a conversation's parts: as many whole turns as fit, the next beginning at a user's if any."""
    parts, i, last = [], 0, len(marks) - 1
    while i < last:
        most = i + 1
        while most < last and marks[most + 1] - marks[i] - 1 <= T:
            most += 1
        stop = most
        if most < last and is_user is not None:
            stop = next((j for j in range(most, i, -1) if is_user(marks[j], marks[j + 1])), most)
        parts.append((marks[i], marks[stop]))
        i = stop
    return parts


# ------------------------------------------------------------------------------------------------------------- best fit


def best_fit(lengths: np.ndarray, T: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: each piece, longest first, goes to the row with the least room that it fits in, else to a new one.

    Pieces of one length are placed together, rows with equal room are alike: time goes with the number of different lengths
    and rooms, besides a sort.

    Args:
        lengths: int [p], each from 1 to T.

    Returns:
        (the row of each piece, int64 [p]; how many rows there are)
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[order], return_index=True)
    ends = np.append(firsts, len(order))[1:].tolist()
    found = np.empty(len(lengths), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # positions left -> rows
    rooms: list[int] = []  # its keys, ascending
    count = 0

    def leave(left: int, rows: np.ndarray) -> None:
        if left and len(rows):
            if left not in room:
                room[left] = []
                insort(rooms, left)
            room[left].append(rows)

    for size, first, end in zip((-sizes).tolist(), firsts.tolist(), ends, strict=True):
        while first < end:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                left = rooms.pop(at)
                rows = np.concatenate(room.pop(left))
            else:
                left, fresh = T, -(-(end - first) // (T // size))
                rows = np.arange(count, count + fresh)
                count += fresh
            each = left // size  # the row with the least room stays that one until it is full
            taken = min(end - first, each * len(rows))
            full, part = divmod(taken, each)
            found[order[first : first + taken]] = np.repeat(rows[: full + 1], each)[:taken]
            first += taken
            leave(left - each * size, rows[:full])
            leave(left - part * size, rows[full : full + 1] if part else rows[:0])
            leave(left, rows[full + (part > 0) :])
    return found, count


# ---------------------------------------------------------------------------------------------------------------- files


def load(path: Path) -> Plan:
    """The plan in `path`, its arrays mapped. Raises OSError, ValueError or KeyError where it is not whole."""
    told = json.loads((path / "report.json").read_bytes())
    starts, lengths, rows = (np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
    if not len(starts) == len(lengths) == rows[-1] or len(rows) - 1 != told["report"]["rows"]:
        raise ValueError("its arrays do not belong together")
    return Plan(told["sequence_length"], starts, lengths, rows, PackingReport(**told["report"]), path)


def kept(path: Path, make: Callable[[], Plan]) -> Plan:
    """The plan in `path`, or the one that `make` makes, kept there, whole or not at all, where that can be written."""
    try:
        return load(path)
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(path, ignore_errors=True)  # of a disk that lost some of it
    made = make()
    directory = path.parent / f".making-{uuid.uuid4().hex}"
    try:
        directory.mkdir()
        for name in ARRAYS:
            np.save(directory / f"{name}.npy", getattr(made, name), allow_pickle=False)
        told = {"sequence_length": made.sequence_length, "report": asdict(made.report)}
        (directory / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        os.rename(directory, path)
        return load(path)
    except OSError:  # the corpus cannot be written to, or another process was first with the same
        return made
    finally:
        shutil.rmtree(directory, ignore_errors=True)
