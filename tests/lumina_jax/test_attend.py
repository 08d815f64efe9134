"""The forms of attention, against a full softmax in loops, forward and backward; and which form is taken when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina.errors import ConfigError
from lumina_jax.attend import FORMS, MOST_CHUNKS, attend, attend_cached, attend_splash, choose_attention
from tests.lumina_jax import oracles
from tests.lumina_jax.oracles import assert_close, assert_gradients, equations


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _qkv(length, heads, kv_heads, width, rows=1):
    return tuple(_normal(rows, length, n, width, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))


@functools.partial(jax.jit, static_argnums=5)
def _attend_and_gradients(q, k, v, segments_BT, cotangent, form="auto"):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, segments_BT, form), q, k, v)
    return out, pull(cotangent)


def _assert_equals_the_oracle(out, gradients, q, k, v, segments_BT, cotangent, tolerance=1e-5):
    def oracle(arrays):
        rows = zip(*(arrays[n] for n in "qkv"), segments_BT, strict=True)
        return np.stack([oracles.attend(*row) for row in rows])

    arrays = {name: np.asarray(array, np.float64) for name, array in zip("qkv", (q, k, v), strict=True)}
    assert_close(out, oracle(arrays), tolerance)
    slopes = dict(zip("qkv", gradients, strict=True))
    assert_gradients(lambda a: np.sum(cotangent * oracle(a)), arrays, slopes, tolerance)


# --------------------------------------------------------------------------------------------- chunked and reference


@pytest.mark.parametrize("form", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width"),
    [(7, 4, 2, 6), (64, 2, 2, 2), (67, 4, 1, 4), (131, 3, 3, 2)],
    ids=["shorter_than_a_chunk", "one_chunk", "one_key_head", "a_key_head_each_of_a_prime_length"],
)
def test_attend_equals_a_full_softmax_forward_and_backward(length, heads, kv_heads, width, form):
    q, k, v = (2 * x for x in _qkv(length, heads, kv_heads, width, rows=2))
    segments_BT = np.sort(np.random.default_rng(3).integers(0, 3, (2, length)), axis=1)
    cotangent = _normal(2, length, heads, width, seed=4)
    out, gradients = _attend_and_gradients(q, k, v, segments_BT, cotangent, form)
    _assert_equals_the_oracle(out, gradients, q, k, v, segments_BT, cotangent)


def test_attention_sees_neither_the_future_nor_another_document():
    length, changed = 130, 100
    q, k, v = _qkv(length, 2, 1, 4)
    segments_BT = (np.arange(length) >= 60).astype(np.int32)[None]
    cotangent = np.zeros_like(q)
    before, _ = _attend_and_gradients(q, k, v, segments_BT, cotangent)
    k, v = k.copy(), v.copy()  # JAX may still be reading the first ones, without a copy
    k[:, changed], v[:, changed] = 9.0, 9.0
    after, _ = _attend_and_gradients(q, k, v, segments_BT, cotangent)
    assert np.array_equal(after[:, :changed], before[:, :changed])
    assert np.all(np.any(after[0, changed:] != before[0, changed:], axis=(1, 2)))
    k, v = k.copy(), v.copy()
    k[:, 30], v[:, 30] = -9.0, -9.0  # in the first document
    again, _ = _attend_and_gradients(q, k, v, segments_BT, cotangent)
    assert np.array_equal(again[:, 60:], after[:, 60:])
    assert np.all(np.any(again[0, 30:60] != after[0, 30:60], axis=(1, 2)))


def test_gradients_stay_within_a_document():
    q, k, v = _qkv(130, 2, 1, 4)
    segments_BT = (np.arange(130) >= 60).astype(np.int32)[None]
    cotangent = _normal(1, 130, 2, 4, seed=4) * (segments_BT == 1)[:, :, None, None]
    _, gradients = _attend_and_gradients(q, k, v, segments_BT, cotangent)
    for gradient in gradients:
        assert np.all(gradient[:, :60] == 0)
        assert np.any(gradient[:, 60:] != 0)


def test_a_packed_row_of_one_token_documents_returns_its_own_values():
    q, k, v = _qkv(130, 2, 1, 4)
    cotangent = _normal(1, 130, 2, 4, seed=4)
    out, (dq, dk, dv) = _attend_and_gradients(q, k, v, np.arange(130)[None], cotangent)
    assert_close(out, np.repeat(v, 2, axis=2), 1e-6)
    assert_close(dv, np.sum(cotangent, axis=2, keepdims=True), 1e-6)
    assert np.max(np.abs(dq)) < 1e-5  # a softmax over one key is flat
    assert np.max(np.abs(dk)) < 1e-5


def test_scores_far_apart_neither_overflow_nor_lose_their_gradient():
    q, k, v = _qkv(67, 2, 1, 4)
    segments_BT, cotangent = np.zeros((1, 67), np.int32), _normal(1, 67, 2, 4, seed=4)
    out, gradients = _attend_and_gradients(60 * q, 60 * k, v, segments_BT, cotangent)  # scores in the thousands
    assert np.all(np.isfinite(out))
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)
    assert_close(out[0], oracles.attend(*(np.asarray(x[0], np.float64) for x in (60 * q, 60 * k, v)), segments_BT[0]), 1e-3)


def test_softmax_runs_in_float32_for_bfloat16_inputs_forward_and_backward():
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _qkv(70, 4, 2, 6))
    segments_BT, cotangent = np.zeros((1, 70), np.int32), jnp.ones(q.shape, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda *a: _attend_and_gradients(*a, "chunked"))(q, k, v, segments_BT, cotangent)
    exponentials = [eqn.outvars[0].aval.dtype for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "exp"]
    assert exponentials == [jnp.float32] * 4  # two chunks, there and back
    assert {out.dtype for out in jaxpr.out_avals} == {jnp.dtype(jnp.bfloat16)}
    out, gradients = _attend_and_gradients(q, k, v, segments_BT, cotangent, "chunked")
    _assert_equals_the_oracle(out, gradients, q, k, v, segments_BT, np.ones(q.shape), tolerance=2**-6)


def test_float64_stays_float64():
    q, k, v = (x.astype(np.float64) for x in _qkv(70, 2, 1, 4))
    segments_BT, cotangent = np.zeros((1, 70), np.int32), _normal(1, 70, 2, 4, seed=4).astype(np.float64)
    with jax.enable_x64(True):
        out, gradients = _attend_and_gradients(q, k, v, segments_BT, cotangent, "chunked")
        assert {x.dtype for x in (out, *gradients)} == {jnp.dtype("float64")}
    _assert_equals_the_oracle(out, gradients, q, k, v, segments_BT, cotangent, tolerance=1e-9)


def test_no_scores_of_a_whole_row_exist_in_either_pass():
    T, H, K = 1000, 2, 1
    shapes = [jax.ShapeDtypeStruct((1, T, n, 4), jnp.float32) for n in (H, K, K, H)]
    segments = jax.ShapeDtypeStruct((1, T), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda q, k, v, g, s: _attend_and_gradients(q, k, v, s, g, "chunked"))(*shapes, segments)
    sizes = [out.aval.size for eqn in equations(jaxpr.jaxpr) for out in eqn.outvars]
    assert max(sizes) <= H * -(-T // MOST_CHUNKS) * T
    # What the backward pass is given grows with T alone.
    kept = jax.eval_shape(lambda q, k, v, s: jax.vjp(lambda *a: attend(*a, s, "chunked"), q, k, v)[1], *shapes[:3], segments)
    assert sum(leaf.size for leaf in jax.tree.leaves(kept)) <= T * (2 * H + 2 * K + 1) * 4 + T * H


def test_long_rows_are_a_bounded_number_of_chunks():
    shapes = [jax.ShapeDtypeStruct((1, 100_003, n, 4), jnp.float32) for n in (2, 1, 1)]
    segments = jax.ShapeDtypeStruct((1, 100_003), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda q, k, v, s: attend(q, k, v, s, "chunked"))(*shapes, segments)
    assert sum(eqn.primitive.name == "exp" for eqn in equations(jaxpr.jaxpr)) == MOST_CHUNKS


# ------------------------------------------------------------------------------------------------------------- cached


def test_cached_queries_see_the_places_up_to_their_last():
    q, k, v = _normal(2, 3, 4, 6), _normal(2, 9, 2, 6, seed=1), _normal(2, 9, 2, 6, seed=2)
    last_BT = np.array([[0, 4, 8], [2, 2, 7]])
    out = attend_cached(q, k, v, last_BT)
    for row in range(2):
        for t, last in enumerate(last_BT[row]):
            # The oracle's last query of a row sees all of it.
            queries = np.zeros((last + 1, 4, 6))
            queries[-1] = q[row, t]
            seen = slice(0, last + 1)
            expected = oracles.attend(queries, k[row, seen], v[row, seen], np.zeros(last + 1))[-1]
            assert_close(out[row, t], expected)


def test_a_cached_query_that_sees_nothing_yet_is_finite():
    out = attend_cached(_normal(1, 1, 2, 4), _normal(1, 5, 1, 4), _normal(1, 5, 1, 4), np.array([[-1]]))
    assert np.all(np.isfinite(out))


# ------------------------------------------------------------------------------------------------------------- splash


def test_splash_equals_a_full_softmax_forward_and_backward():
    q, k, v = _qkv(128, 4, 2, 128)
    segments_BT = (np.arange(128) >= 50).astype(np.int32)[None]
    cotangent = _normal(1, 128, 4, 128, seed=4)
    out, pull = jax.vjp(lambda q, k, v: attend_splash(q, k, v, segments_BT, interpret=True), q, k, v)
    _assert_equals_the_oracle(out, pull(cotangent), q, k, v, segments_BT, cotangent)


@pytest.mark.parametrize("dtype", FORMS["splash"].dtypes)
def test_splash_lowers_for_tpu_forward_and_backward(dtype):
    shapes = [jax.ShapeDtypeStruct((2, 256, n, 64), dtype) for n in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    loss = jax.jit(jax.grad(lambda q, k, v, s: jnp.sum(attend_splash(q, k, v, s).astype(jnp.float32)), argnums=(0, 1, 2)))
    text = loss.trace(*shapes, segments).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3  # forward, dq, and dk with dv


# ------------------------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "expected"),
    [
        ("cpu", "float32", 512, "chunked"),
        ("cpu", "float64", 7, "chunked"),
        ("tpu", "bfloat16", 512, "splash"),
        ("tpu", "bfloat16", 500, "chunked"),
        ("gpu", "bfloat16", 512, "chunked"),
    ],
)
def test_auto_takes_the_fastest_that_honours_the_request(platform, dtype, length, expected):
    name, reason = choose_attention("auto", platform, dtype, length)
    assert name == expected
    assert reason


@pytest.mark.parametrize(
    ("form", "platform", "dtype", "length", "says"),
    [
        ("splash", "cpu", "bfloat16", 512, "runs on tpu, not on cpu"),
        ("splash", "tpu", "float64", 512, "takes bfloat16 or float32, not float64"),
        ("splash", "tpu", "bfloat16", 500, "multiple of 128, not 500"),
    ],
)
def test_a_form_that_cannot_honour_the_request_is_refused(form, platform, dtype, length, says):
    with pytest.raises(ConfigError) as error:
        choose_attention(form, platform, dtype, length)
    assert says in str(error.value)
    assert str(error.value).endswith("; chunked, reference would work")


def test_an_unknown_form_is_refused():
    with pytest.raises(ConfigError, match="attention_form = 'flash': must be auto, chunked, reference, splash"):
        choose_attention("flash", "cpu", "float32", 512)


def test_attend_itself_refuses_a_form_that_cannot_run_here():
    q, k, v = _qkv(8, 2, 1, 8)
    with pytest.raises(ConfigError, match="splash runs on tpu"):
        attend(q, k, v, np.zeros((1, 8), np.int32), "splash")
