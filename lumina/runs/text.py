"""What a run reads: the corpora that its config names, and the rows of each, by stage for training and by source held out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lumina.config import Config, DataConfig
from lumina.conversation import loss_weights, named
from lumina.data.corpus import Corpus
from lumina.data.mixture import Course, Leg, Table, Turns
from lumina.data.packing import FORMAT, kept, plan
from lumina.data.rows import Batches, PackedRows, Rows, RowSet
from lumina.data.sources import prepare_all
from lumina.errors import ConfigError, DataError
from lumina.runs.directory import RunDirectory
from lumina.stages import Stage, sources, stages
from lumina.tokenizer import Tokenizer

Part = tuple[tuple[int, ...], int]  # which of n equal parts of each batch a process reads, and n
ALONE: Part = ((0,), 1)


class Text(NamedTuple):
    """What a trainer reads: corpora by source, and this process's rows of them."""

    corpora: dict[str, Corpus]
    stages: list[Stage]
    train: Course
    held_out: dict[str, Batches]

    @property
    def tokenizer(self) -> Tokenizer:
        """The one of all corpora."""
        return next(iter(self.corpora.values())).tokenizer


def open_corpora(config: Config, progress: Callable[[str], None]) -> dict[str, Corpus]:
    """The corpora of all stages by source, from the cache or prepared now.

    Raises:
        ConfigError: there is no such template or weight of a role; and as `lumina.data.sources.prepare_all`.
    """
    try:
        named(config.data.template), loss_weights(config.data.loss_weights)
    except ConfigError as error:
        raise ConfigError(f"data.{error}") from error
    names = sources(config)
    return dict(zip(names, prepare_all(names, config.data, config.model.vocab_size, progress), strict=True))


def manifest(corpora: dict[str, Corpus], data: DataConfig) -> dict[str, Any]:
    """What a run writes down of its data: the manifest of its first source, those of the others, how any are packed, and one
    fingerprint."""
    first, *others = corpora.values()
    packed = {"packing": FORMAT} if any(_is_packed(corpus, data) for corpus in corpora.values()) else {}
    if not others and not packed:
        return first.manifest | {"fingerprint": first.fingerprint}
    fingerprints = json.dumps([*([name, corpus.fingerprint] for name, corpus in corpora.items()), *packed.items()])
    told = {name: corpus.manifest | {"fingerprint": corpus.fingerprint} for name, corpus in list(corpora.items())[1:]}
    more = packed | ({"others": told} if told else {})
    return first.manifest | {"fingerprint": hashlib.sha256(fingerprints.encode()).hexdigest(), **more}


def _is_packed(corpus: Corpus, data: DataConfig) -> bool:
    return corpus.kind != "text" or data.rows != "stream"


def corpora_of(run: RunDirectory, config: Config, progress: Callable[[str], None]) -> dict[str, Corpus]:
    """The corpora that `run` was trained on, with its tokenizer.

    Raises:
        DataError: they are not as they were then; and as `open_corpora`.
    """
    if run.tokenizer.is_dir():
        config = with_tokenizer(config, str(run.tokenizer))
    corpora = open_corpora(config, progress)
    if changed := run.data_changes(manifest(corpora, config.data)):
        raise DataError(
            f"{run.path} was trained on other data than data.source = {config.data.source!r} has now ({'; '.join(changed)}): "
            "what was held out is not known any more; restore the data, or use the Python that the run began with"
        )
    return corpora


def read(config: Config, corpora: dict[str, Corpus], part: Part, say: Callable[[str], None] = lambda line: None) -> Text:
    """The rows to train on, in the run's order, and those held out, as many at once as a micro-batch has.

    `say` is told how documents were packed. Raises DataError for a corpus that cannot be trained on.
    """
    train, planned = config.train, stages(config)
    tables: dict[tuple[str, int], int] = {}  # source and length -> place in the list of them
    made: list[Table] = []
    legs = []
    for stage in planned:
        for source, _ in stage.mixture:
            if (source, stage.sequence_length) not in tables:
                tables[source, stage.sequence_length] = len(made)
                rows = rows_of(corpora[source], "train", config.data, stage.sequence_length, source, say)
                made.append(Table(list(corpora).index(source), rows))
        used = tuple(tables[source, stage.sequence_length] for source, _ in stage.mixture)
        legs.append(Leg(stage.steps, used, Turns([weight for _, weight in stage.mixture])))
    course = Course(made, legs, train.batch_size, train.seed, part)
    return Text(corpora, planned, course, held_out(config, corpora, part))


def held_out(config: Config, corpora: dict[str, Corpus], part: Part = ALONE) -> dict[str, Batches]:
    """The held-out rows of each source, in order."""
    rows_at_once, T = config.train.batch_size // config.train.micro_batches, config.data.sequence_length
    return {
        source: Batches(rows_of(corpus, "held_out", config.data, T, source), rows_at_once, seed=0, shuffle=False, part=part)
        for source, corpus in corpora.items()
    }


def rows_of(
    corpus: Corpus,
    side: str,
    data: DataConfig,
    sequence_length: int,
    source: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> RowSet:
    """One side of a corpus, `train` or `held_out`, as rows: packed ones of conversations, and of texts if `data.rows` says so.

    Held-out targets count 1 or nothing: figures are then of tokens, whatever training weighs them.

    Raises:
        DataError: the corpus is of preferences, or has nothing to make a row of.
    """
    source = source or data.source
    if corpus.kind == "preference":
        raise DataError(f"{source}: holds preferences, chosen and rejected; training needs texts or conversations")
    stream = getattr(corpus, side)
    if not _is_packed(corpus, data):
        try:
            return Rows(stream, sequence_length, corpus.document_end_id)
        except DataError as error:
            raise error if source == data.source else DataError(f"{source}: {error}") from error
    documents, roles = corpus.documents(side), corpus.roles(side) if corpus.kind == "conversation" else None
    turns, weights = None, None
    if roles is not None:
        turns, weights = corpus.turns(side), loss_weights(data.loss_weights)
        if side == "held_out":
            weights = (weights > 0).astype(np.float32)
    if not np.any(np.diff(documents) > 1):
        raise DataError(f"{source}: no {side} document has two tokens; use more data, or a larger data.held_out")
    digest = corpus.manifest[side]["tokens_sha256"][:12]
    counting = "text" if weights is None else "".join(str(int(weight > 0)) for weight in weights)
    packed = kept(
        corpus.path / f"packed-{FORMAT}-{side}-{sequence_length}-{counting}-{digest}",
        lambda: plan(documents, sequence_length, turns, None if roles is None else roles.read, weights),
    )
    if not len(packed.rows) > 1:
        raise DataError(f"{source}: data.loss_weights = {data.loss_weights!r} counts no token of its {side} conversations")
    say(f"{source}: {packed.report}")
    return PackedRows(stream, packed, roles, weights)


def with_tokenizer(config: Config, path: str) -> Config:
    """`config` with the tokenizer that lies in `path`."""
    return replace(config, data=replace(config.data, tokenizer=path))
