"""The training loop of any backend: steps, evaluations, samples, checkpoints, and what goes wrong on the way."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from lumina.config import Config
from lumina.data.loader import prefetch
from lumina.data.rows import Batches
from lumina.errors import DoNotRetryError
from lumina.runs.console import Console, printable
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.health import StopRequest, Watchdog
from lumina.runs.journal import Journal
from lumina.runs.metrics import MetricsLog
from lumina.runs.progress import Progress, diagnosis, must_rewind
from lumina.runs.report import Reporter, figures


class Saving(Protocol):
    """Where states go and come from; see `lumina_jax.checkpoint.Checkpoints`."""

    def save(self, step: int, state: Any, record: Callable[[str], dict[str, Any]]) -> None: ...
    def require(self, step: int) -> None: ...
    def restore(self, scheduled: bool = False) -> tuple[Any, dict[str, Any]] | None: ...


@dataclass
class Backend:
    """What a trainer does with arrays. A state is opaque here. Processes call each function at the same step."""

    fresh: Callable[[], Any]  # -> state
    train_step: Callable[..., tuple[Any, Any]]  # number from 0, state, batch, update, stop -> state, metrics
    fetch: Callable[[Any], Any]  # metrics as numpy arrays, waiting for them
    steps_of: Callable[[Any], int]  # batches that a state has consumed
    evaluate: Callable[[Any, Callable[[], None]], dict[str, Any]]  # state, alive -> figures
    sample: Callable[[Any, int], list[str]]  # state, count -> texts
    processes: int = 1
    writes: bool = True  # whether this process is the one that writes
    samples_together: bool = False  # whether all call `sample`, of which the others return nothing


class Loop:
    """From a step to the end, a stop, or the end of patience.

    The state that it holds is the last one dispatched; the metrics that it reads are those of the step before, so that the
    device never waits.
    """

    state: Any
    step: int  # batches consumed
    progress: Progress

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        backend: Backend,
        batches: Batches,
        checkpoints: Saving,
        restored: tuple[Any, dict[str, Any]] | None,
        console: Console,
        events: Events,
        fingerprints: dict[str, str],
        peak: float,
    ):
        """`restored` is a state and its manifest; None begins anew. `fingerprints` go into each manifest."""
        self.config, self.run_directory, self.backend, self.checkpoints = config, run, backend, checkpoints
        self.console, self.events, self.fingerprints = console, events, fingerprints
        self._take(restored)
        self.batches = batches.following(self.step, self.progress.rows)
        self.log = MetricsLog(run, config.monitor, self.step, console.say) if backend.writes else None
        self.ledger = Journal(run.ledger, console.say, self.step) if backend.writes else None
        if self.ledger and restored and self.ledger.position() != restored[1].get("ledger", self.ledger.position()):
            says = f"{run.ledger}: not as it was when step {self.step} was saved; kept as it is"
            events.write("ledger differs", self.step, says)
        self.reporter = Reporter(config, console, self.log, self.ledger, self.batches, peak, backend.fetch)
        self.asked, self.watchdog = StopRequest(), Watchdog(config.guard.hang_seconds)
        self._told = False  # a process was asked to stop, as all have learned

    def run(self) -> str:
        """Train; returns `finished`, `stopped early` or, after a signal, `stopped`, with the state saved.

        Raises:
            DoNotRetryError: bad steps have used up the retries.
            CheckpointError: the last state could not be saved.
            Exception: anything else that ended training, after an attempt to save.
        """
        self.watchdog.alive()
        try:
            with self.asked:
                outcome = "stopped early" if self._out_of_patience() else ""
                while not outcome:
                    try:
                        outcome = self._train()
                    except _Rewind as rewind:
                        self._rewind(rewind.bad)
                if outcome != "stopped" and self.progress.last_step != self.step:
                    self._evaluate()  # no step was left to make, and none evaluated the last one
                self.watchdog.rest()
                self.checkpoints.require(self.step)
        except Exception as error:
            self._failed(error)
            raise
        finally:
            self.watchdog.rest()
            self.console.done()
            if self.log:
                self.log.close()
        return outcome

    def _train(self) -> str:
        config, steps = self.config, self.config.train.steps
        for number, batch in prefetch(self.batches, self.step, steps, config.data.workers):
            update = not self.progress.passes_over(number + 1)
            self.state, metrics = self.backend.train_step(number, self.state, batch, update, self._asked())
            self.step = number + 1
            self._judge(self.reporter.dispatched(self.step, metrics, update))
            self.watchdog.alive()
            last, stopping = self.step == steps, self._told if self.backend.processes > 1 else self._asked()
            evaluating = last or self._due(config.train.eval_every)
            sampling = not last and self._due(config.monitor.sample_every)
            saving = last or stopping or self._due(config.checkpoint.every)
            if evaluating or sampling or saving:
                self._judge(self.reporter.flush())
                best = evaluating and self._evaluate()
                if sampling:
                    for text in self.sample(1):
                        self.console.say(printable(text))
                if saving or best or self._out_of_patience():
                    self._save()
                self.watchdog.alive()
                self.reporter.pause()
                if evaluating and self._out_of_patience():
                    return "stopped early"
            if stopping and not last:
                why = self.asked.signal or ("closed output" if self.console.closed else "a signal to another process")
                self.events.write("stopped", self.step, f"stopped by {why} at step {self.step}")
                return "stopped"
        return "finished"

    @contextmanager
    def aside(self) -> Iterator[None]:
        """For what a step may have to wait for and is none, such as compiling."""
        self.watchdog.rest()
        self.reporter.pause()
        yield
        self.watchdog.alive()

    def sample(self, count: int) -> list[str]:
        """Continuations of the config's prompt, also kept in samples/; nothing in a process that does not write."""
        if not (self.backend.writes or self.backend.samples_together):
            return []
        samples = self.backend.sample(self.state, count)
        if not self.backend.writes:
            return []
        try:
            self.run_directory.samples.mkdir(exist_ok=True)
            path = self.run_directory.samples / f"{self.step}.txt"
            path.write_text("\n---\n".join(samples) + "\n", encoding="utf-8")
        except OSError as error:
            self.console.say(f"{self.run_directory.samples}: cannot be written ({error.strerror})")
        return samples

    # ------------------------------------------------------------------------------------------------ parts of a step

    def _asked(self) -> bool:
        """Whether this process is to stop: by a signal, or as nobody reads what it prints."""
        return bool(self.asked) or self.console.closed

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _out_of_patience(self) -> bool:
        return self.progress.without_improvement(self.config.train.early_stopping)

    def _evaluate(self) -> bool:
        """Whether this is the best so far."""
        result = self.backend.evaluate(self.state, self.watchdog.alive)
        if self.log:
            self.log.write("eval", {"step": self.step, **result})
        self.console.say(f"step {self.step}: held out {figures(result)}")
        stage = self.batches.stage(max(self.step - 1, 0))
        last = stage == self.batches.stage(self.config.train.steps - 1)
        return self.progress.evaluated(self.step, result, self.reporter.judged(result, stage), stage, last)

    def _save(self) -> None:
        def record(parameters: str) -> dict[str, Any]:
            if self.ledger:
                self.ledger.append({"step": self.step, "parameters": parameters})
            position = self.ledger.position() if self.ledger else None
            return {"progress": self.progress.to_dict(), "ledger": position, **self.fingerprints}

        self.progress.rows = self.batches.consumed(self.step)
        self.checkpoints.save(self.step, self.state, record)

    # ------------------------------------------------------------------------------------------------ what goes wrong

    def _judge(self, reported: dict[str, Any] | None) -> None:
        """Look at a step that was reported; raises what is to be done about a bad one."""
        if reported is None:
            return
        self._told |= reported["stop"]
        if reported["began"]:
            self.events.write("stage", reported["step"], reported["began"])
        for says in reported["warnings"]:
            self.events.write("routing", reported["step"], says)
        if reported["skipped"]:
            if must_rewind(self.config.guard, reported, self.progress.rewinds):
                raise _Rewind(reported)
            says = f"{diagnosis(reported)}: update skipped, {reported['skipped']} in a row"
            self.events.write("skipped", reported["step"], says)

    def _rewind(self, bad: dict[str, Any]) -> None:
        """Back to the newest scheduled checkpoint; the batches from there to the bad one will be passed over."""
        before = self.progress
        self.reporter.forget()
        self.state = None  # one state at a time is all that a device may hold
        self._take(self.checkpoints.restore(scheduled=True))
        self.batches = self.reporter.batches = self.batches.following(self.step, self.progress.rows)
        self.progress = self.progress.rewound(before, self.step + 1, bad["step"])
        says = f"{diagnosis(bad)}: back to step {self.step}, passing over the batches up to this one"
        self.events.write("rewound", self.step, says)
        if self.log and self.ledger:
            self.log.trim(self.step)
            self.ledger.trim(self.step)

    def _take(self, restored: tuple[Any, dict[str, Any]] | None) -> None:
        state, manifest = restored or (self.backend.fresh(), {})
        self.state = state
        self.step = self.backend.steps_of(state)
        self.progress = Progress(**manifest.get("progress", {}))

    def _failed(self, error: Exception) -> None:
        """Record the failure and, where it says nothing against the state, try to save that; a step that exists stays."""
        self.events.write("failed", self.step, error=f"{type(error).__name__}: {error}", process=os.getpid())
        if isinstance(error, DoNotRetryError) or self.backend.processes > 1:  # others may be at another step
            return
        if self._due(self.config.train.eval_every) and self.progress.last_step != self.step:
            return  # resumed from here, the evaluation of this step would never be made
        try:
            self.watchdog.alive()  # out of memory, threads that a save waits for may never begin
            self._judge(self.reporter.flush())
            self.step = self.backend.steps_of(self.state)
            self._save()
            self.checkpoints.require(self.step)
            self.console.say(f"saved at step {self.step} before leaving; the same command goes on")
        except Exception as second:
            self.console.say(f"nothing could be saved at step {self.step} ({second}); the newest checkpoint stands")


class _Rewind(Exception):
    def __init__(self, bad: dict[str, Any]):
        super().__init__(bad)
        self.bad = bad
