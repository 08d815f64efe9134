"""Sources -> a prepared directory: plan, tokenizer, units, merge, manifest. The same command goes on where it was stopped."""

import json
import shutil
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.data.cleaning.duplicates import exact_key
from lumina.data.corpus import FORMAT, MANIFEST, TOKENIZER, WORK
from lumina.data.preparing import engines, merge
from lumina.data.preparing.tokenise import DOCUMENT_END, Account, Job, cleaned, directory_of, read_account
from lumina.data.reading.readers import Plan, plan, text_bytes
from lumina.data.reading.streams import called
from lumina.data.reading.trees import PASSED_OVER
from lumina.data.recipe import Recipe
from lumina.data.records import with_what_works
from lumina.data.shards import token_dtype
from lumina.errors import ConfigError, DataError
from lumina.runs.steps import sync_directory, sync_files
from lumina.runs.units import decimal_bytes, duration, si

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

REJECTS = "rejects.jsonl"
SHARDS = f"{WORK}-shards"  # beside it: the shards of a merge that is not over
SAY_SECONDS = 2.0
TELLING = 0.01  # of all bytes: with less of them done the rate is that of a beginning, and foretells nothing
REMEMBERED = 2**20  # texts of the tokenizer's sample that are known again, at about 90 bytes each

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What is asked for."""

    sources: tuple[str, ...]
    recipe: Recipe
    held_out: float  # fraction of the documents; 0 only until one is found
    template: str  # of conversations

    def __str__(self) -> str:
        return ", ".join(map(called, self.sources))


def fill(
    order: Order,
    planned: Plan,
    tokenizer: "Tokenizer",
    directory: Path,
    workers: int,
    engine: str,
    say: Say,
    identity: dict[str, Any] | None = None,
    max_bad: float = 1.0,
) -> dict[str, Any]:
    """Make `directory` a prepared one, the manifest last, which is returned; its part WORK has what was done before a stop.

    Args:
        identity: what decides the bytes, for the manifest.
        max_bad: share of rejected records above which it stops.

    Raises:
        DataError: no document is left, or none on a side of the split, or most are bad, or a source changed meanwhile.
        UsageError: a worker was killed.
    """
    work = directory / WORK
    if not (work / TOKENIZER).is_dir():
        save_whole(tokenizer, work / TOKENIZER)
    job = Job(order.recipe, str(work / TOKENIZER), order.template, str(work))
    for left in work.glob("*.part-*"):
        shutil.rmtree(left)
    _make_units(order, planned, job, workers, engine, say, max_bad, directory)
    shards = directory / SHARDS
    shutil.rmtree(shards, ignore_errors=True)
    shards.mkdir()
    units = [(called(unit.spec), directory_of(unit, job)) for unit in planned.units]
    meter = Meter("merged", 0, say)
    vocab_size = tokenizer.vocab_size
    merged = merge.merge(units, order.recipe, order.held_out, vocab_size, token_dtype(vocab_size), shards, meter.at)
    require_unchanged(order, planned)
    account = Account()
    for _, path in units:  # in order: which samples stay does not depend on which worker was first
        account.add(read_account(path))
    account.add(merged.account)
    account.kept -= sum(sum(reasons.values()) for reasons in merged.account.removed.values())
    manifest = _manifest(order, planned, tokenizer, account, merged) | ({"order": identity} if identity else {})
    tokenizer.save(shards / TOKENIZER)
    _write_rejects(account, shards)
    (shards / "samples.json").write_text(json.dumps(account.samples, indent=1) + "\n", encoding="utf-8")
    (shards / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    sync_files(shards)
    for path in sorted(shards.iterdir(), key=lambda path: path.name == MANIFEST):  # the manifest makes it whole
        _replace(path, directory / path.name)
    sync_directory(directory)
    shards.rmdir()
    shutil.rmtree(work)
    train, held_out = merged.sides.values()
    documents, size = train["documents"] + held_out["documents"], train["bytes"] + held_out["bytes"]
    say(f"{order}: {documents:,} documents, {decimal_bytes(size)}, of which {held_out['documents']:,} held out")
    return manifest


def require_unchanged(order: Order, planned: Plan) -> None:
    """Raise a DataError where the sources are no longer what was planned, so that what was made is neither old nor new."""
    if plan(order.sources, order.recipe).fingerprint != planned.fingerprint:
        raise DataError(f"{order}: changed while it was being read; run again when it rests")


def _make_units(
    order: Order, planned: Plan, job: Job, workers: int, engine: str, say: Say, max_bad: float, directory: Path
) -> None:
    account, meter = Account(), Meter("tokenised", planned.bytes, say)
    for result in engines.run(planned.units, job, workers if len(planned.units) > 1 else 0, engine):
        if result:
            unit, made = result
            account.add(made)
            meter.add(unit.bytes, made.tokens, made.kept)
        meter.tick()
    _require_mostly_good(order, account, max_bad, directory)
    if not account.kept:
        raise DataError(f"{order}: holds no document{_why_none(account)}")


def _require_mostly_good(order: Order, account: Account, max_bad: float, directory: Path) -> None:
    bad = bad_records(account.rejects)
    if bad > max_bad * account.read:
        _write_rejects(account, directory)
        raise DataError(
            f"{order}: {bad:,} of {account.read:,} records are bad, above --max-bad {max_bad:g}{_why_none(account)}; "
            f"see {directory / REJECTS}, mend them, or raise --max-bad"
        )


def bad_records(rejects: dict[str, int]) -> int:
    """Those of the rejected records with which something is wrong: replies off the best path of a tree are in order."""
    return sum(count for kind, count in rejects.items() if kind not in PASSED_OVER)


def _replace(path: Path, to: Path) -> None:
    if to.is_dir():
        shutil.rmtree(to)
    path.rename(to)


def _why_none(account: Account) -> str:
    return f": {told({'rejects': _rejects(account), 'steps': _steps(account, tuple(account.removed))})}" if account.read else ""


def told(manifest: dict[str, Any]) -> str:
    """In one line which records of a corpus were not kept, and why; empty where all were."""
    counts, examples = manifest["rejects"]["counts"], manifest["rejects"]["examples"]
    total, kinds = sum(counts.values()), ", ".join(f"{count:,} {with_what_works(kind)}" for kind, count in counts.items())
    says = [f"{total:,} record{'s' if total > 1 else ''} rejected: {kinds}; such as {'; '.join(examples[:3])}"] if total else []
    removed = {step: sum(about["removed"].values()) for step, about in manifest["steps"].items()}
    if any(removed.values()):
        says.append(f"removed: {', '.join(f'{count:,} by {step}' for step, count in removed.items() if count)}")
    return "; ".join(says)


def train_tokenizer(
    orders: Sequence[tuple[Order, Plan]],
    vocab_size: int,
    extra: tuple[str, ...],
    sample: float,
    say: Say,
    smaller: bool = False,
) -> "Tokenizer":
    """Byte-level BPE of the training documents of all sources, or of about `sample` bytes of them, spread evenly.

    `smaller`: fewer ids will do, as of `train_bpe`. Raises DataError where there are no documents, or all are on one side
    of the split, or a source changes meanwhile.
    """
    from lumina.tokenizer import train_bpe

    size = sum(text_bytes(planned) for _, planned in orders)
    share = training_share(size, sample)
    if size:
        say(f"training a tokenizer of {vocab_size:,} ids on {decimal_bytes(share * size)}")
    tokenizer = train_bpe(training_texts(orders, share, say), vocab_size, extra=extra, smaller=smaller)
    for order, planned in orders:
        require_unchanged(order, planned)
    return tokenizer


def training_share(size: int, sample: float) -> float:
    """The share of documents of `size` bytes that holds about `sample`, or, where that is 0, as much as can be trained on."""
    from lumina.tokenizer import MOST_TRAINING_BYTES

    return min(1.0, min(sample or MOST_TRAINING_BYTES, 0.95 * MOST_TRAINING_BYTES) / max(size, 1))


def training_texts(
    orders: Sequence[tuple[Order, Plan]], share: float, say: Say, held_out: Callable[[str, float], None] | None = None
) -> Iterator[str]:
    """The texts of a share of the training documents, chosen by nothing but their text.

    Where the step `exact` will leave but the first of equal documents, so does this, of those like the first REMEMBERED texts.
    `held_out` is given each text on the other side, with its place there from 0 to 1. Raises DataError, in the end, where there
    is no document, or where all are on one side of the split.
    """
    from lumina.tokenizer import MOST_TRAINING_BYTES

    account, places, size, most = Account(), array("d"), 0, 0.95 * MOST_TRAINING_BYTES
    meter = Meter("read for the tokenizer", sum(planned.bytes for _, planned in orders), say)
    for order, planned in orders:
        least = order.held_out
        once, known = "exact" in order.recipe.named_steps, set[bytes]()
        for unit in planned.units:
            for document in cleaned(unit, order.recipe, account):
                places.append(where := document.place)
                if where >= least and (where - least) / (1 - least) <= share:
                    if once and (key := exact_key(document)) in known:
                        continue
                    if once and len(known) < REMEMBERED:
                        known.add(key)
                    before, size = size, size + len(document.text.encode("utf-8"))
                    if size <= most:
                        yield document.text
                    elif before <= most:  # files expand more than their beginnings did
                        say(f"the tokenizer learns from the first {most / 1e9:.1f} GB alone: ask for a smaller sample")
                elif where < least and held_out:
                    held_out(document.text, where / least)
            meter.add(unit.bytes, 0, len(places) - meter.documents)
            meter.tick()
    if not places:
        raise DataError(f"{', '.join(str(order) for order, _ in orders)}: holds no document{_why_none(account)}")
    merge.require_both_sides(places, orders[0][0].held_out)


def require_fits(tokenizer: "Tokenizer", vocab_size: int, prepared: str = "") -> None:
    """Raise a ConfigError where the model has fewer ids than the tokenizer, which is that of a directory `prepared`, if any."""
    if tokenizer.vocab_size > vocab_size:
        least = f"must be at least tokenizer {tokenizer.name}'s {tokenizer.vocab_size}"
        works = f"use --config.model.vocab_size={tokenizer.vocab_size}"
        if prepared and tokenizer.name.startswith("bpe-"):
            works += f", or prepare {prepared} with --vocab-size {vocab_size}"
        raise ConfigError(f"model.vocab_size = {vocab_size}: {least}; {works}")


# ---------------------------------------------------------------------------------------------------------- written


def save_whole(tokenizer: "Tokenizer", path: Path) -> None:
    """Save it there, all at once."""
    making = path.with_name(f"{path.name}.part-0")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    tokenizer.save(making)
    sync_files(making)
    making.rename(path)


def _manifest(order: Order, planned: Plan, tokenizer: "Tokenizer", account: Account, merged: merge.Merged) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "kind": merged.kind,
        "kinds": merged.kinds,
        "source": {
            "spec": ",".join(map(called, order.sources)),
            "fingerprint": planned.fingerprint,
            "formats": planned.formats,
        },
        "recipe": order.recipe.done,
        "template": order.template,
        "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size},
        "held_out_fraction": order.held_out,
        "document_end_id": tokenizer.control[DOCUMENT_END],
        **merged.sides,
        "sources": merged.sources,
        "records": {"read": account.read, "kept": account.kept},
        "rejects": _rejects(account),
        "steps": _steps(account, order.recipe.named_steps),
    }


def _write_rejects(account: Account, directory: Path) -> None:
    with open(directory / REJECTS, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in account.rejected)


def _rejects(account: Account) -> dict[str, Any]:
    examples = [f"{each['name']}: {each['kind']}" for each in account.rejected]
    return {"counts": dict(sorted(account.rejects.items())), "examples": examples}


def _steps(account: Account, names: tuple[str, ...]) -> dict[str, Any]:
    removed = {step: dict(sorted(account.removed.get(step, {}).items())) for step in names}
    return {step: {"changed": account.changed.get(step, 0), "removed": removed[step]} for step in names}


class Meter:
    """How far it is: a line every two seconds, with the rate and, as soon as that can be told, the time that is left."""

    def __init__(self, what: str, size: int, say: Say):
        self.what, self.size, self.say = what, size, say
        self.done, self.tokens, self.documents = 0, 0, 0
        self.began = self.said = time.monotonic()

    def add(self, size: int, tokens: int, documents: int) -> None:
        self.done, self.tokens, self.documents = self.done + size, self.tokens + tokens, self.documents + documents

    def at(self, done: int, size: int) -> None:
        """So many of so many tokens."""
        self.tokens, self.done, self.size = done, 2 * done, 2 * size
        self.tick()

    def tick(self) -> None:
        """Say it, if it is time."""
        now = time.monotonic()
        if now - self.said < SAY_SECONDS:
            return
        self.said, seconds = now, now - self.began
        rate = self.done / seconds
        left = f", {duration((self.size - self.done) / rate)} left" if self.done > TELLING * self.size else ""
        tokens = f", {si(self.tokens / seconds)} tokens/s" if self.tokens else ""
        documents = f"{self.documents:,} documents, " if self.documents else ""
        size = f"{decimal_bytes(self.done)} of {decimal_bytes(self.size)}"
        self.say(f"{self.what} {documents}{size}, {decimal_bytes(rate)}/s{tokens}{left}")
