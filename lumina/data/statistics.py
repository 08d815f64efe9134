"""Figures of lengths, languages and conversations, the same for a file that is checked and a directory that is reported on."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lumina.data.records import Document, Turn
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


def disorder(document: Document) -> str:
    """What is odd about the turns of a conversation or preference, or "": an answer is learned where a question is before it."""
    if document.rejected and document.rejected == document.turns:
        return "chosen and rejected are the same"
    return next(filter(None, map(_disorder, filter(None, (document.turns, document.rejected)))), "")


def _disorder(turns: Sequence[Turn]) -> str:
    roles = [turn.role for turn in turns]
    roles = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in roles:
        return "no answer"
    if "system" in roles:
        return "a system turn after the first turn"
    if roles[0] != "user":
        return "an answer before any question"
    if any(one == next_ for one, next_ in zip(roles, roles[1:], strict=False)):
        return "two turns of one role in a row"
    return "" if roles[-1] == "assistant" else "no answer to the last question"


def role_balance(turns: dict[str, int], characters: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Turns, characters and the share of these, by role."""
    total = max(1, sum(characters.values()))
    return {
        role: {"turns": turns[role], "characters": characters[role], "share": characters[role] / total}
        for role in sorted(turns)
    }
