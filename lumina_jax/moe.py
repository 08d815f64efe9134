"""Mixture-of-Experts feed-forward: each token goes to its top-k experts.

B rows, T positions, D model width, F feed-forward width, E experts, k choices a token, C slots of an expert in a row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lumina.architecture import expert_capacity
from lumina.config import ModelConfig, MoEConfig
from lumina_jax.attention import at_least_float32
from lumina_jax.feedforward import ACTIVATIONS, FeedForward
from lumina_jax.gather import inverse_index, take_rows

BLOCK = 64  # tokens that `experts_dropless` multiplies with one expert at once


class RouterBias(nnx.Variable):
    """Loss-free balancing: added to the scores for choosing, never to the gates. State, not trained."""


def route(moe: MoEConfig, logits_BTE, bias_E):
    """Choose experts: returns (experts [B, T, k] int32, gates [B, T, k], scores [B, T, E]), floats in at least float32.

    Choice follows score + bias, ties to the lower expert; gates are the unbiased scores, renormalised over the chosen only
    when k > 1: at k = 1 that would make the gate constant and starve the router of gradient (Switch, section 2.1).
    """
    logits_BTE = at_least_float32(logits_BTE) / moe.temperature
    scores_BTE = jax.nn.softmax(logits_BTE) if moe.score == "softmax" else jax.nn.sigmoid(logits_BTE)
    _, experts_BTk = jax.lax.top_k(scores_BTE + bias_E, moe.top_k)
    gates_BTk = jnp.take_along_axis(scores_BTE, experts_BTk, axis=-1)
    if moe.top_k > 1:
        gates_BTk = gates_BTk / jnp.sum(gates_BTk, axis=-1, keepdims=True)
    return experts_BTk, gates_BTk * moe.route_scale, scores_BTE


def assign_slots(experts_BTk, num_experts: int, capacity: int):
    """The slot, expert * C + place, of each choice [B, T, k], and -1 where the expert is full.

    Places go by position, then by rank of the choice. So whether a choice is dropped depends on the past alone, for
    every k; serving all first choices before all second ones would not be causal for k > 1.
    """
    B, T, k = experts_BTk.shape
    experts_BN = experts_BTk.reshape(B, T * k)
    chosen_BNE = jax.nn.one_hot(experts_BN, num_experts, dtype=jnp.int32)
    before_BNE = jnp.cumsum(chosen_BNE, axis=1) - chosen_BNE
    place_BN = jnp.take_along_axis(before_BNE, experts_BN[:, :, None], axis=2)[:, :, 0]
    return jnp.where(place_BN < capacity, experts_BN * capacity + place_BN, -1).reshape(B, T, k)


def experts_capacity(x_BTD, experts_BTk, gates_BTk, weights, activation: str, capacity: int):
    """Every expert works on C slots of each row; choices beyond them are dropped. Returns ([B, T, D], kept [B, T, k])."""
    gate_EDF, up_EDF, down_EFD = (w.astype(x_BTD.dtype) for w in weights)
    B, T, k = experts_BTk.shape
    E, D, _ = gate_EDF.shape
    with jax.named_scope("dispatch"):
        slot_BTk = assign_slots(experts_BTk, E, capacity)
        choice_BS = inverse_index(slot_BTk.reshape(B, T * k), E * capacity)  # slot -> choice
        token_BS = jnp.where(choice_BS >= 0, choice_BS // k, -1)
        slots_BSD = take_rows(x_BTD, token_BS, slot_BTk)
    with jax.named_scope("experts"):
        # One matrix product an expert, over the slots of all rows: a third faster on CPU than with rows outermost.
        slots_END = slots_BSD.reshape(B, E, capacity, D).transpose(1, 0, 2, 3).reshape(E, B * capacity, D)
        hidden_ENF = ACTIVATIONS[activation](slots_END @ gate_EDF) * (slots_END @ up_EDF)
        out_END = hidden_ENF @ down_EFD
        out_BSD = out_END.reshape(E, B, capacity, D).transpose(1, 0, 2, 3).reshape(B, E * capacity, D)
    with jax.named_scope("combine"):
        picked_BND = take_rows(out_BSD, slot_BTk.reshape(B, T * k), choice_BS[:, :, None])
        out_BTD = jnp.einsum("btkd,btk->btd", picked_BND.reshape(B, T, k, D), gates_BTk.astype(x_BTD.dtype))
    return out_BTD, slot_BTk >= 0


def experts_dropless(x_BTD, experts_BTk, gates_BTk, weights, activation: str):
    """No choice is dropped, and the work is that of the choices: sort them by expert, pad each expert's group to whole
    blocks, and multiply block by block with the expert that owns it. For evaluation and generation."""
    gate_EDF, up_EDF, down_EFD = (w.astype(x_BTD.dtype) for w in weights)
    B, T, k = experts_BTk.shape
    E, D, _ = gate_EDF.shape
    N = B * T * k
    block = min(BLOCK, N)
    experts_N = experts_BTk.reshape(N)
    order_N = jnp.argsort(experts_N, stable=True)  # sorted place -> choice
    counts_E = jnp.bincount(experts_N, length=E)
    blocks_E = -(-counts_E // block)
    first_block_E = jnp.cumsum(blocks_E) - blocks_E
    first_place_E = jnp.cumsum(counts_E) - counts_E
    num_blocks = N // block + min(E, N)  # as many as any counts can need
    block_expert_M = jnp.searchsorted(jnp.cumsum(blocks_E), jnp.arange(num_blocks), side="right")
    x_ND = x_BTD.reshape(B * T, D)

    def multiply(m):
        e = jnp.minimum(block_expert_M[m], E - 1)
        places = first_place_E[e] + (m - first_block_E[e]) * block + jnp.arange(block)
        rows = x_ND[order_N[jnp.minimum(places, N - 1)] // k]  # places beyond the expert's group: computed, never picked
        return (ACTIVATIONS[activation](rows @ gate_EDF[e]) * (rows @ up_EDF[e])) @ down_EFD[e]

    def work_or_skip(m):
        return jax.lax.cond(block_expert_M[m] < E, multiply, lambda m: jnp.zeros((block, D), x_BTD.dtype), m)

    out_MD = jax.lax.map(work_or_skip, jnp.arange(num_blocks)).reshape(num_blocks * block, D)
    place_N = jnp.zeros(N, jnp.int32).at[order_N].set(jnp.arange(N, dtype=jnp.int32))
    within_N = place_N - first_place_E[experts_N]  # number of the choice among its expert's
    picked_BTkD = out_MD[first_block_E[experts_N] * block + within_N].reshape(B, T, k, D)
    return jnp.einsum("btkd,btk->btd", picked_BTkD, gates_BTk.astype(x_BTD.dtype))


def balance_loss(scores_BTE, experts_BTk):
    """E * sum_e (count_e / (T k)) * mean_t p_te, averaged over rows: 1 when uniform (Switch, section 2.2).

    Taken row by row it is a mean over rows, so neither micro-batches nor the mesh change it.
    """
    E = scores_BTE.shape[-1]
    load_BE = jnp.mean(jax.nn.one_hot(experts_BTk, E, dtype=scores_BTE.dtype), axis=(1, 2))
    share_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)  # sigmoid scores do not sum to one
    return E * jnp.mean(jnp.sum(load_BE * jnp.mean(share_BTE, axis=1), axis=-1))


class MoE(nnx.Module):
    """Router, experts and optional shared experts, on [B, T, D]."""

    def __init__(self, model: ModelConfig, param: Callable[[str], nnx.Variable]):
        self.router = param("moe.router")
        self.bias = param("moe.bias")
        self.experts = FeedForward("moe.experts", model.activation, param)
        if model.moe.shared_experts:
            self.shared = FeedForward("moe.shared", model.activation, param)
        self.model = model

    def __call__(self, x_BTD, training: bool, key_B=None):
        """Returns ([B, T, D], metrics). Only training drops, and only training jitters."""
        moe = self.model.moe
        with jax.named_scope("router"):
            z_BTD = at_least_float32(x_BTD)
            if training and moe.jitter and key_B is not None:

                def noise(key):
                    return jax.random.uniform(key, z_BTD.shape[1:], z_BTD.dtype, 1 - moe.jitter, 1 + moe.jitter)

                z_BTD = z_BTD * jax.vmap(noise)(key_B)
            logits_BTE = z_BTD @ self.router.astype(z_BTD.dtype)
            experts_BTk, gates_BTk, scores_BTE = route(moe, logits_BTE, self.bias.astype(z_BTD.dtype))
        weights = (self.experts.gate, self.experts.up, self.experts.down)
        if training:
            slots = expert_capacity(self.model, x_BTD.shape[1])
            out_BTD, kept_BTk = experts_capacity(x_BTD, experts_BTk, gates_BTk, weights, self.model.activation, slots)
        else:
            out_BTD = experts_dropless(x_BTD, experts_BTk, gates_BTk, weights, self.model.activation)
            kept_BTk = jnp.ones_like(experts_BTk, bool)
        if moe.shared_experts:
            out_BTD = out_BTD + self.shared(x_BTD)
        metrics = {
            "balance_loss": balance_loss(scores_BTE, experts_BTk),
            "z_loss": jnp.mean(jax.nn.logsumexp(logits_BTE, axis=-1) ** 2),
            "load_E": jnp.bincount(experts_BTk.reshape(-1), length=moe.num_experts).astype(jnp.int32),
            "dropped": jnp.mean(1.0 - kept_BTk.astype(jnp.float32)),
        }
        return out_BTD, metrics
