"""Time the training step of dense, Mixture-of-Experts and Mixture-of-Depths models of one shape, and print one JSON object.

    python benchmarks/routing.py
    python benchmarks/routing.py --rounds 20 --config.model.d_model=1024 --config.train.compute_dtype=bfloat16

All are compiled first and then take turns, a step each, so that whatever else the machine does falls on all alike. Ratios are
medians over the rounds of a step's time over the dense step's in the same round; beside each stands what the FLOPs say.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import jax
from train_step import WARM_UP, random_batch

from lumina.architecture import counts
from lumina.config import Config, DataConfig, ModelConfig, TrainConfig, override
from lumina.errors import UsageError, exit_with
from lumina_jax.allocator import keep_large_buffers
from lumina_jax.device import describe, matmul_peak
from lumina_jax.mesh import make_mesh, place_each, place_rows, shardings
from lumina_jax.step import controls, init_state, make_train_step, state_shapes

# Large enough that matrix products are most of a dense step on two cores. Of eight times as many parameters the optimizer alone
# would outweigh what few tokens cost, hence 8,192 tokens a step.
SHAPE = ModelConfig(vocab_size=1024, d_model=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64, d_ff=1536)


def variants(config: Config) -> dict[str, Config]:
    """The dense model, and the same with experts or depth; the experts of a token are as wide as the dense feed-forward."""
    model, moe = config.model, replace(config.model.moe, pattern="all", num_experts=8)
    mod = replace(config.model.mod, pattern="interleaved", capacity=0.125)
    models = {
        "dense": model,
        "moe_top1_capacity": replace(model, moe=replace(moe, top_k=1, dispatch="capacity")),
        "moe_top1_dropless": replace(model, moe=replace(moe, top_k=1, dispatch="dropless")),
        "moe_top2_capacity": replace(model, d_ff=model.d_ff // 2, moe=replace(moe, top_k=2, dispatch="capacity")),
        "moe_top2_dropless": replace(model, d_ff=model.d_ff // 2, moe=replace(moe, top_k=2, dispatch="dropless")),
        "mod_ffn": replace(model, mod=replace(mod, scope="ffn")),
        "mod_block": replace(model, mod=replace(mod, scope="block")),
    }
    return {name: override(replace(config, model=changed), []) for name, changed in models.items()}


def stepper(config: Config) -> Callable[[], float]:
    """A compiled training step with a state of its own; each call makes one step and returns its seconds."""
    graphdef, mesh = state_shapes(config)[1], make_mesh(config)
    state = jax.jit(lambda: init_state(config)[1], out_shardings=shardings(config, mesh, state_shapes(config)[0]))()
    batch = place_rows(mesh, random_batch(config))
    knobs = controls(config, stop_N=place_each(mesh, 0))
    step = jax.jit(make_train_step(config, graphdef, mesh), donate_argnums=0).lower(state, batch, knobs).compile()

    def call() -> float:
        nonlocal state
        began = time.perf_counter()
        state, _ = step(state, batch, knobs)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    return call


def measure(config: Config, rounds: int) -> dict[str, object]:
    """Compile all, warm up, take turns."""
    configs, steps = variants(config), {}
    for name, variant in configs.items():
        print(f"compiling {name}", file=sys.stderr)
        steps[name] = stepper(variant)
    peak = matmul_peak(config.train.compute_dtype)
    print(f"timing {rounds} rounds", file=sys.stderr)
    seconds = [{name: step() for name, step in steps.items()} for _ in range(WARM_UP + rounds)][WARM_UP:]
    peak = max(peak, matmul_peak(config.train.compute_dtype))  # again, as a machine's speed may change under load
    tokens, flops = config.train.batch_size * config.data.sequence_length, {}
    result = {}
    for name, variant in configs.items():
        flops[name] = counts(variant).training_flops
        typical = statistics.median(second[name] for second in seconds)
        ratios = [second[name] / second["dense"] for second in seconds]
        result[name] = {
            "step_seconds": typical,
            "tokens_per_second": tokens / typical,
            "time_over_dense": statistics.median(ratios),
            "quartiles": statistics.quantiles(ratios, n=4)[::2] if rounds > 1 else ratios,
            "flops_over_dense": flops[name] / flops["dense"],
            "fraction_of_matmul_peak": flops[name] * tokens / typical / peak,
            "active_parameters": counts(variant).most_active,
            "total_parameters": counts(variant).total,
        }
    over = {
        f"{k}_dropless_over_capacity": statistics.median(s[f"moe_{k}_dropless"] / s[f"moe_{k}_capacity"] for s in seconds)
        for k in ("top1", "top2")
    }
    return {
        "device": describe(make_mesh(config)),
        "dtype": config.train.compute_dtype,
        "matmul_peak_flops": peak,
        "tokens_per_step": tokens,
        "rounds": rounds,
        **result,
        **over,
    }


def main() -> None:
    """Parse the command line and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds that are timed (default: 8)")
    keep_large_buffers()
    known, overrides = parser.parse_known_args()
    if known.rounds < 1:
        raise UsageError(f"--rounds = {known.rounds}: must be at least 1")
    train = TrainConfig(batch_size=16)
    print(
        json.dumps(
            measure(override(Config(SHAPE, DataConfig(sequence_length=512), train=train), overrides), known.rounds), indent=2
        )
    )


if __name__ == "__main__":
    exit_with(main)
