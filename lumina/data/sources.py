"""The corpus of each source that a config names.

`prepare_all` finds or makes the corpus of each source that a config names. What it makes is kept in a cache keyed by content:
the same records, tokenizer and split are found again; anything else is made anew.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lumina.config import DataConfig
from lumina.data.corpus import FORMAT, TOKENIZER, Corpus, is_prepared, open_corpus
from lumina.data.preparing.pipeline import Order, fill, require_fits, told, train_tokenizer
from lumina.data.reading.readers import Plan, plan, read
from lumina.data.recipe import Recipe
from lumina.data.records import PREFERENCE, Document
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.lock import is_locked
from lumina.stages import first_source

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

Say = Callable[[str], None]


def prepare_all(sources: Sequence[str], data: DataConfig, vocab_size: int, progress: Say) -> list[Corpus]:
    """The corpus of each source, a prepared directory or comma-separated files and names, with one tokenizer for all.

    Args:
        sources: see `lumina.data.reading.readers.plan`.
        data: tokenizer, split and template. A `bpe` tokenizer is trained on the training documents of all sources, unless one
            is a prepared directory, which has its own.
        vocab_size: the model's; a `bpe` tokenizer gets this many ids, any other must have at most as many.
        progress: is given a line now and then while it takes long, and one about records that were not kept.

    Raises:
        DataError: a source cannot be used, or cached shards are damaged.
        ConfigError: the tokenizer has more ids than the model.
        UsageError: the cache cannot be written.
    """
    from lumina.conversation import TEMPLATES
    from lumina.tokenizer_files import load_tokenizer

    recipe = Recipe(steps="none", text_field=data.text_field)
    _require_apart(sources)
    opened = {source: open_corpus(Path(source)) for source in sources if is_prepared(Path(source))}
    orders = {source: Order(_named(source), recipe, data.held_out, data.template) for source in sources if source not in opened}
    plans = {source: plan(order.sources, recipe) for source, order in orders.items()}
    for planned in plans.values():
        _require_learnable(planned.kinds.get(PREFERENCE, ""))
    for source, corpus in opened.items():
        _require_learnable(source if corpus.kind == PREFERENCE else "")
    extra = TEMPLATES[data.template].extra
    if data.tokenizer != "bpe":
        tokenizer = load_tokenizer(data.tokenizer, extra)
    elif opened:
        tokenizer = next(iter(opened.values())).tokenizer
    else:
        tokenizer = _trained(data, [(order, plans[source]) for source, order in orders.items()], vocab_size, extra, progress)
    require_fits(tokenizer, vocab_size, next(iter(opened), "") if data.tokenizer == "bpe" else "")
    for source, corpus in opened.items():
        _require_as_asked(source, corpus, data, progress)
        if corpus.tokenizer.fingerprint != tokenizer.fingerprint:
            raise DataError(
                f"{source}: was prepared with tokenizer {corpus.tokenizer.name}, not {tokenizer.name}: "
                f"prepare it with --tokenizer {data.tokenizer if data.tokenizer != 'bpe' else next(iter(opened))}"
            )
    for source, order in orders.items():
        opened[source] = _cached(order, plans[source], tokenizer, data, progress)
    for corpus in opened.values():
        if says := told(corpus.manifest):
            progress(f"{corpus.manifest['source']['spec']}: {says}")
    return [opened[source] for source in sources]


def _require_apart(sources: Sequence[str]) -> None:
    """Raise a ConfigError where a prepared directory is one of several sources that are read as one."""
    for source in sources:
        parts = _named(source)
        prepared = [part for part in parts if is_prepared(Path(part))]
        if prepared and len(parts) > 1:
            works = f"mix them by weight: {','.join(f'{part}@1' for part in parts)}"
            raise ConfigError(f"{source}: {prepared[0]} is a prepared directory, which is no part of another source; {works}")


def _require_learnable(preferences: str) -> None:
    """Raise a DataError where there is a name of something that holds preferences."""
    if preferences:
        works = "training needs texts or conversations; name others, or make conversations of the chosen sides"
        raise DataError(f"{preferences}: holds preferences, chosen and rejected; {works}")


def _require_as_asked(source: str, corpus: Corpus, data: DataConfig, say: Say) -> None:
    """Raise a ConfigError where a prepared directory has conversations in another template; say what else is its own."""
    template, share = corpus.manifest["template"], corpus.manifest["held_out_fraction"]
    if corpus.kind != "text" and template != data.template:
        raise ConfigError(f"data.template = {data.template!r}: {source} was prepared with {template}; set that")
    if share != data.held_out:
        say(f"{source}: {share:g} of its documents are held out, as it was prepared; data.held_out is not asked")


def held_out_texts(data: DataConfig) -> Iterator[str]:
    """The texts that the first source of `data` holds out. Raises DataError, at once, where this machine does not have it."""
    source, recipe = first_source(data), Recipe(steps="none", text_field=data.text_field)
    if is_prepared(Path(source)):
        corpus = open_corpus(Path(source))
        starts = corpus.documents("held_out")
        ends = zip(starts[:-1].tolist(), (starts[1:] - 1).tolist(), strict=True)
        return (corpus.tokenizer.decode(corpus.held_out.read(start, end).tolist()) for start, end in ends)
    units = plan(_named(source), recipe).units
    records = (record for unit in units for record in read(unit, recipe))
    return (each.text for each in records if isinstance(each, Document) and each.place < data.held_out)


def _named(source: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, source.split(","))))


def _trained(
    data: DataConfig, orders: list[tuple[Order, Plan]], vocab_size: int, extra: tuple[str, ...], progress: Say
) -> "Tokenizer":
    """The tokenizer of all sources, from the cache or trained now."""
    from lumina.tokenizer_files import load_tokenizer

    key = [FORMAT, [planned.fingerprint for _, planned in orders], vocab_size, extra, data.held_out, data.text_field]
    path = _cache_path(data, TOKENIZER, key)
    if not path.exists():
        with _appearing_whole(path) as directory:
            train_tokenizer(orders, vocab_size, extra, 0, progress).save(directory)
    return load_tokenizer(str(path))


def _cached(order: Order, planned: Plan, tokenizer: "Tokenizer", data: DataConfig, progress: Say) -> Corpus:
    # held_out, text_field and template decide which documents there are, on which side, and their ids.
    key = [FORMAT, planned.fingerprint, tokenizer.fingerprint, data.held_out, data.text_field, data.template]
    path = _cache_path(data, "corpus", key)
    if not path.exists():
        with _appearing_whole(path) as directory:
            fill(order, planned, tokenizer, directory, workers=0, engine="local", say=progress)
    return open_corpus(path, tokenizer)


# ----------------------------------------------------------------------------------------------------------- cache


def _cache_path(data: DataConfig, what: str, key: list[object]) -> Path:
    root = Path(data.cache_dir or os.environ.get("LUMINA_CACHE") or "~/.cache/lumina").expanduser()
    return root / f"{what}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"


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
