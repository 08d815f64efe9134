"""Grouped-query attention with rotary positions.

B rows, T query positions, S key positions, D model width, H query heads, K key/value heads, G = H / K, h head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lumina.config import ModelConfig
from lumina_torch.attend import Places, attend, attend_cached


class Cache:
    """Keys and values of one layer, already rotated, of the tokens that took it: those of row b are at 0 to length[b] - 1.

    It grows with what it holds: a layer that few tokens take holds few.
    """

    def __init__(self, batch: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str):
        self.keys_BSKh = torch.zeros(batch, 16, kv_heads, head_dim, dtype=dtype, device=device)
        self.values_BSKh = torch.zeros_like(self.keys_BSKh)
        self.length_B = torch.zeros(batch, dtype=torch.long, device=device)

    def append(self, keys_BTKh: Tensor, values_BTKh: Tensor, written_BT: Tensor) -> Tensor:
        """Add the tokens that are written, in order; returns the last place that each token may see [B, T]."""
        last_BT = self.length_B[:, None] + written_BT.long().cumsum(dim=1) - 1
        self.length_B = last_BT[:, -1] + 1
        while int(self.length_B.max()) > self.keys_BSKh.shape[1]:
            self.keys_BSKh, self.values_BSKh = (
                torch.cat([a, torch.zeros_like(a)], dim=1) for a in (self.keys_BSKh, self.values_BSKh)
            )
        b, t = written_BT.nonzero(as_tuple=True)
        self.keys_BSKh[b, last_BT[b, t]] = keys_BTKh[b, t].to(self.keys_BSKh.dtype)
        self.values_BSKh[b, last_BT[b, t]] = values_BTKh[b, t].to(self.values_BSKh.dtype)
        return last_BT


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or in float64 when it already is: what needs precision, and what keeps float64 a true oracle."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, scale: Tensor, eps: float):
        super().__init__()
        self.scale = scale
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        normed = wide * torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.scale.to(wide.dtype)).to(x.dtype)


def rotary(x_BTNh: Tensor, places: Places, theta: float) -> Tensor:
    """Rotate the two halves of each head by angles position * theta^(-2i/h), computed in float32 (RoFormer, section 3.4)."""
    wide = at_least_float32(x_BTNh)
    sin, cos = places.rotation(theta, x_BTNh.shape[-1] // 2, wide.dtype)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTNh.dtype)


class Attention(nn.Module):
    """Queries, keys and values without bias; optional RMSNorm on each query and key head."""

    def __init__(self, model: ModelConfig, param: Callable[[str], Tensor]):
        super().__init__()
        self.query, self.key, self.value, self.output = (param(f"attention.{n}") for n in ("query", "key", "value", "output"))
        self.rope_theta = model.rope_theta
        self.form = model.attention_form
        if model.qk_norm:
            self.query_norm = RMSNorm(param("attention.query_norm.scale"), model.norm_eps)
            self.key_norm = RMSNorm(param("attention.key_norm.scale"), model.norm_eps)

    def forward(self, x_BTD: Tensor, places: Places, cache: Cache | None = None, written_BT: Tensor | None = None) -> Tensor:
        """Returns [B, T, D]. With a cache a row is one document, of which x is what follows; the tokens that are written join
        it, each seeing what came before it and itself. The output of the others means nothing."""
        q_BTHh, k_BTKh, v_BTKh = (
            (x_BTD @ w.to(x_BTD.dtype).flatten(1)).unflatten(-1, w.shape[1:]) for w in (self.query, self.key, self.value)
        )
        if hasattr(self, "query_norm"):
            q_BTHh, k_BTKh = self.query_norm(q_BTHh), self.key_norm(k_BTKh)
        q_BTHh, k_BTKh = rotary(q_BTHh, places, self.rope_theta), rotary(k_BTKh, places, self.rope_theta)
        if cache is None or written_BT is None:
            mixed_BTHh = attend(q_BTHh, k_BTKh, v_BTKh, places, self.form)
        else:
            last_BT = cache.append(k_BTKh, v_BTKh, written_BT)
            mixed_BTHh = attend_cached(q_BTHh, cache.keys_BSKh, cache.values_BSKh, last_BT)
        return mixed_BTHh.flatten(2) @ self.output.to(x_BTD.dtype).flatten(0, 1)
