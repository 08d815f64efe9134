"""Moving rows of an array by index, forward and backward: the one primitive under dispatch, combine and depth selection.

B rows, N items in, M items out, k places that one item may go to, D width.
"""

from typing import Any

import torch
from torch import Tensor


def _take(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    B, N, D = x_BND.shape
    rows_B1 = torch.arange(B, device=x_BND.device)[:, None] * N
    taken = x_BND.reshape(B * N, D).index_select(0, (rows_B1 + index_BM.clamp(min=0)).reshape(-1))
    return taken.masked_fill_((index_BM < 0).reshape(-1, 1), 0).reshape(B, -1, D)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BND: Tensor, index_BM: Tensor, back_BNk: Tensor) -> Tensor:
        ctx.save_for_backward(back_BNk)
        return _take(x_BND, index_BM)

    @staticmethod
    def backward(ctx: Any, dy_BMD: Tensor) -> tuple[Tensor, None, None]:
        (back_BNk,) = ctx.saved_tensors
        B, N, k = back_BNk.shape
        dx_BND = _take(dy_BMD, back_BNk.reshape(B, N * k))
        return dx_BND if k == 1 else dx_BND.reshape(B, N, k, -1).sum(dim=2), None, None


def take_rows(x_BND: Tensor, index_BM: Tensor, back_BNk: Tensor) -> Tensor:
    """y[b, m] = x[b, index[b, m]], and zero where the index is -1.

    `back` is the inverse: the up to k places m that item n went to, -1 where there are fewer. With it the backward pass is
    a gather as well; a scatter of floats would be slow, and on a GPU its order of addition undefined.
    """
    return _TakeRows.apply(x_BND, index_BM, back_BNk)


def inverse_index(index_BM: Tensor, size: int) -> Tensor:
    """For each of `size` items the place m with index[b, m] = item, or -1. Only integers are scattered."""
    B, M = index_BM.shape
    places = torch.arange(M, device=index_BM.device).expand(B, M)
    target = torch.where(index_BM >= 0, index_BM, size)  # one place more, for what goes nowhere
    return index_BM.new_full((B, size + 1), -1).scatter_(1, target, places)[:, :size]
