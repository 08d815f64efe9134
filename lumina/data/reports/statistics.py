"""Figures of data: of a prepared directory, and those that are alike for a file that is checked.

N documents, V ids.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lumina.conversation import DEFAULT_LOSS_WEIGHTS, NONE, loss_weights
from lumina.data.corpus import SIDES, Corpus
from lumina.data.preparing.pipeline import REJECTS, Meter, Say
from lumina.data.recipe import Recipe
from lumina.data.records import PREFERENCE, TEXT
from lumina.data.shards import TokenStream
from lumina.errors import DataError, UsageError
from lumina.tokenizer_files import UNKNOWN

BLOCK_TOKENS = 2**20  # counted at once
SAMPLED = 1000  # documents decoded for their languages
SAMPLED_TOKENS = 2048  # of each
RARE = 10  # an id that occurs less often learns little
PACKED = (512, 1024, 2048, 4096, 8192)  # row lengths whose waste is told
PACKED_DOCUMENTS = 20_000_000  # above so many the packing is not tried
ROLE_CODES = 5


@dataclass(frozen=True)
class Figures:
    """What a report on a prepared directory shows."""

    corpus: Corpus
    sizes: dict[str, np.ndarray]  # side -> tokens of each document, its end included, int64 [N]
    ids: dict[str, np.ndarray]  # side -> how often each id occurs, int64 [V]
    roles: dict[str, np.ndarray]  # side -> tokens of each code of lumina.conversation, int64 [5]; none of texts
    turns: dict[str, np.ndarray]  # side -> turns of each conversation, int64 [N]; none of texts
    languages: dict[str, int]
    languages_left_out: str  # why, or ""
    sampled: int  # documents whose languages were looked at
    damaged: int  # of these, those with U+FFFD
    packing: list[tuple[int, float, int]]  # row length, share of positions that stay empty, documents that are cut
    rejected: list[dict[str, str]]  # the first few of each kind: name, kind, sample
    samples: dict[str, list[dict[str, str]]]  # step -> what it did to the first few

    @property
    def unknown(self) -> int:
        """Tokens that stand for U+FFFD: what a tokenizer makes of what it does not know."""
        tokenizer = self.corpus.tokenizer
        candidates = np.flatnonzero(tokenizer.token_bytes() == len(UNKNOWN)).tolist()
        ids = [i for i in candidates if tokenizer.decode_bytes([i]) == UNKNOWN]
        return int(sum(counts[ids].sum() for counts in self.ids.values()))


def language_score(corpus: Corpus) -> float:
    """The least probability of a language: that of its step, or the default where that was not taken."""
    return float(corpus.manifest["recipe"].get("language_score", Recipe().language_score))


def figures(corpus: Corpus, say: Say = lambda line: None) -> Figures:
    """Look at all tokens of a prepared directory once, and at some of its documents as text.

    Raises DataError where it is damaged.
    """
    streams = {side: getattr(corpus, side) for side in SIDES}
    roles = {side: stream for side in SIDES if (stream := corpus.roles(side)) is not None}
    total = sum(stream.num_tokens * np.dtype(corpus.manifest[side]["dtype"]).itemsize for side, stream in streams.items())
    meter = Meter("counted", total + sum(stream.num_tokens for stream in roles.values()), say)
    vocabulary = corpus.tokenizer.vocab_size
    ids = {side: _counts(stream, vocabulary, meter, total // max(1, _tokens(streams))) for side, stream in streams.items()}
    by_role = {side: _counts(stream, ROLE_CODES, meter, 1) for side, stream in roles.items()}
    texts = sampled_texts(corpus)
    spoken, why = languages(texts, language_score(corpus))
    return Figures(
        corpus=corpus,
        sizes={side: np.diff(corpus.documents(side)) for side in SIDES},
        ids=ids,
        roles=by_role,
        turns={side: _turns(corpus, side) for side in SIDES} if corpus.kind != TEXT else {},
        languages=spoken,
        languages_left_out=why,
        sampled=len(texts),
        damaged=sum("\ufffd" in text for text in texts),
        packing=_packing(corpus),
        rejected=_json_lines(corpus, REJECTS),
        samples=_json(corpus, "samples.json"),
    )


def _tokens(streams: dict[str, TokenStream]) -> int:
    return sum(stream.num_tokens for stream in streams.values())


def _counts(stream: TokenStream, size: int, meter: Meter, width: int) -> np.ndarray:
    """How often each of `size` values occurs in a stream: int64 [size]."""
    counts = np.zeros(size, np.int64)
    for start in range(0, stream.num_tokens, BLOCK_TOKENS):
        block = stream.read(start, min(start + BLOCK_TOKENS, stream.num_tokens))
        found = np.bincount(block, minlength=size)
        if found.size > size:
            raise DataError(f"{stream.name}: holds {found.size - 1}, which must be below {size}; prepare it again")
        counts += found
        meter.add(block.size * width, block.size, 0)
        meter.tick()
    return counts


def _turns(corpus: Corpus, side: str) -> np.ndarray:
    """Turns of each conversation: int64 [N]; texts among them have none and are left out."""
    counts = np.diff(np.searchsorted(corpus.turns(side), corpus.documents(side)))
    return counts[counts > 0]


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, ascending, in no rhythm that data could have."""
    if count <= most:
        return list(range(count))
    golden = (math.sqrt(5) - 1) / 2  # its multiples are evenly spread modulo 1
    return sorted({int((number * golden) % 1 * count) for number in range(most)})


def sampled_texts(corpus: Corpus) -> list[str]:
    """The beginnings of some training documents as text, without control tokens and headers."""
    starts, roles = corpus.documents("train"), corpus.roles("train")
    texts = []
    for number in spread(len(starts) - 1, SAMPLED):
        start, stop = int(starts[number]), int(min(starts[number + 1], starts[number] + SAMPLED_TOKENS))
        ids = corpus.train.read(start, stop)
        if roles is not None:
            ids = ids[roles.read(start, stop) != NONE]
        texts.append(corpus.tokenizer.decode_bytes(ids.tolist()).decode("utf-8", "ignore"))
    return texts


def chosen_longer(corpus: Corpus) -> dict[str, float]:
    """Of preferences: medians of tokens of either side, and the share of pairs whose chosen side is the longer one."""
    if corpus.kind != PREFERENCE:
        return {}
    sizes = np.diff(corpus.documents("train"))
    chosen, rejected = sizes[0::2], sizes[1::2]
    longer = float((chosen > rejected).mean())
    return {"chosen": float(np.median(chosen)), "rejected": float(np.median(rejected)), "longer": longer}


def _packing(corpus: Corpus) -> list[tuple[int, float, int]]:
    from lumina.data.packing import plan

    documents = np.asarray(corpus.documents("train"))
    if corpus.kind == PREFERENCE or len(documents) > PACKED_DOCUMENTS:
        return []
    turns, roles = None if corpus.kind == TEXT else np.asarray(corpus.turns("train")), corpus.roles("train")
    codes, weights = (None, None) if roles is None else (roles.read, loss_weights(DEFAULT_LOSS_WEIGHTS))
    reports = [(length, plan(documents, length, turns, codes, weights).report) for length in PACKED]
    return [(length, found.waste, found.cut_documents + found.split_conversations) for length, found in reports]


def _json(corpus: Corpus, name: str) -> Any:
    try:
        return json.loads((corpus.path / name).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{corpus.path / name}: cannot be read ({error}); prepare it again") from error


def _json_lines(corpus: Corpus, name: str) -> list[dict[str, str]]:
    try:
        return [json.loads(line) for line in (corpus.path / name).read_bytes().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{corpus.path / name}: cannot be read ({error}); prepare it again") from error


# ------------------------------------------------------------------------------------------- alike for files that are checked


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
    from lumina.data.cleaning.language import UNDETERMINED, detect

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
