"""Packed rows: every target once, no piece across documents, conversations split at turns, little waste, whole files."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lumina.data import packing
from lumina.data.packing import best_fit, kept, load, plan
from lumina.data.rows import EMPTY, Batches, PackedRows
from tests.lumina.data.streams import END, Stream, documents

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def packed(lengths, T):
    stream, ends = documents(lengths)
    return stream, ends, PackedRows(stream, plan(ends, T))


def every_row(rows):
    return rows.gather(np.arange(len(rows)))


# --------------------------------------------------------------------------------------------------------- best fit


def by_hand(lengths, T):
    """Best-fit decreasing, a piece at a time: the room left of each row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [n for n, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda n: rooms[n])] -= length
        else:
            rooms.append(T - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
@example([5] * 7 + [3] * 5 + [1] * 3, 20)
def test_rows_are_those_of_best_fit_decreasing_a_piece_at_a_time(lengths, T):
    bins, count = best_fit(np.array(lengths, np.int64), T)
    filled = np.bincount(bins, np.array(lengths, np.int64), minlength=count).astype(int)
    assert sorted((T - filled).tolist()) == by_hand(lengths, T)


def test_a_million_documents_are_packed_almost_without_waste():
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 90, 1_000_000), 256)
    bins, count = best_fit(lengths, 256)
    assert np.bincount(bins, lengths).max() <= 256
    assert 1 - lengths.sum() / (count * 256) < 0.001


# ------------------------------------------------------------------------------------------------------------ texts


@given(LENGTHS, st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_every_token_of_a_document_but_its_first_is_a_target_once_an_epoch(lengths, T):
    stream, ends, rows = packed(lengths, T)
    if not len(rows):
        assert max(lengths) == 1
        return
    batch = every_row(rows)
    there = batch["weights"] > 0
    firsts = ends[:-1]
    expected = np.delete(np.arange(stream.num_tokens), firsts)
    ordinary = stream.tokens[expected][stream.tokens[expected] != END]
    targets = batch["targets"][there]
    assert sorted(targets[targets != END].tolist()) == ordinary.tolist()
    assert np.sum(targets == END) == sum(length > 1 for length in lengths)


@given(LENGTHS, st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_pieces_stay_within_documents_and_have_segments_and_positions_of_their_own(lengths, T):
    stream, ends, rows = packed(lengths, T)
    if not len(rows):
        return
    batch = every_row(rows)
    for row in range(len(rows)):
        there, segments = batch["weights"][row] > 0, batch["segments"][row]
        used = int(there.sum())
        assert there.tolist() == (segments != EMPTY).tolist() == [place < used for place in range(T)]
        assert np.all(np.isin(np.diff(segments[:used]), (0, 1)))
        for segment in range(segments.max() + 1):
            own = segments == segment
            assert batch["positions"][row][own].tolist() == list(range(own.sum()))
            inputs, targets = batch["inputs"][row][own], batch["targets"][row][own]
            assert END not in inputs  # an end is a target and no input
            assert inputs.tolist() == list(range(inputs[0], inputs[0] + len(inputs)))
            assert targets[:-1].tolist() == inputs[1:].tolist()
        assert not any(batch[name][row][used:].any() for name in ("inputs", "targets", "positions"))


@given(LENGTHS, st.integers(2, 16))
@settings(max_examples=60, deadline=None)
def test_documents_that_fit_are_never_cut_and_the_report_counts_those_that_are(lengths, T):
    _, ends, rows = packed(lengths, T)
    made = rows.plan
    assert set(ends[:-1][(np.diff(ends) > 1)]) <= set(made.starts.tolist())
    assert len(made.starts) == sum(-(-(length - 1) // T) for length in lengths)
    report = made.report
    assert report.cut_documents == sum(length - 1 > T for length in lengths)
    assert (report.documents, report.rows, report.positions) == (len(lengths), len(rows), len(rows) * T)
    assert report.filled == sum(lengths) - len(lengths) == made.lengths.sum()
    if len(rows):
        empty = every_row(rows)["weights"] == 0
        assert report.waste == pytest.approx(empty.mean())


def test_the_report_tells_of_waste_and_cuts():
    *_, rows = packed([30, 5, 5], 10)
    assert str(rows.plan.report) == ("3 documents in 4 packed rows, 7.50% of them empty; 1 longer than a row, cut into pieces")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shuffle", [True, False], ids=["training", "evaluation"])
def test_rows_come_in_no_order_of_size(seed, shuffle):
    """The pieces of a row go with the size of its longest: packing fills rows with the longest first."""
    *_, rows = packed(np.random.default_rng(0).integers(2, 66, 2000), 64)
    batches = Batches(rows, 1, seed, shuffle)
    order = np.concatenate([batches.row_numbers(step) for step in range(len(rows))])
    pieces = np.diff(rows.plan.rows)[order]
    assert len(rows) > 900
    assert abs(np.corrcoef(pieces, np.arange(len(rows)))[0, 1]) < 0.13  # four standard errors


def test_evaluation_fills_the_last_batch_with_rows_of_weight_0():
    _, _, rows = packed([7] * 10, 6)
    batches = list(Batches(rows, 4, seed=0, shuffle=False).evaluation())
    assert [int((batch["weights"] > 0).any(axis=1).sum()) for batch in batches] == [4, 4, 2]
    assert (batches[-1]["segments"][2:] == EMPTY).all()
    assert all(batch["inputs"].shape == (4, 6) for batch in batches)


def test_a_row_that_there_is_not_is_refused():
    _, _, rows = packed([7] * 10, 6)
    for number in (10, -2):
        with pytest.raises(IndexError):
            rows.gather(np.array([number]))


# ---------------------------------------------------------------------------------------------------- conversations

USER, ASSISTANT, NONE = 2, 3, 0


def conversations(shapes):
    """(stream, offsets, roles, turns) of conversations: lists of (role, tokens); each turn's first token is a header."""
    roles, turns, sizes = [], [], []
    for shape in shapes:
        before = len(roles)
        for role, count in shape:
            turns.append(len(roles))
            roles += [NONE] + [role] * (count - 1)
        roles.append(NONE)
        sizes.append(len(roles) - before)
    stream, ends = documents(sizes)
    return stream, ends, Stream(roles), np.array(turns, np.int64)


def packed_conversations(shapes, T, weights=(0, 0, 0, 1, 1)):
    stream, ends, roles, turns = conversations(shapes)
    table = np.array(weights, np.float32)
    return stream, roles, turns, PackedRows(stream, plan(ends, T, turns, roles.read, table), roles, table)


SHAPES = st.lists(
    st.lists(st.tuples(st.sampled_from([USER, ASSISTANT]), st.integers(2, 20)), min_size=1, max_size=8), min_size=1, max_size=6
)


@given(SHAPES, st.integers(4, 24))
@settings(max_examples=60, deadline=None)
def test_every_word_of_an_assistant_is_learned_once_and_none_of_a_user(shapes, T):
    stream, roles, _, rows = packed_conversations(shapes, T)
    batch = every_row(rows)
    learned = batch["targets"][batch["weights"] > 0]
    expected = stream.tokens[(roles.tokens == ASSISTANT)]
    assert sorted(learned.tolist()) == expected.tolist()
    assert (batch["weights"] > 0).any(axis=1).all()  # a batch without anything to learn has no loss


@given(SHAPES, st.integers(4, 24))
@settings(max_examples=60, deadline=None)
def test_pieces_without_anything_to_learn_are_left_out_and_counted(shapes, T):
    everything, few = (packed_conversations(shapes, T, weights)[-1].plan for weights in ((1, 1, 1, 1, 1), (0, 0, 0, 1, 1)))
    assert everything.report.unlearned == 0
    assert len(few.starts) + few.report.unlearned == len(everything.starts)


@given(SHAPES, st.integers(4, 24))
@settings(max_examples=60, deadline=None)
def test_turns_that_fit_with_their_answer_are_never_cut(shapes, T):
    _, _, turns, rows = packed_conversations(shapes, T, (1, 1, 1, 1, 1))
    made = rows.plan
    long = 0
    for shape in shapes:
        sizes = [count + (n == len(shape) - 1) for n, (_, count) in enumerate(shape)]
        roles = [role for role, _ in shape] + [USER]
        answers = [*sizes[1:], 0]
        for n, size in enumerate(sizes):
            answered = roles[n] == USER and roles[n + 1] == ASSISTANT and n + 1 < len(sizes)
            long += size + answered * answers[n] - 1 > T and sum(sizes) - 1 > T
    assert (made.report.cut_turns > 0) == (long > 0)
    if not long:
        assert set(made.starts.tolist()) <= {0, *turns.tolist()}
    assert made.report.split_conversations == sum(sum(count for _, count in shape) > T for shape in shapes)
    assert made.report.cut_documents == 0


def test_a_long_conversation_is_split_before_a_users_turn():
    shape = [(USER, 4), (ASSISTANT, 4), (USER, 3), (ASSISTANT, 4)]  # 16 tokens with the end
    *_, rows = packed_conversations([shape], 12)
    assert sorted(zip(rows.plan.starts.tolist(), rows.plan.lengths.tolist(), strict=True)) == [(0, 7), (8, 7)]


def test_without_a_users_turn_to_begin_with_as_many_turns_as_fit_are_taken():
    *_, rows = packed_conversations([[(USER, 4), (ASSISTANT, 4), (ASSISTANT, 4), (ASSISTANT, 4)]], 11)
    assert sorted(rows.plan.starts.tolist()) == [0, 12]


def test_an_answer_longer_than_a_row_is_cut_from_its_question_on_and_counted():
    *_, rows = packed_conversations([[(USER, 3), (ASSISTANT, 30), (USER, 3), (ASSISTANT, 3)]], 8)
    report = rows.plan.report
    assert (report.split_conversations, report.cut_turns, report.unlearned) == (1, 1, 0)
    assert sorted(rows.plan.starts.tolist()) == [0, 8, 16, 24, 33]
    assert "1 turns cut, longer than a row" in str(report)


def test_as_much_of_a_long_question_as_fits_stays_with_its_answer():
    shape = [(USER, 20), (ASSISTANT, 4), (USER, 3), (ASSISTANT, 3)]  # the answer is tokens 20 to 24
    *_, rows = packed_conversations([shape], 8)
    assert sorted(zip(rows.plan.starts.tolist(), rows.plan.lengths.tolist(), strict=True)) == [(15, 8), (24, 6)]
    assert (rows.plan.report.cut_turns, rows.plan.report.unlearned) == (1, 2)
    *_, rows = packed_conversations([shape], 8, weights=(0, 0, 1, 1, 1))
    assert sorted(zip(rows.plan.starts.tolist(), rows.plan.lengths.tolist(), strict=True)) == [(0, 8), (8, 7), (15, 8), (24, 6)]


@pytest.mark.parametrize("block", [1, 7, 2**22])
def test_what_counts_is_found_whatever_is_looked_at_at_once(monkeypatch, block):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", block)
    *_, rows = packed_conversations([[(USER, 30), (ASSISTANT, 3)], [(USER, 3), (ASSISTANT, 40)]] * 5, 8)
    assert rows.plan.report.unlearned == 20
    assert (rows.gather(np.arange(len(rows)))["weights"] > 0).any(axis=1).all()


def test_weights_are_those_of_the_words_that_are_targets():
    stream, ends, roles, turns = conversations([[(USER, 3), (ASSISTANT, 3)]])
    rows = PackedRows(stream, plan(ends, 8, turns), roles, np.array([0, 0, 1.5, 0.5, 1], np.float32))
    batch = rows.gather(np.array([0]))
    assert batch["targets"][0, :6].tolist() == [2, 3, 4, 5, 6, END]
    assert batch["weights"][0].tolist() == [1.5, 1.5, 0, 0.5, 0.5, 0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ files


def same(a, b):
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("starts", "lengths", "rows"))
    return arrays and a.report == b.report and a.sequence_length == b.sequence_length


def a_plan():
    return plan(documents([5, 9, 3, 30, 2])[1], 8)


def must_not():
    raise AssertionError("made again")


def test_a_plan_is_made_once_and_then_mapped(tmp_path):
    first = kept(tmp_path / "p", a_plan)
    again = kept(tmp_path / "p", must_not)
    assert same(first, a_plan())
    assert same(again, a_plan())
    assert isinstance(again.starts, np.memmap)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_the_same_documents_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        kept(tmp_path / name, a_plan)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("damage", ["starts.npy", "rows.npy", "report.json"])
def test_a_damaged_plan_is_made_again(tmp_path, damage):
    kept(tmp_path / "p", a_plan)
    path = Path(tmp_path / "p" / damage)
    path.write_bytes(path.read_bytes()[:-9])
    assert same(kept(tmp_path / "p", a_plan), a_plan())
    assert same(load(tmp_path / "p"), a_plan())


def test_arrays_that_do_not_belong_together_are_no_plan(tmp_path):
    made = kept(tmp_path / "p", a_plan)
    np.save(tmp_path / "p" / "lengths.npy", made.lengths[:-1])
    with pytest.raises(ValueError, match="belong together"):
        load(tmp_path / "p")


def test_a_directory_that_takes_no_files_costs_only_the_time_to_plan(tmp_path):
    assert same(kept(tmp_path / "missing" / "p", a_plan), a_plan())


def test_a_worker_maps_the_files_instead_of_being_sent_them(tmp_path):
    made = kept(tmp_path / "p", lambda: plan(documents([50] * 5000)[1], 64))
    sent = pickle.dumps(made)
    assert len(sent) < 500
    assert same(pickle.loads(sent), made)  # noqa: S301, its own
    assert same(pickle.loads(pickle.dumps(a_plan())), a_plan())  # noqa: S301, its own


def test_a_report_is_readable(tmp_path):
    kept(tmp_path / "p", a_plan)
    assert json.loads((tmp_path / "p" / "report.json").read_text())["report"]["cut_documents"] == 1


@pytest.mark.parametrize("name", ["starts.npy", "rows.npy", "report.json"])
@pytest.mark.parametrize("size", [0, 10, 130])
def test_a_plan_whose_file_was_cut_is_made_again(tmp_path, name, size):
    kept(tmp_path / "p", a_plan)
    os.truncate(tmp_path / "p" / name, size)
    assert same(kept(tmp_path / "p", a_plan), a_plan())
    assert same(load(tmp_path / "p"), a_plan())
