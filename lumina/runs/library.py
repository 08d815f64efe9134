"""The library of runs: what a run directory holds, and whether every byte of it is whole."""

import difflib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lumina.config import Config, from_dict, validate
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.runs.directory import RunDirectory
from lumina.runs.ledger import LedgerState, read_ledger, spans
from lumina.runs.lock import holder, is_locked
from lumina.runs.steps import Steps

LIBRARY = Path("runs")  # where a run is looked for by its name
TAIL, LONGEST_TAIL = 1 << 16, 1 << 22  # bytes that `summary` reads of a file's end, at first and at most


# ---------------------------------------------------------------------------------------------------------- finding


def find(name: str) -> RunDirectory:
    """The run that `name` is the path of, or else its name in LIBRARY. Raises UsageError, with the nearest name."""
    is_name = name not in (".", "..") and not set(name) & set("/\\\0")
    try:
        if not name:  # as from an unset variable of a script; Path takes it for the working directory
            raise UsageError("the run's name is empty; give the path of a run directory or its name")
        for path in [Path(name), *([LIBRARY / name] if is_name else [])]:
            if (path / "config.json").is_file():
                return RunDirectory(path)
        if Path(name).exists():
            raise UsageError(f"{name}: not a run directory, it has no config.json")
        names = [run.path.name if is_name else str(run.path) for run in _children(LIBRARY if is_name else Path(name).parent)]
    except (OSError, ValueError) as error:  # such as a name longer than a file system takes
        raise UsageError(f"{name!r}: cannot be a run ({error}); give its path or name") from error
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"{name}: no such run{hint}; give the path of a run directory or a name that `lumina runs` lists")


def runs_in(directory: Path) -> list[RunDirectory]:
    """The runs directly in a directory, by name. Raises UsageError if there is none such, or it is a run itself."""
    if not directory.is_dir():
        raise UsageError(f"{directory}: no such directory; give the one that your runs are in")
    if (directory / "config.json").is_file():
        raise UsageError(f"{directory}: is itself a run; see `lumina runs show {directory}`, or list the directory above it")
    return _children(directory)


def _children(directory: Path) -> list[RunDirectory]:
    paths = sorted(directory.iterdir()) if directory.is_dir() else []
    return [RunDirectory(path) for path in paths if (path / "config.json").is_file()]


# ---------------------------------------------------------------------------------------------------------- reading


class Lines(NamedTuple):
    """What could be read of a file of JSON lines."""

    records: list[dict[str, Any]]
    damaged: list[int]  # numbers, from 1, of the lines that are no JSON object
    half: bool  # the file ends within a line, which is no record


def parse_lines(data: bytes) -> Lines:
    """The records in `data`, whatever else it holds."""
    *lines, rest = data.split(b"\n")
    records, damaged = [], []
    for line_number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            damaged.append(line_number)
    return Lines(records, damaged, bool(rest))


def read_lines(path: Path) -> Lines:
    """All records of a file; none of a file that is not there."""
    return parse_lines(path.read_bytes() if path.is_file() else b"")


def last_lines(path: Path, enough: Callable[[list[dict[str, Any]]], bool]) -> Lines:
    """The records at the end of a file: more and more of it until they are `enough`, but at most LONGEST_TAIL bytes."""
    wanted = TAIL
    while path.is_file():
        start = max(0, path.stat().st_size - wanted)
        with path.open("rb") as file:
            file.seek(max(0, start - 1))
            data = file.read()
        lines = parse_lines(data.partition(b"\n")[2] if start else data)  # from the first line that begins within the tail
        if not start or wanted >= LONGEST_TAIL or enough(lines.records):
            return lines
        wanted *= 4
    return Lines([], [], False)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, None when there is none that can be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def read_config(run: RunDirectory) -> Config:
    """The run's valid config; raises ConfigError."""
    try:
        return validate(from_dict(json.loads(run.config.read_bytes())))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{run.config}: cannot be read as a config ({error})") from error


def number(value: Any) -> float | None:
    """`value` when it is a number, None for whatever else a damaged file may hold."""
    return value if isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63) else None


def integer(value: Any) -> int | None:
    return value if type(value) is int else None


def kind(record: dict[str, Any]) -> str:
    return str(record.get("kind"))


def disk_use(path: Path) -> tuple[int, float]:
    """Bytes of all files below `path`, and when the youngest was written (seconds since 1970); links are not followed."""
    total, changed = 0, 0.0
    for directory, _, names in os.walk(path):
        for name in names:
            try:
                status = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:  # in a checkpoint that a trainer deletes meanwhile
                continue
            total, changed = total + status.st_size, max(changed, status.st_mtime)
    return total, changed


def faults(steps: Steps, step: int, contents: bool = True) -> list[str] | None:
    """What is wrong with a step; None where it is gone by now, as retention or `prune` deletes steps while others read."""
    try:
        wrong = steps.verify(step, contents)
    except OSError as error:
        wrong = [f"cannot be read ({error.strerror})"]
    return wrong if not wrong or steps.directory(step).is_dir() else None


def newest_manifest(steps: Steps) -> dict[str, Any] | None:
    """The newest manifest that can be trusted, None without any."""
    for step in reversed(steps.all()):
        try:
            return steps.manifest(step)
        except CheckpointError:
            continue
    return None


def best_step(run: RunDirectory) -> int | None:
    """The step with the lowest held-out loss, as the newest checkpoint knows it, or else the result."""
    progress = (newest_manifest(Steps(run.checkpoints)) or {}).get("progress")
    known = progress if isinstance(progress, dict) else read_json(run.result) or {}
    return integer(known.get("best_step"))


def leftovers(steps: Steps) -> list[str]:
    """Directories half written or half deleted: a trainer's own while it runs, else what a crash left."""
    names = [each.name for each in steps.path.iterdir()] if steps.path.is_dir() else []
    return sorted(name for name in names if name.startswith((".writing-", ".deleting-")))


# ----------------------------------------------------------------------------------------------------------- summary


@dataclass
class Summary:
    """A run in one line."""

    name: str
    path: str
    state: str  # training, finished, stopped or broken
    why: str = ""  # of the state, in words
    step: int = 0  # the last one recorded; a run goes on from its newest checkpoint
    steps: int | None = None  # as many as the config asks for
    loss: float | None = None  # last train loss, nats a token
    bits_per_byte: float | None = None  # last held-out one
    best_step: int | None = None
    checkpoints: list[int] = field(default_factory=list)
    bytes: int = 0
    changed: float = 0.0  # seconds since 1970
    damaged: int = 0  # lines that cannot be read, of those that were looked at


def summary(run: RunDirectory) -> Summary:
    """What `lumina runs list` tells of a run; reads no more than the ends of its metrics and ledger."""
    config, steps = read_json(run.config), Steps(run.checkpoints).all()
    train = (config or {}).get("train")
    train = train if isinstance(train, dict) else {}
    metrics = last_lines(run.metrics, lambda records: {"train", "eval"} <= {kind(record) for record in records})
    ledger = last_lines(run.ledger, bool)
    recorded = [integer(record.get("step")) or 0 for record in metrics.records + ledger.records]
    step = max([0, *steps[-1:], *recorded])
    state, why = _state(run, train, step) if config is not None else ("broken", "config.json cannot be read")
    last = {kind(record): record for record in metrics.records}
    size, changed = disk_use(run.path)
    return Summary(
        name=run.path.name or str(run.path),
        path=str(run.path),
        state=state,
        why=why,
        step=step,
        steps=integer(train.get("steps")),
        loss=number(last.get("train", {}).get("loss")),
        bits_per_byte=number(last.get("eval", {}).get("bits_per_byte")),
        best_step=best_step(run),
        checkpoints=steps,
        bytes=size,
        changed=changed,
        damaged=sum(len(lines.damaged) + (lines.half and state != "training") for lines in (metrics, ledger)),
    )


def _state(run: RunDirectory, train: dict[str, Any], step: int) -> tuple[str, str]:
    if is_locked(run.lock):
        return "training", holder(run.lock)
    steps = Steps(run.checkpoints)
    if (steps.all() or steps.broken()) and all(faults(steps, each, contents=False) for each in reversed(steps.all())):
        return "broken", "no checkpoint is whole"
    result = read_json(run.result) or {}
    ended = integer(result.get("step")) or 0
    if ended and ended >= step:  # else the result is of before the run went on
        if ended >= (integer(train.get("steps")) or 0):
            return "finished", ""
        if result.get("stopped_early") and train.get("early_stopping"):
            return "finished", "stopped early"
    return "stopped", ""


# ------------------------------------------------------------------------------------------------------------ verify


class Finding(NamedTuple):
    """One thing that `verify` looked at."""

    what: str  # its path in the run directory
    well: bool
    says: str


def verify(run: RunDirectory, begins: Callable[[int, int], None] = lambda step, size: None) -> Iterator[Finding]:
    """Read every byte of every checkpoint, and the ledger and metrics; changes nothing. `begins` is told step and bytes."""
    try:
        read_config(run)
        yield Finding("config.json", True, "valid")
    except ConfigError as error:
        yield Finding("config.json", False, str(error))
    steps = Steps(run.checkpoints)
    for step in steps.all():
        size = disk_use(steps.directory(step))[0]
        begins(step, size)
        wrong = faults(steps, step)
        says = "deleted meanwhile" if wrong is None else "; ".join(wrong) or f"whole, {size:,} bytes"
        yield Finding(f"checkpoints/{step}", not wrong, says)
    if not steps.all():
        yield Finding("checkpoints", True, "none")
    for path in steps.broken():
        yield Finding(f"checkpoints/{path.name}", True, "set aside as broken, not looked at")
    training = is_locked(run.lock)
    for name in [] if training else leftovers(steps):
        yield Finding(
            f"checkpoints/{name}", True, "left by a crash; the next start removes it, and so does `lumina runs prune`"
        )
    manifest = newest_manifest(steps)  # read before the ledger, which only grows after it
    data = run.ledger.read_bytes() if run.ledger.is_file() else b""
    lines = parse_lines(data)
    state = read_ledger(lines.records)[0]
    wrong = _wrong_lines(lines, training) + state.wrong()
    if manifest is not None and state.last < manifest["step"]:
        wrong.append(f"ends before checkpoint {manifest['step']}")
    yield _finding("ledger.jsonl", wrong, f"{state.last:,} steps, whole and in order")
    if manifest is not None:
        yield Finding("ledger.jsonl", *_prefix(data, manifest))
    metrics = read_lines(run.metrics)
    wrong = _wrong_lines(metrics, training) + _wrong_metrics(metrics.records)
    yield _finding("metrics.jsonl", wrong, f"{len(metrics.records):,} records, whole and in order")


def _finding(what: str, wrong: list[str], well: str) -> Finding:
    return Finding(what, not wrong, "; ".join(wrong) or well)


def _prefix(data: bytes, manifest: dict[str, Any]) -> tuple[bool, str]:
    where, position = f"at step {manifest['step']}", manifest.get("ledger")
    length, expected = (position.get("bytes"), position.get("sha256")) if isinstance(position, dict) else (None, None)
    if type(length) is not int or length < 0:
        return False, f"its length and hash {where} are not in the manifest"
    if len(data) < length:
        return False, f"{len(data):,} bytes, fewer than the {length:,} recorded {where}"
    same = hashlib.sha256(data[:length]).hexdigest() == expected
    return same, f"its first {length:,} bytes are {'' if same else 'not '}those recorded {where}"


def _wrong_lines(lines: Lines, training: bool) -> list[str]:
    wrong = [f"{spans(lines.damaged, 'line')}: not JSON"] if lines.damaged else []
    return wrong + (["ends within a line"] if lines.half and not training else [])


def _wrong_metrics(records: list[dict[str, Any]]) -> list[str]:
    found = [(kind(record), step) for record in records if (step := integer(record.get("step"))) is not None]
    doubled = sorted({step for (_, step), count in Counter(found).items() if count > 1})
    disordered = sorted({now for (_, before), (_, now) in pairwise(found) if now < before})
    unusable = len(records) - len(found)
    return LedgerState(0, [], doubled, disordered, unusable).wrong()
