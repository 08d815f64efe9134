"""Rows whose positions are split over devices: who has which, moving tokens between them, and attention across them.

B rows, T tokens of a row or of a device's share of it, N local tokens, M local results, k places that one token may go to,
S the tokens of all devices, D width; H query heads, K key/value heads, h head width.

All of it is called inside a shard_map that is manual over every axis. Losses are sums over devices, so that the transpose of an
all_gather is a psum_scatter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lumina_jax.attend import _full_softmax
from lumina_jax.gather import take_rows

AXIS = "context"


class Row(NamedTuple):
    """How one row lies on the devices along `context`.

    The row, padded, is cut into 2n chunks; device i has chunks i and 2n - 1 - i, in this order ("zigzag"): with a causal mask all
    devices then have the same work (Llama 3, section 3.3.2).
    """

    tokens: int  # of the row, without padding
    n: int  # devices

    @property
    def length(self) -> int:
        """Tokens with padding."""
        return self.tokens if self.n == 1 else -(-self.tokens // (2 * self.n)) * 2 * self.n

    @property
    def share(self) -> int:
        """Tokens of one device."""
        return self.length // self.n

    @property
    def chunk(self) -> int:
        return self.length // (2 * self.n)

    def own(self, x_BT, fill):
        """This device's part [B, share, ...] of a whole row [B, tokens, ...]; `fill` is what padding holds."""
        if self.n == 1:
            return x_BT
        pad = [(0, 0), (0, self.length - self.tokens)] + [(0, 0)] * (x_BT.ndim - 2)
        x_BT = jnp.pad(x_BT, pad, constant_values=fill)
        rank = jax.lax.axis_index(AXIS)
        halves = [
            jax.lax.dynamic_slice_in_dim(x_BT, index * self.chunk, self.chunk, axis=1)
            for index in (rank, 2 * self.n - 1 - rank)
        ]
        return jnp.concatenate(halves, axis=1)

    def whole(self, x_Bt):
        """The whole row [B, tokens, ...], in order, of the devices' parts [B, share, ...]."""
        if self.n == 1:
            return x_Bt
        return self._in_order(jax.lax.all_gather(x_Bt, AXIS))[:, : self.tokens]

    def _in_order(self, x_nBt):
        n, B = x_nBt.shape[:2]
        x_nB2c = x_nBt.reshape(n, B, 2, self.chunk, *x_nBt.shape[3:])
        chunks = [x_nB2c[i, :, 0] for i in range(n)] + [x_nB2c[i, :, 1] for i in reversed(range(n))]
        return jnp.concatenate(chunks, axis=1)

    def address(self, ids):
        """Where tokens of the row lie: device * share + place there; -1 stays -1."""
        if self.n == 1:
            return ids
        chunk, place = jnp.divmod(ids, self.chunk)
        late = chunk >= self.n
        rank = jnp.where(late, 2 * self.n - 1 - chunk, chunk)
        return jnp.where(ids < 0, -1, rank * self.share + late * self.chunk + place)


def _ring_take(x_BND, address_BM, n: int):
    x_nBND = jax.lax.all_gather(x_BND, AXIS)
    x_BSD = x_nBND.swapaxes(0, 1).reshape(x_BND.shape[0], -1, x_BND.shape[2])
    taken = jnp.take_along_axis(x_BSD, jnp.maximum(address_BM, 0)[:, :, None], axis=1)
    return jnp.where(address_BM[:, :, None] >= 0, taken, 0)


def ring_take(x_BND, address_BM, back_BNk, n: int):
    """`take_rows` across the devices along `context`: addresses are device * (tokens of a device) + place there."""
    if n == 1:
        return take_rows(x_BND, address_BM, back_BNk)

    @jax.custom_vjp
    def take(x_BND, address_BM, back_BNk):
        return _ring_take(x_BND, address_BM, n)

    def forward(x_BND, address_BM, back_BNk):
        return _ring_take(x_BND, address_BM, n), back_BNk

    def backward(back_BNk, dy_BMD):
        B, N, k = back_BNk.shape
        return _ring_take(dy_BMD, back_BNk.reshape(B, N * k), n).reshape(B, N, k, -1).sum(axis=2), None, None

    take.defvjp(forward, backward)
    return take(x_BND, address_BM, back_BNk)


def attend_context(q_BtHh, k_BtKh, v_BtKh, segments_BT, row: Row, form: str):
    """Causal attention within each segment, of the local queries to the keys of the whole row."""
    segments_BT = jnp.pad(segments_BT, [(0, 0), (0, row.length - row.tokens)], constant_values=-1)
    padded = row._replace(tokens=row.length)
    index_t = padded.own(jnp.arange(row.length)[None], 0)[0]
    own_Bt = padded.own(segments_BT, -1)
    visible_BtS = (index_t[:, None] >= jnp.arange(row.length)) & (own_Bt[:, :, None] == segments_BT[:, None])
    return _full_softmax(q_BtHh, padded.whole(k_BtKh), padded.whole(v_BtKh), visible_BtS)
