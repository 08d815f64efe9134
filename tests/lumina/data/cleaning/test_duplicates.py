"""Exact and near duplicates: planted ones, at similarities that are computed exactly."""

import random
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from lumina.data.cleaning import duplicates
from lumina.data.cleaning.duplicates import NearDuplicates, bands, exact_key, signature
from lumina.data.recipe import Recipe
from lumina.data.records import Document, Turn
from lumina.errors import UsageError

RECIPE = Recipe()
WORDS = 300


def shingles(words):
    return {tuple(words[i : i + RECIPE.near_shingle]) for i in range(len(words) - RECIPE.near_shingle + 1)}


def jaccard(one, other):
    return len(shingles(one) & shingles(other)) / len(shingles(one) | shingles(other))


def distinct(count):
    """Lists of words of the standard library, no two with many shingles in common."""
    found, seen = [], set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        words = re.findall("[a-z0-9]+", path.read_text("utf-8", "replace").lower())[:WORDS]
        if len(shingles(words)) > 0.9 * WORDS and len(shingles(words) & seen) < 0.05 * WORDS:
            found.append(words)
            seen |= shingles(words)
        if len(found) == count:
            return found
    raise AssertionError(f"the standard library has {len(found)} such files")


def changed(words, similarity, draw):
    copy = list(words)
    for place in draw.sample(range(WORDS), WORDS):
        copy[place] = f"new{draw.randrange(10**9)}"
        if jaccard(words, copy) <= similarity:
            return copy
    raise AssertionError("still similar")


def signed(words, recipe=RECIPE):
    return signature(Document("planted", " ".join(words)), recipe)


def test_planted_near_duplicates_are_found_above_the_threshold_and_left_below():
    draw, originals = random.Random(0), distinct(80)
    index = NearDuplicates(RECIPE)
    assert [index.earlier(signed(words)) for words in originals] == [-1] * len(originals)
    for similarity, least, most in ((0.5, 0, 0), (0.6, 0, 0.01), (0.9, 0.95, 1), (0.95, 1, 1)):
        answers = [index.earlier(signed(changed(words, similarity + 0.005, draw))) for words in originals]
        right = sum(answer == number for number, answer in enumerate(answers))
        assert least <= right / len(originals) <= most, similarity
        assert all(answer in (-1, number) for number, answer in enumerate(answers))


@pytest.mark.parametrize("similarity", [0.3, 0.8])
def test_signatures_estimate_the_jaccard_similarity(similarity):
    draw, errors = random.Random(1), []
    for words in distinct(40):
        copy = changed(words, similarity, draw)
        errors.append((signed(words) == signed(copy)).mean() - jaccard(words, copy))
    deviation = (similarity * (1 - similarity) / RECIPE.near_permutations) ** 0.5  # of one binomial estimate
    assert abs(np.mean(errors)) < 4 * deviation / len(errors) ** 0.5
    assert np.std(errors) < 1.5 * deviation


def test_case_punctuation_and_line_ends_make_no_difference():
    text = "One two, three four; five six seven. Eight nine ten!"
    same = "one two three\r\nFOUR five six - seven eight (nine) ten"
    assert np.array_equal(signature(Document("a", text), RECIPE), signature(Document("b", same), RECIPE))


def test_texts_shorter_than_a_shingle_are_compared_as_a_whole():
    index = NearDuplicates(RECIPE)
    assert [index.earlier(signature(Document("x", text), RECIPE)) for text in ("a b c", "a b d", "A, b, c!")] == [-1, -1, 0]


def test_texts_without_words_are_duplicates_only_when_they_are_equal():
    index = NearDuplicates(RECIPE)
    texts = ("...", "!!!", "", "...", "!!!")
    assert [index.earlier(signature(Document("x", text), RECIPE)) for text in texts] == [-1, -1, -1, 0, 1]


def test_texts_without_spaces_are_compared_by_characters():
    text = "私は毎朝六時に起きて、公園を散歩します。それから家に帰って、家族と一緒に朝ご飯を食べます。"
    text += "昼は会社で働き、夜は本を読みます。"
    other = "東京は日本の首都であり、世界で最も人口の多い都市の一つです。多くの企業がここに本社を置いています。"
    index = NearDuplicates(RECIPE)
    similar = text.replace("読みます", "読む")
    assert [index.earlier(signature(Document("x", each), RECIPE)) for each in (text, other, similar)] == [-1, -1, 0]


def test_an_answer_does_not_depend_on_when_bands_are_sorted(monkeypatch):
    draw, originals = random.Random(2), distinct(60)
    texts = [*originals, *(changed(words, draw.uniform(0.7, 0.95), draw) for words in originals)]
    signatures = [signed(words) for words in texts]

    def answers():
        index = NearDuplicates(RECIPE)
        return [index.earlier(each) for each in signatures]

    expected = answers()
    assert 20 < sum(answer >= 0 for answer in expected) < 60
    monkeypatch.setattr(duplicates, "_BUFFER", 4)
    assert answers() == expected


def test_answers_are_those_of_comparing_with_all_that_were_kept():
    """An oracle that compares whole signatures; the bands may miss one at the threshold, so these are at a distance from it."""
    draw, originals = random.Random(3), distinct(40)
    texts = [*originals, *(changed(words, s, draw) for words in originals for s in (0.5, 0.95))]
    index, kept = NearDuplicates(RECIPE), []
    for each in map(signed, texts):
        similar = [number for number, other in enumerate(kept) if (each == other).mean() >= RECIPE.near_threshold]
        expected = similar[0] if similar else -1
        assert index.earlier(each) == expected
        if expected < 0:
            kept.append(each)


def test_the_first_of_several_similar_documents_is_named():
    recipe = Recipe(near_threshold=0.5)
    first = distinct(1)[0]
    near = changed(first, 0.45, random.Random(0))
    index = NearDuplicates(recipe)
    assert [index.earlier(signed(words, recipe)) for words in (first, near, first, near)] == [-1, -1, 0, 1]


@pytest.mark.parametrize(
    ("threshold", "permutations", "expected"), [(0.8, 128, (18, 7)), (0.5, 128, (42, 3)), (1.0, 64, (1, 64))]
)
def test_bands_have_as_many_rows_as_the_threshold_allows(threshold, permutations, expected):
    count, rows = bands(threshold, permutations)
    assert (count, rows) == expected
    assert 1 - (1 - threshold**rows) ** count >= duplicates.CERTAINTY
    assert rows == permutations or 1 - (1 - threshold ** (rows + 1)) ** (permutations // (rows + 1)) < duplicates.CERTAINTY


def test_a_kept_document_takes_few_bytes():
    index, draw = NearDuplicates(RECIPE), np.random.default_rng(0)
    for each in draw.integers(0, 2**32, (4096, RECIPE.near_permutations), np.uint32):
        index.earlier(each)
    size = index._signatures.nbytes + sum(run.nbytes for run in index._runs)
    assert index.kept == 4096
    assert size / index.kept <= 1.25 * RECIPE.near_permutations + 8 * bands(0.8, 128)[0]


def test_signatures_do_not_depend_on_the_process():
    code = (
        "from lumina.data.cleaning.duplicates import *; from lumina.data.recipe import *; from lumina.data.records import *\n"
        "print(signature(Document('x', 'one two three four five six seven'), Recipe()).tolist()[:4])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {"[3256627098, 3593077760, 3939696403, 1115771716]\n"}


def test_exact_keys_tell_kinds_and_texts_apart():
    text, same = Document("a", "hello"), Document("b", "hello")
    conversation = Document("c", turns=(Turn("user", "hello"),))
    keys = [exact_key(each) for each in (text, same, conversation, Document("d", "hello "))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3
    assert keys[0].hex() == "c1f22411d9bceea924757a3728970c44"


@pytest.mark.parametrize("recipe", [Recipe(near_threshold=0), Recipe(near_threshold=1.5), Recipe(near_permutations=0)])
def test_options_that_cannot_be_are_refused(recipe):
    with pytest.raises(UsageError, match="--near_"):
        NearDuplicates(recipe)
