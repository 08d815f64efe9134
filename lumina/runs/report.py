"""What a trainer tells: the table at the start, each step's record, the result. The same words whatever the backend."""

import functools
import gzip
import json
import lzma
import math
import struct
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from lumina.architecture import at_capacity, counts, depth_capacity_at, layer_kinds
from lumina.config import Config, TrainConfig
from lumina.data import Corpus
from lumina.data.rows import Batches
from lumina.footprint import footprint
from lumina.mesh import AXES, Sizes
from lumina.runs.console import Console, Rate, printable, table
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import Journal
from lumina.runs.library import kind, last_lines
from lumina.runs.metrics import MetricsLog
from lumina.runs.progress import Progress
from lumina.runs.routing import RECENT, ExpertWatch
from lumina.runs.units import flops_per_second, gib, si


def opening(config: Config, run: RunDirectory, corpus: Corpus, start: int, device: str, peak: float, forms: str) -> str:
    """The table that a run begins with: what is about to happen, and what was chosen and why.

    `device`, `peak` (FLOP/s of matrix products) and `forms` (of kernels, with reasons) are the backend's to say.
    """
    sizes = Sizes(*(max(1, getattr(config.mesh, axis)) for axis in AXES))
    count, needed, train, model = counts(config), footprint(config, sizes), config.train, config.model
    each = " on each device" if sizes.devices > 1 else ""
    kinds = layer_kinds(model)
    tokens = train.batch_size * config.data.sequence_length
    epochs = train.steps * tokens / corpus.train.num_tokens
    manifest = corpus.manifest
    chosen = [forms]
    if any(kind.startswith("moe") for kind in kinds):
        capacity = f"capacity {model.moe.capacity_factor:g} a row" if model.moe.dispatch == "capacity" else "dropless"
        chosen.append(f"experts: {capacity} in training, dropless in evaluation")
    if any(kind.endswith("mod") for kind in kinds):
        mod = model.mod
        falls = f"{100 * mod.start_capacity:g} falling to " if mod.anneal_steps else ""
        what = "layer" if mod.scope == "block" else "feed-forward"
        chosen.append(f"depth: {falls}{100 * mod.capacity:g}% of a row take a {what} in training, causal in evaluation")
    return table(
        [
            ("run", f"{run.path}, {'from step ' + str(start) if start else 'new'}"),
            ("device", f"{device}; matmul peak {flops_per_second(peak)} in {train.compute_dtype}"),
            ("layers", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))),
            (
                "parameters",
                f"{si(count.mean_active)} mean active, {si(count.most_active)} most active, {si(count.total)} total",
            ),
            ("FLOPs a token", f"{si(count.forward_flops)} forward, {si(count.training_flops)} training"),
            (
                "memory",
                f"{gib(needed.total)} expected{each}: parameters {gib(needed.parameters)}, gradients {gib(needed.gradients)}, "
                f"optimizer {gib(needed.optimizer)}, activations {gib(needed.activations)}, "
                f"temporaries {gib(needed.temporaries)}",
            ),
            (
                "data",
                f"{config.data.source}: {si(corpus.train.num_tokens)} tokens to train on, "
                f"{si(corpus.held_out.num_tokens)} held out; "
                f"{manifest['tokenizer']['name']}, {sum(manifest['rejects']['counts'].values())} records rejected",
            ),
            (
                "batch",
                f"{train.batch_size} rows x {config.data.sequence_length} = {tokens:,} tokens"
                + (f" in {train.micro_batches} micro-batches" if train.micro_batches > 1 else ""),
            ),
            ("steps", f"{train.steps:,}: {si(train.steps * tokens)} tokens, {epochs:.2f} epochs"),
            ("chosen", "\n".join(chosen)),
        ]
    )


class Reporter:
    """Turns each step's metrics into the live line, metrics.jsonl and the ledger, one step late: the device never waits."""

    def __init__(
        self,
        config: Config,
        console: Console,
        log: MetricsLog | None,
        ledger: Journal | None,
        batches: Batches,
        peak: float,
        fetch: Callable[[Any], Any],
    ):
        """`fetch` brings a step's metrics from the device to the host as numpy arrays. Without `log` and `ledger`, in all
        processes but the first, nothing is written."""
        self.config, self.console, self.log, self.ledger, self.batches = config, console, log, ledger, batches
        self.peak, self.fetch = peak, fetch
        self.tokens = config.train.batch_size * config.data.sequence_length
        self.flops_at = functools.cache(lambda capacity: counts(at_capacity(config, capacity)).training_flops)
        self.rate = Rate()
        self.pending: tuple[int, Any, bool] | None = None  # step, metrics, update
        self.watch = ExpertWatch(config, _recent(log) if log else [])

    def dispatched(self, step: int, metrics: Any, update: bool) -> dict[str, Any] | None:
        """Step `step` is under way, with an update or passing over its batch; report the one before it, as `flush` does."""
        before, self.pending = self.pending, (step, metrics, update)
        return self._report(before)

    def forget(self) -> None:
        """The step under way does not count."""
        self.pending = None

    def pause(self) -> None:
        """What comes until the next step is not training, and does not count in the rate."""
        self.rate.pause()

    def flush(self) -> dict[str, Any] | None:
        """Report the step under way, waiting for it. Returns what the loop decides by: step, loss, gradient_norm, skipped (how
        many in a row), row_numbers, warnings (of the routers), and stop (whether a process was asked to)."""
        before, self.pending = self.pending, None
        return self._report(before)

    def _report(self, dispatched: tuple[int, Any, bool] | None) -> dict[str, Any] | None:
        if dispatched is None:
            return None
        step, metrics, update = dispatched
        metrics = self.fetch(metrics)
        speed = self.rate.step(self.tokens)
        loss = float(metrics["loss"])
        record = {
            "step": step,
            "loss": loss,
            "bits_per_byte": loss * self.tokens / math.log(2) / max(int(metrics["text_bytes"]), 1),
            **{name: float(metrics[name]) for name in ("accuracy", "learning_rate", "gradient_norm")},
            **({"loss_scale": float(metrics["loss_scale"])} if "loss_scale" in metrics else {}),
            "tokens_per_second": speed,
            "peak_fraction": speed * self.flops_at(depth_capacity_at(self.config.model.mod, step - 1)) / self.peak,
        }
        logged = step % self.config.monitor.log_every == 0 or step == self.config.train.steps
        numbers, skipped = self.batches.row_numbers(step - 1), int(metrics["skipped"]) if update else 0
        if self.ledger is not None:
            rows = sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]
            overflowed = not math.isfinite(record["gradient_norm"])  # float16, whose scale was halved instead of a skip
            why = "passed over" if not update else "skipped" if skipped else "overflowed" if overflowed else ""
            without = {"update": why} if why else {}
            self.ledger.append({"step": step, "loss": struct.pack(">f", loss).hex(), "rows": rows, **without})
        warnings: list[str] = []
        if logged and self.log is not None:
            complete = {**record, **_routing(metrics)}
            self.log.write("train", complete)
            warnings = self.watch.warnings(complete)
        left = (self.config.train.steps - step) * self.tokens / speed if speed else math.inf
        self.console.progress({**record, "seconds_left": left}, logged)
        decisive = {name: record[name] for name in ("step", "loss", "gradient_norm")}
        told = {"warnings": warnings, "stop": bool(metrics["stop"])}
        return {**decisive, "skipped": skipped, "row_numbers": numbers.tolist(), **told}


def _recent(log: MetricsLog) -> list[dict[str, Any]]:
    """The newest train records of a run that goes on, as many as a warning is about."""

    def train(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [record for record in records if kind(record) == "train"]

    return train(last_lines(log.path, lambda records: len(train(records)) >= RECENT).records)


def _routing(metrics: dict[str, Any]) -> dict[str, list]:
    """The routers' metrics by layer: of experts their load (share of choices, all zero without any), of depth its capacity."""
    flat = {}
    for group in ("moe", "mod"):
        for name, values in metrics.get(group, {}).items():
            if name == "load_A":
                flat[f"{group}_load"] = (values / values.sum(axis=-1, keepdims=True).clip(min=1)).tolist()
            else:
                flat[f"{group}_{name}"] = values.tolist()
    return flat


def compressors(text: bytes) -> dict[str, float]:
    """Bits a byte that general compressors need for the same text, which they may read as a whole."""
    return {
        "gzip -9": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz -9": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def evaluated_text(corpus: Corpus, held_out: Batches) -> bytes:
    """The very bytes that an evaluation of all rows counts: those of its targets."""
    tokens = corpus.held_out.read(1, len(held_out.rows) * held_out.rows.sequence_length + 1)
    return corpus.tokenizer.decode_bytes(tokens)


def figures(result: dict[str, Any]) -> str:
    """An evaluation in one line."""
    return (
        f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}, bits/byte {result['bits_per_byte']:.3f}, "
        f"accuracy {100 * result['accuracy']:.1f}% over {result['tokens']:,} tokens"
    )


def finished(run: RunDirectory, train: TrainConfig, step: int, progress: Progress) -> dict[str, Any] | None:
    """The result of a run that has nothing left to do at `step`, where it has made this progress."""
    if not run.result.is_file():
        return None
    result = json.loads(run.result.read_text(encoding="utf-8"))
    enough = step >= train.steps or progress.without_improvement(train.early_stopping)
    return result if result["step"] == step and enough else None


def print_result(run: RunDirectory, result: dict[str, Any]) -> None:
    """Samples, held-out figures beside the compressors', and the next command."""
    for number, sample in enumerate(result["samples"], 1):
        print(f"\n--- sample {number} " + "-" * 60 + f"\n{printable(sample)}")
    print("-" * 73)
    held_out = result["held_out"]
    print(f"step {result['step']}, held out: {figures(held_out)}")
    if "compressors" in result:
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in result["compressors"].items())
        print(f"bits/byte of the same {held_out['bytes']:,} bytes: this model {held_out['bits_per_byte']:.3f}, {others}")
    print(f'next: .venv/bin/lumina sample {run.path} --prompt "class Stack:"')
