"""Mixture-of-Experts: router, the two dispatches, and the losses that keep the router even.

B rows, T positions, D model width, F feed-forward width, E experts, k choices a token, N = T k choices a row, C slots of an
expert in a row, S = E C slots, A alternatives to choose from: the experts, then those that do nothing.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.architecture import expert_capacity
from lumina.config import ModelConfig, MoEConfig
from lumina_torch.attention import at_least_float32
from lumina_torch.draw import Draw
from lumina_torch.feedforward import ACTIVATIONS, FeedForward
from lumina_torch.gather import inverse_index, take_rows
from lumina_torch.grouped import grouped_feedforward


def top(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the highest along the last axis, ties to the lower index, which `torch.topk` does not promise."""
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :count], indices[..., :count]


def in_best_groups(moe: MoEConfig, preference_BTA: Tensor) -> Tensor:
    """`preference` with -inf outside of the `top_groups` groups whose two best experts add up highest (DeepSeek-V3, 2.1.2)."""
    if moe.num_groups == 1:
        return preference_BTA
    grouped_BTGa = preference_BTA.unflatten(-1, (moe.num_groups, -1))
    best_two = top(grouped_BTGa, min(2, grouped_BTGa.shape[-1]))[0]
    _, groups_BTg = top(best_two.sum(dim=-1), moe.top_groups)
    chosen_BTG = torch.zeros(grouped_BTGa.shape[:-1], dtype=torch.bool, device=groups_BTg.device).scatter_(-1, groups_BTg, True)
    return grouped_BTGa.masked_fill(~chosen_BTG[..., None], -torch.inf).flatten(-2)


def route(moe: MoEConfig, logits_BTA: Tensor, bias_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose: returns (experts [B, T, k], gates [B, T, k], scores [B, T, A]), floats in at least float32.

    Choice follows score + bias, ties to the lower expert; gates are the unbiased scores, renormalised over the chosen only
    when k > 1: at k = 1 that would make the gate constant and starve the router of gradient (Switch, section 2.1). Choices
    of E and above do no work.
    """
    logits_BTA = at_least_float32(logits_BTA) / moe.temperature
    scores_BTA = logits_BTA.softmax(dim=-1) if moe.score == "softmax" else logits_BTA.sigmoid()
    _, experts_BTk = top(in_best_groups(moe, (scores_BTA + bias_A).detach()), moe.top_k)
    gates_BTk = scores_BTA.gather(-1, experts_BTk)
    if moe.renormalise and moe.top_k > 1:
        gates_BTk = gates_BTk / (gates_BTk.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    return experts_BTk, gates_BTk * moe.route_scale, scores_BTA


def margin(moe: MoEConfig, preference_BTA: Tensor) -> Tensor:
    """By what share of its own preference the last alternative chosen is ahead of the next one, or its group of the next."""

    def ahead(value_BTN: Tensor, count: int) -> Tensor:
        if count >= value_BTN.shape[-1]:
            return torch.full_like(value_BTN[..., 0], torch.inf)
        best_BTN, _ = top(value_BTN, count + 1)
        last_BT, next_BT = best_BTN[..., count - 1], best_BTN[..., count]
        return (last_BT - next_BT) / last_BT.abs().clamp(min=torch.finfo(last_BT.dtype).tiny)

    within_BT = ahead(in_best_groups(moe, preference_BTA), moe.top_k)
    if moe.num_groups == 1:
        return within_BT
    best_two = top(preference_BTA.unflatten(-1, (moe.num_groups, -1)), 2)[0]
    return torch.minimum(within_BT, ahead(best_two.sum(dim=-1), moe.top_groups))


def assign_slots(experts_BTk: Tensor, num_experts: int, capacity: int) -> Tensor:
    """The slot, expert * C + place, of each choice [B, T, k], and -1 where the expert is full or there is none.

    Places go by position, then by rank of the choice. So whether a choice is dropped depends on the past alone, for
    every k; serving all first choices before all second ones would not be causal for k > 1.
    """
    experts_BN = experts_BTk.flatten(1)
    chosen_BNE = experts_BN[:, :, None] == torch.arange(num_experts, device=experts_BN.device)
    # Of an expert that does not exist no place is chosen, and the sum is zero.
    place_BN = (chosen_BNE.cumsum(dim=1) * chosen_BNE).sum(dim=2) - 1
    served_BN = (place_BN >= 0) & (place_BN < capacity)
    return torch.where(served_BN, experts_BN * capacity + place_BN, -1).reshape(experts_BTk.shape)


def experts_capacity(
    x_BTD: Tensor, experts_BTk: Tensor, gates_BTk: Tensor, weights: tuple[Tensor, ...], activation: str, capacity: int
) -> tuple[Tensor, Tensor]:
    """Every expert works on C slots of each row; choices beyond them are dropped. Returns ([B, T, D], kept [B, T, k])."""
    gate_EDF, up_EDF, down_EFD = (w.to(x_BTD.dtype) for w in weights)
    B, T, k = experts_BTk.shape
    E, D, _ = gate_EDF.shape
    slot_BTk = assign_slots(experts_BTk, E, capacity)
    choice_BS = inverse_index(slot_BTk.reshape(B, T * k), E * capacity)  # slot -> choice
    token_BS = torch.where(choice_BS >= 0, choice_BS // k, -1)
    slots_BSD = take_rows(x_BTD, token_BS, slot_BTk)
    # One matrix product an expert, over the slots of all rows.
    slots_END = slots_BSD.reshape(B, E, capacity, D).transpose(0, 1).reshape(E, B * capacity, D)
    out_END = (ACTIVATIONS[activation](slots_END @ gate_EDF) * (slots_END @ up_EDF)) @ down_EFD
    out_BSD = out_END.reshape(E, B, capacity, D).transpose(0, 1).reshape(B, E * capacity, D)
    picked_BND = take_rows(out_BSD, slot_BTk.reshape(B, T * k), choice_BS[:, :, None])
    return combine(picked_BND.reshape(B, T, k, D), gates_BTk), (slot_BTk >= 0) | (experts_BTk >= E)


def experts_dropless(
    x_BTD: Tensor, experts_BTk: Tensor, gates_BTk: Tensor, weights: tuple[Tensor, ...], activation: str, form: str
) -> tuple[Tensor, Tensor]:
    """No choice is dropped, and the work is that of the choices. Returns ([B, T, D], kept [B, T, k]), as the other does."""
    B, T, k = experts_BTk.shape
    out_NkD = grouped_feedforward(x_BTD.flatten(0, 1), experts_BTk.flatten(0, 1), weights, activation, form)
    return combine(out_NkD.reshape(B, T, k, -1), gates_BTk), torch.ones_like(experts_BTk, dtype=torch.bool)


def combine(out_BTkD: Tensor, gates_BTk: Tensor) -> Tensor:
    """What each token gets of the experts it chose, by their gates [B, T, D]."""
    gates_BTk = gates_BTk.to(out_BTkD.dtype)
    if gates_BTk.shape[2] == 1:
        return out_BTkD[:, :, 0] * gates_BTk
    return (out_BTkD * gates_BTk[..., None]).sum(dim=2)


def balance_loss(load_BA: Tensor, share_BA: Tensor) -> Tensor:
    """A * sum_a load_a * probability_a, added up over tokens: their number when uniform (Switch, section 2.2).

    Args:
        load_BA: choices that went to each alternative, in whatever the balance is taken over: each row, or (equal rows) more.
        share_BA: sum over each row of the scores, each token's scaled to sum to one; what the gradient goes through.
    """
    load_BA = load_BA / load_BA.sum(dim=-1, keepdim=True).clamp(min=1)  # a row may have no token
    return share_BA.shape[-1] * (load_BA * share_BA).sum(dim=(-2, -1))


class MoE(nn.Module):
    """Router, experts and optional shared experts, on [B, T, D]."""

    bias: Tensor  # loss-free balancing: added to the scores for choosing, never to the gates; state, not trained

    def __init__(self, model: ModelConfig, param: Callable[[str], Tensor]):
        super().__init__()
        self.router = param("moe.router")
        self.register_buffer("bias", param("moe.bias"))
        self.experts = FeedForward("moe.experts", model.activation, param)
        if model.moe.shared_experts:
            self.shared = FeedForward("moe.shared", model.activation, param)
        self.model = model

    def forward(
        self, x_BTD: Tensor, taken_BT: Tensor, training: bool, draw: Draw | None = None, tell: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns ([B, T, D], metrics). Only training drops, and only training jitters.

        Tokens that `taken` leaves out choose nothing: they cost no work, have no slot and count nowhere. Their output means
        nothing.
        Metrics, all of them sums over the tokens taken: load_BA (choices) and share_BA for the balance loss, z_loss, entropy
        (of the scores, 1 when uniform) and dropped (share of a token's choices); where asked to tell, experts_BTk and
        margin_BT (see `margin`), -1 and 0 for tokens left out.
        """
        moe, activation = self.model.moe, self.model.activation
        alternatives = moe.num_experts + moe.noop_experts
        z_BTD = at_least_float32(x_BTD)
        if training and moe.jitter and draw is not None:
            z_BTD = z_BTD * (1 - moe.jitter + 2 * moe.jitter * draw.uniform("jitter", z_BTD))
        left_BT1 = ~taken_BT[:, :, None]
        # Zero for what is left out: nothing made of them need be kept from the sums for not being finite.
        logits_BTA = (z_BTD @ self.router.to(z_BTD.dtype)).masked_fill(left_BT1, 0)
        experts_BTk, gates_BTk, scores_BTA = route(moe, logits_BTA, self.bias.to(z_BTD.dtype))
        told = {}
        if tell:
            margin_BT = margin(moe, scores_BTA + self.bias.to(z_BTD.dtype))
            told = {"experts_BTk": experts_BTk.masked_fill(left_BT1, -1), "margin_BT": margin_BT.masked_fill(~taken_BT, 0)}
        experts_BTk = experts_BTk.masked_fill(left_BT1, alternatives)
        weights = (self.experts.gate, self.experts.up, self.experts.down)
        if training and moe.dispatch == "capacity":
            slots = expert_capacity(self.model, x_BTD.shape[1])
            out_BTD, kept_BTk = experts_capacity(x_BTD, experts_BTk, gates_BTk, weights, activation, slots)
        else:
            out_BTD, kept_BTk = experts_dropless(x_BTD, experts_BTk, gates_BTk, weights, activation, moe.grouped_form)
        if moe.shared_experts:
            out_BTD = out_BTD + self.shared(x_BTD)
        share_BTA = scores_BTA / scores_BTA.sum(dim=-1, keepdim=True)  # sigmoid scores do not sum to one
        share_BTA = share_BTA.masked_fill(left_BT1, 0)
        with torch.no_grad():
            entropy = -torch.special.xlogy(share_BTA, share_BTA).sum() / max(math.log(alternatives), 1e-30)
            load_BA = F.one_hot(experts_BTk.flatten(1), alternatives + 1).sum(dim=1)[:, :alternatives]
        metrics = {
            "load_BA": load_BA,
            "share_BA": share_BTA.sum(dim=1),
            "z_loss": (logits_BTA.logsumexp(dim=-1) ** 2).masked_fill(~taken_BT, 0).sum(),
            "entropy": entropy,
            "dropped": (~kept_BTk).sum().float() / moe.top_k,
        }
        return out_BTD, metrics | told

    def idle(self, x_BTD: Tensor, tell: bool) -> dict[str, Tensor]:
        """The metrics of a layer that no token takes."""
        B, T = x_BTD.shape[:2]
        A, zero = self.model.moe.num_experts + self.model.moe.noop_experts, at_least_float32(x_BTD.new_zeros(()))
        told = {
            "experts_BTk": torch.full((B, T, self.model.moe.top_k), -1, device=x_BTD.device),
            "margin_BT": zero.expand(B, T),
        }
        metrics = {
            "load_BA": torch.zeros(B, A, dtype=torch.long, device=x_BTD.device),
            "share_BA": zero.expand(B, A),
            **dict.fromkeys(("z_loss", "entropy", "dropped"), zero),
        }
        return metrics | told if tell else metrics
