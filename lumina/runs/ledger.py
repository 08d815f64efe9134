"""The oracle for everything that a run survives: whether two ledgers tell of the same run, bit for bit."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple


class LedgerState(NamedTuple):
    """One ledger by itself: whether it has every step once and in order."""

    last: int  # 0 when it is empty
    missing: list[tuple[int, int]]  # first and last of each gap between 1 and `last`
    doubled: list[int]  # steps recorded more than once
    disordered: list[int]  # steps recorded after a later one
    unusable: int  # records that are neither a step's nor a digest of parameters

    def wrong(self) -> list[str]:
        """What is wrong with it, in words."""
        wrong = [f"lacks {spans(self.missing)}"] if self.missing else []
        wrong += [f"has {spans(self.doubled)} more than once"] if self.doubled else []
        wrong += [f"has {spans(self.disordered)} after a later step"] if self.disordered else []
        return wrong + ([f"{self.unusable} records tell of no step"] if self.unusable else [])


class LedgerVerdict(NamedTuple):
    """Two ledgers side by side; of a step recorded more than once every record counts."""

    a: LedgerState
    b: LedgerState
    common: int  # steps in both
    same_until: int  # all steps up to this one are in both and agree in all that both record of them
    rows: list[int]  # steps whose rows differ
    loss: list[int]  # steps whose loss differs in some bit
    update: list[int]  # steps that one applied and the other skipped or passed over
    parameters: list[int]  # steps whose parameters differ, of those where both have a digest
    digests: int  # steps where both have a digest

    @property
    def agree(self) -> bool:
        """Both are whole, and no step that both have differs: one may be longer."""
        return not (self.a.wrong() or self.b.wrong() or self.rows or self.loss or self.update or self.parameters)

    @property
    def identical(self) -> bool:
        """The same run: every step of one is in the other, once, with the same rows, bits, updates and parameters."""
        return self.agree and self.a.last == self.b.last > 0


def compare_ledgers(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> LedgerVerdict:
    """The verdict on the records of two ledgers; pure, and whatever the records hold."""
    (state_a, one), (state_b, other) = read_ledger(a), read_ledger(b)
    both = {name: sorted(one[name].keys() & other[name].keys()) for name in one}
    differ = {name: [step for step in both[name] if set(one[name][step]) != set(other[name][step])] for name in one}
    same_until = 0
    for step in both["loss"]:
        if step != same_until + 1 or any(steps and steps[0] <= step for steps in differ.values()):
            break
        same_until = step
    return LedgerVerdict(state_a, state_b, len(both["loss"]), same_until, **differ, digests=len(both["parameters"]))


def read_ledger(records: list[dict[str, Any]]) -> tuple[LedgerState, dict[str, dict[int, list[str]]]]:
    """A ledger's state, and for rows, loss, update and parameters what it records of each step."""
    found: dict[str, dict[int, list[str]]] = {"rows": {}, "loss": {}, "update": {}, "parameters": {}}
    latest, disordered, unusable = 0, set(), 0
    for record in records:
        step, values = record.get("step"), {name: record[name] for name in found if name in record}
        if "stage" in record and type(step) is int and not values:  # where a stage begins: its steps tell the rest
            continue
        if of_step := {"rows", "loss"} <= values.keys():
            values.setdefault("update", "")
        known = (of_step or values.keys() == {"parameters"}) and all(isinstance(value, str) for value in values.values())
        if not known or type(step) is not int or step < of_step:
            unusable += 1
            continue
        for name, value in values.items():
            found[name].setdefault(step, []).append(value)
        if step < latest:
            disordered.add(step)
        latest = max(latest, step)
    steps = sorted(found["loss"])
    missing = [(before + 1, step - 1) for before, step in pairwise([0, *steps]) if step > before + 1]
    doubled = {step for step, values in found["loss"].items() if len(values) > 1}
    doubled |= {step for step, values in found["parameters"].items() if len(set(values)) > 1}  # a save may be tried again
    return LedgerState(max(steps, default=0), missing, sorted(doubled), sorted(disordered), unusable), found


def spans(steps: Iterable[int | tuple[int, int]], word: str = "step") -> str:
    """Steps in words: `steps 3, 7-9`, the first five of such."""
    merged: list[list[int]] = []
    for each in steps:
        first, last = each if isinstance(each, tuple) else (each, each)
        if merged and first == merged[-1][1] + 1:
            merged[-1][1] = last
        else:
            merged.append([first, last])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in merged]
    more = f" and {len(words) - 5} more" if len(words) > 5 else ""
    return f"{word}{'s' * (len(words) > 1 or '-' in words[0])} {', '.join(words[:5])}{more}"
