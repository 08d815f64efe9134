"""Mixture-of-Depths: some tokens of each row take a layer, or its feed-forward, the rest pass by (Raposo et al., 2024).

B rows, T positions, C selected positions, D model width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina.architecture import capacity
from lumina.config import ModelConfig
from lumina_torch.attend import Places
from lumina_torch.attention import at_least_float32
from lumina_torch.gather import inverse_index, take_rows
from lumina_torch.moe import top as highest

Metrics = dict[str, Tensor]


def select_top(wish_BT: Tensor, count: int) -> Tensor:
    """Positions [B, C] of the `count` highest of each row, in temporal order; ties choose the earlier position.

    Where the wish is -inf nothing is selected: a row that has fewer others has -1 after them.
    """
    T = wish_BT.shape[1]
    wish_BC, index_BC = highest(wish_BT, count)
    index_BC = index_BC.masked_fill(wish_BC == -torch.inf, T).sort(dim=1).values
    return index_BC.masked_fill(index_BC == T, -1)


class Selection(NamedTuple):
    """Which tokens of each row take the layer, and how much of its output they add."""

    taken_BT: Tensor  # bool
    gate_BT: Tensor  # in at least float32
    index_BC: Tensor  # positions of the tokens that are taken, in temporal order; -1 after them, where a row has fewer
    slot_BT: Tensor  # the inverse: place of a token among the selected, -1 when it is not

    def run(
        self,
        inner: Callable[[Tensor, Places, Tensor], tuple[Tensor, Metrics]],
        x_BTD: Tensor,
        places: Places,
        idle: Callable[[Tensor], Metrics],
    ) -> tuple[Tensor, Metrics]:
        """(gate * f(x) at the tokens that take the layer and zero elsewhere [B, T, D], metrics).

        `inner(x [B, C, D], places, taken [B, C])` returns (f(x), metrics). It is given the selected alone, and taken where a
        row has them: what is skipped is not computed. Where no row has any, `idle` gives the metrics.
        """
        if self.index_BC.shape[1] == 0:
            return torch.zeros_like(x_BTD), idle(x_BTD)
        x_BCD = take_rows(x_BTD, self.index_BC, self.slot_BT[:, :, None])
        out_BCD, metrics = inner(x_BCD, places.at(self.index_BC), self.index_BC >= 0)
        gate_BC1 = self.gate_BT.gather(1, self.index_BC.clamp(min=0))[:, :, None].to(out_BCD.dtype)
        out_BTD = take_rows(out_BCD * gate_BC1, self.slot_BT, self.index_BC[:, :, None])
        if "experts_BTk" in metrics:  # in the row's places, -1 and 0 for the others
            slot_BT1 = self.slot_BT[:, :, None]
            experts_BTk = metrics["experts_BTk"].gather(
                1, slot_BT1.clamp(min=0).expand(-1, -1, metrics["experts_BTk"].shape[2])
            )
            margin_BT = metrics["margin_BT"].gather(1, self.slot_BT.clamp(min=0))
            metrics["experts_BTk"] = experts_BTk.masked_fill(slot_BT1 < 0, -1)
            metrics["margin_BT"] = margin_BT.masked_fill(self.slot_BT < 0, 0)
        return out_BTD, metrics


class Predictor(nn.Module):
    """A small feed-forward that says from a token alone whether it would be selected."""

    def __init__(self, param: Callable[[str], Tensor]):
        super().__init__()
        self.hidden, self.output, self.bias = (param(f"mod.predictor.{name}") for name in ("hidden", "output", "bias"))

    def forward(self, z_BTD: Tensor) -> Tensor:
        """A logit a token [B, T]."""
        hidden, output, bias = (w.to(z_BTD.dtype) for w in (self.hidden, self.output, self.bias))
        return F.silu(z_BTD @ hidden) @ output + bias


class MoD(nn.Module):
    """Router of one layer: gate g = sigmoid(w . z + b) of the normalised input z."""

    def __init__(self, model: ModelConfig, param: Callable[[str], Tensor]):
        super().__init__()
        self.router = param("mod.router")
        self.bias = param("mod.bias")
        if model.mod.predictor_width:
            self.predictor = Predictor(param)
        self.mod = model.mod

    def forward(self, z_BTD: Tensor, places: Places, layer: int, top: bool) -> tuple[Selection, Metrics]:
        """Select tokens: with `top` the highest C = ceil(c T) of each row, which sees the future, as in training; without it
        each token decides for itself, as evaluation and generation do and as the predictor loss teaches.

        Of empty positions none is ever taken. Metrics: predictor_loss (the sum over the others), logit_BT (above zero, the
        causal decision is to take the layer) and taken_BT. `layer` and positions are what random routing (`mod.router`) draws
        by.
        """
        wide_BTD = at_least_float32(z_BTD)
        router, bias = self.router.to(wide_BTD.dtype), self.bias.to(wide_BTD.dtype)
        logit_BT = wide_BTD @ router + bias
        if self.mod.router == "random":
            wish_BT = causal_BT = (self.mod.capacity - uniform(places.positions_BT, layer)).to(wide_BTD.dtype)
        else:
            wish_BT = logit_BT
            # What decides learns the membership from z as it finds it: that gradient goes to the router alone.
            still_BTD = wide_BTD.detach()
            causal_BT = self.predictor(still_BTD) if self.mod.predictor_width else still_BTD @ router + bias
        T, real_BT = z_BTD.shape[1], places.real_BT
        if top:
            index_BC = select_top(wish_BT.detach().masked_fill(~real_BT, -torch.inf), capacity(T, self.mod.capacity))
            slot_BT = inverse_index(index_BC, T)
            taken_BT = slot_BT >= 0
        else:
            taken_BT = (causal_BT.detach() > 0) & real_BT
            slot_BT = torch.where(taken_BT, taken_BT.long().cumsum(dim=1) - 1, -1)
            index_BC = inverse_index(slot_BT, T)[:, : int(taken_BT.sum(dim=1).max())]
        target_BT = taken_BT.to(wide_BTD.dtype)
        learned = 0.0 if self.mod.router == "random" else 1.0
        nats_BT = F.binary_cross_entropy_with_logits(causal_BT, target_BT, reduction="none")
        metrics = {
            "predictor_loss": learned * nats_BT.masked_fill(~real_BT, 0).sum(),
            "logit_BT": causal_BT.detach(),
            "taken_BT": taken_BT,
        }
        return Selection(taken_BT, logit_BT.sigmoid(), index_BC, slot_BT), metrics


def uniform(positions_BT: Tensor, layer: int) -> Tensor:
    """A number from 0 to 1 for each token, by its layer and position alone: the same in training, generation and JAX."""
    words = _mix((positions_BT.long() * 0x9E3779B9 + (layer + 1) * 0x85EBCA6B) & 0xFFFFFFFF)
    return (words >> 8).to(torch.float32) / 2**24


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3, on 32 bits of 64."""
    x = ((x ^ x >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ x >> 16
