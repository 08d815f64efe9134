"""Grouped-query attention with rotary positions, causal within a document.

B rows, T query positions, S key positions, D model width, H query heads, K key/value heads, G = H / K, h head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lumina.config import ModelConfig
from lumina_jax.attend import attend, attend_cached
from lumina_jax.context import Row, attend_context


class Cache(NamedTuple):
    """Keys and values of one layer, already rotated, of the tokens that took it: those of row b are at 0 to length[b] - 1."""

    keys: jax.Array  # [B, S, K, h]
    values: jax.Array  # [B, S, K, h]
    length: jax.Array  # [B] int32

    def append(self, keys_BTKh, values_BTKh, written_BT) -> tuple["Cache", jax.Array]:
        """The cache after the tokens that are written, in order, and the last place that each token may see [B, T]."""
        S = self.keys.shape[1]
        last_BT = self.length[:, None] + jnp.cumsum(written_BT, axis=1, dtype=jnp.int32) - 1
        place_BT = jnp.where(written_BT, last_BT, S)  # out of range: not written
        rows_B1 = jnp.arange(self.keys.shape[0])[:, None]
        keys = self.keys.at[rows_B1, place_BT].set(keys_BTKh.astype(self.keys.dtype), mode="drop")
        values = self.values.at[rows_B1, place_BT].set(values_BTKh.astype(self.values.dtype), mode="drop")
        return Cache(keys, values, last_BT[:, -1] + 1), last_BT


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or in float64 when it already is: what needs precision, and what keeps float64 a true oracle."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, scale: nnx.Variable, eps: float):
        self.scale = scale
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = at_least_float32(x)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale.astype(wide.dtype)).astype(x.dtype)


def rotary(x_BTNh: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotate the two halves of each head by angles position * theta^(-2i/h), computed in float32 (RoFormer, section 3.4)."""
    half = x_BTNh.shape[-1] // 2
    wide = jnp.promote_types(x_BTNh.dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    angles = positions_BT[:, :, None, None].astype(wide) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BTNh.astype(wide), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNh.dtype)


class Attention(nnx.Module):
    """Queries, keys and values without bias; optional RMSNorm on each query and key head."""

    def __init__(self, model: ModelConfig, param: Callable[[str], nnx.Variable]):
        self.query, self.key, self.value, self.output = (param(f"attention.{n}") for n in ("query", "key", "value", "output"))
        self.rope_theta = model.rope_theta
        self.form = model.attention_form
        if model.qk_norm:
            self.query_norm = RMSNorm(param("attention.query_norm.scale"), model.norm_eps)
            self.key_norm = RMSNorm(param("attention.key_norm.scale"), model.norm_eps)

    def __call__(self, x_BTD, segments_BT, positions_BT, row: Row, cache: Cache | None = None, written_BT=None):
        """Returns ([B, T, D], cache). With a cache a row is one document, of which x is what follows; the tokens that are
        written join it, each seeing what came before it and itself. The output of the others means nothing.

        x is a device's part of `row`, of which segments and positions are whole. With some of the heads the output is their
        share of it.
        """
        dtype = x_BTD.dtype
        q_BTHh = jnp.einsum("btd,dnh->btnh", x_BTD, self.query.astype(dtype))
        k_BTKh = jnp.einsum("btd,dnh->btnh", x_BTD, self.key.astype(dtype))
        v_BTKh = jnp.einsum("btd,dnh->btnh", x_BTD, self.value.astype(dtype))
        if hasattr(self, "query_norm"):
            q_BTHh, k_BTKh = self.query_norm(q_BTHh), self.key_norm(k_BTKh)
        positions_BT = row.own(positions_BT, 0)
        q_BTHh = rotary(q_BTHh, positions_BT, self.rope_theta)
        k_BTKh = rotary(k_BTKh, positions_BT, self.rope_theta)
        with jax.named_scope("attend"):
            if row.n > 1:
                mixed_BTHh = attend_context(q_BTHh, k_BTKh, v_BTKh, segments_BT, row, self.form)
            elif cache is None:
                mixed_BTHh = attend(q_BTHh, k_BTKh, v_BTKh, segments_BT, self.form)
            else:
                cache, last_BT = cache.append(k_BTKh, v_BTKh, written_BT)
                mixed_BTHh = attend_cached(q_BTHh, cache.keys, cache.values, last_BT)
        return jnp.einsum("btnh,nhd->btd", mixed_BTHh, self.output.astype(dtype)), cache
