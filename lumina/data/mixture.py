"""Batches over stages and mixtures: which row of which source a step reads, as a pure function of the step.

B rows a batch. A table is the rows of one source at one length; a row's number has its table in the bits above TABLE_BIT.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lumina.data.rows import Batches, RowSet, shuffled
from lumina.errors import ConfigError

TABLE_BIT = 44  # rows of a table are numbered below 2^44, so that those of the first table keep their own numbers
SEED_BIT = 64  # above any seed: each source has an order of its own, the first that of a run of it alone


class Turns:
    """Sources taking turns, so that after any n rows source k has had within one row of n w_k / W, W the sum of the weights.

    The t-th row of a source with share w / W may come after row (t - 1) W / w and must by row t W / w, rounded up: the windows
    of proportionate progress (Baruah et al., 1996). Whoever is due first takes the next row; some schedule keeps all windows,
    so this one does.
    """

    def __init__(self, weights: Sequence[int]):
        """`weights` are whole and above 0; after their sum of rows all begins again."""
        self.weights = tuple(weights)
        self.period = sum(weights)
        self.source = np.empty(self.period, np.int32)  # whose turn each row of the period is
        self.place = np.empty(self.period, np.int64)  # which of its source's rows in the period it is
        had = [0] * len(weights)
        waiting = [(0, k) for k in range(len(weights))]  # (row from which a source's next one may come, source)
        ready: list[tuple[int, int]] = []  # (row by which it must, source)
        for n in range(self.period):
            while waiting and waiting[0][0] <= n:
                k = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (-(-(had[k] + 1) * self.period // weights[k]), k))
            k = heapq.heappop(ready)[1]
            self.source[n], self.place[n] = k, had[k]
            had[k] += 1
            if had[k] < weights[k]:
                heapq.heappush(waiting, (had[k] * self.period // weights[k], k))

    def rows(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, which of its rows) of each row `index`, int64 [N], counted from 0."""
        whole, rest = np.divmod(index, self.period)
        source = self.source[rest]
        return source, whole * np.array(self.weights, np.int64)[source] + self.place[rest]

    def counts(self, n: int) -> np.ndarray:
        """Rows of each source among the first `n`, int64 [K]."""
        whole, rest = divmod(n, self.period)
        return whole * np.array(self.weights, np.int64) + np.bincount(self.source[:rest], minlength=len(self.weights))


class Leg(NamedTuple):
    """One stage of a course: `steps` steps of rows from `tables`, by number, in turns."""

    steps: int
    tables: tuple[int, ...]
    turns: Turns


class Table(NamedTuple):
    """The rows of one source at one length."""

    source: int  # its number, in the order in which sources first appear
    rows: RowSet


class Tables:
    """Rows of several tables by their numbers; those of one call are of one length."""

    def __init__(self, tables: Sequence[Table]):
        self.tables = tuple(tables)
        self.sequence_length = max(table.rows.sequence_length for table in tables)

    def __len__(self) -> int:
        return sum(len(table.rows) for table in self.tables)

    def gather(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """As of `RowSet`."""
        table, row = numbers >> TABLE_BIT, numbers & (1 << TABLE_BIT) - 1
        used = np.unique(table)
        if len(used) == 1:
            return self.tables[int(used[0])].rows.gather(row)
        batch: dict[str, np.ndarray] = {}
        for number in used:
            own = table == number
            for name, array in self.tables[int(number)].rows.gather(row[own]).items():
                batch.setdefault(name, np.empty((len(numbers), *array.shape[1:]), array.dtype))[own] = array
        return batch


class Course(Batches):
    """The batches of a run: stages in order, each with its mixture. One stage of one source is what `Batches` makes of it."""

    rows: Tables

    def __init__(
        self,
        tables: Sequence[Table],
        legs: Sequence[Leg],
        batch_size: int,
        seed: int,
        part: tuple[tuple[int, ...], int] = ((0,), 1),
        first: int = 0,
    ):
        """
        Args:
            tables: all that the legs name, in the order of first use.
            legs: the stages, at least one.
            batch_size, seed, part, first: as of `Batches`.
        """
        super().__init__(Tables(tables), batch_size, seed, part=part, first=first)
        self.legs = tuple(legs)
        self.starts = np.cumsum([0, *(leg.steps for leg in legs)])  # the first step of each stage, and the end
        used = [np.zeros(len(tables), np.int64)]  # rows of each table before each stage, and at the end
        for leg in legs:
            used.append(used[-1].copy())
            used[-1][list(leg.tables)] += leg.turns.counts(leg.steps * batch_size)
        self._used = used

    def stage(self, step: int) -> int:
        """The stage that step `step`, counted from 0, is in; past the end it is the last."""
        return min(int(np.searchsorted(self.starts, step, side="right")), len(self.legs)) - 1

    def begin(self, step: int) -> int:
        """The first step of the stage of step `step`."""
        return int(self.starts[self.stage(step)])

    def sequence_length(self, step: int) -> int:
        """Tokens in a row of step `step`."""
        return self.rows.tables[self.legs[self.stage(step)].tables[0]].rows.sequence_length

    def positions(self, start: int, stop: int) -> int:
        """Positions of all rows of steps `start` to `stop`."""
        total = 0
        for number, leg in enumerate(self.legs):
            first, end = int(self.starts[number]), int(self.starts[number + 1])
            T = self.rows.tables[leg.tables[0]].rows.sequence_length
            total += max(0, min(stop, end) - max(start, first)) * T * self.batch_size
        return total

    def taken(self, step: int) -> dict[int, int]:
        """Rows of each source, by number, that its stage has read up to and with step `step`, counted from 0."""
        leg = self.legs[number := self.stage(step)]
        counts = leg.turns.counts(self.consumed(step + 1) - int(self.starts[number]) * self.batch_size)
        return {self.rows.tables[table].source: int(count) for table, count in zip(leg.tables, counts, strict=True)}

    def epochs(self) -> dict[int, float]:
        """How often each source, by number, is read in all steps."""
        total: dict[int, float] = {}
        for (source, rows), used in zip(self.rows.tables, self._used[-1].tolist(), strict=True):
            total[source] = total.get(source, 0.0) + used / len(rows)
        return total

    def again(self, stage: int) -> dict[int, int]:
        """Positions of each source, by number, that a stage reads although stages before it did, in rows of another length.

        An order of longer rows knows nothing of that of shorter ones: how many is what chance makes of two orders.
        """
        found = {}
        for number in self.legs[stage].tables:
            source, rows = self.rows.tables[number]
            unread = 1.0
            for other, (its_source, its_rows) in enumerate(self.rows.tables):
                if its_source == source and other != number:
                    unread *= 1 - min(1, self._used[stage][other] / len(its_rows))
            reads = min(int(self._used[stage + 1][number] - self._used[stage][number]), len(rows))
            if count := round((1 - unread) * reads * rows.sequence_length):
                found[source] = count
        return found

    def following(self, step: int, consumed: int) -> "Course":
        """As of `Batches`. Raises a ConfigError where there are several stages and the rows do not follow."""
        first = consumed - step * self.batch_size
        if first and len(self.legs) > 1:
            raise ConfigError(
                f"train.batch_size = {self.batch_size}: {consumed:,} rows were read in {step:,} steps of another size, and in "
                "a run of several stages that must stay; use the size that it began with"
            )
        return Course(self.rows.tables, self.legs, self.batch_size, self.seed, self.part, first)

    def origins(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """As of `Batches`."""
        rows = (numbers & (1 << TABLE_BIT) - 1).tolist()
        return [(self.rows.tables[table].source, row) for table, row in zip((numbers >> TABLE_BIT).tolist(), rows, strict=True)]

    def row_numbers(self, step: int) -> np.ndarray:
        """Which rows step `step` reads, int64 [B], with their tables: a source's epochs follow each other without a gap."""
        if step < 0 or self.consumed(step) < 0:
            raise IndexError(f"step {step}: steps count from 0")
        stage = self.stage(step)
        leg, begin = self.legs[stage], int(self.starts[stage]) * self.batch_size
        index = self.consumed(step) - begin + np.arange(self.batch_size, dtype=np.int64)
        which, place = leg.turns.rows(index)
        numbers = np.empty(self.batch_size, np.int64)
        for k, table in enumerate(leg.tables):
            own = which == k
            source, rows = self.rows.tables[table]
            seed = self.seed + (source << SEED_BIT)
            # A table that earlier stages used goes on where it was.
            drawn = shuffled(self._used[stage][table] + place[own], len(rows), seed)
            numbers[own] = drawn + (table << TABLE_BIT)
        return numbers
