"""How good a source is to train on, from 0 to 100: a weighted mean of shares, each with its weight and its formula."""

from collections.abc import Iterator
from typing import Any, NamedTuple

FORMULA = "100 x sum(weight x share) / sum(weight), over the parts that were measured"
SHORTEST, LONGEST = 50, 1_000_000  # characters of a text: below is hardly a thought, above is rarely written by hand
UNDETERMINED = "und"  # as lumina.data.cleaning.language has it


class Part(NamedTuple):
    """One share; None where it was not measured, or says nothing of this kind of source."""

    name: str
    weight: int
    share: float | None
    formula: str


def score(found: dict[str, Any]) -> dict[str, Any]:
    """The score of what `lumina data check` found, with its parts and its formula; None where nothing was measured."""
    parts = [part for part in _parts(found) if part.share is not None]
    total = sum(part.weight for part in parts)
    value = 100 * sum(part.weight * (part.share or 0) for part in parts) / total if total else None
    return {"score": value, "formula": FORMULA, "parts": [part._asdict() for part in parts]}


def _parts(found: dict[str, Any]) -> Iterator[Part]:
    documents, sampled = found["records"]["kept"], found["sample"]["documents"]
    exact, near = found["duplicates"]["exact"], found["duplicates"]["near"]
    told = "records that can be read and that no step removes, of all records"
    yield Part("usable", 3, _share(documents, found["records"]["read"]), told)
    yield Part("not repeated", 2, _rest(exact["documents"], documents), "documents that are equal to no earlier one")
    told = "documents that are similar to no earlier one, of those compared"
    yield Part("not similar", 1, _rest(near["documents"], near["compared"]), told)
    if not found["quality"]["left_out"]:
        told = "documents that break no rule of --steps quality, of those sampled"
        yield Part("well written", 2, _rest(sum(found["quality"]["faults"].values()), sampled), told)
    known = [count for code, count in found["languages"]["found"].items() if code != UNDETERMINED]
    told = "documents in the commonest language, of those sampled whose language can be told"
    yield Part("one language", 1, _share(max(known, default=0), sum(known)), told)
    told = f"texts of {SHORTEST:,} to {LONGEST:,} characters, and conversations of at most that"
    yield Part("of fair length", 1, _share(found["characters"]["fair"], documents), told)
    yield Part("undamaged", 1, _rest(found["damaged"], documents), "documents without U+FFFD, which stands for lost characters")
    turns = found["turns"]
    told = "conversations whose last answer is none of an earlier one"
    yield Part("own answers", 2, _rest(turns["repeated_answers"], turns["conversations"]), told)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _rest(part: int, whole: int) -> float | None:
    return 1 - part / whole if whole else None
