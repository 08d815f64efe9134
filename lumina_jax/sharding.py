"""What the model calls inside of `jax.shard_map`: collectives over mesh axes, and a layer's weights gathered from their parts.

b rows of a device, D model width. Gradients follow one convention: the loss is the sum of what all devices return, so what a
device computes of a gradient is its share of it, and every collective is transposed by JAX as it stands.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lumina.architecture import Tensor
from lumina.mesh import AXES, GATHERED, RULES, Sizes

NOT_KEPT = ("all_gather", "convert_element_type")  # primitives by name


class Axes(Sizes):
    """The mesh as the code on one device of it sees it. Over axes of size 1 nothing is sent, and nothing computed."""

    __slots__ = ()

    def live(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of more than one device."""
        return tuple(axis for axis in axes if getattr(self, axis) > 1)

    def gather(self, x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
        """The parts of all devices along `axes`, one after the other; transposed, `scatter`."""
        live = self.live(axes)
        return jax.lax.all_gather(x, live, axis=dimension, tiled=True) if live else x

    def scatter(self, x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
        """The own part of the sum over `axes`; transposed, `gather`."""
        live = self.live(axes)
        return jax.lax.psum_scatter(x, live, scatter_dimension=dimension, tiled=True) if live else x

    def sum(self, tree: Any, axes: tuple[str, ...] = AXES) -> Any:
        """The sum over `axes`, on all of them."""
        live = self.live(axes)
        return jax.lax.psum(tree, live) if live else tree

    def largest(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The largest over `axes`; has no gradient."""
        live = self.live(axes)
        return jax.lax.pmax(x, live) if live else x

    def swap(self, x: jax.Array, axis: str, split: int, join: int) -> jax.Array:
        """Dimension `split` is cut into a part for each device along the axis; the parts that come are joined along `join`."""
        return jax.lax.all_to_all(x, axis, split, join, tiled=True) if self.live((axis,)) else x

    def place(self, axis: str) -> Any:
        """The place of this device along `axis`."""
        return jax.lax.axis_index(axis) if self.live((axis,)) else 0

    def splits(self, tensor: Tensor) -> list[tuple[str, ...]]:
        """The axes of more than one device that split each dimension of a tensor."""
        return [self.live(over) for over in RULES.layout(tensor)]

    def whole(self, weight: jax.Array, tensor: Tensor, dtype: Any) -> jax.Array:
        """The part of `weight` that a device computes with, in `dtype`, gathered from those that the devices keep."""
        for dimension, (logical, over) in enumerate(zip(tensor.axes, self.splits(tensor), strict=True)):
            if logical in GATHERED and over:
                return _gathered(weight, over, dimension, dtype)
        return weight

    def not_splitting(self, tensor: Tensor) -> tuple[str, ...]:
        """The axes over which a gradient of `tensor` is still to be summed."""
        used = [axis for over in RULES.layout(tensor) for axis in over]
        return tuple(axis for axis in AXES if axis not in used)


ALONE = Axes()


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(weight, axes, dimension, dtype):
    return jax.lax.all_gather(weight.astype(dtype), axes, axis=dimension, tiled=True)


def _forward(weight, axes, dimension, dtype):
    # Not by calling itself: `gathers_again` would see that call, and what it returns would be kept.
    return jax.lax.all_gather(weight.astype(dtype), axes, axis=dimension, tiled=True), None


def _backward(axes, dimension, dtype, _, gradient):
    # Cast before it is sent forward, which halves what travels; summed in float32, as rounding would grow with the devices.
    wide = gradient.astype(jnp.promote_types(dtype, jnp.float32))
    return (jax.lax.psum_scatter(wide, axes, scatter_dimension=dimension, tiled=True),)


_gathered.defvjp(_forward, _backward)


def gathers_again(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: all is kept for the backward pass but what was gathered or cast: that would be whole
    weights, casts of their parts, and float32 copies of what is gathered over `tensor`."""
    return primitive.name not in NOT_KEPT
