"""Mixture-of-Experts, against a loop over tokens and experts, and a queue in front of each expert."""

import dataclasses

import numpy as np
import pytest
import torch

from lumina.architecture import block_tensors
from lumina.config import ModelConfig, MoEConfig
from lumina_torch.draw import Draw
from lumina_torch.moe import MoE, assign_slots, balance_loss, in_best_groups, margin, route, top
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
    "top3_softmax_of_64": _model(num_experts=64, top_k=3, d_ff=2, temperature=0.3),
    "groups": _model(num_experts=8, top_k=3, score="sigmoid", num_groups=4, top_groups=2),
    "noops": _model(top_k=2, noop_experts=3, shared_experts=1),
    "noops_top3_sigmoid": _model(top_k=3, score="sigmoid", noop_experts=2, renormalise=False, capacity_factor=0.01),
}
TOP1, TOP2, NOOPS = MODELS["top1_softmax"], MODELS["top2_softmax_shared"], MODELS["noops"]


def _changed(model, **moe):
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **moe))


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _weights(model, bias=()):
    """Of the layer; `bias` takes the place of the first selection biases."""
    weights = {n: w for n, w in oracles.random_weights(block_tensors(model, "moe")).items() if n.startswith("moe.")}
    weights["moe.bias"][: len(bias)] = bias
    return weights


X_BTD = _normal(B, T, D, seed=1)


def _layer(model, weights, dtype):
    params = {name: torch.tensor(w, dtype=dtype) for name, w in weights.items()}
    return MoE(model, lambda name: params[name] if name == "moe.bias" else torch.nn.Parameter(params[name]))


def _train(model, weights, x_BTD, taken_BT=EVERYONE, dtype=torch.float32):
    """Output of the taken, metrics, and the gradients of a weighted sum of it plus the router losses."""
    layer, x_BTD = _layer(model, weights, dtype), torch.tensor(x_BTD, dtype=dtype, requires_grad=True)
    out_BTD, metrics = layer(x_BTD, torch.tensor(taken_BT), True)
    kept_BTD = torch.where(torch.tensor(taken_BT)[:, :, None], out_BTD, 0)
    cotangent_BTD = torch.tensor(_normal(*x_BTD.shape, seed=2))
    losses = balance_loss(metrics["load_BA"].to(dtype), metrics["share_BA"]) + metrics["z_loss"]
    ((cotangent_BTD * kept_BTD).sum() + losses).backward()
    gradients = {f"moe.{name}": p.grad if p.grad is not None else torch.zeros_like(p) for name, p in layer.named_parameters()}
    return kept_BTD.detach(), {n: m.detach() for n, m in metrics.items()}, {"x": x_BTD.grad, **gradients}


def _everyone(x_BTD):
    return torch.ones(x_BTD.shape[:2], dtype=torch.bool)


def _evaluate(model, weights, x_BTD, taken_BT=None, **rest):
    taken_BT = _everyone(x_BTD) if taken_BT is None else taken_BT
    with torch.no_grad():
        return _layer(model, weights, torch.float32)(torch.tensor(x_BTD), taken_BT, False, **rest)


def _oracle(model, weights, x_BTD, training, taken_BT=None):
    taken_BT = np.ones(np.shape(x_BTD)[:2], bool) if taken_BT is None else taken_BT
    weights = {name: oracles.wide(w) for name, w in weights.items()}
    rows = [oracles.moe(model, weights, x_TD, training, t) for x_TD, t in zip(oracles.wide(x_BTD), taken_BT, strict=True)]
    metrics = {name: np.array([row[1][name] for row in rows]) for name in rows[0][1]}
    out_BTD = np.where(taken_BT[:, :, None], np.stack([row[0] for row in rows]), 0)
    return out_BTD, {name: m if "_B" in name else np.sum(m) for name, m in metrics.items()}


def _check(model, weights, x_BTD, taken_BT, dtype=torch.float32):
    """Output, metrics and every gradient in training are those of the loops, whose output and metrics it returns."""
    tolerance = {torch.float32: 5e-6, torch.float64: 1e-12}[dtype]
    out_BTD, metrics, gradients = _train(model, weights, x_BTD, taken_BT, dtype)
    expected_BTD, expected = _oracle(model, weights, x_BTD, True, taken_BT)
    assert_close(out_BTD, expected_BTD, tolerance)
    assert set(metrics) == set(expected)
    for name, value in metrics.items():
        assert_close(value, expected[name], 1e-6 if name == "dropped" else tolerance)  # a share of choices, in float32

    def loss(arrays):
        out_BTD, metrics = _oracle(model, arrays | fixed, arrays["x"], True, taken_BT)
        balance = oracles.balance_loss(metrics["load_BA"], metrics["share_BA"], [[b] for b in range(len(x_BTD))])
        return np.sum(_normal(*x_BTD.shape, seed=2) * out_BTD) + balance + metrics["z_loss"]

    fixed = {"moe.bias": weights["moe.bias"]}
    trained = {name: w for name, w in weights.items() if name not in fixed}
    assert_gradients(loss, {"x": x_BTD, **trained}, gradients, tolerance)
    return expected_BTD, expected


# --------------------------------------------------------------------------------------- against loops over tokens


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_a_loop_over_tokens_and_experts_forward_and_backward(name, dispatch):
    model = _changed(MODELS[name], dispatch=dispatch)
    _, expected = _check(model, _weights(model), X_BTD, EVERYONE, torch.float64)
    assert (expected["dropped"] > 0) == (dispatch == "capacity" and model.moe.capacity_factor < 1)


# Selection biases that force what chance would not, for four experts and three choices of nothing; and who is taken.
LEFT_OUT_BT = np.array([[1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0]], bool)
NOBODY_BT = np.zeros((B, T), bool)
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
    model = _changed(NOOPS, dispatch=dispatch)
    _, expected = _check(model, _weights(model, bias), X_BTD, taken_BT)
    load_A = expected["load_BA"].sum(axis=0)
    assert load_A.sum() == 2 * taken_BT.sum()
    if edge == "nothing_but_no_ops":
        assert load_A.tolist() == [0] * 4 + [B * T, B * T, 0]
        assert expected["dropped"] == 0


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_a_single_token_is_routed(dispatch):
    model = _changed(NOOPS, dispatch=dispatch)
    _check(model, _weights(model), _normal(1, 1, D), np.ones((1, 1), bool))


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_where_every_token_is_left_out_nothing_is_chosen_and_gradients_are_finite(dispatch):
    model = _changed(NOOPS, dispatch=dispatch, shared_experts=0)
    layer, x_BTD = _layer(model, _weights(model), torch.float32), torch.tensor(X_BTD, requires_grad=True)
    out_BTD, metrics = layer(x_BTD, torch.tensor(NOBODY_BT), True)
    (out_BTD.sum() + metrics["z_loss"]).backward()
    assert not out_BTD.any()
    assert not metrics["load_BA"].any()
    assert metrics["dropped"] == 0
    assert x_BTD.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("name", ["top2_softmax_shared", "groups", "noops", "top3_softmax_of_64"])
def test_equal_scores_choose_the_lower_and_training_equals_the_loop(name):
    model = MODELS[name]
    weights = {name: 0 * w if name in ("moe.router", "moe.bias") else w for name, w in _weights(model).items()}
    _, expected = _check(model, weights, X_BTD, EVERYONE)
    assert expected["load_BA"].tolist() == [[T] * model.moe.top_k + [0] * (len(weights["moe.bias"]) - model.moe.top_k)] * B


@pytest.mark.parametrize("name", ["top1_softmax", "groups", "noops"])
def test_evaluation_drops_nothing_and_equals_the_loop(name):
    model, weights = MODELS[name], _weights(MODELS[name])
    out_BTD, metrics = _evaluate(model, weights, X_BTD)
    expected_BTD, expected = _oracle(model, weights, X_BTD, training=False)
    assert_close(out_BTD, expected_BTD)
    assert_close(metrics["load_BA"], expected["load_BA"])
    assert metrics["dropped"] == 0 < _oracle(model, weights, X_BTD, training=True)[1]["dropped"]


@pytest.mark.parametrize("name", ["top2_sigmoid_scaled_no_drops", "noops"])
def test_where_capacity_is_ample_both_dispatches_are_the_same(name):
    models = [_changed(MODELS[name], capacity_factor=99.0, dispatch=dispatch) for dispatch in DISPATCHES]
    (ample, _, ours), (dropless, _, others) = (_train(m, _weights(m), X_BTD, dtype=torch.float64) for m in models)
    assert_close(dropless, ample, 1e-13)
    for name, gradient in ours.items():
        assert_close(others[name], gradient, 1e-13)


def test_routing_of_bfloat16_runs_in_float32():
    x_BTD = torch.tensor(X_BTD).bfloat16()
    out_BTD, metrics = _layer(TOP2, _weights(TOP2), torch.float32)(x_BTD, _everyone(x_BTD), True)
    _, expected = _oracle(TOP2, _weights(TOP2), x_BTD.double().numpy(), training=True)
    assert out_BTD.dtype == torch.bfloat16
    for name in ("share_BA", "z_loss", "entropy"):
        assert metrics[name].dtype == torch.float32
        assert_close(metrics[name].detach(), expected[name])
    assert metrics["load_BA"].tolist() == expected["load_BA"].tolist()


# ----------------------------------------------------------------------------------------------------------- routing


def _route(moe, logits_TE, bias_E=None):
    logits_BTE = torch.tensor(logits_TE, dtype=torch.float32)[None]
    return [a[0].numpy() for a in route(moe, logits_BTE, torch.zeros(logits_BTE.shape[2]) if bias_E is None else bias_E)]


@pytest.mark.parametrize("length", [4, 17, 64, 1000])
def test_of_equal_values_the_lower_index_is_highest(length):
    x = torch.randint(0, 3, (50, length), generator=torch.Generator().manual_seed(length)).float()
    values, indices = top(x, 4)
    expected = [sorted(range(length), key=lambda i: (-row[i], i))[:4] for row in x.tolist()]
    assert indices.tolist() == expected
    assert torch.equal(values, x.gather(1, indices))


def test_top1_gate_is_not_renormalised():
    logits_TE = _normal(T, E)
    experts_Tk, gates_Tk, _ = _route(MoEConfig(num_experts=E), logits_TE)
    assert_close(gates_Tk[:, 0], [max(oracles.softmax(logits.astype(np.float64))) for logits in logits_TE])
    assert np.all(gates_Tk < 0.99)
    assert experts_Tk[:, 0].tolist() == np.argmax(logits_TE, axis=1).tolist()


def test_top1_router_learns_from_the_language_model_alone():
    logits_BTE = torch.tensor(_normal(1, T, E), requires_grad=True)
    route(MoEConfig(num_experts=E), logits_BTE, torch.zeros(E))[1].sum().backward()
    assert (logits_BTE.grad.abs().amax(dim=-1) > 1e-3).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gates_of_several_choices_sum_to_the_route_scale(score):
    moe = MoEConfig(num_experts=E, top_k=3, score=score, route_scale=2.5)
    _, gates_Tk, _ = _route(moe, _normal(T, E))
    assert_close(gates_Tk.sum(axis=1), np.full(T, 2.5), 1e-6)
    assert np.all(np.diff(gates_Tk, axis=1) <= 0)  # first choice first


@pytest.mark.parametrize("top_k", [1, 2])
def test_bias_changes_the_choice_but_not_the_gate(top_k):
    moe, logits_TE = MoEConfig(num_experts=E, top_k=top_k), _normal(T, E)
    experts_Tk, gates_Tk, scores_TE = _route(moe, logits_TE, bias_E=torch.tensor([0.0, 0.0, 0.0, 10.0]))
    assert np.all(experts_Tk[:, 0] == 3)
    assert not np.all(_route(moe, logits_TE)[0] == experts_Tk)
    expected_TE = np.array([oracles.softmax(logits.astype(np.float64)) for logits in logits_TE])
    assert_close(scores_TE, expected_TE)
    chosen_Tk = np.take_along_axis(expected_TE, experts_Tk, axis=1)
    assert_close(gates_Tk, chosen_Tk / chosen_Tk.sum(axis=1, keepdims=True) if top_k > 1 else chosen_Tk)


def test_sigmoids_that_are_all_zero_give_gates_of_zero():
    moe = MoEConfig(num_experts=E, top_k=2, score="sigmoid")
    assert _route(moe, [[-200.0] * E])[1].tolist() == [[0, 0]]


# Eighths add up exactly, so that ties are ties.
PREFERENCES_TE = np.random.default_rng(0).integers(0, 8, (200, 12)) / 8


@pytest.mark.parametrize(("num_groups", "top_groups"), [(2, 1), (3, 2), (4, 1), (6, 4), (12, 3)])
def test_choices_come_from_the_groups_whose_two_best_add_up_highest(num_groups, top_groups):
    moe = MoEConfig(num_experts=12, top_k=2, num_groups=num_groups, top_groups=top_groups)
    limited_TE = in_best_groups(moe, torch.tensor(PREFERENCES_TE)[None])[0]
    assert (limited_TE.isfinite().sum(dim=1) == 12 // num_groups * top_groups).all()
    chosen = top(limited_TE, 2)[1].tolist()
    assert chosen == [oracles.choices(moe, preference_E) for preference_E in PREFERENCES_TE]
    assert chosen != np.argsort(-PREFERENCES_TE, axis=1, kind="stable")[:, :2].tolist() or top_groups == 3  # the limit matters


def test_the_selection_bias_counts_in_the_worth_of_a_group():
    moe = MoEConfig(num_experts=4, top_k=1, num_groups=2, top_groups=1)
    assert _route(moe, [[0, 0, 2, 2]])[0].tolist() == [[2]]
    assert _route(moe, [[0, 0, 2, 2]], torch.tensor([0.0, 5.0, 0.0, 0.0]))[0].tolist() == [[1]]


def test_the_margin_is_the_share_by_which_the_last_choice_is_ahead():
    preference_BTA = torch.tensor([[[0.5, 0.4, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]]], dtype=torch.float64)
    for top_k, expected in ((1, [0.2, 0]), (2, [0.75, 0]), (4, [np.inf, np.inf])):
        assert margin(MoEConfig(num_experts=4, top_k=top_k), preference_BTA)[0].tolist() == pytest.approx(expected)
    groups = MoEConfig(num_experts=4, top_k=1, num_groups=2, top_groups=1)  # of 0.9 and 0.1: nearer are 0.5 and 0.4
    assert margin(groups, preference_BTA)[0].tolist() == pytest.approx([0.2, 0])


# --------------------------------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize(("top_k", "capacity"), [(1, 1), (1, 3), (2, 1), (2, 4), (3, 5), (2, T)])
def test_drops_are_those_of_a_queue_by_position_then_rank(top_k, capacity):
    rng = np.random.default_rng(top_k)
    experts_BTk = np.argsort(rng.standard_normal((B, T, E + 2)), axis=-1)[:, :, :top_k]  # the last two do nothing
    slots_BTk = assign_slots(torch.tensor(experts_BTk), E, capacity).numpy()
    for experts_Tk, slots_Tk in zip(experts_BTk, slots_BTk, strict=True):
        places_Tk = oracles.queue(experts_Tk.tolist(), E, capacity)
        assert slots_Tk.tolist() == np.where(places_Tk >= 0, experts_Tk * capacity + places_Tk, -1).tolist()
    if capacity < 4 or capacity == T:
        assert np.any(slots_BTk[experts_BTk < E] < 0) == (capacity < T)


def test_an_earlier_second_choice_is_served_before_a_later_first():
    assert assign_slots(torch.tensor([[[0, 1], [1, 2]]]), E, 1).tolist() == [[[0, 1], [-1, 2]]]


@pytest.mark.parametrize("model", [TOP1, NOOPS], ids=["top1", "top2"])
def test_dropping_is_causal(model):
    earlier, x_BTD = 5, X_BTD.copy()
    x_BTD[:, earlier:] = 3 * _normal(B, T - earlier, D, seed=10)
    before_BTD, after_BTD = (_train(model, _weights(model), x)[0] for x in (X_BTD, x_BTD))
    assert_close(after_BTD[:, :earlier], before_BTD[:, :earlier], 1e-6)
    assert (after_BTD[:, earlier:] - before_BTD[:, earlier:]).abs().max() > 1e-3
    assert _oracle(model, _weights(model), X_BTD[:, :earlier], training=True)[1]["dropped"] > 0  # the earlier do compete


def test_all_tokens_to_one_expert_keep_the_first_of_each_row():
    out_BTD, metrics, _ = _train(TOP1, _weights(TOP1, (0, 0, 9, 0)), X_BTD)
    slots = 1  # ceil(7 / 4 * 0.5)
    assert metrics["load_BA"].tolist() == [[0, 0, T, 0]] * B
    assert metrics["dropped"] == B * (T - slots)
    assert not out_BTD[:, slots:].any()
    assert (out_BTD[:, :slots] != 0).all()


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_an_empty_expert_learns_nothing(dispatch):
    model = _changed(NOOPS, dispatch=dispatch)
    _, metrics, gradients = _train(model, _weights(model, (0, -9, 0, 0)), X_BTD)
    assert not metrics["load_BA"][:, 1].any()
    for name in ("gate", "up", "down"):
        assert not gradients[f"moe.experts.{name}"][1].any()
        assert gradients[f"moe.experts.{name}"].isfinite().all()


def test_what_is_left_out_changes_nothing_for_the_others():
    changed_BTD = np.where(LEFT_OUT_BT[:, :, None], X_BTD, 9 * _normal(B, T, D, seed=8))
    before, after = (_train(NOOPS, _weights(NOOPS), x, LEFT_OUT_BT) for x in (X_BTD, changed_BTD))
    assert_close(after[0], before[0], 1e-6)
    assert before[1]["load_BA"].tolist() == after[1]["load_BA"].tolist()


# ------------------------------------------------------------------------------------------------ losses and jitter

LOAD_BA = np.array([[3, 0, 5], [2, 6, 0], [0, 1, 7], [4, 4, 0]])
SHARE_BA = np.random.default_rng(0).uniform(0.1, 0.6, (4, 3))
PARTS = {"row": [[0], [1], [2], [3]], "micro_batch": [[0, 2], [1, 3]], "batch": [[0, 1, 2, 3]]}


@pytest.mark.parametrize("over", PARTS)
def test_balance_loss_counts_the_load_over_what_it_is_told(over):
    together_BB = np.array([[any(a in part and b in part for part in PARTS[over]) for b in range(4)] for a in range(4)])
    loss = balance_loss(torch.tensor(together_BB @ LOAD_BA, dtype=torch.float64), torch.tensor(SHARE_BA))
    assert_close(loss, oracles.balance_loss(LOAD_BA, SHARE_BA, PARTS[over]), 1e-13)


@pytest.mark.parametrize("name", ["top1_softmax", "top1_sigmoid_scaled", "noops"])
def test_entropy_is_one_when_all_scores_are_equal_and_less_otherwise(name):
    model = MODELS[name]
    uniform = {**_weights(model), "moe.router": 0 * _weights(model)["moe.router"]}
    assert_close(_evaluate(model, uniform, X_BTD)[1]["entropy"], B * T)
    assert 0.3 < _evaluate(model, _weights(model), X_BTD)[1]["entropy"] / (B * T) < 0.99


def test_jitter_scales_the_routers_inputs_uniformly_and_nothing_else():
    tokens, moe = 4000, MoEConfig(pattern="all", num_experts=1, jitter=0.5, capacity_factor=1.0)
    model = ModelConfig(d_model=1, d_ff=1, num_layers=1, moe=moe)
    layer = _layer(model, {name: np.ones_like(w) for name, w in _weights(model).items()}, torch.float32)
    x_BTD = torch.ones(1, tokens, 1)
    out_BTD, metrics = layer(x_BTD, _everyone(x_BTD), True, Draw(0, 0, (0,)))
    # One expert: the z-loss is the mean of u^2, and u uniform in 0.5 to 1.5 has 1 + 1/12.
    assert_close(metrics["z_loss"].detach() / tokens, 1 + 1 / 12, 0.03)
    assert_close(out_BTD.detach(), np.full((1, tokens, 1), oracles.sigmoid(1.0)))
    assert layer(x_BTD, _everyone(x_BTD), True, Draw(0, 1, (0,)))[1]["z_loss"] != metrics["z_loss"]


@pytest.mark.parametrize(("training", "draw"), [(True, None), (False, Draw(0, 0, (0, 1)))], ids=["no_draw", "evaluation"])
def test_jitter_acts_only_in_training_with_a_draw(training, draw):
    model = _model(jitter=0.5)
    out_BTD, _ = _layer(model, _weights(model), torch.float32)(torch.tensor(X_BTD), _everyone(X_BTD), training, draw)
    assert_close(out_BTD.detach(), _oracle(model, _weights(model), X_BTD, training)[0])


# ------------------------------------------------------------------------------------------------------------- telling


def test_where_asked_to_tell_choices_are_those_of_the_tokens_taken():
    _, told = _evaluate(NOOPS, _weights(NOOPS), X_BTD, taken_BT=torch.tensor(LEFT_OUT_BT), tell=True)
    _, silent = _evaluate(NOOPS, _weights(NOOPS), X_BTD)
    assert set(told) - set(silent) == {"experts_BTk", "margin_BT"}
    chosen_Bnk = [chosen[torch.tensor(taken)] for chosen, taken in zip(told["experts_BTk"], LEFT_OUT_BT, strict=True)]
    assert [torch.bincount(chosen.flatten(), minlength=7).tolist() for chosen in chosen_Bnk] == told["load_BA"].tolist()
    assert (told["experts_BTk"][~torch.tensor(LEFT_OUT_BT)] == -1).all()
    assert torch.equal(told["margin_BT"] > 0, torch.tensor(LEFT_OUT_BT))


@pytest.mark.parametrize("tell", [False, True])
def test_a_layer_that_no_token_takes_tells_the_same_metrics_in_the_same_shapes(tell):
    _, metrics = _evaluate(NOOPS, _weights(NOOPS), X_BTD, tell=tell)
    idle = _layer(NOOPS, _weights(NOOPS), torch.float32).idle(torch.tensor(X_BTD), tell)
    assert {n: (a.shape, a.dtype) for n, a in idle.items()} == {n: (a.shape, a.dtype) for n, a in metrics.items()}
    assert not any(a.any() for name, a in idle.items() if name != "experts_BTk")
