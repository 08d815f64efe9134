"""Scaled dot products of queries and keys, softmax, mix of values: the part of attention that has several forms.

B rows, T query positions, S key positions, H query heads, K key/value heads, G = H / K, h head width.
"""

import math

import jax
import jax.numpy as jnp


def attend_chunk(q_BTHh, k_BSKh, v_BSKh, q_segments_BT, k_segments_BS, offset=0):
    """Query t, at index offset + t, sees the keys at or before its index that are in its segment. Softmax in float32.

    Returns [B, T, H, h] in q's dtype. The R = G T queries of a key head are the rows of one matrix product, and the sum of
    the softmax is divided out after the values are mixed: measured, half the time of the plain form on CPU.
    """
    B, T, H, h = q_BTHh.shape
    S, K = k_BSKh.shape[1:3]
    G, wide = H // K, jnp.promote_types(q_BTHh.dtype, jnp.float32)
    q_BKRh = q_BTHh.reshape(B, T, K, G, h).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, h)
    scores_BKRS = jnp.einsum("bkrh,bskh->bkrs", q_BKRh, k_BSKh, preferred_element_type=wide) / math.sqrt(h)
    causal_TS = offset + jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
    visible_BTS = causal_TS & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKRS.reshape(B, K, G, T, S), jnp.finfo(wide).min)
    largest_BKGT1 = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1, keepdims=True))
    weights_BKGTS = jnp.exp(scores_BKGTS - largest_BKGT1)  # a query sees itself, so what it must not see becomes 0
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    weights_BKRS = weights_BKGTS.astype(v_BSKh.dtype).reshape(B, K, G * T, S)
    mixed_BKRh = jnp.einsum("bkrs,bskh->bkrh", weights_BKRS, v_BSKh, preferred_element_type=wide)
    mixed_BKGTh = mixed_BKRh.reshape(B, K, G, T, h) / total_BKGT1
    return mixed_BKGTh.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h).astype(q_BTHh.dtype)


def attend_cached(q_BTHh, k_BSKh, v_BSKh, last_BT):
    """Query t sees the places 0 to last[t] of a cache. Softmax in float32. Returns [B, T, H, h] in q's dtype."""
    B, T, H, h = q_BTHh.shape
    S, K = k_BSKh.shape[1:3]
    wide = jnp.promote_types(q_BTHh.dtype, jnp.float32)
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=wide) / math.sqrt(h)
    visible_BTS = jnp.arange(S) <= jnp.maximum(last_BT, 0)[:, :, None]  # of a query that has none, any result will do
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(wide).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKh.dtype)
    mixed_BTKGh = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKh, preferred_element_type=wide)
    return mixed_BTKGh.reshape(B, T, H, h).astype(q_BTHh.dtype)


def attend(q_BTHh, k_BTKh, v_BTKh, segments_BT):
    """`attend_chunk` of a whole row, in chunks of queries, each against only the keys that it may see.

    Up to 16 chunks; each recomputes its scores in the backward pass, so that no [T, T] array outlives it.
    """
    T = q_BTHh.shape[1]
    chunk = max(128, -(-T // 16))
    if chunk >= T:
        return attend_chunk(q_BTHh, k_BTKh, v_BTKh, segments_BT, segments_BT)
    piece = jax.checkpoint(attend_chunk, static_argnums=(5,))
    return jnp.concatenate(
        [
            piece(q_BTHh[:, a:b], k_BTKh[:, :b], v_BTKh[:, :b], segments_BT[:, a:b], segments_BT[:, :b], a)
            for a, b in ((a, min(a + chunk, T)) for a in range(0, T, chunk))
        ],
        axis=1,
    )
