"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

N tokens, D model width, V vocabulary: over the mesh axis `tensor` each device has the logits of a part of it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lumina.architecture import LOGIT_CHUNK
from lumina_jax.attention import at_least_float32
from lumina_jax.sharding import ALONE, Axes


class TokenSums(NamedTuple):
    """Weighted sums over tokens."""

    loss: jax.Array  # -log p(target), nats
    correct: jax.Array  # tokens to whose target no other token is preferred


def _chunks(hidden_ND, targets_N, weights_N):
    """Split the tokens into chunks of LOGIT_CHUNK; the last is filled up with tokens of weight 0."""
    N = hidden_ND.shape[0]
    size = min(N, LOGIT_CHUNK)
    chunks = -(-N // size)
    pad = chunks * size - N

    def split(x):
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, size, *x.shape[1:])

    return split(hidden_ND), split(targets_N), split(weights_N.astype(at_least_float32(hidden_ND).dtype))


def _logits(hidden_nD, head_DV):
    wide = jnp.promote_types(hidden_nD.dtype, jnp.float32)
    return jnp.matmul(hidden_nD, head_DV, preferred_element_type=wide)


def _own(targets_n, V: int, axes: Axes):
    """(targets as columns of this device's part of the vocabulary, which of them are in it)."""
    column_n = targets_n - axes.place("tensor") * V
    return column_n, (column_n >= 0) & (column_n < V)


def _sums(logits_nV, targets_n, weights_n, axes: Axes):
    """A device's share of the sums over a chunk, and log of the sum of exp(logits)."""
    tensor = ("tensor",)
    most_n = axes.largest(jnp.max(logits_nV, axis=-1), tensor)
    log_total_n = most_n + jnp.log(axes.sum(jnp.sum(jnp.exp(logits_nV - most_n[:, None]), axis=-1), tensor))
    column_n, own_n = _own(targets_n, logits_nV.shape[1], axes)
    target_n = jnp.take_along_axis(logits_nV, jnp.where(own_n, column_n, 0)[:, None], axis=-1)[:, 0]
    correct_n = own_n & (target_n >= most_n)  # an argmax costs as much as the loss
    loss_n = jnp.where(own_n, log_total_n - target_n, 0)
    return TokenSums(jnp.sum(weights_n * loss_n), jnp.sum(weights_n * correct_n.astype(weights_n.dtype))), log_total_n


def cross_entropy(hidden_ND, head_DV, targets_N, weights_N, axes: Axes = ALONE) -> TokenSums:
    """Sums of weighted cross-entropy and of correct predictions; logits and sums in at least float32.

    With a part of the head's columns they are the device's share of the sums: of the targets in its part.

    Under differentiation the gradients are formed chunk by chunk in the forward pass, while the logits are there: three
    matrix products instead of the four that recomputing the logits would take. Nothing of size N x V is kept.
    """
    return _cross_entropy(hidden_ND, head_DV, targets_N, weights_N, axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_ND, head_DV, targets_N, weights_N, axes):
    def step(total: TokenSums, chunk):
        h_nD, t_n, w_n = chunk
        sums, _ = _sums(_logits(h_nD, head_DV), t_n, w_n, axes)
        return jax.tree.map(jnp.add, total, sums), None

    zero = jnp.zeros((), at_least_float32(hidden_ND).dtype)
    return jax.lax.scan(step, TokenSums(zero, zero), _chunks(hidden_ND, targets_N, weights_N))[0]


def _forward(hidden_ND, head_DV, targets_N, weights_N, axes):
    def step(carry, chunk):
        total, dhead_DV = carry
        h_nD, t_n, w_n = chunk
        logits_nV = _logits(h_nD, head_DV)
        sums, log_total_n = _sums(logits_nV, t_n, w_n, axes)
        target_nV = _own(t_n, head_DV.shape[1], axes)[0][:, None] == jnp.arange(head_DV.shape[1])
        dlogits_nV = (w_n[:, None] * (jnp.exp(logits_nV - log_total_n[:, None]) - target_nV)).astype(h_nD.dtype)
        dhead_DV += jnp.matmul(h_nD.T, dlogits_nV, preferred_element_type=dhead_DV.dtype)
        return (jax.tree.map(jnp.add, total, sums), dhead_DV), dlogits_nV @ head_DV.T

    zero = jnp.zeros((), at_least_float32(hidden_ND).dtype)
    start = (TokenSums(zero, zero), jnp.zeros(head_DV.shape, jnp.promote_types(head_DV.dtype, jnp.float32)))
    (total, dhead_DV), dhidden_cnD = jax.lax.scan(step, start, _chunks(hidden_ND, targets_N, weights_N))
    dhidden_ND = dhidden_cnD.reshape(-1, hidden_ND.shape[1])[: hidden_ND.shape[0]]
    return total, (dhidden_ND, dhead_DV.astype(head_DV.dtype))


def _backward(axes, saved, cotangent: TokenSums):
    dhidden_ND, dhead_DV = saved
    scale = cotangent.loss
    return dhidden_ND * scale.astype(dhidden_ND.dtype), dhead_DV * scale.astype(dhead_DV.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)
