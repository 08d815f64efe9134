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
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.data.rows import permute
from lumina.runs.steps import sync_files

FORMAT = 3  # part of every name: raise it when plans change meaning
ARRAYS = ("starts", "lengths", "rows")
BLOCK_TOKENS = 2**22  # looked at once

Codes = Callable[[int, int], np.ndarray]  # of tokens [start, stop), whose words they are


@dataclass(frozen=True)
class PackingReport:
    """What became of the documents."""

    documents: int = 0
    rows: int = 0
    positions: int = 0  # of all rows
    filled: int = 0  # of them, those that have an input and a target
    cut_documents: int = 0  # texts longer than a row, cut into pieces: every token is a target still
    split_conversations: int = 0  # longer than a row, split where turns begin
    cut_turns: int = 0  # longer than a row by themselves, or with their answer
    unlearned: int = 0  # pieces in which nothing counts, left out

    @property
    def waste(self) -> float:
        """Share of positions that hold nothing."""
        return 1 - self.filled / max(self.positions, 1)

    def __str__(self) -> str:
        told = [f"{self.documents:,} documents in {self.rows:,} packed rows, {100 * self.waste:.2f}% of them empty"]
        for count, what in (
            (self.cut_documents, "longer than a row, cut into pieces"),
            (self.split_conversations, "longer than a row, split between turns"),
            (self.cut_turns, "turns cut, longer than a row or so with their answer"),
            (self.unlearned, "pieces without anything to learn, left out"),
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
    codes: Codes | None = None,
    weights: np.ndarray | None = None,
) -> Plan:
    """The rows for documents [documents[i], documents[i + 1]) of a stream.

    Args:
        documents: int64 [n + 1], ascending.
        sequence_length: T.
        turns: int64 [m], ascending: where turns of conversations begin; None for texts.
        codes: whose words each token of a conversation is; None where it is all text.
        weights: [codes], what a target of each code counts: a piece of which none does is left out.
    """
    if turns is None:
        pieces = whole_or_cut(documents, sequence_length)
    else:
        pieces = _split(documents, turns, sequence_length, codes)
    unlearned = 0
    if codes is not None and weights is not None:
        counting = _counting(pieces, codes, weights)
        unlearned = int(np.sum(~counting))
        pieces = pieces._replace(starts=pieces.starts[counting], lengths=pieces.lengths[counting])
    bins, count = best_fit(pieces.lengths, sequence_length)
    # The rows come in no order of size, so that the first ones of an evaluation are like all others. Training permutes what is
    # found here once more: by epoch 0 of the same seed that would be the order of size again, and no epoch of a run is -1.
    place = permute(np.arange(count), count, seed=0, epoch=-1) if count else np.zeros(0, np.int64)
    order = np.argsort(place[bins], kind="stable")
    rows = np.concatenate([[0], np.cumsum(np.bincount(place[bins], minlength=count))]).astype(np.int64)
    filled = int(pieces.lengths.sum())
    report = PackingReport(len(documents) - 1, count, count * sequence_length, filled, *pieces[2:], unlearned)
    return Plan(sequence_length, pieces.starts[order], pieces.lengths[order].astype(np.int32), rows, report)


# --------------------------------------------------------------------------------------------------------------- pieces


def whole_or_cut(documents: np.ndarray, T: int) -> Pieces:
    """Each document as one piece, or as pieces of T pairs and what is left: every token but its first is a target once."""
    pairs = np.maximum(np.diff(documents) - 1, 0)
    counts = -(-pairs // T)
    of = np.repeat(np.arange(len(pairs)), counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Pieces(documents[of] + number * T, np.minimum(pairs[of] - number * T, T), int(np.sum(counts > 1)))


def _split(documents: np.ndarray, turns: np.ndarray, T: int, codes: Codes | None) -> Pieces:
    """Each conversation as one piece, or as parts that begin at turns."""
    long = np.diff(documents) - 1 > T
    short = ~long & (np.diff(documents) > 1)
    starts, lengths, cut = [documents[:-1][short]], [np.diff(documents)[short] - 1], 0
    for document in np.flatnonzero(long):
        begin, end = int(documents[document]), int(documents[document + 1])
        own = turns[np.searchsorted(turns, begin, "left") : np.searchsorted(turns, end, "left")].tolist()
        marks = [begin, *own[1:], end]  # what comes before the first turn belongs to it
        users = [codes is not None and _is_user(codes(*turn)) for turn in pairwise(marks)]
        parts, more = _parts(marks, users, T)
        cut += more
        starts.append(np.array([start for start, _ in parts], np.int64))
        lengths.append(np.array([length for _, length in parts], np.int64))
    found, sizes = np.concatenate(starts).astype(np.int64), np.concatenate(lengths).astype(np.int64)
    order = np.argsort(found, kind="stable")
    return Pieces(found[order], sizes[order], 0, int(long.sum()), cut)


def _is_user(codes: np.ndarray) -> bool:
    """Whether the codes of a turn are a user's: beside markers, all are of one role."""
    from lumina.conversation import USER

    return int(codes.max(initial=0)) == USER


def _parts(marks: list[int], users: list[bool], T: int) -> tuple[list[tuple[int, int]], int]:
    """(first token, pairs) of a conversation's parts, and how many turns were cut.

    A part is as many whole turns as fit, and the next begins at a user's if any does. What does not fit, a turn or a question
    with its answer, is cut: so that the answer is in one part with as much of the question's end as fits, if it fits itself.

    Args:
        marks: where turns begin, and the end of the last.
        users: whether each is a user's.
    """
    parts: list[tuple[int, int]] = []
    cut, i, last, begin = 0, 0, len(users), marks[0]
    while i < last:
        answered = users[i] and i + 1 < last and not users[i + 1]
        answer, end = (marks[i + 2] - marks[i + 1], marks[i + 2]) if answered else (0, marks[i + 1])
        if end - begin - 1 > T:
            cut += 1
            stop = end - T - 1 if 0 < answer <= T else end - 1  # the last target of what is cut here
            parts += [(start, min(T, stop - start)) for start in range(begin, stop, T)]
            begin = stop
            if stop == end - 1:
                i, begin = i + 1 + answered, end
            continue
        most = i + 1
        while most < last and marks[most + 1] - begin - 1 <= T:
            most += 1
        stop = next((j for j in range(most, i, -1) if users[j]), most) if most < last else most
        parts += [(begin, marks[stop] - begin - 1)] if marks[stop] - begin > 1 else []
        i, begin = stop, marks[stop]
    return parts, cut


def _counting(pieces: Pieces, codes: Codes, weights: np.ndarray) -> np.ndarray:
    """Whether any target of each piece, in order of their starts, counts: bool [p]."""
    starts, stops = pieces.starts, pieces.starts + pieces.lengths + 1
    found, first = np.zeros(len(starts), bool), 0
    while first < len(starts):
        last = max(int(np.searchsorted(starts, starts[first] + BLOCK_TOKENS)), first + 1)
        base = int(starts[first])
        before = np.concatenate([[0], np.cumsum(weights[codes(base, int(stops[last - 1]))] > 0)])
        found[first:last] = before[stops[first:last] - base] > before[starts[first:last] + 1 - base]
        first = last
    return found


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
    except (OSError, ValueError, KeyError, TypeError, EOFError, IndexError):
        shutil.rmtree(path, ignore_errors=True)  # of a disk that lost some of it
    made = make()
    directory = path.parent / f".making-{uuid.uuid4().hex}"
    try:
        directory.mkdir()
        for name in ARRAYS:
            np.save(directory / f"{name}.npy", getattr(made, name), allow_pickle=False)
        told = {"sequence_length": made.sequence_length, "report": asdict(made.report)}
        (directory / "report.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        sync_files(directory)
        os.rename(directory, path)
        return load(path)
    except OSError:  # the corpus cannot be written to, or another process was first with the same
        return made
    finally:
        shutil.rmtree(directory, ignore_errors=True)
