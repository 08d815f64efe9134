"""Mixture-of-Experts feed-forward: each token goes to its top-k experts.

B rows, T positions, D model width, F feed-forward width, E experts, k choices a token, C slots of an expert in a row,
A alternatives to choose from: the experts, then those that do nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lumina.architecture import expert_capacity
from lumina.config import ModelConfig, MoEConfig
from lumina_jax.attention import at_least_float32
from lumina_jax.context import Row, ring_take
from lumina_jax.feedforward import ACTIVATIONS, FeedForward
from lumina_jax.gather import inverse_index
from lumina_jax.grouped import grouped_feedforward
from lumina_jax.sharding import ALONE, Axes


class RouterBias(nnx.Variable):
    """Loss-free balancing: added to the scores for choosing, never to the gates. State, not trained."""


def in_best_groups(moe: MoEConfig, preference_BTA):
    """`preference` with -inf outside of the `top_groups` groups whose two best experts add up highest (DeepSeek-V3, 2.1.2)."""
    if moe.num_groups == 1:
        return preference_BTA
    *rows, A = preference_BTA.shape
    grouped_BTGa = preference_BTA.reshape(*rows, moe.num_groups, A // moe.num_groups)
    best_two = jax.lax.top_k(grouped_BTGa, min(2, grouped_BTGa.shape[-1]))[0]
    _, groups_BTg = jax.lax.top_k(jnp.sum(best_two, axis=-1), moe.top_groups)
    chosen_BTG = jnp.any(groups_BTg[..., None] == jnp.arange(moe.num_groups), axis=-2)
    return jnp.where(chosen_BTG[..., None], grouped_BTGa, -jnp.inf).reshape(preference_BTA.shape)


def route(moe: MoEConfig, logits_BTA, bias_A):
    """Choose: returns (experts [B, T, k] int32, gates [B, T, k], scores [B, T, A]), floats in at least float32.

    Choice follows score + bias, ties to the lower expert; gates are the unbiased scores, renormalised over the chosen only
    when k > 1: at k = 1 that would make the gate constant and starve the router of gradient (Switch, section 2.1). Choices
    of E and above do no work.
    """
    logits_BTA = at_least_float32(logits_BTA) / moe.temperature
    scores_BTA = jax.nn.softmax(logits_BTA) if moe.score == "softmax" else jax.nn.sigmoid(logits_BTA)
    _, experts_BTk = jax.lax.top_k(in_best_groups(moe, scores_BTA + bias_A), moe.top_k)
    gates_BTk = jnp.take_along_axis(scores_BTA, experts_BTk, axis=-1)
    if moe.renormalise and moe.top_k > 1:
        gates_BTk = gates_BTk / (jnp.sum(gates_BTk, axis=-1, keepdims=True) + 1e-20)  # sigmoids may all be 0
    return experts_BTk, gates_BTk * moe.route_scale, scores_BTA


def margin(moe: MoEConfig, preference_BTA):
    """By what share of its own preference the last alternative chosen is ahead of the next one, or its group of the next."""

    def ahead(value_BTN, count: int):
        if count >= value_BTN.shape[-1]:
            return jnp.full(value_BTN.shape[:-1], jnp.inf, value_BTN.dtype)
        best_BTN, _ = jax.lax.top_k(value_BTN, count + 1)
        last_BT, next_BT = best_BTN[..., count - 1], best_BTN[..., count]
        return (last_BT - next_BT) / jnp.maximum(jnp.abs(last_BT), jnp.finfo(last_BT.dtype).tiny)

    within_BT = ahead(in_best_groups(moe, preference_BTA), moe.top_k)
    if moe.num_groups == 1:
        return within_BT
    grouped = preference_BTA.reshape(*preference_BTA.shape[:-1], moe.num_groups, -1)
    best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
    return jnp.minimum(within_BT, ahead(jnp.sum(best_two, axis=-1), moe.top_groups))


def assign_slots(experts_BTk, num_experts: int, capacity: int):
    """The slot, expert * C + place, of each choice [B, T, k], and -1 where the expert is full or there is none.

    Places go by position, then by rank of the choice. So whether a choice is dropped depends on the past alone, for
    every k; serving all first choices before all second ones would not be causal for k > 1.
    """
    B, T, k = experts_BTk.shape
    experts_BN = experts_BTk.reshape(B, T * k)
    chosen_BNE = jax.nn.one_hot(experts_BN, num_experts, dtype=jnp.int32)
    # Of an expert that does not exist no place is chosen, and the sum is zero.
    place_BN = jnp.sum(jnp.cumsum(chosen_BNE, axis=1) * chosen_BNE, axis=2) - 1
    served_BN = (place_BN >= 0) & (place_BN < capacity)
    return jnp.where(served_BN, experts_BN * capacity + place_BN, -1).reshape(B, T, k)


def experts_capacity(x_BtD, experts_BTk, gates_BTk, weights, activation: str, capacity: int, row: Row, axes: Axes = ALONE):
    """Every expert works on C slots of each row; choices beyond them are dropped. Returns ([B, t, D], kept [B, T, k]).

    x is a device's part of `row`; its choices are whole, and its slots are split over the devices as its tokens are. Where
    experts are split, each device's slots travel to those that have them, and back.
    """
    gate_EDF, up_EDF, down_EFD = (w.astype(x_BtD.dtype) for w in weights)
    (B, T, k), (_, t, D) = experts_BTk.shape, x_BtD.shape
    E, slots = gate_EDF.shape[0] * axes.expert, Row(capacity, row.n)
    c = slots.share
    with jax.named_scope("dispatch"):
        slot_BTk = assign_slots(experts_BTk, E, capacity)
        choice_BS = inverse_index(slot_BTk.reshape(B, T * k), E * capacity)  # slot -> choice
        choice_Bs = slots.own(choice_BS.reshape(B * E, capacity), -1).reshape(B, E * c)
        from_Bs = row.address(jnp.where(choice_Bs >= 0, choice_Bs // k, -1))
        to_Btk = _slot_address(row.own(slot_BTk, -1), slots, E)
        slots_BsD = ring_take(x_BtD, from_Bs, to_Btk, row.n)
    with jax.named_scope("experts"):
        # One matrix product an expert, over the slots of all rows: a third faster on CPU than with rows outermost.
        slots_END = slots_BsD.reshape(B, E, c, D).transpose(1, 0, 2, 3).reshape(E, B * c, D)
        slots_END = axes.swap(slots_END, "expert", split=0, join=1)
        hidden_ENF = ACTIVATIONS[activation](slots_END @ gate_EDF) * (slots_END @ up_EDF)
        out_END = axes.swap(hidden_ENF @ down_EFD, "expert", split=1, join=0)
        out_BsD = out_END.reshape(E, B, c, D).transpose(1, 0, 2, 3).reshape(B, E * c, D)
    with jax.named_scope("combine"):
        # A choice's place among those of its device's tokens.
        token_Bs = row.address(jnp.where(choice_Bs >= 0, choice_Bs // k, -1))
        choice_Bs = jnp.where(token_Bs >= 0, token_Bs * k + choice_Bs % k, -1)
        picked_BND = ring_take(out_BsD, to_Btk.reshape(B, t * k), choice_Bs[:, :, None], row.n)
        gates_Btk = row.own(gates_BTk, 0).astype(x_BtD.dtype)
        out_BtD = jnp.einsum("btkd,btk->btd", picked_BND.reshape(B, t, k, D), gates_Btk)
    return out_BtD, (slot_BTk >= 0) | (experts_BTk >= E)


def _slot_address(slot, slots: Row, num_experts: int):
    """Where a slot, expert * C + place, lies: each device has its share of the C places of every expert."""
    if slots.n == 1:
        return slot
    expert, place = jnp.divmod(slot, slots.tokens)
    device, share = jnp.divmod(slots.address(place), slots.share)
    return jnp.where(slot < 0, -1, (device * num_experts + expert) * slots.share + share)


def experts_dropless(x_BtD, experts_BTk, gates_BTk, weights, activation: str, form: str, row: Row, axes: Axes = ALONE):
    """No choice is dropped, and the work is that of the choices. Arguments and results as of `experts_capacity`.

    How many tokens choose an expert is not known ahead. So where experts are split, each device is given the tokens of all,
    does what its own experts have to do with them, and the results are summed.
    """
    experts_Btk, gates_Btk = row.own(experts_BTk, -1), row.own(gates_BTk, 0).astype(x_BtD.dtype)
    x_BtD, experts_Btk, gates_Btk = (axes.gather(a, ("expert",), 0) for a in (x_BtD, experts_Btk, gates_Btk))
    B, t, k = experts_Btk.shape
    first = axes.place("expert") * weights[0].shape[0]
    # Of a choice that takes no expert, as of another device's, what is left is out of range.
    own_Nk = jnp.where(experts_Btk >= 0, experts_Btk - first, -1).reshape(B * t, k)
    out_NkD = grouped_feedforward(x_BtD.reshape(B * t, -1), own_Nk, weights, activation, form)
    out_BtD = jnp.einsum("btkd,btk->btd", out_NkD.reshape(B, t, k, -1), gates_Btk)
    return axes.scatter(out_BtD, ("expert",), 0), jnp.ones_like(experts_BTk, bool)


def balance_loss(load_BA, share_BA):
    """A * sum_a load_a * probability_a, added up over tokens: their number when uniform (Switch, section 2.2).

    Args:
        load_BA: choices that went to each alternative, in whatever the balance is taken over: each row, or (equal rows) more.
        share_BA: sum over each row of the scores, each token's scaled to sum to one; what the gradient goes through.
    """
    load_BA = load_BA / jnp.maximum(jnp.sum(load_BA, axis=-1, keepdims=True), 1)  # a row may have no token
    return share_BA.shape[-1] * jnp.sum(load_BA * share_BA, axis=(-2, -1))


class MoE(nnx.Module):
    """Router, experts and optional shared experts, on [B, T, D]."""

    def __init__(self, model: ModelConfig, param: Callable[[str], nnx.Variable]):
        self.router = param("moe.router")
        self.bias = param("moe.bias")
        self.experts = FeedForward("moe.experts", model.activation, param)
        if model.moe.shared_experts:
            self.shared = FeedForward("moe.shared", model.activation, param)
        self.model = model

    def __call__(self, x_BTD, row: Row, taken_BT, training: bool, key_B=None, tell: bool = False, axes: Axes = ALONE):
        """Returns ([B, T, D], metrics). Only training drops, and only training jitters.

        x is a device's part of `row`, all of which each of its devices routes alike; `taken` is of whole rows, as metrics are.

        Tokens that `taken` leaves out choose nothing: they cost no work, have no slot and count nowhere. Their output means
        nothing.
        Metrics, all of them sums over the tokens taken: load_BA (choices, int32) and share_BA for the balance loss, z_loss,
        entropy (of the scores, 1 when uniform), and dropped (share of a token's choices); where asked to tell, experts_BTk and
        margin_BT (see `margin`), -1 and 0 for tokens left out.
        """
        moe, activation = self.model.moe, self.model.activation
        alternatives = moe.num_experts + moe.noop_experts
        with jax.named_scope("router"):
            z_BTD = at_least_float32(x_BTD)
            if training and moe.jitter and key_B is not None:

                def noise(key):
                    return jax.random.uniform(key, z_BTD.shape[1:], z_BTD.dtype, 1 - moe.jitter, 1 + moe.jitter)

                z_BTD = z_BTD * jax.vmap(noise)(key_B)
            taken_BT1 = taken_BT[:, :, None]
            # Zero for what is left out: nothing made of them need be kept from the sums for not being finite.
            logits_BTA = jnp.where(taken_BT1, row.whole(z_BTD @ self.router.astype(z_BTD.dtype)), 0)
            experts_BTk, gates_BTk, scores_BTA = route(moe, logits_BTA, self.bias.astype(z_BTD.dtype))
            told = {}
            if tell:
                margin_BT = margin(moe, scores_BTA + self.bias.astype(z_BTD.dtype))
                told = {"experts_BTk": jnp.where(taken_BT1, experts_BTk, -1), "margin_BT": jnp.where(taken_BT, margin_BT, 0)}
            experts_BTk = jnp.where(taken_BT1, experts_BTk, alternatives)
        weights = (self.experts.gate[...], self.experts.up[...], self.experts.down[...])
        if training and moe.dispatch == "capacity":
            slots = expert_capacity(self.model, row.tokens)
            out_BTD, kept_BTk = experts_capacity(x_BTD, experts_BTk, gates_BTk, weights, activation, slots, row, axes)
        else:
            form = moe.grouped_form
            out_BTD, kept_BTk = experts_dropless(x_BTD, experts_BTk, gates_BTk, weights, activation, form, row, axes)
        if moe.shared_experts:
            out_BTD = out_BTD + self.shared(x_BTD)
        share_BTA = scores_BTA / jnp.sum(scores_BTA, axis=-1, keepdims=True)  # sigmoid scores do not sum to one
        entropy_BT = -jnp.sum(share_BTA * jnp.log(jnp.maximum(share_BTA, 1e-30)), axis=-1)
        metrics = {
            "load_BA": jnp.sum(jax.nn.one_hot(experts_BTk, alternatives, dtype=jnp.int32), axis=(1, 2)),
            "share_BA": jnp.sum(share_BTA, axis=1, where=taken_BT1),
            "z_loss": jnp.sum(jax.nn.logsumexp(logits_BTA, axis=-1) ** 2, where=taken_BT),
            "entropy": jnp.sum(jax.lax.stop_gradient(entropy_BT), where=taken_BT) / max(math.log(alternatives), 1e-30),
            "dropped": jnp.sum(~kept_BTk, dtype=jnp.float32) / moe.top_k,
        }
        return out_BTD, metrics | told
