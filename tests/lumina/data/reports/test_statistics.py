from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.reports.statistics import five_numbers, languages, octaves, repeats, spread

NUMBERS = st.lists(st.integers(0, 2**40), min_size=1, max_size=60)


@given(NUMBERS)
def test_bins_that_double_hold_every_value_once(values):
    bins = octaves(np.array(values))
    assert bins == [(low, high, sum(low <= value <= high for value in values)) for low, high, _ in bins]
    assert sum(count for _, _, count in bins) == len(values)
    assert all(after[0] == before[1] + 1 for before, after in pairwise(bins))
    assert all(high == max(2 * low - 1, 0) for low, high, _ in bins)


@given(NUMBERS)
def test_quartiles_are_values_that_so_many_are_not_above(values):
    five = five_numbers(np.array(values))
    assert (five["min"], five["max"], five["sum"]) == (min(values), max(values), sum(values))
    for name, share in (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75)):
        assert five[name] in values
        assert sum(value <= five[name] for value in values) >= share * len(values)
        assert sum(value < five[name] for value in values) < max(share * len(values), 1)


@given(st.lists(st.integers(0, 5), max_size=40))
def test_a_repeat_is_told_by_the_first_of_its_kind(keys):
    assert repeats(np.array(keys, np.uint64)).tolist() == [keys.index(key) for key in keys]


@given(st.integers(0, 3000), st.integers(1, 50))
def test_a_spread_sample_is_of_different_documents_from_all_parts(count, most):
    found = spread(count, most)
    assert found == sorted(set(found))
    assert len(found) <= min(count, most)
    assert all(0 <= number < count for number in found)
    if count <= most:
        assert found == list(range(count))
    if count >= 100 and most >= 10:
        assert len(found) >= 0.7 * most
        assert set(np.array(found) * 4 // count) == {0, 1, 2, 3}


def test_no_values_have_no_figures():
    assert five_numbers(np.empty(0, np.int64)) == {}
    assert octaves(np.empty(0, np.int64)) == []


def test_languages_are_counted_most_first():
    english = "The people who had waited for the boats all night went down to the water and counted the lanterns."
    german = "Die Leute, die die ganze Nacht auf die Boote gewartet hatten, gingen zum Wasser und zählten die Laternen."
    assert languages([german, english, english, "12 34"], 0.5) == ({"en": 2, "de": 1, "und": 1}, "")
    assert Counter(languages([english], 1.1)[0]) == {"und": 1}


@pytest.mark.parametrize("values", [[0], [1], [2**52], [7, 8]])
def test_edges_of_bins_are_in_the_right_one(values):
    for value in values:
        ((low, high, count),) = octaves(np.array([value]))
        assert low <= value <= high
        assert count == 1
