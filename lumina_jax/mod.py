"""Mixture-of-Depths: some tokens of each row take a layer, or its feed-forward, the rest pass by (Raposo et al., 2024).

B rows, T positions, C selected positions, D model width.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lumina.architecture import capacity
from lumina.config import ModelConfig
from lumina_jax.attention import at_least_float32
from lumina_jax.context import Row, ring_take
from lumina_jax.digest import mix
from lumina_jax.gather import inverse_index
from lumina_jax.sharding import ALONE, Axes


def select_top(wish_BT, count: int):
    """Positions [B, C] of the `count` highest of each row, in temporal order; ties choose the earlier position.

    Where the wish is -inf nothing is selected: a row that has fewer others has -1 after them.
    """
    T = wish_BT.shape[1]
    wish_BC, index_BC = jax.lax.top_k(wish_BT, count)
    index_BC = jnp.sort(jnp.where(wish_BC == -jnp.inf, T, index_BC), axis=1)
    return jnp.where(index_BC < T, index_BC, -1).astype(jnp.int32)


class Selection(NamedTuple):
    """Which tokens of each row take the layer, and how much of its output they add. Of whole rows, on each of its devices."""

    row: Row
    taken_BT: jax.Array  # bool
    gate_BT: jax.Array  # in at least float32
    # Positions of a fixed number of tokens, in temporal order, -1 after them where a row has fewer; None: any number
    index_BC: jax.Array | None = None
    slot_BT: jax.Array | None = None  # the inverse: place of a token among the selected, -1 when it is not

    def run(self, inner: Callable[..., tuple[Any, Any, Any]], x_BTD, *others, cache: Any = None, axes: Axes = ALONE):
        """(gate * f(x) at the tokens that take the layer and zero elsewhere [B, T, D], metrics, cache).

        `inner(row, x [B, N, D], *others [B, N], taken)` returns (f(x), metrics, cache); x is a device's part of `row`, the
        others are whole. When a fixed number is selected it is given a row of those alone: what is skipped is not computed.
        Otherwise it is given all, or not called at all when no row has any; then `cache` stays as it is. Of either, taken
        [B, N] has those that count.
        """
        row = self.row
        if self.index_BC is None or self.slot_BT is None:
            given = (x_BTD, *others, self.taken_BT)
            of_row = functools.partial(inner, row)
            out, metrics, _ = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_row, *given))
            any_taken = axes.sum(jnp.any(self.taken_BT).astype(jnp.int32)) > 0  # devices meet within, so all go or none
            out_BTD, metrics, cache = jax.lax.cond(
                any_taken, lambda given: of_row(*given), lambda given: (out, metrics, cache), given
            )
            gated_BTD = out_BTD * row.own(self.gate_BT, 0)[:, :, None].astype(out_BTD.dtype)
            return jnp.where(row.own(self.taken_BT, False)[:, :, None], gated_BTD, 0), self._of_row(metrics), cache
        selected_row = Row(self.index_BC.shape[1], row.n)
        # Where the selected tokens of this device come from, and where its tokens of the row go to.
        from_BC = row.address(selected_row.own(self.index_BC, -1))
        to_BT = selected_row.address(row.own(self.slot_BT, -1))
        with jax.named_scope("select"):
            x_BCD = ring_take(x_BTD, from_BC, to_BT[:, :, None], row.n)
            place_BC = jnp.maximum(self.index_BC, 0)
            selected = [jnp.take_along_axis(other_BT, place_BC, axis=1) for other_BT in others]
        out_BCD, metrics, cache = inner(selected_row, x_BCD, *selected, self.index_BC >= 0)
        with jax.named_scope("scatter"):
            gate_BC = selected_row.own(jnp.take_along_axis(self.gate_BT, place_BC, axis=1), 0)
            out_BTD = ring_take(out_BCD * gate_BC[:, :, None].astype(out_BCD.dtype), to_BT, from_BC[:, :, None], row.n)
        return out_BTD, self._of_row(metrics), cache

    def _of_row(self, metrics: Any) -> Any:
        """What the tokens that take the layer tell, in the row's places: experts_BTk is -1 and margin_BT 0 for the others."""
        if "experts_BTk" not in metrics:
            return metrics
        experts_BTk, margin_BT = metrics["experts_BTk"], metrics["margin_BT"]
        if self.slot_BT is not None:
            place_BT = jnp.maximum(self.slot_BT, 0)
            experts_BTk = jnp.take_along_axis(experts_BTk, place_BT[:, :, None], axis=1)
            margin_BT = jnp.take_along_axis(margin_BT, place_BT, axis=1)
        experts_BTk = jnp.where(self.taken_BT[:, :, None], experts_BTk, -1)
        return metrics | {"experts_BTk": experts_BTk, "margin_BT": jnp.where(self.taken_BT, margin_BT, 0)}


class Predictor(nnx.Module):
    """A small feed-forward that says from a token alone whether it would be selected."""

    def __init__(self, param: Callable[[str], nnx.Variable]):
        self.hidden, self.output, self.bias = (param(f"mod.predictor.{name}") for name in ("hidden", "output", "bias"))

    def __call__(self, z_BTD):
        """A logit a token [B, T]."""
        hidden, output, bias = (w.astype(z_BTD.dtype) for w in (self.hidden, self.output, self.bias))
        return jax.nn.silu(z_BTD @ hidden) @ output + bias


class MoD(nnx.Module):
    """Router of one layer: gate g = sigmoid(w . z + b) of the normalised input z."""

    def __init__(self, model: ModelConfig, param: Callable[[str], nnx.Variable]):
        self.router = param("mod.router")
        self.bias = param("mod.bias")
        if model.mod.predictor_width:
            self.predictor = Predictor(param)
        self.mod = model.mod

    def __call__(self, z_BTD, real_BT, positions_BT, layer, top: bool, row: Row) -> tuple[Selection, dict[str, jax.Array]]:
        """Select tokens: with `top` the highest C = ceil(c T) of each row, which sees the future, as in training; without it
        each token decides for itself, as evaluation and generation do and as the predictor loss teaches.

        z is a device's part of `row`; what is selected, and the metrics, are of whole rows. Of positions that are not `real`
        none is ever taken.

        Metrics: predictor_loss (the sum over real positions), logit_BT (above zero, the causal decision is to take the layer)
        and taken_BT. `layer` and `positions` are what random routing (`mod.router`) draws by.
        """
        wide_BTD = at_least_float32(z_BTD)
        router, bias = self.router.astype(wide_BTD.dtype), self.bias.astype(wide_BTD.dtype)
        logit_BT = row.whole(wide_BTD @ router + bias)
        if self.mod.router == "random":
            wish_BT = causal_BT = self.mod.capacity - uniform(positions_BT, layer)
        else:
            wish_BT = logit_BT
            # What decides learns the membership from z as it finds it: that gradient goes to the router alone.
            still_BTD = jax.lax.stop_gradient(wide_BTD)
            causal_BT = row.whole(self.predictor(still_BTD) if self.mod.predictor_width else still_BTD @ router + bias)
        gate_BT = jax.nn.sigmoid(logit_BT)
        if top:
            wish_BT = jnp.where(real_BT, jax.lax.stop_gradient(wish_BT), -jnp.inf)
            index_BC = select_top(wish_BT, capacity(row.tokens, self.mod.capacity))
            slot_BT = inverse_index(index_BC, row.tokens)
            selection = Selection(row, slot_BT >= 0, gate_BT, index_BC, slot_BT)
        else:
            selection = Selection(row, (causal_BT > 0) & real_BT, gate_BT)
        target_BT = selection.taken_BT.astype(wide_BTD.dtype)
        learned = 0.0 if self.mod.router == "random" else 1.0
        metrics = {
            "predictor_loss": learned * jnp.sum(jax.nn.softplus(causal_BT) - target_BT * causal_BT, where=real_BT),
            "logit_BT": jax.lax.stop_gradient(causal_BT),
            "taken_BT": selection.taken_BT,
        }
        return selection, metrics


def uniform(positions_BT, layer):
    """A number from 0 to 1 for each token, by its layer and position alone: the same in training, generation and PyTorch."""
    words = positions_BT.astype(jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.asarray(layer + 1, jnp.uint32) * jnp.uint32(
        0x85EBCA6B
    )
    return (mix(words) >> 8).astype(jnp.float32) / 2**24
