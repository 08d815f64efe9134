"""`lumina data tokenizer`: train a tokenizer on the training documents of sources, and compare it on those held out."""

import argparse
import heapq
import io
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from lumina.conversation import named
from lumina.data.extras import need
from lumina.data.preparing.pipeline import Order, Say, require_unchanged, save_whole, training_share, training_texts
from lumina.data.reading.readers import plan, spool, text_bytes
from lumina.data.reading.streams import called
from lumina.data.recipe import recipe_of
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.console import Console, printable, table
from lumina.runs.units import decimal_bytes

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

SAMPLE_MB = {"bpe": 500.0, "sentencepiece": 50.0}  # SentencePiece takes 4 s of a core and 25 MB of memory for each MB
COMPARED_BYTES = 16 * 2**20  # of held-out text
BATCH = 1024  # texts encoded at once
REPORT = "comparison.json"
# Larger lines are cut: the trainer leaves out what is longer than it expects. Threads decide the order of its sums.
SENTENCE_CHARACTERS, SENTENCE_BYTES, THREADS = 4096, 4 * 4096, 8


def tell(arguments: argparse.Namespace) -> None:
    """Train it, save it, and print how it compares.

    Raises:
        UsageError: an option that cannot be, or --out is there already.
        ConfigError: the vocabulary does not hold what it must.
        DataError: the sources cannot be used, or hold less than the vocabulary needs.
    """
    _require_sensible(arguments)
    try:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {arguments.out}: cannot be made ({error.strerror}: {error.filename}); choose another"
        ) from error
    others = _others(arguments.compare, named(arguments.template).extra)
    console = Console(0)
    with tempfile.TemporaryDirectory(prefix="lumina-tokenizer-") as directory:
        sources = tuple(str(spool(sys.stdin.buffer, directory)) if spec == "-" else spec for spec in arguments.sources)
        order = Order(sources, recipe_of(arguments), arguments.held_out, arguments.template)
        tokenizer, found = train(
            order,
            arguments.kind,
            arguments.vocab_size,
            arguments.min_frequency,
            1e6 * (arguments.sample_mb or SAMPLE_MB[arguments.kind]),
            console.status,
            others,
        )
    save_whole(tokenizer, arguments.out)
    (arguments.out / REPORT).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    console.done()
    print(json.dumps(found, indent=2) if arguments.json else printable(text(found, arguments.out)))


def _others(specs: list[str], extra: tuple[str, ...]) -> dict[str, "Tokenizer"]:
    """Those that are named, by what they are called in the comparison."""
    from lumina.tokenizer_files import NAMED_ENCODINGS, load_tokenizer

    found = {spec: load_tokenizer(spec, extra) for spec in specs}
    return {spec if spec in NAMED_ENCODINGS else f"{other.name} of {spec}": other for spec, other in found.items()}


def _require_sensible(arguments: argparse.Namespace) -> None:
    for flag, value, good, works in (
        ("--held-out", arguments.held_out, 0 < arguments.held_out < 1, "must be between 0 and 1"),
        ("--min-frequency", arguments.min_frequency, arguments.min_frequency >= 0, "must be at least 0"),
        ("--sample-mb", arguments.sample_mb, arguments.sample_mb is None or arguments.sample_mb > 0, "must be above 0"),
    ):
        if not good:
            raise UsageError(f"{flag} = {value}: {works}")
    if arguments.min_frequency and arguments.kind != "bpe":
        raise UsageError(
            f"--min-frequency {arguments.min_frequency}: SentencePiece chooses pieces by likelihood, not by frequency; "
            "leave it out, or use --kind bpe"
        )
    if arguments.out.exists():
        raise UsageError(f"--out {arguments.out}: is there already; choose another, or delete it")


# ----------------------------------------------------------------------------------------------------------- training


def train(
    order: Order,
    kind: str,
    vocab_size: int,
    min_frequency: int,
    sample: float,
    say: Say,
    others: Mapping[str, "Tokenizer"] = MappingProxyType({}),
) -> tuple["Tokenizer", dict[str, Any]]:
    """A tokenizer of about `sample` bytes of the training documents, and how it compares on the held-out ones."""
    from lumina.tokenizer import train_bpe

    orders = [(order, plan(order.sources, order.recipe, say))]
    for line in orders[0][1].formats:
        say(line)
    extra, total = named(order.template).extra, orders[0][1].bytes
    size, held_out = text_bytes(orders[0][1]), HeldOut()
    share = training_share(size, sample)
    say(f"training {kind} of {vocab_size:,} ids on {decimal_bytes(share * size)}")
    texts = training_texts(orders, share, say, held_out.add)
    with _flag_named():
        if kind == "sentencepiece":
            tokenizer = train_sentencepiece(_told_of(texts, say), vocab_size, extra)
        else:
            tokenizer = train_bpe(texts, vocab_size, extra=extra, smaller=min_frequency > 0)
    if min_frequency:
        say(f"looking for merges that the text has less than {min_frequency:,} times")
        tokenizer = frequent_bpe(tokenizer, _batches(training_texts(orders, share, say)), min_frequency)
    for each, planned in orders:
        require_unchanged(each, planned)
    compared, missing = compare(tokenizer, held_out.texts(), say, others)
    about = {
        "name": tokenizer.name,
        "kind": kind,
        "vocab_size": tokenizer.vocab_size,
        "asked_for": vocab_size,
        "min_frequency": min_frequency,
        "fingerprint": tokenizer.fingerprint,
        "sources": {"names": list(map(called, order.sources)), "fingerprint": orders[0][1].fingerprint, "bytes": total},
        "trained_on_share": share,
        "held_out": held_out.about(),
        "compared": compared,
        "missing": missing,
    }
    return tokenizer, about


@contextmanager
def _flag_named() -> Iterator[None]:
    """Says --vocab-size where an error says model.vocab_size, as it is called in a config."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(str(error).replace("model.vocab_size", "--vocab-size")) from error


def _told_of(texts: Iterable[str], say: Say) -> Iterator[str]:
    """The texts, and where they end a line on what follows: the library itself tells nothing."""
    yield from texts
    say("all is read; SentencePiece chooses its pieces, and tells nothing until it has them")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for each in texts:
        batch.append(each)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


def frequent_bpe(tokenizer: "Tokenizer", batches: Iterable[list[str]], least: int) -> "Tokenizer":
    """A tokenizer of `train_bpe` without the merges that its text has less than `least` times.

    Encoding makes the merges of training in the order of training: a token was merged as often as it is among the ids, and as
    often as each token that is merged from it was. Of the pairs that training counted none is more frequent than one before it.
    So what comes after the last merge that was made often enough is left out, which takes nothing from the others. Of a run of
    one token, such as a ruled line, training counts overlapping pairs, up to twice as many as are merged.

    Args:
        batches: the texts that it was trained on.
    """
    from lumina.tokenizer import bpe_of

    size = tokenizer.vocab_size - len(tokenizer.control)
    ranks = [tokenizer.decode_bytes([rank]) for rank in range(size)]
    made = np.zeros(size, np.int64)
    for batch in batches:
        for ids in tokenizer.encode_batch(batch):
            made += np.bincount(np.array(ids, np.int64), minlength=size)
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    for rank in range(size - 1, 255, -1):
        for part in merged_from(ranks[rank], rank_of):
            made[part] += made[rank]
    often = np.flatnonzero(made[256:] >= least)
    return bpe_of(ranks[: 257 + int(often[-1])] if often.size else ranks[:256], tuple(tokenizer.control))


def merged_from(token: bytes, rank_of: Mapping[bytes, int]) -> tuple[int, int]:
    """The two ids that a token is the merge of: what the merges before it make of its bytes."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = enumerate(map(bytes.__add__, parts, parts[1:]))
        _, place = min((rank_of.get(pair, len(rank_of)), place) for place, pair in pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return rank_of[parts[0]], rank_of[parts[1]]


def train_sentencepiece(texts: Iterable[str], vocab_size: int, extra: tuple[str, ...] = ()) -> "Tokenizer":
    """SentencePiece's unigram model (Kudo 2018) with a piece for each byte, so that no text is unknown, and no normalisation.

    Args:
        texts: read once; all of it is in memory, several times over.
        vocab_size: the unknown piece, 256 bytes, pieces, and the control tokens at the end.
        extra: further control tokens, as in `lumina.tokenizer_files.load_tokenizer`.

    Raises:
        ConfigError: `vocab_size` does not hold bytes, control tokens and the characters of the texts.
        DataError: the texts hold fewer pieces than asked for, or nothing at all.
    """
    from lumina.tokenizer import control_tokens
    from lumina.tokenizer_files import load_tokenizer

    library = need("sentencepiece", "--kind sentencepiece")
    control = len(control_tokens(extra))
    if vocab_size < 257 + control + 1:
        fixed = f"256 bytes, the unknown piece and {control} control tokens"
        raise ConfigError(f"model.vocab_size = {vocab_size}: must be at least {258 + control}, for a piece beside {fixed}")
    model = io.BytesIO()
    options = {"vocab_size": vocab_size - control, "max_sentence_length": SENTENCE_BYTES, "num_threads": THREADS}
    none = {"bos_id": -1, "eos_id": -1, "pad_id": -1}  # the project's own control tokens follow
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="unigram",
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
            **options,
            **none,
            **exact,
        )
    except RuntimeError as error:
        raise _in_words(str(error), vocab_size, control) from error
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "tokenizer.model"
        path.write_bytes(model.getvalue())
        return load_tokenizer(str(path), extra)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their ends, which the bytes stand for, in parts of a bounded length."""
    for each in texts:
        for line in each.split("\n"):
            for start in range(0, len(line), SENTENCE_CHARACTERS):
                yield line[start : start + SENTENCE_CHARACTERS]


def _in_words(error: str, vocab_size: int, control: int) -> Exception:
    if most := re.search(r"too high .*<= (\d+)", error):
        reached = int(most[1]) + control
        works = f"set --vocab-size to at most {reached}, or give more text"
        return DataError(f"--vocab-size = {vocab_size}: the text has only enough pieces for {reached}; {works}")
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", error):
        least = int(needed[1]) + control
        return ConfigError(f"--vocab-size = {vocab_size}: must be at least {least}, to hold the characters of the text")
    if "sentences_.empty()" in error:
        return DataError("the training documents hold nothing to train SentencePiece on")
    return DataError(f"SentencePiece cannot be trained: {error}")


# --------------------------------------------------------------------------------------------------------- comparison


class HeldOut:
    """About COMPARED_BYTES of held-out texts, chosen by nothing but their text; what is in memory is no more."""

    def __init__(self) -> None:
        self.count, self.size = 0, 0
        self._heap: list[tuple[float, int, str]] = []

    def add(self, said: str, place: float) -> None:
        """Another one, with its place from 0 to 1: those that fall lowest stay."""
        heapq.heappush(self._heap, (-place, -self.count, said))
        self.count, self.size = self.count + 1, self.size + len(said)
        while self.size > COMPARED_BYTES and len(self._heap) > 1:
            self.size -= len(heapq.heappop(self._heap)[2])

    def texts(self) -> list[str]:
        return [said for _, _, said in sorted(self._heap, key=lambda each: -each[1])]

    def about(self) -> dict[str, int]:
        """Counts of what is compared on."""
        texts = self.texts()
        return {
            "documents": self.count,
            "compared_documents": len(texts),
            "bytes": sum(len(said.encode()) for said in texts),
            "characters": sum(map(len, texts)),
            "words": sum(len(said.split()) for said in texts),
        }


def compare(
    tokenizer: "Tokenizer",
    texts: list[str],
    say: Say = lambda line: None,
    others: Mapping[str, "Tokenizer"] = MappingProxyType({}),
) -> tuple[list[dict[str, Any]], list[str]]:
    """What tokenizers make of the texts: this one, others by name, the well-known ones; and why some of those are missing."""
    from lumina.tokenizer_files import NAMED_ENCODINGS, load_tokenizer

    rows, missing = [measured(tokenizer, texts)], []
    for name, other in others.items():
        say(f"comparing with {name}")
        rows.append(measured(other, texts) | {"name": name})
    for name in NAMED_ENCODINGS:
        if name in others:
            continue
        try:
            other = load_tokenizer(name)
        except DataError as error:
            missing.append(str(error))
            continue
        say(f"comparing with {name}")
        rows.append(measured(other, texts))
    return rows, missing


def measured(tokenizer: "Tokenizer", texts: list[str]) -> dict[str, Any]:
    """Compression of the texts, the share of ids that occur, and of texts that decode to what they were."""
    used, tokens, lossless = np.zeros(tokenizer.vocab_size, bool), 0, 0
    for batch in _batches(texts):
        for said, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            tokens += len(ids)
            used[ids] = True
            lossless += tokenizer.decode_bytes(ids) == said.encode()
    words = sum(len(said.split()) for said in texts)
    return {
        "name": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "tokens": tokens,
        "bytes_a_token": sum(len(said.encode()) for said in texts) / max(1, tokens),
        "characters_a_token": sum(map(len, texts)) / max(1, tokens),
        "tokens_a_1000_words": 1000 * tokens / max(1, words),
        "ids_used": float(used.mean()),
        "lossless": lossless / max(1, len(texts)),
    }


def text(found: dict[str, Any], out: Path) -> str:
    """The comparison as a person reads it."""
    held_out, size = found["held_out"], found["sources"]["bytes"]
    rows = [
        ("tokenizer", f"{found['name']}, {found['vocab_size']:,} ids, in {out}"),
        ("trained on", f"{100 * found['trained_on_share']:.3g}% of the training documents of {decimal_bytes(size)}"),
    ]
    if found["vocab_size"] < found["asked_for"]:
        why = f"the text has no more merges that occur {found['min_frequency']:,} times"
        rows.append(("smaller", f"{found['vocab_size']:,} ids instead of {found['asked_for']:,}: {why}"))
    some = f"{held_out['compared_documents']:,} of {held_out['documents']:,} held-out documents"
    rows.append(("compared on", f"{some}: {decimal_bytes(held_out['bytes'])}, {held_out['words']:,} words"))
    if found["missing"]:
        names = ", ".join(each.partition(":")[0] for each in found["missing"])
        works = "TIKTOKEN_CACHE_DIR tells where theirs are, --compare names other tokenizers"
        rows.append(("not with", f"{names}, whose files are not on this machine: {works}"))
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("tokenizer", lambda row: row["name"]),
        ("ids", lambda row: f"{row['vocab_size']:,}"),
        ("bytes/token", lambda row: f"{row['bytes_a_token']:.3f}"),
        ("characters/token", lambda row: f"{row['characters_a_token']:.3f}"),
        ("tokens/1,000 words", lambda row: f"{row['tokens_a_1000_words']:,.0f}"),
        ("ids used", lambda row: f"{100 * row['ids_used']:.1f}%"),
        ("lossless", lambda row: f"{100 * row['lossless']:.4g}%"),
    ]
    lines = [[name for name, _ in columns], *([cell(row) for _, cell in columns] for row in found["compared"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    grid = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([table(rows), "", *grid])
