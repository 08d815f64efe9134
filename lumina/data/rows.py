"""Rows cut from a token stream by index, and batches as a pure function of the step.

B rows a batch, T positions a row. Nothing is stored between steps: any machine can make any batch from (seed, step).
"""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lumina.data.shards import TokenStream
from lumina.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lumina.data.packing import Plan

ROUNDS = 8
EMPTY = -1  # the segment of a position that holds nothing: no router counts it, and none but other empty ones see it


def permute(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of [0, n) in constant memory: where it sends each `index`, int64 of the same shape.

    A Feistel network is a bijection of [0, 4^h) whatever its round function is; walking on until the result is below n
    makes it one of [0, n) (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    low, shift, drop = np.uint64(2**half - 1), np.uint64(half), np.uint64(64 - half)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    keys = np.frombuffer(digest, "<u8").astype(np.uint64)
    result = np.array(index, np.uint64)
    walking = np.ones(result.shape, bool)
    while walking.any():
        x = result[walking]
        left, right = x >> shift, x & low
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) >> drop)
        x = left << shift | right
        result[walking] = x
        walking[walking] = x >= np.uint64(n)
    return result.astype(np.int64)


def shuffled(index: np.ndarray, n: int, seed: int) -> np.ndarray:
    """The rows, of n, that come at these places of an endless order, a new permutation each epoch; int64 of the same shape."""
    epochs, numbers = np.divmod(index, n)
    for epoch in np.unique(epochs):
        within = epochs == epoch
        numbers[within] = permute(numbers[within], n, seed, int(epoch))
    return numbers


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, which spreads every bit over the word."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class RowSet(Protocol):
    """Rows of one length, by number."""

    sequence_length: int

    def __len__(self) -> int: ...

    def gather(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of these numbers, int64 [n]: inputs, targets, segments, positions int32 [n, T]; weights float32 [n, T].
        An empty position is of token 0, weight 0 and segment -1; number -1 is a row that has no other."""


class Rows:
    """Chunks of a stream: row r is tokens [r T, r T + T], so neighbours share one token and every token but the first is a
    target once an epoch.

    Raises:
        DataError: the stream is shorter than one row.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, document_end_id: int):
        if stream.num_tokens < sequence_length + 1:
            works = f"data.sequence_length of at most {stream.num_tokens - 1}" if stream.num_tokens > 2 else "more text"
            if stream.name == "held_out":
                works += ", or a larger data.held_out"
            raise DataError(
                f"data.sequence_length = {sequence_length}: a row takes {sequence_length + 1} tokens, and the {stream.name} "
                f"documents have {stream.num_tokens}; use {works}"
            )
        self.stream, self.sequence_length, self.document_end_id = stream, sequence_length, document_end_id

    def __len__(self) -> int:
        return (self.stream.num_tokens - 1) // self.sequence_length

    def row(self, index: int) -> np.ndarray:
        """Tokens of row `index`, int32 [T + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.sequence_length
        return self.stream.read(start, start + self.sequence_length + 1)

    def gather(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As of `RowSet`: every target counts 1, and a document that goes on from the row before begins anew."""
        tokens = np.zeros((len(numbers), self.sequence_length + 1), np.int32)
        for i, number in enumerate(numbers.tolist()):
            if number >= 0:
                tokens[i] = self.row(number)
        weights = np.broadcast_to((numbers >= 0)[:, None], (len(numbers), self.sequence_length)).astype(np.float32)
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()  # the one place where targets are shifted
        segments, positions = segments_and_positions(inputs, self.document_end_id)
        segments[numbers < 0] = EMPTY
        return {"inputs": inputs, "targets": targets, "weights": weights, "segments": segments, "positions": positions}


class PackedRows:
    """Rows of whole documents side by side, as planned: each piece is a segment with positions from 0."""

    def __init__(self, stream: TokenStream, plan: "Plan", roles: TokenStream | None = None, weights: np.ndarray | None = None):
        """
        Args:
            stream: the tokens.
            plan: of `sequence_length` T.
            roles: whose words each token is, as a code; None counts every target 1.
            weights: float32 [codes], what a target of each code counts.
        """
        self.stream, self.plan, self.roles, self.code_weights = stream, plan, roles, weights
        self.sequence_length = plan.sequence_length

    def __len__(self) -> int:
        return len(self.plan.rows) - 1

    def gather(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As of `RowSet`: what pieces leave of a row is empty."""
        plan, T, n = self.plan, self.sequence_length, len(numbers)
        if n and not -1 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {len(self)}")
        there = np.maximum(numbers, 0)
        first = np.asarray(plan.rows[there])
        counts = np.where(numbers >= 0, plan.rows[there + 1] - first, 0)
        ends = np.cumsum(counts)
        piece = np.repeat(first - (ends - counts), counts) + np.arange(ends[-1] if n else 0)  # of all rows, one after another
        starts, lengths = plan.starts[piece], plan.lengths[piece].astype(np.int64)
        row = np.repeat(np.arange(n), counts)
        before = np.cumsum(lengths) - lengths  # positions of the pieces before, those of earlier rows too
        used = np.bincount(row, lengths, minlength=n).astype(np.int64)  # positions of each row that pieces fill
        column = before - np.repeat(np.cumsum(used) - used, counts)
        within = np.arange(lengths.sum()) - np.repeat(before, lengths)  # each position's place in its piece
        at = np.repeat(row * T + column, lengths) + within
        batch = {name: np.zeros(n * T, np.int32) for name in ("inputs", "targets")}
        weights = np.zeros(n * T, np.float32)
        pairs = list(zip(starts.tolist(), (starts + lengths + 1).tolist(), strict=True))
        if pairs:
            tokens = [self.stream.read(start, stop) for start, stop in pairs]
            batch["inputs"][at] = np.concatenate([each[:-1] for each in tokens])
            batch["targets"][at] = np.concatenate([each[1:] for each in tokens])
            weights[at] = 1
            if self.roles is not None and self.code_weights is not None:
                codes = np.concatenate([self.roles.read(start + 1, stop) for start, stop in pairs])
                weights[at] = self.code_weights[codes]
        segments, positions = np.full((n, T), EMPTY, np.int32), np.zeros((n, T), np.int32)
        segments.reshape(-1)[at] = np.repeat(np.arange(len(row)) - np.repeat(ends - counts, counts), lengths)
        positions.reshape(-1)[at] = within
        shaped = {name: array.reshape(n, T) for name, array in (*batch.items(), ("weights", weights))}
        return {**shaped, "segments": segments, "positions": positions}


class Batches:
    """Batches of rows: shuffled anew each epoch for training, in order for evaluation."""

    def __init__(
        self,
        rows: RowSet,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        part: tuple[tuple[int, ...], int] = ((0,), 1),
        first: int = 0,
    ):
        """
        Args:
            rows: of one source.
            batch_size: B, rows a step; all processes together.
            seed: of the order, a new one each epoch.
            shuffle: False reads them in order.
            part: which of n equal parts of each batch are read, and n: what one of several processes needs.
            first: rows, in the run's order, that come before those of step 0; see `following`.
        """
        if batch_size % part[1]:
            raise ConfigError(
                f"train.batch_size / train.micro_batches = {batch_size} rows: must be a multiple of {part[1]}, its parts"
            )
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.part, self.first = part, first

    def following(self, step: int, consumed: int) -> "Batches":
        """The same batches, but that step `step` begins after `consumed` rows: they were read in batches of another size."""
        first = consumed - step * self.batch_size
        return Batches(self.rows, self.batch_size, self.seed, self.shuffle, self.part, first)

    def consumed(self, step: int) -> int:
        """Rows read before step `step`."""
        return self.first + step * self.batch_size

    def stage(self, step: int) -> int:
        """The stage that step `step`, counted from 0, is in."""
        return 0

    def begin(self, step: int) -> int:
        """The first step of the stage of step `step`."""
        return 0

    def sequence_length(self, step: int) -> int:
        """T of the rows of step `step`."""
        return self.rows.sequence_length

    def positions(self, start: int, stop: int) -> int:
        """B T, added up over steps `start` to `stop`."""
        return (stop - start) * self.batch_size * self.rows.sequence_length

    def taken(self, step: int) -> dict[int, int]:
        """Rows of each source, by number, that its stage has read up to and with step `step`."""
        return {0: self.consumed(step + 1)}

    def again(self, stage: int) -> dict[int, int]:
        """Positions of each source, by number, that a stage reads anew; see `lumina.data.mixture.Course`."""
        return {}

    def row_numbers(self, step: int) -> np.ndarray:
        """Which rows step `step` reads, int64 [B]. Epochs follow each other without a gap, within a batch if need be."""
        if step < 0 or self.consumed(step) < 0:
            raise IndexError(f"step {step}: steps count from 0")
        index = self.consumed(step) + np.arange(self.batch_size, dtype=np.int64)
        return shuffled(index, len(self.rows), self.seed) if self.shuffle else index % len(self.rows)

    def origins(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """The source, by number, and the row in it of each of `row_numbers`."""
        return [(0, number) for number in numbers.tolist()]

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This part of the batch of step `step`: inputs, targets, segments, positions int32 [B, T]; weights float32 [B, T]."""
        return self._of(self.row_numbers(step))

    def evaluation(self, max_rows: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Every row once, or the first `max_rows` if above 0, in order; the last batch is padded with rows of weight 0."""
        stop = min(max_rows, len(self.rows)) if max_rows > 0 else len(self.rows)
        for start in range(0, stop, self.batch_size):
            yield self._of(np.arange(start, min(start + self.batch_size, stop)))

    def _of(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        blocks, parts = self.part
        numbers = np.pad(numbers, (0, self.batch_size - len(numbers)), constant_values=-1)  # rows that there are not
        return self.rows.gather(numbers.reshape(parts, -1)[list(blocks)].ravel())


def segments_and_positions(inputs_BT: np.ndarray, document_end_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Which document of its row a token belongs to, and its place in it, both from 0, int32 [B, T].

    A document-end token belongs to the document that it ends.
    """
    ends = inputs_BT == document_end_id
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    column = np.arange(inputs_BT.shape[1], dtype=np.int32)
    start = np.maximum.accumulate(np.where(begins, column, np.int32(0)), axis=1)
    return np.cumsum(begins, axis=1, dtype=np.int32), column - start
