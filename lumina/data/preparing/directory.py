"""`lumina data prepare`: a directory that is one order's, made in one go or in several."""

import argparse
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.conversation import TEMPLATES
from lumina.data.corpus import FORMAT, MANIFEST, ORDER, SIDES, TOKENIZER, WORK, KindsError, is_prepared, kind_of
from lumina.data.preparing.pipeline import REJECTS, SHARDS, Order, fill, save_whole, train_tokenizer
from lumina.data.reading.readers import Plan, plan, spool
from lumina.data.recipe import add_recipe, recipe_of
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.console import Console, table
from lumina.runs.directory import flat, replace_file
from lumina.runs.lock import RunLock
from lumina.runs.units import si
from lumina.tokenizer_files import load_tokenizer

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

HELD_OUT, VOCAB_SIZE = 0.02, 32_768


def add(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="file, directory, glob, -, hf:NAME, stdlib, ...")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="what to make; the same command goes on")
    parser.add_argument(
        "--tokenizer", default="bpe", help="bpe, trained on the sources; gpt2, cl100k_base, o200k_base, a file, or a directory"
    )
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help=f"ids of bpe (default: {VOCAB_SIZE:,})")
    parser.add_argument("--tokenizer-sample-mb", type=float, default=500.0, help="text that bpe is trained on (default: 500)")
    parser.add_argument("--template", default="lumina", help="of conversations: lumina, chatml, instruct or chat")
    parser.add_argument("--held-out", type=float, default=HELD_OUT, help=f"fraction kept for evaluation (default: {HELD_OUT})")
    parser.add_argument("--max-bad", type=float, default=0.5, help="stop above this share of rejected records (default: 0.5)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core; 0: this one)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where units are made (default: local)")
    parser.add_argument("--json", action="store_true", help="the manifest's counts as one JSON object on stdout")
    add_recipe(parser)


def tell(arguments: argparse.Namespace) -> None:
    """Run the command. Raises as `prepare_directory`, and UsageError for an option that cannot be."""
    recipe = recipe_of(arguments)
    for flag, value, good, works in (
        ("--held-out", arguments.held_out, 0 < arguments.held_out < 1, "must be between 0 and 1"),
        ("--tokenizer-sample-mb", arguments.tokenizer_sample_mb, arguments.tokenizer_sample_mb > 0, "must be above 0"),
        ("--max-bad", arguments.max_bad, 0 <= arguments.max_bad <= 1, "must be from 0 to 1"),
        ("--workers", arguments.workers, arguments.workers is None or arguments.workers >= 0, "must be at least 0"),
    ):
        if not good:
            raise UsageError(f"{flag} = {value}: {works}")
    console = Console(0)
    workers = os.cpu_count() or 1 if arguments.workers is None else arguments.workers
    order = Order(tuple(arguments.sources), recipe, arguments.held_out, arguments.template)
    manifest = prepare_directory(
        order,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocab_size=arguments.vocab_size,
        sample=arguments.tokenizer_sample_mb * 1e6,
        max_bad=arguments.max_bad,
        workers=workers,
        engine=arguments.engine,
        console=console,
    )
    console.done()
    if arguments.json:
        print(json.dumps({name: manifest[name] for name in ("kind", "records", "rejects", "steps", "sources")}))
        return
    print(summary(manifest, arguments.out))


def summary(manifest: dict[str, Any], path: Path) -> str:
    """What a prepared directory holds, and what became of every record."""
    records, steps = manifest["records"], manifest["steps"]
    rows = [
        ("directory", str(path)),
        ("sources", "\n".join(manifest["source"]["formats"])),
        ("records", f"{records['read']:,} read, {records['kept']:,} kept ({manifest['kind']})"),
    ]
    rows += [("rejected", f"{count:,} {kind}") for kind, count in manifest["rejects"]["counts"].items()]
    for step, about in steps.items():
        told = [f"{about['changed']:,} changed"] if about["changed"] else []
        told += [f"{count:,} removed: {reason}" for reason, count in about["removed"].items()]
        rows.append((step, "\n".join(told) or "nothing changed or removed"))
    for side in SIDES:
        of = manifest[side]
        size = f"{of['bytes'] / 1e6:,.1f} MB, {si(of['tokens'])} tokens"
        rows.append((side.replace("_", " "), f"{of['documents']:,} documents, {size}"))
    size, tokens = (sum(manifest[side][what] for side in SIDES) for what in ("bytes", "tokens"))
    rows.append(("tokenizer", f"{manifest['tokenizer']['name']}, {size / tokens:.2f} bytes a token"))
    return table(rows)


def prepare_directory(
    order: Order,
    out: Path,
    tokenizer: str,
    vocab_size: int,
    sample: float,
    max_bad: float,
    workers: int,
    engine: str,
    console: Console,
) -> dict[str, Any]:
    """Make `out` a prepared directory, or go on with it; returns its manifest.

    Args:
        tokenizer: bpe, or what `lumina.tokenizer_files.load_tokenizer` takes.
        vocab_size, sample: of a bpe that is trained: its ids, and the bytes of text it is trained on.
        max_bad: share of rejected records above which nothing is made.

    Raises:
        UsageError: `out` holds something else, or is in use.
        DataError: the sources cannot be used, or are mostly bad.
        ConfigError: there is no such template.
    """
    if order.template not in TEMPLATES:
        raise ConfigError(f"--template {order.template}: there is no such template; there are {', '.join(TEMPLATES)}")
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
        return fill(order, planned, made, out, workers, engine, console.status, identity, max_bad)


@contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """Errors in the words of the command."""
    try:
        yield
    except (ConfigError, DataError) as error:
        says = str(error).replace("data.held_out", "--held-out").replace("model.vocab_size", "--vocab-size")
        raise type(error)(says) from error
    except OSError as error:
        works = "free disk space, or mend it, and the same command goes on"
        raise UsageError(f"{error.filename or out}: cannot be written or read ({error.strerror or error}); {works}") from error


@contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """Make `out`, for no other process meanwhile; gives its work directory. What nothing came of goes again."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    work, lock = out / WORK, RunLock(out / ".lock")
    try:
        work.mkdir(exist_ok=True)
        yield work
    except KindsError:  # of these sources nothing can come
        for left in (work, out / SHARDS):
            shutil.rmtree(left, ignore_errors=True)
        raise
    finally:
        if not (work / ORDER).is_file():
            shutil.rmtree(work, ignore_errors=True)
        if is_new and [path.name for path in out.iterdir()] == [".lock"]:
            shutil.rmtree(out)
        lock.release()


def _identity(order: Order, planned: Plan, tokenizer: "Tokenizer | None", vocab_size: int, sample: float) -> dict[str, Any]:
    """All that decides the bytes, and those of units: which files are in which."""
    against = [spec.strip() for spec in order.recipe.against.split(",") if spec.strip()]
    units = [[*unit._replace(spec="", name="", paths=()), len(unit.paths)] for unit in planned.units]
    trained = {"trained": "bpe", "vocab_size": vocab_size, "sample": sample}
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
    order: Order, planned: Plan, loaded: "Tokenizer | None", vocab_size: int, sample: float, work: Path, console: Console
) -> "Tokenizer":
    extra = TEMPLATES[order.template].extra
    if (work / TOKENIZER).is_dir():
        return load_tokenizer(str(work / TOKENIZER), extra)
    made = loaded or train_tokenizer([(order, planned)], vocab_size, extra, sample, console.status)
    save_whole(made, work / TOKENIZER)
    return made
