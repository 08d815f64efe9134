import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.rows import EMPTY, Batches, Rows, permute, segments_and_positions
from lumina.errors import ConfigError, DataError

END = 9


class Stream:
    """Tokens in memory, read as a TokenStream is."""

    def __init__(self, tokens, name="train"):
        self.tokens, self.num_tokens, self.name = np.asarray(tokens, np.int32), len(tokens), name

    def read(self, start, stop):
        assert 0 <= start <= stop <= self.num_tokens
        return self.tokens[start:stop].copy()


def rows_of(n, T, seed=0):
    return Rows(Stream(np.random.default_rng(seed).integers(0, 10, n)), T, END)


def by_loop(inputs):
    """Segments and positions, a token at a time."""
    segments, positions = [], []
    for row in inputs:
        segment = position = 0
        segments.append([])
        positions.append([])
        for token in row:
            segments[-1].append(segment)
            positions[-1].append(position)
            position += 1
            if token == END:
                segment, position = segment + 1, 0
    return segments, positions


# ----------------------------------------------------------------------------------------------------------- rows


@given(n=st.integers(3, 200), T=st.integers(2, 20))
def test_every_token_but_the_first_is_a_target_exactly_once_an_epoch(n, T):
    if n < T + 1:
        return
    rows = Rows(Stream(np.arange(n)), T, END)
    targets = [int(token) for r in range(len(rows)) for token in rows.row(r)[1:]]
    assert targets == list(range(1, len(rows) * T + 1))
    assert n - 1 - len(targets) < T  # what is left is shorter than a row


def test_neighbouring_rows_share_one_token():
    rows = Rows(Stream(np.arange(9)), 4, END)
    assert [rows.row(r).tolist() for r in range(len(rows))] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]


def test_a_stream_of_exactly_one_row_is_enough():
    assert len(Rows(Stream(np.arange(5)), 4, END)) == 1


def test_a_row_outside_the_stream_is_refused():
    rows = Rows(Stream(np.arange(9)), 4, END)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"row {index} of 2"):
            rows.row(index)


@pytest.mark.parametrize(("name", "works"), [("train", "at most 3$"), ("held_out", "at most 3, or a larger data.held_out")])
def test_a_stream_shorter_than_a_row_is_refused_with_both_numbers_and_what_would_work(name, works):
    with pytest.raises(DataError, match=rf"= 4: a row takes 5 tokens, and the {name} documents have 4; .* {works}"):
        Rows(Stream(np.arange(4), name), 4, END)


# ---------------------------------------------------------------------------------------------------- permutation

MASK = 2**64 - 1


def permute_one(x, n, seed, epoch):
    """The same permutation with Python's integers."""
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=64).digest()
    while True:
        left, right = x >> half, x % 2**half
        for i in range(8):
            z = right ^ int.from_bytes(digest[8 * i : 8 * i + 8], "little")
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
            z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
            z ^= z >> 31
            left, right = right, left ^ z >> 64 - half
        x = left << half | right
        if x < n:
            return x


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 64, 65, 97, 1000, 1009, 4096, 65_537])
def test_a_permutation_is_one_for_any_size(n):
    for seed, epoch in ((0, 0), (0, 1), (12345, 678)):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**40), data=st.data())
def test_a_permutation_agrees_with_exact_integers(n, seed, epoch, data):
    index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3))
    found = permute(np.array(index), n, seed, epoch)
    assert found.dtype == np.int64
    assert found.tolist() == [permute_one(i, n, seed, epoch) for i in index]


def test_the_permutation_never_changes():
    because = "a run resumed with another permutation repeats some rows and never sees others"
    assert permute(np.arange(10), 10, 0, 0).tolist() == [9, 1, 3, 6, 0, 8, 5, 4, 7, 2], because
    assert permute(np.arange(3), 10**12, 7, 3).tolist() == [710675051260, 331739673232, 942165402982], because


def test_epochs_and_seeds_have_different_orders():
    orders = {tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize("n", [2, 3, 10])
def test_each_row_comes_first_equally_often(n):
    first = Counter(int(permute(np.zeros(1), n, 0, epoch)[0]) for epoch in range(2000))
    assert all(abs(first[row] - 2000 / n) < 5 * (2000 / n) ** 0.5 for row in range(n))


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(1000), 1000, 0, 0)
    assert np.sum(np.abs(np.diff(order)) == 1) < 10  # 2 are expected of a random order


# -------------------------------------------------------------------------------------------------------- batches


def test_a_batch_is_the_same_from_a_fresh_object_and_in_any_order():
    rows, made = rows_of(200, 7), {}
    batches = Batches(rows, 4, seed=3)
    for step in (5, 0, 17, 5):
        made[step] = batches.batch(step)
    for step, batch in made.items():
        again = Batches(rows_of(200, 7), 4, seed=3).batch(step)
        assert all(np.array_equal(batch[name], again[name]) for name in batch)


def test_a_batch_has_the_shapes_and_types_promised():
    batch = Batches(rows_of(200, 7), 4, seed=0).batch(0)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "inputs": ((4, 7), "int32"),
        "targets": ((4, 7), "int32"),
        "weights": ((4, 7), "float32"),
        "segments": ((4, 7), "int32"),
        "positions": ((4, 7), "int32"),
    }


def test_targets_are_the_next_tokens_and_nothing_is_masked():
    rows = Rows(Stream(np.arange(100)), 7, 1000)
    batch = Batches(rows, 4, seed=0).batch(2)
    assert np.array_equal(batch["targets"], batch["inputs"] + 1)
    assert np.all(batch["weights"] == 1)


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 5))
@settings(max_examples=50)
def test_each_epoch_has_every_row_once_without_a_gap_between_epochs(rows, batch_size, seed):
    batches = Batches(rows_of(rows * 3 + 1, 3), batch_size, seed)
    steps = -(-3 * rows // batch_size)
    numbers = np.concatenate([batches.row_numbers(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(numbers[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_rows_does_not_depend_on_the_batch_size(shuffle):
    rows = rows_of(400, 7)

    def order(batch_size):
        batches = Batches(rows, batch_size, 1, shuffle)
        return np.concatenate([batches.row_numbers(step) for step in range(240 // batch_size)]).tolist()

    assert order(8) == order(16) == order(3) == order(240)


def test_unshuffled_rows_come_in_order_and_begin_again():
    batches = Batches(rows_of(22, 7), 2, seed=0, shuffle=False)
    assert [batches.row_numbers(step).tolist() for step in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_row_numbers_are_int64_and_reach_far():
    numbers = Batches(rows_of(200, 7), 4, seed=0).row_numbers(10**15)
    assert numbers.dtype == np.int64
    assert np.all((numbers >= 0) & (numbers < 28))


def test_a_negative_step_is_refused():
    with pytest.raises(IndexError, match="step -1"):
        Batches(rows_of(200, 7), 4, seed=0).row_numbers(-1)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_parts_of_a_batch_put_together_are_the_batch(processes):
    rows = rows_of(200, 7)
    whole = Batches(rows, 8, seed=3).batch(5)
    parts = [Batches(rows, 8, seed=3, part=((i,), processes)).batch(5) for i in range(processes)]
    for name, array in whole.items():
        assert all(part[name].shape == (8 // processes, 7) for part in parts)
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_every_part_knows_the_rows_of_the_whole_batch():
    rows = rows_of(200, 7)
    numbers = Batches(rows, 8, seed=3).row_numbers(5)
    assert len(numbers) == 8
    for i in range(4):
        assert np.array_equal(Batches(rows, 8, seed=3, part=((i,), 4)).row_numbers(5), numbers)


@pytest.mark.parametrize("max_rows", [0, 3, 5])
def test_the_parts_of_an_evaluation_put_together_are_the_evaluation(max_rows):
    rows = Rows(Stream(np.arange(31)), 3, 1000)
    whole = list(Batches(rows, 4, seed=0, shuffle=False).evaluation(max_rows))
    parts = [list(Batches(rows, 4, seed=0, shuffle=False, part=((i,), 2)).evaluation(max_rows)) for i in range(2)]
    assert [len(part) for part in parts] == [len(whole)] * 2  # processes that made fewer steps would wait for ever
    for batch, *halves in zip(whole, *parts, strict=True):
        for name, array in batch.items():
            assert np.array_equal(np.concatenate([half[name] for half in halves]), array)


def test_rows_that_cannot_be_split_over_the_processes_are_refused():
    with pytest.raises(ConfigError, match="= 6 rows: must be a multiple of 4, its parts"):
        Batches(rows_of(200, 7), 6, seed=0, part=((0,), 4))


@given(old=st.integers(1, 20), new=st.integers(1, 20), step=st.integers(0, 20))
@settings(max_examples=50)
def test_after_a_change_of_batch_size_no_row_is_missed_or_read_twice(old, new, step):
    before = Batches(rows_of(100, 3), old, seed=1)
    after = Batches(rows_of(100, 3), new, seed=1).following(step, before.consumed(step))
    numbers = [before.row_numbers(s) for s in range(step)] + [after.row_numbers(s) for s in range(step, step + 60 // new)]
    read = np.concatenate(numbers) if numbers else np.zeros(0)
    at_once = Batches(rows_of(100, 3), 1, seed=1)
    assert read.tolist() == [int(at_once.row_numbers(i)[0]) for i in range(len(read))]
    assert after.consumed(step) == before.consumed(step)


def test_following_keeps_everything_but_where_it_begins():
    batches = Batches(rows_of(200, 7), 4, seed=3, shuffle=False, part=((1,), 2))
    changed = batches.following(6, 3)
    assert {**vars(changed), "first": 0} == vars(batches)
    assert changed.consumed(6) == 3


def test_a_step_before_the_first_row_is_refused():
    batches = Batches(rows_of(200, 7), 8, seed=0).following(5, 4 * 5)  # five steps of 4 rows
    assert batches.row_numbers(5).shape == (8,)
    with pytest.raises(IndexError, match="step 2"):
        batches.row_numbers(2)


# ------------------------------------------------------------------------------------------ segments and positions


@given(st.lists(st.lists(st.sampled_from([1, 2, END]), min_size=6, max_size=6), min_size=1, max_size=4))
def test_segments_and_positions_agree_with_a_loop_over_tokens(inputs):
    segments, positions = segments_and_positions(np.array(inputs, np.int32), END)
    assert segments.dtype == positions.dtype == np.int32
    assert (segments.tolist(), positions.tolist()) == by_loop(inputs)


@pytest.mark.parametrize(
    ("row", "segments", "positions"),
    [
        ([1, 2, END, 3, 4], [0, 0, 0, 1, 1], [0, 1, 2, 0, 1]),
        ([END, 1, 2, 3, 4], [0, 1, 1, 1, 1], [0, 0, 1, 2, 3]),
        ([1, 2, 3, 4, END], [0, 0, 0, 0, 0], [0, 1, 2, 3, 4]),
        ([END, END, END, END, END], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]),
    ],
    ids=["two documents", "end first", "end last", "empty documents"],
)
def test_a_document_end_belongs_to_the_document_it_ends(row, segments, positions):
    found = segments_and_positions(np.array([row], np.int32), END)
    assert [array[0].tolist() for array in found] == [segments, positions]


def test_the_rows_of_a_batch_have_segments_and_positions_of_their_own():
    batch = Batches(rows_of(300, 11), 5, seed=0).batch(1)
    assert (batch["segments"].tolist(), batch["positions"].tolist()) == by_loop(batch["inputs"])


# ----------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("max_rows", "expected"), [(0, 10), (4, 4), (6, 6), (1, 1), (99, 10)])
def test_evaluation_reads_each_row_once_in_order_and_pads_with_weight_0(max_rows, expected):
    rows = Rows(Stream(np.arange(31)), 3, 1000)
    batches = list(Batches(rows, 4, seed=5).evaluation(max_rows))
    assert all(array.shape == (4, 3) for batch in batches for array in batch.values())
    assert len(batches) == -(-expected // 4)
    weights = np.concatenate([batch["weights"] for batch in batches])
    targets = np.concatenate([batch["targets"] for batch in batches])
    assert targets[weights == 1].tolist() == list(range(1, expected * 3 + 1))
    assert weights.sum() == expected * 3
    assert np.all(weights[:expected] == 1)
    assert np.all(weights[expected:] == 0)
    segments = np.concatenate([batch["segments"] for batch in batches])
    assert np.all((segments == EMPTY) == (weights == 0))
