"""What happens when a model is trained, whatever the framework: the story that both trainers tell.

In order: the run and its data, the model, what is about to happen, the loop (`lumina.runs.loop`), the result. What is about
arrays comes from a `Trainer`, which `lumina_jax.train` and `lumina_torch.train` make.
"""

import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lumina.config import Config, to_dict
from lumina.errors import OUTPUT_CLOSED, STOPPED_AND_SAVED, ConfigError, LuminaError
from lumina.flags import parse
from lumina.runs import report
from lumina.runs.checkpoints import Checkpoints, Record, require_own
from lumina.runs.console import Console
from lumina.runs.directory import Events, RunDirectory, config_fingerprint
from lumina.runs.lock import RunLock
from lumina.runs.loop import Backend, Loop
from lumina.runs.origin import Origin
from lumina.runs.progress import Progress
from lumina.runs.text import Text, manifest, open_corpora, read, with_tokenizer

SAMPLES = 3  # continuations printed at the end


class Framework(NamedTuple):
    """What a mistake can be told by before the framework is imported."""

    program: str  # as in `python -m PROGRAM.train`
    is_first: Callable[[Mapping[str, str]], bool]  # whether, of several processes, this is the one that writes, by environment
    dtypes: tuple[str, ...]  # for train.compute_dtype
    attention: tuple[str, ...]  # for model.attention_form
    grouped: tuple[str, ...]  # for model.moe.grouped_form
    remat: tuple[str, ...]  # for train.remat
    moments: tuple[str, ...]  # for optim.moment_dtype
    offload: tuple[bool, ...]  # for optim.offload


class Trainer(Protocol):
    """A framework at work on one config, in one process or several that call the same methods in the same order."""

    config: Config  # as asked for, with what is chosen for the devices at hand
    versions: dict[str, str]  # of the framework, for the record
    device: str  # the devices, in words
    part: tuple[tuple[int, ...], int]  # which of n equal parts of each batch this process reads, and n

    def require_same(self, what: str, digest: str) -> None:
        """Raise a ConfigError, in all processes, unless each has the same SHA-256."""

    def agreed(self, value: Any) -> Any:
        """What the first process says: a truth value, a number from 0, or None."""

    def checkpoints(
        self, run: RunDirectory, events: Events, backup: Callable[[int], Path] | None, origin: Origin | None
    ) -> Checkpoints:
        """Where the run's states are kept."""

    def steps_of(self, state: Any) -> int:
        """Batches that a state has consumed."""

    def forms(self) -> str:
        """The forms of kernels that the device takes, and why; raises ConfigError where it cannot take what is asked for."""

    def peak(self) -> float:
        """FLOP/s of matrix products on all devices."""

    def backend(
        self, text: Text, start: int, writes: bool, console: Console, aside: Callable[[], AbstractContextManager[None]]
    ) -> Backend:
        """What the loop calls, ready to make step `start`; `aside` is for what a later step has to wait for."""


def train_and_evaluate(
    framework: Framework, make: Callable[[Config], Trainer], config: Config, workdir: Path, accept_changes: bool = False
) -> int:
    """Train as `config` says, in `workdir`; a run found there goes on from its newest checkpoint.

    `make` imports the framework: a mistake before is told in the second that it would take. Returns the exit code: 0 when done,
    75 when a signal stopped it and all is saved.
    """
    with ExitStack() as resources:
        return _train_and_evaluate(framework, make, config, RunDirectory(workdir), accept_changes, resources)


def _train_and_evaluate(
    framework: Framework,
    make: Callable[[Config], Trainer],
    config: Config,
    run: RunDirectory,
    accept_changes: bool,
    resources: ExitStack,
) -> int:
    # ------------------------------------------------------------------------------------------ the run and its data
    require_possible(framework, config)
    writes = framework.is_first(os.environ)  # of several processes one writes and speaks
    console = Console(config.train.steps, sys.stderr if writes else None)
    backup = None
    if writes:
        run.require_writable()
        resources.callback(RunLock(run.lock).release)
        if config.checkpoint.backup_dir:
            from lumina.runs.backup import Backups

            backup = Backups(run, config.checkpoint).make
    run.check_same_config(config, accept_changes)
    require_own(run, framework.program)
    origin = Origin.of(config, run, accept_changes)
    corpora = open_corpora(_with_its_tokenizer(config, run, origin, console.say), console.status)
    console.done()
    data, tokenizer = manifest(corpora, config.data), next(iter(corpora.values())).tokenizer
    run.check_same_data(data, accept_changes)
    changes = run.changes(config) + run.data_changes(data)
    if origin:
        changes += origin.check_data(data, accept_changes)
    if len(tokenizer.encode(config.monitor.sample_prompt)) >= config.data.sequence_length:
        raise ConfigError(f"monitor.sample_prompt = {config.monitor.sample_prompt!r}: must leave room for an answer in a row")

    # ------------------------------------------------------------------------------- the model, new or where it stopped
    asked, trainer = config, make(config)
    config = trainer.config
    trainer.require_same("the config", sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest())
    trainer.require_same("the data (data.source, data.tokenizer, Python's version)", data["fingerprint"])
    text = read(config, corpora, trainer.part, console.say)
    events = Events(run if writes else None, console.say)
    checkpoints = trainer.checkpoints(run, events, backup, origin)
    resources.callback(checkpoints.close)
    restored = checkpoints.restore()
    start = trainer.steps_of(restored[0]) if restored else 0
    progress = Progress(**restored[1].get("progress", {})) if restored else Progress()
    result = report.finished(run, config.train, start, progress)
    if trainer.agreed(result is not None):
        if writes and result:
            report.print_result(run, result)
        goes_on = "--config.train.early_stopping=0" if result and result["stopped_early"] else "a larger --config.train.steps"
        console.say(f"{run.path} is complete: {goes_on} goes on, another --workdir starts anew")
        return 0
    checkpoints.require_room()
    forms = trainer.forms()

    # ---------------------------------------------------------------------------------------- what is about to happen
    cause = os.environ.get("LUMINA_RESTART_CAUSE", "")  # from `lumina run`
    where: dict[str, Any] = {**trainer.versions, "devices": trainer.device, "process": os.getpid()}
    events.write("started", start, command=sys.argv, **where, **({"restarted_because": cause} if cause else {}))
    if origin and origin.new:
        events.write("begun", start, origin.says, begun_from=origin.record)
        if writes:
            origin.copy_ledger(run)
    for says in report.read_again(text) if start == 0 else []:
        events.write("read again", start, says)
    for change in changes:
        events.write("changed", start, f"changed from step {start} on: {change}")
    if writes:
        run.record(asked, data, tokenizer)
    peak = trainer.peak()
    console.say(report.opening(config, run, text, start, trainer.device, peak, forms))
    backend = trainer.backend(text, start, writes, console, lambda: loop.aside())

    # ------------------------------------------------------------------------------------------------------- the loop
    fingerprints: Record = {
        "config": config_fingerprint(asked),
        "tokenizer": tokenizer.fingerprint,
        "data": data["fingerprint"],
    }
    if origin:
        fingerprints["begun_from"] = origin.record
    loop = Loop(config, run, backend, text.train, checkpoints, restored, console, events, fingerprints, peak)
    del restored  # its arrays are the loop's to give away
    outcome = loop.run()
    if outcome == "stopped":
        again = shlex.join([sys.executable, "-m", f"{framework.program}.train", *sys.argv[1:]])
        console.say(f"all is saved; this goes on where it stopped:\n  {again}")
        return OUTPUT_CLOSED if console.closed and not loop.asked else STOPPED_AND_SAVED

    # ----------------------------------------------------------------------------------------------------- the result
    if outcome == "stopped early":
        console.say(f"stopped early: {config.train.early_stopping} evaluations without improvement")
    samples = loop.sample(SAMPLES)
    if writes:
        progress, step = loop.progress, loop.step
        result = {"step": step, "stopped_early": outcome == "stopped early", "held_out": progress.last}
        result["best_step"] = progress.best_step
        if config.train.eval_rows == 0:
            result["compressors"] = report.compressors(report.evaluated_text(text))
        result["samples"] = samples
        run.write_result(result)
        events.write("finished", step)
        report.print_result(run, result)
        checkpoints.close(wait_for_backup=True)
    return 0


def _with_its_tokenizer(config: Config, run: RunDirectory, origin: Origin | None, say: Callable[[str], None]) -> Config:
    """`config` with the tokenizer of the weights that the run begins from, where it would have one trained."""
    path = origin.tokenizer(run) if origin and config.data.tokenizer == "bpe" else None
    if origin is None or path is None:
        return config
    if origin.new:
        say(f"data.tokenizer = 'bpe': the one of {origin.record['path']}, which its weights were trained with")
    return with_tokenizer(config, str(path))


def require_possible(framework: Framework, config: Config) -> None:
    """Raise a ConfigError where `config` asks for what only the other framework has."""
    for name, value, choices in (
        ("train.compute_dtype", config.train.compute_dtype, framework.dtypes),
        ("model.attention_form", config.model.attention_form, framework.attention),
        ("model.moe.grouped_form", config.model.moe.grouped_form, framework.grouped),
        ("train.remat", config.train.remat, framework.remat),
        ("optim.moment_dtype", config.optim.moment_dtype, framework.moments),
        ("optim.offload", config.optim.offload, framework.offload),
    ):
        if value not in choices:
            raise ConfigError(f"{name} = {value!r}: not in {framework.program}, which has {', '.join(map(str, choices))}")


def run_command(framework: Framework, train: Callable[[Config, Path, bool], int]) -> None:
    """The command `python -m PROGRAM.train`: parse, train, exit."""
    try:
        code = train(*parse(f"{framework.program}.train", sys.argv[1:]))
    except (LuminaError, BrokenPipeError):
        raise
    except Exception:  # what failed may have left threads that never end, and an exit in order would wait for them
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.exit(code)
