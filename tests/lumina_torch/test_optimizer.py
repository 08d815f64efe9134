"""Schedules against their formulas, AdamW against numpy, and which parameters decay."""

import math

import numpy as np
import pytest
import torch

from lumina.architecture import tensor_table
from lumina.config import OptimConfig
from lumina.validation import SCHEDULES
from lumina_torch.model import create
from lumina_torch.optimizer import (
    clip_factor,
    global_norm,
    gradients_of,
    load_moments,
    make_optimizer,
    moments,
    schedule,
    update,
)
from tests.lumina_jax.oracles import assert_close
from tests.lumina_jax.tiny import tiny

PEAK, STEPS, WARMUP, RATIO = 3e-3, 100, 10, 0.1
LAST = PEAK * RATIO


def rates(name, **changes):
    optim = OptimConfig(**{"learning_rate": PEAK, "schedule": name, "warmup_steps": WARMUP, "min_ratio": RATIO, **changes})
    rate = schedule(optim, STEPS)
    return np.array([rate(n) for n in range(STEPS)])


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
    assert_close(rates(name), [expected(name, n) for n in range(STEPS)], 1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_warm_up_the_first_update_has_the_peak(name):
    assert rates(name, warmup_steps=0)[0] == pytest.approx(PEAK, rel=1e-14)


def test_a_decay_longer_than_what_the_warm_up_leaves_still_reaches_the_least_rate():
    found = rates("wsd", warmup_steps=50, decay_fraction=0.8)
    assert found[[49, 50]] == pytest.approx([PEAK, PEAK], rel=1e-6)
    assert LAST < found[-1] < 1.5 * LAST


# ----------------------------------------------------------------------------------------------------------- AdamW


def filled(config):
    """A model with values everywhere, also where they start from constants, in float64."""
    transformer, rng = create(config.model, 0).double(), np.random.default_rng(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape))))
    return transformer


def adamw(config, params, decays, gradients, rate):
    """The parameters after successive updates, as lists of float64 arrays (Loshchilov and Hutter, 2019)."""
    optim = config.optim
    first = [np.zeros(p.shape) for p in params]
    second = [np.zeros(p.shape) for p in params]
    history = []
    for n, gradient in enumerate(gradients, 1):
        norm = math.sqrt(sum(np.sum(g**2) for g in gradient))
        shrink = min(1.0, optim.clip_norm / norm) if optim.clip_norm else 1.0
        first = [optim.beta1 * m + (1 - optim.beta1) * shrink * g for m, g in zip(first, gradient, strict=True)]
        second = [optim.beta2 * v + (1 - optim.beta2) * (shrink * g) ** 2 for v, g in zip(second, gradient, strict=True)]
        params = [
            p - rate * (m / (1 - optim.beta1**n) / (np.sqrt(v / (1 - optim.beta2**n)) + optim.eps) + optim.weight_decay * d * p)
            for m, v, d, p in zip(first, second, decays, params, strict=True)
        ]
        history.append(params)
    return history


# Norms of gradients: below the limit of 1, far above it, a little above it, and below it again. Adam hardly sees the scale of
# its first gradient, but it does see how the next ones compare to it.
NORMS = (0.6, 40.0, 1.2, 0.1)


@pytest.mark.parametrize("clip_norm", [1.0, 0.0])
def test_updates_are_those_of_adamw_after_clipping_by_the_global_norm(clip_norm):
    config = tiny(optim={"clip_norm": clip_norm, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "eps": 1e-4})
    transformer = filled(config)
    optimizer, named, rng = make_optimizer(config, transformer), dict(transformer.named_parameters()), np.random.default_rng(1)
    start, gradients = [p.detach().numpy().copy() for p in named.values()], []
    for norm in NORMS:
        raw = [rng.standard_normal(p.shape) for p in start]
        gradients.append([g * norm / math.sqrt(sum(np.sum(r**2) for r in raw)) for g in raw])
    table = {t.name: t for t in tensor_table(config.model)}
    history = adamw(config, start, [table[name].decayed for name in named], gradients, 0.01)
    for gradient, after in zip(gradients, history, strict=True):
        for parameter, g in zip(named.values(), gradient, strict=True):
            parameter.grad = torch.from_numpy(np.asarray(g))
        update(optimizer, 0.01, clip_factor(clip_norm, float(global_norm(gradients_of(optimizer)))))
        for parameter, value in zip(named.values(), after, strict=True):
            assert_close(parameter.detach(), value, 1e-13)


@pytest.mark.parametrize(("norm", "factor"), [(0.5, 1.0), (2.0, 1.0), (2.0000001, 2 / 2.0000001), (8.0, 0.25)])
def test_gradients_are_scaled_to_the_limit_and_only_above_it(norm, factor):
    assert clip_factor(2.0, norm) == factor
    assert clip_factor(0.0, norm) == 1.0


def test_the_norm_of_many_numbers_is_that_of_float64():
    tensors = [torch.randn(1000, 1001, generator=torch.Generator().manual_seed(0)), torch.full((3,), 5.0)]
    assert_close(global_norm(tensors), math.sqrt(sum(float((t.double() ** 2).sum()) for t in tensors)), 1e-6)


def test_exactly_the_matrices_decay():
    config = tiny(model={"qk_norm": True, "tie_embeddings": False}, moe={"shared_experts": 1, "pattern": "0"})
    transformer = create(config.model, 0)
    names = {id(p): name for name, p in transformer.named_parameters()}
    decayed, spared = make_optimizer(config, transformer).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (config.optim.weight_decay, 0.0)
    spared = {names.pop(id(p)) for p in spared["params"]}
    for parameter in decayed["params"]:
        del names[id(parameter)]
    assert not names
    norms = ["attention_norm", "feedforward_norm", "attention.query_norm", "attention.key_norm"]
    assert spared == {"embedding.weight", "final_norm.scale"} | {
        f"blocks.{i}.{n}" for i in (0, 1) for n in [*(f"{norm}.scale" for norm in norms), "mod.bias"]
    }


def test_a_parameter_without_a_gradient_decays_and_counts_its_updates():
    config = tiny("dense", optim={"weight_decay": 0.5})
    transformer = filled(config)
    optimizer, name = make_optimizer(config, transformer), "blocks.1.feedforward.up"
    before = dict(transformer.named_parameters())[name].detach().clone()
    for parameter in transformer.parameters():
        parameter.grad = torch.ones_like(parameter)
    dict(transformer.named_parameters())[name].grad = None
    gradients_of(optimizer)
    update(optimizer, 0.1)
    assert_close(dict(transformer.named_parameters())[name].detach(), 0.95 * before, 1e-14)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


# --------------------------------------------------------------------------------------------------------- moments


def stepped(count, seed=0):
    config = tiny("moe")
    transformer = create(config.model, 0)
    optimizer, generator = make_optimizer(config, transformer), torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in transformer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        update(optimizer, 0.01)
    return transformer, optimizer


def test_before_the_first_update_moments_are_zero():
    transformer, optimizer = stepped(0)
    first, second, updates = moments(transformer, optimizer)
    assert updates == 0
    assert [*first] == [*second] == [name for name, _ in transformer.named_parameters()]
    assert not any(m.any() for m in (*first.values(), *second.values()))


def test_moments_read_and_written_by_name_go_on_with_the_same_bits():
    transformer, optimizer = stepped(3)
    first, second, updates = moments(transformer, optimizer)
    assert updates == 3
    copies = [{name: m.numpy().copy() for name, m in which.items()} for which in (first, second)]
    other, fresh = stepped(0)
    other.load_state_dict(transformer.state_dict())
    load_moments(other, fresh, *copies, updates)
    for each, its in ((transformer, optimizer), (other, fresh)):
        for n, parameter in enumerate(each.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (n + 1))
        update(its, 0.01)
    for (name, a), b in zip(transformer.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert moments(other, fresh)[2] == 4


def test_moments_of_another_model_are_refused():
    transformer, optimizer = stepped(1)
    first, second, _ = moments(transformer, optimizer)
    name = "blocks.0.moe.router"
    with pytest.raises(ValueError, match=f"second moment {name}: missing"):
        load_moments(transformer, optimizer, first, {n: m for n, m in second.items() if n != name}, 1)
    with pytest.raises(ValueError, match=r"first moment blocks\.9\.x: of no parameter"):
        load_moments(transformer, optimizer, first | {"blocks.9.x": first[name]}, second, 1)
    with pytest.raises(ValueError, match=rf"first moment {name}: \(4, 16\), must be \(16, 4\)"):
        load_moments(transformer, optimizer, first | {name: first[name].T}, second, 1)
