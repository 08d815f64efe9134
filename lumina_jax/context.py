"""Rows whose positions are split over devices: who has which, moving tokens between devices, and attention across them.

B rows, T tokens of a row, t of a device's share, c of a chunk, n devices along `context`; N tokens to take from, M places to
fill, k places that one token may go to, D width; H query heads, K key/value heads, G = H / K, h head width; S keys;
U blocks of a device's share, V blocks of a row, s tokens of a block, R = G s its queries of one key head, P pairs of blocks.

All of it is called inside a shard_map that is manual over every axis of the mesh. The loss is the sum of what the devices
return, so that the transpose of an all_gather is a psum_scatter.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lumina_jax.attend import (
    HIDDEN,
    attend,
    beside,
    choose_attention,
    scaled,
    splash_block,
    splash_sizes,
    wide_dtype,
    with_splash,
)
from lumina_jax.gather import pick_rows, take_rows
from lumina_jax.platform import target_platform

AXIS = "context"
BLOCK = 1024  # tokens of a block at most: what bounds the scores that exist at a time
# Pairs of blocks that splash's tables have, all in scalar memory (1 MiB of a v5e) with 3 bytes each. With 262,144 compiling for
# v5p took 150 s, with 65,536 46 s.
MOST_TOLD = 65_536
NOWHERE = -1  # the segment of padding, which no token has


# -------------------------------------------------------------------------------------------------------------- layout


class Row(NamedTuple):
    """How one row lies on the devices along `context`.

    The row is padded and cut into 2n chunks; device i has the chunks i and 2n - 1 - i, in this order. So all have the same work
    under a causal mask (Llama 3, arXiv 2407.21783, section 3.3.2). On one device nothing moves.
    """

    tokens: int  # of the row, without padding
    n: int  # devices

    @property
    def length(self) -> int:
        """Tokens with padding."""
        return self.n * self.share

    @property
    def share(self) -> int:
        """Tokens of one device."""
        return self.tokens if self.n == 1 else 2 * self.chunk

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, where there are several devices."""
        return -(-self.tokens // (2 * self.n))

    def own(self, x_BT, fill):
        """This device's part [B, share, ...] of a whole row [B, tokens, ...]; `fill` is what padding holds."""
        if self.n == 1:
            return x_BT
        x_BT, rank = self.padded(x_BT, fill), jax.lax.axis_index(AXIS)
        first = (rank * self.chunk, (2 * self.n - 1 - rank) * self.chunk)
        return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x_BT, t, self.chunk, axis=1) for t in first], axis=1)

    def whole(self, x_Bt):
        """The whole row [B, tokens, ...], in order, of the devices' parts [B, share, ...]."""
        if self.n == 1:
            return x_Bt
        x_nBt = jax.lax.all_gather(x_Bt, AXIS)
        early_nBc, late_nBc = x_nBt[:, :, : self.chunk], x_nBt[:, :, self.chunk :]
        return jnp.concatenate([*early_nBc, *late_nBc[::-1]], axis=1)[:, : self.tokens]

    def address(self, ids):
        """Where tokens of the row lie: device * share + place there; -1 stays -1."""
        if self.n == 1:
            return ids
        chunk, place = jnp.divmod(ids, self.chunk)
        late = chunk >= self.n
        rank = jnp.where(late, 2 * self.n - 1 - chunk, chunk)
        return jnp.where(ids < 0, -1, rank * self.share + late * self.chunk + place)

    def padded(self, x_BT, fill):
        """[B, length, ...] of [B, tokens, ...]."""
        amounts = [(0, 0), (0, self.length - self.tokens)] + [(0, 0)] * (x_BT.ndim - 2)
        return jnp.pad(x_BT, amounts, constant_values=fill)


# ---------------------------------------------------------------------------------------------------------------- taking


def ring_take(x_BND, address_BM, back_BNk, n: int):
    """`take_rows` among the n devices along `context`: y[b, m] = x[b] at address[b, m] = device * N + place, zero where -1.

    `back` is the inverse: the up to k addresses device * M + m that local token n went to, -1 where there are fewer. The blocks
    of x travel round the ring both ways, as far as the farthest that anyone wants: not at all if all find theirs at home.
    """
    return take_rows(x_BND, address_BM, back_BNk) if n == 1 else _ring_take(x_BND, address_BM, back_BNk, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ring_take(x_BND, address_BM, back_BNk, n):
    return _ring_forward(x_BND, address_BM, back_BNk, n)[0]


def _ring_forward(x_BND, address_BM, back_BNk, n):
    ahead_BM = _ahead(address_BM, x_BND.shape[1], n)
    reach = jnp.max(jnp.where(address_BM < 0, 0, jnp.minimum(ahead_BM, n - ahead_BM)), initial=0)  # by the shorter way round
    # Over every axis: on CPU a permute waits for the devices of the whole mesh, not only for those of its ring, and all must
    # come to it equally often.
    rounds = jax.lax.pmax(reach, tuple(jax.sharding.get_abstract_mesh().manual_axes))
    return _travel(x_BND, address_BM, rounds, n), (back_BNk, rounds)  # what comes back has as far to go


def _ring_backward(n, saved, dy_BMD):
    back_BNk, rounds = saved
    B, N, k = back_BNk.shape
    dx_BND = _travel(dy_BMD, back_BNk.reshape(B, N * k), rounds, n).reshape(B, N, k, -1).sum(axis=2)
    return dx_BND, None, None


_ring_take.defvjp(_ring_forward, _ring_backward)


def _ahead(address, size: int, n: int):
    """How many devices further along the ring it lies."""
    return (address // size - jax.lax.axis_index(AXIS)) % n


def _travel(x_BND, address_BM, rounds, n: int):
    N = x_BND.shape[1]
    ahead_BM, place_BM = _ahead(address_BM, N, n), address_BM % N

    def picked(x_BND, ahead):
        return pick_rows(x_BND, jnp.where((address_BM >= 0) & (ahead_BM == ahead), place_BM, -1))

    def step(distance, carry):
        *moving, y_BMD = carry
        # Twice, were it sent both ways, a ring of two would carry each block.
        ways = ((-1, distance), (1, n - distance))[: len(moving)]
        moved = [
            jax.lax.ppermute(x_BND, AXIS, [(i, (i + way) % n) for i in range(n)])
            for x_BND, (way, _) in zip(moving, ways, strict=True)
        ]
        for x_BND, (_, ahead) in zip(moved, ways, strict=True):
            y_BMD = jnp.where((ahead_BM == ahead)[:, :, None], picked(x_BND, ahead), y_BMD)
        return *moved, y_BMD

    moving = (x_BND,) if n == 2 else (x_BND, x_BND)
    return jax.lax.fori_loop(1, rounds + 1, step, (*moving, picked(x_BND, 0)))[-1]


# ------------------------------------------------------------------------------------------------------------- attention


def attend_context(q_BtHh, k_BtKh, v_BtKh, segments_BT, row: Row, form: str = "auto"):
    """Query t sees the keys of the whole row at or before t that are in its segment. Softmax in at least float32.

    Args:
        q_BtHh, k_BtKh, v_BtKh: this device's part of the row.
        segments_BT: of the whole row, in order; -1 where it is empty.
        form: one that can split rows, or `auto`.

    Keys and values are all-gathered, their gradients reduce-scattered in the wide dtype. Returns [B, t, H, h] in q's dtype; of
    padding something finite. Raises ConfigError as `choose_attention` does.
    """
    if row.n == 1:
        return attend(q_BtHh, k_BtKh, v_BtKh, segments_BT, form)
    name, _ = choose_attention(form, target_platform(), q_BtHh.dtype, row.tokens, row.n)
    if name == "splash":
        return attend_context_splash(q_BtHh, k_BtKh, v_BtKh, segments_BT, row)
    return attend_context_chunked(q_BtHh, k_BtKh, v_BtKh, segments_BT, row)


class Pairs(NamedTuple):
    """The pairs of a block of queries and a block of keys that this device works on, [P] each, by query."""

    query: Any  # among this device's blocks
    query_place: Any  # in the row
    key: Any  # in the gathered keys
    key_place: Any  # in the row


def _cuts(row: Row) -> tuple[int, int]:
    """(blocks of a chunk, tokens of a block)."""
    count = -(-row.chunk // BLOCK)
    return count, -(-row.chunk // count)


def _places_U(row: Row):
    """Where in the row this device's blocks lie."""
    count, _ = _cuts(row)
    rank = jax.lax.axis_index(AXIS)
    block_c = jnp.arange(count)
    return jnp.concatenate([rank * count + block_c, (2 * row.n - 1 - rank) * count + block_c])


def _pairs(row: Row) -> Pairs:
    """No pair is wholly masked; of the same number on each device, so that none waits for another."""
    count, _ = _cuts(row)
    places_U = _places_U(row)
    total = count * (2 * row.n * count + 1)  # on every device: the sum of places_U + 1
    query_P = jnp.repeat(jnp.arange(2 * count), places_U + 1, total_repeat_length=total)
    first_U = jnp.cumsum(places_U + 1) - (places_U + 1)
    key_place_P = jnp.arange(total) - first_U[query_P]
    chunk_P, block_P = jnp.divmod(key_place_P, count)
    late_P = chunk_P >= row.n
    rank_P = jnp.where(late_P, 2 * row.n - 1 - chunk_P, chunk_P)
    return Pairs(query_P, places_U[query_P], (2 * rank_P + late_P) * count + block_P, key_place_P)


def _blocks(x_BtKGh, row: Row):
    """[U, B, K, R, h]: each chunk, padded at its end, in equal blocks."""
    count, size = _cuts(row)
    B, _, K, G, h = x_BtKGh.shape
    x_B2cKGh = x_BtKGh.reshape(B, 2, row.chunk, K, G, h)
    x_B2cKGh = jnp.pad(x_B2cKGh, [(0, 0), (0, 0), (0, count * size - row.chunk), (0, 0), (0, 0), (0, 0)])
    return x_B2cKGh.reshape(B, 2 * count, size, K, G, h).transpose(1, 0, 3, 4, 2, 5).reshape(2 * count, B, K, G * size, h)


def _unblocked(x_UBKRh, row: Row):
    """[B, t, K, G, h], the inverse."""
    count, size = _cuts(row)
    _, B, K, R, h = x_UBKRh.shape
    x_BUsKGh = x_UBKRh.reshape(2 * count, B, K, R // size, size, h).transpose(1, 0, 4, 2, 3, 5)
    x_B2cKGh = x_BUsKGh.reshape(B, 2, count * size, K, R // size, h)[:, :, : row.chunk]
    return x_B2cKGh.reshape(B, row.share, K, R // size, h)


def _segment_blocks(segments_BT, row: Row):
    """[V, B, s], in the row's order."""
    count, size = _cuts(row)
    segments_BT = row.padded(segments_BT, NOWHERE)
    B = segments_BT.shape[0]
    segments_Bnc = segments_BT.reshape(B, 2 * row.n, row.chunk)
    segments_Bnc = jnp.pad(segments_Bnc, [(0, 0), (0, 0), (0, count * size - row.chunk)], constant_values=NOWHERE)
    return segments_Bnc.reshape(B, -1, size).swapaxes(0, 1)


def _pair_scores(q_BKRh, k_BKsh, segments_VBs, pair: Pairs):
    """[B, K, R, s] of one pair, in the wide dtype; q is already scaled."""
    scores_BKRs = jnp.einsum("bkrh,bksh->bkrs", q_BKRh, k_BKsh, preferred_element_type=wide_dtype(q_BKRh))
    B, K, R, s = scores_BKRs.shape
    causal_ss = jnp.tri(s, dtype=bool) | (pair.key_place < pair.query_place)
    visible_Bss = causal_ss & (segments_VBs[pair.query_place][:, :, None] == segments_VBs[pair.key_place][:, None, :])
    return jnp.where(visible_Bss[:, None, None], scores_BKRs.reshape(B, K, R // s, s, s), HIDDEN).reshape(scores_BKRs.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_context_chunked(q_BtHh, k_BtKh, v_BtKh, segments_BT, row: Row):
    """Blocks of queries against the blocks of keys that they may see, one pair after another; those they may not, never.

    A running softmax over the keys (FlashAttention-2, algorithms 1 and 2): the backward pass computes the scores again.
    """
    return _context_forward(q_BtHh, k_BtKh, v_BtKh, segments_BT, row)[0]


def _context_forward(q_BtHh, k_BtKh, v_BtKh, segments_BT, row):
    K, wide = k_BtKh.shape[2], wide_dtype(q_BtHh)
    q_UBKRh = _blocks(_by_key_head(scaled(q_BtHh), K), row)
    k_VBKsh, v_VBKsh = (_gathered_blocks(x_BtKh, row) for x_BtKh in (k_BtKh, v_BtKh))
    segments_VBs, pairs = beside(q_BtHh, (_segment_blocks(segments_BT, row), _pairs(row)))

    def step(carry, pair):
        # A query sees itself, in its last pair: what was added before for keys that it must not see is then multiplied by 0.
        mixed_BKRh, largest_BKR1, total_BKR1 = (x_U[pair.query] for x_U in carry)
        scores_BKRs = _pair_scores(q_UBKRh[pair.query], k_VBKsh[pair.key], segments_VBs, pair)
        new_BKR1 = jnp.maximum(largest_BKR1, jnp.max(scores_BKRs, axis=-1, keepdims=True))
        weights_BKRs, rescale_BKR1 = jnp.exp(scores_BKRs - new_BKR1), jnp.exp(largest_BKR1 - new_BKR1)
        total_BKR1 = total_BKR1 * rescale_BKR1 + jnp.sum(weights_BKRs, axis=-1, keepdims=True)
        weights_BKRs = weights_BKRs.astype(v_BtKh.dtype)
        added_BKRh = jnp.einsum("bkrs,bksh->bkrh", weights_BKRs, v_VBKsh[pair.key], preferred_element_type=wide)
        update = (mixed_BKRh * rescale_BKR1 + added_BKRh, new_BKR1, total_BKR1)
        return tuple(_put(x_U, pair.query, x) for x_U, x in zip(carry, update, strict=True)), None

    one = (*q_UBKRh.shape[:-1], 1)
    start = (jnp.zeros(q_UBKRh.shape, wide), jnp.full(one, -jnp.inf, wide), jnp.zeros(one, wide))
    (mixed_UBKRh, largest_UBKR1, total_UBKR1), _ = jax.lax.scan(step, start, pairs)
    mixed_BtHh = _unblocked((mixed_UBKRh / total_UBKR1).astype(q_BtHh.dtype), row).reshape(q_BtHh.shape)
    log_total_UBKR1 = largest_UBKR1 + jnp.log(total_UBKR1)
    return mixed_BtHh, (q_BtHh, k_VBKsh, v_VBKsh, segments_BT, mixed_BtHh, log_total_UBKR1)


def _context_backward(row, saved, dmixed_BtHh):
    q_BtHh, k_VBKsh, v_VBKsh, segments_BT, mixed_BtHh, log_total_UBKR1 = saved
    K, wide, dtype = k_VBKsh.shape[2], wide_dtype(q_BtHh), q_BtHh.dtype
    q_UBKRh, dmixed_UBKRh = (_blocks(_by_key_head(x_BtHh, K), row) for x_BtHh in (scaled(q_BtHh), dmixed_BtHh))
    dot_BtH1 = jnp.sum(dmixed_BtHh.astype(wide) * mixed_BtHh.astype(wide), axis=-1, keepdims=True)
    dot_UBKR1 = _blocks(_by_key_head(dot_BtH1, K), row)
    segments_VBs = _segment_blocks(segments_BT, row)

    def step(carry, pair):
        dq_UBKRh, dk_VBKsh, dv_VBKsh = carry
        q_BKRh, dmixed_BKRh, k_BKsh = q_UBKRh[pair.query], dmixed_UBKRh[pair.query], k_VBKsh[pair.key]
        scores_BKRs = _pair_scores(q_BKRh, k_BKsh, segments_VBs, pair)
        weights_BKRs = jnp.exp(scores_BKRs - log_total_UBKR1[pair.query])
        dweights_BKRs = jnp.einsum("bkrh,bksh->bkrs", dmixed_BKRh, v_VBKsh[pair.key], preferred_element_type=wide)
        dscores_BKRs = (weights_BKRs * (dweights_BKRs - dot_UBKR1[pair.query])).astype(dtype)
        weights_BKRs = weights_BKRs.astype(dtype)
        dq_BKRh = jnp.einsum("bkrs,bksh->bkrh", dscores_BKRs, k_BKsh, preferred_element_type=wide)
        dk_BKsh = jnp.einsum("bkrs,bkrh->bksh", dscores_BKRs, q_BKRh, preferred_element_type=wide)
        dv_BKsh = jnp.einsum("bkrs,bkrh->bksh", weights_BKRs, dmixed_BKRh, preferred_element_type=wide)
        dq_UBKRh = _put(dq_UBKRh, pair.query, dq_UBKRh[pair.query] + dq_BKRh)
        dk_VBKsh = _put(dk_VBKsh, pair.key, dk_VBKsh[pair.key] + dk_BKsh)
        return (dq_UBKRh, dk_VBKsh, _put(dv_VBKsh, pair.key, dv_VBKsh[pair.key] + dv_BKsh)), None

    start = tuple(jnp.zeros(x.shape, wide) for x in (q_UBKRh, k_VBKsh, v_VBKsh))
    (dq_UBKRh, dk_VBKsh, dv_VBKsh), _ = jax.lax.scan(step, start, _pairs(row))
    dq_BtHh = _unblocked(dq_UBKRh, row).reshape(q_BtHh.shape) / math.sqrt(q_BtHh.shape[-1])
    dk_BtKh, dv_BtKh = (_scattered_blocks(x_VBKsh, row) for x_VBKsh in (dk_VBKsh, dv_VBKsh))
    return dq_BtHh.astype(dtype), dk_BtKh.astype(k_VBKsh.dtype), dv_BtKh.astype(v_VBKsh.dtype), None


attend_context_chunked.defvjp(_context_forward, _context_backward)


def _put(x_U, index, x):
    return jax.lax.dynamic_update_index_in_dim(x_U, x, index, 0)


def _by_key_head(x_BtHh, K: int):
    B, t, H, h = x_BtHh.shape
    return x_BtHh.reshape(B, t, K, H // K, h)


def _gathered_blocks(x_BtKh, row: Row):
    """[V, B, K, s, h], by device."""
    return jax.lax.all_gather(_blocks(x_BtKh[:, :, :, None], row), AXIS, tiled=True)


def _scattered_blocks(x_VBKsh, row: Row):
    """Summed over devices, [B, t, K, h] of this one."""
    return _unblocked(jax.lax.psum_scatter(x_VBKsh, AXIS, tiled=True), row)[:, :, :, 0]


# --------------------------------------------------------------------------------------------------------------- splash


def attend_context_splash(q_BtHh, k_BtKh, v_BtKh, segments_BT, row: Row, interpret: bool = False):
    """JAX's splash attention kernel for TPU, with a causal mask of this device's queries; of whole blocks, without padding."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    block = _splash_block(row, q_BtHh.dtype)
    forward, to_keys = _splash_masks(row, block)
    kernel = splash.SplashAttentionKernel(
        forward,
        forward,
        to_keys,
        block_sizes=splash_sizes(block),
        is_mqa=True,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_at_or_before,
        interpret=interpret,
    )
    k_BTKh, v_BTKh = _gathered(k_BtKh, row), _gathered(v_BtKh, row)
    return with_splash(kernel, q_BtHh, k_BTKh, v_BTKh, row.own(segments_BT, NOWHERE), segments_BT)


def _splash_block(row: Row, dtype) -> int:
    block = splash_block(row.chunk)
    told = (row.share // block) * (row.length // block)
    larger = told > MOST_TOLD and row.chunk % 1024 == 0 and dtype.itemsize == 2  # blocks of float32 would not fit v4
    return 1024 if larger else block


def _at_or_before(query, key):
    return query >= key


def _splash_masks(row: Row, block: int):
    """What the kernel knows of the mask of this device: (by query, by key), each for one head.

    `block_mask` is 0 where a block is not visible at all, `data_next` the block to fetch at each step: the next one that is
    visible, so that nothing is fetched for the others. Within a block it compares `q_sequence`, the queries' places in the row,
    with those of the keys. JAX makes the same of a `Mask`, but for one device, and looks at each of its elements in numpy.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    queries, keys = row.share // block, row.length // block
    small = next(dtype for dtype in (jnp.int8, jnp.int16, jnp.int32) if max(queries, keys) <= jnp.iinfo(dtype).max)
    q_places_t = row.own(jnp.arange(row.length)[None], 0)[0].astype(jnp.int32)
    visible_UV = q_places_t[::block, None] // block >= jnp.arange(keys)
    query_UV, key_UV = jnp.indices((queries, keys))

    def mask(index_UV, axis: int, after: int):
        none = queries + keys
        next_UV = jax.lax.cummin(jnp.where(visible_UV, index_UV, none), axis=axis, reverse=True)
        next_UV = jnp.where(next_UV == none, after, next_UV).astype(small)
        return MaskInfo(next_UV[None], None, visible_UV.astype(jnp.int8)[None], None, q_places_t)

    # After its last key a block of queries has the next one's first; after the last queries, which see the most, none follow.
    return mask(key_UV, 1, 0), mask(query_UV, 0, queries - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x_Bt, row: Row):
    return row.whole(x_Bt)


def _gathered_backward(row, _, dx_BT):
    dtype, wide = dx_BT.dtype, wide_dtype(dx_BT)
    own = jax.ShapeDtypeStruct((dx_BT.shape[0], row.share, *dx_BT.shape[2:]), wide)
    return (jax.linear_transpose(row.whole, own)(dx_BT.astype(wide))[0].astype(dtype),)


_gathered.defvjp(lambda x_Bt, row: (row.whole(x_Bt), None), _gathered_backward)
