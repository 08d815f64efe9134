"""One training step and one evaluation step of both backends from the same weights and batch: every number that they give.

B rows, T positions, M micro-batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import lumina_jax.model
import lumina_jax.optimizer
import lumina_jax.step
import lumina_torch.optimizer
import lumina_torch.step
from lumina.config import Config, OptimConfig
from lumina.validation import SCHEDULES
from lumina_jax.model import Variables, by_canonical_name, from_canonical_names
from lumina_torch.device import fetch
from lumina_torch.model import state_by_name
from lumina_torch.optimizer import moments
from parity_tests.lanes import record
from parity_tests.pairs import QUICK
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import T, V, packed_batch, tiny

STEEP = {"bias_rate": 0.05, "balance_weight": 0.3, "z_weight": 0.2}  # router losses and biases that show
EVERY = {
    "dense": tiny("dense", model={"qk_norm": True, "tie_embeddings": False, "scale_embeddings": True}),
    "top-1, capacity": tiny("moe", moe=STEEP | {"top_k": 1}),
    "top-2, dropless": tiny("moe", moe=STEEP | {"dispatch": "dropless", "shared_experts": 1}),
    "mod ffn": tiny("dense+mod", mod={"predictor_width": 8}),
    "mod block": tiny("dense+mod", mod={"scope": "block"}),
    "hybrid": tiny("moe+mod", moe=STEEP | {"noop_experts": 1, "score": "sigmoid"}),
    "hybrid block, in parts": tiny("moe+mod", moe=STEEP, mod={"scope": "block"}, micro_batches=2),
    "whole batch's balance, in parts": tiny("moe", moe=STEEP | {"balance_over": "batch"}, micro_batches=4),
    "own micro-batch's balance": tiny("moe", moe=STEEP | {"balance_over": "micro_batch"}, micro_batches=2),
}
# Rows and tokens of very different weight: the mean of the micro-batches' means would be far off.
UNEVEN = np.random.default_rng(3).uniform(0, 1, (4, T)).astype(np.float32) * np.array([[8], [1], [0.1], [3]], np.float32)
UNEVEN *= packed_batch()["weights"]
TOKEN_BYTES = np.random.default_rng(4).integers(0, 9, V).astype(np.int32)


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    """JAX's layers are compiled once, not once each: two thirds of these tests' time."""
    monkeypatch.setattr(lumina_jax.model, "UNROLLED", 0)


def stepped(config: Config, double: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that one step gives, by JAX and by PyTorch: metrics, gradients as the first moments have them, and parameters."""
    config.optim.eps = 1e-2  # Adam's direction where gradients are near zero would be their rounding
    twin, batch = lumina_torch.step.init_state(config), packed_batch() | {"weights": UNEVEN}
    (shapes, graphdef), dtypes = lumina_jax.step.state_shapes(config), (jnp.float32, torch.float32)
    named = {name: tensor.detach().numpy().copy() for name, tensor in state_by_name(twin.transformer).items()}
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    variables = Variables(*(from_canonical_names(config.model, part, named) for part in shapes.variables))
    guard = lumina_jax.step.Guard(np.full(config.guard.spike_window, np.nan, np.float32), np.int32(0))
    state = jax.device_get(state._replace(variables=variables, guard=guard))
    if double:
        state = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, state)
        twin.transformer.double()
        batch["weights"] = UNEVEN.astype(np.float64)
        dtypes = (jnp.float64, torch.float64)

    jax_eval = lumina_jax.step.make_eval_step(config, graphdef, TOKEN_BYTES, dtype=dtypes[0])
    jax_step = lumina_jax.step.make_train_step(config, graphdef, token_bytes=TOKEN_BYTES, dtype=dtypes[0])
    both = jax.jit(lambda state, *rest: (jax_eval(state.variables, rest[0]), jax_step(state, *rest)), compiler_options=QUICK)
    evaluated, (after, metrics) = jax.device_get(both(state, batch, lumina_jax.step.controls(config)))

    # Evaluation first: PyTorch's step changes its state.
    twin_evaluated = fetch(lumina_torch.step.make_eval_step(config, TOKEN_BYTES, dtypes[1])(twin.transformer, batch))
    twin_step = lumina_torch.step.make_train_step(config, TOKEN_BYTES, dtypes[1])
    twin, twin_metrics = twin_step(twin, batch, lumina_torch.step.controls(config))

    first, _, _ = moments(twin.transformer, twin.optimizer)
    gradients = by_canonical_name(config.model, after.optimizer[1].mu)
    params = by_canonical_name(config.model, after.variables.params)
    biases = by_canonical_name(config.model, after.variables.biases)
    found = {"gradients": gradients, "after": {**params, **biases}, "metrics": metrics, "evaluated": evaluated}
    twin_found = {
        "gradients": fetch(first),
        "after": fetch(state_by_name(twin.transformer)),
        "metrics": fetch(twin_metrics),
        "evaluated": twin_evaluated,
    }
    return found, twin_found


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`tree` without its branches."""
    leaves: dict[str, Any] = {}
    for name, of in tree.items():
        leaves |= flat(of, f"{prefix}{name} ") if isinstance(of, dict) else {prefix + name: of}
    return leaves


def assert_same_numbers(found: dict[str, Any], twin_found: dict[str, Any], case: str) -> None:
    """Names, shapes and values, those that are float32 in any case to its precision."""
    expected, actual = flat(found), flat(twin_found)
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        assert np.shape(actual[name]) == np.shape(array), name
        if array.size == 0:
            continue
        both = np.asarray(array), np.asarray(actual[name])
        lane = "float32" if any(each.dtype == np.float32 for each in both) else "float64"
        away, largest = np.max(np.abs(both[0] - both[1].astype(np.float64))), np.max(np.abs(both[0]))
        assert np.isfinite(away), name
        record(lane, case, float(away / largest) if away else 0.0)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_in_float32_gives_the_same_numbers(name):
    found, twin_found = stepped(EVERY[name], double=False)
    assert_same_numbers(found, twin_found, name)


@pytest.mark.parametrize("name", EVERY)
def test_a_step_in_float64_gives_the_same_numbers_to_its_last_digits(name):
    with jax.enable_x64(True):
        found, twin_found = stepped(EVERY[name], double=True)
    assert {array.dtype for array in (*found["gradients"].values(), *twin_found["gradients"].values())} == {
        np.dtype(np.float64)
    }
    assert_same_numbers(found, twin_found, name)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_rate_of_every_schedule_is_that_of_optax(name, warmup):
    for steps in (17, 100):
        optim = OptimConfig(learning_rate=3e-3, schedule=name, warmup_steps=warmup)
        with jax.enable_x64(True):
            expected = jax.vmap(lumina_jax.optimizer.schedule(optim, steps))(jnp.arange(steps + 3))
        rate = lumina_torch.optimizer.schedule(optim, steps)
        assert_close([rate(n) for n in range(steps + 3)], np.broadcast_to(expected, steps + 3), 1e-12)
