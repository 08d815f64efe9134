"""200 optimizer steps from the same weights on the same batches: clipping, decay, schedule, accumulation, router biases."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import torch

import lumina_jax.model
import lumina_jax.step
import lumina_torch.step
from parity_tests.lanes import record
from parity_tests.pairs import (
    CASES,
    QUICK,
    Router,
    distance,
    in_float64,
    make_decisions,
    named,
    pair,
    patterned_batch,
    twin_named,
)

STEPS = 200


@pytest.fixture(autouse=True)
def scanned(monkeypatch):
    """JAX's layers are compiled once, not once each."""
    monkeypatch.setattr(lumina_jax.model, "UNROLLED", 0)


def trained(config, replay: bool, double: bool = False, packed: bool = False) -> tuple[float, Router]:
    """Relative distance of the parameters after the steps, and what became of the decisions."""
    config = replace(config, train=replace(config.train, steps=STEPS), optim=replace(config.optim, learning_rate=3e-3))
    graphdef, state, twin = pair(config)
    state = in_float64(state, twin) if double else state
    dtype, twin_dtype = (jnp.float64, torch.float64) if double else (jnp.float32, torch.float32)
    decisions, router = make_decisions(graphdef, dtype), Router(config, replay)
    step = jax.jit(lumina_jax.step.make_train_step(config, graphdef, dtype=dtype), donate_argnums=0, compiler_options=QUICK)
    twin_step = lumina_torch.step.make_train_step(config, dtype=twin_dtype)
    knobs, twin_knobs = lumina_jax.step.controls(config), lumina_torch.step.controls(config)
    start = named(config, state)
    first = None
    with router.in_place():
        for number in range(STEPS):
            batch = patterned_batch(number, packed)
            batch["weights"] = batch["weights"].astype(dtype)
            told = decisions(state, batch)
            state, metrics = step(state, batch, knobs)
            router.expect(told)
            twin, twin_metrics = twin_step(twin, batch, twin_knobs)
            assert router.finished()
            first = first or float(metrics["loss"])
    assert float(twin_metrics["loss"]) < 0.75 * first, "little was learned: the trajectories may agree for that reason"
    assert distance(twin_named(twin), start) > 0.1
    return distance(twin_named(twin), named(config, state)), router


@pytest.mark.parametrize("case", CASES)
def test_200_steps_with_the_same_routing_lead_to_the_same_parameters(case):
    away, router = trained(CASES[case], replay=True)
    record("trajectory, replayed", case, away)
    record("flips", case, router.widest_flip)
    assert router.decided > 0 or case == "dense"


def test_200_steps_of_packed_rows_in_micro_batches_lead_to_the_same_parameters():
    case = "hybrid"
    config = replace(CASES[case], train=replace(CASES[case].train, micro_batches=2))
    record("trajectory, replayed", f"{case}, packed rows in 2 micro-batches", trained(config, replay=True, packed=True)[0])


def test_the_first_decision_that_differs_was_nearly_a_tie():
    case = "hybrid"
    away, router = trained(CASES[case], replay=False)
    record("trajectory", case, away)
    record("decisions that differed", case, router.flipped / router.decided)
    record("first flip", case, router.first_flip)
