"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

N tokens, n tokens of a chunk, D model width, V vocabulary.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lumina.architecture import LOGIT_CHUNK

# float16 has no normal numbers below 6e-5: a token's gradient of the logits, mostly probabilities, is formed this much larger.
HALF_LIFT = 1024.0


class TokenSums(NamedTuple):
    """Weighted sums over tokens."""

    loss: Tensor  # -log p(target), nats
    correct: Tensor  # tokens to whose target no other token is preferred


def cross_entropy(hidden_ND: Tensor, head_DV: Tensor, targets_N: Tensor, weights_N: Tensor) -> TokenSums:
    """Sums of weighted cross-entropy and of correct predictions; logits and sums in at least float32.

    Under differentiation the gradients are formed chunk by chunk in the forward pass, while the logits are there: three
    matrix products instead of the four that recomputing the logits would take. Nothing of size N x V is kept.

    Args:
        hidden_ND, head_DV: of one dtype.
        targets_N: int64.
        weights_N: not differentiated; with float16 at most 63.
    """
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or head_DV.requires_grad):
        return TokenSums(*_CrossEntropy.apply(hidden_ND, head_DV, targets_N, weights_N))
    return _sums(hidden_ND, head_DV, targets_N, weights_N, None)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, head_DV: Tensor, targets_N: Tensor, weights_N: Tensor) -> TokenSums:
        wide = _wide(hidden_ND)
        gradients = torch.empty_like(hidden_ND, dtype=wide), torch.zeros_like(head_DV, dtype=wide)
        sums = _sums(hidden_ND, head_DV, targets_N, weights_N, gradients)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden_ND.dtype
        ctx.mark_non_differentiable(sums.correct)
        return sums

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dhead_DV = ctx.saved_tensors
        scale = dloss / _lift(ctx.dtype)
        return (dhidden_ND * scale).to(ctx.dtype), (dhead_DV * scale).to(ctx.dtype), None, None


def _sums(
    hidden_ND: Tensor, head_DV: Tensor, targets_N: Tensor, weights_N: Tensor, gradients: tuple[Tensor, Tensor] | None
) -> TokenSums:
    """The sums; into `gradients`, of hidden [N, D] and of the head [D, V], those of the loss times `_lift` are added."""
    wide = _wide(hidden_ND)
    weights_N = weights_N.to(wide)
    if not _widens(hidden_ND):
        head_DV = head_DV.to(wide)
    loss = correct = torch.zeros((), dtype=wide, device=hidden_ND.device)
    for start in range(0, hidden_ND.shape[0], LOGIT_CHUNK):
        chunk = slice(start, start + LOGIT_CHUNK)
        h_nD, t_n1, w_n = hidden_ND[chunk], targets_N[chunk, None], weights_N[chunk]
        logits_nV = _product(h_nD, head_DV)
        most_n = logits_nV.amax(-1)
        target_n = logits_nV.gather(1, t_n1)[:, 0]
        exp_nV = logits_nV.sub_(most_n[:, None]).exp_()
        total_n = exp_nV.sum(-1)
        loss = loss + w_n @ (most_n + total_n.log() - target_n)
        correct = correct + w_n @ (target_n >= most_n).to(wide)  # an argmax costs as much as the loss
        if gradients is not None:
            dhidden_ND, dhead_DV = gradients
            lifted_n = w_n * _lift(h_nD.dtype)
            dlogits_nV = exp_nV.mul_((lifted_n / total_n)[:, None])
            dlogits_nV.scatter_add_(1, t_n1, -lifted_n[:, None])
            if _widens(h_nD):
                dlogits_nV = dlogits_nV.to(h_nD.dtype)
                dhead_DV += _product(h_nD.T, dlogits_nV)
            else:
                dhead_DV.addmm_(h_nD.T.to(wide), dlogits_nV)
            dhidden_ND[chunk] = _product(dlogits_nV, head_DV.T)
    return TokenSums(loss, correct)


def _lift(dtype: torch.dtype) -> float:
    return HALF_LIFT if dtype == torch.float16 else 1.0


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widens(x: Tensor) -> bool:
    """Whether x's own device multiplies matrices of its dtype into float32; the others are given float32 from the start."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if _widens(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(b.dtype) @ b
