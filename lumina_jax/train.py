"""Train a model: python -m lumina_jax.train --config configs/debug.py --workdir runs/debug

The story, in order: the run and its data, the model, what is about to happen, the loop, the result.
"""

import json
import math
import struct
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lumina.architecture import counts, layer_kinds, memory
from lumina.config import Config
from lumina.data import Corpus, prepare
from lumina.data.loader import prefetch
from lumina.data.rows import Batches, Rows
from lumina.errors import exit_with
from lumina.flags import parse
from lumina.runs.console import Console, Rate, table
from lumina.runs.directory import RunDirectory, append_json
from lumina.runs.metrics import MetricsLog
from lumina.runs.units import gib, si
from lumina_jax.checkpoint import Checkpoints
from lumina_jax.device import describe, matmul_peak
from lumina_jax.evaluate import compressors, evaluate
from lumina_jax.generate import Generator, Sampling
from lumina_jax.step import TrainState, controls, init_state, make_eval_step, make_train_step, state_shapes

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
    end, T = corpus.tokenizer.control["<|document_end|>"], config.data.sequence_length
    train_batches = Batches(Rows(corpus.train, T, end), config.train.batch_size, config.train.seed)
    rows_at_once = config.train.batch_size // config.train.micro_batches
    held_out = Batches(Rows(corpus.held_out, T, end), rows_at_once, seed=0, shuffle=False)
    token_bytes = corpus.tokenizer.token_bytes()

    # ------------------------------------------------------------------------------- the model, new or where it stopped
    shapes, graphdef = state_shapes(config)
    checkpoints = Checkpoints(run, config.checkpoint)
    if checkpoints.latest_step is None:
        run.begin(config, corpus.manifest | {"fingerprint": corpus.fingerprint}, corpus.tokenizer)
        state = jax.jit(lambda: init_state(config)[1])()
        progress: dict[str, Any] = {"best_loss": None, "best_step": None, "evaluations_without_improvement": 0}
    else:
        state, progress = checkpoints.restore(shapes)
    start = int(state.step)
    finished = _finished(run, config, start)
    if finished:
        _say_finished(console, run, config, finished)
        checkpoints.close()
        return

    # ---------------------------------------------------------------------------------------- what is about to happen
    peak = matmul_peak(config.train.compute_dtype)
    print(_opening(config, run, corpus, train_batches, len(held_out.rows), start, peak), file=sys.stderr, flush=True)
    eval_step = jax.jit(make_eval_step(config, graphdef))
    began = time.perf_counter()
    console.status("compiling the training step")
    train_step = jax.jit(make_train_step(config, graphdef), donate_argnums=0)
    train_step = train_step.lower(state, train_batches.batch(0), controls(config)).compile()
    console.say(f"compiled in {time.perf_counter() - began:.1f} s")
    log = MetricsLog(run, config.monitor, start)

    # ------------------------------------------------------------------------------------------------------- the loop
    def look(state: TrainState, step: int) -> bool:
        """Evaluate, keep the best, and say whether to stop early."""
        result = evaluate(eval_step, state.variables, held_out, token_bytes, config.train.eval_rows)
        log.write("eval", {"step": step, **result})
        console.say(f"step {step}: held out {_figures(result)}")
        if progress["best_loss"] is None or result["loss"] < progress["best_loss"]:
            progress.update(best_loss=result["loss"], best_step=step, evaluations_without_improvement=0)
            checkpoints.save_best(step, state, progress)
        else:
            progress["evaluations_without_improvement"] += 1
        progress["last"] = result
        return 0 < config.train.early_stopping <= progress["evaluations_without_improvement"]

    reporter = _Reporter(config, console, log, run, train_batches, token_bytes, peak)
    step = start
    for step_number, batch in prefetch(train_batches, start, config.train.steps):
        state, metrics = train_step(state, batch, controls(config))
        step = step_number + 1
        reporter.dispatched(step, batch, metrics)  # reads the metrics of the step before, while this one computes
        last = step == config.train.steps
        evaluating = last or (config.train.eval_every and step % config.train.eval_every == 0)
        sampling = not last and config.monitor.sample_every and step % config.monitor.sample_every == 0
        stop = False
        if evaluating or sampling or step % config.checkpoint.every == 0:
            reporter.flush()
            stop = look(state, step) if evaluating else False
            if sampling:
                console.say(_sample(config, graphdef, state, corpus, run, step, 1)[0])
            if last or stop or step % config.checkpoint.every == 0:
                checkpoints.save(step, state, progress)
            reporter.pause()
        if stop:
            console.say(f"stopped early: {config.train.early_stopping} evaluations without improvement")
            break
    reporter.flush()
    console.done()
    checkpoints.wait()

    # ----------------------------------------------------------------------------------------------------- the result
    samples = _sample(config, graphdef, state, corpus, run, step, SAMPLES)
    result = {"step": step, "held_out": progress["last"], "best_step": progress["best_step"], "samples": samples}
    if config.train.eval_rows == 0:
        result["compressors"] = compressors(_evaluated_text(corpus, held_out))
    run.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _print_result(run, result)
    log.close()
    checkpoints.close()


class _Reporter:
    """Turns a step's metrics into the live line, metrics.jsonl and the ledger, one step late, so that fetching waits for nothing."""

    def __init__(self, config, console, log, run, batches, token_bytes, peak):
        self.config, self.console, self.log, self.run = config, console, log, run
        self.batches, self.token_bytes, self.peak = batches, token_bytes, peak
        self.tokens = config.train.batch_size * config.data.sequence_length
        self.flops = counts(config).training_flops
        self.rate = Rate()
        self.pending: tuple | None = None

    def dispatched(self, step: int, batch: dict[str, np.ndarray], metrics: Any) -> None:
        self.flush()
        self.pending = (step, int(self.token_bytes[batch["targets"]].sum()), metrics)

    def pause(self) -> None:
        self.rate.pause()

    def flush(self) -> None:
        if self.pending is None:
            return
        step, text_bytes, metrics = self.pending
        self.pending = None
        metrics = jax.device_get(metrics)
        speed = self.rate.step(self.tokens)
        record = {
            "step": step,
            "loss": float(metrics["loss"]),
            "bits_per_byte": float(metrics["loss"]) * self.tokens / math.log(2) / max(text_bytes, 1),
            "accuracy": float(metrics["accuracy"]),
            "learning_rate": float(metrics["learning_rate"]),
            "gradient_norm": float(metrics["gradient_norm"]),
            "tokens_per_second": speed,
            "peak_fraction": speed * self.flops / self.peak,
            "seconds_left": (self.config.train.steps - step) * self.tokens / speed if speed else math.inf,
        }
        logged = step % self.config.monitor.log_every == 0 or step == self.config.train.steps
        self.console.progress(record, logged)
        rows = sha256(self.batches.row_numbers(step - 1).astype("<i8").tobytes()).hexdigest()[:16]
        loss_bits = struct.pack(">f", record["loss"]).hex()
        append_json(self.run.ledger, {"step": step, "loss": loss_bits, "rows": rows})
        if logged:
            del record["seconds_left"]
            self.log.write("train", {**record, **_routing(metrics)})


def _routing(metrics: dict[str, Any]) -> dict[str, list]:
    """The routers' metrics by layer: of experts their load (share of choices) and drops, of depth its causal capacity."""
    flat = {}
    for group in ("moe", "mod"):
        for name, values in metrics.get(group, {}).items():
            if name == "load_E":
                name, values = "load", values / values.sum(axis=-1, keepdims=True)
            flat[f"{group}_{name}"] = values.tolist()
    return flat


def _opening(
    config: Config, run: RunDirectory, corpus: Corpus, batches: Batches, held_out_rows: int, start: int, peak: float
) -> str:
    count, needed, train = counts(config), memory(config), config.train
    kinds = layer_kinds(config.model)
    tokens = train.batch_size * config.data.sequence_length
    epochs = train.steps * train.batch_size / len(batches.rows)
    manifest = corpus.manifest
    rows = [
        ("run", f"{run.path}, {'from step ' + str(start) if start else 'new'}"),
        ("device", f"{describe()}; matmul peak {si(peak)}FLOP/s in {train.compute_dtype}"),
        ("layers", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))),
        ("parameters", f"{si(count.mean_active)} mean active, {si(count.most_active)} most active, {si(count.total)} total"),
        ("FLOPs a token", f"{si(count.forward_flops)} forward, {si(count.training_flops)} training"),
        (
            "memory",
            f"{gib(needed.total)} expected: weights {gib(needed.weights)}, gradients {gib(needed.gradients)}, "
            f"optimizer {gib(needed.optimizer)}, activations {gib(needed.activations)}",
        ),
        (
            "data",
            f"{config.data.source}: {si(corpus.train.num_tokens)} tokens to train on, {si(corpus.held_out.num_tokens)} held out; "
            f"{manifest['tokenizer']['name']}, {sum(manifest['rejects']['counts'].values())} records rejected",
        ),
        (
            "batch",
            f"{train.batch_size} rows x {config.data.sequence_length} = {tokens:,} tokens"
            + (f" in {train.micro_batches} micro-batches" if train.micro_batches > 1 else ""),
        ),
        ("steps", f"{train.steps:,}: {si(train.steps * tokens)} tokens, {epochs:.2f} epochs"),
        (
            "chosen",
            f"attention: chunked, in XLA (the only form yet); training dispatch: capacity {config.model.moe.capacity_factor:g}; "
            "evaluation: dropless, causal depth",
        ),
    ]
    return table(rows)


def _sample(
    config: Config, graphdef: Any, state: TrainState, corpus: Corpus, run: RunDirectory, step: int, count: int
) -> list[str]:
    """Continuations of the config's prompt, also kept in samples/."""
    generator = Generator(config, graphdef, state.variables, corpus.tokenizer)
    prompt = config.monitor.sample_prompt
    room = config.data.sequence_length - len(corpus.tokenizer.encode(prompt))
    length = min(config.monitor.sample_tokens, room)
    samples = [prompt + "".join(generator.text(prompt, length, Sampling(seed=seed))) for seed in range(count)]
    run.samples.mkdir(exist_ok=True)
    (run.samples / f"{step}.txt").write_text("\n---\n".join(samples) + "\n", encoding="utf-8")
    return samples


def _evaluated_text(corpus: Corpus, held_out: Batches) -> bytes:
    """The very bytes that `evaluate` counts: the targets of all held-out rows."""
    tokens = corpus.held_out.read(1, len(held_out.rows) * held_out.rows.sequence_length + 1)
    return corpus.tokenizer.decode_bytes(tokens)


def _figures(result: dict[str, Any]) -> str:
    return (
        f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}, bits/byte {result['bits_per_byte']:.3f}, "
        f"accuracy {100 * result['accuracy']:.1f}% over {result['tokens']:,} tokens"
    )


def _print_result(run: RunDirectory, result: dict[str, Any]) -> None:
    for number, sample in enumerate(result["samples"], 1):
        print(f"\n--- sample {number} " + "-" * 60 + f"\n{sample}")
    print("-" * 72)
    print(f"step {result['step']}, held out: {_figures(result['held_out'])}")
    if "compressors" in result:
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in result["compressors"].items())
        print(
            f"bits/byte of the same {result['held_out']['bytes']:,} bytes: this model {result['held_out']['bits_per_byte']:.3f}, {others}"
        )
    print(f'next: .venv/bin/lumina sample {run.path} --prompt "class Stack:"')


def _finished(run: RunDirectory, config: Config, step: int) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do."""
    if not run.result.is_file():
        return None
    result = json.loads(run.result.read_text(encoding="utf-8"))
    return result if result["step"] == step >= config.train.steps else None


def _say_finished(console: Console, run: RunDirectory, config: Config, result: dict[str, Any]) -> None:
    _print_result(run, result)
    console.say(
        f"{run.path} is complete at step {result['step']}: --config.train.steps={2 * config.train.steps} goes on, "
        "another --workdir starts anew"
    )


def main() -> None:
    """Entry point of `python -m lumina_jax.train`."""
    config, workdir = parse("lumina_jax.train", sys.argv[1:])
    train_and_evaluate(config, workdir)


if __name__ == "__main__":
    exit_with(main)
