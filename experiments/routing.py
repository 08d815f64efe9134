"""Does routing help? Small models on the embedded corpus, three seeds each, and a table with the spread.

    python experiments/routing.py --out runs/experiments            # some 45 minutes on two CPU cores
    python experiments/routing.py --out runs/experiments --only mod_block dense --seeds 1

Every figure is held-out bits per byte under causal routing. Runs are ordinary runs, resumed or left alone when they are there
already; the result is `table.md`, `results.json` and a PNG of the curves (`pip install 'lumina[plots]'`) in the directory.
Each run has one core to itself, as many at a time as there are cores.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from lumina.architecture import counts
from lumina.config import Config, load, override
from lumina.errors import LuminaError, exit_with

STEPS, SEEDS = 300, 3
ROOT = Path(__file__).resolve().parent.parent

# Four layers of debug's width, 2,048 tokens a step. The dense feed-forward is as wide as what a token takes of the experts.
SHAPE = [
    "--config.model.num_layers=4",
    "--config.model.d_ff=512",
    "--config.model.moe.pattern=none",
    "--config.model.mod.pattern=none",
    f"--config.optim.warmup_steps={STEPS // 10}",
    "--config.train.eval_rows=128",
    "--config.monitor.sample_every=0",
    "--config.monitor.log_every=25",
    "--config.monitor.tensorboard=False",
]
MOE = ["--config.model.moe.pattern=all", "--config.model.moe.dispatch=capacity"]
BLOCK = ["--config.model.mod.pattern=interleaved", "--config.model.mod.scope=block", "--config.model.mod.capacity=0.125"]
MOD = ["--config.model.mod.pattern=all", "--config.model.mod.capacity=0.5"]
DROPLESS = ["--config.model.moe.dispatch=dropless"]
# A top-1 gate begins near 1/8 and scales what its expert adds; this undoes half of that.
SCALED = ["--config.model.moe.route_scale=4"]
# At random the router is spared the auxiliary loss.
MODELS: dict[str, list[str]] = {
    "dense": [],
    "moe_top1": MOE,
    "moe_top1_scaled": [*MOE, *SCALED],
    "moe_top1_dropless": [*MOE, *DROPLESS],
    "moe_top2": [*MOE, "--config.model.d_ff=256", "--config.model.moe.num_experts=16", "--config.model.moe.top_k=2"],
    "moe_bias": [*MOE, "--config.model.moe.balance_weight=0", "--config.model.moe.bias_rate=0.001"],
    "mod_ffn": MOD,
    "mod_ffn_random": [*MOD, "--config.model.mod.router=random"],
    "mod_block": BLOCK,
    "mod_block_equal_flops": BLOCK,
    "mod_block_equal_time": BLOCK,
    "hybrid": [*MOE, *MOD],
    "hybrid_scaled": [*MOE, *MOD, *SCALED],
}


@dataclass
class Outcome:
    """What the runs of one model came to, a value a seed."""

    steps: int
    bits_per_byte: list[float] = field(default_factory=list)
    worst_load: list[float] = field(default_factory=list)  # largest share of an expert over the mean, of any layer, at the end
    curve: list[tuple[float, float]] = field(default_factory=list)  # (training FLOPs, bits per byte), mean over seeds


def config_of(name: str, steps: int = STEPS, seed: int = 0) -> Config:
    """The config of a model of this comparison."""
    return override(load("debug"), flags_of(name, steps, seed))


def flags_of(name: str, steps: int, seed: int) -> list[str]:
    return [
        *SHAPE,
        *MODELS[name],
        f"--config.train.steps={steps}",
        f"--config.train.seed={seed}",
        f"--config.train.eval_every={max(1, steps // 4)}",
        f"--config.checkpoint.every={steps}",
    ]


def steps_of(name: str, block_over_dense_time: Callable[[], float]) -> int:
    """Steps that a model trains: more where it is to spend as much as the dense one, and its steps are cheaper."""
    if name == "mod_block_equal_flops":
        return round(STEPS * counts(config_of("dense")).training_flops / counts(config_of(name)).training_flops)
    if name == "mod_block_equal_time":
        return round(STEPS / block_over_dense_time())
    return STEPS


def time_ratio(out: Path) -> float:
    """Step time of mod_block over dense, measured here once, on one core as the runs have it, and kept in the directory."""
    kept = out / "time_ratio.json"
    if not kept.is_file():
        print("measuring the step time of mod_block over dense", file=sys.stderr)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            kept.write_text(json.dumps({"mod_block_over_dense": pool.apply(_measure_ratio)}) + "\n", encoding="utf-8")
    return float(json.loads(kept.read_text(encoding="utf-8"))["mod_block_over_dense"])


def _measure_ratio() -> float:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from lumina_jax.allocator import keep_large_buffers

    keep_large_buffers()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from routing import stepper

    dense, block = stepper(config_of("dense")), stepper(config_of("mod_block"))
    return statistics.median([block() / dense() for _ in range(25)][5:])


def train(out: Path, name: str, steps: int, seed: int, core: int) -> Path:
    """Train one model on one core, or find it trained; returns its directory."""
    workdir = out / f"{name}-{seed}"
    command = [sys.executable, "-m", "lumina_jax.train", "--config", "debug", "--workdir", str(workdir)]
    with (out / f"{name}-{seed}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603
            [*command, *flags_of(name, steps, seed)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, {core})
        if process.wait():
            raise LuminaError(f"{workdir}: training ended with exit code {process.returncode}; see {log.name}")
    return workdir


def read(workdir: Path, steps: int) -> tuple[float, float, list[tuple[int, float]]]:
    """Final bits per byte, worst load of an expert over the mean, and the curve (step, bits per byte) of a finished run."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loads = [line["moe_load"] for line in lines if "moe_load" in line]
    worst = max((max(layer) * len(layer) for layer in loads[-1]), default=0.0) if loads else 0.0
    curve = [(line["step"], line["bits_per_byte"]) for line in lines if line.get("kind") == "eval"]
    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    if result["step"] != steps:
        raise LuminaError(f"{workdir}: trained {result['step']} steps, not {steps}; remove it to have it trained anew")
    return result["held_out"]["bits_per_byte"], worst, curve


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown: a row a model."""
    lines = [
        "| model | active / total | steps | FLOPs over dense | bits/byte, mean (lowest to highest) | worst load |",
        "|---|---|---|---|---|---|",
    ]
    dense = counts(config_of("dense")).training_flops * STEPS
    for name, outcome in outcomes.items():
        count, values = counts(config_of(name)), outcome.bits_per_byte
        lines.append(
            f"| {name} | {count.mean_active / 1e6:.2f} M / {count.total / 1e6:.2f} M | {outcome.steps} "
            f"| {count.training_flops * outcome.steps / dense:.2f} "
            f"| {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}) "
            f"| {f'{statistics.mean(outcome.worst_load):.2f}' if any(outcome.worst_load) else ''} |"
        )
    return "\n".join(lines) + "\n"


def draw(outcomes: dict[str, Outcome], path: Path) -> None:
    """Curves of bits per byte over training FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, outcome) in enumerate(outcomes.items()):
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        axes.plot(*zip(*outcome.curve, strict=True), marker="o", markersize=3, label=name, **style)
    axes.set(
        xlabel="training FLOPs",
        ylabel="held-out bits per byte, causal routing",
        title=f"mean over {max(len(o.bits_per_byte) for o in outcomes.values())} seeds",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line, train what is missing, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the runs and the results")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=" ".join(MODELS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds a model (default: {SEEDS})")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = {name: steps_of(name, lambda: time_ratio(out)) for name in arguments.only}
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in arguments.only]
    cores: Queue[int] = Queue()
    for core in sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        cores.put(core)
    began, done = time.perf_counter(), 0

    def job(name: str, seed: int) -> tuple[str, Path]:
        nonlocal done
        core = cores.get()
        try:
            workdir = train(out, name, steps[name], seed, core)
        finally:
            cores.put(core)
        done += 1
        left = (time.perf_counter() - began) / done * (len(jobs) - done)
        print(f"{done} of {len(jobs)} done, about {left / 60:.0f} minutes left ({name}, seed {seed})", file=sys.stderr)
        return name, workdir

    with ThreadPoolExecutor(cores.qsize()) as pool:
        finished = list(pool.map(job, *zip(*jobs, strict=True)))
    outcomes: dict[str, Outcome] = {name: Outcome(steps[name]) for name in arguments.only}
    curves: dict[str, list[Any]] = {name: [] for name in arguments.only}
    for name, workdir in finished:
        bits, worst, curve = read(workdir, steps[name])
        outcomes[name].bits_per_byte.append(bits)
        outcomes[name].worst_load.append(worst)
        curves[name].append(curve)
    for name, outcome in outcomes.items():
        tokens = 2048 * counts(config_of(name)).training_flops
        outcome.curve = [
            (points[0][0] * tokens, statistics.mean(bits for _, bits in points)) for points in zip(*curves[name], strict=True)
        ]
    (out / "table.md").write_text(table(outcomes), encoding="utf-8")
    (out / "results.json").write_text(json.dumps({n: vars(o) for n, o in outcomes.items()}, indent=2) + "\n", encoding="utf-8")
    draw(outcomes, out / "curves.png")
    print(table(outcomes))


if __name__ == "__main__":
    exit_with(main)
