"""`lumina data prepare`: a directory that is one order's, made in one go or in several."""

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.conversation import TEMPLATES
from lumina.data.corpus import FORMAT, MANIFEST, ORDER, SIDES, TOKENIZER, WORK, KindsError, is_prepared, kind_of, kinds_told
from lumina.data.options import HELD_OUT, SAMPLE_MB, VOCAB_SIZE
from lumina.data.preparing.merge import between
from lumina.data.preparing.pipeline import REJECTS, SHARDS, Order, fill, save_whole, train_tokenizer
from lumina.data.preparing.tokenise import Account, cleaned
from lumina.data.reading.readers import Plan, plan, spool
from lumina.data.recipe import recipe_of
from lumina.data.records import with_what_works
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.console import Console, table
from lumina.runs.directory import flat, replace_file
from lumina.runs.lock import RunLock
from lumina.runs.units import decimal_bytes, si
from lumina.tokenizer import require_bytes
from lumina.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer


def tell(arguments: argparse.Namespace) -> None:
    """Run the command. Raises as `prepare_directory`, and UsageError for an option that cannot be."""
    recipe, held_out, sample = recipe_of(arguments), arguments.held_out, arguments.tokenizer_sample_mb
    for flag, value, good, works in (
        ("--held-out", held_out, held_out is None or 0 < held_out < 1, "must be between 0 and 1"),
        ("--tokenizer-sample-mb", sample, sample is None or sample > 0, "must be above 0"),
        ("--max-bad", arguments.max_bad, 0 <= arguments.max_bad <= 1, "must be from 0 to 1"),
        ("--workers", arguments.workers, arguments.workers is None or arguments.workers >= 0, "must be at least 0"),
    ):
        if not good:
            raise UsageError(f"{flag} = {value}: {works}")
    for flag, value in (("--vocab-size", arguments.vocab_size), ("--tokenizer-sample-mb", sample)):
        if value is not None and arguments.tokenizer != "bpe":
            works = f"--tokenizer {arguments.tokenizer} has its own ids; leave out one of the two"
            raise UsageError(f"{flag} {value:g}: is of a bpe that is trained, and {works}")
    console = Console(0)
    workers = os.cpu_count() or 1 if arguments.workers is None else arguments.workers
    order = Order(tuple(arguments.sources), recipe, held_out or 0.0, arguments.template)
    manifest = prepare_directory(
        order,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        sample=1e6 * (sample or SAMPLE_MB),
        max_bad=arguments.max_bad,
        workers=workers,
        engine=arguments.engine,
        console=console,
    )
    console.done()
    if arguments.json:
        print(json.dumps({name: manifest[name] for name in ("kind", "kinds", "records", "rejects", "steps", "sources")}))
        return
    print(summary(manifest, arguments.out))


def summary(manifest: dict[str, Any], path: Path) -> str:
    """What a prepared directory holds, and what became of every record."""
    records, steps = manifest["records"], manifest["steps"]
    rows = [
        ("directory", str(path)),
        ("sources", "\n".join(manifest["source"]["formats"])),
        ("records", f"{records['read']:,} read, {records['kept']:,} kept: {kinds_told(manifest)}"),
    ]
    rows += [("rejected", f"{count:,} {with_what_works(kind)}") for kind, count in manifest["rejects"]["counts"].items()]
    for step, about in steps.items():
        told = [f"{about['changed']:,} changed"] if about["changed"] else []
        told += [f"{count:,} removed: {reason}" for reason, count in about["removed"].items()]
        rows.append((step, "\n".join(told) or "nothing changed or removed"))
    for side in SIDES:
        of = manifest[side]
        size = f"{decimal_bytes(of['bytes'])}, {si(of['tokens'])} tokens"
        rows.append((side.replace("_", " "), f"{of['documents']:,} documents, {size}"))
    size, tokens = (sum(manifest[side][what] for side in SIDES) for what in ("bytes", "tokens"))
    rows.append(("tokenizer", f"{manifest['tokenizer']['name']}, {size / tokens:.2f} bytes a token"))
    return table(rows)


def prepare_directory(
    order: Order,
    out: Path,
    tokenizer: str,
    vocab_size: int | None,
    sample: float,
    max_bad: float,
    workers: int,
    engine: str,
    console: Console,
) -> dict[str, Any]:
    """Make `out` a prepared directory, or go on with it; returns its manifest.

    Args:
        order: a `held_out` of 0 is HELD_OUT, or where that leaves few documents on one side, what does not.
        tokenizer: bpe, or what `lumina.tokenizer_files.load_tokenizer` takes.
        vocab_size, sample: of a bpe that is trained: its ids (None: VOCAB_SIZE, or as many as a smaller text is enough for),
            and the bytes of text it is trained on.
        max_bad: share of rejected records above which nothing is made.

    Raises:
        UsageError: `out` holds something else, or is in use.
        DataError: the sources cannot be used, or are mostly bad.
        ConfigError: there is no such template.
    """
    if order.template not in TEMPLATES:
        raise ConfigError(f"--template {order.template}: there is no such template; there are {', '.join(TEMPLATES)}")
    with _one_line(out):
        require_bytes(VOCAB_SIZE if vocab_size is None else vocab_size, TEMPLATES[order.template].extra)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; choose a directory")
    for source in order.sources:
        if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
            raise UsageError(f"--out {out}: is in {source}, which would change while it is read; choose one elsewhere")
    with _one_line(out), _locked(out) as work:
        order = replace(order, sources=tuple(str(spool(sys.stdin.buffer, work)) if s == "-" else s for s in order.sources))
        planned = plan(order.sources, order.recipe, console.status)
        for line in planned.formats:
            console.say(line)
        kind_of(planned.kinds)
        if not order.held_out:
            order = replace(order, held_out=_held_out(order, planned, console))
        loaded = None if tokenizer == "bpe" else load_tokenizer(tokenizer, TEMPLATES[order.template].extra)
        identity = _identity(order, planned, loaded, vocab_size, sample)
        if is_prepared(out):
            manifest = dict(json.loads((out / MANIFEST).read_bytes()))
            if changed := _changes(manifest["order"], identity):
                raise _of_another_order(out, changed)
            for left in (work, out / SHARDS):
                shutil.rmtree(left, ignore_errors=True)
            console.say(f"{out}: is prepared already, nothing was to do")
            return manifest
        if (work / ORDER).is_file():
            changed = _changes(json.loads((work / ORDER).read_bytes()), identity)
            # The split is made in the end, but a tokenizer is trained on one side of it.
            if changed and not (loaded and all(each.startswith("held_out:") for each in changed)):
                raise _of_another_order(out, changed)
            console.say(f"{out}: going on with what is done")
        elif [path.name for path in out.iterdir() if path.name not in (WORK, ".lock", REJECTS)]:
            raise UsageError(f"{out}: is not empty, and no prepared directory; choose another --out")
        else:
            for left in (*work.glob("unit-*"), work / TOKENIZER):  # of nobody knows what
                shutil.rmtree(left, ignore_errors=True)
        made = _tokenizer(order, planned, loaded, vocab_size, sample, work, console)
        replace_file(work / ORDER, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))
        try:
            return fill(order, planned, made, out, workers, engine, console.status, identity, max_bad)
        except KindsError:  # of these sources nothing can come
            for left in (work, out / SHARDS):
                shutil.rmtree(left, ignore_errors=True)
            raise


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """Errors in the words of the command."""
    try:
        yield
    except (ConfigError, DataError) as error:
        says = str(error).replace("data.held_out", "--held-out").replace("model.vocab_size", "--vocab-size")
        raise type(error)(says) from error
    except UsageError as error:  # a lock is told of in the words of a trainer
        raise UsageError(str(error).replace("--workdir", "--out").replace("another run directory", "another --out")) from error
    except OSError as error:
        path = Path(os.fsdecode(error.filename or out))
        why, goes_on = error.strerror or str(error), "and the same command goes on"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(f"{path}: cannot be written ({why}); free disk space, {goes_on}") from error
        if out.is_relative_to(path) or path.is_relative_to(out):
            raise UsageError(
                f"--out {out}: cannot be written ({why}: {path}); choose another, or mend it, {goes_on}"
            ) from error
        raise UsageError(f"{path}: cannot be read ({why}); mend it, {goes_on}, or leave it out of the sources") from error


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """Make `out`, for no other process meanwhile; gives its work directory. What nothing came of goes again."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    work, lock = out / WORK, RunLock(out / ".lock")
    try:
        work.mkdir(exist_ok=True)
        yield work
    except KeyboardInterrupt:
        if (work / ORDER).is_file():
            raise KeyboardInterrupt(f"{out}: the same command goes on with what is done") from None
        raise
    finally:
        if not (work / ORDER).is_file():
            shutil.rmtree(work, ignore_errors=True)
        if is_new and [path.name for path in out.iterdir()] == [".lock"]:
            shutil.rmtree(out)
        lock.release()


def _identity(
    order: Order, planned: Plan, tokenizer: "Tokenizer | None", vocab_size: int | None, sample: float
) -> dict[str, Any]:
    """All that decides the bytes, and those of units: which files are in which."""
    against = [spec.strip() for spec in order.recipe.against.split(",") if spec.strip()]
    units = [[*unit._replace(spec="", name="", paths=()), len(unit.paths)] for unit in planned.units]
    trained = {"trained": "bpe", "vocab_size": vocab_size or f"{VOCAB_SIZE} or fewer", "sample": sample}
    return {
        "format": FORMAT,
        "fingerprint": planned.fingerprint,
        "units": hashlib.sha256(json.dumps(units).encode()).hexdigest(),
        "recipe": order.recipe.done,
        "against": plan(against, order.recipe).fingerprint if against else "",
        "held_out": order.held_out,
        "template": order.template,
        "tokenizer": {"fingerprint": tokenizer.fingerprint} if tokenizer else trained,
    }


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    then, new = flat(before), flat(now)
    differing = [name for name in {**then, **new} if then.get(name) != new.get(name)]
    return [f"{name}: {then.get(name)!r} -> {new.get(name)!r}" for name in differing]


def _of_another_order(out: Path, changed: list[str]) -> UsageError:
    return UsageError(f"{out}: holds another order's work ({'; '.join(changed)}); choose another --out, or delete it")


def _tokenizer(
    order: Order, planned: Plan, loaded: "Tokenizer | None", vocab_size: int | None, sample: float, work: Path, console: Console
) -> "Tokenizer":
    extra = TEMPLATES[order.template].extra
    if (work / TOKENIZER).is_dir():
        return load_tokenizer(str(work / TOKENIZER), extra)
    if loaded:
        made = loaded
    elif vocab_size is not None:
        made = train_tokenizer([(order, planned)], vocab_size, extra, sample, console.status)
    else:
        made = train_tokenizer([(order, planned)], VOCAB_SIZE, extra, sample, console.status, smaller=True)
        if made.vocab_size < VOCAB_SIZE:
            console.say(
                f"the tokenizer has {made.vocab_size:,} ids, not {VOCAB_SIZE:,}: so many the text has pairs to merge for"
            )
    save_whole(made, work / TOKENIZER)
    return made


def _held_out(order: Order, planned: Plan, console: Console) -> float:
    """HELD_OUT, or where that leaves all documents on one side, a fraction that does not.

    Documents are read until there is one on either side: some 50 of them, or all where there are few.
    """
    places = array("d")
    for unit in planned.units:
        for document in cleaned(unit, order.recipe, Account()):
            places.append(document.place)
            if min(places[0], places[-1]) < HELD_OUT <= max(places[0], places[-1]):
                return HELD_OUT
    if not places or min(places) == max(places):
        return HELD_OUT
    found = between(min(places), max(places))
    console.say(f"{found:g} of the documents are held out: of {len(places):,}, {HELD_OUT} would leave all on one side")
    return found
