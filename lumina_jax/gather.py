"""Moving rows of an array by index, forward and backward: the one primitive under dispatch, combine and depth selection.

B rows, N items in, M items out, k places that one item may go to, D width.
"""

import jax
import jax.numpy as jnp


def pick_rows(x_BND, index_BM):
    """y[b, m] = x[b, index[b, m]], and zero where the index is -1: `take_rows` without its gradient."""
    taken = jnp.take_along_axis(x_BND, jnp.maximum(index_BM, 0)[:, :, None], axis=1)
    return jnp.where(index_BM[:, :, None] >= 0, taken, 0)


@jax.custom_vjp
def take_rows(x_BND, index_BM, back_BNk):
    """y[b, m] = x[b, index[b, m]], and zero where the index is -1.

    `back` is the inverse: the up to k places m that item n went to, -1 where there are fewer. With it the backward pass is
    a gather as well; a scatter of floats would be slow on every device, and its order of addition undefined on some.
    """
    return pick_rows(x_BND, index_BM)


def _forward(x_BND, index_BM, back_BNk):
    return pick_rows(x_BND, index_BM), back_BNk


def _backward(back_BNk, dy_BMD):
    B, N, k = back_BNk.shape
    dx_BND = pick_rows(dy_BMD, back_BNk.reshape(B, N * k)).reshape(B, N, k, -1).sum(axis=2)
    return dx_BND, None, None


take_rows.defvjp(_forward, _backward)


def inverse_index(index_BM, size: int):
    """For each of `size` items the place m with index[b, m] = item, or -1. Only integers are scattered."""
    B, M = index_BM.shape
    rows = jnp.arange(B)[:, None]
    places = jnp.broadcast_to(jnp.arange(M, dtype=jnp.int32), (B, M))
    target = jnp.where(index_BM >= 0, index_BM, size)  # out of range: dropped
    return jnp.full((B, size), -1, jnp.int32).at[rows, target].set(places, mode="drop")
