"""Documents that share runs of words with evaluation texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lumina.data.cleaning.decontamination import Decontaminate
from lumina.data.recipe import Recipe
from lumina.data.records import Document, Turn
from lumina.errors import UsageError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"
EVALUATION = " ".join(ALPHABET[:20])
SHARES = "shares 13 words with the evaluation texts"
SHORT = "holds an evaluation text of fewer than 13 words"


def removed(texts, document, ngram=13):
    answer = Decontaminate(texts, Recipe(against_ngram=ngram))(Document("x", document))
    return answer if isinstance(answer, str) else ""


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    assert removed([EVALUATION], f"one two {' '.join(ALPHABET[3:16])} three") == SHARES
    assert removed([EVALUATION], f"one two {' '.join(ALPHABET[3:15])} three {' '.join(ALPHABET[15:20])}") == ""


def test_case_and_punctuation_hide_nothing():
    assert removed([EVALUATION], "A, B; C. D: E\nF (G) 'H' [I] - J / K L! M?") == SHARES


def test_a_shorter_evaluation_text_is_found_as_a_whole():
    assert removed(["What is the capital of France?"], "She asked: what is the capital of France, then?") == SHORT
    assert removed(["What is the capital of France?"], "She asked: what is the capital of Italy, then?") == ""


def test_a_word_or_two_are_found_only_where_a_document_says_nothing_else():
    assert removed(["Yes.", "42"], "yes") == SHORT
    assert removed(["Yes.", "42"], "Yes, it is 42.") == ""


def test_all_turns_of_a_conversation_are_looked_at():
    step = Decontaminate([EVALUATION], Recipe())
    conversation = Document("x", turns=(Turn("user", "hello"), Turn("assistant", EVALUATION)))
    assert step(conversation) == SHARES


WORD = st.sampled_from(["a", "b", "c"])


@given(st.lists(st.lists(WORD, min_size=1, max_size=9), min_size=1, max_size=4), st.lists(WORD, max_size=12))
def test_answers_are_those_of_comparing_all_runs(evaluations, document):
    ngram = 5

    def runs(words, length):
        return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}

    shared = any(runs(each, ngram) & runs(document, ngram) for each in evaluations if len(each) >= ngram)
    whole = any(each == document for each in evaluations if len(each) < ngram)
    assert bool(removed([" ".join(each) for each in evaluations], " ".join(document), ngram)) == (shared or whole)


def test_many_texts_that_share_nothing_are_kept():
    """Of 900 runs, the map of the first bits of hashes lets dozens through to the search."""
    evaluations, documents = ([" ".join(f"{side}{i}x{j}" for j in range(30)) for i in range(50)] for side in "ab")
    assert not any(removed(evaluations, each, 13) for each in documents)


@pytest.mark.parametrize("texts", [[], ["", "..."]])
def test_nothing_to_compare_with_is_refused(texts):
    with pytest.raises(UsageError, match="--against"):
        Decontaminate(texts, Recipe())


def test_runs_too_short_to_mean_anything_are_refused():
    with pytest.raises(UsageError, match="at least 5"):
        Decontaminate([EVALUATION], Recipe(against_ngram=1))
