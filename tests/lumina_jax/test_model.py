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
from lumina_jax.model import Block, Variables, by_canonical_name, create, from_canonical_names, make_caches, merge
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

B, T, V = 2, 9, 11


def _config(moe, mod, num_layers=2, jitter=0.0, **fields):
    return ModelConfig(
        **{"vocab_size": V, "d_model": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 6, **fields},
        num_layers=num_layers,
        moe=MoEConfig(pattern=moe, num_experts=3, top_k=2, capacity_factor=0.75, jitter=jitter),
        mod=MoDConfig(pattern=mod, capacity=0.5),
    )


KINDS = {
    "dense": _config("none", "none"),
    "moe": _config("all", "none"),
    "dense+mod": _config("none", "all"),
    "moe+mod": _config("all", "all"),
}
MIXED = _config("1,2,3,4", "2,4", num_layers=5)  # dense, then twice (moe, moe+mod)

rng = np.random.default_rng(0)
INPUTS_BT = rng.integers(0, V, (B, T))
# Two documents a row. The positions have gaps, so that counting anew what is there would not give them.
SEGMENTS_BT = np.array([[1] * 4 + [2] * 5, [1] * 7 + [2] * 2])
POSITIONS_BT = np.array([[0, 1, 2, 7, 0, 2, 3, 4, 9], [0, 1, 2, 3, 4, 5, 9, 0, 3]])
BATCH = (INPUTS_BT, SEGMENTS_BT, POSITIONS_BT)
COTANGENT_BTV = rng.standard_normal((B, T, V))


@functools.cache
def _weights(config):
    return oracles.random_weights(tensor_table(config), seed=1)


def _model(config, weights):
    """The model around these canonically named weights."""
    graphdef, shapes = jax.eval_shape(functools.partial(create, config), 0)
    return merge(graphdef, Variables(*(from_canonical_names(config, shape, weights) for shape in shapes)))


def _logits_and_metrics(config, weights, batch, training, dtype=jnp.float32, key_B=None, remat=False):
    model = _model(config, weights)
    hidden_BTD, metrics, _ = model(*batch, dtype=dtype, training=training, key_B=key_B, remat=remat)
    return hidden_BTD @ model.head_DV(dtype), metrics


def _row_keys(seed):
    return jax.random.split(jax.random.key(seed), B)


_forward = jax.jit(_logits_and_metrics, static_argnums=(0, 3))


@functools.cache
def _mixed_in_float64():
    """Logits, metrics and gradients of the mixed model in training."""

    def loss(weights):
        logits_BTV, metrics = _logits_and_metrics(MIXED, weights, BATCH, True, jnp.float64)
        auxiliary = jnp.mean(metrics["moe"]["balance_loss"]) + jnp.mean(metrics["moe"]["z_loss"])
        return jnp.sum(COTANGENT_BTV * logits_BTV) + auxiliary, (logits_BTV, metrics)

    with jax.enable_x64(True):
        weights = {name: w.astype(np.float64) for name, w in _weights(MIXED).items()}
        (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)
        return jax.tree.map(np.asarray, (*outputs, gradients))


# ------------------------------------------------------------------------------------ against the slow transformer


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_equals_the_slow_transformer(kind, training):
    config = KINDS[kind]
    assert layer_kinds(config) == [kind] * 2
    logits_BTV, metrics = _forward(config, _weights(config), BATCH, training)
    expected_BTV, expected = oracles.transformer(config, _weights(config), *BATCH, training)
    assert_close(logits_BTV, expected_BTV)
    assert set(metrics) == {group for group in ("moe", "mod") if group in kind}
    if training and "moe" in expected:
        assert np.all(expected["moe"]["dropped"] > 0)
    for group in expected:
        assert set(metrics[group]) == set(expected[group])
        for name, values in metrics[group].items():
            if name == "causal_capacity" and not training:  # apart by row
                values = np.mean(values, axis=1)
            assert_close(values, expected[group][name])


def test_float64_agrees_to_the_last_digits():
    logits_BTV, metrics, _ = _mixed_in_float64()
    expected_BTV, expected = oracles.transformer(MIXED, _weights(MIXED), *BATCH, True)
    assert_close(logits_BTV, expected_BTV, 1e-12)
    for group, name in (("moe", "balance_loss"), ("moe", "z_loss"), ("mod", "predictor_loss")):
        assert_close(metrics[group][name], expected[group][name], 1e-12)


def test_every_gradient_equals_that_of_the_slow_transformer():
    _, _, gradients = _mixed_in_float64()

    def loss(weights):
        logits_BTV, metrics = oracles.transformer(MIXED, weights, *BATCH, True)
        return np.sum(COTANGENT_BTV * logits_BTV) + np.mean(metrics["moe"]["balance_loss"]) + np.mean(metrics["moe"]["z_loss"])

    assert_gradients(loss, _weights(MIXED), gradients, tolerance=1e-6)
    for name, gradient in gradients.items():
        assert np.any(gradient != 0) == (not name.endswith("moe.bias")), name


def test_rematerialisation_recomputes_layers_and_gives_the_same_gradients():
    config = KINDS["dense"]

    def gradients(remat):
        def loss(weights):
            return jnp.sum(COTANGENT_BTV * _logits_and_metrics(config, weights, BATCH, True, remat=remat)[0])

        traced = jax.jit(jax.grad(loss)).trace(_weights(config))
        assert ("remat" in str(traced.jaxpr)) == remat
        return traced.lower().compile()(_weights(config))

    plain, recomputed = gradients(False), gradients(True)
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient)


def test_metrics_come_in_the_order_of_the_layers():
    assert layer_plan(layer_kinds(MIXED)) == [Segment(0, ("dense",), 1), Segment(1, ("moe", "moe+mod"), 2)]
    _, metrics, _ = _mixed_in_float64()
    _, expected = oracles.transformer(MIXED, _weights(MIXED), *BATCH, True)
    for group, layers in (("moe", 4), ("mod", 2)):
        assert set(metrics[group]) == set(expected[group])
        for name, values in metrics[group].items():
            assert len(values) == layers
            assert_close(values, expected[group][name], 1e-6)
    assert len(set(np.round(expected["moe"]["balance_loss"], 4))) == 4  # no two layers look alike


# ------------------------------------------------------------------------------------------------- what sees what


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_a_prefix_does_not_depend_on_what_follows(kind):
    config, prefix = KINDS[kind], 5
    changed_BT = INPUTS_BT.copy()
    changed_BT[:, prefix:] = (changed_BT[:, prefix:] + 1) % V
    one_document = np.zeros((B, T), int)
    before, after = (
        np.asarray(_forward(config, _weights(config), (inputs, one_document, POSITIONS_BT), False)[0])
        for inputs in (INPUTS_BT, changed_BT)
    )
    assert_close(after[:, :prefix], before[:, :prefix], 1e-6)
    assert np.max(np.abs(after[:, prefix:] - before[:, prefix:])) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_each_alone(kind):
    config, cut = KINDS[kind], 4
    first, second = INPUTS_BT[0, :cut], INPUTS_BT[0, cut:]

    def alone(document):
        """At the start of a row of its own; what follows cannot be seen."""
        return [*document, *[0] * (T - len(document))], np.arange(T), np.arange(T) >= len(document)

    packed = [*first, *second], [*range(cut), *range(T - cut)], [0] * cut + [1] * (T - cut)

    def logits_BTV(*rows):
        inputs, positions, segments = (np.array(column).astype(int) for column in zip(*rows, strict=True))
        return np.asarray(_forward(config, _weights(config), (inputs, segments, positions), False)[0])

    together_TV, first_TV = logits_BTV(packed, alone(first))
    _, second_TV = logits_BTV(packed, alone(second))
    assert_close(together_TV[:cut], first_TV[:cut])
    assert_close(together_TV[cut:], second_TV[: T - cut])


def test_tokens_one_by_one_through_the_caches_equal_the_whole_row():
    positions_BT = np.tile(np.arange(T), (B, 1))

    @jax.jit
    def step(weights, inputs, positions, caches, start):
        model = _model(MIXED, weights)
        segments = jnp.zeros_like(positions)
        hidden, _, caches = model(inputs, segments, positions, dtype=jnp.float32, caches=caches, start=start)
        return hidden @ model.head_DV(jnp.float32), caches

    caches, pieces = make_caches(MIXED, B, T, jnp.float32), []
    for t in range(T):
        logits, caches = step(_weights(MIXED), INPUTS_BT[:, t : t + 1], positions_BT[:, t : t + 1], caches, t)
        pieces.append(logits)
    whole = oracles.transformer(MIXED, _weights(MIXED), INPUTS_BT, np.zeros((B, T)), positions_BT, False)[0]
    assert_close(np.concatenate(pieces, axis=1), whole)


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options",
    [{"scale_embeddings": True}, {"tie_embeddings": False}, {"activation": "geglu", "qk_norm": True, "norm_eps": 0.1}],
    ids=["scaled_embeddings", "untied_head", "geglu_qk_norm_eps"],
)
def test_options_equal_the_slow_transformer(options):
    config = _config("none", "none", num_layers=1, **options)
    logits_BTV, _ = _forward(config, _weights(config), BATCH, False)
    expected_BTV, _ = oracles.transformer(config, _weights(config), *BATCH, False)
    assert_close(logits_BTV, expected_BTV)


def test_the_plan_of_scans_changes_nothing_not_even_random_numbers(monkeypatch):
    config = _config("all", "none", dropout=0.3, jitter=0.3)
    assert layer_plan(layer_kinds(config)) == [Segment(0, ("moe",), 2)]

    def run():
        return jax.jit(lambda key_B: _logits_and_metrics(config, _weights(config), BATCH, True, key_B=key_B))

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


@pytest.mark.parametrize(("training", "seed"), [(True, None), (False, 0)], ids=["training_without_key", "evaluation"])
def test_dropout_and_jitter_act_only_in_training_with_a_key(training, seed):
    config = _config("all", "none", num_layers=1, dropout=0.3, jitter=0.3)
    key_B = None if seed is None else _row_keys(seed)
    logits_BTV, _ = jax.jit(lambda w: _logits_and_metrics(config, w, BATCH, training, key_B=key_B))(_weights(config))
    assert_close(logits_BTV, oracles.transformer(config, _weights(config), *BATCH, training)[0])


def test_dropout_keeps_the_mean():
    key_B = jax.random.split(jax.random.key(0), 100)
    dropped = np.asarray(Block._drop(SimpleNamespace(dropout=0.25), jnp.ones((100, 10, 10)), True, key_B))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(np.mean(dropped) - 1) < 0.03


def test_what_a_row_draws_depends_on_its_key_alone():
    config = _config("all", "none", num_layers=1, dropout=0.3, jitter=0.3)
    noisy = jax.jit(lambda batch, key_B: _logits_and_metrics(config, _weights(config), batch, True, key_B=key_B)[0])
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
        logits_BTV, metrics = _logits_and_metrics(config, weights, BATCH, True, jnp.bfloat16)
        return jnp.sum(logits_BTV), (logits_BTV, metrics)

    gradients, (logits_BTV, metrics) = jax.eval_shape(jax.grad(loss, has_aux=True), _weights(config))
    assert logits_BTV.dtype == jnp.bfloat16
    assert {gradient.dtype for gradient in gradients.values()} == {np.dtype(np.float32)}
    assert {a.dtype for a in jax.tree.leaves(metrics)} <= {np.dtype(np.float32), np.dtype(np.int32)}


def test_bfloat16_compute_is_near_the_slow_transformer():
    config = KINDS["moe+mod"]
    logits_BTV, _ = jax.jit(lambda w: _logits_and_metrics(config, w, BATCH, True, jnp.bfloat16))(_weights(config))
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
