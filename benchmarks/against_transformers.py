"""Set our training step beside that of `transformers` in PyTorch, on this machine's CPU, and print one JSON object.

    python benchmarks/against_transformers.py                             # Mixtral: 8 experts, 2 a token
    python benchmarks/against_transformers.py --dense --length=2048       # Llama
    python benchmarks/against_transformers.py --ours=torch                # our PyTorch trainer, instead of JAX's
    python benchmarks/against_transformers.py --config.model.moe.capacity_factor=1.25

Both models have the same tensors and see batches of the same shape, in float32: forward, backward, clipping, AdamW. Of the ways
in which `transformers` can do its part the fastest is taken. Each side lives in a process of its own; they take turns of a few
steps, so that a machine which is slower for a while is slower for both. The ratio is the median over the turns. It holds only
for a machine that is otherwise idle: beside other work PyTorch slows far more than JAX does. So `load_average` is that of
before the start, and should be near 0.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

from lumina.architecture import counts, expert_capacity
from lumina.config import Config, ModelConfig, MoEConfig, override
from lumina.errors import ConfigError, UsageError, exit_with

WARM_UP, TRIAL = 3, 3  # steps before timing; steps of each candidate before one is chosen
# How transformers may multiply tokens with experts. Its batched_mm copies an expert's matrices for each choice of each token:
# 26 GB at the default shape. The rest needs CUDA.
EXPERTS = ("eager", "grouped_mm")
ADAM = ("foreach", "fused")  # how PyTorch may run AdamW
PATIENCE = 900  # seconds that one answer of a side may take


def shape(dense: bool, length: int, overrides: list[str]) -> Config:
    """The config of both sides. Each expert has as many slots as choices fall to it on average: no work that theirs spares."""
    moe = MoEConfig(pattern="none" if dense else "all", num_experts=8, top_k=2, capacity_factor=1.0)
    model = ModelConfig(
        vocab_size=4096,
        d_model=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        d_ff=512,
        tie_embeddings=False,
        moe=moe,
    )
    config = Config(model=model)
    config.data.sequence_length, config.train.batch_size = length, 4
    return override(config, overrides)


def require_comparable(config: Config) -> None:
    """Refuse a config that `transformers` has no equal of: of other parts, or with only some layers of experts."""
    model = config.model
    asks = {
        "model.activation": (model.activation, "swiglu"),
        "model.qk_norm": (model.qk_norm, False),
        "model.scale_embeddings": (model.scale_embeddings, False),
        "model.dropout": (model.dropout, 0.0),
        "model.mod.pattern": (model.mod.pattern, "none"),
        "model.moe.shared_experts": (model.moe.shared_experts, 0),
        "train.compute_dtype": (config.train.compute_dtype, "float32"),
    }
    for name, (value, only) in asks.items():
        if value != only:
            raise ConfigError(f"{name} = {value!r}: transformers' Llama and Mixtral have only {only!r}")
    if model.moe.pattern not in ("none", "all"):
        raise ConfigError(f"model.moe.pattern = {model.moe.pattern!r}: Llama has none, Mixtral has all")


# ---------------------------------------------------------------------------------------------------------- our side


def ours_jax(config: Config) -> tuple[dict[str, Any], Callable[[], float], Callable[[], float]]:
    """(facts, one step that returns its loss, the peak in FLOP/s of a matrix product)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    from lumina_jax.allocator import keep_large_buffers
    from lumina_jax.device import matmul_peak
    from lumina_jax.step import controls, init_state, make_train_step, state_shapes

    allocator = keep_large_buffers()
    shapes, graphdef = state_shapes(config)
    state = jax.jit(lambda: init_state(config)[1])()
    batch, knobs = jax.device_put((our_batch(config), controls(config)))
    step = jax.jit(make_train_step(config, graphdef), donate_argnums=0).lower(state, batch, knobs).compile()
    facts: dict[str, Any] = {
        "allocator": allocator,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes.variables.params)),
    }

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch, knobs)
        jax.block_until_ready(state)
        if "moe" in metrics:
            facts["choices_dropped"] = float(np.mean(metrics["moe"]["dropped"]))
        return float(metrics["loss"])

    return facts, run, lambda: matmul_peak("float32")


def ours_torch(config: Config) -> tuple[dict[str, Any], Callable[[], float], Callable[[], float]]:
    """As `ours_jax`."""
    import torch

    from lumina_torch.device import matmul_peak
    from lumina_torch.step import controls, init_state, make_train_step

    state, step, batch, knobs = init_state(config), make_train_step(config), our_batch(config), controls(config)
    facts: dict[str, Any] = {
        "versions": {"torch": version("torch")},
        "parameters": sum(parameter.numel() for parameter in state.transformer.parameters()),
        "threads": torch.get_num_threads(),
    }

    def run() -> float:
        _, metrics = step(state, batch, knobs)
        if "moe" in metrics:
            facts["choices_dropped"] = float(metrics["moe"]["dropped"].mean())
        return float(metrics["loss"])

    return facts, run, lambda: matmul_peak("float32")


def our_batch(config: Config) -> dict[str, Any]:
    """Rows of one document each, all of it counted."""
    import numpy as np

    tokens_BT = random_tokens(config)
    B, T = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    return {
        "inputs": tokens_BT[:, :-1],
        "targets": tokens_BT[:, 1:],
        "weights": np.ones((B, T), np.float32),
        "segments": np.zeros((B, T), np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    }


OURS = {"jax": ours_jax, "torch": ours_torch}


# -------------------------------------------------------------------------------------------------------- their side


def theirs(config: Config) -> tuple[dict[str, Any], Callable[[], float], Callable[[], float]]:
    """As `ours_jax`. Tries the ways to multiply experts and to run AdamW, and keeps the fastest."""
    import torch

    experts = ("eager",) if config.model.moe.pattern == "none" else EXPERTS
    trials: dict[str, float] = {}
    steps: dict[str, Callable[[], float]] = {}
    for way in experts:
        model = their_model(config, way)
        for adam in ADAM:
            step = their_step(config, model, adam)
            for _ in range(WARM_UP):
                step()
            steps[f"{way}, {adam}"] = step
    for _ in range(TRIAL):
        for name, step in steps.items():
            trials[name] = min(trials.get(name, math.inf), seconds_of(step))
    fastest = min(trials, key=lambda name: trials[name])
    facts = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "fastest_of": {name: round(seconds, 4) for name, seconds in trials.items()},
        "chosen": fastest,
    }

    def peak() -> float:
        size = 2048
        a = torch.randn(size, size)
        return 2 * size**3 / min(seconds_of(lambda: a @ a) for _ in range(20))

    return facts, steps[fastest], peak


def their_model(config: Config, experts: str) -> Any:
    """LlamaForCausalLM or MixtralForCausalLM with the tensors of our config, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    model = config.model
    common: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": config.data.sequence_length,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    if model.moe.pattern == "none":
        return LlamaForCausalLM(LlamaConfig(**common)).train()
    moe = {
        "num_local_experts": model.moe.num_experts,
        "num_experts_per_tok": model.moe.top_k,
        "experts_implementation": experts,
    }
    return MixtralForCausalLM(MixtralConfig(**common, **moe)).train()


def their_step(config: Config, model: Any, adam: str) -> Callable[[], float]:
    """Forward, backward, clipping and AdamW."""
    import torch

    optim = config.optim
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), optim.learning_rate, betas, optim.eps, optim.weight_decay, **{adam: True})
    tokens_BT = torch.as_tensor(random_tokens(config), dtype=torch.long)
    inputs_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=inputs_BT, labels=targets_BT, shift_labels=targets_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm, foreach=True)
        optimizer.step()
        return loss.item()

    return step


# --------------------------------------------------------------------------------------------------------- comparing


def random_tokens(config: Config) -> Any:
    """Token ids [B, T + 1]."""
    import numpy as np

    B, T = config.train.batch_size, config.data.sequence_length
    return np.random.default_rng(0).integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)


def seconds_of(call: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def serve(pipe: Connection, side: Callable, config: Config) -> None:
    """One side's process: answers `steps` with their median seconds, `peak` with FLOP/s, `facts` with what it is."""
    facts, step, peak = side(config)
    losses = [step() for _ in range(WARM_UP)]
    pipe.send("ready")
    for ask, number in iter(pipe.recv, None):
        if ask == "steps":
            pipe.send(statistics.median(seconds_of(lambda: losses.append(step())) for _ in range(number)))
        else:
            pipe.send(peak() if ask == "peak" else {**facts, "loss": losses[-1]})


def answer(pipe: Connection, name: str) -> Any:
    """The next answer of a side. Raises UsageError when its process ended without one, having printed why."""
    try:
        if pipe.poll(PATIENCE):
            return pipe.recv()
    except EOFError:
        pass
    raise UsageError(f"the process of {name} gave no answer: see above for its error")


def compare(config: Config, ours: Callable, rounds: int, steps: int) -> dict[str, Any]:
    """Start both sides and let them take turns."""
    load = os.getloadavg()[0]
    context, pipes = multiprocessing.get_context("spawn"), {}
    for name, side in (("lumina", ours), ("transformers", theirs)):
        pipes[name], other_end = context.Pipe()
        context.Process(target=serve, args=(other_end, side, config), daemon=True).start()
        other_end.close()
        answer(pipes[name], name)  # one compiles or tries out while the other does not run

    def ask(name: str, what: str, number: int = 0) -> Any:
        pipes[name].send((what, number))
        return answer(pipes[name], name)

    peaks = {name: [ask(name, "peak")] for name in pipes}
    taken: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(rounds):
        for name in list(pipes)[:: 1 if turn % 2 else -1]:
            taken[name].append(ask(name, "steps", steps))
    for name in pipes:
        peaks[name].append(ask(name, "peak"))
    facts = {name: ask(name, "facts") for name in pipes}
    for pipe in pipes.values():
        pipe.send(None)
    return {**report(config, taken, peaks, facts), "load_average": load}


def report(
    config: Config, taken: dict[str, list[float]], peaks: dict[str, list[float]], facts: dict[str, Any]
) -> dict[str, Any]:
    """The figures of both sides, and ours over theirs."""
    ours, theirs = (facts[name]["parameters"] for name in taken)
    if ours != theirs:
        raise AssertionError(f"{ours} parameters against {theirs}: not the same model")
    model, T = config.model, config.data.sequence_length
    tokens, flops = config.train.batch_size * T, counts(config).training_flops
    ratios = sorted(b / a for a, b in zip(taken["lumina"], taken["transformers"], strict=True))
    result: dict[str, Any] = {
        "ratio": statistics.median(ratios),
        "ratio_smallest": ratios[0],
        "ratio_largest": ratios[-1],
        "parameters": facts["lumina"]["parameters"],
        "tokens_per_step": tokens,
        "sequence_length": T,
        "training_flops_per_token": flops,
    }
    if model.moe.pattern != "none":
        result["dispatch"] = {
            "slots_an_expert_has_in_a_row": expert_capacity(model, T),
            "choices_an_expert_gets_of_a_row_on_average": T * model.moe.top_k / model.moe.num_experts,
            "transformers": "drops none",
        }
    for name in taken:
        seconds, peak = statistics.median(taken[name]), max(peaks[name])
        result[name] = {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "matmul_peak_flops": peak,
            "fraction_of_matmul_peak": flops * tokens / seconds / peak,
            **facts[name],
        }
    return result


def main() -> None:
    """Parse the command line and print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--dense", action="store_true", help="Llama, instead of Mixtral")
    parser.add_argument("--ours", choices=OURS, default="jax", help="our trainer that is compared (default: jax)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row (default: 512)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default: 9)")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn (default: 3)")
    known, overrides = parser.parse_known_args()
    for name in ("rounds", "steps"):
        if getattr(known, name) < 1:
            raise UsageError(f"--{name} = {getattr(known, name)}: must be at least 1")
    config = shape(known.dense, known.length, overrides)
    require_comparable(config)
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        raise UsageError(f"{' and '.join(missing)} not installed: pip install -c requirements.lock -e '.[transformers]'")
    print(json.dumps(compare(config, OURS[known.ours], known.rounds, known.steps), indent=2))


if __name__ == "__main__":
    exit_with(main)
