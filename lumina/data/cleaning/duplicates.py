"""Documents that say what an earlier one says: equal ones by SHA-256, similar ones by MinHash and locality-sensitive hashing.

P permutations, b bands of r of them, S shingles, K candidates.

MinHash: Broder 1997. Its bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3.
"""

import hashlib
import json

import numpy as np

from lumina.data.cleaning.shingles import runs, words
from lumina.data.extras import need
from lumina.data.recipe import Recipe
from lumina.data.records import Document
from lumina.errors import UsageError

SEED = 0
CERTAINTY = 0.98  # probability with which a pair just as similar as the threshold shares a band
_CROWD = 64  # candidates taken of one band of one run: boilerplate that many documents share must not make each as slow as all
_BUFFER = 1024  # documents whose bands are not yet sorted into the runs
_BITS, _LOW = np.uint64(32), np.uint64(2**32 - 1)
_NONE = np.zeros(0, np.int64)


def exact_key(document: Document) -> bytes:
    """16 bytes that two documents share when kind, text and turns are the same."""
    said = json.dumps([document.kind, document.plain, document.turns, document.rejected])
    return hashlib.sha256(said.encode()).digest()[:16]


def signature(document: Document, recipe: Recipe) -> np.ndarray:
    """uint32 [P]: two documents have equal entries in about the share of their shingles that they have in common.

    Shingles are `near_shingle` words in a row, or characters where a script has no spaces; all of a shorter document is one.
    """
    rensa = need("rensa", "--steps near")
    hashes_S = runs(words(document.text)[0], recipe.near_shingle)
    if not len(hashes_S):  # no words at all: only the same characters are the same
        hashes_S = np.frombuffer(exact_key(document)[:8], "<u8")
    offsets = np.array([0, len(hashes_S)], np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes_S, offsets, recipe.near_permutations, SEED)
    return np.array(matrix.to_rows()[0], np.uint32)


def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(b, r): as many rows a band as leave a pair of similarity t = threshold a candidate with probability >= CERTAINTY.

    That probability is 1 - (1 - t^r)^b with b = permutations // r: more rows a band are fewer needless comparisons.
    """
    for rows in range(permutations, 0, -1):
        count = permutations // rows
        if 1 - (1 - threshold**rows) ** count >= CERTAINTY:
            return count, rows
    return permutations, 1


class NearDuplicates:
    """Decides, document by document, which is similar to an earlier one that was kept.

    A kept document takes P bytes of signature (8 of each 32 bits) and 8 a band.
    """

    def __init__(self, recipe: Recipe):
        if not 0 < recipe.near_threshold <= 1:
            raise UsageError(f"--near_threshold = {recipe.near_threshold}: must be above 0 and at most 1, such as 0.8")
        if recipe.near_permutations < 1 or recipe.near_shingle < 1:
            raise UsageError("--near_permutations and --near_shingle must be at least 1, such as 128 and 5")
        self.kept = 0
        self._least = recipe.near_threshold
        self._b, self._r = bands(recipe.near_threshold, recipe.near_permutations)
        self._signatures = np.empty((_BUFFER, recipe.near_permutations), np.uint8)
        self._recent: dict[int, list[int]] = {}  # band -> documents, of those that no run holds
        self._runs: list[np.ndarray] = []  # uint64, sorted: the band in the high half, the document in the low one

    def earlier(self, signature: np.ndarray) -> int:
        """The number, among those kept, of the first one that this is similar to; or -1, and this is kept.

        Args:
            signature: uint32 [P] of `signature`.
        """
        bands_b, short_P = self._bands(signature), _short(signature)
        candidates_K = self._candidates(bands_b)
        if len(candidates_K):
            shared_K = (self._signatures[candidates_K] == short_P).mean(axis=1)
            # Of 8 bits, one in 256 of those that differ are equal all the same.
            similar_K = (shared_K - 1 / 256) / (1 - 1 / 256) >= self._least
            if similar_K.any():
                return int(candidates_K[similar_K.argmax()])
        self._keep(bands_b, short_P)
        return -1

    def _bands(self, signature: np.ndarray) -> np.ndarray:
        """uint64 [b]: 32 bits a band, in the high half."""
        grid_br = signature[: self._b * self._r].reshape(self._b, self._r).astype(np.uint64)
        hashes_b = np.arange(1, self._b + 1, dtype=np.uint64)
        for row in range(self._r):
            hashes_b = (hashes_b ^ grid_br[:, row]) * np.uint64(0x9E3779B97F4A7C15)
            hashes_b ^= hashes_b >> _BITS
        return (hashes_b * np.uint64(0xD6E8FEB86659FD93)) >> _BITS << _BITS

    def _candidates(self, bands_b: np.ndarray) -> np.ndarray:
        """int64 [K], ascending: documents that share a band."""
        found = []
        for entries in self._runs:
            first_b = np.searchsorted(entries, bands_b)
            shared_b = entries[np.minimum(first_b, len(entries) - 1)] >> _BITS == bands_b >> _BITS
            for first in first_b[shared_b]:
                crowd = entries[first : first + _CROWD]
                found += (crowd[crowd >> _BITS == crowd[0] >> _BITS] & _LOW).tolist()
        for band in bands_b.tolist():
            found += self._recent.get(band, ())[:_CROWD]
        return np.unique(np.array(found, np.int64)) if found else _NONE

    def _keep(self, bands_b: np.ndarray, short_P: np.ndarray) -> None:
        if self.kept == len(self._signatures):
            grown = np.empty((self.kept + max(_BUFFER, self.kept // 4), len(short_P)), np.uint8)
            grown[: self.kept] = self._signatures
            self._signatures = grown
        self._signatures[self.kept] = short_P
        for band in bands_b.tolist():
            self._recent.setdefault(band, []).append(self.kept)
        self.kept += 1
        if self.kept % _BUFFER == 0:
            self._settle()

    def _settle(self) -> None:
        """Sort recent bands into a run, and merge runs of about the same length: their number grows with the logarithm."""
        entries = [np.uint64(band | number) for band, numbers in self._recent.items() for number in numbers]
        self._recent = {}
        run = np.sort(np.array(entries, np.uint64))
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.concatenate((self._runs.pop(), run))
            run.sort(kind="stable")
        self._runs.append(run)


def _short(signature: np.ndarray) -> np.ndarray:
    """uint8 [P]: 8 well-mixed bits of each entry."""
    return ((signature * np.uint32(0x9E3779B1)) >> np.uint32(24)).astype(np.uint8)
