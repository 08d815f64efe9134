"""Which row of which source a step reads: ratios, epochs, stages, going on, several hosts."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.data.mixture import TABLE_BIT, Course, Leg, Table, Turns
from lumina.data.packing import plan
from lumina.data.rows import Batches, PackedRows, Rows
from lumina.errors import ConfigError
from tests.lumina.data.streams import END, Stream, documents

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


def within_one_row(sources, weights):
    """Whether after each row every source has had its share within one row."""
    had = [0] * len(weights)
    for n, source in enumerate(sources, 1):
        had[source] += 1
        if any(abs(count - Fraction(n * w, sum(weights))) >= 1 for count, w in zip(had, weights, strict=True)):
            return False
    return True


# ----------------------------------------------------------------------------------------------------------- turns


@given(WEIGHTS)
def test_after_any_row_each_source_has_had_its_share_within_one_row(weights):
    sources, _ = Turns(weights).rows(np.arange(2 * sum(weights) + 3))
    assert within_one_row(sources.tolist(), weights)


@given(WEIGHTS, st.integers(0, 400))
def test_a_source_takes_its_rows_in_order_and_counts_tell_how_many(weights, n):
    turns = Turns(weights)
    sources, places = turns.rows(np.arange(n))
    for k in range(len(weights)):
        own = places[sources == k]
        assert own.tolist() == list(range(len(own)))
        assert turns.counts(n)[k] == len(own)


def test_many_tasks_of_uneven_weights_keep_their_shares():
    weights = [97, 1, 1, 1, 450, 13, 7]
    assert within_one_row(Turns(weights).rows(np.arange(sum(weights)))[0].tolist(), weights)


def test_far_rows_are_found_without_counting_to_them():
    sources, places = Turns([2, 1]).rows(np.array([3 * 10**14, 3 * 10**14 + 1, 3 * 10**14 + 2]))
    assert sorted(zip(sources.tolist(), places.tolist(), strict=True)) == [(0, 2 * 10**14), (0, 2 * 10**14 + 1), (1, 10**14)]


# ---------------------------------------------------------------------------------------------------------- courses


def table(source, rows, T=4, shift=0):
    """Rows of a stream in which no token is another stream's."""
    return Table(source, Rows(Stream(np.arange(rows * T + 1) + 1000 * source + shift), T, -1))


def course(legs, tables, batch_size=4, **more):
    return Course(tables, [Leg(steps, used, Turns(weights)) for steps, used, weights in legs], batch_size, seed=3, **more)


def numbers_of(made, steps, table_number):
    """The rows of one table that steps read, in order."""
    numbers = np.concatenate([made.row_numbers(step) for step in steps])
    return (numbers[numbers >> TABLE_BIT == table_number] & (1 << TABLE_BIT) - 1).tolist()


@given(rows=st.integers(1, 40), batch_size=st.integers(1, 12), step=st.integers(0, 50), consumed=st.integers(0, 99))
def test_one_stage_of_one_source_is_what_batches_make_of_it(rows, batch_size, step, consumed):
    made = course([(60, (0,), [1])], [table(0, rows)], batch_size)
    plain = Batches(table(0, rows).rows, batch_size, seed=3)
    assert made.row_numbers(step).tolist() == plain.row_numbers(step).tolist()
    after, plain = made.following(step, consumed), plain.following(step, consumed)
    assert after.row_numbers(step + 1).tolist() == plain.row_numbers(step + 1).tolist()
    assert (after.consumed(step), after.positions(2, 5)) == (plain.consumed(step), plain.positions(2, 5))


@given(
    weights=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    sizes=st.lists(st.integers(1, 17), min_size=3, max_size=3),
    batch_size=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_each_source_of_a_mixture_is_read_once_an_epoch(weights, sizes, batch_size):
    tables = [table(k, sizes[k]) for k in range(len(weights))]
    made = course([(60, tuple(range(len(weights))), weights)], tables, batch_size)
    for k in range(len(weights)):
        read = numbers_of(made, range(60), k)
        for epoch in range(len(read) // sizes[k]):
            assert sorted(read[epoch * sizes[k] : (epoch + 1) * sizes[k]]) == list(range(sizes[k]))
        assert len(set(read)) == min(len(read), sizes[k])


@given(WEIGHTS.filter(lambda w: len(w) < 5), st.integers(1, 9), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_taken_tells_the_rows_of_each_source_so_far(weights, batch_size, step):
    made = course([(31, tuple(range(len(weights))), weights)], [table(k, 9) for k in range(len(weights))], batch_size)
    expected = {k: len(numbers_of(made, range(step + 1), k)) for k in range(len(weights))}
    assert made.taken(step) == expected


def test_sources_of_equal_size_do_not_share_an_order():
    made = course([(10, (0, 1), [1, 1])], [table(0, 20), table(1, 20)])
    assert numbers_of(made, range(10), 0) != numbers_of(made, range(10), 1)


def test_a_source_goes_on_where_an_earlier_stage_of_the_same_length_left_it():
    tables = [table(0, 24), table(1, 24)]
    made = course([(3, (0,), [1]), (4, (0, 1), [1, 1]), (2, (1,), [1])], tables)
    alone = Batches(tables[0].rows, 1, seed=3)
    assert numbers_of(made, range(9), 0) == [int(alone.row_numbers(n)[0]) for n in range(12 + 8)]
    assert sorted(numbers_of(made, range(3, 9), 1)) == sorted(set(numbers_of(made, range(3, 9), 1)))
    assert len(numbers_of(made, range(3, 9), 1)) == 8 + 8


def test_stages_begin_where_their_steps_say():
    made = course([(3, (0,), [1]), (4, (1,), [1])], [table(0, 9, T=4), table(0, 9, T=6)])
    assert [made.stage(step) for step in range(9)] == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert [made.begin(step) for step in (0, 2, 3, 6)] == [0, 0, 3, 3]
    assert [made.batch(step)["inputs"].shape for step in (2, 3)] == [(4, 4), (4, 6)]
    assert (made.sequence_length(2), made.sequence_length(3)) == (4, 6)
    assert made.positions(0, 7) == 4 * (3 * 4 + 4 * 6)
    assert made.positions(2, 4) == 4 * (4 + 6)
    assert made.positions(5, 5) == 0


def test_a_mixed_batch_has_the_rows_that_its_numbers_name():
    tables = [table(0, 9), table(1, 5)]
    batch, numbers = course([(9, (0, 1), [2, 1])], tables, 6).batch(4), course([(9, (0, 1), [2, 1])], tables, 6).row_numbers(4)
    for inputs, number in zip(batch["inputs"], numbers.tolist(), strict=True):
        rows = tables[number >> TABLE_BIT].rows
        assert inputs.tolist() == rows.row(number & (1 << TABLE_BIT) - 1)[:-1].tolist()


def test_epochs_tell_how_often_each_source_is_read():
    made = course([(3, (0,), [1]), (4, (0, 1), [1, 1])], [table(0, 10), table(1, 4)])
    assert made.epochs() == {0: (12 + 8) / 10, 1: 8 / 4}


def test_what_is_read_again_in_rows_of_another_length_is_what_two_orders_share():
    tables = [table(0, 2000, T=4), table(0, 1000, T=8), table(1, 500, T=8)]
    legs = [(250, (0,), [1]), (100, (1, 2), [1, 1]), (150, (1,), [1]), (100, (0,), [1])]
    made = course(legs, tables)
    assert made.again(0) == {}
    before = set()  # tokens that the first stage read, of half of the source
    for row in numbers_of(made, range(250), 0):
        before |= set(range(4 * row, 4 * row + 4))
    rows = numbers_of(made, range(250, 350), 1)
    shared = sum(token in before for row in rows for token in range(8 * row, 8 * row + 8))
    assert made.again(1) == {0: 200 * 8 // 2}
    assert shared == pytest.approx(made.again(1)[0], rel=0.15)
    assert made.again(2) == {0: 600 * 8 // 2}
    assert made.again(3) == {0: round(400 * 4 * 0.8)}  # 800 of the 1,000 longer rows were read
    everything = course([(600, (0,), [1]), (900, (1,), [1])], tables)
    assert everything.again(1) == {0: 1000 * 8}


def test_a_source_that_goes_on_in_rows_of_one_length_reads_nothing_again():
    made = course([(3, (0,), [1]), (4, (0, 1), [1, 1])], [table(0, 24), table(1, 24)])
    assert made.again(0) == made.again(1) == Batches(table(0, 24).rows, 4, seed=0).again(0) == {}


def test_another_batch_size_is_refused_in_several_stages():
    made = course([(3, (0,), [1]), (4, (1,), [1])], [table(0, 9), table(1, 9)])
    assert made.following(5, 20).row_numbers(5).tolist() == made.row_numbers(5).tolist()
    with pytest.raises(ConfigError, match=r"train.batch_size = 4: 10 rows were read in 5 steps of another size"):
        made.following(5, 10)


def mixed_course(part=((0,), 1)):
    """Two stages: a stream; then the stream in longer rows with packed documents."""
    stream, ends = documents(np.random.default_rng(0).integers(1, 30, 40))
    tables = [
        Table(0, Rows(stream, 8, END)),
        Table(0, Rows(stream, 12, END)),
        Table(1, PackedRows(stream, plan(ends, 12))),
    ]
    legs = [Leg(5, (0,), Turns([1])), Leg(20, (1, 2), Turns([3, 2]))]
    return Course(tables, legs, 8, seed=1, part=part)


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 4, 5, 6, 24])
def test_the_parts_of_all_hosts_are_the_batch(hosts, step):
    whole = mixed_course().batch(step)
    parts = [mixed_course(((i,), hosts)).batch(step) for i in range(hosts)]
    for name, array in whole.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array)


def test_a_batch_is_the_same_from_another_process_and_in_any_order():
    made = mixed_course()
    again = pickle.loads(pickle.dumps(made))  # noqa: S301, its own
    for step in (24, 3, 5, 24, 0):
        batch, other, third = made.batch(step), again.batch(step), mixed_course().following(7, 56).batch(step)
        assert all(np.array_equal(batch[name], other[name]) for name in batch)
        assert all(np.array_equal(batch[name], third[name]) for name in batch)
