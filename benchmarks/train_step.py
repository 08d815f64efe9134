"""Time the training step of any config on this machine, and print one JSON object.

    python benchmarks/train_step.py debug
    python benchmarks/train_step.py b1:dense --config.model.num_layers=4 --config.train.batch_size=8

The yardstick is measured in the same run: FLOP/s of a large matrix product in the same precision. Token ids are random, as
no tokenizer or data is needed to time a step; every row is one document.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from lumina.architecture import counts
from lumina.config import Config, load, override
from lumina.errors import UsageError, exit_with
from lumina.footprint import footprint
from lumina_jax.allocator import keep_large_buffers
from lumina_jax.device import compiled_memory, describe, matmul_peak, peak_memory
from lumina_jax.mesh import make_mesh, place_each, place_rows, shardings
from lumina_jax.step import controls, init_state, make_train_step, state_shapes

WARM_UP = 3  # steps before timing


def random_batch(config: Config) -> dict[str, np.ndarray]:
    """A batch of random token ids."""
    B, T = config.train.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((B, T), np.float32),
        "segments": np.zeros((B, T), np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }


def measure(config: Config, steps: int) -> dict[str, object]:
    """Compile, warm up, time `steps` steps one by one, and set them against the peak."""
    _, graphdef = state_shapes(config)
    mesh = make_mesh(config)
    state = jax.jit(lambda: init_state(config)[1], out_shardings=shardings(config, mesh, state_shapes(config)[0]))()
    batch = place_rows(mesh, random_batch(config))
    knobs = controls(config, stop_N=place_each(mesh, 0))
    began = time.perf_counter()
    step = jax.jit(make_train_step(config, graphdef, mesh), donate_argnums=0).lower(state, batch, knobs).compile()
    compile_seconds = time.perf_counter() - began
    peaks = [matmul_peak(config.train.compute_dtype)]
    seconds = []
    for number in range(WARM_UP + steps):
        began = time.perf_counter()
        state, metrics = step(state, batch, knobs)
        jax.block_until_ready(state)
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    peaks.append(matmul_peak(config.train.compute_dtype))  # again, as a machine's speed may change under load
    peak, typical = max(peaks) * (1 if jax.default_backend() == "cpu" else mesh.size), statistics.median(seconds)
    tokens, count = config.train.batch_size * config.data.sequence_length, counts(config)
    return {
        "device": describe(mesh),
        "step_seconds": typical,
        "step_seconds_fastest": min(seconds),
        "step_seconds_slowest": max(seconds),
        "tokens_per_second": tokens / typical,
        "training_flops_per_token": count.training_flops,
        "matmul_peak_flops": peak,
        "fraction_of_matmul_peak": count.training_flops * tokens / typical / peak,
        "compile_seconds": compile_seconds,
        "peak_memory_bytes": peak_memory(),
        "expected_memory_bytes": footprint(config).total,
        "compiled_memory_bytes": compiled_memory(step),
        "tokens_per_step": tokens,
        "steps_timed": steps,
        "loss": float(metrics["loss"]),
    }


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", default="debug", help="as in training (default: debug)")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed (default: 20)")
    keep_large_buffers()
    known, overrides = parser.parse_known_args()
    if known.steps < 1:
        raise UsageError(f"--steps = {known.steps}: must be at least 1")
    config = override(load(known.config), overrides)
    print(json.dumps(measure(config, known.steps), indent=2))


if __name__ == "__main__":
    exit_with(main)
