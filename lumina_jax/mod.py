"""Mixture-of-Depths: a layer's feed-forward works on some tokens of each row, the rest pass by (Raposo et al., 2024).

B rows, T positions, C selected positions, D model width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lumina.architecture import capacity
from lumina.config import ModelConfig
from lumina_jax.attention import at_least_float32
from lumina_jax.gather import inverse_index, take_rows


def select_top(logit_BT, count: int):
    """Positions [B, C] of the `count` highest of each row, in temporal order; ties choose the earlier position."""
    _, index_BC = jax.lax.top_k(logit_BT, count)
    return jnp.sort(index_BC, axis=1).astype(jnp.int32)


class MoD(nnx.Module):
    """Router of one layer: gate g = sigmoid(w . z + b) of the normalised input z."""

    def __init__(self, model: ModelConfig, param: Callable[[str], nnx.Variable]):
        self.router = param("mod.router")
        self.bias = param("mod.bias")
        self.capacity = model.mod.capacity

    def __call__(self, z_BTD, inner: Callable, training: bool):
        """Returns (g * inner(z) at the selected positions and zero elsewhere [B, T, D], inner's metrics, own metrics).

        Training selects the top C = ceil(c T) of each row, which sees the future; evaluation and generation decide token by
        token, g > 0.5, as the predictor loss teaches. `inner` maps [B, N, D] to ([B, N, D], metrics), without the residual.
        """
        B, T, D = z_BTD.shape
        wide_BTD = at_least_float32(z_BTD)
        router, bias = self.router.astype(wide_BTD.dtype), self.bias.astype(wide_BTD.dtype)
        logit_BT = wide_BTD @ router + bias
        if training:
            with jax.named_scope("select"):
                index_BC = select_top(jax.lax.stop_gradient(logit_BT), capacity(T, self.capacity))
                slot_BT = inverse_index(index_BC, T)
                z_BCD = take_rows(z_BTD, index_BC, slot_BT[:, :, None])
            out_BCD, metrics = inner(z_BCD)
            gate_BC1 = jax.nn.sigmoid(jnp.take_along_axis(logit_BT, index_BC, axis=1))[:, :, None]
            with jax.named_scope("scatter"):
                out_BTD = take_rows(out_BCD * gate_BC1.astype(out_BCD.dtype), slot_BT, index_BC[:, :, None])
            selected_BT = slot_BT >= 0
        else:
            selected_BT = logit_BT > 0
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(inner, z_BTD))
            # A decoding step in which no row takes the layer skips it.
            out_BTD, metrics = jax.lax.cond(jnp.any(selected_BT), inner, lambda z: nothing, z_BTD)
            gate_BT = jnp.where(selected_BT, jax.nn.sigmoid(logit_BT), 0)
            out_BTD = out_BTD * gate_BT[:, :, None].astype(out_BTD.dtype)
        # The predictor learns the membership from z as it finds it: its gradient goes to the router alone.
        causal_logit_BT = jax.lax.stop_gradient(wide_BTD) @ router + bias
        target_BT = selected_BT.astype(wide_BTD.dtype)
        own = {
            "predictor_loss": jnp.mean(jax.nn.softplus(causal_logit_BT) - target_BT * causal_logit_BT),
            # Apart by row in evaluation, where a batch may be padded with rows that do not count.
            "causal_capacity": jnp.mean((logit_BT > 0).astype(jnp.float32), axis=None if training else 1),
            "agreement": jnp.mean(((logit_BT > 0) == selected_BT).astype(jnp.float32)),
        }
        return out_BTD, metrics, own
