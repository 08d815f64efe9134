"""Hashes of words and of runs of words, the same on every machine: what near duplicates and decontamination compare.

C characters, W words, S runs of words.
"""

import unicodedata
from functools import cache

import numpy as np

# Odd multipliers of a polynomial modulo 2**64 over the characters of a word, and over the words of a run.
_CHARACTER, _WORD = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_LONGEST = 256  # characters of a word that have a power of their own; those after them take the same powers again
_BLOCK = 1 << 16  # words hashed at a time: a document of any length takes the memory of this many
# Scripts that are written without spaces: each character is a word.
_UNSPACED = (
    (0x0E00, 0x0F00),  # Thai, Lao
    (0x1000, 0x10A0),  # Burmese
    (0x1780, 0x1800),  # Khmer
    (0x2E80, 0x3000),  # radicals
    (0x3040, 0x3100),  # kana
    (0x31F0, 0x3200),
    (0x3400, 0xA000),  # Han
    (0xF900, 0xFB00),
    (0x20000, 0x32000),
)
_END = 0x32000  # no letters above


def words(text: str) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, lengths): uint64 [W], the same for a word in any case, and int64 [W], in characters.

    Words are letters, marks and digits; punctuation only separates them.
    """
    codes_C = codes(text.lower())
    starts_W, ends_W = _bounds(codes_C)
    blocks = [_hashed(codes_C, starts_W[i : i + _BLOCK], ends_W[i : i + _BLOCK]) for i in range(0, len(starts_W), _BLOCK)]
    return np.concatenate(blocks) if blocks else np.zeros(0, np.uint64), ends_W - starts_W


def runs(words_W: np.ndarray, length: int) -> np.ndarray:
    """uint64 [S]: a hash for each `length` words in a row; one of all words where there are fewer, none where there is none."""
    if not len(words_W):
        return words_W
    length = min(length, len(words_W))
    count = len(words_W) - length + 1
    hashes_S = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes_S *= np.uint64(_WORD)
        hashes_S += words_W[offset : offset + count]
    return _mixed(hashes_S)


def codes(text: str) -> np.ndarray:
    """uint8 or uint32 [C]: the code points of the text."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def unspaced(text: str) -> float:
    """The share of the characters whose script has no spaces between words."""
    if text.isascii():
        return 0.0
    return float(_tables()[1][np.minimum(codes(text), _END)].mean())


def _bounds(codes_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int64 [W] each: where words start and end."""
    in_word, alone = _tables()
    if codes_C.dtype != np.uint8:
        codes_C = np.minimum(codes_C, _END)
    inside_C = in_word[codes_C]
    before_C = np.concatenate(([False], inside_C[:-1]))
    if codes_C.dtype == np.uint8:
        starts_C = inside_C & ~before_C
    else:
        alone_C = alone[codes_C]
        starts_C = inside_C & (~before_C | alone_C | np.concatenate(([False], alone_C[:-1])))
    starts_W = np.flatnonzero(starts_C)
    # A word ends where the next begins or, before that, at the first character that is in none.
    gaps = np.append(np.flatnonzero(before_C & ~inside_C), len(codes_C))
    ends_W = gaps[np.searchsorted(gaps, starts_W, side="right")] if len(starts_W) else starts_W
    return starts_W, np.minimum(ends_W, np.append(starts_W[1:], len(codes_C)))


def _hashed(codes_C: np.ndarray, starts_W: np.ndarray, ends_W: np.ndarray) -> np.ndarray:
    lengths_W = ends_W - starts_W
    offsets_W = np.cumsum(lengths_W) - lengths_W
    within = np.arange(lengths_W.sum()) - np.repeat(offsets_W, lengths_W)
    letters = codes_C[within + np.repeat(starts_W, lengths_W)].astype(np.uint64)
    return _mixed(np.add.reduceat((letters + np.uint64(1)) * _powers()[within % _LONGEST], offsets_W))


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): all bits depend on all bits."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


@cache
def _powers() -> np.ndarray:
    return np.array([pow(_CHARACTER, exponent, 2**64) for exponent in range(1, _LONGEST + 1)], np.uint64)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """bool [_END + 1] each, by code point: whether it is part of a word, and whether it is a word by itself."""
    in_word = np.fromiter((unicodedata.category(chr(code))[0] in "LMN" for code in range(_END + 1)), bool, _END + 1)
    alone = np.zeros(_END + 1, bool)
    for first, end in _UNSPACED:
        alone[first:end] = in_word[first:end]
    in_word[_END] = False
    return in_word, alone
