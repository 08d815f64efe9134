"""What every row of the fault matrix is made of: run directories, trainers in them, and the ledger's verdict."""

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lumina.runs.directory import RunDirectory
from lumina.runs.ledger import compare_ledgers
from lumina.runs.library import read_lines
from lumina.runs.steps import Steps
from tests.faults.faulty import Fault, Trainer

STEPS, EVERY = 12, 3
HUNDRED = ("--config.train.steps=100", "--config.train.eval_every=0")
PYTHON = [sys.executable, "-m"]


class LostError(Exception):
    """Something was lost, or did not happen as it should."""


class NotRunError(Exception):
    """This machine lacks what the row needs."""


def require(holds: Any, says: str) -> None:
    if not holds:
        raise LostError(says)


class Trial:
    """One row's own directory, and the runs in it."""

    def __init__(self, directory: Path, kit: Path):
        """`kit` holds config.json and `reference`, the run that no fault met."""
        self.directory, self.kit = directory, kit
        self.reference, self.hundred = RunDirectory(kit / "reference"), RunDirectory(kit / "hundred")
        self.six = kit / "six"  # a run that was killed at step 9: it has checkpoints 3 and 6
        self.trials = 0  # faults that were tried
        directory.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, like: Path | None = None) -> RunDirectory:
        """A run directory that is not there yet, or a copy."""
        path = self.directory / name
        if like is not None:
            shutil.copytree(like, path)
        return RunDirectory(path)

    # --------------------------------------------------------------------------------------------------- training

    def start(
        self,
        run: RunDirectory,
        *flags: str,
        faults: Iterable[Fault] = (),
        log: str = "log",
        command: list[str] | None = None,
        **environment: str,
    ) -> Trainer:
        """The run's command, always the same but for `flags`, with faults planted in it."""
        arguments = ["--config", str(self.kit / "config.json"), "--workdir", str(run.path), *flags]
        name = "-".join(run.path.relative_to(self.directory).parts)
        path = self.directory / f"{name}.{log}"
        path.unlink(missing_ok=True)
        return Trainer(arguments, path, list(faults), environment, command)

    def train(
        self,
        run: RunDirectory,
        *flags: str,
        faults: Iterable[Fault] = (),
        code: int | None = 0,
        seconds: float = 120.0,
        **environment: str,
    ) -> str:
        """Run the command to its end; returns what it printed. It must end with `code` (None: any)."""
        trainer = self.start(run, *flags, faults=faults, **environment)
        found = trainer.wait(seconds)
        require(code in (None, found), f"exit {found} instead of {code}: {last_line(trainer.output())}")
        return trainer.output()

    # ---------------------------------------------------------------------------------------------------- verdicts

    def nothing_lost(self, run: RunDirectory, reference: RunDirectory | None = None, result: bool = True) -> None:
        """The run has ended as its reference did: same ledger, every checkpoint whole, the same result, nothing left over."""
        reference = reference or self.reference
        same_ledger(run, reference)
        whole(run)
        left = [each.name for each in run.path.rglob(".*") if each.name.startswith((".writing-", ".deleting-", ".new-"))]
        require(not left, f"left over: {', '.join(left)}")
        require(Steps(run.checkpoints).all()[-1:] == Steps(reference.checkpoints).all()[-1:], "another last checkpoint")
        require(not result or json_of(run.result) == json_of(reference.result), "another result.json")


def json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def ledger(run: RunDirectory) -> list[dict[str, Any]]:
    return read_lines(run.ledger).records


def events(run: RunDirectory, event: str = "") -> list[dict[str, Any]]:
    """The run's events, or those of one kind."""
    return [each for each in read_lines(run.events).records if event in ("", each["event"])]


def same_ledger(run: RunDirectory, reference: RunDirectory) -> None:
    """Every step once, with the reference's rows, bits of the loss and parameters, up to the same last step."""
    lines, expected = read_lines(run.ledger), read_lines(reference.ledger)
    require(not lines.damaged and not lines.half, f"ledger: damaged lines {lines.damaged}{', half a line' * lines.half}")
    verdict = compare_ledgers(lines.records, expected.records)
    require(verdict.identical, f"ledger differs: {verdict}")
    last = [max((r["step"] for r in each if "parameters" in r), default=None) for each in (lines.records, expected.records)]
    require(last[0] == last[1] == verdict.b.last, f"the last parameters were recorded at step {last[0]}, not {last[1]}")


def whole(run: RunDirectory, at_least: Iterable[int] = ()) -> list[int]:
    """All steps verify, and those that must be there are; returns them."""
    steps = Steps(run.checkpoints)
    for step in steps.all():
        require(not (wrong := steps.verify(step)), f"checkpoint {step} is damaged: {wrong}")
    require(not (gone := set(at_least) - set(steps.all())), f"checkpoints {sorted(gone)} are gone; there are {steps.all()}")
    return steps.all()


def same_metrics(run: RunDirectory, reference: RunDirectory) -> None:
    """Every record once and in order, with the reference's losses."""
    records = [read_lines(each.metrics).records for each in (run, reference)]
    found, expected = ([(r["kind"], r["step"], r["loss"]) for r in each] for each in records)
    require(found == expected, f"metrics differ: {sorted(set(found) ^ set(expected))}, or their order")


def parameters(run: RunDirectory, step: int) -> str | None:
    """The digest of the parameters at a step, as the ledger has it."""
    return next((each["parameters"] for each in reversed(ledger(run)) if each["step"] == step and "parameters" in each), None)


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or "Error" in line]
    return (errors or lines or ["nothing printed"])[-1][:1000]


def tree(path: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {os.path.relpath(each, path): each.read_bytes() for each in path.rglob("*") if each.is_file()}
