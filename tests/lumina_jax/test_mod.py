"""Mixture-of-Depths, against a mask: compute every token, keep the chosen ones, multiply by their gates."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lumina.architecture import block_tensors
from lumina.config import MoDConfig, ModelConfig, MoEConfig
from lumina_jax.context import Row
from lumina_jax.mod import MoD, select_top
from lumina_jax.model import CAUSAL, TRAINING, Block
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients, equations

B, T, D = 2, 7, 5
POSITIONS_BT = np.array([[0, 1, 2, 7, 0, 2, 3], [0, 1, 2, 3, 4, 0, 9]])
EVERYONE = np.ones((B, T), bool)
# Of a row that has more real positions than are selected, and of one that has fewer; of one that has none.
REAL = {"full": EVERYONE, "packed": np.arange(T) < [[5], [2]], "a_row_of_none": np.arange(T) < [[0], [6]]}
LAYER = 2


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


W_DD = _normal(D, D, seed=1)
Z_BTD = _normal(B, T, D, seed=2)
COTANGENT_BTD = _normal(B, T, D, seed=3)
WEIGHTS = {"mod.router": _normal(D, seed=4), "mod.bias": np.float32(0.3)}
PREDICTOR = {
    "mod.predictor.hidden": _normal(D, 3, seed=5),
    "mod.predictor.output": _normal(3, seed=6),
    "mod.predictor.bias": np.float32(0.1),
}


def _model(capacity=0.5, **mod):
    mod = MoDConfig(pattern="all", capacity=capacity, **mod)
    return ModelConfig(d_model=D, num_layers=1, num_heads=1, head_dim=4, d_ff=3, mod=mod)


PREDICTED, RANDOM = _model(predictor_width=3), _model(router="random")


def _weights(model):
    return WEIGHTS | (PREDICTOR if model.mod.predictor_width else {})


def _apply(model, weights, z_BTD, inner, top, real_BT=EVERYONE, positions_BT=POSITIONS_BT):
    """(output, metrics of inner, own metrics)."""
    router = MoD(model, lambda name: nnx.Param(jnp.asarray(weights[name])))
    selection, own = router(z_BTD, real_BT, positions_BT, LAYER, top, Row(z_BTD.shape[1], 1))
    out_BTD, metrics, _ = selection.run(lambda row, z, taken: (*inner(z), None), z_BTD)
    return out_BTD, metrics, own


def _inner(z_BND):
    return jnp.tanh(z_BND @ W_DD), {}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(model, weights, z_BTD, top, real_BT=EVERYONE):
    """Output, own metrics, and the gradients of a weighted sum of the output and the predictor loss."""

    def loss(weights, z_BTD):
        out_BTD, _, own = _apply(model, weights, z_BTD, _inner, top, real_BT)
        return jnp.sum(COTANGENT_BTD * out_BTD) + own["predictor_loss"], (out_BTD, own)

    (_, (out_BTD, own)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, z_BTD)
    return out_BTD, own, gradients


def _masked(model, weights, z_BTD, top, real_BT=EVERYONE):
    """(out [B, T, D], own metrics by row): every token computed, then the mask."""
    z_BTD = oracles.wide(z_BTD)
    weights = {name: oracles.wide(w) for name, w in weights.items()}
    real = [np.flatnonzero(real_T) for real_T in real_BT]
    rows = [oracles.depth(model, weights, *row[:2], LAYER, top, row[2]) for row in zip(z_BTD, POSITIONS_BT, real, strict=True)]
    chosen_BT = np.array([np.isin(range(T), chosen) for chosen, _, _ in rows])
    gate_BT = np.array([gate_T for _, gate_T, _ in rows])
    own = {name: np.array([metrics[name] for _, _, metrics in rows]) for name in rows[0][2]}
    return (gate_BT * chosen_BT)[:, :, None] * np.tanh(z_BTD @ W_DD.astype(np.float64)), own


# ------------------------------------------------------------------------------------------------- against the mask


@pytest.mark.parametrize("top", [True, False], ids=["top", "causal"])
@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("model", [_model(), PREDICTED, RANDOM], ids=["router", "predictor", "random"])
def test_equals_computing_all_and_masking_forward_and_backward(model, real, top):
    real_BT = REAL[real]
    out_BTD, own, (gradients, dz_BTD) = _run(model, _weights(model), Z_BTD, top, real_BT)
    expected_BTD, expected = _masked(model, _weights(model), Z_BTD, top, real_BT)
    the_other = _masked(model, _weights(model), Z_BTD, not top, real_BT)[1]["taken_BT"]
    assert np.any(expected["taken_BT"] != the_other) or real != "full"  # the two differ
    assert not np.any(expected["taken_BT"] & ~real_BT)
    assert_close(out_BTD, expected_BTD)
    assert np.all(np.any(np.asarray(out_BTD) != 0, axis=-1) == expected["taken_BT"])
    assert set(own) == set(expected)
    assert_close(own["predictor_loss"], np.sum(expected["predictor_loss"]))
    assert_close(own["logit_BT"], expected["logit_BT"])
    assert np.array_equal(own["taken_BT"], expected["taken_BT"])

    def loss(arrays):
        out_BTD, own = _masked(model, arrays, arrays["z"], top, real_BT)
        return np.sum(COTANGENT_BTD * out_BTD) + np.sum(own["predictor_loss"])

    assert_gradients(loss, {"z": Z_BTD, **_weights(model)}, {"z": dz_BTD, **gradients})


@pytest.mark.parametrize(("capacity", "count"), [(0.01, 1), (0.5, 4), (0.6, 5), (1.0, T)])
def test_exactly_the_ceiling_of_capacity_times_length_are_selected(capacity, count):
    model = _model(capacity)
    out_BTD = jax.jit(lambda w, z: _apply(model, w, z, _inner, True)[0])(WEIGHTS, Z_BTD)
    assert np.sum(np.any(np.asarray(out_BTD) != 0, axis=-1), axis=1).tolist() == [count] * B
    assert_close(out_BTD, _masked(model, WEIGHTS, Z_BTD, True)[0])


def test_ties_choose_the_earlier_position():
    index_BC = select_top(jnp.array([[2.0, 1, 1, 3, 1], [0, 0, 0, 0, 0], [1, 2, 2, 2, 1]]), 3)
    assert index_BC.tolist() == [[0, 1, 3], [0, 1, 2], [1, 2, 3]]


def test_where_the_wish_is_minus_infinity_nothing_is_selected():
    none = -jnp.inf
    index_BC = select_top(jnp.array([[none, 1, none, 3, 1], [none, none, 0, none, none], [none] * 5]), 3)
    assert index_BC.tolist() == [[1, 3, 4], [2, -1, -1], [-1] * 3]


def test_tied_rows_still_select_exactly_the_count():
    weights = {"mod.router": np.zeros(D, np.float32), "mod.bias": np.float32(0.3)}
    out_BTD, own, _ = _run(_model(), weights, Z_BTD, True)
    assert np.any(np.asarray(out_BTD) != 0, axis=-1).tolist() == [[True] * 4 + [False] * 3] * B
    assert own["taken_BT"].tolist() == [[True] * 4 + [False] * 3] * B
    assert np.all(own["logit_BT"] > 0)  # the router wants all: membership is what was selected


@pytest.mark.parametrize("top", [True, False], ids=["top", "causal"])
def test_inner_receives_only_the_selected_tokens_of_a_fixed_number(top):
    seen = []

    def inner(z):
        seen.append(z.shape)
        return z, {}

    jax.eval_shape(lambda: _apply(_model(), WEIGHTS, jnp.asarray(Z_BTD), inner, top))
    assert set(seen) == {(B, 4 if top else T, D)}


def test_selected_tokens_keep_their_original_order():
    # Inner adds up what comes before, so that it would notice another order.
    out_BTD, _, own = jax.jit(lambda z: _apply(_model(), WEIGHTS, z, lambda z: (jnp.cumsum(z, axis=1), {}), True))(Z_BTD)
    gate_BT = oracles.sigmoid(np.asarray(own["logit_BT"], np.float64))
    _, expected = _masked(_model(), WEIGHTS, Z_BTD, True)
    for b in range(B):
        chosen = np.flatnonzero(expected["taken_BT"][b])
        assert_close(out_BTD[b, chosen], gate_BT[b, chosen, None] * np.cumsum(Z_BTD[b, chosen].astype(np.float64), axis=0))


def test_what_comes_with_the_tokens_is_selected_with_them():
    @jax.jit
    def run(z_BTD):
        router = MoD(_model(), lambda name: nnx.Param(jnp.asarray(WEIGHTS[name])))
        selection, _ = router(z_BTD, EVERYONE, POSITIONS_BT, LAYER, True, Row(z_BTD.shape[1], 1))
        return selection.run(lambda row, z, positions, taken: (z, {"positions": positions}, taken), z_BTD, POSITIONS_BT)

    _, metrics, taken = run(Z_BTD)
    assert taken.all()
    chosen_BT = _masked(_model(), WEIGHTS, Z_BTD, True)[1]["taken_BT"]
    assert metrics["positions"].tolist() == [POSITIONS_BT[b, chosen_BT[b]].tolist() for b in range(B)]


def test_inner_metrics_are_passed_on():
    def inner(z):
        return z, {"total": jnp.sum(z)}

    totals = jax.jit(lambda z: [_apply(_model(1.0), WEIGHTS, z, inner, top)[1]["total"] for top in (True, False)])
    assert_close(totals(Z_BTD), [np.sum(Z_BTD.astype(np.float64))] * 2)


def test_where_no_row_takes_the_layer_it_is_not_run_and_its_cache_stays():
    def inner(row, z, taken):
        return z, {"runs": jnp.int32(1)}, jnp.int32(7)

    @jax.jit
    def run(bias):
        weights = {"mod.router": np.zeros(D, np.float32), "mod.bias": bias}
        router = MoD(_model(), lambda name: nnx.Param(jnp.asarray(weights[name])))
        selection, _ = router(jnp.asarray(Z_BTD), EVERYONE, POSITIONS_BT, LAYER, False, Row(Z_BTD.shape[1], 1))
        return selection.run(inner, jnp.asarray(Z_BTD), cache=jnp.int32(5))

    for bias, runs, cache in ((1.0, 1, 7), (-1.0, 0, 5)):
        out_BTD, metrics, after = run(np.float32(bias))
        assert (int(metrics["runs"]), int(after), bool(np.any(out_BTD))) == (runs, cache, bool(runs))


# ----------------------------------------------------------------------------------------------------- in its layer

N = 14  # tokens of a row, of which 6 are selected
SMALL = {"d_model": D, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "d_ff": 9}
EXPERTS = MoEConfig(pattern="all", num_experts=3, top_k=2, capacity_factor=1.0)
X_BND = _normal(B, N, D, seed=7)
SEGMENTS_BN = np.array([[1] * 5 + [2] * 9, [1] * 12 + [2] * 2])
POSITIONS_BN = np.array([[0, 1, 3, 4, 9, 0, 1, 2, 3, 4, 5, 8, 9, 11], [*range(11), 13, 0, 2]])


def _layer_model(scope, kind, **mod):
    depth = MoDConfig(pattern="all", capacity=0.4, scope=scope, **mod)
    return ModelConfig(**SMALL, mod=depth, moe=EXPERTS if kind.startswith("moe") else MoEConfig())


@functools.cache
def _layer_weights(model, kind):
    return oracles.random_weights(block_tensors(model, kind))


def _layer(model, kind, weights, x_BND, mode):
    block = Block(model, kind, lambda name: nnx.Param(jnp.asarray(weights[name])))
    return block(x_BND, SEGMENTS_BN, POSITIONS_BN, mode, LAYER)[:2]


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _layer_and_gradients(model, kind, weights, x_BND, mode):
    def loss(weights, x_BND):
        out_BND, metrics = _layer(model, kind, weights, x_BND, mode)
        return jnp.sum(_normal(B, N, D, seed=8) * out_BND), (out_BND, metrics)

    (_, (out, metrics)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_BND)
    return out, metrics, gradients


def _layer_oracle(model, kind, weights, x_BND, mode):
    """(out [B, N, D], taken [B, N])."""
    weights = {name: oracles.wide(w) for name, w in weights.items()}
    rows = [
        oracles.block(model, kind, weights, x, s, p, LAYER, mode.training, mode.top)
        for x, s, p in zip(oracles.wide(x_BND), SEGMENTS_BN, POSITIONS_BN, strict=True)
    ]
    return np.stack([out for out, _ in rows]), np.stack([metrics["mod"]["taken_BT"] for _, metrics in rows])


@pytest.mark.parametrize("mode", [TRAINING, CAUSAL], ids=["training", "causal"])
@pytest.mark.parametrize(
    ("scope", "kind", "mod"),
    [
        ("ffn", "dense+mod", {}),
        ("block", "dense+mod", {}),
        ("block", "moe+mod", {"predictor_width": 3}),
        ("block", "dense+mod", {"router": "random"}),
    ],
    ids=["ffn", "block", "block_of_experts_predicted", "block_at_random"],
)
def test_a_layer_equals_the_slow_one_among_the_selected_and_leaves_the_others_bit_for_bit(scope, kind, mod, mode):
    model = _layer_model(scope, kind, **mod)
    weights = _layer_weights(model, kind)
    out_BND, _, (gradients, dx_BND) = _layer_and_gradients(model, kind, weights, X_BND, mode)
    expected_BND, taken_BN = _layer_oracle(model, kind, weights, X_BND, mode)
    assert_close(out_BND, expected_BND)
    assert 0 < taken_BN.sum() < B * N
    if scope == "block":
        assert np.asarray(out_BND)[~taken_BN].tobytes() == X_BND[~taken_BN].tobytes()
    assert np.all(np.any(np.asarray(out_BND) != X_BND, axis=-1)[taken_BN])

    def loss(arrays):
        return np.sum(_normal(B, N, D, seed=8) * _layer_oracle(model, kind, arrays, arrays["x"], mode)[0])

    assert_gradients(loss, {"x": X_BND, **weights}, {"x": dx_BND, **gradients})


@pytest.mark.parametrize("scope", ["ffn", "block"])
def test_what_is_skipped_in_training_is_not_computed(scope):
    model = _layer_model(scope, "dense+mod")
    jaxpr = jax.make_jaxpr(lambda x: _layer(model, "dense+mod", _layer_weights(model, "dense+mod"), x, TRAINING))(X_BND)
    products = [
        tuple(sorted(v.aval.shape for v in (*equation.invars, *equation.outvars)))
        for equation in equations(jaxpr.jaxpr)
        if equation.primitive.name == "dot_general"
    ]
    selected = math.ceil(0.4 * N)
    feedforward = [shapes for shapes in products if any(9 in shape for shape in shapes)]  # d_ff is 9, and nothing else
    assert len(feedforward) == 3
    assert all(B * selected * 9 in [math.prod(shape) for shape in shapes] for shapes in feedforward)
    # In a block only the router, a matrix-vector product, sees all tokens.
    of_all = [shapes for shapes in products if any(N in shape or B * N in shape for shape in shapes)]
    of_router = [shapes for shapes in of_all if sorted(shapes, key=len) == [(D,), (B, N), (B, N, D)]]
    assert of_router
    assert (of_all == of_router) == (scope == "block")


def test_residual_is_not_counted_twice():
    # With the outputs of attention and feed-forward at zero the layer adds nothing at all.
    model = _layer_model("block", "dense+mod")
    silent = ("attention.output", "feedforward.down")
    weights = {name: 0 * w if name in silent else w for name, w in _layer_weights(model, "dense+mod").items()}
    for mode in (TRAINING, CAUSAL):
        assert np.array_equal(_layer_and_gradients(model, "dense+mod", weights, X_BND, mode)[0], X_BND)


# ------------------------------------------------------------------------------------------------ the causal decision


def test_router_of_bfloat16_runs_in_float32():
    z_BTD = jnp.asarray(Z_BTD, jnp.bfloat16)
    own = jax.jit(lambda w, z: _apply(_model(), w, z, lambda z: (z, {}), True)[2])(WEIGHTS, z_BTD)
    _, expected = _masked(_model(), WEIGHTS, np.asarray(z_BTD, np.float64), True)
    assert own["predictor_loss"].dtype == jnp.float32
    assert_close(own["predictor_loss"], np.sum(expected["predictor_loss"]))


@pytest.mark.parametrize("model", [_model(), PREDICTED], ids=["router", "predictor"])
def test_predictor_loss_teaches_what_decides_and_nothing_below_it(model):
    def loss(weights, z_BTD):
        return _apply(model, weights, z_BTD, lambda z: (z, {}), True)[2]["predictor_loss"]

    weights = _weights(model)
    gradients, dz_BTD = jax.jit(jax.grad(loss, argnums=(0, 1)))(weights, Z_BTD)
    assert_gradients(lambda w: np.sum(_masked(model, w, Z_BTD, True)[1]["predictor_loss"]), weights, gradients)
    assert np.all(dz_BTD == 0)
    taught = {name for name, gradient in gradients.items() if np.any(gradient != 0)}
    assert taught == (set(PREDICTOR) if model is PREDICTED else set(WEIGHTS))


def test_nothing_is_learned_where_the_choice_is_random_but_the_gate():
    _, own, (gradients, _) = _run(RANDOM, WEIGHTS, Z_BTD, True)
    assert own["predictor_loss"] == 0
    taught = jax.grad(lambda w: _apply(RANDOM, w, Z_BTD, _inner, True)[2]["predictor_loss"])(WEIGHTS)
    assert all(np.all(gradient == 0) for gradient in taught.values())
    assert all(np.all(gradient != 0) for gradient in gradients.values())  # the gate's, through the output


@pytest.mark.parametrize("top", [True, False], ids=["top", "causal"])
def test_random_choice_is_that_of_layer_and_position_alone(top):
    positions_BT = np.tile(np.arange(400), (2, 1))
    positions_BT[1] = positions_BT[1, ::-1]

    @functools.partial(jax.jit, static_argnums=1)
    def taken(z_BTD, layer):
        router = MoD(RANDOM, lambda name: nnx.Param(jnp.asarray(WEIGHTS[name])))
        real_BT = np.ones(positions_BT.shape, bool)
        return router(z_BTD, real_BT, positions_BT, layer, top, Row(z_BTD.shape[1], 1))[0].taken_BT

    found_BT = np.asarray(taken(_normal(2, 400, D), 3))
    assert np.array_equal(found_BT, taken(_normal(2, 400, D, seed=1), 3))
    assert np.array_equal(found_BT[1, ::-1], found_BT[0])
    assert 0.2 < np.mean(found_BT[0] == taken(_normal(2, 400, D), 4)[0]) < 0.8  # another layer takes others
    expected_T = np.array([draw < 0.5 for draw in (oracles.draw(3, position) for position in range(400))])
    if top:
        assert found_BT[0].sum() == 200
        assert np.mean(found_BT[0] == expected_T) > 0.9
    else:
        assert np.array_equal(found_BT[0], expected_T)
        assert abs(np.mean(found_BT[0]) - 0.5) < 0.1


def test_predictor_loss_is_finite_for_certain_routers():
    weights = {"mod.router": 1e3 * WEIGHTS["mod.router"], "mod.bias": np.float32(0)}
    _, own, (gradients, _) = _run(_model(), weights, Z_BTD, True)
    assert np.isfinite(own["predictor_loss"])
    assert np.all(np.isfinite(gradients["mod.router"]))


def test_the_causal_choice_does_not_see_the_future_and_the_top_does():
    earlier = 4
    changed_BTD = Z_BTD.copy()
    changed_BTD[:, earlier:] += 20 * WEIGHTS["mod.router"]  # now the later tokens want the layer most
    for top, same in ((False, True), (True, False)):
        before_BTD, after_BTD = (np.asarray(_run(_model(), WEIGHTS, z, top)[0]) for z in (Z_BTD, changed_BTD))
        assert np.array_equal(after_BTD[:, :earlier], before_BTD[:, :earlier]) == same
        assert np.all(np.any(after_BTD[:, earlier:] != before_BTD[:, earlier:], axis=-1))


def test_the_causal_choice_takes_gates_above_one_half_and_may_take_none():
    weights = {"mod.router": np.array([1, 0, 0, 0, 0], np.float32), "mod.bias": np.float32(0)}
    z_BTD = np.ones((B, T, D), np.float32)
    z_BTD[0, :, 0] = [1e-3, 0, -1e-3, 1, -1, 0, 2]  # a gate of exactly one half does not
    z_BTD[1, :, 0] = -1
    out_BTD, own, (gradients, _) = _run(_model(), weights, z_BTD, False)
    taken_BT = np.any(np.asarray(out_BTD) != 0, axis=-1)
    assert taken_BT.tolist() == [[True, False, False, True, False, False, True], [False] * T]
    z_BTD = z_BTD.copy()  # JAX may still be reading the first one, without a copy
    z_BTD[0, :, 0] = -1
    out_BTD, own, (gradients, _) = _run(_model(), weights, z_BTD, False)
    assert np.all(out_BTD == 0)
    assert not np.any(own["taken_BT"])
    assert np.all(np.isfinite(gradients["mod.router"]))
