"""Rows of the fault matrix: kill -9, at every instant of a save, at random instants, and of parts of the trainer."""

import random
import signal
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

from lumina.runs.directory import RunDirectory
from lumina.runs.steps import Steps
from tests.faults import instants
from tests.faults.faulty import Fault, Trainer
from tests.faults.trial import HUNDRED, LostError, NotRunError, Trial, ledger, require, whole

EVERY_STEP = ("--config.checkpoint.every=1", *HUNDRED)


def traced(
    trial: Trial,
    run: RunDirectory,
    act: Callable[[instants.Call], Any],
    *flags: str,
    at_step: int = 0,
    faults: Iterable[Fault] = (),
    **how: Any,
) -> tuple[Trainer, list[instants.Call], int | None]:
    """Start the trainer, and follow it from its first save on, or from step `at_step`; `how` goes to `instants.follow`."""
    if why := instants.available():
        raise NotRunError(why)
    where = {"step": at_step} if at_step else {"save": 1}
    trainer = trial.start(run, *flags, faults=[{**where, "do": "hold"}, *faults])
    trainer.held()
    try:
        calls, status = instants.follow(trainer.pid, run.path, act, trainer.release, **how)
    except TimeoutError:
        trainer.kill()
        raise
    if status is not None:
        trainer.ended(status)
    return trainer, calls, status


def kill_at(number: int) -> Callable[[instants.Call], str | None]:
    """Kills at the call of this number, unless the first save and the deletion after it are over by then."""
    seen: list[instants.Call] = []

    def act(call: instants.Call) -> str | None:
        seen.append(call)
        if len(seen) == number:
            return "kill"
        deleting = [each.path.startswith("checkpoints/.deleting") for each in seen[-2:]]
        return "leave" if deleting == [True, False] else None

    return act


def kill_at_every_instant(trial: Trial, part: int, parts: int) -> str:
    """One run, killed at instant 1, 2, ... of a save and of the deletion that follows, until there are no more of them."""
    run, instant_numbers, killed = trial.run("run"), count(part + 1, parts), []
    trial.train(run, *EVERY_STEP, faults=[{"step": 5, "do": "signal", "signal": signal.SIGTERM}], code=75)
    for number in instant_numbers:
        before = Steps(run.checkpoints).all()
        trainer, calls, status = traced(trial, run, kill_at(number), *EVERY_STEP)
        if status is None:  # the save and the deletion were over before the instant came
            trainer.kill(signal.SIGTERM)
            require(trainer.wait() == 75, "SIGTERM after the trial")
            break
        require(trainer.code == -signal.SIGKILL, f"ended with {trainer.code} before the kill")
        killed.append(str(calls[-1]))
        trial.trials += 1
        try:
            require(len(whole(run, before[-1:])) >= 2, f"only {Steps(run.checkpoints).all()} is left")
        except LostError as error:
            raise LostError(f"killed at instant {number}, {calls[-1]}: {error}") from error
    trial.train(run, *EVERY_STEP)
    trial.nothing_lost(run, trial.hundred)
    return f"{len(killed)} instants"


def kill_at_random_instants(trial: Trial, part: int, parts: int) -> str:
    """One run, killed at random instants again and again, start-up included."""
    flags = ("--config.checkpoint.every=2", *HUNDRED)
    run, chance = trial.run("run"), random.Random(part)
    kills = 20 // parts
    while trial.trials < kills:
        before = len(ledger(run))
        trainer = trial.start(run, *flags)
        if chance.random() < 0.8:
            trainer.until(lambda run=run, before=before: len(ledger(run)) not in (0, before))
            pause = chance.uniform(0, 0.5)
        else:
            pause = chance.uniform(0, 3)
        trainer.until(lambda: False, pause)
        require(trainer.poll() in (None, 0), f"ended by itself: {trainer.output()[-500:]}")
        if trainer.poll() is None:
            trainer.kill()
            trial.trials += 1
            whole(run)
        else:
            trial.nothing_lost(run, trial.hundred)
            run = trial.run(f"run-{trial.trials}")
    trial.train(run, *flags)
    trial.nothing_lost(run, trial.hundred)
    return f"{trial.trials} kills"
