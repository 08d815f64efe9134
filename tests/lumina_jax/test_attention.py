"""Attention, rotary positions and RMSNorm, against a full softmax in loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lumina.architecture import block_tensors
from lumina.config import ModelConfig
from lumina_jax.attention import Attention, Cache, RMSNorm, rotary
from lumina_jax.context import Row
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients

H, K, h = 4, 2, 6
MODEL = ModelConfig(d_model=8, num_layers=2, num_heads=H, num_kv_heads=K, head_dim=h, rope_theta=100.0, qk_norm=True)
T = 7
# Two documents a row. The positions have gaps, so that counting anew what is there would not give them.
SEGMENTS_BT = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 2]])
POSITIONS_BT = np.array([[0, 1, 5, 0, 2, 3, 9], [0, 1, 2, 3, 8, 0, 6]])


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _weights(model):
    return {n: w for n, w in oracles.random_weights(block_tensors(model, "dense")).items() if n.startswith("attention.")}


def _layer(model, weights):
    return Attention(model, lambda name: nnx.Param(weights[name]))


# ------------------------------------------------------------------------------------------------------------ module


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, weights, x_BTD, segments_BT, positions_BT, cotangent_BTD):
    def out(weights, x_BTD):
        return _layer(model, weights)(x_BTD, segments_BT, positions_BT, Row(x_BTD.shape[1], 1))[0]

    out_BTD, pull = jax.vjp(out, weights, x_BTD)
    return out_BTD, pull(cotangent_BTD)


def test_layer_equals_the_oracle_with_grouped_queries_normed_heads_and_given_positions():
    weights, x_BTD, cotangent_BTD = _weights(MODEL), _normal(2, T, 8), _normal(2, T, 8, seed=1)
    out_BTD, (gradients, dx_BTD) = _apply(MODEL, weights, x_BTD, SEGMENTS_BT, POSITIONS_BT, cotangent_BTD)

    def oracle(arrays):
        rows = zip(arrays["x"], SEGMENTS_BT, POSITIONS_BT, strict=True)
        return np.stack([oracles.attention(MODEL, arrays, x, s, p) for x, s, p in rows])

    arrays = {"x": x_BTD, **weights}
    assert_close(out_BTD, oracle({n: a.astype(np.float64) for n, a in arrays.items()}))
    assert_gradients(lambda a: np.sum(cotangent_BTD * oracle(a)), arrays, {"x": dx_BTD, **gradients})


# Pieces of a row as it comes: (from, to, whether each row's tokens are written). What is not is filling.
PIECES = [(0, 4, [[1, 1, 1, 1], [1, 1, 0, 0]]), (2, 6, [[0, 0, 1, 1], [1, 1, 1, 1]]), (6, 7, [[1], [1]])]


def test_cached_attention_equals_uncached_whatever_is_written_when():
    weights, x_BTD = _weights(MODEL), _normal(2, T, 8)
    segments_BT, positions_BT = np.zeros((2, T), np.int32), np.tile(np.arange(T) ** 2, (2, 1))
    whole_BTD, _ = _apply(MODEL, weights, x_BTD, segments_BT, positions_BT, np.zeros_like(x_BTD))

    @jax.jit
    def step(x, positions, cache, written):
        return _layer(MODEL, weights)(x, jnp.zeros_like(positions), positions, Row(x.shape[1], 1), cache, written)

    # Longer than needed, and what is beyond its length is not empty.
    cache = Cache(*(jnp.full((2, T + 3, K, h), 7.0) for _ in "kv"), jnp.zeros(2, jnp.int32))
    found_BTD, lengths = np.zeros_like(whole_BTD), []
    for start, end, written in PIECES:
        written_BT = np.array(written, bool)
        out_BTD, cache = step(x_BTD[:, start:end], positions_BT[:, start:end], cache, written_BT)
        found_BTD[:, start:end][written_BT] = np.asarray(out_BTD)[written_BT]
        lengths.append(cache.length.tolist())
    assert lengths == [[4, 2], [6, 6], [7, 7]]
    assert_close(found_BTD, whole_BTD)


def test_a_cache_holds_what_is_written_in_order_and_nothing_else():
    cache = Cache(*(jnp.full((2, 5, 1, 1), 7.0) for _ in "kv"), jnp.array([0, 1]))
    new = jnp.arange(1.0, 7).reshape(2, 3, 1, 1)
    written_BT = np.array([[1, 0, 1], [0, 0, 0]], bool)
    after, last_BT = cache.append(new, -new, written_BT)
    assert after.length.tolist() == [2, 1]
    assert last_BT.tolist() == [[0, 0, 1], [0, 0, 0]]  # what each may see
    assert after.keys[:, :, 0, 0].tolist() == [[1, 3, 7, 7, 7], [7, 7, 7, 7, 7]]
    assert after.values[:, :, 0, 0].tolist() == [[-1, -3, 7, 7, 7], [7, 7, 7, 7, 7]]


# -------------------------------------------------------------------------------------------------- rotary, RMSNorm


def test_rotary_turns_the_halves_anticlockwise():
    x_BTNh = np.zeros((1, 2, 2, 4), np.float32)
    x_BTNh[:, :, 0, 0] = 1  # the first of the first half
    x_BTNh[:, :, 1, 3] = 1  # the second of the second half
    out = rotary(x_BTNh, np.array([[0, 3]]), theta=16.0)
    assert_close(out[0, 0], x_BTNh[0, 0], 0)  # position 0 is left as it is
    angle = 3 * 16.0**-0.5
    assert_close(out[0, 1], [[np.cos(3), 0, np.sin(3), 0], [0, -np.sin(angle), 0, np.cos(angle)]], 1e-6)


def test_rotary_scores_depend_on_differences_of_positions():
    q, k = _normal(1, T, 1, h), _normal(1, T, 1, h, seed=1)
    positions = np.arange(T)[None]

    def scores(shift):
        return np.einsum(
            "tnh,snh->ts", *(np.asarray(rotary(x, positions + shift, 100.0))[0].astype(np.float64) for x in (q, k))
        )

    assert_close(scores(37), scores(0))
    assert np.max(np.abs(scores(0) - np.einsum("btnh,bsnh->ts", q, k))) > 0.1  # and do depend on them


def test_large_positions_are_exact_to_float32_for_bfloat16_heads():
    positions = np.array([[4099, 5003, 8191]])  # none of them a bfloat16
    x = jnp.asarray(_normal(1, 3, 1, h), jnp.bfloat16)
    out = rotary(x, positions, 100.0)
    assert out.dtype == jnp.bfloat16
    assert_close(out[0, :, 0], oracles.rotate(np.asarray(x, np.float64)[0, :, 0], positions[0], 100.0), 2**-8)


def test_rms_norm_equals_the_oracle_with_eps_inside_the_root():
    x, scale = 1e-3 * _normal(2, 3, 8), _normal(8, seed=1)  # mean squares about as large as eps
    out = RMSNorm(nnx.Param(jnp.asarray(scale)), 1e-6)(jnp.asarray(x))
    assert_close(out, oracles.rms_norm(x.astype(np.float64), scale, 1e-6))


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    x, scale = jnp.asarray(100 * _normal(3, 512), jnp.bfloat16), _normal(512, seed=1)
    out = RMSNorm(nnx.Param(jnp.asarray(scale)), 1e-6)(x)
    expected = oracles.rms_norm(np.asarray(x, np.float64), scale, 1e-6)
    assert out.dtype == jnp.bfloat16
    # Within half a unit of the last place, element by element: any rounding on the way would show.
    assert np.all(np.abs(np.asarray(out, np.float64) - expected) <= 2**-8 * 1.01 * np.abs(expected))
