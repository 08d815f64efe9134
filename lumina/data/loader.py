"""Loading that runs ahead of the device: batches made on threads, or by worker processes, while a step computes."""

import signal
from collections.abc import Iterator

import numpy as np

from lumina.data.rows import Batches
from lumina.runs.health import STOPPING

THREADS = 2
AHEAD = 4  # batches; one is in use while these wait


def prefetch(batches: Batches, start: int, stop: int, workers: int = 0) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(step, batch) for each step in [start, stop), in order. An error in a thread or process is raised here, at its step.

    Batches are a function of the step, so the number of workers changes none.
    """
    import absl.flags
    import grain  # type: ignore[import-untyped]  # here, because it imports jax

    steps = grain.MapDataset.range(start, stop).map(lambda step: (int(step), batches.batch(int(step))))
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD))
    if workers:
        absl.flags.FLAGS.mark_as_parsed()  # grain asks for some; Lumina's own flags are not absl's
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
        dataset = dataset.mp_prefetch(options, _leave_signals_to_the_trainer)
    reader = iter(dataset)
    try:
        yield from reader
    finally:
        reader.close()  # also when the caller stops early: the threads end with the batch that they are at


def _leave_signals_to_the_trainer(worker: int, workers: int) -> None:
    """A signal to all, such as Ctrl-C, asks the trainer to stop, and that still needs batches to finish its step."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
