"""Scaled dot products of queries and keys, softmax, mix of values: the part of attention that has several forms.

B rows, T query positions, S key positions, H query heads, K key/value heads, G = H / K, h head width; n queries of a
chunk, which see the first s keys. The R = G n queries of a key head are the rows of one matrix product.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lumina.errors import ConfigError
from lumina_jax.platform import target_platform

CHUNK, MOST_CHUNKS = 64, 16  # queries; chunks of a row, as each is compiled by itself
HIDDEN = -1e30  # added to a score that a query must not see: its weight becomes an exact 0


# --------------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Form:
    """What one form of attention can honour. Empty tuples: any.

    All are causal, keep documents apart and have gradients. cuDNN's is not among them, as JAX's interface to it cannot keep
    documents apart.
    """

    name: str
    platforms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    length_multiple: int = 1  # lengths of rows must be multiples of it; of chunks, where rows are split
    split_rows: bool = True  # over the devices along a mesh's `context`

    def refusal(self, platform: str, dtype: Any, length: int, context: int = 1) -> str:
        """Why it cannot do this, in words; empty if it can."""
        dtype = jnp.dtype(dtype).name
        if self.platforms and platform not in self.platforms:
            return f"runs on {' or '.join(self.platforms)}, not on {platform}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {' or '.join(self.dtypes)}, not {dtype}"
        if context > 1 and not self.split_rows:
            return "takes rows on one device, not split over context"
        multiple = self.length_multiple * (2 * context if context > 1 else 1)
        if self.length_multiple > 1 and length % multiple:
            return f"takes rows whose length is a multiple of {multiple}, not {length}"
        return ""


FORMS = {
    form.name: form
    for form in (
        Form("chunked"),
        Form("reference", split_rows=False),
        Form("splash", platforms=("tpu",), dtypes=("bfloat16", "float32"), length_multiple=128),
    )
}
PREFERRED = {"tpu": "splash"}  # where it can; chunked is everywhere else


def choose_attention(form: str, platform: str, dtype: Any, length: int, context: int = 1) -> tuple[str, str]:
    """(name of the form to take, why).

    Args:
        form: one of FORMS, or `auto`.
        platform: cpu, gpu or tpu.
        dtype: of queries, keys and values.
        context: devices that one row is split over.

    Raises ConfigError when `form` is unknown, or cannot honour the rest.
    """
    asked = (platform, dtype, length, context)
    able = [name for name, known in FORMS.items() if not known.refusal(*asked)]
    if form == "auto":
        preferred = PREFERRED.get(platform, "chunked")
        if preferred in able:
            return preferred, f"auto: the fastest on {platform}"
        return "chunked", f"auto: {preferred} {FORMS[preferred].refusal(*asked)}"
    if form not in FORMS:
        raise ConfigError(f"model.attention_form = {form!r}: must be auto, {', '.join(FORMS)}")
    if form not in able:
        raise ConfigError(
            f"model.attention_form = {form!r}: {form} {FORMS[form].refusal(*asked)}; {', '.join(able)} would work"
        )
    return form, "as asked"


def attend(q_BTHh, k_BTKh, v_BTKh, segments_BT, form: str = "auto"):
    """Query t sees the keys at or before t that are in its segment. Softmax in at least float32.

    Returns [B, T, H, h] in q's dtype. Raises ConfigError as `choose_attention` does.
    """
    name, _ = choose_attention(form, target_platform(), q_BTHh.dtype, q_BTHh.shape[1])
    if name == "reference":
        return attend_chunk(q_BTHh, k_BTKh, v_BTKh, segments_BT, segments_BT)
    if name == "splash":
        return attend_splash(q_BTHh, k_BTKh, v_BTKh, segments_BT)
    return attend_chunked(q_BTHh, k_BTKh, v_BTKh, segments_BT)


# ------------------------------------------------------------------------------------------------- plain, and with a cache


def attend_chunk(q_BTHh, k_BSKh, v_BSKh, q_segments_BT, k_segments_BS, offset=0):
    """Query t, at index offset + t, sees the keys at or before its index that are in its segment. Softmax in float32.

    Returns [B, T, H, h] in q's dtype. Over a whole row this is the form `reference`: all scores at once.
    """
    T, S = q_BTHh.shape[1], k_BSKh.shape[1]
    causal_TS = offset + jnp.arange(T)[:, None] >= jnp.arange(S)[None, :]
    visible_BTS = causal_TS & (q_segments_BT[:, :, None] == k_segments_BS[:, None, :])
    return _full_softmax(q_BTHh, k_BSKh, v_BSKh, visible_BTS)


def attend_cached(q_BTHh, k_BSKh, v_BSKh, last_BT):
    """Query t sees the places 0 to last[t] of a cache. Softmax in float32. Returns [B, T, H, h] in q's dtype."""
    # Of a query that has none, any result will do.
    visible_BTS = jnp.arange(k_BSKh.shape[1]) <= jnp.maximum(last_BT, 0)[:, :, None]
    return _full_softmax(q_BTHh, k_BSKh, v_BSKh, visible_BTS)


def _full_softmax(q_BTHh, k_BSKh, v_BSKh, visible_BTS):
    B, T, H, h = q_BTHh.shape
    K, wide = k_BSKh.shape[2], wide_dtype(q_BTHh)
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    scores_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGh, k_BSKh, preferred_element_type=wide) / math.sqrt(h)
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS, jnp.finfo(wide).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKh.dtype)
    mixed_BTKGh = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKh, preferred_element_type=wide)
    return mixed_BTKGh.reshape(B, T, H, h).astype(q_BTHh.dtype)


def wide_dtype(x):
    """What sums of x are kept in: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


# ------------------------------------------------------------------------------------------------------------- chunked


def _chunks(T: int) -> list[tuple[int, int]]:
    """First and end of each chunk of queries: few, yet small enough that the scores of one stay in the processor's cache."""
    size = max(CHUNK, -(-T // MOST_CHUNKS))
    return [(a, min(a + size, T)) for a in range(0, T, size)]


def _rows(x_BTHh, K: int):
    """The queries of a key head together: [B, K, G, T, h]."""
    B, T, H, h = x_BTHh.shape
    return x_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4)


def _of_chunk(x_BKGTh, a: int, b: int):
    """[B, K, R, h] of the queries a to b."""
    B, K, G, _, h = x_BKGTh.shape
    return x_BKGTh[:, :, :, a:b].reshape(B, K, G * (b - a), h)


def _masked_scores(q_BKRh, k_BKsh, segments_BT, place_T, a: int, b: int):
    """[B, K, G, n, s] of the queries a to b, in the wide dtype; q is already scaled, place is 0 to T - 1."""
    B, K, R, _ = q_BKRh.shape
    scores_BKRs = jnp.einsum("bkrh,bksh->bkrs", q_BKRh, k_BKsh, preferred_element_type=wide_dtype(q_BKRh))
    causal_ns = place_T[a:b, None] >= place_T[None, :b]
    visible_Bns = causal_ns & (segments_BT[:, a:b, None] == segments_BT[:, None, :b])
    return jnp.where(visible_Bns[:, None, None], scores_BKRs.reshape(B, K, R // (b - a), b - a, b), HIDDEN)


@jax.custom_vjp
def attend_chunked(q_BTHh, k_BTKh, v_BTKh, segments_BT):
    """Chunks of queries, each against only the keys that it may see.

    The backward pass keeps the logarithms of the softmax's sums and computes the scores of a chunk again from them
    (FlashAttention-2, algorithm 2), so that no [T, T] array outlives a chunk. Arguments as in `attend`.
    """
    return _chunked_forward(q_BTHh, k_BTKh, v_BTKh, segments_BT)[0]


def _chunked_forward(q_BTHh, k_BTKh, v_BTKh, segments_BT):
    B, T, H, h = q_BTHh.shape
    K, wide = k_BTKh.shape[2], wide_dtype(q_BTHh)
    q_BKGTh = _rows(scaled(q_BTHh), K)
    k_BKTh, v_BKTh = k_BTKh.transpose(0, 2, 1, 3), v_BTKh.transpose(0, 2, 1, 3)
    own_segments_BT, place_T = beside(q_BTHh, (segments_BT, jnp.arange(T)))
    mixed, log_totals = [], []
    for a, b in _chunks(T):
        scores_BKGns = _masked_scores(_of_chunk(q_BKGTh, a, b), k_BKTh[:, :, :b], own_segments_BT, place_T, a, b)
        largest_BKGn1 = jnp.max(scores_BKGns, axis=-1, keepdims=True)
        weights_BKGns = jnp.exp(scores_BKGns - largest_BKGn1)  # a query sees itself, so what it must not see becomes 0
        total_BKGn1 = jnp.sum(weights_BKGns, axis=-1, keepdims=True)
        weights_BKRs = weights_BKGns.astype(v_BTKh.dtype).reshape(B, K, -1, b)
        mixed_BKRh = jnp.einsum("bkrs,bksh->bkrh", weights_BKRs, v_BKTh[:, :, :b], preferred_element_type=wide)
        mixed.append(mixed_BKRh.reshape(B, K, H // K, b - a, h) / total_BKGn1)
        log_totals.append(largest_BKGn1 + jnp.log(total_BKGn1))
    mixed_BTHh = jnp.concatenate(mixed, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h).astype(q_BTHh.dtype)
    return mixed_BTHh, (q_BTHh, k_BTKh, v_BTKh, segments_BT, mixed_BTHh, jnp.concatenate(log_totals, axis=3))


def _chunked_backward(saved, dmixed_BTHh):
    q_BTHh, k_BTKh, v_BTKh, segments_BT, mixed_BTHh, log_total_BKGT1 = saved
    B, T, H, h = q_BTHh.shape
    K, wide, dtype = k_BTKh.shape[2], wide_dtype(q_BTHh), q_BTHh.dtype
    q_BKGTh, dmixed_BKGTh = _rows(scaled(q_BTHh), K), _rows(dmixed_BTHh, K)
    k_BKTh, v_BKTh = k_BTKh.transpose(0, 2, 1, 3), v_BTKh.transpose(0, 2, 1, 3)
    dot_BKGT1 = _rows(jnp.sum(dmixed_BTHh.astype(wide) * mixed_BTHh.astype(wide), axis=-1, keepdims=True), K)
    dq, dk_BKhT, dv_BKhT = [], jnp.zeros((B, K, h, T), wide), jnp.zeros((B, K, h, T), wide)
    for a, b in _chunks(T):
        q_BKRh, dmixed_BKRh = _of_chunk(q_BKGTh, a, b), _of_chunk(dmixed_BKGTh, a, b)
        scores_BKGns = _masked_scores(q_BKRh, k_BKTh[:, :, :b], segments_BT, jnp.arange(T), a, b)
        weights_BKGns = jnp.exp(scores_BKGns - log_total_BKGT1[:, :, :, a:b])
        dweights_BKRs = jnp.einsum("bkrh,bksh->bkrs", dmixed_BKRh, v_BKTh[:, :, :b], preferred_element_type=wide)
        dweights_BKGns = dweights_BKRs.reshape(weights_BKGns.shape)
        dscores_BKRs = (weights_BKGns * (dweights_BKGns - dot_BKGT1[:, :, :, a:b])).astype(dtype).reshape(B, K, -1, b)
        weights_BKRs = weights_BKGns.astype(dtype).reshape(B, K, -1, b)
        dq_BKRh = jnp.einsum("bkrs,bksh->bkrh", dscores_BKRs, k_BKTh[:, :, :b], preferred_element_type=wide)
        dq.append(dq_BKRh.reshape(B, K, H // K, b - a, h))
        later = ((0, 0), (0, 0), (0, 0), (0, T - b))
        dk_BKhT += jnp.pad(_over_queries(q_BKRh, dscores_BKRs), later)
        dv_BKhT += jnp.pad(_over_queries(dmixed_BKRh, weights_BKRs), later)
    dq_BTHh = jnp.concatenate(dq, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h)
    to_keys = (0, 3, 1, 2)
    return (
        (dq_BTHh / math.sqrt(h)).astype(dtype),
        dk_BKhT.transpose(to_keys).astype(k_BTKh.dtype),
        dv_BKhT.transpose(to_keys).astype(v_BTKh.dtype),
        None,
    )


attend_chunked.defvjp(_chunked_forward, _chunked_backward)


def beside(q_BTHh, known):
    """`known`, which JAX cannot tell any longer to be the same for all layers.

    It computes ahead of a loop over layers what depends on none, and keeps it: here the masks, for each head by itself, of all
    that a row has to compare (the partial evaluation of `scan`).
    """
    return jax.lax.optimization_barrier((known, q_BTHh[:1, :1, :1, :1]))[0]


def scaled(q_BTHh):
    return (q_BTHh.astype(wide_dtype(q_BTHh)) / math.sqrt(q_BTHh.shape[-1])).astype(q_BTHh.dtype)


def _over_queries(x_BKRh, weights_BKRs):
    """[B, K, h, s]: the small side is turned, not the large one. Measured on CPU: 40 % of the time of the other way."""
    x_BKhR = jax.lax.optimization_barrier(x_BKRh.transpose(0, 1, 3, 2))
    return jnp.einsum("bkhr,bkrs->bkhs", x_BKhR, weights_BKRs, preferred_element_type=wide_dtype(x_BKRh))


# -------------------------------------------------------------------------------------------------------------- splash


def attend_splash(q_BTHh, k_BTKh, v_BTKh, segments_BT, interpret: bool = False):
    """JAX's splash attention kernel for TPU, one call for each row and key head. `interpret` runs it anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, group = q_BTHh.shape[1], q_BTHh.shape[2] // k_BTKh.shape[2]
    mask = splash.MultiHeadMask([splash.CausalMask((T, T))] * group)
    sizes = splash_sizes(splash_block(T))
    kernel = splash.make_splash_mqa_single_device(mask=mask, block_sizes=sizes, interpret=interpret)
    return with_splash(kernel, q_BTHh, k_BTKh, v_BTKh, segments_BT, segments_BT)


def splash_block(length: int) -> int:
    """Queries, and keys, of a block: the most that divide `length`, a multiple of 128."""
    return next(size for size in (512, 256, 128) if length % size == 0)


def splash_sizes(block: int):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": block for name in names}
    return splash.BlockSizes(**sizes)


def with_splash(kernel, q_BTHh, k_BSKh, v_BSKh, q_segments_BT, k_segments_BS):
    """[B, T, H, h] of a kernel that takes the query heads [G, T, h] of one row and one key head at a time."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    B, T, H, h = q_BTHh.shape

    def row(q_KGTh, k_KSh, v_KSh, q_segments_T, k_segments_S):
        segments = splash.SegmentIds(q=q_segments_T, kv=k_segments_S)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q_KGTh, k_KSh, v_KSh)

    keys = (k_BSKh.transpose(0, 2, 1, 3), v_BSKh.transpose(0, 2, 1, 3))
    mixed_BKGTh = jax.vmap(row)(_rows(scaled(q_BTHh), k_BSKh.shape[2]), *keys, q_segments_BT, k_segments_BS)
    return mixed_BKGTh.transpose(0, 3, 1, 2, 4).reshape(B, T, H, h).astype(q_BTHh.dtype)
