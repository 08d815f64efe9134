"""Mixture-of-Experts, against a loop over tokens and experts, and a queue in front of each expert."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumina.architecture import block_tensors, expert_capacity
from lumina.config import ModelConfig, MoEConfig
from lumina_jax.context import Row
from lumina_jax.moe import MoE, assign_slots, balance_loss, in_best_groups, route
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, D, E = 2, 7, 6, 4
DISPATCHES = ("capacity", "dropless")
EVERYONE = np.ones((B, T), bool)


def _model(activation="swiglu", d_ff=5, **moe):
    moe = {"pattern": "all", "num_experts": E, "capacity_factor": 0.5, **moe}
    return ModelConfig(d_model=D, d_ff=d_ff, num_layers=1, activation=activation, moe=MoEConfig(**moe))


# Capacity factor 0.5 gives C = ceil(7 k / 8) slots, so that choices are dropped.
MODELS = {
    "top1_softmax": _model(temperature=0.5),
    "top1_sigmoid_scaled": _model(score="sigmoid", route_scale=1.5),
    "top2_softmax_shared": _model(top_k=2, shared_experts=2),
    "top2_sigmoid_scaled_no_drops": _model(
        "geglu", top_k=2, score="sigmoid", temperature=2.0, route_scale=2.5, capacity_factor=4.0
    ),
    "top2_softmax_as_they_are": _model(top_k=2, renormalise=False),
    "top3_sigmoid_as_they_are_scaled": _model(top_k=3, score="sigmoid", temperature=0.7, renormalise=False, route_scale=0.5),
    "top3_softmax_of_64": _model(num_experts=64, top_k=3, d_ff=2, temperature=0.3),
    "groups": _model(num_experts=8, top_k=3, score="sigmoid", num_groups=4, top_groups=2),
    "noops": _model(top_k=2, noop_experts=3, shared_experts=1),
    "noops_top3_sigmoid": _model(top_k=3, score="sigmoid", noop_experts=2, renormalise=False, capacity_factor=0.01),
}
TOP1, TOP2, NOOPS = MODELS["top1_softmax"], MODELS["top2_softmax_shared"], MODELS["noops"]


def _dispatched(model, dispatch):
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, dispatch=dispatch))


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _weights(model, bias=()):
    """Of the layer; `bias` takes the place of the first selection biases."""
    weights = {n: w for n, w in oracles.random_weights(block_tensors(model, "moe")).items() if n.startswith("moe.")}
    weights["moe.bias"][: len(bias)] = bias
    return weights


X_BTD = _normal(B, T, D, seed=1)


def _cotangent(x_BTD):
    return _normal(*x_BTD.shape, seed=2)


def _apply(model, weights, x_BTD, training, key_B=None, taken_BT=None):
    taken_BT = jnp.ones(x_BTD.shape[:2], bool) if taken_BT is None else taken_BT
    return MoE(model, lambda name: nnx.Param(weights[name]))(x_BTD, Row(x_BTD.shape[1], 1), taken_BT, training, key_B)


def _router_losses(metrics):
    return balance_loss(metrics["load_BA"], metrics["share_BA"]) + metrics["z_loss"]


@functools.partial(jax.jit, static_argnums=0)
def _train(model, weights, x_BTD, taken_BT):
    """Output, metrics, and the gradients of a weighted sum of the output of the taken plus the router losses."""

    def loss(weights, x_BTD):
        out_BTD, metrics = _apply(model, weights, x_BTD, training=True, taken_BT=taken_BT)
        kept_BTD = jnp.where(taken_BT[:, :, None], out_BTD, 0)
        return jnp.sum(_cotangent(x_BTD) * kept_BTD) + _router_losses(metrics), (kept_BTD, metrics)

    (_, (out_BTD, metrics)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_BTD)
    return out_BTD, metrics, gradients


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(model, weights, x_BTD):
    return _apply(model, weights, x_BTD, training=False)


def _oracle(model, weights, x_BTD, training, taken_BT=None):
    taken_BT = np.ones(np.shape(x_BTD)[:2], bool) if taken_BT is None else taken_BT
    weights = {name: oracles.wide(w) for name, w in weights.items()}
    rows = [oracles.moe(model, weights, x_TD, training, t) for x_TD, t in zip(oracles.wide(x_BTD), taken_BT, strict=True)]
    metrics = {name: np.array([row[1][name] for row in rows]) for name in rows[0][1]}
    out_BTD = np.where(taken_BT[:, :, None], np.stack([row[0] for row in rows]), 0)
    return out_BTD, {name: m if "_B" in name else np.sum(m) for name, m in metrics.items()}


def _check(model, weights, x_BTD, taken_BT, tolerance):
    """Output, metrics and every gradient in training are those of the loops, whose output and metrics it returns."""
    out_BTD, metrics, (gradients, dx_BTD) = _train(model, weights, x_BTD, taken_BT)
    expected_BTD, expected = _oracle(model, weights, x_BTD, True, taken_BT)
    assert_close(out_BTD, expected_BTD, tolerance)
    assert set(metrics) == set(expected)
    for name, value in metrics.items():
        assert_close(value, expected[name], 1e-6 if name == "dropped" else tolerance)  # a share of choices, in float32

    def loss(arrays):
        out_BTD, metrics = _oracle(model, arrays, arrays["x"], True, taken_BT)
        rows = [[b] for b in range(len(x_BTD))]
        balance = oracles.balance_loss(metrics["load_BA"], metrics["share_BA"], rows)
        return np.sum(_cotangent(x_BTD) * out_BTD) + balance + metrics["z_loss"]

    assert_gradients(loss, {"x": x_BTD, **weights}, {"x": dx_BTD, **gradients}, tolerance)
    assert np.all(gradients["moe.bias"] == 0)
    return expected_BTD, expected


# --------------------------------------------------------------------------------------- against loops over tokens


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_a_loop_over_tokens_and_experts_forward_and_backward(name, dispatch):
    model = _dispatched(MODELS[name], dispatch)
    weights = {name: w.astype(np.float64) for name, w in _weights(model).items()}
    with jax.enable_x64(True):
        _, expected = _check(model, weights, X_BTD.astype(np.float64), EVERYONE, 1e-12)
    assert (expected["dropped"] > 0) == (dispatch == "capacity" and model.moe.capacity_factor < 1)


# Selection biases that force what chance would not, for four experts and three choices of nothing; and who is taken.
LEFT_OUT_BT = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0]], bool)
EDGES = {
    "as_it_comes": ((), EVERYONE),
    "an_empty_expert": ((0, -9, 0, 0), EVERYONE),
    "all_to_one_expert": ((0, 0, 9, 0), EVERYONE),
    "all_to_two_experts": ((0, 0, 9, 9), EVERYONE),
    "nothing_but_no_ops": ((0, 0, 0, 0, 9, 9, 0), EVERYONE),
    "no_no_ops": ((9, 9, 9, 9), EVERYONE),
    "some_left_out": ((), LEFT_OUT_BT),
    "some_left_out_of_one_expert": ((0, 9, 0, 0), LEFT_OUT_BT),
    "a_row_of_nobody": ((0, 9, 0, 0), LEFT_OUT_BT & [[True], [False]]),
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("edge", EDGES)
def test_edges_in_float32_equal_the_loop_forward_and_backward(edge, dispatch):
    bias, taken_BT = EDGES[edge]
    model = _dispatched(NOOPS, dispatch)
    expected_BTD, expected = _check(model, _weights(model, bias), X_BTD, taken_BT, 5e-6)
    shared_alone = _oracle(
        model, {n: 0 * w if "experts" in n else w for n, w in _weights(model).items()}, X_BTD, True, taken_BT
    )
    assert np.array_equal(expected_BTD, shared_alone[0]) == (edge == "nothing_but_no_ops")
    load_A = expected["load_BA"].sum(axis=0)
    assert load_A.sum() == 2 * taken_BT.sum()
    if edge == "nothing_but_no_ops":
        assert load_A.tolist() == [0] * 4 + [B * T, B * T, 0]
        assert expected["dropped"] == 0


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", ["top1_softmax", "groups", "noops"])
def test_a_single_token_is_routed(name, dispatch):
    model = _dispatched(MODELS[name], dispatch)
    _check(model, _weights(model), _normal(1, 1, D), np.ones((1, 1), bool), 5e-6)


@pytest.mark.parametrize("name", ["top2_softmax_shared", "groups", "noops"])
def test_equal_scores_choose_the_lower_and_training_equals_the_loop(name):
    model = MODELS[name]
    weights = {name: 0 * w if name in ("moe.router", "moe.bias") else w for name, w in _weights(model).items()}
    _, expected = _check(model, weights, X_BTD, EVERYONE, 5e-6)
    assert expected["load_BA"].tolist() == [[T] * model.moe.top_k + [0] * (len(weights["moe.bias"]) - model.moe.top_k)] * B


@pytest.mark.parametrize("name", ["top1_softmax", "groups", "noops"])
def test_evaluation_equals_a_loop_over_tokens_and_experts(name):
    model, weights = MODELS[name], _weights(MODELS[name])
    out_BTD, metrics = _evaluate(model, weights, X_BTD)
    expected_BTD, expected = _oracle(model, weights, X_BTD, training=False)
    assert_close(out_BTD, expected_BTD)
    for metric in metrics:
        assert_close(metrics[metric], expected[metric])


def test_evaluation_drops_nothing_where_training_does():
    weights = _weights(NOOPS)
    trained_BTD, trained, _ = _train(NOOPS, weights, X_BTD, EVERYONE)
    evaluated_BTD, evaluated = _evaluate(NOOPS, weights, X_BTD)
    assert trained["dropped"] > 0
    assert evaluated["dropped"] == 0
    assert np.max(np.abs(evaluated_BTD - trained_BTD)) > 1e-3


@pytest.mark.parametrize("name", ["top2_sigmoid_scaled_no_drops", "noops"])
def test_where_capacity_is_ample_both_dispatches_are_the_same(name):
    model = dataclasses.replace(MODELS[name], moe=dataclasses.replace(MODELS[name].moe, capacity_factor=99.0))
    weights = {name: w.astype(np.float64) for name, w in _weights(model).items()}
    with jax.enable_x64(True):
        ample, dropless = (_train(_dispatched(model, d), weights, X_BTD.astype(np.float64), EVERYONE) for d in DISPATCHES)
    for a, b in zip(jax.tree.leaves(ample), jax.tree.leaves(dropless), strict=True):
        assert_close(b, a, 1e-13)


def test_routing_of_bfloat16_runs_in_float32():
    weights, x_BTD = _weights(TOP2), jnp.asarray(X_BTD, jnp.bfloat16)
    out_BTD, metrics = jax.jit(lambda w, x: _apply(TOP2, w, x, True))(weights, x_BTD)
    _, expected = _oracle(TOP2, weights, np.asarray(x_BTD, np.float32), training=True)
    assert out_BTD.dtype == jnp.bfloat16
    for name in ("share_BA", "z_loss", "entropy"):
        assert metrics[name].dtype == jnp.float32
        assert_close(metrics[name], expected[name])
    assert metrics["load_BA"].tolist() == expected["load_BA"].tolist()


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


# Eighths add up exactly, so that ties are ties.
PREFERENCES_TE = np.random.default_rng(0).integers(0, 8, (200, 12)) / 8


@pytest.mark.parametrize(("num_groups", "top_groups"), [(2, 1), (3, 2), (4, 1), (6, 4)])
def test_choices_come_from_the_groups_whose_two_best_add_up_highest(num_groups, top_groups):
    moe = MoEConfig(num_experts=12, top_k=2, num_groups=num_groups, top_groups=top_groups)
    limited_TE = np.asarray(in_best_groups(moe, jnp.asarray(PREFERENCES_TE)[None]))[0]
    assert np.all(np.isfinite(limited_TE).sum(axis=1) == 12 // num_groups * top_groups)
    assert np.all((limited_TE == PREFERENCES_TE) | np.isneginf(limited_TE))
    chosen = np.argsort(-limited_TE, axis=1, kind="stable")[:, :2].tolist()
    assert chosen == [oracles.choices(moe, preference_E) for preference_E in PREFERENCES_TE]
    assert chosen != np.argsort(-PREFERENCES_TE, axis=1, kind="stable")[:, :2].tolist()  # the limit matters


def test_of_groups_that_are_worth_the_same_the_lower_is_taken():
    moe = MoEConfig(num_experts=6, top_k=2, num_groups=3, top_groups=1)
    logits_TE = [[0, 0, 3, 1, 1, 3], [1, 1, 1, 1, 1, 1], [0, 1, 5, 5, 5, 5]]
    scores = dataclasses.replace(moe, score="sigmoid")
    assert _route(scores, logits_TE, jnp.zeros(6))[0].tolist() == [[2, 3], [0, 1], [2, 3]]


def test_the_selection_bias_counts_in_the_worth_of_a_group():
    moe = MoEConfig(num_experts=4, top_k=1, num_groups=2, top_groups=1)
    logits_TE = [[0, 0, 2, 2]]
    assert _route(moe, logits_TE)[0].tolist() == [[2]]
    assert _route(moe, logits_TE, [0.0, 5.0, 0.0, 0.0])[0].tolist() == [[1]]


# --------------------------------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 1), (1, 3), (2, 1), (2, 4), (3, 5), (2, T)])
def test_drops_are_those_of_a_queue_by_position_then_rank(top_k, capacity):
    rng = np.random.default_rng(top_k)
    experts_BTk = np.argsort(rng.standard_normal((B, T, E + 2)), axis=-1)[:, :, :top_k]  # the last two do nothing
    slots_BTk = np.asarray(assign_slots(experts_BTk, E, capacity))
    for experts_Tk, slots_Tk in zip(experts_BTk, slots_BTk, strict=True):
        places_Tk = oracles.queue(experts_Tk.tolist(), E, capacity)
        assert slots_Tk.tolist() == np.where(places_Tk >= 0, experts_Tk * capacity + places_Tk, -1).tolist()
    if capacity < 4 or capacity == T:
        assert np.any(slots_BTk[experts_BTk < E] < 0) == (capacity < T)


def test_an_earlier_second_choice_is_served_before_a_later_first():
    experts_BTk = np.array([[[0, 1], [1, 2]]])
    assert assign_slots(experts_BTk, E, 1).tolist() == [[[0, 1], [-1, 2]]]


@pytest.mark.parametrize("model", [TOP1, NOOPS], ids=["top1", "top2"])
def test_dropping_is_causal(model):
    weights, earlier = _weights(model), 5
    for seed in range(5):
        x_BTD = X_BTD.copy()
        x_BTD[:, earlier:] = 3 * _normal(B, T - earlier, D, seed=10 + seed)
        before_BTD, after_BTD = (_train(model, weights, x, EVERYONE)[0] for x in (X_BTD, x_BTD))
        assert_close(after_BTD[:, :earlier], before_BTD[:, :earlier], 1e-6)
        assert np.max(np.abs(after_BTD[:, earlier:] - before_BTD[:, earlier:])) > 1e-3
    _, prefix = _oracle(model, weights, X_BTD[:, :earlier], training=True)
    assert prefix["dropped"] > 0  # the earlier tokens do compete


def test_capacity_is_rounded_up_and_counted_in_a_row():
    # 7 tokens, 2 choices, 4 experts: 3.5 at factor 1
    for factor, slots in ((1.0, 4), (0.5, 2), (0.01, 1), (100.0, T)):
        assert expert_capacity(_model(top_k=2, capacity_factor=factor), T) == slots
    # Of 7 alternatives, 3 of which do nothing, an expert is to expect 2 tokens.
    assert expert_capacity(_model(top_k=2, capacity_factor=1.0, noop_experts=3), T) == 2


def test_all_tokens_to_one_expert_keep_the_first_of_each_row():
    weights = _weights(TOP1, (0, 0, 9, 0))
    out_BTD, metrics, _ = _train(TOP1, weights, X_BTD, EVERYONE)
    slots = 1  # ceil(7 / 4 * 0.5)
    assert metrics["load_BA"].tolist() == [[0, 0, T, 0]] * B
    assert metrics["dropped"] == B * (T - slots)
    assert np.all(out_BTD[:, slots:] == 0)
    assert_close(out_BTD, _oracle(TOP1, weights, X_BTD, training=True)[0])


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_an_empty_expert_learns_nothing(dispatch):
    _, metrics, (gradients, _) = _train(_dispatched(NOOPS, dispatch), _weights(NOOPS, (0, -9, 0, 0)), X_BTD, EVERYONE)
    assert np.all(metrics["load_BA"][:, 1] == 0)
    for name in ("gate", "up", "down"):
        assert np.all(gradients[f"moe.experts.{name}"][1] == 0)
        assert np.all(np.isfinite(gradients[f"moe.experts.{name}"]))


def test_a_choice_of_nothing_takes_no_slot_and_is_not_dropped():
    # Capacity 1: were nothing an expert like the others, the tokens after the first would be dropped.
    model = _model(noop_experts=1, capacity_factor=0.01)
    _, metrics, _ = _train(model, _weights(model, (0, 0, 0, 0, 9)), X_BTD, EVERYONE)
    assert metrics["load_BA"].tolist() == [[0, 0, 0, 0, T]] * B
    assert metrics["dropped"] == 0


def test_what_is_left_out_changes_nothing_for_the_others():
    model = _dispatched(NOOPS, "capacity")
    changed_BTD = np.where(LEFT_OUT_BT[:, :, None], X_BTD, 9 * _normal(B, T, D, seed=8))
    before, after = (_train(model, _weights(model), x, LEFT_OUT_BT) for x in (X_BTD, changed_BTD))
    assert_close(after[0], before[0], 1e-6)
    assert before[1]["load_BA"].tolist() == after[1]["load_BA"].tolist()


# ----------------------------------------------------------------------------------------------------- no dropping


def test_dropless_works_for_many_tokens_unevenly_spread():
    x_BTD, weights = _normal(B, 70, D), _weights(TOP1, (0.3, 0, 0, -9))
    out_BTD, metrics = _evaluate(TOP1, weights, x_BTD)
    load_E = metrics["load_BA"].sum(axis=0)
    assert max(load_E) > 64
    assert min(load_E) == 0
    assert_close(out_BTD, _oracle(TOP1, weights, x_BTD, training=False)[0])


# ----------------------------------------------------------------------------------------------------- router losses

LOAD_BA = np.array([[3, 0, 5], [2, 6, 0], [0, 1, 7], [4, 4, 0]])
SHARE_BA = np.random.default_rng(0).uniform(0.1, 0.6, (4, 3))
PARTS = {"row": [[0], [1], [2], [3]], "micro_batch": [[0, 2], [1, 3]], "batch": [[0, 1, 2, 3]]}


@pytest.mark.parametrize("over", PARTS)
def test_balance_loss_counts_the_load_over_what_it_is_told(over):
    together_BB = np.array([[any(a in part and b in part for part in PARTS[over]) for b in range(4)] for a in range(4)])

    def loss(share_BA):
        return balance_loss(together_BB.astype(int) @ LOAD_BA, share_BA)

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(loss)(SHARE_BA)
        assert_close(value, oracles.balance_loss(LOAD_BA, SHARE_BA, PARTS[over]), 1e-13)
        assert_gradients(
            lambda a: oracles.balance_loss(LOAD_BA, a["share"], PARTS[over]), {"share": SHARE_BA}, {"share": gradient}, 1e-12
        )


def test_balance_loss_of_a_uniform_load_is_the_number_of_tokens():
    assert_close(balance_loss(jnp.full((2, E), 8), jnp.full((2, E), T / E)), 2 * T, 1e-6)


def test_balance_loss_is_the_number_of_alternatives_when_one_takes_all():
    model = _model(noop_experts=1)
    one = {**_weights(model, (0, 0, 0, 0, 9)), "moe.router": np.zeros((D, 5), np.float32)}
    _, metrics, _ = _train(model, one, X_BTD, EVERYONE)
    assert_close(balance_loss(metrics["load_BA"], metrics["share_BA"]), B * T, 1e-6)  # the scores are still uniform
    assert_close(balance_loss(metrics["load_BA"], T * jax.nn.one_hot(jnp.full(B, 4), 5)), 5 * B * T, 1e-6)


@pytest.mark.parametrize("name", ["top1_softmax", "top1_sigmoid_scaled", "noops"])
def test_entropy_is_one_when_all_scores_are_equal_and_less_otherwise(name):
    model = MODELS[name]
    uniform = {**_weights(model), "moe.router": 0 * _weights(model)["moe.router"]}
    assert_close(_train(model, uniform, X_BTD, EVERYONE)[1]["entropy"], B * T)
    assert 0.3 < _train(model, _weights(model), X_BTD, EVERYONE)[1]["entropy"] / (B * T) < 0.99


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
    assert_close(metrics["z_loss"] / tokens, 1 + 1 / 12, 0.03)
    assert_close(out_BTD, np.full((1, tokens, 1), oracles.sigmoid(1.0)))
    assert jittered(jax.random.key(1))[1]["z_loss"] != metrics["z_loss"]


@pytest.mark.parametrize(("training", "key"), [(True, None), (False, 0)], ids=["no_key", "evaluation"])
def test_jitter_acts_only_in_training_with_a_key(training, key):
    model = _model(jitter=0.5)
    key_B = None if key is None else jax.random.split(jax.random.key(key), B)
    out_BTD, _ = jax.jit(lambda weights, x_BTD: _apply(model, weights, x_BTD, training, key_B))(_weights(model), X_BTD)
    assert_close(out_BTD, _oracle(model, _weights(model), X_BTD, training)[0])
