"""Train a model: python -m lumina_jax.train --config configs/debug.py --workdir runs/debug

The story, in order: the run and its data, the model, what is about to happen, the loop (`lumina.runs.loop`), the result.
"""

import json
import os
import shlex
import sys
import time
import traceback
from contextlib import ExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from lumina.architecture import at_capacity, depth_capacity_at
from lumina.config import Config, to_dict
from lumina.data import prepare
from lumina.data.rows import Batches, Rows
from lumina.errors import OUTPUT_CLOSED, STOPPED_AND_SAVED, ConfigError, LuminaError, exit_with
from lumina.flags import parse
from lumina.runs.console import Console
from lumina.runs.directory import Events, RunDirectory, config_fingerprint
from lumina.runs.lock import RunLock
from lumina.runs.progress import Progress

SAMPLES = 3  # continuations printed at the end


def train_and_evaluate(config: Config, workdir: Path, accept_changes: bool = False) -> int:
    """Train as `config` says, in `workdir`; a run found there goes on from its newest checkpoint.

    Returns the exit code: 0 when done, 75 when a signal stopped it and all is saved.
    """
    with ExitStack() as resources:
        return _train_and_evaluate(config, RunDirectory(workdir), accept_changes, resources)


def _train_and_evaluate(config: Config, run: RunDirectory, accept_changes: bool, resources: ExitStack) -> int:
    # ------------------------------------------------------------------------------------------ the run and its data
    writes = (os.environ.get("JAX_PROCESS_ID") or "0") == "0"  # of several processes one writes and speaks
    console = Console(config.train.steps, sys.stderr if writes else None)
    backup = None
    if writes:
        run.require_writable()
        resources.callback(RunLock(run.lock).release)
        if config.checkpoint.backup_dir:
            from lumina.runs.backup import Backups

            backup = Backups(run, config.checkpoint).make
    run.check_same_config(config, accept_changes)
    corpus = prepare(config.data, config.model.vocab_size, console.status)
    console.done()
    data = corpus.manifest | {"fingerprint": corpus.fingerprint}
    run.check_same_data(data, accept_changes)
    changes = run.changes(config) + run.data_changes(data)
    if len(corpus.tokenizer.encode(config.monitor.sample_prompt)) >= config.data.sequence_length:
        raise ConfigError(f"monitor.sample_prompt = {config.monitor.sample_prompt!r}: must leave room for an answer in a row")

    # ------------------------------------------------------------------------------- the model, new or where it stopped
    import jax  # from here on: a mistake above is told in the second that importing it would take

    from lumina.generation import Sampling
    from lumina.runs import report
    from lumina.runs.loop import Backend, Loop
    from lumina_jax.allocator import keep_large_buffers
    from lumina_jax.checkpoint import Checkpoints
    from lumina_jax.device import chosen_forms, describe, matmul_peak
    from lumina_jax.evaluate import evaluate
    from lumina_jax.generate import Generator
    from lumina_jax.mesh import agreed, join, make_mesh, own_copy, place_rows, require_same, shaped_whole, whole
    from lumina_jax.step import TrainState, controls, init_state, make_eval_step, make_train_step, state_shapes

    buffers = keep_large_buffers()
    join()
    require_same("the config", sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest())
    require_same("the data (data.source, data.tokenizer, Python's version)", corpus.fingerprint)
    mesh, part = make_mesh(config), (jax.process_index(), jax.process_count())
    end, T, train = corpus.document_end_id, config.data.sequence_length, config.train
    train_batches = Batches(Rows(corpus.train, T, end), train.batch_size, train.seed, part=part)
    rows_at_once = train.batch_size // train.micro_batches
    held_out = Batches(Rows(corpus.held_out, T, end), rows_at_once, seed=0, shuffle=False, part=part)
    token_bytes = corpus.tokenizer.token_bytes()
    shapes, graphdef = state_shapes(config)
    events = Events(run if writes else None, console.say)
    checkpoints = Checkpoints(run, config.checkpoint, events, shaped_whole(mesh, shapes), backup)
    resources.callback(checkpoints.close)
    restored = checkpoints.restore()
    start, progress = (int(restored[0].step), Progress(**restored[1]["progress"])) if restored else (0, Progress())
    result = report.finished(run, train, start, progress)
    if agreed(result is not None):
        if writes and result:
            report.print_result(run, result)
        goes_on = "--config.train.early_stopping=0" if result and result["stopped_early"] else "a larger --config.train.steps"
        console.say(f"{run.path} is complete: {goes_on} goes on, another --workdir starts anew")
        return 0
    checkpoints.require_room()
    forms = f"{chosen_forms(config)}; {buffers}"

    # ---------------------------------------------------------------------------------------- what is about to happen
    cause = os.environ.get("LUMINA_RESTART_CAUSE", "")  # from `lumina run`
    where: dict[str, Any] = {"jax": jax.__version__, "devices": describe(mesh), "process": os.getpid()}
    events.write("started", start, command=sys.argv, **where, **({"restarted_because": cause} if cause else {}))
    for change in changes:
        events.write("changed", start, f"changed from step {start} on: {change}")
    if writes:
        run.record(config, data, corpus.tokenizer)
    peak = matmul_peak(train.compute_dtype) * (1 if jax.default_backend() == "cpu" else mesh.size)
    console.say(report.opening(config, run, corpus, start, describe(mesh), peak, forms))
    eval_step = jax.jit(make_eval_step(config, graphdef, token_bytes, mesh))

    def inputs(batch: dict[str, Any], update: bool, stop: bool) -> tuple[Any, Any]:
        asked_N = place_rows(mesh, np.full(len(mesh.local_devices), stop, np.int32))
        return place_rows(mesh, batch), controls(config, update, asked_N)

    fresh = jax.jit(lambda: init_state(config)[1], out_shardings=whole(mesh))
    sizes = shaped_whole(mesh, shapes)

    def compile_step(capacity: float) -> Any:
        """The step at a depth capacity, which may be annealed."""
        console.status("compiling the training step")
        began, stage = time.perf_counter(), at_capacity(config, capacity)
        step = jax.jit(make_train_step(stage, state_shapes(stage)[1], mesh, token_bytes), donate_argnums=0)
        compiled = step.lower(sizes, *inputs(train_batches.batch(0), True, False)).compile()
        at = f" for a depth capacity of {capacity:g}" if config.model.mod.anneal_steps else ""
        console.say(f"compiled in {time.perf_counter() - began:.1f} s{at}")
        return compiled

    first = depth_capacity_at(config.model.mod, start)
    compiled = {first: compile_step(first)}  # before anything is said to have begun

    def train_step(number: int, state: TrainState, batch: dict[str, Any], update: bool, stop: bool) -> tuple[Any, Any]:
        capacity = depth_capacity_at(config.model.mod, number)
        if capacity not in compiled:
            with loop.aside():
                compiled[capacity] = compile_step(capacity)
        return compiled[capacity](state, *inputs(batch, update, stop))

    # ------------------------------------------------------------------------------------------------------- the loop
    def held_out_loss(state: TrainState, alive: Any) -> dict[str, Any]:
        batches = (place_rows(mesh, batch) for batch in held_out.evaluation(train.eval_rows))
        return evaluate(eval_step, state.variables, batches, alive)

    def sample(state: TrainState, count: int) -> list[str]:
        generator = Generator(config, graphdef, own_copy(state.variables), corpus.tokenizer)
        prompt = config.monitor.sample_prompt
        length = min(config.monitor.sample_tokens, generator.room(prompt))
        return [prompt + "".join(generator.text(prompt, length, Sampling(seed=seed))) for seed in range(count)]

    backend = Backend(
        fresh=fresh,
        train_step=train_step,
        fetch=jax.device_get,
        steps_of=lambda state: int(state.step),
        evaluate=held_out_loss,
        sample=sample,
        processes=part[1],
        writes=writes,
    )
    fingerprints = {
        "config": config_fingerprint(config),
        "tokenizer": corpus.tokenizer.fingerprint,
        "data": corpus.fingerprint,
    }
    loop = Loop(config, run, backend, train_batches, checkpoints, restored, console, events, fingerprints, peak)
    del restored  # its arrays are the loop's to give away
    outcome = loop.run()
    if outcome == "stopped":
        again = shlex.join([sys.executable, "-m", "lumina_jax.train", *sys.argv[1:]])
        console.say(f"all is saved; this goes on where it stopped:\n  {again}")
        return OUTPUT_CLOSED if console.closed and not loop.asked else STOPPED_AND_SAVED

    # ----------------------------------------------------------------------------------------------------- the result
    if outcome == "stopped early":
        console.say(f"stopped early: {train.early_stopping} evaluations without improvement")
    if writes:
        progress, step = loop.progress, loop.step
        result = {"step": step, "stopped_early": outcome == "stopped early", "held_out": progress.last}
        result["best_step"] = progress.best_step
        if train.eval_rows == 0:
            result["compressors"] = report.compressors(report.evaluated_text(corpus, held_out))
        result["samples"] = loop.sample(SAMPLES)
        run.write_result(result)
        events.write("finished", step)
        report.print_result(run, result)
        checkpoints.close(wait_for_backup=True)
    return 0


def main() -> None:
    """Entry point of `python -m lumina_jax.train`."""
    try:
        code = train_and_evaluate(*parse("lumina_jax.train", sys.argv[1:]))
    except (LuminaError, BrokenPipeError):
        raise
    except Exception:  # what failed may have left threads that never end, and an exit in order would wait for them
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    sys.exit(code)


if __name__ == "__main__":
    exit_with(main)
