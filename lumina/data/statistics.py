"""Figures of lengths, languages and conversations, the same for a file that is checked and a directory that is reported on."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lumina.errors import UsageError


def five_numbers(values: np.ndarray) -> dict[str, float]:
    """Least, quartiles, greatest, mean and sum of int values [N]; each but the mean is one of the values. Empty for none."""
    if not values.size:
        return {}
    names = ("min", "lower_quartile", "median", "upper_quartile", "max")
    five = np.percentile(values, (0, 25, 50, 75, 100), method="inverted_cdf")
    numbers = {name: int(value) for name, value in zip(names, five, strict=True)}
    return numbers | {"mean": float(values.mean()), "sum": int(values.sum())}


def octaves(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(least, greatest, how many) of int values [N] >= 0, in bins that double: 0, 1, 2 to 3, 4 to 7, ... without gaps."""
    if not values.size:
        return []
    # frexp is exact where a logarithm would round: x = m * 2^e with 1/2 <= m < 1.
    bins = np.frexp(values.astype(np.float64))[1]
    counts = np.bincount(bins)
    return [(2**e // 2, max(2**e - 1, 0), int(counts[e])) for e in range(int(bins.min()), len(counts))]


def languages(texts: Iterable[str], least: float) -> tuple[dict[str, int], str]:
    """How many texts are in each language, most first, "und" where it is less probable than `least`; or why nobody can tell."""
    from lumina.data.language import UNDETERMINED, detect

    counts: dict[str, int] = {}
    try:
        for text in texts:
            code, probability = detect(text)
            code = code if probability >= least else UNDETERMINED
            counts[code] = counts.get(code, 0) + 1
    except UsageError as error:
        return {}, str(error)
    return most_first(counts), ""


def most_first(counts: dict[str, int]) -> dict[str, int]:
    """The same, in an order that depends on nothing but itself."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def role_balance(turns: dict[str, int], characters: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Turns, characters and the share of these, by role."""
    total = max(1, sum(characters.values()))
    return {
        role: {"turns": turns[role], "characters": characters[role], "share": characters[role] / total}
        for role in sorted(turns)
    }


def repeats(keys: np.ndarray) -> np.ndarray:
    """Of each of N keys, the place of the first that is equal to it: int64 [N]."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which].astype(np.int64) if keys.size else np.empty(0, np.int64)
