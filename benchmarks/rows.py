"""Rows that one thread makes in a second of its own time, beside what the fastest trainer here consumes; prints JSON.

    .venv/bin/python benchmarks/rows.py [--documents 200000] [--length 256]

Documents of random tokens in shards as prepared, of the lengths that short conversations and texts have.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from lumina.data.mixture import Course, Leg, Table, Turns
from lumina.data.packing import plan
from lumina.data.rows import PackedRows, Rows
from lumina.data.shards import ShardWriter, TokenStream

BATCH = 32
FASTEST = 256  # rows a second of the debug model's training step on the two cores of the log: 32 rows in 125 ms
VOCAB, ROLES, END = 1024, 5, 0
MEAN_TOKENS = 120  # of a document


def stream(directory: Path, name: str, tokens: np.ndarray, vocab_size: int) -> TokenStream:
    """Token ids in shards."""
    writer = ShardWriter(directory, name, vocab_size)
    writer.write(tokens)
    return TokenStream(directory, name, writer.finish())


def rows_a_second(course: Course, seconds: float) -> float:
    """Of batches in a row, after one that opens files, in seconds of the processor."""
    course.batch(0)
    began, step = time.process_time(), 0  # of all threads: what else the machine does is left out
    while (spent := time.process_time() - began) < seconds:
        step += 1
        course.batch(step)
    return step * course.batch_size / spent


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = 2 + rng.geometric(1 / MEAN_TOKENS, asked.documents)
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, VOCAB, ends[-1])
    tokens[ends[1:] - 1] = END
    began = time.perf_counter()
    packed = plan(ends, asked.length)
    planned = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as directory:
        text = stream(Path(directory), "train", tokens, VOCAB)
        roles = stream(Path(directory), "train_roles", rng.integers(0, ROLES, ends[-1]), ROLES)
        weights = np.array([0, 0, 0, 1, 1], np.float32)
        tables = SimpleNamespace(
            stream=[Table(0, Rows(text, asked.length, END))],
            packed=[Table(0, PackedRows(text, packed))],
            conversations=[Table(0, PackedRows(text, packed, roles, weights))],
        )
        tables.mixture = [tables.stream[0], Table(1, tables.conversations[0].rows)]
        found = {
            name: rows_a_second(
                Course(made, [Leg(10**9, tuple(range(len(made))), Turns([3, 1][: len(made)]))], BATCH, seed=0), asked.seconds
            )
            for name, made in vars(tables).items()
        }
    report = {
        "documents": asked.documents,
        "tokens": int(ends[-1]),
        "row_length": asked.length,
        "plan_seconds": round(planned, 2),
        "plan_waste": round(packed.report.waste, 5),
        "cut_documents": packed.report.cut_documents,
        "pieces_a_row": round(len(packed.starts) / packed.report.rows, 2),
        "rows_a_second": {name: round(rate) for name, rate in found.items()},
        "fastest_trainer": FASTEST,
        "times_the_fastest_trainer": {name: round(rate / FASTEST, 1) for name, rate in found.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
