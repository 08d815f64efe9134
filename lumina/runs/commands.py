"""`lumina runs`: the commands that list, show, verify, compare and prune runs, and what they print."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lumina.architecture import counts
from lumina.errors import CheckpointError, ConfigError, LuminaError, UsageError
from lumina.runs import library
from lumina.runs.console import printable, table
from lumina.runs.directory import MAY_CHANGE, RunDirectory
from lumina.runs.journal import finite
from lumina.runs.ledger import LedgerVerdict, compare_ledgers, spans
from lumina.runs.lock import RunLock
from lumina.runs.steps import Steps
from lumina.runs.units import gib, si
from lumina.stages import sources

LEAST_KEPT = 2  # lest one be damaged
SHOWN_EVENTS = 10
COMPARED_STEPS = 10
LONG_TO_READ = 1 << 30  # bytes; `verify` tells of a checkpoint this large before it begins to read it
BARS = "▁▂▃▄▅▆▇█"


def add(runs: argparse.ArgumentParser) -> None:
    """Add the commands to the parser of `lumina runs`; it lists without one."""
    runs.add_argument("--json", action="store_true", help="one JSON object instead of text")
    runs.set_defaults(run=_told(_list), directory=library.LIBRARY)
    inner = runs.add_subparsers(dest="runs_command", metavar="COMMAND")

    def command(name: str, act: Callable[[argparse.Namespace], None], what: str, *names: str) -> argparse.ArgumentParser:
        parser = inner.add_parser(name, help=what, description=what, allow_abbrev=False)
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
    command("compare", _compare, "two runs: their configs, whether they are the same bit for bit, their losses", "A", "B")
    prune = command("prune", _prune, "delete old checkpoints: not the newest, the best, pinned ones", "RUN")
    prune.add_argument("--keep", type=int, metavar="N", help="newest whole checkpoints to keep (default: checkpoint.keep)")
    prune.add_argument("--dry-run", action="store_true", help="only tell what would go")
    for name, what in (("pin", "keep a checkpoint for good"), ("unpin", "let a pinned checkpoint go")):
        command(name, _pin, what, "RUN").add_argument("step", metavar="STEP", type=int)
    restore = command("restore", _restore, "make a run directory from a backup")
    restore.add_argument("backup", metavar="BACKUP", type=Path, help="if encrypted, $LUMINA_BACKUP_PASSPHRASE opens it")
    restore.add_argument("--out", metavar="RUN", type=Path, required=True, help="the run directory to make")


def _told(act: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """`act`, but that what goes wrong is told in one clean line, names and values from files included."""

    def run(arguments: argparse.Namespace) -> None:
        try:
            act(arguments)
        except LuminaError as error:
            raise type(error)(_clean(str(error))) from error
        except BrokenPipeError:  # not about a path; exit_with knows what to do
            raise
        except OSError as error:
            raise UsageError(_clean(f"{error.filename}: {error.strerror}; see to it that you may read and write it")) from error

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
        _print_json({"directory": str(arguments.directory), "runs": [_plain(each) for each in found]})
    elif not found:
        _say(f"no runs in {arguments.directory}")
    else:
        header = ["run", "step", "train loss", "held-out bits/byte", "best step", "checkpoints", "size", "last change", "state"]
        _table([header, *(_line(each) for each in found)], words=(0, len(header) - 1))


def _line(each: library.Summary) -> list[str]:
    state = each.state + (f" ({each.why})" if each.why else "")
    if each.damaged:
        state += f"; {each.damaged} damaged lines"
    steps = "?" if each.steps is None else each.steps
    kept = str(len(each.checkpoints)) + (f", newest {each.checkpoints[-1]}" if each.checkpoints else "")
    best = "-" if each.best_step is None else str(each.best_step)
    loss, bits = _decimal(each.loss), _decimal(each.bits_per_byte)
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
        _print_json({**_plain(about), **shown, **last})
        return
    rows = [("run", str(run.path)), ("state", about.state + (f" ({about.why})" if about.why else ""))]
    if "error" in config:
        rows.append(("config", config["error"]))
    else:
        rows.append(("parameters", f"{si(config['mean_active'])} mean active, {si(config['parameters'])} total"))
        rows.append(("data", f"{config['source']}, tokenizer {config['tokenizer']}"))
    rows.append(("steps", f"{about.step:,} of {'?' if about.steps is None else f'{about.steps:,}'}"))
    rows.append(("last losses", f"train {_decimal(about.loss)}, held out {_decimal(about.bits_per_byte)} bits/byte"))
    rows.append(("size", f"{_size(about.bytes)}, last change {_local(about.changed)}"))
    for each in checkpoints:
        flags = [flag for flag in ("best", "pinned") if each[flag]] + [f"BROKEN: {fault}" for fault in each["faults"][:3]]
        rows.append((f"checkpoint {each['step']}", ", ".join([_size(each["bytes"]), *flags])))
    rows += [("set aside", f"checkpoints/{name}, broken; remove it when you have looked at it") for name in aside]
    rows += [("leftover", f"checkpoints/{name}, half written or half deleted") for name in rests]
    rows += [("damaged", f"{name}: {count} lines are no JSON") for name, count in damaged.items()]
    rows += [("event", _event(record)) for record in events.records[-SHOWN_EVENTS:]]
    for line in table([(_clean(name), _clean(value)) for name, value in rows]).split("\n"):
        _say(line)


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


# ------------------------------------------------------------------------------------------------- verify and compare


def _verify(arguments: argparse.Namespace) -> None:
    def begins(step: int, size: int) -> None:
        if size >= LONG_TO_READ:
            print(f"reading checkpoint {step}, {gib(size)}", file=sys.stderr, flush=True)

    run, found = library.find(arguments.run_name), []
    for finding in library.verify(run, begins):
        found.append(finding)
        if not arguments.json:
            _say(f"{'well ' if finding.well else 'WRONG'}  {finding.what}: {finding.says}")
    wrong = [finding for finding in found if not finding.well]
    if arguments.json:
        _print_json({"run": str(run.path), "well": not wrong, "findings": [finding._asdict() for finding in found]})
    if wrong:
        names = ", ".join(dict.fromkeys(_clean(finding.what) for finding in wrong))
        raise CheckpointError(f"{run.path}: {len(wrong)} of {len(found)} checks failed: {names}")


def _compare(arguments: argparse.Namespace) -> None:
    runs = [library.find(arguments.a_name), library.find(arguments.b_name)]
    configs = _config_difference(*runs)
    data = [(library.read_json(run.data) or {}).get("fingerprint") for run in runs]
    ledgers, metrics = [library.read_lines(run.ledger) for run in runs], [library.read_lines(run.metrics) for run in runs]
    verdict = compare_ledgers(ledgers[0].records, ledgers[1].records)
    files = [(run.ledger, lines) for run, lines in zip(runs, ledgers, strict=True)]
    files += [(run.metrics, lines) for run, lines in zip(runs, metrics, strict=True)]
    damaged = {str(path): len(lines.damaged) + lines.half for path, lines in files if lines.damaged or lines.half}
    curves = {kind: [_logged(lines.records, kind) for lines in metrics] for kind in ("train", "eval")}
    losses = {kind: _side_by_side(*each) for kind, each in curves.items()}
    if arguments.json:
        ledger = {**verdict._asdict(), "a": verdict.a._asdict(), "b": verdict.b._asdict()}
        ledger |= {"agree": verdict.agree, "identical": verdict.identical}
        paths = {"a": str(runs[0].path), "b": str(runs[1].path)}
        _print_json({**paths, "config": configs, "data": data, "ledger": ledger, "damaged": damaged, "losses": losses})
        return
    for name, run in zip("ab", runs, strict=True):
        _say(f"{name}: {run.path}")
    _say("config: " + (f"differs in {len(configs)} field{'s' * (len(configs) > 1)}" if configs else "the same"))
    for each in configs:
        _say(f"  {each['field']}: {each['a']!r} / {each['b']!r}" + ("" if each["decides"] else " (may change)"))
    _say("data: " + ("the same" if data[0] == data[1] else " / ".join(str(fingerprint)[:12] for fingerprint in data)))
    for line in _verdict(verdict):
        _say(line)
    for path, count in damaged.items():
        _say(f"{path}: {count} lines are damaged, and left out")
    for kind, what in (("train", "train"), ("eval", "held out")):
        if losses[kind]:
            rows = [[str(each["step"]), *(_decimal(each[key]) for key in list(each)[1:])] for each in losses[kind]]
            print()
            _table([[what, "loss a", "loss b", "bits/byte a", "bits/byte b"], *rows])
    for name, line in zip("ab", _sparklines(*curves["train"]), strict=False):
        _say(f"train loss of {name}  {line}")


def _config_difference(a: RunDirectory, b: RunDirectory) -> list[dict[str, Any]]:
    """The fields in which two runs' configs differ, and whether each decides numbers. Raises ConfigError."""
    flat = []
    for run in (a, b):
        if (values := library.read_json(run.config)) is None:
            raise ConfigError(f"{run.config}: cannot be read as a config; compare runs whose config.json is whole")
        flat.append(dict(_fields(values)))
    values_of = {name: [each.get(name, "no such field") for each in flat] for name in dict.fromkeys([*flat[0], *flat[1]])}
    return [
        {"field": name, "a": one, "b": other, "decides": not name.startswith(MAY_CHANGE)}
        for name, (one, other) in values_of.items()
        if one != other
    ]


def _fields(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _verdict(verdict: LedgerVerdict) -> list[str]:
    a, b = verdict.a, verdict.b
    if verdict.identical:
        return [f"ledger: identical, all {verdict.common:,} steps, bit for bit; parameters too, at {verdict.digests} of them"]
    lines = [f"ledger: a to step {a.last:,}, b to {b.last:,}; {verdict.common:,} in both, the same to {verdict.same_until:,}"]
    found = {"rows": verdict.rows, "loss bits": verdict.loss, "updates": verdict.update, "parameters": verdict.parameters}
    differ = {what: steps for what, steps in found.items() if steps}
    lines += [f"  {what} differ first at step {steps[0]}, in all at {spans(steps)}" for what, steps in differ.items()]
    if verdict.common and not differ:
        lines.append(f"  nothing differs in the steps that both have; parameters compared at {verdict.digests}")
    return lines + [f"  {name} {wrong}" for name, state in (("a", a), ("b", b)) for wrong in state.wrong()]


def _logged(records: list[dict[str, Any]], kind: str) -> dict[int, dict[str, Any]]:
    """Records of a kind, by step; a loss in them may be null, as it was not finite."""
    ours = [record for record in records if record.get("kind") == kind and "loss" in record]
    return {step: record for record in ours if (step := library.integer(record.get("step"))) is not None}


def _side_by_side(a: dict[int, dict[str, Any]], b: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Both at some COMPARED_STEPS of the steps that both logged."""
    common = sorted(a.keys() & b.keys())
    chosen = {round(i * (len(common) - 1) / (COMPARED_STEPS - 1)) for i in range(COMPARED_STEPS)} if common else set()
    sides = [(f"{name}_{side}", name, run) for name in ("loss", "bits_per_byte") for side, run in (("a", a), ("b", b))]
    return [
        {"step": step, **{key: library.number(run[step].get(name)) for key, name, run in sides}}
        for step in (common[i] for i in sorted(chosen))
    ]


def _sparklines(*curves: dict[int, dict[str, Any]], widest: int = 60) -> list[str]:
    """A bar for each part of the steps, on one scale; nothing when there is no line to draw."""
    points = [{step: library.number(record["loss"]) for step, record in curve.items()} for curve in curves]
    finite = [{step: loss for step, loss in each.items() if loss is not None and math.isfinite(loss)} for each in points]
    every, last = [loss for each in finite for loss in each.values()], max([1, *(step for each in finite for step in each)])
    if not all(finite) or max(every) == min(every):
        return []
    lines, width = [], min(widest, *map(len, finite))
    for each in finite:
        parts: list[list[float]] = [[] for _ in range(width)]
        for step, loss in each.items():
            parts[min(width - 1, max(0, step - 1) * width // last)].append(loss)
        heights = [(sum(part) / len(part) - min(every)) / (max(every) - min(every)) if part else None for part in parts]
        lines.append("".join(" " if height is None else BARS[round(height * (len(BARS) - 1))] for height in heights))
    return lines


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
        _print_json({"run": str(run.path), "dry_run": dry, **done})
        return
    would = "would be " if dry else ""
    for step in done["deleted"]:
        _say(f"checkpoint {step} {would}deleted")
    for name in done["leftovers"]:
        _say(f"leftover {name} {would}removed")
    why = {done["best_step"]: " (best)"} | dict.fromkeys(done["pinned"], " (pinned)")
    stay = ", ".join(f"{step}{why.get(step, '')}" for step in done["stay"]) or "none"
    _say(f"{_size(done['freed_bytes'])} {would}freed; checkpoints that stay: {stay}")
    for name in done["set_aside"]:
        _say(f"{name} was set aside as broken and stays; remove it when you have looked at it")


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
        _print_json({"run": str(run.path), "step": step, "pinned": sorted(steps.pinned())})
    else:
        _say(f"checkpoint {step} {'stays' if step in steps.pinned() else 'may go as others do'}")


def _restore(arguments: argparse.Namespace) -> None:
    from lumina.runs.backup import PASSPHRASE, restore

    step = restore(arguments.backup, arguments.out, os.environ.get(PASSPHRASE))
    if arguments.json:
        _print_json({"run": str(arguments.out), "step": step})
    else:
        _say(f"{arguments.out} is the run at step {step}, every file checked; it is its own --config and --workdir")


# ---------------------------------------------------------------------------------------------------------- printing


def _clean(text: str) -> str:
    """What may come from a file, on one line, without control characters or what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text.replace("\n", "\\n").replace("\t", "\\t")).encode(encoding, "backslashreplace").decode(encoding)


def _say(text: str) -> None:
    print(_clean(text))


def _table(rows: list[list[str]], words: tuple[int, ...] = (0,)) -> None:
    """Aligned columns; the columns of `words` to the left, numbers to the right."""
    rows = [[_clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = enumerate(zip(row, widths, strict=True))
        print("  ".join(cell.ljust(width) if i in words else cell.rjust(width) for i, (cell, width) in cells).rstrip())


def _print_json(values: Any) -> None:
    print(json.dumps(finite(values), indent=2))


def _decimal(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(count: int) -> str:
    return gib(count) if count >= 1 << 20 else f"{-(-count // 1024)} KiB"


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M") if seconds else "-"


def _plain(about: library.Summary) -> dict[str, Any]:
    return {**asdict(about), "changed": datetime.fromtimestamp(about.changed, UTC).isoformat(timespec="seconds")}
