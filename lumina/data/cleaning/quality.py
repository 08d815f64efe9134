"""Rules that tell text worth reading from pages of menus, lists and repetition.

C characters, W words, S runs of words.

The rules and their bounds are Gopher's (Rae et al. 2021, appendix A1.1) and, of sentences and filler, C4's (Raffel et al.
2020), made for English web pages. So what a rule takes for granted is asked first: rules about words and sentences are for
prose, not for source code; the least number of words is for texts, not for conversations; and stop words are looked for only
where a model says that the text is English. C4's rules against braces and lines without a full stop are left out: both take
documentation for filler.
"""

import re
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np

from lumina.data.cleaning.language import detect
from lumina.data.cleaning.shingles import codes, runs, unspaced, words
from lumina.data.extras import need
from lumina.data.records import TEXT, Document

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_LENGTH, MAX_LENGTH = 3, 10  # mean of words, in characters
MIN_SENTENCES = 3
STOP_WORDS = frozenset(["the", "be", "to", "of", "and", "that", "have", "with"])
CODE_SHARE = 0.035  # of brackets, semicolons and operators among all characters: prose has less, source code more
# Gopher's bounds on shares of lines and paragraphs that were there before; of code, only what no one wrote by hand is above.
PROSE_REPEATS = {
    "repeated_lines": 0.30,
    "repeated_paragraphs": 0.30,
    "repeated_line_characters": 0.20,
    "repeated_paragraph_characters": 0.20,
}
CODE_REPEATS = {"repeated_line_characters": 0.60}
# Gopher's bounds on the share of characters in the commonest run of n words, and in runs of n words seen before.
COMMONEST = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

_CODE = b"{}[]()<>=;_\\|&*+^~@$`"
_BULLETS = tuple(f"{bullet}{space}" for bullet in "-*•‣▪●○–·" for space in " \t")  # noqa: RUF001
_ELLIPSES = ("...", "…")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*_`]*(?=\s|$)|[。！？।؟۔]")  # noqa: RUF001
_STOP_WORDS = words("the be to of and that have with")[0]


# The measures and the longer runs of one document need its words each.
_words = lru_cache(maxsize=1)(words)


class Quality:
    """Removes documents that break a rule, and names the rule."""

    name = "quality"

    def __init__(self) -> None:
        need("py3langid.langid", "--steps quality")

    def __call__(self, document: Document) -> Document | str:
        return fault(document.text, document.kind) or document


def fault(text: str, kind: str = TEXT) -> str:
    """The first rule that the text breaks, or ""."""
    measured = measures(text)
    if measured["words"] > MAX_WORDS:
        return f"more than {MAX_WORDS:,} words"
    prose = measured["code"] <= CODE_SHARE
    return (
        (_not_prose(measured, text, kind) if prose else "")
        or _repeats(measured, PROSE_REPEATS if prose else CODE_REPEATS)
        or (_repeated_runs(text, measured) if prose and measured["unspaced"] < 0.3 else "")
    )


@lru_cache(maxsize=4)
def measures(text: str) -> dict[str, float]:
    """What the rules look at, for a report: counts, and shares of 0 to 1."""
    hashes_W, lengths_W = _words(text)
    raw = text.encode("utf-8", "surrogatepass")
    tokens, letters_only = _tokens(text)
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = [part for part in map(str.strip, re.split(r"\n\s*\n", text)) if part]
    headings = sum(len(line) - len(line.lstrip("#")) for line in lines if line[0] == "#")  # or comments: no hashtags
    wordy = max(1, len(tokens))
    return {
        "characters": len(text),
        "words": len(hashes_W),
        "mean_word_length": float(tokens.mean()) if len(tokens) else 0.0,
        "alphabetic_words": letters_only / wordy,
        "symbols_a_word": (text.count("#") - headings + text.count("...") + text.count("…")) / wordy,
        "code": (len(raw) - len(raw.translate(None, _CODE))) / max(1, len(text)),
        "unspaced": unspaced(text),
        "bullet_lines": sum(line.startswith(_BULLETS) for line in lines) / max(1, len(lines)),
        "ellipsis_lines": sum(line.endswith(_ELLIPSES) for line in lines) / max(1, len(lines)),
        "sentences": len(_SENTENCE_END.findall(text)),
        "repeated_lines": _repeated(lines, lambda line: 1),
        "repeated_line_characters": _repeated(lines, len),
        "repeated_paragraphs": _repeated(paragraphs, lambda part: 1),
        "repeated_paragraph_characters": _repeated(paragraphs, len),
        **{f"commonest_{n}_words": _commonest(hashes_W, lengths_W, n) for n in COMMONEST},
        "repeated_5_words": _seen_before(hashes_W, lengths_W, 5),
    }


def _not_prose(measured: dict[str, float], text: str, kind: str) -> str:
    if kind == TEXT and measured["words"] < MIN_WORDS:
        return f"fewer than {MIN_WORDS} words"
    spaced = measured["unspaced"] < 0.3
    if spaced and not MIN_LENGTH <= measured["mean_word_length"] <= MAX_LENGTH:
        bound = f"below {MIN_LENGTH}" if measured["mean_word_length"] < MIN_LENGTH else f"above {MAX_LENGTH}"
        return f"mean word length {bound} characters"
    if spaced and measured["alphabetic_words"] < 0.8:
        return "fewer than 80% of words with a letter"
    if measured["symbols_a_word"] > 0.1:
        return "more than one # or ellipsis in 10 words"
    if measured["bullet_lines"] > 0.9:
        return "more than 90% of lines with a bullet"
    if measured["ellipsis_lines"] > 0.3:
        return "more than 30% of lines that end in an ellipsis"
    if kind == TEXT and measured["sentences"] < MIN_SENTENCES:
        return f"fewer than {MIN_SENTENCES} sentences"
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    if _could_be_english(text) and measured["words"] >= MIN_WORDS and len(np.intersect1d(_STOP_WORDS, _words(text)[0])) < 2:
        language, probability = detect(text)
        if language == "en" and probability >= 0.5:
            return "English with fewer than 2 of its 8 stop words"
    return ""


def _could_be_english(text: str) -> bool:
    """Whether few letters are outside ASCII, apart from quotes: spares most other texts the model."""
    return len(text.encode("utf-8", "surrogatepass")) < 1.02 * len(text)


def _repeats(measured: dict[str, float], bounds: dict[str, float]) -> str:
    for name, most in bounds.items():
        if measured[name] > most:
            return f"{name.replace('_', ' ')} above {most:.0%}"
    return ""


def _repeated_runs(text: str, measured: dict[str, float]) -> str:
    for n, most in COMMONEST.items():
        if measured[f"commonest_{n}_words"] > most:
            return f"commonest {n} words above {most:.0%} of characters"
    share, (hashes_W, lengths_W) = measured["repeated_5_words"], _words(text)
    for n, most in REPEATED.items():
        if share <= min(REPEATED.values()):  # longer runs repeat less: each holds two shorter ones
            return ""
        share = _seen_before(hashes_W, lengths_W, n)
        if share > most:
            return f"repeated {n} words above {most:.0%} of characters"
    return ""


def _tokens(text: str) -> tuple[np.ndarray, int]:
    """(lengths, alphabetic): int64 [W] of what stands between white space, and how many of them hold a letter."""
    space, letter = _classes()
    codes_C = codes(text)
    if codes_C.dtype != np.uint8:
        codes_C = np.minimum(codes_C, len(space) - 1)
    bounds = np.flatnonzero(np.diff(space[codes_C], prepend=True, append=True))
    starts_W, ends_W = bounds[::2], bounds[1::2]
    before_C = np.concatenate(([0], np.cumsum(letter[codes_C])))
    return ends_W - starts_W, int((before_C[ends_W] > before_C[starts_W]).sum())


def _repeated(parts: list[str], weight: Callable[[str], int]) -> float:
    """The share of `parts`, by weight, that are equal to an earlier one."""
    if not parts:
        return 0.0
    total = sum(map(weight, parts))
    return 1 - sum(map(weight, set(parts))) / total


def _commonest(hashes_W: np.ndarray, lengths_W: np.ndarray, n: int) -> float:
    """The share of the words' characters that lie in the commonest run of n words; 0 where none comes twice."""
    if len(hashes_W) <= n:
        return 0.0
    order_S, starts = _equal(hashes_S := runs(hashes_W, n))
    counts = np.diff(starts, append=len(hashes_S))
    most = counts.max()
    if most < 2:
        return 0.0
    first_S = order_S[starts[counts == most]]
    longest = sum(lengths_W[first_S + offset] for offset in range(n)).max()
    return min(1.0, float(longest * most / lengths_W.sum()))


def _seen_before(hashes_W: np.ndarray, lengths_W: np.ndarray, n: int) -> float:
    """The share of the words' characters in runs of n words that stand earlier in the text too."""
    if len(hashes_W) <= n:
        return 0.0
    order_S, starts = _equal(runs(hashes_W, n))
    if len(starts) == len(order_S):
        return 0.0
    repeats_S = np.ones(len(order_S), bool)
    repeats_S[order_S[starts]] = False
    covered_W = np.zeros(len(lengths_W), bool)
    for offset in range(n):
        covered_W[offset : offset + len(repeats_S)] |= repeats_S
    return float(lengths_W[covered_W].sum() / lengths_W.sum())


def _equal(hashes_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(order, starts): an order [S] that puts equal hashes side by side, the first first; where each lot starts."""
    order_S = np.argsort(hashes_S, kind="stable")
    sorted_S = hashes_S[order_S]
    return order_S, np.flatnonzero(np.concatenate(([True], sorted_S[1:] != sorted_S[:-1])))


@cache
def _classes() -> tuple[np.ndarray, np.ndarray]:
    """bool [0x32000] each, by code point: white space, and letters."""
    count = 0x32000
    space = np.fromiter((chr(code).isspace() for code in range(count)), bool, count)
    return space, np.fromiter((chr(code).isalpha() for code in range(count)), bool, count)
