"""`lumina runs`: the commands that list, show, verify, compare and prune runs, and what they print."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lumina.architecture import counts
from lumina.errors import CheckpointError, ConfigError, LuminaError, UsageError
from lumina.runs import library
from lumina.runs.compare_runs import compare
from lumina.runs.console import table
from lumina.runs.directory import RunDirectory
from lumina.runs.lock import RunLock
from lumina.runs.printed import clean, columns, decimal, print_json, say
from lumina.runs.steps import Steps
from lumina.runs.units import gib, si
from lumina.stages import sources

LEAST_KEPT = 2  # lest one be damaged
SHOWN_EVENTS = 10
LONG_TO_READ = 1 << 30  # bytes; `verify` tells of a checkpoint this large before it begins to read it


def add(runs: argparse.ArgumentParser) -> list[str]:
    """Add the commands to the parser of `lumina runs`, which lists without one; their names."""
    runs.add_argument("--json", action="store_true", help="one JSON object instead of text")
    runs.set_defaults(run=_told(_list), directory=library.LIBRARY)
    inner = runs.add_subparsers(dest="runs_command", metavar="COMMAND")

    def command(name: str, act: Callable[[argparse.Namespace], None], what: str, *names: str) -> argparse.ArgumentParser:
        parser = inner.add_parser(name, help=what, description=what)
        for run in names:
            parser.add_argument(f"{run.lower()}_name", metavar=run, help="a run directory, or its name in runs/")
        # SUPPRESS: else the default here would undo `lumina runs --json list`.
        parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON object instead of text")
        parser.set_defaults(run=_told(act))
        return parser

    listing = command("list", _list, "one line a run")
    listing.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=library.LIBRARY, help="default: runs")
    command("show", _show, "one run: config, state, checkpoints, last events", "RUN")
    command("verify", _verify, "read every byte of every checkpoint, the ledger and the metrics; exit 5 if any is wrong", "RUN")
    command("compare", compare, "two runs: their configs, whether they are the same bit for bit, their losses", "A", "B")
    prune = command("prune", _prune, "delete old checkpoints: not the newest, the best, pinned ones", "RUN")
    prune.add_argument("--keep", type=int, metavar="N", help="newest whole checkpoints to keep (default: checkpoint.keep)")
    prune.add_argument("--dry-run", action="store_true", help="only tell what would go")
    for name, what in (("pin", "keep a checkpoint for good"), ("unpin", "let a pinned checkpoint go")):
        command(name, _pin, what, "RUN").add_argument("step", metavar="STEP", type=int)
    restore = command("restore", _restore, "make a run directory from a backup")
    restore.add_argument("backup", metavar="BACKUP", type=Path, help="if encrypted, $LUMINA_BACKUP_PASSPHRASE opens it")
    restore.add_argument("--out", metavar="RUN", type=Path, required=True, help="the run directory to make")
    return list(inner.choices)


def spelled(arguments: list[str], names: list[str]) -> list[str]:
    """`runs DIR` as `runs list DIR`."""
    place = next((i for i, word in enumerate(arguments) if i and not word.startswith("-")), 0)
    if place and arguments[place] not in names and Path(arguments[place]).is_dir():
        return [*arguments[:place], "list", *arguments[place:]]
    return arguments


def _told(act: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """`act`, but that what goes wrong is told in one clean line, names and values from files included."""

    def run(arguments: argparse.Namespace) -> None:
        try:
            act(arguments)
        except LuminaError as error:
            raise type(error)(clean(str(error))) from error
        except BrokenPipeError:  # not about a path; exit_with knows what to do
            raise
        except OSError as error:
            raise UsageError(clean(f"{error.filename}: {error.strerror}; see to it that you may read and write it")) from error

    return run


# ------------------------------------------------------------------------------------------------------------- list


def _list(arguments: argparse.Namespace) -> None:
    found = []
    for run in library.runs_in(arguments.directory):
        try:
            found.append(library.summary(run))
        except OSError as error:  # one run that cannot be read does not hide the others
            found.append(library.Summary(run.path.name, str(run.path), "broken", f"cannot be read: {error.strerror}"))
    if arguments.json:
        print_json({"directory": str(arguments.directory), "runs": [_plain(each) for each in found]})
    elif not found:
        say(f"no runs in {arguments.directory}")
    else:
        header = ["run", "step", "train loss", "held-out bits/byte", "best step", "checkpoints", "size", "last change", "state"]
        columns([header, *(_line(each) for each in found)], words=(0, len(header) - 1))


def _line(each: library.Summary) -> list[str]:
    state = each.state + (f" ({each.why})" if each.why else "")
    if each.damaged:
        state += f"; {each.damaged} damaged lines"
    steps = "?" if each.steps is None else each.steps
    kept = str(len(each.checkpoints)) + (f", newest {each.checkpoints[-1]}" if each.checkpoints else "")
    best = "-" if each.best_step is None else str(each.best_step)
    loss, bits = decimal(each.loss), decimal(each.bits_per_byte)
    return [each.name, f"{each.step}/{steps}", loss, bits, best, kept, _size(each.bytes), _local(each.changed), state]


# ------------------------------------------------------------------------------------------------------------- show


def _show(arguments: argparse.Namespace) -> None:
    run = library.find(arguments.run_name)
    about, steps = library.summary(run), Steps(run.checkpoints)
    config = _config(run)
    events = library.read_lines(run.events)
    files = {path.name: library.read_lines(path) for path in (run.metrics, run.ledger)} | {run.events.name: events}
    damaged = {name: len(lines.damaged) for name, lines in files.items() if lines.damaged}
    checkpoints = _checkpoints(steps, about.best_step)
    aside, rests = [path.name for path in steps.broken()], library.leftovers(steps)
    if arguments.json:
        shown = {"config": config, "checkpoints": checkpoints, "set_aside": aside, "leftovers": rests, "damaged_lines": damaged}
        last = {"events": events.records[-SHOWN_EVENTS:], "result": library.read_json(run.result)}
        print_json({**_plain(about), **shown, **last})
        return
    rows = [("run", str(run.path)), ("state", about.state + (f" ({about.why})" if about.why else ""))]
    if "error" in config:
        rows.append(("config", config["error"]))
    else:
        rows.append(("parameters", f"{si(config['mean_active'])} mean active, {si(config['parameters'])} total"))
        rows.append(("data", f"{config['source']}, tokenizer {config['tokenizer']}"))
    rows.append(("steps", f"{about.step:,} of {'?' if about.steps is None else f'{about.steps:,}'}"))
    rows.append(("last losses", f"train {decimal(about.loss)}, held out {decimal(about.bits_per_byte)} bits/byte"))
    rows.append(("size", f"{_size(about.bytes)}, last change {_local(about.changed)}"))
    for each in checkpoints:
        flags = [flag for flag in ("best", "pinned") if each[flag]] + [f"BROKEN: {fault}" for fault in each["faults"][:3]]
        rows.append((f"checkpoint {each['step']}", ", ".join([_size(each["bytes"]), *flags])))
    rows += [("set aside", f"checkpoints/{name}, broken; remove it when you have looked at it") for name in aside]
    rows += [("leftover", f"checkpoints/{name}, half written or half deleted") for name in rests]
    rows += [("damaged", f"{name}: {count} lines are no JSON") for name, count in damaged.items()]
    rows += [("event", _event(record)) for record in events.records[-SHOWN_EVENTS:]]
    for line in table([(clean(name), clean(value)) for name, value in rows]).split("\n"):
        say(line)


def _config(run: RunDirectory) -> dict[str, Any]:
    try:
        config = library.read_config(run)
    except ConfigError as error:
        return {"error": str(error)}
    count = counts(config)
    about = {"parameters": count.total, "mean_active": count.mean_active, "steps": config.train.steps}
    return {**about, "source": ", ".join(sources(config)), "tokenizer": config.data.tokenizer}


def _checkpoints(steps: Steps, best: int | None) -> list[dict[str, Any]]:
    """Each with its size and flags. Files and their sizes are checked; contents are for `verify`."""
    pinned, found = steps.pinned(), [(step, library.faults(steps, step, contents=False)) for step in steps.all()]
    sizes = {step: library.disk_use(steps.directory(step))[0] for step, _ in found}
    return [
        {"step": step, "bytes": sizes[step], "best": step == best, "pinned": step in pinned, "faults": faults}
        for step, faults in found
        if faults is not None
    ]


def _event(record: dict[str, Any]) -> str:
    more = {name: value for name, value in record.items() if name in ("restarted_because", "error", "path")}
    says = [
        str(record.get("says") or f"step {record.get('step')}: {record.get('event')}"),
        *(f"{name.replace('_', ' ')}: {more[name]}" for name in more),
    ]
    return f"{str(record.get('time'))[:19]}  {'; '.join(says)}"


# ----------------------------------------------------------------------------------------------------------- verify


def _verify(arguments: argparse.Namespace) -> None:
    def begins(step: int, size: int) -> None:
        if size >= LONG_TO_READ:
            print(f"reading checkpoint {step}, {gib(size)}", file=sys.stderr, flush=True)

    run, found = library.find(arguments.run_name), []
    for finding in library.verify(run, begins):
        found.append(finding)
        if not arguments.json:
            say(f"{'well ' if finding.well else 'WRONG'}  {finding.what}: {finding.says}")
    wrong = [finding for finding in found if not finding.well]
    if arguments.json:
        print_json({"run": str(run.path), "well": not wrong, "findings": [finding._asdict() for finding in found]})
    if wrong:
        names = ", ".join(dict.fromkeys(clean(finding.what) for finding in wrong))
        raise CheckpointError(f"{run.path}: {len(wrong)} of {len(found)} checks failed: {names}")


# --------------------------------------------------------------------------------------------------------- retention


def _prune(arguments: argparse.Namespace) -> None:
    run, keep, dry = library.find(arguments.run_name), arguments.keep, arguments.dry_run
    if keep is not None and keep < LEAST_KEPT:
        raise UsageError(f"--keep = {keep}: must be at least {LEAST_KEPT}, lest one be damaged")
    config = library.read_config(run).checkpoint
    lock = None if dry else RunLock(run.lock)
    try:
        done = prune(run, keep or config.keep, config.keep_every, dry)
    finally:
        if lock:
            lock.release()
    if arguments.json:
        print_json({"run": str(run.path), "dry_run": dry, **done})
        return
    would = "would be " if dry else ""
    for step in done["deleted"]:
        say(f"checkpoint {step} {would}deleted")
    for name in done["leftovers"]:
        say(f"leftover {name} {would}removed")
    why = {done["best_step"]: " (best)"} | dict.fromkeys(done["pinned"], " (pinned)")
    stay = ", ".join(f"{step}{why.get(step, '')}" for step in done["stay"]) or "none"
    say(f"{_size(done['freed_bytes'])} {would}freed; checkpoints that stay: {stay}")
    for name in done["set_aside"]:
        say(f"{name} was set aside as broken and stays; remove it when you have looked at it")


def prune(run: RunDirectory, keep: int, keep_every: int, dry: bool) -> dict[str, Any]:
    """Delete leftovers and the steps beyond the newest `keep` whole ones, unless best, pinned or divided by `keep_every`.

    `dry` only tells. Only the holder of the run's lock may delete.
    """
    steps, best, whole = Steps(run.checkpoints, keep, keep_every), library.best_step(run), 0
    for step in reversed(steps.all()):
        if whole == keep:
            break
        if not library.faults(steps, step, contents=False):
            good = not library.faults(steps, step)
            whole += good
            steps.keep += not good  # of its size but not its hash: `superfluous` takes it for whole, and it is none of `keep`
    doomed, rests, before = steps.superfluous(best), library.leftovers(steps), library.disk_use(steps.path)[0]
    freed = sum(library.disk_use(steps.path / str(name))[0] for name in [*doomed, *rests])
    if not dry:
        steps.clean()
        steps.remove(doomed)
        freed = before - library.disk_use(steps.path)[0]
    stay, aside = [step for step in steps.all() if step not in doomed], [path.name for path in steps.broken()]
    told: dict[str, Any] = {"deleted": doomed, "leftovers": rests, "freed_bytes": freed, "stay": stay, "best_step": best}
    return {**told, "pinned": sorted(steps.pinned()), "set_aside": aside}


def _pin(arguments: argparse.Namespace) -> None:
    run, step = library.find(arguments.run_name), arguments.step
    steps = Steps(run.checkpoints)
    if arguments.runs_command == "pin":
        steps.pin(step)
    elif step in steps.pinned():
        steps.unpin(step)
    else:
        pinned = ", ".join(map(str, sorted(steps.pinned()))) or "none"
        raise CheckpointError(f"{run.checkpoints}: step {step} is not pinned; there are {pinned}")
    if arguments.json:
        print_json({"run": str(run.path), "step": step, "pinned": sorted(steps.pinned())})
    else:
        say(f"checkpoint {step} {'stays' if step in steps.pinned() else 'may go as others do'}")


def _restore(arguments: argparse.Namespace) -> None:
    from lumina.runs.backup import PASSPHRASE, restore

    step = restore(arguments.backup, arguments.out, os.environ.get(PASSPHRASE))
    if arguments.json:
        print_json({"run": str(arguments.out), "step": step})
    else:
        say(f"{arguments.out} is the run at step {step}, every file checked; it is its own --config and --workdir")


# ---------------------------------------------------------------------------------------------------------- printing


def _size(count: int) -> str:
    return gib(count) if count >= 1 << 20 else f"{-(-count // 1024)} KiB"


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M") if seconds else "-"


def _plain(about: library.Summary) -> dict[str, Any]:
    return {**asdict(about), "changed": datetime.fromtimestamp(about.changed, UTC).isoformat(timespec="seconds")}
