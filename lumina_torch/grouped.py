"""Grouped gated feed-forward: each choice of a token through the expert it names, with the work of the choices alone.

N tokens, k choices a token, S = N k choices in all, E experts, D model width, F feed-forward width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.errors import ConfigError
from lumina_torch.feedforward import ACTIVATIONS
from lumina_torch.gather import take_rows


class Order(NamedTuple):
    """The choices sorted by expert, those that take none at the end."""

    choice_S: Tensor  # sorted place -> choice
    place_S: Tensor  # choice -> sorted place, -1 where it takes no expert
    counts_E: Tensor  # choices of each expert


def sort_choices(experts_Nk: Tensor, num_experts: int) -> Order:
    """Sort by expert, stably: an expert sees its tokens in their order. Only integers are scattered."""
    expert_S = experts_Nk.reshape(-1)
    expert_S = torch.where((expert_S >= 0) & (expert_S < num_experts), expert_S, num_experts)
    sorted_S, choice_S = torch.sort(expert_S, stable=True)
    place_S = torch.empty_like(choice_S).scatter_(0, choice_S, torch.arange(len(choice_S), device=choice_S.device))
    # Places in a sorted list, not a count of each: that has no deterministic form on CUDA.
    ends_E = torch.searchsorted(sorted_S, torch.arange(num_experts, device=sorted_S.device), right=True)
    return Order(choice_S, torch.where(expert_S < num_experts, place_S, -1), ends_E.diff(prepend=ends_E.new_zeros(1)))


def loop(rows_SD: Tensor, counts_E: Tensor, weights: tuple[Tensor, ...], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Expert after expert, each on its own rows; the rows after the last are zero."""
    counts = counts_E.tolist()
    rest = len(rows_SD) - sum(counts)
    *rows, tail = rows_SD.split([*counts, rest])
    out = [
        (activation(x_bD @ gate_DF) * (x_bD @ up_DF)) @ down_FD if len(x_bD) else x_bD
        for x_bD, gate_DF, up_DF, down_FD in zip(rows, *(w.unbind(0) for w in weights), strict=True)
    ]
    return torch.cat([*out, torch.zeros_like(tail)])


def grouped_mm(
    rows_SD: Tensor, counts_E: Tensor, weights: tuple[Tensor, ...], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """PyTorch's grouped matrix product. What it makes of the rows after the last is nobody's business: it is not read."""
    gate_EDF, up_EDF, down_EFD = weights
    ends_E = counts_E.cumsum(0).int()
    hidden_SF = activation(F.grouped_mm(rows_SD, gate_EDF, offs=ends_E)) * F.grouped_mm(rows_SD, up_EDF, offs=ends_E)
    return F.grouped_mm(hidden_SF, down_EFD, offs=ends_E)


class Form(NamedTuple):
    """One way to multiply sorted rows with experts, where it may run, and why there."""

    run: Callable[..., Tensor]
    platforms: tuple[str, ...]  # as devices are named; none: any
    dtypes: tuple[str, ...]  # none: any
    multiple: int  # D and F must be multiples of it
    reason: str

    def refusal(self, platform: str, dtype: str, widths: tuple[int, ...]) -> str:
        """Why it cannot run, in words; empty if it can."""
        if (self.platforms and platform not in self.platforms) or (self.dtypes and dtype not in self.dtypes):
            return f"runs on {', '.join(self.platforms)} in {', '.join(self.dtypes)}, not on {platform} in {dtype}"
        odd = [width for width in widths if width % self.multiple]
        return f"takes widths that are multiples of {self.multiple}, not {odd[0]}" if odd else ""


# In order of preference.
FORMS = {
    "grouped_mm": Form(
        grouped_mm, ("cuda",), ("bfloat16",), 8, "one kernel for all experts; the host need not know how many tokens each has"
    ),  # 8: a row of any operand is to begin at a multiple of 16 bytes
    "loop": Form(loop, (), (), 1, "a product for each expert does the work of the choices alone on any device"),
}


def choose_grouped(form: str, platform: str, dtype: Any, widths: tuple[int, ...] = ()) -> tuple[str, str]:
    """(name of the form, why) for the form asked for, or the best one if "auto"; `widths` are D and F.

    Raises ConfigError if it cannot run.
    """
    dtype = str(dtype).removeprefix("torch.")
    if form != "auto" and form not in FORMS:
        raise ConfigError(f"model.moe.grouped_form = {form!r}: PyTorch has auto, {', '.join(sorted(FORMS))}")
    for name, candidate in FORMS.items():
        if form in ("auto", name) and not candidate.refusal(platform, dtype, widths):
            return name, candidate.reason
    raise ConfigError(f"model.moe.grouped_form = {form!r}: {FORMS[form].refusal(platform, dtype, widths)}; use auto")


def grouped_feedforward(
    x_ND: Tensor, experts_Nk: Tensor, weights: tuple[Tensor, ...], activation: str, form: str = "auto"
) -> Tensor:
    """out [N, k, D]: choice j of token n through expert experts[n, j]; a choice of E or more, or below 0, takes no expert:
    zero, and no work.

    `weights` are (gate [E, D, F], up [E, D, F], down [E, F, D]), cast to x's dtype. Differentiable in x and weights, and
    deterministic. A form other than "auto" is run as asked; `choose_grouped` says whether that is wise on a device.
    """
    (N, D), k = x_ND.shape, experts_Nk.shape[1]
    if form == "auto":
        form, _ = choose_grouped(form, x_ND.device.type, x_ND.dtype, (D, weights[0].shape[2]))
    order = sort_choices(experts_Nk, len(weights[0]))
    token_S = order.choice_S // k
    rows_SD = take_rows(x_ND[None], token_S[None], order.place_S.reshape(1, N, k))[0]
    cast = tuple(w.to(x_ND.dtype) for w in weights)
    out_SD = FORMS[form].run(rows_SD, order.counts_E, cast, ACTIVATIONS[activation])
    # Backward, a place takes its gradient from the choice it holds; the places of no expert, from none.
    taken_S = torch.arange(N * k, device=x_ND.device) < order.counts_E.sum()
    back_S = torch.where(taken_S, order.choice_S, -1)
    return take_rows(out_SD[None], order.place_S[None], back_S[None, :, None])[0].reshape(N, k, D)
