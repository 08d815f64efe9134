"""`lumina data prepare`: a directory that is one order's, made in one go or in several."""

import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.conversation import TEMPLATES
from lumina.data.corpus import FORMAT, MANIFEST, TOKENIZER, is_prepared
from lumina.data.pipeline import WORK, Order, fill, save_whole, train_tokenizer
from lumina.data.readers import Plan, plan, spool
from lumina.errors import ConfigError, UsageError
from lumina.runs.console import Console
from lumina.runs.directory import flat, replace_file
from lumina.runs.lock import RunLock

if TYPE_CHECKING:
    from lumina.tokenizer import Tokenizer

ORDER = "order.json"  # in the work directory: whose work it is


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
        tokenizer: bpe, or what `lumina.tokenizer.load_tokenizer` takes.
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
    work = out / WORK
    out.mkdir(parents=True, exist_ok=True)
    lock = RunLock(out / ".lock")
    try:
        work.mkdir(exist_ok=True)
        order = replace(order, sources=tuple(str(spool(sys.stdin.buffer, work)) if s == "-" else s for s in order.sources))
        planned = plan(order.sources, order.recipe, console.status)
        for line in planned.formats:
            console.say(line)
        identity = _identity(order, planned, tokenizer, vocab_size, sample)
        if is_prepared(out):
            manifest = json.loads((out / MANIFEST).read_bytes())
            _require_same(out, manifest["order"], identity)
            console.say(f"{out}: is prepared already, nothing was to do")
            return manifest
        if (work / ORDER).is_file():
            _require_same(out, json.loads((work / ORDER).read_bytes()), identity)
            console.say(f"{out}: going on with what is done")
        elif [path.name for path in out.iterdir() if path.name not in (WORK, ".lock")]:
            raise UsageError(f"{out}: is not empty, and no prepared directory; choose another --out")
        replace_file(work / ORDER, lambda path: path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))
        made = _tokenizer(order, planned, tokenizer, vocab_size, sample, work, console)
        return fill(order, planned, made, out, workers, engine, console.status, identity, max_bad)
    except OSError as error:
        works = "free disk space, or mend it, and the same command goes on"
        raise UsageError(f"{error.filename or out}: cannot be written or read ({error.strerror or error}); {works}") from error
    finally:
        lock.release()
        if not (work / ORDER).is_file():
            shutil.rmtree(work, ignore_errors=True)


def _identity(order: Order, planned: Plan, tokenizer: str, vocab_size: int, sample: float) -> dict[str, Any]:
    """All that decides the bytes."""
    against = [spec.strip() for spec in order.recipe.against.split(",") if spec.strip()]
    trained = {"vocab_size": vocab_size, "sample": sample} if tokenizer == "bpe" else {}
    return {
        "format": FORMAT,
        "fingerprint": planned.fingerprint,
        "recipe": asdict(order.recipe),
        "against": plan(against, order.recipe).fingerprint if against else "",
        "held_out": order.held_out,
        "template": order.template,
        "tokenizer": {"spec": tokenizer, **trained},
    }


def _require_same(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    then, new = flat(before), flat(now)
    changed = [
        f"{name}: {then.get(name)!r} -> {new.get(name)!r}" for name in {**then, **new} if then.get(name) != new.get(name)
    ]
    if changed:
        raise UsageError(f"{out}: holds another order's work ({'; '.join(changed)}); choose another --out, or delete it")


def _tokenizer(
    order: Order, planned: Plan, spec: str, vocab_size: int, sample: float, work: Path, console: Console
) -> "Tokenizer":
    from lumina.tokenizer import load_tokenizer

    extra = TEMPLATES[order.template].extra
    if (work / TOKENIZER).is_dir():
        return load_tokenizer(str(work / TOKENIZER), extra)
    if spec == "bpe":
        made = train_tokenizer([(order, planned)], vocab_size, extra, sample, console.status)
    else:
        made = load_tokenizer(spec, extra)
    save_whole(made, work / TOKENIZER)
    return made
