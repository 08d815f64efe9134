"""Grouped feed-forward, against a loop over choices in float64, with gradients written out.

N tokens, k choices a token, E experts, D model width, F feed-forward width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

import lumina_jax.grouped
from lumina.errors import ConfigError
from lumina_jax.feedforward import ACTIVATIONS
from lumina_jax.grouped import FORMS, block_sizes, blocks, choose_grouped, grouped_feedforward, ragged, sort_choices
from tests.lumina_jax.oracles import assert_close, equations, sigmoid

N, k, E, D, F = 23, 2, 4, 6, 5

# An expert's choices are rarely a multiple of these, and there are several blocks of both sizes.
RUNS = {"blocks": functools.partial(blocks, sizes=(8, 3)), "one_size": functools.partial(blocks, sizes=(5,)), "ragged": ragged}


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _inputs(N=N, k=k, E=E, seed=0):
    """x, weights and cotangent in float64, each with values of ordinary size."""
    weights = tuple(_normal(E, *s, seed=seed + i) / math.sqrt(s[0]) for i, s in enumerate(((D, F), (D, F), (F, D)), 1))
    return _normal(N, D, seed=seed), weights, _normal(N, k, D, seed=seed + 4)


def _random(low, high, N=N, k=k):
    return np.random.default_rng(5).integers(low, high, (N, k))


# -------------------------------------------------------------------------------------------------------- the oracle


def _activate(activation, a):
    if activation == "swiglu":
        return a * sigmoid(a)
    return 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))


def _oracle(x_ND, experts_Nk, weights, activation, cotangent_NkD):
    """(out [N, k, D], gradients of sum(cotangent * out): x, (gate, up, down)), choice by choice."""
    x_ND, cotangent_NkD, *weights = (np.asarray(a, np.float64) for a in (x_ND, cotangent_NkD, *weights))
    gate_EDF, up_EDF, down_EFD = weights
    out_NkD, dx_ND = np.zeros(cotangent_NkD.shape), np.zeros(x_ND.shape)
    dgate_EDF, dup_EDF, ddown_EFD = (np.zeros(w.shape) for w in weights)
    for n, choices in enumerate(np.asarray(experts_Nk)):
        for j, e in enumerate(choices):
            if not 0 <= e < len(gate_EDF):
                continue
            gate_F, up_F, dy_D = x_ND[n] @ gate_EDF[e], x_ND[n] @ up_EDF[e], cotangent_NkD[n, j]
            active_F = _activate(activation, gate_F)
            slope_F = np.imag(_activate(activation, gate_F + 1e-30j)) / 1e-30  # exact: nothing is subtracted
            out_NkD[n, j] = (active_F * up_F) @ down_EFD[e]
            dhidden_F = down_EFD[e] @ dy_D
            dgate_F, dup_F = dhidden_F * up_F * slope_F, dhidden_F * active_F
            ddown_EFD[e] += np.outer(active_F * up_F, dy_D)
            dgate_EDF[e] += np.outer(x_ND[n], dgate_F)
            dup_EDF[e] += np.outer(x_ND[n], dup_F)
            dx_ND[n] += gate_EDF[e] @ dgate_F + up_EDF[e] @ dup_F
    return out_NkD, dx_ND, (dgate_EDF, dup_EDF, ddown_EFD)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _with_gradients(run, x_ND, experts_Nk, weights, activation, cotangent_NkD):
    def loss(x_ND, weights):
        out_NkD = run(x_ND, experts_Nk, weights, activation)
        return jnp.sum(cotangent_NkD * out_NkD), out_NkD

    (_, out_NkD), (dx_ND, dweights) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_ND, weights)
    return out_NkD, dx_ND, dweights


def _assert_equal(actual, expected, tolerance=5e-6):
    out_NkD, dx_ND, dweights = actual
    assert_close(out_NkD, expected[0], tolerance)
    assert_close(dx_ND, expected[1], tolerance)
    for dw, expected_dw in zip(dweights, expected[2], strict=True):
        assert_close(dw, expected_dw, tolerance)


def _check(run, experts_Nk, activation="swiglu", E=E):
    x_ND, weights, cotangent_NkD = _inputs(*experts_Nk.shape, E)
    narrow = jax.tree.map(np.float32, (x_ND, weights, cotangent_NkD))
    actual = _with_gradients(run, narrow[0], experts_Nk, narrow[1], activation, narrow[2])
    _assert_equal(actual, _oracle(narrow[0], experts_Nk, narrow[1], activation, narrow[2]))
    return actual


# ----------------------------------------------------------------------------------------------- values and gradients

LOADS = {
    "balanced": np.arange(N * k).reshape(N, k) % E,
    "random": _random(0, E),
    "some_take_none": _random(-3, E + 3),
    "none_takes_any": np.where(_random(0, 2) > 0, -1, E),
    "all_to_the_first": np.zeros((N, k), int),
    "all_to_the_last": np.full((N, k), E - 1),
    "all_to_one_and_some_none": np.where(_random(0, 3) > 0, 2, -1),
    "two_empty_experts": 2 * _random(0, 2),
    "one_choice_in_all": np.where(np.arange(N * k).reshape(N, k) == 17, 1, E),
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("run", RUNS)
def test_equals_a_loop_over_choices_forward_and_backward(run, load):
    _check(RUNS[run], LOADS[load])


@pytest.mark.parametrize("run", RUNS)
def test_geglu_equals_a_loop_over_choices(run):
    _check(RUNS[run], LOADS["some_take_none"], "geglu")


SHAPES = {
    "one_token": ([[1]], E),
    "one_token_that_takes_none": ([[-1]], E),
    "one_token_two_choices": ([[3, 1]], E),
    "one_expert": (np.zeros((9, 1), int), 1),
    "one_expert_of_which_some_take_none": (np.arange(9)[:, None] % 2, 1),
    "three_choices": (_random(-1, E, 7, 3), E),
    "more_experts_than_choices": (_random(0, 12, 5, 1), 12),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_small_and_odd_shapes_in_blocks_of_the_real_sizes(form, shape):
    experts_Nk, num_experts = SHAPES[shape]
    _check(functools.partial(grouped_feedforward, form=form), np.asarray(experts_Nk), E=num_experts)


def test_more_choices_than_the_largest_block():
    sizes = block_sizes("cpu", 700, 2)
    assert sizes[0] < 500
    _check(grouped_feedforward, (np.arange(700) >= 500)[:, None].astype(int), E=2)


@settings(max_examples=60)
@given(st.lists(st.integers(-1, E), min_size=N * k, max_size=N * k))
def test_any_load_equals_a_loop_over_choices(experts):
    _check(RUNS["blocks"], np.reshape(experts, (N, k)))


@pytest.mark.parametrize("run", RUNS)
def test_float64_stays_float64(run):
    x_ND, weights, cotangent_NkD = _inputs()
    with jax.enable_x64(True):
        actual = _with_gradients(RUNS[run], x_ND, LOADS["some_take_none"], weights, "swiglu", cotangent_NkD)
    assert {a.dtype for a in jax.tree.leaves(actual)} == {np.dtype("float64")}
    _assert_equal(actual, _oracle(x_ND, LOADS["some_take_none"], weights, "swiglu", cotangent_NkD), 1e-12)


@pytest.mark.parametrize("run", RUNS)
def test_bfloat16_work_gives_gradients_in_the_dtypes_of_what_they_belong_to(run):
    x_ND, weights, cotangent_NkD = _inputs()
    x_ND, cotangent_NkD = (jnp.asarray(a, jnp.bfloat16) for a in (x_ND, cotangent_NkD))
    weights = jax.tree.map(np.float32, weights)
    actual = _with_gradients(RUNS[run], x_ND, LOADS["some_take_none"], weights, "swiglu", cotangent_NkD)
    assert (actual[0].dtype, actual[1].dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {dw.dtype for dw in actual[2]} == {np.dtype("float32")}
    rounded = [np.asarray(jnp.asarray(w, jnp.bfloat16), np.float64) for w in weights]
    _assert_equal(actual, _oracle(x_ND, LOADS["some_take_none"], rounded, "swiglu", cotangent_NkD), 2e-2)


def test_weight_gradients_of_many_blocks_are_added_up_in_float32():
    tokens = 1200  # added one by one in bfloat16, equal addends would stop to count at 256
    x_ND, weights, cotangent_NkD = (
        jnp.ones((tokens, D), jnp.bfloat16),
        _inputs(E=1)[1],
        jnp.ones((tokens, 1, D), jnp.bfloat16),
    )
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16), weights)
    run, experts_Nk = functools.partial(blocks, sizes=(2,)), np.zeros((tokens, 1), int)
    _, _, dweights = _with_gradients(run, x_ND, experts_Nk, weights, "swiglu", cotangent_NkD)
    _, _, expected = _oracle(x_ND, experts_Nk, weights, "swiglu", cotangent_NkD)
    for dw, expected_dw in zip(dweights, expected, strict=True):
        assert_close(dw, expected_dw, 2e-2)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_token_that_takes_no_expert_may_be_anything(run, bad):
    experts_Nk = LOADS["some_take_none"].copy()
    experts_Nk[[0, 7, N - 1]] = [[-1, E], [E, E], [-1, -1]]
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs())
    expected = _oracle(x_ND, experts_Nk, weights, "swiglu", cotangent_NkD)
    for array in (x_ND, cotangent_NkD):
        array[[0, 7, N - 1]] = bad

    out_NkD, back = jax.vjp(jax.jit(lambda x, w: RUNS[run](x, experts_Nk, w, "swiglu")), x_ND, weights)
    _assert_equal((out_NkD, *back(cotangent_NkD)), expected)
    assert np.all(np.asarray(out_NkD)[[0, 7, N - 1]] == 0)


def test_one_token_that_is_not_finite_spoils_only_its_own_experts():
    experts_Nk = LOADS["balanced"].copy()
    experts_Nk[4] = 1
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs())
    x_ND[4] = np.nan
    _, dx_ND, dweights = _with_gradients(RUNS["blocks"], x_ND, experts_Nk, weights, "swiglu", np.ones_like(cotangent_NkD))
    assert np.all(np.isfinite(np.delete(dx_ND, 4, axis=0)))
    for dw in dweights:
        assert np.all(np.isfinite(np.delete(dw, 1, axis=0)))
        assert not np.all(np.isfinite(dw[1]))


def test_ragged_does_not_rely_on_what_happens_to_rows_of_no_group(monkeypatch):
    exact = jax.lax.ragged_dot

    def last_group_takes_the_rest(rows, weights, counts_E):
        return exact(rows, weights, counts_E.at[-1].add(rows.shape[0] - jnp.sum(counts_E)))

    monkeypatch.setattr(jax.lax, "ragged_dot", last_group_takes_the_rest)
    _check(lambda *arguments: ragged(*arguments), LOADS["some_take_none"])


# -------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("load", LOADS)
def test_choices_are_sorted_by_expert_then_by_token_and_those_of_none_come_last(load):
    experts = LOADS[load].reshape(-1).tolist()
    order = jax.tree.map(np.asarray, sort_choices(LOADS[load], E))
    assert {a.dtype for a in order} == {np.dtype("int32")}
    valid = [e if 0 <= e < E else E for e in experts]
    expected = sorted(range(N * k), key=lambda i: (valid[i], i))
    assert order.choice_S.tolist() == expected
    assert order.place_S.tolist() == [expected.index(i) if valid[i] < E else -1 for i in range(N * k)]
    assert order.counts_E.tolist() == [experts.count(e) for e in range(E)]
    assert order.first_E.tolist() == [sum(v < e for v in valid) for e in range(E)]


# --------------------------------------------------------------------------------------------------------------- work


def _rows_worked_on(monkeypatch, experts_Nk, num_experts, sizes):
    """Rows that went through an activation: (forward alone, with gradients)."""
    rows = []

    def counted(a):
        jax.debug.callback(rows.append, a.shape[0])
        return jax.nn.silu(a)

    monkeypatch.setitem(ACTIVATIONS, "counted", counted)
    run = functools.partial(blocks, sizes=sizes)
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs(*experts_Nk.shape, num_experts))
    jax.block_until_ready(jax.jit(lambda x: run(x, experts_Nk, weights, "counted"))(x_ND))
    jax.effects_barrier()
    forward = sum(int(n) for n in rows)
    rows.clear()
    jax.block_until_ready(_with_gradients(run, x_ND, experts_Nk, weights, "counted", cotangent_NkD))
    jax.effects_barrier()
    return forward, sum(int(n) for n in rows)


WORK = {
    # name: (experts [N, k], rows that sizes 16 and 4 make of it)
    "balanced": (np.arange(128).reshape(64, 2) % 8, 128),
    "uneven": (np.where(np.arange(128).reshape(64, 2) < 100, 0, 3), 100 + 32),
    "all_to_one": (np.full((64, 2), 5), 128),
    "none": (np.full((64, 2), -1), 0),
    "half_take_none": (np.where(np.arange(64)[:, None] % 2, [[8, -1]], [[3, 4]]), 64),
    "one": (np.where(np.arange(128).reshape(64, 2) == 99, 7, 8), 4),
    "three_quarters_of_a_block": (np.where(np.arange(128).reshape(64, 2) < 13, 0, -1), 16),
    "half_a_block": (np.where(np.arange(128).reshape(64, 2) < 10, 0, -1), 12),
}


@pytest.mark.parametrize("load", WORK)
def test_the_work_is_that_of_the_choices_and_not_of_all_experts(load, monkeypatch):
    experts_Nk, rows = WORK[load]
    forward, both = _rows_worked_on(monkeypatch, experts_Nk, 8, (16, 4))
    assert forward == rows
    assert both == 2 * rows  # forward and backward; the pre-activations are kept, not recomputed


def test_weights_of_experts_that_nobody_chose_are_not_even_read(monkeypatch):
    read, of_expert = [], lumina_jax.grouped._of_expert

    def counted(weights, e, dtype):
        jax.debug.callback(lambda e: read.append(int(e)), e)
        return of_expert(weights, e, dtype)

    monkeypatch.setattr(lumina_jax.grouped, "_of_expert", counted)
    x_ND, weights, _ = jax.tree.map(np.float32, _inputs(1, E=32))
    experts_Nk = np.array([[30, 7]])
    jax.block_until_ready(jax.jit(lambda x: blocks(x, experts_Nk, weights, "swiglu"))(x_ND))
    jax.effects_barrier()
    assert sorted(read) == [7, 30]


def _traced(dtype, load="random", backward=True):
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs())
    x_ND, cotangent_NkD = (jnp.asarray(a, dtype) for a in (x_ND, cotangent_NkD))
    if backward:
        return jax.make_jaxpr(lambda *a: _with_gradients(RUNS["blocks"], *a[:2], a[2], "swiglu", a[3]))(
            x_ND, jnp.asarray(LOADS[load]), weights, cotangent_NkD
        )
    return jax.make_jaxpr(lambda *a: RUNS["blocks"](*a, "swiglu"))(x_ND, jnp.asarray(LOADS[load]), weights)


def test_every_product_is_of_one_block_and_one_expert():
    products = [q for q in equations(_traced(jnp.float32).jaxpr) if q.primitive.name == "dot_general"]
    assert len(products) == 2 * (2 + 4)  # for each of two sizes: gate beside up, down, and four in the backward pass
    for product in products:
        shapes = [v.aval.shape for v in product.invars]
        assert {len(s) for s in shapes} == {2}
        assert any(b in s for s in shapes for b in (8, 3))


def test_only_integers_are_scattered():
    scattered = [q for q in equations(_traced(jnp.float32).jaxpr) if q.primitive.name.startswith("scatter")]
    assert scattered
    for scatter in scattered:
        assert jnp.issubdtype(scatter.outvars[0].aval.dtype, jnp.integer)


def test_evaluation_casts_weights_an_expert_at_a_time_and_keeps_no_preactivations():
    made = {v.aval.shape for q in equations(_traced(jnp.bfloat16, backward=False).jaxpr) for v in q.outvars}
    assert (D, F) in made
    assert not made & {(E, D, F), (E, F, D), (N * k + 8, 2 * F)}


def test_two_runs_agree_to_the_last_bit():
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs())
    first, second = (_with_gradients(RUNS["blocks"], x_ND, LOADS["random"], weights, "swiglu", cotangent_NkD) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


# ------------------------------------------------------------------------------------------------- inside other things

LAYERS = 3


def _layers(run, remat, scanned):
    """A loss of three residual layers, each with experts and weights of its own."""

    def layer(x_ND, own):
        experts_Nk, weights = own
        return x_ND + jnp.sum(run(x_ND, experts_Nk, weights, "swiglu"), axis=1), None

    layer = jax.checkpoint(layer) if remat else layer

    def loss(x_ND, weights, experts_LNk):
        if scanned:
            x_ND, _ = jax.lax.scan(layer, x_ND, (experts_LNk, weights))
        else:
            for i in range(LAYERS):
                x_ND, _ = layer(x_ND, (experts_LNk[i], tuple(w[i] for w in weights)))
        return jnp.sum(jnp.sin(x_ND))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("run", ["blocks", "ragged"])
@pytest.mark.parametrize("remat", [False, True], ids=["kept", "remat"])
def test_a_scan_over_layers_equals_layers_one_by_one(run, remat):
    made = [_inputs(seed=10 * i) for i in range(LAYERS)]
    weights = tuple(np.stack(w).astype(np.float32) for w in zip(*(weights for _, weights, _ in made), strict=True))
    experts_LNk = np.stack([LOADS[name] for name in ("random", "some_take_none", "all_to_the_last")])
    arguments = made[0][0].astype(np.float32), weights, experts_LNk
    loss, (dx_ND, dweights) = _layers(RUNS[run], remat, scanned=True)(*arguments)
    plain, (expected_ND, expected) = _layers(RUNS["one_size"], remat=False, scanned=False)(*arguments)
    assert_close(loss, plain)
    _assert_equal((0, dx_ND, dweights), (0, expected_ND, expected))


@pytest.mark.parametrize("run", ["blocks", "ragged"])
def test_eight_devices_with_rows_of_their_own_equal_one(run):
    tokens = 24
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs(tokens))
    experts_Nk = _random(-1, E + 1, tokens)
    experts_Nk[:3] = -1  # the first device has nothing to do
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()

    def of_own_rows(x_ND, experts_Nk, weights, cotangent_NkD):
        out_NkD, dx_ND, dweights = _with_gradients(RUNS[run], x_ND, experts_Nk, weights, "swiglu", cotangent_NkD)
        return out_NkD, dx_ND, jax.lax.psum(dweights, "data")

    specs = (rows, rows, everywhere, rows)
    spread = jax.shard_map(of_own_rows, mesh=mesh, in_specs=specs, out_specs=(rows, rows, everywhere), check_vma=False)
    _assert_equal(
        jax.jit(spread)(x_ND, experts_Nk, weights, cotangent_NkD),
        _oracle(x_ND, experts_Nk, weights, "swiglu", cotangent_NkD),
    )


def test_vmap_over_blocks_is_right_though_slow():
    made = [jax.tree.map(np.float32, _inputs(seed=i)) for i in (0, 10)]
    weights = made[0][1]
    experts_BNk = np.stack([LOADS["some_take_none"], LOADS["all_to_the_last"]])
    x_BND, cotangent_BNkD = (np.stack([m[i] for m in made]) for i in (0, 2))
    over = jax.vmap(functools.partial(_with_gradients, RUNS["blocks"]), in_axes=(0, 0, None, None, 0))
    actual = over(x_BND, experts_BNk, weights, "swiglu", cotangent_BNkD)
    for b in range(2):
        expected = _oracle(x_BND[b], experts_BNk[b], weights, "swiglu", cotangent_BNkD[b])
        _assert_equal(jax.tree.map(lambda a, b=b: a[b], actual), expected)


# -------------------------------------------------------------------------------------------------------------- forms


@pytest.mark.parametrize(("platform", "form"), [("cpu", "blocks"), ("gpu", "blocks"), ("tpu", "ragged"), ("other", "blocks")])
def test_the_best_form_of_a_platform_says_why(platform, form):
    name, reason = choose_grouped("auto", platform)
    assert (name, reason) == (form, FORMS[form].reason)
    assert choose_grouped(form, platform) == (name, reason)


def test_blocks_may_be_asked_for_on_tpu():
    assert choose_grouped("blocks", "tpu")[0] == "blocks"


@pytest.mark.parametrize(
    ("form", "platform", "works"),
    [
        ("ragged", "cpu", r"grouped_form = 'ragged': runs on tpu, not cpu .*E times the work.*; use auto$"),
        ("ragged", "gpu", r"runs on tpu, not gpu"),
        ("sorted", "cpu", r"grouped_form = 'sorted': must be one of auto, blocks, ragged$"),
    ],
)
def test_a_form_that_cannot_run_is_refused_with_what_would_work(form, platform, works):
    with pytest.raises(ConfigError, match=works):
        choose_grouped(form, platform)


def test_auto_runs_the_form_that_the_platform_chooses(monkeypatch):
    seen = []
    ran = FORMS["blocks"]._replace(run=lambda *a: seen.append("blocks") or blocks(*a))
    monkeypatch.setitem(lumina_jax.grouped.FORMS, "blocks", ran)
    x_ND, weights, _ = _inputs()
    grouped_feedforward(jnp.asarray(x_ND), jnp.asarray(LOADS["random"]), weights, "swiglu")
    assert seen == ["blocks"]


@pytest.mark.parametrize(("form", "operation"), [("ragged", "chlo.ragged_dot"), ("blocks", "stablehlo.while")])
def test_forms_lower_for_tpu_with_gradients(form, operation):
    x_ND, weights, cotangent_NkD = jax.tree.map(np.float32, _inputs())
    run = functools.partial(grouped_feedforward, form=form)
    traced = _with_gradients.trace(run, x_ND, LOADS["random"], weights, "swiglu", cotangent_NkD)
    assert operation in traced.lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize(("choices", "experts"), [(1, 1), (1, 64), (2, 8), (63, 8), (4096, 8), (16384, 64), (100, 1)])
def test_blocks_are_no_larger_than_what_there_is(platform, choices, experts):
    sizes = block_sizes(platform, choices, experts)
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert 1 <= sizes[-1] <= sizes[0] <= choices
    if platform == "gpu" and choices >= 4096:
        assert sizes[0] > block_sizes("cpu", choices, experts)[0]
