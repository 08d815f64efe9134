"""Mixture-of-Depths, against a mask: compute every token, keep the chosen ones, multiply by their gates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumina.architecture import block_tensors
from lumina.config import MoDConfig, ModelConfig
from lumina_jax.mod import MoD, select_top
from lumina_jax.model import Block
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, D = 2, 7, 5


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W_DD = _normal(D, D, seed=1)
Z_BTD = _normal(B, T, D, seed=2)
COTANGENT_BTD = _normal(B, T, D, seed=3)
WEIGHTS = {"mod.router": _normal(D, seed=4), "mod.bias": np.float32(0.3)}


def _model(capacity=0.5):
    return ModelConfig(
        d_model=D, num_layers=1, num_heads=1, head_dim=4, d_ff=3, mod=MoDConfig(pattern="all", capacity=capacity)
    )


def _apply(model, weights, z_BTD, inner, training):
    return MoD(model, lambda name: nnx.Param(jnp.asarray(weights[name])))(z_BTD, inner, training)


def _inner(z_BND):
    return jnp.tanh(z_BND @ W_DD), {}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(model, weights, z_BTD, training):
    """Output, own metrics, and the gradients of a weighted sum of the output."""

    def loss(weights, z_BTD):
        out_BTD, _, own = _apply(model, weights, z_BTD, _inner, training)
        return jnp.sum(COTANGENT_BTD * out_BTD), (out_BTD, own)

    (_, (out_BTD, own)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, z_BTD)
    return out_BTD, own, gradients


def _chosen_T(model, logits_T, training):
    """A mask over the row, token by token: how many come before this one?"""
    if not training:
        return oracles.sigmoid(logits_T) > 0.5
    count = math.ceil(T * model.mod.capacity)
    before = [sum(logits_T[s] > logits_T[t] or (logits_T[s] == logits_T[t] and s < t) for s in range(T)) for t in range(T)]
    return np.array(before) < count


def _masked(model, weights, z_BTD, training):
    """(out [B, T, D], chosen [B, T]): every token computed, then the mask."""
    z_BTD = np.asarray(z_BTD, np.float64)
    logits_BT = z_BTD @ np.asarray(weights["mod.router"], np.float64) + weights["mod.bias"]
    chosen_BT = np.stack([_chosen_T(model, logits_T, training) for logits_T in logits_BT])
    return (oracles.sigmoid(logits_BT) * chosen_BT)[:, :, None] * np.tanh(z_BTD @ W_DD.astype(np.float64)), chosen_BT


# ------------------------------------------------------------------------------------------------- against the mask


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_equals_computing_all_and_masking_forward_and_backward(training):
    model = _model()
    out_BTD, _, (gradients, dz_BTD) = _run(model, WEIGHTS, Z_BTD, training)
    expected_BTD, chosen_BT = _masked(model, WEIGHTS, Z_BTD, training)
    assert np.any(chosen_BT != _masked(model, WEIGHTS, Z_BTD, not training)[1])  # the two modes differ here
    assert_close(out_BTD, expected_BTD)
    assert np.all(np.any(np.asarray(out_BTD) != 0, axis=-1) == chosen_BT)

    def loss(arrays):
        return np.sum(COTANGENT_BTD * _masked(model, arrays, arrays["z"], training)[0])

    assert_gradients(loss, {"z": Z_BTD, **WEIGHTS}, {"z": dz_BTD, **gradients})


@pytest.mark.parametrize(("capacity", "count"), [(0.01, 1), (0.5, 4), (0.6, 5), (1.0, T)])
def test_exactly_the_ceiling_of_capacity_times_length_are_selected(capacity, count):
    model = _model(capacity)
    out_BTD = jax.jit(lambda w, z: _apply(model, w, z, _inner, True)[0])(WEIGHTS, Z_BTD)
    assert np.sum(np.any(np.asarray(out_BTD) != 0, axis=-1), axis=1).tolist() == [count] * B
    assert_close(out_BTD, _masked(model, WEIGHTS, Z_BTD, True)[0])


def test_ties_choose_the_earlier_position():
    index_BC = select_top(jnp.array([[2.0, 1, 1, 3, 1], [0, 0, 0, 0, 0], [1, 2, 2, 2, 1]]), 3)
    assert index_BC.tolist() == [[0, 1, 3], [0, 1, 2], [1, 2, 3]]


def test_tied_rows_still_select_exactly_the_count():
    weights = {"mod.router": np.zeros(D, np.float32), "mod.bias": np.float32(0.3)}
    out_BTD, own, _ = _run(_model(), weights, Z_BTD, True)
    assert np.any(np.asarray(out_BTD) != 0, axis=-1).tolist() == [[True] * 4 + [False] * 3] * B
    assert_close(own["agreement"], 4 / T, 1e-6)  # the router wants all: membership is what was selected


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_inner_receives_only_the_selected_tokens_in_training(training):
    seen = []

    def inner(z):
        seen.append(z.shape)
        return z, {}

    jax.eval_shape(lambda: _apply(_model(), WEIGHTS, jnp.asarray(Z_BTD), inner, training))
    assert set(seen) == {(B, 4 if training else T, D)}


def test_selected_tokens_keep_their_original_order():
    # Inner adds up what comes before, so that it would notice another order.
    out_BTD, _, _ = jax.jit(lambda z: _apply(_model(), WEIGHTS, z, lambda z: (jnp.cumsum(z, axis=1), {}), True))(Z_BTD)
    w = {name: np.asarray(a, np.float64) for name, a in WEIGHTS.items()}
    for z_TD, out_TD in zip(Z_BTD.astype(np.float64), out_BTD, strict=True):
        assert_close(out_TD, oracles.mod(_model(), w, z_TD, lambda z: (np.cumsum(z, axis=0), {}), True)[0])


def test_inner_metrics_are_passed_on():
    def inner(z):
        return z, {"total": jnp.sum(z)}

    totals = jax.jit(lambda z: [_apply(_model(1.0), WEIGHTS, z, inner, training)[1]["total"] for training in (True, False)])
    assert_close(totals(Z_BTD), [np.sum(Z_BTD.astype(np.float64))] * 2)


# ----------------------------------------------------------------------------------------------------- in its layer


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_residual_is_not_counted_twice(training):
    model = _model()
    weights = oracles.random_weights(block_tensors(model, "dense+mod"))
    weights["attention.output"][:] = 0  # so that the layer is its feed-forward alone

    @jax.jit
    def run(x_BTD):
        layer = Block(model, "dense+mod", lambda name: nnx.Param(jnp.asarray(weights[name])))
        segments_BT = jnp.zeros((B, T), jnp.int32)
        return layer(x_BTD, segments_BT, segments_BT, training)[0]

    change_BTD = np.asarray(run(Z_BTD)) - Z_BTD
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    for x_TD, change_TD in zip(Z_BTD.astype(np.float64), change_BTD, strict=True):
        z_TD = oracles.rms_norm(x_TD, w["feedforward_norm.scale"], model.norm_eps)
        logits_T = z_TD @ w["mod.router"] + w["mod.bias"]
        chosen_T = _chosen_T(model, logits_T, training)
        f_TD = oracles.feedforward(model, *(w[f"feedforward.{n}"] for n in ("gate", "up", "down")), z_TD)
        assert np.all(change_TD[~chosen_T] == 0)
        assert_close(change_TD, (oracles.sigmoid(logits_T) * chosen_T)[:, None] * f_TD)


# ------------------------------------------------------------------------------------------------ the causal decision


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_metrics_equal_the_oracle(training):
    model = _model()
    _, own, _ = _run(model, WEIGHTS, Z_BTD, training)
    w = {name: np.asarray(a, np.float64) for name, a in WEIGHTS.items()}
    rows = [oracles.mod(model, w, z_TD, lambda z: (z, {}), training)[2] for z_TD in Z_BTD.astype(np.float64)]
    assert set(own) == set(rows[0])
    for name in own:
        expected = [row[name] for row in rows]
        assert_close(own[name], expected if name == "causal_capacity" and not training else np.mean(expected))
    assert 0 < np.mean(own["causal_capacity"]) < 1
    assert (own["agreement"] < 1) == training


def test_router_of_bfloat16_runs_in_float32():
    z_BTD = jnp.asarray(Z_BTD, jnp.bfloat16)
    own = jax.jit(lambda w, z: _apply(_model(), w, z, lambda z: (z, {}), True)[2])(WEIGHTS, z_BTD)
    w = {name: np.asarray(a, np.float64) for name, a in WEIGHTS.items()}
    rows = [oracles.mod(_model(), w, z_TD, lambda z: (z, {}), True)[2] for z_TD in np.asarray(z_BTD, np.float64)]
    assert own["predictor_loss"].dtype == jnp.float32
    assert_close(own["predictor_loss"], np.mean([row["predictor_loss"] for row in rows]))


def test_predictor_loss_teaches_the_router_and_nothing_below_it():
    model = _model()

    def loss(weights, z_BTD):
        return _apply(model, weights, z_BTD, lambda z: (z, {}), True)[2]["predictor_loss"]

    gradients, dz_BTD = jax.jit(jax.grad(loss, argnums=(0, 1)))(WEIGHTS, Z_BTD)
    _, chosen_BT = _masked(model, WEIGHTS, Z_BTD, True)

    def oracle(weights):
        p_BT = oracles.sigmoid(Z_BTD.astype(np.float64) @ weights["mod.router"] + weights["mod.bias"])
        return -np.mean(np.log(np.where(chosen_BT, p_BT, 1 - p_BT)))

    assert_gradients(oracle, WEIGHTS, gradients)
    assert np.all(dz_BTD == 0)


def test_predictor_loss_is_finite_for_certain_routers():
    weights = {"mod.router": 1e3 * WEIGHTS["mod.router"], "mod.bias": np.float32(0)}
    _, own, (gradients, _) = _run(_model(), weights, Z_BTD, True)
    assert np.isfinite(own["predictor_loss"])
    assert np.all(np.isfinite(gradients["mod.router"]))


def test_evaluation_is_causal_and_training_is_not():
    earlier = 4
    changed_BTD = Z_BTD.copy()
    changed_BTD[:, earlier:] += 20 * WEIGHTS["mod.router"]  # now the later tokens want the layer most
    for training, same in ((False, True), (True, False)):
        before_BTD, after_BTD = (np.asarray(_run(_model(), WEIGHTS, z, training)[0]) for z in (Z_BTD, changed_BTD))
        assert np.array_equal(after_BTD[:, :earlier], before_BTD[:, :earlier]) == same
        assert np.all(np.any(after_BTD[:, earlier:] != before_BTD[:, earlier:], axis=-1))


def test_evaluation_takes_gates_above_one_half_and_may_take_none():
    weights = {"mod.router": np.array([1, 0, 0, 0, 0], np.float32), "mod.bias": np.float32(0)}
    z_BTD = np.ones((B, T, D), np.float32)
    z_BTD[0, :, 0] = [1e-3, 0, -1e-3, 1, -1, 0, 2]  # a gate of exactly one half does not
    z_BTD[1, :, 0] = -1
    out_BTD, own, (gradients, _) = _run(_model(), weights, z_BTD, False)
    taken_BT = np.any(np.asarray(out_BTD) != 0, axis=-1)
    assert taken_BT.tolist() == [[True, False, False, True, False, False, True], [False] * T]
    z_BTD[0, :, 0] = -1
    out_BTD, own, (gradients, _) = _run(_model(), weights, z_BTD, False)
    assert np.all(out_BTD == 0)
    assert np.all(own["causal_capacity"] == 0)
    assert np.all(np.isfinite(gradients["mod.router"]))
