"""Documents that hold what a model will be evaluated on.

W words, S runs of words.
"""

from collections.abc import Iterable

import numpy as np

from lumina.data.cleaning.shingles import runs, words
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError

FEWEST = 5  # an evaluation text of fewer words, such as an answer "yes", is found only where a document says nothing else


class Decontaminate:
    """Removes documents that share `against_ngram` words in a row with an evaluation text, or hold all of a shorter one.

    Words are compared in lower case and without punctuation (Brown et al. 2020, appendix C), by 64-bit hashes of runs.
    """

    name = "decontaminate"

    def __init__(self, texts: Iterable[str], recipe: Recipe):
        self._ngram = recipe.against_ngram
        if self._ngram < FEWEST:
            raise UsageError(f"--against_ngram = {self._ngram}: must be at least {FEWEST}, such as 13")
        found: dict[int, list[np.ndarray]] = {}
        for text in texts:
            words_W = words(text)[0]
            length = min(self._ngram, len(words_W))
            if length:
                found.setdefault(length, []).append(np.unique(runs(words_W, length)))
        if not found:
            raise UsageError("--against: no evaluation text to decontaminate against; name files that hold some")
        self._tables = {length: _Table(np.unique(np.concatenate(found[length]))) for length in sorted(found)}

    def __call__(self, document: Document) -> Document | str:
        words_W = words(document.text)[0]
        for length, table in self._tables.items():
            fits = len(words_W) == length if length < FEWEST else len(words_W) >= length
            if fits and table.holds_any(runs(words_W, length)):
                short = f"holds an evaluation text of fewer than {self._ngram} words"
                return short if length < self._ngram else f"shares {self._ngram} words with the evaluation texts"
        return document


class _Table:
    """A set of hashes, with a map of which of their first bits occur: few of other hashes need a search."""

    def __init__(self, hashes_S: np.ndarray):
        self._hashes_S = hashes_S
        self._shift = np.uint64(64 - min(26, len(hashes_S).bit_length() + 4))
        self._occurs = np.zeros(1 << (64 - int(self._shift)), bool)
        self._occurs[hashes_S >> self._shift] = True

    def holds_any(self, hashes_S: np.ndarray) -> bool:
        likely = hashes_S[self._occurs[hashes_S >> self._shift]]
        places = np.minimum(np.searchsorted(self._hashes_S, likely), len(self._hashes_S) - 1)
        return bool((self._hashes_S[places] == likely).any())
