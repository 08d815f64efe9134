"""Hashes of words and of runs of words, against a regular expression and tuples."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.cleaning.shingles import runs, unspaced, words


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_its_letters_and_digits(text):
    hashes, lengths = words(text)
    expected = re.findall("[a-z0-9]+", text.lower())
    assert lengths.tolist() == [len(word) for word in expected]
    assert len(set(hashes.tolist())) == len(set(expected))
    assert np.array_equal(hashes, words(" ".join(expected))[0])


@given(st.text())
def test_any_text_has_hashes_and_lengths_for_its_words(text):
    hashes, lengths = words(text)
    assert hashes.dtype == np.uint64
    assert len(hashes) == len(lengths)
    assert (lengths > 0).all()
    assert lengths.sum() <= len(text.lower())


@given(st.lists(st.sampled_from(["a", "b", "ab"]), max_size=12), st.integers(1, 5))
def test_runs_are_equal_where_their_words_are(sequence, length):
    hashes = runs(words(" ".join(sequence))[0], length)
    length = min(length, len(sequence))
    expected = [tuple(sequence[i : i + length]) for i in range(len(sequence) - length + 1)] if sequence else []
    assert len(hashes) == len(expected)
    assert len(set(hashes.tolist())) == len(set(expected))


def test_words_do_not_depend_on_case_or_on_the_encoding_of_their_neighbours():
    assert np.array_equal(words("Größe: one TWO")[0], words("größe, One — two")[0])
    assert np.array_equal(words("one two é")[0][:2], words("one two")[0])


def test_each_character_of_a_script_without_spaces_is_a_word():
    assert words("日本語のtext、です")[1].tolist() == [1, 1, 1, 1, 4, 1, 1]
    assert words("नमस्ते दुनिया")[1].tolist() == [6, 6]  # vowel signs belong to their word
    assert unspaced("日本語 ab") == 0.5
    assert unspaced("héllo") == 0


def test_words_longer_than_a_block_of_powers_are_told_apart():
    assert words("a" * 300 + "b")[0] != words("a" * 301)[0]
    assert len(words("x " * 70000)[0]) == 70000  # several blocks


def test_hashes_are_the_same_on_every_machine():
    """Pinned: prepared data and evaluation hashes on disk would no longer fit if they changed."""
    hashes = words("Grüße, World")[0]
    assert [f"{value:016x}" for value in [*hashes, *runs(hashes, 2)]] == [
        "414a0b32abe2cf97",
        "a8aea0e5a581a374",
        "7179d2451fd68986",
    ]
