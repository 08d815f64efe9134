"""Schedules against their formulas, AdamW against numpy, and which tensors decay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina.architecture import layer_kinds, layer_plan
from lumina.config import OptimConfig
from lumina.validation import SCHEDULES
from lumina_jax.model import canonical_names, create
from lumina_jax.optimizer import decay_mask, make_optimizer, schedule
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import tiny

PEAK, STEPS, WARMUP, RATIO = 3e-3, 100, 10, 0.1
LAST = PEAK * RATIO


def rates(name, **changes):
    optim = OptimConfig(**{"learning_rate": PEAK, "schedule": name, "warmup_steps": WARMUP, "min_ratio": RATIO, **changes})
    rate = schedule(optim, STEPS)
    return np.array([float(rate(n)) for n in range(STEPS)])


def cosine(start, end, share):
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def expected(name, n):
    """The learning rate of update n, from 0; of wsd with decay_fraction 0.2 and of cosine_restarts with 3 cycles of 30."""
    share = (n - WARMUP) / (STEPS - WARMUP)
    if name == "one_cycle":
        return cosine(PEAK / 25, PEAK, n / WARMUP) if n < WARMUP else cosine(PEAK, LAST, share)
    if n < WARMUP:
        return PEAK * (n + 1) / WARMUP
    return {
        "constant": PEAK,
        "cosine": cosine(PEAK, LAST, share),
        "linear": PEAK + (LAST - PEAK) * share,
        "cosine_restarts": cosine(PEAK, LAST, (n - WARMUP) % 30 / 30),
        "wsd": PEAK if n < 80 else PEAK + (LAST - PEAK) * (n - 80) / 20,
    }[name]


# ------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_update_has_the_rate_of_the_formula(name):
    assert_close(rates(name), [expected(name, n) for n in range(STEPS)], 1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_update_has_rate_zero_and_none_is_above_the_peak(name):
    found = rates(name)
    assert found.min() > 0
    assert found.max() == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "one_cycle"])
def test_the_last_update_of_the_warm_up_and_the_one_after_it_have_the_peak(name):
    assert_close(rates(name)[[WARMUP - 1, WARMUP]], [PEAK, PEAK], 1e-6)


def test_one_cycle_rises_from_a_twenty_fifth_of_the_peak():
    assert_close(rates("one_cycle")[[0, WARMUP]], [PEAK / 25, PEAK], 1e-6)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant"])
def test_the_last_update_is_near_the_least_rate(name):
    assert LAST <= rates(name)[-1] < 1.5 * LAST


def test_a_decay_longer_than_what_the_warm_up_leaves_still_reaches_the_least_rate():
    found = rates("wsd", warmup_steps=50, decay_fraction=0.8)
    assert found[[49, 50]] == pytest.approx([PEAK, PEAK], rel=1e-6)
    assert LAST < found[-1] < 1.5 * LAST


def test_cosine_restarts_returns_to_the_peak_after_each_cycle():
    found = rates("cosine_restarts")
    assert_close(found[[10, 40, 70]], [PEAK] * 3, 1e-6)
    assert (found[[39, 69, 99]] < 1.05 * LAST).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_warm_up_the_first_update_has_the_peak(name):
    assert rates(name, warmup_steps=0)[0] == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_traced_step_gives_the_same_rate(name):
    rate = schedule(OptimConfig(learning_rate=PEAK, schedule=name, warmup_steps=WARMUP), STEPS)
    traced = jax.jit(jax.vmap(rate))(jnp.arange(STEPS, dtype=jnp.int32))
    assert_close(traced, [expected(name, n) for n in range(STEPS)], 1e-6)


# ----------------------------------------------------------------------------------------------------------- decay


def test_exactly_the_matrices_decay():
    config = tiny(model={"qk_norm": True, "tie_embeddings": False}, moe={"shared_experts": 1, "pattern": "0"})
    params = jax.eval_shape(lambda: create(config.model, 0)[1].params)
    plan = layer_plan(layer_kinds(config.model))
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(config, params))[0]
    decayed = {name for path, decays in mask if decays for name in canonical_names(plan, path)}
    spared = {name for path, decays in mask if not decays for name in canonical_names(plan, path)}
    matrices = ["attention.query", "attention.key", "attention.value", "attention.output", "mod.router"]
    experts = ["moe.router", *(f"moe.{part}.{n}" for part in ("experts", "shared") for n in ("gate", "up", "down"))]
    plain = ["feedforward.gate", "feedforward.up", "feedforward.down"]
    norms = ["attention_norm", "feedforward_norm", "attention.query_norm", "attention.key_norm"]
    assert decayed == {f"blocks.0.{n}" for n in matrices + experts} | {f"blocks.1.{n}" for n in matrices + plain} | {
        "head.weight"
    }
    assert spared == {"embedding.weight", "final_norm.scale"} | {
        f"blocks.{i}.{n}" for i in (0, 1) for n in [*(f"{norm}.scale" for norm in norms), "mod.bias"]
    }


# ----------------------------------------------------------------------------------------------------------- AdamW


def adamw(config, params, decays, gradients):
    """The directions of successive updates of fixed `params`, as lists of float64 arrays (Loshchilov and Hutter, 2019)."""
    optim = config.optim
    first = [np.zeros(p.shape) for p in params]
    second = [np.zeros(p.shape) for p in params]
    directions = []
    for n, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum(np.sum(g**2) for g in gradient))
        shrink = min(1.0, optim.clip_norm / norm) if optim.clip_norm else 1.0
        first = [optim.beta1 * m + (1 - optim.beta1) * shrink * g for m, g in zip(first, gradient, strict=True)]
        second = [optim.beta2 * v + (1 - optim.beta2) * (shrink * g) ** 2 for v, g in zip(second, gradient, strict=True)]
        directions.append(
            [
                m / (1 - optim.beta1**n) / (np.sqrt(v / (1 - optim.beta2**n)) + optim.eps) + optim.weight_decay * d * p
                for m, v, d, p in zip(first, second, decays, params, strict=True)
            ]
        )
    return directions


@pytest.fixture(scope="module")
def params():
    """Parameters with values everywhere, also where they start from constants."""
    shapes = jax.eval_shape(lambda: create(tiny().model, 0)[1].params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), shapes)


# Norms of gradients: below the limit of 1, far above it, a little above it, and below it again. Adam hardly sees the scale of
# its first gradient, but it does see how the next ones compare to it.
NORMS = (0.6, 40.0, 1.2, 0.1)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_updates_are_those_of_adamw_after_clipping_by_the_global_norm(params, clip_norm):
    config = tiny(optim={"clip_norm": clip_norm, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-4})
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    gradients = []
    for norm in NORMS:
        raw = [rng.standard_normal(leaf.shape) for leaf in leaves]
        gradients.append([g * norm / math.sqrt(sum(np.sum(r**2) for r in raw)) for g in raw])
    optimizer = make_optimizer(config)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    expected = adamw(
        config, [np.asarray(p, np.float64) for p in leaves], jax.tree.leaves(decay_mask(config, params)), gradients
    )
    for gradient, directions in zip(gradients, expected, strict=True):
        found, state = update(jax.tree.unflatten(structure, [jnp.asarray(g, jnp.float32) for g in gradient]), state, params)
        for leaf, direction in zip(jax.tree.leaves(found), directions, strict=True):
            assert_close(leaf, direction, 2e-5)
