"""Train a model: python -m lumina_jax.train --config configs/debug.py --workdir runs/debug

The story, in order: the run and its data, the model, what is about to happen, the loop, the result.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from lumina.config import Config
from lumina.data import prepare
from lumina.data.loader import prefetch
from lumina.data.rows import Batches, Rows
from lumina.errors import exit_with
from lumina.flags import parse
from lumina.runs.console import Console, printable
from lumina.runs.directory import RunDirectory
from lumina.runs.metrics import MetricsLog

SAMPLES = 3  # continuations printed at the end


def train_and_evaluate(config: Config, workdir: Path) -> None:
    """Train as `config` says, in `workdir`; a run found there goes on from its newest checkpoint."""
    console = Console(config.train.steps)

    # ------------------------------------------------------------------------------------------ the run and its data
    run = RunDirectory(workdir)
    run.require_writable()
    run.check_same_config(config)
    corpus = prepare(config.data, config.model.vocab_size, console.status)
    console.done()
    run.check_same_data(corpus.fingerprint)
    end, T = corpus.document_end_id, config.data.sequence_length
    train_batches = Batches(Rows(corpus.train, T, end), config.train.batch_size, config.train.seed)
    rows_at_once = config.train.batch_size // config.train.micro_batches
    held_out = Batches(Rows(corpus.held_out, T, end), rows_at_once, seed=0, shuffle=False)
    token_bytes = corpus.tokenizer.token_bytes()

    # ------------------------------------------------------------------------------- the model, new or where it stopped
    import jax  # from here on: a mistake above is told in the second that importing it would take

    from lumina.runs import report
    from lumina_jax.checkpoint import Checkpoints
    from lumina_jax.device import describe, matmul_peak
    from lumina_jax.evaluate import evaluate
    from lumina_jax.generate import Generator, Sampling
    from lumina_jax.step import TrainState, controls, init_state, make_eval_step, make_train_step, state_shapes

    shapes, graphdef = state_shapes(config)
    checkpoints = Checkpoints(run, config.checkpoint)
    progress: dict[str, Any] = {"best_loss": None, "best_step": None, "evaluations_without_improvement": 0}
    if checkpoints.latest_step is None:
        run.begin(config, corpus.manifest | {"fingerprint": corpus.fingerprint}, corpus.tokenizer)
        state = jax.jit(lambda: init_state(config)[1])()
    else:
        state, progress = checkpoints.restore(shapes)
    start = int(state.step)
    if result := report.finished(run, config.train, start):
        report.print_result(run, result)
        goes_on = "--config.train.early_stopping=0" if result["stopped_early"] else "a larger --config.train.steps"
        console.say(f"{run.path} is complete: {goes_on} goes on, another --workdir starts anew")
        checkpoints.close()
        return

    # ---------------------------------------------------------------------------------------- what is about to happen
    peak = matmul_peak(config.train.compute_dtype)
    console.say(report.opening(config, run, corpus, train_batches, start, describe(), peak))
    console.status("compiling the training step")
    began = time.perf_counter()
    eval_step = jax.jit(make_eval_step(config, graphdef))
    train_step = jax.jit(make_train_step(config, graphdef), donate_argnums=0)
    compiled_step = train_step.lower(state, train_batches.batch(start), controls(config)).compile()
    console.say(f"compiled in {time.perf_counter() - began:.1f} s")
    log = MetricsLog(run, config.monitor, start)
    reporter = report.Reporter(config, run, console, log, train_batches, token_bytes, peak, jax.device_get)

    def look(state: TrainState, step: int) -> bool:
        """Evaluate, keep the best, and say whether to stop early."""
        result = evaluate(eval_step, state.variables, held_out, token_bytes, config.train.eval_rows)
        log.write("eval", {"step": step, **result})
        console.say(f"step {step}: held out {report.figures(result)}")
        progress.update(last=result, last_step=step)
        progress["evaluations_without_improvement"] += 1
        if progress["best_loss"] is None or result["loss"] < progress["best_loss"]:
            progress.update(best_loss=result["loss"], best_step=step, evaluations_without_improvement=0)
            checkpoints.save_best(step, state, progress)
        return 0 < config.train.early_stopping <= progress["evaluations_without_improvement"]

    def sample(state: TrainState, step: int, count: int) -> list[str]:
        """Continuations of the config's prompt, also kept in samples/."""
        generator = Generator(config, graphdef, state.variables, corpus.tokenizer)
        prompt = config.monitor.sample_prompt
        length = min(config.monitor.sample_tokens, generator.room(prompt))
        samples = [prompt + "".join(generator.text(prompt, length, Sampling(seed=seed))) for seed in range(count)]
        run.samples.mkdir(exist_ok=True)
        (run.samples / f"{step}.txt").write_text("\n---\n".join(samples) + "\n", encoding="utf-8")
        return samples

    # ------------------------------------------------------------------------------------------------------- the loop
    step, stop = start, 0 < config.train.early_stopping <= progress["evaluations_without_improvement"]
    for number, batch in prefetch(train_batches, start, start if stop else config.train.steps):
        state, metrics = compiled_step(state, batch, controls(config))
        step = number + 1
        reporter.dispatched(step, batch, metrics)  # reads the metrics of the step before, while this one computes
        last = step == config.train.steps
        evaluating = last or (config.train.eval_every > 0 and step % config.train.eval_every == 0)
        sampling = not last and config.monitor.sample_every > 0 and step % config.monitor.sample_every == 0
        saving = last or step % config.checkpoint.every == 0
        if evaluating or sampling or saving:
            reporter.flush()
            stop = look(state, step) if evaluating else False
            if sampling:
                console.say(printable(sample(state, step, 1)[0]))
            if saving or stop:
                checkpoints.save(step, state, progress)
            reporter.pause()
        if stop:
            console.say(f"stopped early: {config.train.early_stopping} evaluations without improvement")
            break
    if progress.get("last_step") != step:  # no step was left to make, and none evaluated the last one
        look(state, step)
    console.done()
    checkpoints.wait()

    # ----------------------------------------------------------------------------------------------------- the result
    result = {"step": step, "stopped_early": stop, "held_out": progress["last"], "best_step": progress["best_step"]}
    if config.train.eval_rows == 0:
        result["compressors"] = report.compressors(report.evaluated_text(corpus, held_out))
    result["samples"] = sample(state, step, SAMPLES)
    run.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report.print_result(run, result)
    log.close()
    checkpoints.close()


def main() -> None:
    """Entry point of `python -m lumina_jax.train`."""
    config, workdir = parse("lumina_jax.train", sys.argv[1:])
    train_and_evaluate(config, workdir)


if __name__ == "__main__":
    exit_with(main)
