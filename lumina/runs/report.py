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

import numpy as np

from lumina.architecture import at_capacity, at_length, counts, depth_capacity_at, layer_kinds
from lumina.config import Config, TrainConfig
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
from lumina.runs.text import Text
from lumina.runs.units import flops_per_second, gib, si
from lumina.stages import sources, spelled, stages


def opening(config: Config, run: RunDirectory, text: Text, start: int, device: str, peak: float, forms: str) -> str:
    """The table that a run begins with: what is about to happen, and what was chosen and why.

    `device`, `peak` (FLOP/s of matrix products) and `forms` (of kernels, with reasons) are the backend's to say.
    """
    sizes = Sizes(*(max(1, getattr(config.mesh, axis)) for axis in AXES))
    count, needed, train, model = counts(config), footprint(config, sizes), config.train, config.model
    each = " on each device" if sizes.devices > 1 else ""
    kinds = layer_kinds(model)
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
            *_reading(config, text),
            ("chosen", "\n".join(chosen)),
        ]
    )


def _reading(config: Config, text: Text) -> list[tuple[str, str]]:
    """The rows of the opening table about what is read."""
    train, course = config.train, text.train
    data = [
        f"{source}: {si(corpus.train.num_tokens)} tokens to train on, {si(corpus.held_out.num_tokens)} held out; "
        f"{text.tokenizer.name}, {sum(corpus.manifest['rejects']['counts'].values())} records rejected"
        for source, corpus in text.corpora.items()
    ]
    lengths = list(dict.fromkeys(stage.sequence_length for stage in text.stages))
    batches = ", ".join(f"{train.batch_size} rows x {T} = {train.batch_size * T:,} tokens" for T in lengths)
    epochs = course.epochs()
    read = [f"{epochs[n]:.2f} epochs" + (f" of {name}" if len(epochs) > 1 else "") for n, name in enumerate(text.corpora)]
    several = len(text.stages) > 1 or len(text.corpora) > 1
    return [
        ("data", "\n".join(data)),
        ("batch", batches + (f" in {train.micro_batches} micro-batches" if train.micro_batches > 1 else "")),
        ("steps", f"{train.steps:,}: {si(course.positions(0, train.steps))} tokens, {', '.join(read)}"),
        *([("stages", "\n".join(map(str, text.stages)))] if several else []),
    ]


def read_again(text: Text) -> list[str]:
    """What to say before a run of each source that a stage reads in rows of another length than a stage before it."""
    names = list(text.corpora)
    return [
        f"stage {number + 1} of {len(text.stages)} begins {names[source]} anew, in rows of {stage.sequence_length:,}: about "
        f"{si(count)} tokens of what stages before it read in rows of another length are read again"
        for number, stage in enumerate(text.stages)
        for source, count in text.train.again(number).items()
    ]


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
        self.stages, self.sources = stages(config), sources(config)
        self.flops_at = functools.cache(lambda capacity, T: counts(at_length(at_capacity(config, capacity), T)).training_flops)
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
        many in a row), row_numbers, warnings (of the routers), began (what to say of a new stage) and stop (whether a process
        was asked to)."""
        before, self.pending = self.pending, None
        return self._report(before)

    def _report(self, dispatched: tuple[int, Any, bool] | None) -> dict[str, Any] | None:
        if dispatched is None:
            return None
        step, metrics, update = dispatched
        metrics = self.fetch(metrics)
        T, loss = self.batches.sequence_length(step - 1), float(metrics["loss"])
        speed = self.rate.step(self.config.train.batch_size * T)
        record = {
            "step": step,
            "loss": loss,
            "bits_per_byte": loss * int(metrics["text_tokens"]) / math.log(2) / max(int(metrics["text_bytes"]), 1),
            **{name: float(metrics[name]) for name in ("accuracy", "learning_rate", "gradient_norm")},
            **({"loss_scale": float(metrics["loss_scale"])} if "loss_scale" in metrics else {}),
            "tokens_per_second": speed,
            "peak_fraction": speed * self.flops_at(depth_capacity_at(self.config.model.mod, step - 1), T) / self.peak,
            **self._of_stage(step),
        }
        logged = step % self.config.monitor.log_every == 0 or step == self.config.train.steps
        numbers, skipped = self.batches.row_numbers(step - 1), int(metrics["skipped"]) if update else 0
        began = self._begins(step)
        if self.ledger is not None:
            if began:
                stage = self.batches.stage(step - 1)
                of_stage: dict[str, Any] = {"sequence_length": T, "mixture": spelled(self.stages[stage].mixture)}
                if again := self.batches.again(stage):
                    of_stage["read_again"] = {self.sources[source]: count for source, count in again.items()}
                self.ledger.append({"step": step, "stage": stage + 1, **of_stage})
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
        left = self.batches.positions(step, self.config.train.steps) / speed if speed else math.inf
        self.console.progress({**record, "seconds_left": left}, logged)
        decisive = {name: record[name] for name in ("step", "loss", "gradient_norm")}
        told = {"warnings": warnings, "stop": bool(metrics["stop"]), "began": began}
        return {**decisive, "skipped": skipped, "row_numbers": self._named(numbers), **told}

    def judged(self, result: dict[str, Any], stage: int) -> float:
        """The held-out loss that a stage is judged by: that of the sources that it reads, each as much as the mixture says."""
        if "sources" not in result:
            return float(result["loss"])
        losses, mixture = result["sources"], dict(self.stages[stage].mixture)
        return float(sum(weight * losses[source]["loss"] for source, weight in mixture.items()) / sum(mixture.values()))

    def _named(self, numbers: np.ndarray) -> list[Any]:
        """Rows as a person can find them: with their source where there are several."""
        found = self.batches.origins(numbers)
        return [row if len(self.sources) == 1 else f"{row} of {self.sources[source]}" for source, row in found]

    def _begins(self, step: int) -> str:
        """What to say of a stage, not the first, that begins with step `step`; nothing of any other step."""
        stage = self.batches.stage(step - 1)
        if step == 1 or self.batches.stage(step - 2) == stage:
            return ""
        return f"step {step}: stage {stage + 1} of {len(self.stages)} begins: {self.stages[stage]}"

    def _of_stage(self, step: int) -> dict[str, float]:
        """Where there are several stages: which one, and its row length; several sources: the share of its rows from each."""
        found: dict[str, float] = {}
        if len(self.stages) > 1:
            found |= {"stage": self.batches.stage(step - 1) + 1, "sequence_length": self.batches.sequence_length(step - 1)}
        if len(self.sources) > 1:
            taken = self.batches.taken(step - 1)
            found |= {f"mixture/{self.sources[n]}": count / sum(taken.values()) for n, count in taken.items()}
        return found


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


def evaluated_text(text: Text) -> bytes:
    """The very bytes that an evaluation of all rows counts: those of its targets."""
    found = []
    for batches in text.held_out.values():
        whole = Batches(batches.rows, batches.batch_size, seed=0, shuffle=False)  # the rows of all processes
        tokens = [batch["targets"][batch["weights"] > 0] for batch in whole.evaluation()]
        found.append(text.tokenizer.decode_bytes(np.concatenate(tokens)))
    return b"".join(found)


def figures(result: dict[str, Any]) -> str:
    """An evaluation in one line."""
    parts = result.get("sources", {}).items()
    each = "".join(f"; {name}: loss {of['loss']:.4f}, bits/byte {of['bits_per_byte']:.3f}" for name, of in parts)
    return (
        f"loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}, bits/byte {result['bits_per_byte']:.3f}, "
        f"accuracy {100 * result['accuracy']:.1f}% over {result['tokens']:,} tokens{each}"
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
