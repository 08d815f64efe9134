"""Mixture-of-Experts, against a loop over tokens and experts, and a queue in front of each expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lumina_jax.moe
from lumina.architecture import block_tensors, expert_capacity
from lumina.config import ModelConfig, MoEConfig
from lumina_jax.moe import MoE, assign_slots, balance_loss, route
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, D, E = 2, 7, 6, 4
LOSSES = ("balance_loss", "z_loss")


def _model(activation="swiglu", **moe):
    moe = {"pattern": "all", "num_experts": E, "capacity_factor": 0.5, **moe}
    return ModelConfig(d_model=D, d_ff=5, num_layers=1, activation=activation, moe=MoEConfig(**moe))


# Capacity factor 0.5 gives C = ceil(7 k / 8) slots, so that choices are dropped.
MODELS = {
    "top1_softmax": _model(temperature=0.5),
    "top2_softmax_shared": _model(top_k=2, shared_experts=2),
    "top2_sigmoid_scaled_no_drops": _model(
        "geglu", top_k=2, score="sigmoid", temperature=2.0, route_scale=2.5, capacity_factor=4.0
    ),
}
TOP1, TOP2 = MODELS["top1_softmax"], MODELS["top2_softmax_shared"]


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _weights(model):
    return {n: w for n, w in oracles.random_weights(block_tensors(model, "moe")).items() if n.startswith("moe.")}


X_BTD = _normal(B, T, D, seed=1)
COTANGENT_BTD = _normal(B, T, D, seed=2)


def _apply(model, weights, x_BTD, training, key_B=None):
    return MoE(model, lambda name: nnx.Param(weights[name]))(x_BTD, training, key_B)


@functools.partial(jax.jit, static_argnums=0)
def _train(model, weights, x_BTD):
    """Output, metrics, and the gradients of a weighted sum of the output plus the router losses."""

    def loss(weights, x_BTD):
        out_BTD, metrics = _apply(model, weights, x_BTD, training=True)
        return jnp.sum(COTANGENT_BTD * out_BTD) + sum(metrics[name] for name in LOSSES), (out_BTD, metrics)

    (_, (out_BTD, metrics)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_BTD)
    return out_BTD, metrics, gradients


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(model, weights, x_BTD):
    return _apply(model, weights, x_BTD, training=False)


def _oracle(model, weights, x_BTD, training):
    weights = {name: np.asarray(w, np.float64) for name, w in weights.items()}
    rows = [oracles.moe(model, weights, x_TD.astype(np.float64), training) for x_TD in x_BTD]
    metrics = {name: np.mean([row[1][name] for row in rows], axis=0) for name in rows[0][1]}
    return np.stack([row[0] for row in rows]), {**metrics, "load_E": metrics["load_E"] * len(rows)}


# --------------------------------------------------------------------------------------- against loops over tokens


@pytest.mark.parametrize("name", MODELS)
def test_training_equals_a_loop_over_tokens_and_experts_forward_and_backward(name):
    model, weights = MODELS[name], _weights(MODELS[name])
    out_BTD, metrics, (gradients, dx_BTD) = _train(model, weights, X_BTD)
    expected_BTD, expected = _oracle(model, weights, X_BTD, training=True)
    assert_close(out_BTD, expected_BTD)
    assert set(metrics) == set(expected)
    for metric in metrics:
        assert_close(metrics[metric], expected[metric])
    assert (expected["dropped"] > 0) == (model.moe.capacity_factor < 1)

    def loss(arrays):
        out_BTD, metrics = _oracle(model, arrays, arrays["x"], training=True)
        return np.sum(COTANGENT_BTD * out_BTD) + sum(metrics[name] for name in LOSSES)

    assert_gradients(loss, {"x": X_BTD, **weights}, {"x": dx_BTD, **gradients})


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_equals_a_loop_over_tokens_and_experts(name):
    model, weights = MODELS[name], _weights(MODELS[name])
    out_BTD, metrics = _evaluate(model, weights, X_BTD)
    expected_BTD, expected = _oracle(model, weights, X_BTD, training=False)
    assert_close(out_BTD, expected_BTD)
    for metric in metrics:
        assert_close(metrics[metric], expected[metric])


def test_evaluation_drops_nothing_where_training_does():
    weights = _weights(TOP2)
    trained_BTD, trained, _ = _train(TOP2, weights, X_BTD)
    evaluated_BTD, evaluated = _evaluate(TOP2, weights, X_BTD)
    assert trained["dropped"] > 0
    assert evaluated["dropped"] == 0
    assert np.max(np.abs(evaluated_BTD - trained_BTD)) > 1e-3


def test_routing_of_bfloat16_runs_in_float32():
    weights, x_BTD = _weights(TOP2), jnp.asarray(X_BTD, jnp.bfloat16)
    out_BTD, metrics = jax.jit(lambda w, x: _apply(TOP2, w, x, True))(weights, x_BTD)
    _, expected = _oracle(TOP2, weights, np.asarray(x_BTD, np.float32), training=True)
    assert out_BTD.dtype == jnp.bfloat16
    for name in LOSSES:
        assert metrics[name].dtype == jnp.float32
        assert_close(metrics[name], expected[name])


# ----------------------------------------------------------------------------------------------------------- routing


def _route(moe, logits_TE, bias_E=None):
    logits_BTE = jnp.asarray(logits_TE, jnp.float32)[None]
    return [np.asarray(a)[0] for a in route(moe, logits_BTE, jnp.zeros(E) if bias_E is None else jnp.asarray(bias_E))]


def test_top1_gate_is_not_renormalised():
    logits_TE = _normal(T, E)
    experts_Tk, gates_Tk, _ = _route(MoEConfig(num_experts=E), logits_TE)
    expected = [max(oracles.softmax(logits.astype(np.float64))) for logits in logits_TE]
    assert_close(gates_Tk[:, 0], expected)
    assert np.all(gates_Tk < 0.99)
    assert experts_Tk[:, 0].tolist() == np.argmax(logits_TE, axis=1).tolist()


def test_top1_router_learns_from_the_language_model_alone():
    gates = lambda logits: jnp.sum(route(MoEConfig(num_experts=E), logits, jnp.zeros(E))[1])  # noqa: E731
    gradient = jax.jit(jax.grad(gates))(_normal(1, T, E))
    assert np.all(np.max(np.abs(gradient), axis=-1) > 1e-3)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gates_of_several_choices_sum_to_the_route_scale(score):
    moe = MoEConfig(num_experts=E, top_k=3, score=score, route_scale=2.5)
    _, gates_Tk, _ = _route(moe, _normal(T, E))
    assert_close(gates_Tk.sum(axis=1), np.full(T, 2.5), 1e-6)
    assert np.all(np.diff(gates_Tk, axis=1) <= 0)  # first choice first


@pytest.mark.parametrize("top_k", [1, 2])
def test_bias_changes_the_choice_but_not_the_gate(top_k):
    moe = MoEConfig(num_experts=E, top_k=top_k)
    logits_TE = _normal(T, E)
    experts_Tk, gates_Tk, scores_TE = _route(moe, logits_TE, bias_E=[0.0, 0.0, 0.0, 10.0])
    assert np.all(experts_Tk[:, 0] == 3)
    assert not np.all(_route(moe, logits_TE)[0] == experts_Tk)
    expected_TE = np.array([oracles.softmax(logits.astype(np.float64)) for logits in logits_TE])
    assert_close(scores_TE, expected_TE)
    chosen_Tk = np.take_along_axis(expected_TE, experts_Tk, axis=1)
    assert_close(gates_Tk, chosen_Tk / chosen_Tk.sum(axis=1, keepdims=True) if top_k > 1 else chosen_Tk)


def test_equal_scores_choose_the_lower_expert():
    experts_Tk, _, _ = _route(TOP2.moe, [[0, 0, 0, 0], [0, 5, 0, 5], [1, 2, 2, 2], [-1, -1, -2, -1]])
    assert experts_Tk.tolist() == [[0, 1], [1, 3], [1, 2], [0, 1]]


# --------------------------------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 1), (1, 3), (2, 1), (2, 4), (3, 5), (2, T)])
def test_drops_are_those_of_a_queue_by_position_then_rank(top_k, capacity):
    rng = np.random.default_rng(top_k)
    experts_BTk = np.argsort(rng.standard_normal((B, T, E)), axis=-1)[:, :, :top_k]
    slots_BTk = np.asarray(assign_slots(experts_BTk, E, capacity))
    for experts_Tk, slots_Tk in zip(experts_BTk, slots_BTk, strict=True):
        places_Tk = oracles.queue(experts_Tk.tolist(), capacity)
        assert slots_Tk.tolist() == np.where(places_Tk >= 0, experts_Tk * capacity + places_Tk, -1).tolist()
    assert np.any(slots_BTk < 0) == (capacity < T)


def test_an_earlier_second_choice_is_served_before_a_later_first():
    experts_BTk = np.array([[[0, 1], [1, 2]]])
    assert assign_slots(experts_BTk, E, 1).tolist() == [[[0, 1], [-1, 2]]]


@pytest.mark.parametrize("model", [TOP1, TOP2], ids=["top1", "top2"])
def test_dropping_is_causal(model):
    weights, earlier = _weights(model), 5
    for seed in range(5):
        x_BTD = X_BTD.copy()
        x_BTD[:, earlier:] = 3 * _normal(B, T - earlier, D, seed=10 + seed)
        before_BTD, after_BTD = (_train(model, weights, x)[0] for x in (X_BTD, x_BTD))
        assert_close(after_BTD[:, :earlier], before_BTD[:, :earlier], 1e-6)
        assert np.max(np.abs(after_BTD[:, earlier:] - before_BTD[:, earlier:])) > 1e-3
    _, prefix = _oracle(model, weights, X_BTD[:, :earlier], training=True)
    assert prefix["dropped"] > 0  # the earlier tokens do compete


def test_capacity_is_rounded_up_and_counted_in_a_row():
    # 7 tokens, 2 choices, 4 experts: 3.5 at factor 1
    for factor, slots in ((1.0, 4), (0.5, 2), (0.01, 1), (100.0, T)):
        assert expert_capacity(_model(top_k=2, capacity_factor=factor), T) == slots


def _forced(model, bias_E):
    weights = _weights(model)
    weights["moe.bias"] = np.array(bias_E, np.float32)
    return weights


def test_all_tokens_to_one_expert_keep_the_first_of_each_row():
    weights = _forced(TOP1, [0, 0, 9, 0])
    out_BTD, metrics, _ = _train(TOP1, weights, X_BTD)
    slots = 1  # ceil(7 / 4 * 0.5)
    assert metrics["load_E"].tolist() == [0, 0, B * T, 0]
    assert_close(metrics["dropped"], 1 - slots / T, 1e-6)
    assert np.all(out_BTD[:, slots:] == 0)
    assert_close(out_BTD, _oracle(TOP1, weights, X_BTD, training=True)[0])
    assert_close(_evaluate(TOP1, weights, X_BTD)[0], _oracle(TOP1, weights, X_BTD, training=False)[0])


def test_an_empty_expert_changes_nothing_and_learns_nothing():
    weights = _forced(TOP2, [0, -9, 0, 0])
    out_BTD, metrics, (gradients, _) = _train(TOP2, weights, X_BTD)
    assert metrics["load_E"][1] == 0
    assert_close(out_BTD, _oracle(TOP2, weights, X_BTD, training=True)[0])
    assert_close(_evaluate(TOP2, weights, X_BTD)[0], _oracle(TOP2, weights, X_BTD, training=False)[0])
    for name in ("gate", "up", "down"):
        assert np.all(gradients[f"moe.experts.{name}"][1] == 0)
        assert np.all(np.isfinite(gradients[f"moe.experts.{name}"]))


# ----------------------------------------------------------------------------------------------------- no dropping


@pytest.mark.parametrize("block", [1, 5])
def test_dropless_counts_need_not_divide_by_the_block(block, monkeypatch):
    monkeypatch.setattr(lumina_jax.moe, "BLOCK", block)
    # A compilation of its own, as BLOCK is read while tracing.
    evaluate = jax.jit(lambda weights, x_BTD: _apply(TOP2, weights, x_BTD, training=False)[0])
    for bias_E in ([0, 0, 0, 0], [-9, 9, 0, 0], [0, 0, 9, 9]):
        weights = _forced(TOP2, bias_E)
        assert_close(evaluate(weights, X_BTD), _oracle(TOP2, weights, X_BTD, training=False)[0])


def test_dropless_works_beyond_one_block_of_tokens():
    x_BTD = _normal(B, 70, D)
    weights = _forced(TOP1, [0.3, 0, 0, -9])
    out_BTD, metrics = _evaluate(TOP1, weights, x_BTD)
    assert max(metrics["load_E"]) > lumina_jax.moe.BLOCK
    assert_close(out_BTD, _oracle(TOP1, weights, x_BTD, training=False)[0])


def test_a_single_token_is_routed():
    x_BTD = _normal(1, 1, D)
    assert_close(_evaluate(TOP2, _weights(TOP2), x_BTD)[0], _oracle(TOP2, _weights(TOP2), x_BTD, training=False)[0])


# ----------------------------------------------------------------------------------------------------- router losses


@pytest.mark.parametrize("scale", [1.0, 0.3], ids=["probabilities", "sigmoid_scores"])
def test_balance_loss_of_a_uniform_load_is_one(scale):
    experts_BTk = np.arange(16).reshape(2, 8, 1) % E
    assert_close(balance_loss(jnp.full((2, 8, E), scale / E), experts_BTk), 1, 1e-6)


def test_balance_loss_is_the_number_of_experts_when_one_takes_all():
    scores_BTE = jnp.zeros((2, 8, E)).at[:, :, 2].set(1)
    assert_close(balance_loss(scores_BTE, np.full((2, 8, 1), 2)), E, 1e-6)


# ------------------------------------------------------------------------------------------------------------ jitter


def test_jitter_scales_the_routers_inputs_uniformly_and_nothing_else():
    tokens = 4000
    moe = MoEConfig(pattern="all", num_experts=1, jitter=0.5, capacity_factor=1.0)
    model = ModelConfig(d_model=1, d_ff=1, num_layers=1, moe=moe)
    weights = {name: np.ones_like(w) for name, w in _weights(model).items()}
    x_BTD = np.ones((1, tokens, 1), np.float32)
    jittered = jax.jit(lambda key: _apply(model, weights, x_BTD, True, key[None]))
    out_BTD, metrics = jittered(jax.random.key(0))
    # One expert: the z-loss is the mean of u^2, and u uniform in 0.5 to 1.5 has 1 + 1/12.
    assert_close(metrics["z_loss"], 1 + 1 / 12, 0.03)
    assert_close(out_BTD, np.full((1, tokens, 1), oracles.sigmoid(1.0)))
    assert jittered(jax.random.key(1))[1]["z_loss"] != metrics["z_loss"]


@pytest.mark.parametrize(("training", "key"), [(True, None), (False, 0)], ids=["no_key", "evaluation"])
def test_jitter_acts_only_in_training_with_a_key(training, key):
    model = _model(jitter=0.5)
    key_B = None if key is None else jax.random.split(jax.random.key(key), B)
    out_BTD, _ = jax.jit(lambda weights, x_BTD: _apply(model, weights, x_BTD, training, key_B))(_weights(model), X_BTD)
    assert_close(out_BTD, _oracle(model, _weights(model), X_BTD, training)[0])
