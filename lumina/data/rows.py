"""Rows cut from a token stream by index, and batches as a pure function of the step.

B rows a batch, T positions a row. Row r is tokens [r T, r T + T], so neighbours share one token and every token but the first
is a target once an epoch. Nothing is stored between steps: any machine can make any batch from (seed, step).
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from lumina.data.shards import TokenStream
from lumina.errors import ConfigError, DataError

ROUNDS = 8


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


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, which spreads every bit over the word."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Rows:
    """The rows of a stream, by index.

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


class Batches:
    """Batches of rows: shuffled anew each epoch for training, in order for evaluation."""

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        part: tuple[tuple[int, ...], int] = ((0,), 1),
        first: int = 0,
    ):
        """
        Args:
            rows: of one stream.
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

    def row_numbers(self, step: int) -> np.ndarray:
        """Which rows step `step` reads, int64 [B]. Epochs follow each other without a gap, within a batch if need be."""
        if step < 0 or self.consumed(step) < 0:
            raise IndexError(f"step {step}: steps count from 0")
        epochs, numbers = np.divmod(self.consumed(step) + np.arange(self.batch_size, dtype=np.int64), len(self.rows))
        if self.shuffle:
            for epoch in np.unique(epochs):
                within = epochs == epoch
                numbers[within] = permute(numbers[within], len(self.rows), self.seed, int(epoch))
        return numbers

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This part of the batch of step `step`: inputs, targets, segments, positions int32 [B, T]; weights float32 [B, T]."""
        return self._of(self.row_numbers(step))

    def evaluation(self, max_rows: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Every row once, or the first `max_rows` if above 0, in order; the last batch is padded with rows of weight 0."""
        stop = min(max_rows, len(self.rows)) if max_rows > 0 else len(self.rows)
        for start in range(0, stop, self.batch_size):
            yield self._of(np.arange(start, min(start + self.batch_size, stop)))

    def _of(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        (blocks, parts), T = self.part, self.rows.sequence_length
        numbers = np.pad(numbers, (0, self.batch_size - len(numbers)), constant_values=-1)  # rows that there are not
        own = numbers.reshape(parts, -1)[list(blocks)].ravel()
        tokens = np.zeros((len(own), T + 1), np.int32)
        weights = np.zeros((len(own), T), np.float32)
        for i, number in enumerate(own):
            if number >= 0:
                tokens[i] = self.rows.row(int(number))
                weights[i] = 1
        inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()  # the one place where targets are shifted
        segments, positions = segments_and_positions(inputs, self.rows.document_end_id)
        return {"inputs": inputs, "targets": targets, "weights": weights, "segments": segments, "positions": positions}


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
