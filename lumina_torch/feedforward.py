"""Gated feed-forward: down(activation(gate x) * up x).

D model width, F feed-forward width.
"""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

# JAX's gelu is the approximation by tanh.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": partial(F.gelu, approximate="tanh")}


class FeedForward(nn.Module):
    """SwiGLU or GeGLU (Shazeer, 2020), on [..., D]."""

    def __init__(self, name: str, activation: str, param: Callable[[str], Tensor]):
        super().__init__()
        self.gate, self.up, self.down = (param(f"{name}.{n}") for n in ("gate", "up", "down"))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (w.to(x.dtype) for w in (self.gate, self.up, self.down))
        return (ACTIVATIONS[self.activation](x @ gate) * (x @ up)) @ down
