import subprocess
import sys
import threading

import numpy as np
import pytest

from lumina.config import DataConfig
from lumina.data.loader import AHEAD, prefetch
from lumina.data.rows import Batches, Rows
from lumina.errors import DataError
from tests.lumina.corpora import corpus_of
from tests.waiting import GIVES_UP, until


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return corpus_of(DataConfig(source="synthetic", cache_dir=str(cache), sequence_length=32), 512)


@pytest.fixture
def batches(corpus):
    return Batches(Rows(corpus.train, 32, corpus.document_end_id), 8, seed=0)


class Counting:
    """Batches that only count, and fail at one step."""

    def __init__(self, fails_at=-1):
        self.fails_at, self.made = fails_at, []

    def batch(self, step):
        self.made.append(step)
        if step == self.fails_at:
            raise DataError(f"shard of step {step} is corrupt")
        return {"step": np.array(step)}


def join_threads():
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(timeout=GIVES_UP)
            assert not thread.is_alive(), f"{thread.name} did not end"


def test_prefetched_batches_are_those_of_their_steps_in_order(batches):
    expected = 5
    for step, batch in prefetch(batches, 5, 40):
        assert step == expected
        plain = batches.batch(step)
        assert batch.keys() == plain.keys()
        assert all(np.array_equal(batch[name], plain[name]) and batch[name].dtype == plain[name].dtype for name in plain)
        expected += 1
    assert expected == 40


def test_no_steps_give_no_batches(batches):
    assert list(prefetch(batches, 7, 7)) == []


def test_loading_runs_ahead_but_not_away():
    counting = Counting()
    loaded = prefetch(counting, 0, 1000)
    next(loaded)
    until(lambda: len(counting.made) > 1)
    loaded.close()
    join_threads()
    assert len(counting.made) <= 1 + AHEAD


def test_an_error_reaches_the_caller_at_its_step_as_it_was_raised():
    loaded = prefetch(Counting(fails_at=7), 3, 100)
    assert [next(loaded)[0] for _ in range(4)] == [3, 4, 5, 6]
    with pytest.raises(DataError, match="shard of step 7 is corrupt"):
        next(loaded)
    join_threads()


class Stream:
    """Tokens that count, which a worker process can be given."""

    name, num_tokens = "train", 1000

    def read(self, start, stop):
        return np.arange(start, stop, dtype=np.int32)


def assert_workers_make_the_same(batches, workers):
    found = list(prefetch(batches, 5, 12, workers))
    assert [step for step, _ in found] == list(range(5, 12))
    for step, batch in found:
        plain = batches.batch(step)
        assert batch.keys() == plain.keys()
        assert all(np.array_equal(batch[name], plain[name]) and batch[name].dtype == plain[name].dtype for name in plain)


def test_worker_processes_make_the_same_batches_in_the_same_order():
    assert_workers_make_the_same(Batches(Rows(Stream(), 32, 0), 8, seed=0), workers=2)


def test_worker_processes_read_shards(batches):
    assert_workers_make_the_same(batches, workers=1)


def test_an_error_in_a_worker_process_reaches_the_caller_at_its_step_as_it_was_raised():
    impossible = Batches(Rows(Stream(), 32, 0), 8, seed=0).following(5, 0)  # earlier steps would begin before the first row
    with pytest.raises(IndexError, match="step 2: steps count from"):
        next(prefetch(impossible, 2, 12, workers=1))


@pytest.mark.parametrize("stop", ["close", "drop"])
def test_stopping_early_ends_the_threads(batches, stop):
    loaded = prefetch(batches, 0, 10**9)
    next(loaded)
    if stop == "close":
        loaded.close()
    del loaded
    join_threads()


def test_text_goes_in_and_comes_out_again(corpus, batches):
    # Unshuffled rows, put together, are the training documents with an end after each.
    rows = Batches(batches.rows, 8, seed=0).evaluation()
    targets = np.concatenate([batch["targets"][batch["weights"] == 1] for batch in rows])
    first = batches.rows.row(0)[:1]
    texts = corpus.tokenizer.decode(np.concatenate([first, targets]).tolist()).split("<|document_end|>")
    assert len(texts) > 1800
    assert all(text.startswith("def ") and text.endswith("\n") for text in texts[:-1])


def test_data_needs_no_backend(tmp_path):
    code = """
import sys
from lumina.config import DataConfig
from lumina.data.rows import Batches, Rows
from lumina.data.sources import prepare_all
(corpus,) = prepare_all(["synthetic"], DataConfig(cache_dir=sys.argv[1], sequence_length=32), 300, str)
Batches(Rows(corpus.train, 32, corpus.document_end_id), 2, 0).batch(0)
print(sorted({"jax", "flax", "torch", "grain"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
