"""`lumina runs compare`: the configs, data, ledgers and losses of two runs, side by side."""

import argparse
import math
from collections.abc import Iterator
from typing import Any

from lumina.errors import ConfigError
from lumina.runs import library
from lumina.runs.directory import MAY_CHANGE, RunDirectory
from lumina.runs.ledger import LedgerVerdict, compare_ledgers, spans
from lumina.runs.printed import columns, decimal, print_json, say

COMPARED_STEPS = 10
BARS = "▁▂▃▄▅▆▇█"


def compare(arguments: argparse.Namespace) -> None:
    """Print it. Raises ConfigError where a config cannot be read."""
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
        print_json({**paths, "config": configs, "data": data, "ledger": ledger, "damaged": damaged, "losses": losses})
        return
    for name, run in zip("ab", runs, strict=True):
        say(f"{name}: {run.path}")
    say("config: " + (f"differs in {len(configs)} field{'s' * (len(configs) > 1)}" if configs else "the same"))
    for each in configs:
        say(f"  {each['field']}: {each['a']!r} / {each['b']!r}" + ("" if each["decides"] else " (may change)"))
    say("data: " + ("the same" if data[0] == data[1] else " / ".join(str(fingerprint)[:12] for fingerprint in data)))
    for line in _verdict(verdict):
        say(line)
    for path, count in damaged.items():
        say(f"{path}: {count} lines are damaged, and left out")
    for kind, what in (("train", "train"), ("eval", "held out")):
        if losses[kind]:
            rows = [[str(each["step"]), *(decimal(each[key]) for key in list(each)[1:])] for each in losses[kind]]
            print()
            columns([[what, "loss a", "loss b", "bits/byte a", "bits/byte b"], *rows])
    for name, line in zip("ab", _sparklines(*curves["train"]), strict=False):
        say(f"train loss of {name}  {line}")


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
