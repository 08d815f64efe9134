"""Cross-entropy in chunks, against a whole log-softmax in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lumina_jax.loss
from lumina_jax.loss import cross_entropy
from tests.lumina_jax.oracles import assert_close, assert_gradients, equations, wide

N, D, V = 10, 4, 9
rng = np.random.default_rng(0)
HIDDEN_ND = rng.standard_normal((N, D)).astype(np.float32)
HEAD_DV = (2 * rng.standard_normal((D, V))).astype(np.float32)
TARGETS_N = rng.integers(0, V, N)
TARGETS_N[::3] = np.argmax(HIDDEN_ND @ HEAD_DV, axis=1)[::3]  # some predictions are right
WEIGHTS_N = np.array([1, 0, 0.5, 1, 2, 0, 0, 1, 1, 0.25], np.float32)


def _oracle(hidden_ND, head_DV, weights_N=WEIGHTS_N):
    """(weighted sum of -log p(target), weighted count of the targets that come first)."""
    loss = correct = 0.0
    for hidden_D, target, weight in zip(wide(hidden_ND), TARGETS_N, weights_N, strict=True):
        logits_V = hidden_D @ wide(head_DV)
        top = np.max(np.real(logits_V))
        loss += weight * (top + np.log(np.sum(np.exp(logits_V - top))) - logits_V[target])
        correct += weight * (np.argmax(np.real(logits_V)) == target)
    return loss, correct


def _gradients(scale=1.0, hidden_ND=HIDDEN_ND, head_DV=HEAD_DV, part="loss"):
    def weighted(hidden_ND, head_DV):
        sums = cross_entropy(hidden_ND, head_DV, TARGETS_N, WEIGHTS_N)
        return scale * getattr(sums, part), sums

    # jit anew each time, as the size of a chunk is read while tracing
    (_, sums), gradients = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))(hidden_ND, head_DV)
    return sums, dict(zip(("hidden", "head"), gradients, strict=True))


@pytest.mark.parametrize("chunk", [3, 5, 512], ids=["not_divisible", "divisible", "one_chunk"])
def test_equals_a_log_softmax_forward_and_backward(chunk, monkeypatch):
    monkeypatch.setattr(lumina_jax.loss, "LOGIT_CHUNK", chunk)
    expected_loss, expected_correct = _oracle(HIDDEN_ND, HEAD_DV)
    alone = cross_entropy(HIDDEN_ND, HEAD_DV, TARGETS_N, WEIGHTS_N)
    differentiated, gradients = _gradients()
    for sums in (alone, differentiated):  # two paths: forward alone, and forward under differentiation
        assert_close(sums.loss, expected_loss)
        assert_close(sums.correct, expected_correct)
    assert 0 < expected_correct < np.sum(WEIGHTS_N)
    assert_gradients(lambda a: _oracle(a["hidden"], a["head"])[0], {"hidden": HIDDEN_ND, "head": HEAD_DV}, gradients)


def test_gradient_scales_with_the_cotangent():
    _, once = _gradients()
    _, scaled = _gradients(scale=-2.5)
    for name, gradient in once.items():
        assert_close(scaled[name], -2.5 * gradient, 1e-6)


def test_the_count_of_correct_tokens_has_no_gradient():
    _, gradients = _gradients(part="correct")
    for gradient in gradients.values():
        assert np.all(gradient == 0)


def test_tokens_of_weight_zero_count_for_nothing():
    hidden_ND = HIDDEN_ND.copy()
    hidden_ND[WEIGHTS_N == 0] = 50.0
    before, _ = _gradients()
    after, gradients = _gradients(hidden_ND=hidden_ND)
    assert_close(after.loss, before.loss, 1e-6)
    assert_close(after.correct, before.correct, 1e-6)
    assert np.all(gradients["hidden"][WEIGHTS_N == 0] == 0)


def test_large_logits_do_not_overflow():
    sums, gradients = _gradients(hidden_ND=1e4 * HIDDEN_ND)
    assert_close(sums.loss, _oracle(1e4 * HIDDEN_ND, HEAD_DV)[0])
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())


def test_bfloat16_hidden_gives_float32_sums():
    hidden_ND, head_DV = jnp.asarray(HIDDEN_ND, jnp.bfloat16), jnp.asarray(HEAD_DV, jnp.bfloat16)
    sums, gradients = _gradients(hidden_ND=hidden_ND, head_DV=head_DV)
    assert sums.loss.dtype == sums.correct.dtype == jnp.float32
    assert_close(sums.loss, _oracle(hidden_ND, head_DV)[0])
    _, wide = _gradients(hidden_ND=hidden_ND.astype(jnp.float32), head_DV=head_DV.astype(jnp.float32))
    for name, gradient in gradients.items():
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, wide[name], 2e-2)


def test_logits_of_bfloat16_are_float32():
    jaxpr = jax.make_jaxpr(cross_entropy)(HIDDEN_ND.astype(jnp.bfloat16), HEAD_DV.astype(jnp.bfloat16), TARGETS_N, WEIGHTS_N)
    products = [eqn.outvars[0].aval.dtype for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert products == [jnp.float32]


def test_float64_is_kept_throughout():
    with jax.enable_x64(True):
        wide = (HIDDEN_ND.astype(np.float64), HEAD_DV.astype(np.float64), TARGETS_N, WEIGHTS_N.astype(np.float64))
        assert_close(cross_entropy(*wide).loss, _oracle(*wide[:2])[0], 1e-14)


def test_no_array_of_tokens_times_vocabulary_is_formed(monkeypatch):
    tokens, width, vocabulary, chunk = 64, 4, 96, 8
    monkeypatch.setattr(lumina_jax.loss, "LOGIT_CHUNK", chunk)
    arguments = (jnp.zeros((tokens, width)), jnp.zeros((width, vocabulary)), jnp.zeros(tokens, jnp.int32), jnp.ones(tokens))

    def largest(loss):
        text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile().as_text()
        return max(np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w+\[([\d,]+)\]", text))

    def whole(hidden_ND, head_DV, targets_N, weights_N):
        return -jnp.sum(weights_N * jax.nn.log_softmax(hidden_ND @ head_DV)[jnp.arange(tokens), targets_N])

    assert largest(whole) >= tokens * vocabulary
    assert largest(lambda *a: cross_entropy(*a).loss) <= chunk * vocabulary
