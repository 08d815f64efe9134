"""The whole transformer, against the slow one in numpy, for every kind of layer."""

import functools
import math
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lumina_jax.model
from lumina.architecture import Segment, layer_kinds, layer_plan, tensor_table
from lumina.config import VARIANTS, MoDConfig, ModelConfig, MoEConfig, load, presets
from lumina_jax.model import (
    CAUSAL,
    TRAINING,
    Block,
    Mode,
    Variables,
    by_canonical_name,
    create,
    from_canonical_names,
    make_caches,
    merge,
)
from lumina_jax.moe import balance_loss
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, V = 2, 9, 11


def _config(moe, mod, num_layers=2, jitter=0.0, experts=(), depth=(), **fields):
    return ModelConfig(
        **{"vocab_size": V, "d_model": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 6, **fields},
        num_layers=num_layers,
        moe=MoEConfig(
            pattern=moe, **{"num_experts": 3, "top_k": 2, "capacity_factor": 0.75, "jitter": jitter, **dict(experts)}
        ),
        mod=MoDConfig(pattern=mod, **{"capacity": 0.5, **dict(depth)}),
    )


BLOCK, PREDICTED, RANDOM = {"scope": "block"}, {"predictor_width": 3}, {"router": "random"}
NOOPS = {"noop_experts": 2, "capacity_factor": 1.0, "top_k": 3}
KINDS = {
    "dense": _config("none", "none"),
    "moe": _config("all", "none"),
    "dense+mod": _config("none", "all"),
    "moe+mod": _config("all", "all"),
}
DEPTHS = {
    "moe+mod predicted": _config("all", "all", depth=PREDICTED),
    "dense+mod random": _config("none", "all", depth=RANDOM),
    "dense+mod block": _config("none", "all", depth=BLOCK),
    "moe+mod block": _config("all", "all", depth=BLOCK, qk_norm=True),
    "moe+mod block predicted": _config("all", "all", experts=NOOPS, depth=BLOCK | PREDICTED),
    "moe+mod block random dropless": _config("all", "all", experts={"dispatch": "dropless"}, depth=BLOCK | RANDOM),
    "dense+mod block every second": _config("none", "every_2", 4, depth=BLOCK),
    "moe of some layers, mod block of others": _config("0,2", "0,1", 3, depth=BLOCK),
}
EVERY = KINDS | DEPTHS
MIXED = _config("1,2,3,4", "2,4", num_layers=5)  # dense, then twice (moe, moe+mod)

rng = np.random.default_rng(0)
INPUTS_BT = rng.integers(0, V, (B, T))
# Two documents a row. The positions have gaps, so that counting anew what is there would not give them.
SEGMENTS_BT = np.array([[1] * 4 + [2] * 5, [1] * 7 + [2] * 2])
POSITIONS_BT = np.array([[0, 1, 2, 7, 0, 2, 3, 4, 9], [0, 1, 2, 3, 4, 5, 9, 0, 3]])
BATCH = (INPUTS_BT, SEGMENTS_BT, POSITIONS_BT)
# Nothing in the last places: after more tokens than a depth router selects, and after fewer; and in a whole row.
PACKED = (INPUTS_BT, np.where(np.arange(T) < [[7], [3]], SEGMENTS_BT, -1), POSITIONS_BT)
A_ROW_OF_NONE = (INPUTS_BT, np.where(np.arange(T) < [[0], [8]], SEGMENTS_BT, -1), POSITIONS_BT)
BATCHES = {"full": BATCH, "packed": PACKED, "a row of none": A_ROW_OF_NONE}
COTANGENT_BTV = rng.standard_normal((B, T, V))


@functools.cache
def _weights(config):
    return oracles.random_weights(tensor_table(config), seed=1)


def _model(config, weights):
    """The model around these canonically named weights."""
    graphdef, shapes = jax.eval_shape(functools.partial(create, config), 0)
    return merge(graphdef, Variables(*(from_canonical_names(config, shape, weights) for shape in shapes)))


def _logits_and_metrics(config, weights, batch, mode, dtype=jnp.float32, key_B=None, remat="none"):
    model = _model(config, weights)
    hidden_BTD, metrics, _ = model(*batch, dtype=dtype, mode=mode, key_B=key_B, remat=remat)
    return hidden_BTD @ model.head_DV(dtype), metrics


def _row_keys(seed):
    return jax.random.split(jax.random.key(seed), B)


_forward = jax.jit(_logits_and_metrics, static_argnums=(0, 3))


def _auxiliary(metrics, balance_loss):
    """The router losses, each the mean over its layers."""
    total = 0.0
    if "moe" in metrics:
        loads, shares = metrics["moe"]["load_BA"], metrics["moe"]["share_BA"]
        total += sum(balance_loss(load_BA, share_BA) for load_BA, share_BA in zip(loads, shares, strict=True)) / len(loads)
        total += metrics["moe"]["z_loss"].mean()
    return total + (metrics["mod"]["predictor_loss"].mean() if "mod" in metrics else 0.0)


@functools.cache
def _trained(config):
    @jax.jit
    def run(weights, batch, cotangent_BTV):  # given: as a constant JAX would keep it, in float64, for those in float32
        def loss(weights):
            logits_BTV, metrics = _logits_and_metrics(config, weights, batch, TRAINING, jnp.float64)
            return jnp.sum(cotangent_BTV * logits_BTV) + _auxiliary(metrics, balance_loss), (logits_BTV, metrics)

        return jax.value_and_grad(loss, has_aux=True)(weights)

    return run


@functools.cache
def _in_float64(config, name="full"):
    """Logits, metrics and gradients in training."""
    with jax.enable_x64(True):
        weights = {name: w.astype(np.float64) for name, w in _weights(config).items()}
        (_, outputs), gradients = _trained(config)(weights, BATCHES[name], COTANGENT_BTV)
        return jax.tree.map(np.asarray, (*outputs, gradients))


def _assert_metrics_close(metrics, expected, tolerance=5e-6):
    for group in expected:
        for name, values in expected[group].items():
            assert_close(metrics[group][name], values, max(tolerance, 1e-6) if name == "dropped" else tolerance)


# ------------------------------------------------------------------------------------ against the slow transformer


@pytest.mark.parametrize("name", [*DEPTHS, "mixed"])
@pytest.mark.parametrize("of", BATCHES)
def test_training_in_float64_equals_the_slow_transformer_with_every_gradient(name, of):
    config, batch = (EVERY | {"mixed": MIXED})[name], BATCHES[of]
    logits_BTV, metrics, gradients = _in_float64(config, of)
    expected_BTV, expected = oracles.transformer(config, _weights(config), *batch, True)
    assert_close(logits_BTV, expected_BTV, 1e-12)
    assert {group: set(m) for group, m in metrics.items()} == {group: set(m) for group, m in expected.items()}
    _assert_metrics_close(metrics, expected, 1e-12)
    if "moe" in expected and of == "full":
        assert np.all(expected["moe"]["dropped"] > 0) == (config.moe.dispatch == "capacity")

    def loss(weights):
        logits_BTV, metrics = oracles.transformer(config, weights, *batch, True)
        rows = [[b] for b in range(B)]
        auxiliary = _auxiliary(metrics, lambda load_BA, share_BA: oracles.balance_loss(load_BA, share_BA, rows))
        return np.sum(COTANGENT_BTV * logits_BTV) + auxiliary

    assert_gradients(loss, _weights(config), gradients, tolerance=1e-12)
    for name, gradient in gradients.items():
        learns = not name.endswith("moe.bias")
        assert np.any(gradient != 0) == learns, name


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, TRAINING) for name in KINDS), *((name, CAUSAL) for name in EVERY)],
    ids=[*(f"{name}, training" for name in KINDS), *(f"{name}, causal" for name in EVERY)],
)
@pytest.mark.parametrize("of", BATCHES)
def test_float32_equals_the_slow_transformer(name, mode, of):
    config, batch = EVERY[name], BATCHES[of]
    if name in KINDS:
        assert layer_kinds(config) == [name] * 2
    logits_BTV, metrics = _forward(config, _weights(config), batch, mode)
    expected_BTV, expected = oracles.transformer(config, _weights(config), *batch, mode.training, mode.top)
    assert_close(logits_BTV, expected_BTV)
    assert set(metrics) == set(expected)
    _assert_metrics_close(metrics, expected)
    if "mod" in expected:
        assert 0 < np.mean(expected["mod"]["taken_BT"]) < 1


def test_the_top_may_be_selected_without_dropping():
    config, mode = EVERY["moe+mod block"], Mode(top=True)
    logits_BTV, metrics = _forward(config, _weights(config), BATCH, mode)
    expected_BTV, expected = oracles.transformer(config, _weights(config), *BATCH, False, True)
    assert_close(logits_BTV, expected_BTV)
    _assert_metrics_close(metrics, expected)
    assert np.all(metrics["moe"]["dropped"] == 0)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_rematerialisation_recomputes_layers_and_gives_the_same_gradients_and_metrics(policy):
    config = KINDS["moe"]

    def gradients(remat):
        def loss(weights):
            logits_BTV, metrics = _logits_and_metrics(config, weights, BATCH, TRAINING, remat=remat)
            return jnp.sum(COTANGENT_BTV * logits_BTV), metrics

        traced = jax.jit(jax.grad(loss, has_aux=True)).trace(_weights(config))
        assert ("remat" in str(traced.jaxpr)) == (remat != "none")
        return traced.lower().compile()(_weights(config))

    (plain, metrics), (recomputed, again) = gradients("none"), gradients(policy)
    for name, gradient in plain.items():
        if np.any(gradient != 0):
            assert_close(recomputed[name], gradient)
    for before, after in zip(jax.tree.leaves(metrics), jax.tree.leaves(again), strict=True):
        assert_close(after, before)


def test_metrics_come_in_the_order_of_the_layers():
    assert layer_plan(layer_kinds(MIXED)) == [Segment(0, ("dense",), 1), Segment(1, ("moe", "moe+mod"), 2)]
    _, metrics, _ = _in_float64(MIXED)
    _, expected = oracles.transformer(MIXED, _weights(MIXED), *BATCH, True)
    for group, layers in (("moe", 4), ("mod", 2)):
        for values in metrics[group].values():
            assert len(values) == layers
    _assert_metrics_close(metrics, expected, 1e-12)
    assert len(set(np.round(expected["moe"]["z_loss"], 4))) == 4  # no two layers look alike


# ------------------------------------------------------------------------------------------------- what sees what


def _before_and_after(config, prefix, mode):
    """Logits of one document with two endings."""
    changed_BT = INPUTS_BT.copy()
    changed_BT[:, prefix:] = (changed_BT[:, prefix:] + 1) % V
    one_document = np.zeros((B, T), int)
    before, after = (
        np.asarray(_forward(config, _weights(config), (inputs, one_document, POSITIONS_BT), mode)[0])
        for inputs in (INPUTS_BT, changed_BT)
    )
    return before, after


@pytest.mark.parametrize("name", EVERY)
def test_the_causal_logits_of_a_prefix_do_not_depend_on_what_follows(name):
    prefix = 5
    before, after = _before_and_after(EVERY[name], prefix, CAUSAL)
    assert_close(after[:, :prefix], before[:, :prefix], 1e-6)
    assert np.max(np.abs(after[:, prefix:] - before[:, prefix:])) > 1e-2


@pytest.mark.parametrize("name", ["dense+mod", "moe+mod block", "moe+mod block predicted"])
def test_the_top_of_a_row_sees_the_future(name):
    before, after = _before_and_after(EVERY[name], 5, Mode(top=True))
    assert np.max(np.abs(after[:, :5] - before[:, :5])) > 1e-2


@pytest.mark.parametrize("name", EVERY)
def test_packed_documents_equal_each_alone(name):
    config, cut = EVERY[name], 4
    first, second = INPUTS_BT[0, :cut], INPUTS_BT[0, cut:]

    def alone(document):
        """At the start of a row of its own; what follows cannot be seen."""
        return [*document, *[0] * (T - len(document))], np.arange(T), np.arange(T) >= len(document)

    packed = [*first, *second], [*range(cut), *range(T - cut)], [0] * cut + [1] * (T - cut)

    def logits_BTV(*rows):
        inputs, positions, segments = (np.array(column).astype(int) for column in zip(*rows, strict=True))
        return np.asarray(_forward(config, _weights(config), (inputs, segments, positions), CAUSAL)[0])

    together_TV, first_TV = logits_BTV(packed, alone(first))
    _, second_TV = logits_BTV(packed, alone(second))
    assert_close(together_TV[:cut], first_TV[:cut])
    assert_close(together_TV[cut:], second_TV[: T - cut])


# As they come: the first tokens of each row, as many as WRITTEN says, then one at a time; all in pieces of four.
PIECE, WRITTEN = 4, (4, 2)


@functools.cache
def _piece(config):
    @jax.jit
    def step(weights, inputs, positions, caches, written_BT):
        model = _model(config, weights)
        rows = (inputs, jnp.zeros_like(positions), positions)
        hidden, _, caches = model(*rows, dtype=jnp.float32, caches=caches, written_BT=written_BT)
        return hidden @ model.head_DV(jnp.float32), caches

    return step


@pytest.mark.parametrize("name", EVERY)
def test_tokens_through_the_caches_equal_the_whole_row_and_only_those_taken_are_kept(name):
    config, weights = EVERY[name], _weights(EVERY[name])
    positions_BT = np.tile(np.arange(T) * 2 + 1, (B, 1))
    expected_BTV, expected = oracles.transformer(config, weights, INPUTS_BT, np.zeros((B, T)), positions_BT, False)
    caches, found_BTV = make_caches(config, B, T, jnp.float32), np.full((B, T, V), np.nan)
    done = np.zeros(B, int)
    while np.any(done < T):
        count_B = np.where(done == 0, WRITTEN, np.where(done < T, 1, 0))
        columns = np.minimum(done[:, None] + np.arange(PIECE), T - 1)  # beyond what is written: filling
        inputs, positions = (np.take_along_axis(a, columns, axis=1) for a in (INPUTS_BT, positions_BT))
        written = np.arange(PIECE) < count_B[:, None]
        logits, caches = _piece(config)(weights, inputs, positions, caches, written)
        for b in range(B):
            found_BTV[b, done[b] : done[b] + count_B[b]] = logits[b, : count_B[b]]
        done += count_B
    assert_close(found_BTV, expected_BTV)
    lengths_LB = np.full((config.num_layers, B), T)
    if config.mod.scope == "block":
        mod_layers = [i for i, kind in enumerate(layer_kinds(config)) if kind.endswith("+mod")]
        lengths_LB[mod_layers] = expected["mod"]["taken_BT"].sum(axis=-1)
        assert len(set(lengths_LB.ravel())) > 1  # rows or layers differ
    for segment, of_segment in zip(layer_plan(layer_kinds(config)), caches, strict=True):
        for p, cache in enumerate(of_segment):
            assert cache.length.tolist() == lengths_LB[list(segment.layers(p))].tolist()
            kept = np.any(np.asarray(cache.keys) != 0, axis=(-1, -2))
            assert np.array_equal(kept, np.arange(T) < np.asarray(cache.length)[:, :, None])


@pytest.mark.parametrize("name", EVERY)
def test_what_empty_positions_hold_changes_nothing_of_the_others(name):
    """Not a bit, of logits and gradients in training and of logits in evaluation; and no router tells of them."""
    config, real_BT = EVERY[name], PACKED[1] >= 0
    other = (np.where(real_BT, INPUTS_BT, (INPUTS_BT + 3) % V), *PACKED[1:2], np.where(real_BT, POSITIONS_BT, 5))
    for mode in (TRAINING, CAUSAL):
        (one_BTV, told), (two_BTV, told_too) = (_forward(config, _weights(config), b, mode) for b in (PACKED, other))
        assert np.asarray(one_BTV)[real_BT].tobytes() == np.asarray(two_BTV)[real_BT].tobytes()
        assert np.max(np.abs(one_BTV - two_BTV)) > 1e-2
        for group in told:
            same = set(told[group]) - {"logit_BT"}
            assert all(np.array_equal(told[group][each], told_too[group][each]) for each in same)
        if "mod" in told:
            assert not np.any(told["mod"]["taken_BT"] & ~real_BT)


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [{"scale_embeddings": True}, {"tie_embeddings": False}, {"activation": "geglu", "qk_norm": True, "norm_eps": 0.1}],
    ids=["scaled_embeddings", "untied_head", "geglu_qk_norm_eps"],
)
def test_options_equal_the_slow_transformer(options):
    config = _config("none", "none", num_layers=1, **options)
    logits_BTV, _ = _forward(config, _weights(config), BATCH, CAUSAL)
    expected_BTV, _ = oracles.transformer(config, _weights(config), *BATCH, False)
    assert_close(logits_BTV, expected_BTV)


def test_the_plan_of_scans_changes_nothing_not_even_random_numbers(monkeypatch):
    config = _config("all", "none", dropout=0.3, jitter=0.3)
    assert layer_plan(layer_kinds(config)) == [Segment(0, ("moe",), 2)]

    def run():
        return jax.jit(lambda key_B: _logits_and_metrics(config, _weights(config), BATCH, TRAINING, key_B=key_B))

    scanned = run()
    expected_BTV, expected = scanned(_row_keys(0))
    assert np.max(np.abs(scanned(_row_keys(1))[0] - expected_BTV)) > 1e-2

    def unrolled(kinds):
        return [Segment(i, (kind,), 1) for i, kind in enumerate(kinds)]

    monkeypatch.setattr(lumina_jax.model, "layer_plan", unrolled)
    logits_BTV, metrics = run()(_row_keys(0))
    assert_close(logits_BTV, expected_BTV)
    for actual, wanted in zip(jax.tree.leaves(metrics), jax.tree.leaves(expected), strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize(("mode", "seed"), [(TRAINING, None), (CAUSAL, 0)], ids=["training_without_key", "evaluation"])
def test_dropout_and_jitter_act_only_in_training_with_a_key(mode, seed):
    config = _config("all", "none", num_layers=1, dropout=0.3, jitter=0.3)
    key_B = None if seed is None else _row_keys(seed)
    logits_BTV, _ = jax.jit(lambda w: _logits_and_metrics(config, w, BATCH, mode, key_B=key_B))(_weights(config))
    assert_close(logits_BTV, oracles.transformer(config, _weights(config), *BATCH, mode.training)[0])


def test_dropout_keeps_the_mean():
    key_B = jax.random.split(jax.random.key(0), 100)
    dropped = np.asarray(Block._drop(SimpleNamespace(dropout=0.25), jnp.ones((100, 10, 10)), TRAINING, key_B))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(np.mean(dropped) - 1) < 0.03


def test_what_a_row_draws_depends_on_its_key_alone():
    config = _config("all", "none", num_layers=1, dropout=0.3, jitter=0.3)
    noisy = jax.jit(lambda batch, key_B: _logits_and_metrics(config, _weights(config), batch, TRAINING, key_B=key_B)[0])
    key_B = _row_keys(0)
    together_BTV = noisy(BATCH, key_B)
    swapped_BTV = noisy(tuple(a[::-1] for a in BATCH), key_B[::-1])
    assert_close(swapped_BTV[::-1], together_BTV)
    for b in range(B):
        alone_BTV = noisy(tuple(np.stack([a[b]] * B) for a in BATCH), jnp.stack([key_B[b]] * B))
        assert_close(alone_BTV, np.stack([together_BTV[b]] * B))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_compute_keeps_float32_gradients_and_metrics(kind):
    config = KINDS[kind]

    def loss(weights):
        logits_BTV, metrics = _logits_and_metrics(config, weights, BATCH, TRAINING, jnp.bfloat16)
        return jnp.sum(logits_BTV), (logits_BTV, metrics)

    gradients, (logits_BTV, metrics) = jax.eval_shape(jax.grad(loss, has_aux=True), _weights(config))
    assert logits_BTV.dtype == jnp.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}
    assert {a.dtype for a in jax.tree.leaves(metrics)} <= {np.dtype(np.float32), np.dtype(np.int32), np.dtype(bool)}


def test_bfloat16_compute_is_near_the_slow_transformer():
    config = KINDS["moe+mod"]
    logits_BTV, _ = jax.jit(lambda w: _logits_and_metrics(config, w, BATCH, TRAINING, jnp.bfloat16))(_weights(config))
    assert_close(logits_BTV, oracles.transformer(config, _weights(config), *BATCH, True)[0], 0.05)


# -------------------------------------------------------------------------------------------------- initialisation


def _wide(moe="1,2", mod="0,2"):
    """Tensors large enough to measure their spread."""
    return _config(moe, mod, 3, vocab_size=128, d_model=64, num_heads=2, head_dim=16, d_ff=48, tie_embeddings=False)


@functools.cache
def _fresh(config, seed=0):
    _, variables = jax.jit(create, static_argnums=0)(config, seed)
    return variables, [by_canonical_name(config, tree) for tree in variables]


def test_parameters_are_the_tensors_of_the_table():
    _, (params, biases) = _fresh(_wide())
    for named, trained in ((params, True), (biases, False)):
        expected = [tensor for tensor in tensor_table(_wide()) if tensor.trained == trained]
        assert list(named) == [tensor.name for tensor in expected]
        for tensor in expected:
            assert named[tensor.name].shape == tensor.shape
            assert named[tensor.name].dtype == jnp.float32


def test_canonical_names_and_back_is_the_identity():
    shapes = jax.eval_shape(functools.partial(create, MIXED), 0)[1]
    trained = {tensor.name: tensor.trained for tensor in tensor_table(MIXED)}
    for tree, is_trained in zip(shapes, (True, False), strict=True):
        filled = from_canonical_names(MIXED, tree, _weights(MIXED))
        assert jax.tree.structure(filled) == jax.tree.structure(tree)
        assert [a.shape for a in jax.tree.leaves(filled)] == [a.shape for a in jax.tree.leaves(tree)]
        named = by_canonical_name(MIXED, filled)
        assert list(named) == [name for name in trained if trained[name] == is_trained]
        assert all(np.array_equal(array, _weights(MIXED)[name]) for name, array in named.items())


def test_initial_values_do_not_depend_on_how_layers_are_grouped():
    mixed, scanned = _fresh(_wide())[1][0], _fresh(_wide("none", "none"))[1][0]
    shared = set(scanned) & set(mixed)
    assert {"embedding.weight", "blocks.0.feedforward.down", "blocks.2.attention.query"} <= shared
    for name in shared:
        assert_close(scanned[name], mixed[name], 1e-6)


def test_every_tensor_and_every_seed_draws_its_own_values():
    values, others = _fresh(_wide())[1][0], _fresh(_wide(), seed=1)[1][0]
    drawn = [tensor for tensor in tensor_table(_wide()) if tensor.std is not None]
    first_8 = {tuple(np.round(values[t.name].ravel()[:8] / t.std, 3).tolist()) for t in drawn}
    assert len(first_8) == len(drawn)
    assert not any(np.array_equal(values[t.name], others[t.name]) for t in drawn)


def test_initial_spread_is_that_of_the_fan_in_and_smaller_into_the_residual():
    D, heads, width, F, residual = 64, 2, 16, 48, 1 / math.sqrt(2 * 3)
    expected = {
        "embedding.weight": 0.02,
        "head.weight": 1 / math.sqrt(D),
        "attention.query": 1 / math.sqrt(D),
        "attention.key": 1 / math.sqrt(D),
        "attention.value": 1 / math.sqrt(D),
        "attention.output": residual / math.sqrt(heads * width),
        "gate": 1 / math.sqrt(D),
        "up": 1 / math.sqrt(D),
        "down": residual / math.sqrt(F),
        "router": 1 / math.sqrt(D),
    }
    params, biases = _fresh(_wide())[1]
    for name, array in {**params, **biases}.items():
        value = np.asarray(array, np.float64)
        if name.endswith("scale"):
            assert np.all(value == 1), name
        elif name.endswith("bias"):
            assert np.all(value == 0), name
        else:
            std = next(std for ending, std in expected.items() if name.endswith(ending))
            assert abs(np.std(value) / std - 1) < 5 / math.sqrt(2 * value.size), name  # five standard errors
            assert abs(np.mean(value)) < 5 * std / math.sqrt(value.size), name


def test_no_two_tensors_of_a_preset_share_a_random_key():
    checked = 0
    for preset in presets():
        for variant in VARIANTS if preset != "auto" else ():
            config = load(preset)
            if variant and config.model.moe.pattern == config.model.mod.pattern == "none":
                continue  # a dense family
            names = [tensor.name for tensor in tensor_table(load(f"{preset}:{variant}").model)]
            assert len({zlib.crc32(name.encode()) for name in names}) == len(names), f"{preset}:{variant}"
            checked += 1
    assert checked >= 15
