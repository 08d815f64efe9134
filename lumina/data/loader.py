"""Loading that runs ahead of the device: batches made on threads while a step computes."""

from collections.abc import Iterator

import numpy as np

from lumina.data.rows import Batches

THREADS = 2
AHEAD = 4  # batches; one is in use while these wait


def prefetch(batches: Batches, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, batch) for each step in [start, stop), in order. An error in a thread is raised here, at its step."""
    import grain  # type: ignore[import-untyped]  # here, because it imports jax

    steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), batches.batch(int(step))))
    reader = iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)))
    try:
        yield from reader
    finally:
        reader.close()  # also when the caller stops early: the threads end with the batch that they are at
