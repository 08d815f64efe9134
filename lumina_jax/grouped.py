"""Grouped gated feed-forward: each choice of a token through the expert it names, with the work of the choices alone.

N tokens, k choices a token, S = N k choices in all, E experts, D model width, F feed-forward width, b rows of a block.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lumina.errors import ConfigError
from lumina_jax.attention import at_least_float32
from lumina_jax.feedforward import ACTIVATIONS
from lumina_jax.gather import take_rows
from lumina_jax.platform import target_platform

_read, _write = jax.lax.dynamic_slice_in_dim, jax.lax.dynamic_update_slice_in_dim


class Order(NamedTuple):
    """The choices sorted by expert, those that take none at the end. All int32."""

    choice_S: jax.Array  # sorted place -> choice
    place_S: jax.Array  # choice -> sorted place, -1 where it takes no expert
    counts_E: jax.Array  # choices of each expert
    first_E: jax.Array  # the first place of each expert


def sort_choices(experts_Nk, num_experts: int) -> Order:
    """Sort by expert, stably: an expert sees its tokens in their order. Only integers are scattered."""
    expert_S = experts_Nk.reshape(-1).astype(jnp.int32)
    expert_S = jnp.where((expert_S >= 0) & (expert_S < num_experts), expert_S, num_experts)
    choice_S = jnp.argsort(expert_S, stable=True).astype(jnp.int32)
    place_S = jnp.zeros_like(choice_S).at[choice_S].set(jnp.arange(choice_S.size, dtype=jnp.int32), unique_indices=True)
    counts_E = jnp.bincount(expert_S, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    first_E = jnp.cumsum(counts_E, dtype=jnp.int32) - counts_E
    return Order(choice_S, jnp.where(expert_S < num_experts, place_S, -1), counts_E, first_E)


def _rows(x, index, wanted):
    """x[index] where wanted, else zero, whatever x has there. Indices come from `sort_choices`, so they are in bounds."""
    return jnp.where(wanted[:, None], x.at[index].get(mode="promise_in_bounds"), 0)


# ------------------------------------------------------------------------------------------------------------- blocks


def block_sizes(platform: str, choices: int, num_experts: int) -> tuple[int, ...]:
    """Rows of a block, largest first: an expert's choices go in blocks of the first size, what is left in blocks of the last.

    CPU: measured, 256 and 64 are the fastest pair or near it at 256 to 512 choices an expert: large blocks spread the cost
    of adding up weight gradients over more rows, and small ones leave fewer rows of the last block empty. GPU: larger, as a
    loop whose number of trips is data asks the host before each; not measured.
    """
    large, small = (1024, 256) if platform == "gpu" else (256, 64)
    if choices < num_experts * small // 2:  # few for each: most blocks would be nearly empty
        small //= 4
    return (large, small) if choices >= large else (max(1, min(small, choices)),)


def _over_blocks(sizes: tuple[int, ...], first, count, body: Callable, carry):
    """carry = body(b, place, rows left from there, carry) over the blocks of one expert, in order."""
    done = jnp.int32(0)
    for b in sizes:
        left = jnp.maximum(count - done, 0)
        # A block that is three quarters full is cheaper than the small ones that would hold its rows.
        trips = -(-left // b) if b == sizes[-1] else (left + b // 4) // b

        def block(i, carry, b=b, done=done):
            return body(b, first + done + i * b, count - done - i * b, carry)

        carry = jax.lax.fori_loop(0, trips, block, carry)
        done = done + trips * b
    return carry


def _over_experts(counts_E, body: Callable, carry):
    """carry = body(e, carry) over the experts that were chosen, in order: of the others not even weights are read."""
    chosen_E = jnp.argsort(counts_E == 0, stable=True)
    return jax.lax.fori_loop(0, jnp.sum(counts_E > 0), lambda i, carry: body(chosen_E[i], carry), carry)


def _of_expert(weights, e, dtype):
    """Expert e's (gate beside up [D, 2F], down [F, D]): one product for two, and to slice is to copy in any case."""
    gate_DF, up_DF, down_FD = (jax.lax.dynamic_index_in_dim(w, e, keepdims=False).astype(dtype) for w in weights)
    return jnp.concatenate([gate_DF, up_DF], axis=1), down_FD


def _gated(activation: str, both_b2F):
    gate_bF, up_bF = jnp.split(both_b2F, 2, axis=1)
    return ACTIVATIONS[activation](gate_bF) * up_bF


def _blocks_forward(x_ND, experts_Nk, weights, activation: str, sizes: tuple[int, ...], keep: bool):
    """Returns (out [N, k, D], order, pre-activations in sorted order, gate beside up [S + b, 2F], if they are to be kept).

    Rows are in sorted order and experts follow each other without a gap: the rows by which an expert's last block is too
    long are overwritten by the next expert, and nobody reads those after the last.
    """
    (N, D), (E, _, F), k = x_ND.shape, weights[0].shape, experts_Nk.shape[1]
    order = sort_choices(experts_Nk, E)
    choice_M = jnp.pad(order.choice_S, (0, sizes[0]))

    def expert(e, carry):
        both_D2F, down_FD = _of_expert(weights, e, x_ND.dtype)

        def block(b, place, left, carry):
            out_MD, *kept = carry
            choice_b = _read(choice_M, place, b)
            both_b2F = x_ND.at[choice_b // k].get(mode="promise_in_bounds") @ both_D2F
            out_MD = _write(out_MD, _gated(activation, both_b2F) @ down_FD, place, 0)
            return out_MD, *(_write(both_M2F, both_b2F, place, 0) for both_M2F in kept)

        return _over_blocks(sizes, order.first_E[e], order.counts_E[e], block, carry)

    widths = (D, 2 * F) if keep else (D,)
    carry = tuple(jnp.zeros((choice_M.size, width), x_ND.dtype) for width in widths)
    out_MD, *kept = _over_experts(order.counts_E, expert, carry)
    out_SD = _rows(out_MD, jnp.maximum(order.place_S, 0), order.place_S >= 0)
    return out_SD.reshape(N, k, D), order, kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _blocks(x_ND, experts_Nk, weights, activation, sizes):
    return _blocks_forward(x_ND, experts_Nk, weights, activation, sizes, keep=False)[0]


def _blocks_keeping(x_ND, experts_Nk, weights, activation, sizes):
    out_NkD, order, (both_M2F,) = _blocks_forward(x_ND, experts_Nk, weights, activation, sizes, keep=True)
    return out_NkD, (x_ND, weights, order, both_M2F)


def _blocks_backward(activation, sizes, kept, dout_NkD):
    """The same loops: weight gradients are carried through an expert's blocks, in at least float32, and written once."""
    x_ND, weights, order, both_M2F = kept
    (N, k, D), F, dtype = dout_NkD.shape, weights[0].shape[2], x_ND.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    choice_M = jnp.pad(order.choice_S, (0, sizes[0]))
    dout_SD = dout_NkD.reshape(N * k, D)

    def expert(e, carry):
        both_D2F, down_FD = _of_expert(weights, e, dtype)

        def block(b, place, left, carry):
            dx_MD, dboth_D2F, ddown_FD = carry
            own_b = jnp.arange(b) < left  # the rows after these belong to others, and may not be finite
            choice_b = _read(choice_M, place, b)
            x_bD, dout_bD = _rows(x_ND, choice_b // k, own_b), _rows(dout_SD, choice_b, own_b)
            both_b2F = jnp.where(own_b[:, None], _read(both_M2F, place, b), 0)
            hidden_bF, back = jax.vjp(functools.partial(_gated, activation), both_b2F)
            (dinner_b2F,) = back(dout_bD @ down_FD.T)
            ddown_FD = ddown_FD + jnp.matmul(hidden_bF.T, dout_bD, preferred_element_type=wide)
            dboth_D2F = dboth_D2F + jnp.matmul(x_bD.T, dinner_b2F, preferred_element_type=wide)
            return _write(dx_MD, dinner_b2F @ both_D2F.T, place, 0), dboth_D2F, ddown_FD

        dx_MD, *dweights = carry
        zeros = jnp.zeros((D, 2 * F), wide), jnp.zeros((F, D), wide)
        counted = order.first_E[e], order.counts_E[e]
        dx_MD, dboth_D2F, ddown_FD = _over_blocks(sizes, *counted, block, (dx_MD, *zeros))
        parts = (*jnp.split(dboth_D2F, 2, axis=1), ddown_FD)
        return dx_MD, *(_write(dw, part[None].astype(dw.dtype), e, 0) for dw, part in zip(dweights, parts, strict=True))

    carry = (jnp.zeros((choice_M.size, D), dtype), *(jnp.zeros_like(w) for w in weights))
    dx_MD, *dweights = _over_experts(order.counts_E, expert, carry)
    dx_SD = at_least_float32(_rows(dx_MD, jnp.maximum(order.place_S, 0), order.place_S >= 0))
    return dx_SD.reshape(N, k, D).sum(axis=1).astype(dtype), None, tuple(dweights)


_blocks.defvjp(_blocks_keeping, _blocks_backward)


def blocks(x_ND, experts_Nk, weights, activation: str, sizes: tuple[int, ...] | None = None):
    """Block by block, each one dense product with the weights of the expert that owns it, in loops as long as needed.

    Weights are cast an expert at a time, and their gradients are summed in at least float32 before they are cast back.
    """
    sizes = sizes or block_sizes(target_platform(), experts_Nk.size, weights[0].shape[0])
    return _blocks(x_ND, experts_Nk, tuple(weights), activation, sizes)


# ------------------------------------------------------------------------------------------------------------- ragged


def ragged(x_ND, experts_Nk, weights, activation: str):
    """`jax.lax.ragged_dot` of the sorted rows, for compilers that turn it into a grouped product.

    libtpu 0.0.51 does: compiled for v5e, forward and backward count 1.004 times the FLOPs of the choices, with 8 experts and
    with 64. It takes any shape, where Pallas' megablox wants rows in whole tiles and tile sizes chosen for each shape.
    """
    gate_EDF, up_EDF, down_EFD = (w.astype(x_ND.dtype) for w in weights)
    (N, D), k = x_ND.shape, experts_Nk.shape[1]
    order = sort_choices(experts_Nk, gate_EDF.shape[0])
    # Rows of no expert are zero: what a device's ragged_dot does with rows of no group need not matter then.
    token_S = jnp.where(jnp.arange(N * k) < jnp.sum(order.counts_E), order.choice_S // k, -1)
    rows_SD = take_rows(x_ND[None], token_S[None], order.place_S.reshape(1, N, k))[0]
    gate_SF, up_SF = (jax.lax.ragged_dot(rows_SD, w, order.counts_E) for w in (gate_EDF, up_EDF))
    out_SD = jax.lax.ragged_dot(ACTIVATIONS[activation](gate_SF) * up_SF, down_EFD, order.counts_E)
    return take_rows(out_SD[None], order.place_S[None], order.choice_S[None, :, None])[0].reshape(N, k, D)


# -------------------------------------------------------------------------------------------------------------- forms


class Form(NamedTuple):
    """One way to compute `grouped_feedforward`, where it may run, and why there."""

    run: Callable
    platforms: tuple[str, ...]  # as `jax.default_backend` names them; none: any
    reason: str


# In order of preference.
FORMS = {
    "ragged": Form(ragged, ("tpu",), "ragged_dot is a grouped matrix product on TPU, and E times the work elsewhere"),
    "blocks": Form(blocks, (), "dense products of blocks of rows do the work of the choices alone on any device"),
}


def choose_grouped(form: str, platform: str) -> tuple[str, str]:
    """(name of the form, why) for the form asked for, or the best one if "auto". Raises ConfigError if it cannot run."""
    if form != "auto" and form not in FORMS:
        raise ConfigError(f"model.moe.grouped_form = {form!r}: must be one of auto, {', '.join(sorted(FORMS))}")
    for name, candidate in FORMS.items():
        if form in ("auto", name) and (not candidate.platforms or platform in candidate.platforms):
            return name, candidate.reason
    wanted = FORMS[form]
    raise ConfigError(
        f"model.moe.grouped_form = {form!r}: runs on {', '.join(wanted.platforms)}, not {platform} ({wanted.reason}); use auto"
    )


def grouped_feedforward(x_ND, experts_Nk, weights, activation: str, form: str = "auto"):
    """out [N, k, D]: choice j of token n through expert experts[n, j]; a choice of E or more, or below 0, takes no expert:
    zero, and no work.

    `weights` are (gate [E, D, F], up [E, D, F], down [E, F, D]), cast to x's dtype. Differentiable in x and weights, and
    deterministic. Not for `jax.vmap`: fold members into N, as
    `blocks` would let each wait for the longest, and `ragged` is refused by JAX.
    A form other than "auto" is run as asked; `choose_grouped` says whether that is wise on a platform.
    """
    if form == "auto":
        form, _ = choose_grouped(form, target_platform())
    with jax.named_scope(f"grouped_{form}"):
        return FORMS[form].run(x_ND, experts_Nk, weights, activation)
