"""Documents -> token shards -> rows -> batches.

`prepare` tokenises a source once and keeps the result in a cache keyed by content: the same text, tokenizer and split are
found again; anything else is made anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lumina.config import DataConfig
from lumina.data.rows import Batches, Rows
from lumina.data.shards import ShardWriter, TokenStream
from lumina.data.sources import Document, Rejects, Source, open_source, place
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.lock import is_locked

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

__all__ = ["Batches", "Corpus", "Document", "Rows", "Source", "TokenStream", "open_source", "prepare"]

FORMAT = 1  # part of every cache key: raise it when shards or manifest change meaning
DOCUMENT_END = "<|document_end|>"
CHUNK_CHARACTERS = 2**20  # tokenised at once
PROGRESS_SECONDS = 2.0


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Corpus:
    """A tokenised source, split into training and held-out documents."""

    path: Path
    manifest: dict[str, Any]
    tokenizer: "Tokenizer"
    train: TokenStream
    held_out: TokenStream

    @property
    def fingerprint(self) -> str:
        """sha256 over the tokenizer and the two streams of ids, however they are stored."""
        parts = [self.tokenizer.fingerprint, *(self.manifest[name]["tokens_sha256"] for name in ("train", "held_out"))]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def document_end_id(self) -> int:
        return self.manifest["document_end_id"]


def prepare(data: DataConfig, vocab_size: int, progress: Callable[[str], None] = _to_stderr) -> Corpus:
    """The corpus that `data` describes, from the cache or tokenised now.

    Args:
        data: source, tokenizer and split. A `bpe` tokenizer is trained on the training documents.
        vocab_size: the model's; a `bpe` tokenizer gets this many ids, any other must have at most as many.
        progress: is given a line now and then while it takes long, and one about rejected records.

    Raises:
        DataError: the source cannot be used, a side of the split is shorter than a row, or cached shards are damaged.
        ConfigError: the tokenizer has more ids than the model.
        UsageError: the cache cannot be written.
    """
    from lumina.tokenizer import load_tokenizer

    source = open_source(data)
    tokenizer, tokenizer_key = None, f"bpe {vocab_size}"
    if data.tokenizer != "bpe":
        tokenizer = load_tokenizer(data.tokenizer)
        tokenizer_key = tokenizer.fingerprint
        _require_fits(tokenizer, vocab_size)
    # held_out and text_field decide which documents there are, and on which side.
    key = json.dumps([FORMAT, source.fingerprint, tokenizer_key, data.held_out, data.text_field])
    path = _cache_root(data) / f"corpus-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
    if not path.exists():
        with _appearing_whole(path) as directory:
            _tokenise(source, data, tokenizer, vocab_size, directory, progress)
            if open_source(data).fingerprint != source.fingerprint:
                raise DataError(f"data.source = {data.source!r}: changed while it was being read; run again when it rests")
    corpus = _open(path, tokenizer)
    for stream in (corpus.train, corpus.held_out):
        Rows(stream, data.sequence_length, corpus.document_end_id)  # refuses a stream without a whole row
    if corpus.manifest["rejects"]["counts"]:
        progress(str(Rejects(**corpus.manifest["rejects"])))
    return corpus


def _require_fits(tokenizer: "Tokenizer", vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        least = f"must be at least tokenizer {tokenizer.name}'s {tokenizer.vocab_size}"
        raise ConfigError(f"model.vocab_size = {vocab_size}: {least}")


# ----------------------------------------------------------------------------------------------------------- cache


def _cache_root(data: DataConfig) -> Path:
    return Path(data.cache_dir or os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()


@contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """A new directory that becomes `path` when the block succeeds and vanishes when it does not.

    Where two processes make the same one, the first to finish wins and the other's is dropped. What a killed process left
    is removed: the lock on it went with the process.
    """
    directory = path.parent / f".making-{uuid.uuid4().hex}"
    lock = None
    try:
        directory.mkdir(parents=True)
        lock = os.open(directory, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in path.parent.glob(".making-*"):
                if time.time() - left.stat().st_ctime > 60 and not is_locked(left):  # a minute, as locking follows making
                    shutil.rmtree(left, ignore_errors=True)
        yield directory
        try:
            directory.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    except OSError as error:
        works = "set data.cache_dir or LUMINA_CACHE to a directory that can, with room"
        raise UsageError(f"{error.filename or path}: the cache cannot be written ({error.strerror}); {works}") from error
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(directory, ignore_errors=True)


def _open(path: Path, tokenizer: "Tokenizer | None") -> Corpus:
    again = f"delete {path}, and it is made again"
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        expected = manifest["tokenizer"]["fingerprint"]
        train, held_out = (TokenStream(path, name, manifest[name]) for name in ("train", "held_out"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / 'manifest.json'}: cannot be read as a manifest ({error}); {again}") from error
    from lumina.tokenizer import load_tokenizer

    tokenizer = tokenizer or load_tokenizer(str(path / "tokenizer"))
    if tokenizer.fingerprint != expected:
        raise DataError(f"{path}: its tokens were made with tokenizer {expected}, not {tokenizer.fingerprint}; {again}")
    return Corpus(path, manifest, tokenizer, train, held_out)


# ------------------------------------------------------------------------------------------------------- tokenising


def _tokenise(
    source: Source,
    data: DataConfig,
    tokenizer: "Tokenizer | None",
    vocab_size: int,
    directory: Path,
    progress: Callable[[str], None],
) -> None:
    """Fill `directory` with shards, manifest and, where one is trained, the tokenizer."""
    from lumina.tokenizer import train_bpe

    counts = _split(source, data)
    total = sum(count["documents"] for count in counts.values())
    megabytes = sum(count["bytes"] for count in counts.values()) / 1e6
    progress(f"{data.source}: {total:,} documents, {megabytes:,.1f} MB, of which {counts['held_out']['documents']:,} held out")
    if tokenizer is None:
        progress(f"training a tokenizer of {vocab_size:,} ids on {counts['train']['bytes'] / 1e6:,.1f} MB")
        tokenizer = train_bpe((each.text for each in source if place(each.text) >= data.held_out), vocab_size)
        _require_fits(tokenizer, vocab_size)
        tokenizer.save(directory / "tokenizer")
    end = tokenizer.control[DOCUMENT_END]
    writers = {name: ShardWriter(directory, name, tokenizer.vocab_size) for name in counts}
    documents, size, started, said = 0, 0, time.monotonic(), time.monotonic()
    for chunk in _chunks(source):
        sides: dict[str, list[list[int]]] = {name: [] for name in counts}
        for document, ids in zip(chunk, tokenizer.encode_batch([each.text for each in chunk]), strict=True):
            if end in ids:
                raise DataError(f"{document.name}: its text encodes to the control token {DOCUMENT_END}, id {end}")
            sides["held_out" if place(document.text) < data.held_out else "train"] += [ids, [end]]
            size += len(document.text.encode("utf-8"))
        for name, lists in sides.items():
            writers[name].write(np.fromiter(chain.from_iterable(lists), np.int64))
        documents += len(chunk)
        now = time.monotonic()
        if documents == total or now - said >= PROGRESS_SECONDS:
            said, rate = now, size / 1e6 / max(now - started, 1e-3)
            progress(f"tokenised {documents:,} of {total:,} documents, {size / 1e6:,.1f} MB, {rate:,.1f} MB/s")
    manifest = {
        "format": FORMAT,
        "source": {"spec": source.spec, "fingerprint": source.fingerprint},
        "tokenizer": {
            "spec": data.tokenizer,
            "name": tokenizer.name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "held_out_fraction": data.held_out,
        "document_end_id": end,
        **{name: counts[name] | writers[name].finish() for name in counts},
        "rejects": asdict(source.rejects),
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _chunks(source: Source) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in source:
        chunk.append(document)
        characters += len(document.text)
        if characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _split(source: Source, data: DataConfig) -> dict[str, dict[str, int]]:
    """Documents and bytes on each side; a side without any is refused before anything is trained or tokenised."""
    counts = {name: {"documents": 0, "bytes": 0} for name in ("train", "held_out")}
    lowest, highest = 1.0, 0.0
    for document in source:
        where = place(document.text)
        lowest, highest = min(lowest, where), max(highest, where)
        count = counts["held_out" if where < data.held_out else "train"]
        count["documents"] += 1
        count["bytes"] += len(document.text.encode("utf-8"))
    total = sum(count["documents"] for count in counts.values())
    if total == 0:
        why = f": {source.rejects}" if source.rejects.counts else ""
        raise DataError(f"data.source = {data.source!r}: holds no document{why}")
    for side, name in (("train", "left for training"), ("held_out", "held out")):
        if not counts[side]["documents"]:
            if lowest == highest:
                works = "a single text cannot be split: give it as several files or .jsonl lines"
            else:
                works = f"data.held_out={_between(lowest, highest)} leaves some on both sides"
            raise DataError(f"data.held_out = {data.held_out}: none of {total} documents is {name}; {works}")
    return counts


def _between(lowest: float, highest: float) -> float:
    """A short number above `lowest` and at most `highest`."""
    for digits in range(2, 17):
        number = (int(lowest * 10**digits) + 1) / 10**digits
        if lowest < number <= highest:
            return number
    return highest
