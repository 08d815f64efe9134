"""Scaled dot products of queries and keys, softmax, mix of values: the part of attention that has several forms.

B rows, T query positions, S key positions, H query heads, K key/value heads, G = H / K, h head width, N = B T tokens.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina.errors import ConfigError

NO_DOCUMENT = 2**31 - 1  # of filling and of empty positions, at the end of a row: it is after every document


# --------------------------------------------------------------------------------------------------------------- forms


class Flash(NamedTuple):
    """A version of flash-attn, and what it runs on."""

    module: str
    name: str
    least: tuple[int, int]  # compute capability of the GPU
    most: tuple[int, int]
    head_most: int  # width of a head


# Newest first.
VERSIONS = (
    Flash("flash_attn.cute", "flash-attn 4", (9, 0), (99, 9), 128),
    Flash("flash_attn_interface", "flash-attn 3", (9, 0), (9, 9), 256),
    Flash("flash_attn", "flash-attn 2", (8, 0), (99, 9), 256),
)
TAKES = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "deterministic"}


@functools.cache
def flash_attention(head_dim: int) -> tuple[str, Callable[..., Any] | None]:
    """(name and version, the variable-length function) of the newest flash-attn that is installed, runs on this GPU and takes
    heads of this width and the arguments that it is given; None without one.

    Every layer asks, and to look in vain for three packages takes 0.3 ms (measured).
    """
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    for version in VERSIONS:
        if head_dim > version.head_most or (here and not version.least <= here <= version.most):
            continue
        try:  # a package that is there need not have been built for this machine
            function = importlib.import_module(version.module).flash_attn_varlen_func
            if inspect.signature(function).parameters.keys() >= TAKES:
                return version.name, function
        except (ImportError, AttributeError, OSError, TypeError, ValueError):
            continue
    return "", None


@dataclass(frozen=True)
class Form:
    """What one form of attention can honour. Empty tuples: any. All are causal, keep documents apart and have gradients."""

    name: str
    platforms: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    head_multiple: int = 1  # the width of a head must be a multiple of it
    head_most: int = 0  # and at most this; 0: any

    def refusal(self, platform: str, dtype: Any, head_dim: int) -> str:
        """Why it cannot do this, in words; empty if it can."""
        dtype = str(dtype).removeprefix("torch.")
        if self.platforms and platform not in self.platforms:
            return f"runs on {' or '.join(self.platforms)}, not on {platform}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {' or '.join(self.dtypes)}, not {dtype}"
        if head_dim % self.head_multiple or 0 < self.head_most < head_dim:
            return f"takes heads whose width is a multiple of {self.head_multiple}, at most {self.head_most}, not {head_dim}"
        if self.name == "flash" and flash_attention(head_dim)[1] is None:
            return "needs the package flash-attn, which is not installed here in a version for this GPU and these heads"
        return ""


FORMS = {
    form.name: form
    for form in (
        Form("sdpa"),
        Form("reference"),
        Form("flash", platforms=("cuda",), dtypes=("bfloat16", "float16"), head_multiple=8, head_most=256),
    )
}
PREFERRED = {"cuda": "flash"}  # where it can; sdpa is everywhere else


def choose_attention(form: str, platform: str, dtype: Any, head_dim: int) -> tuple[str, str]:
    """(name of the form to take, why).

    Args:
        form: one of FORMS, or `auto`.
        platform: cpu, cuda or mps.
        dtype: of queries, keys and values.

    Raises ConfigError when `form` is unknown, or cannot honour the rest.
    """
    asked = (platform, dtype, head_dim)
    able = [name for name, known in FORMS.items() if not known.refusal(*asked)]
    if form == "auto":
        preferred = PREFERRED.get(platform, "sdpa")
        if preferred in able:
            version = f", {flash_attention(head_dim)[0]}, rows packed without filling" if preferred == "flash" else ""
            return preferred, f"auto: the fastest on {platform}{version}"
        return "sdpa", f"auto: {preferred} {FORMS[preferred].refusal(*asked)}"
    if form not in FORMS:
        raise ConfigError(f"model.attention_form = {form!r}: PyTorch has auto, {', '.join(FORMS)}")
    if form not in able:
        raise ConfigError(
            f"model.attention_form = {form!r}: {form} {FORMS[form].refusal(*asked)}; {', '.join(able)} would work"
        )
    return form, "as asked"


# -------------------------------------------------------------------------------------------------- where tokens stand


class Packed(NamedTuple):
    """Rows without filling, a document after another, as the variable-length form takes them."""

    order_N: Tensor | None  # tokens in the order of documents; None: as they lie
    bounds: Tensor  # int32: the first token of each document, and the end
    longest: int


class Places:
    """Documents of the tokens and their positions in them, and what attention makes of these, once for all layers.

    Of empty positions, which take no part in routing, the segment is -1 or NO_DOCUMENT.
    """

    def __init__(self, segments_BT: Tensor, positions_BT: Tensor):
        self.segments_BT = segments_BT.masked_fill(segments_BT < 0, NO_DOCUMENT)
        self.positions_BT = positions_BT
        self._rotations: dict[tuple, tuple[Tensor, Tensor]] = {}

    def at(self, index_BC: Tensor) -> "Places":
        """The places of the tokens at `index`; those at -1 are filling, in no document of the others."""
        index = index_BC.clamp(min=0)
        segments_BC = self.segments_BT.gather(1, index).masked_fill(index_BC < 0, NO_DOCUMENT)
        return Places(segments_BC, self.positions_BT.gather(1, index))

    @functools.cached_property
    def real_BT(self) -> Tensor:
        """Whether a position is in a document, and not empty."""
        return self.segments_BT != NO_DOCUMENT

    @functools.cached_property
    def alone(self) -> bool:
        """Whether each row is one document."""
        return bool((self.segments_BT == self.segments_BT[:, :1]).all())

    @functools.cached_property
    def visible_BTT(self) -> Tensor:
        """Whether query t sees key s: not after it, and in its document."""
        T, segments_BT = self.segments_BT.shape[1], self.segments_BT
        causal_TT = torch.ones(T, T, dtype=torch.bool, device=segments_BT.device).tril()
        return causal_TT & (segments_BT[:, :, None] == segments_BT[:, None, :])

    @functools.cached_property
    def packed(self) -> Packed:
        """Documents need not lie together: a stable sort by row and document keeps the order that causality is about."""
        segments_BT, order_N = self.segments_BT.long(), None
        if bool((segments_BT[:, 1:] < segments_BT[:, :-1]).any()):
            sorted_BT, order_BT = segments_BT.sort(dim=1, stable=True)
            rows_B1 = torch.arange(len(segments_BT), device=segments_BT.device)[:, None] * segments_BT.shape[1]
            segments_BT, order_N = sorted_BT, (rows_B1 + order_BT).reshape(-1)
        begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
        begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
        starts = begins_BT.reshape(-1).nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([segments_BT.numel()])]).int()
        return Packed(order_N, bounds, int((bounds[1:] - bounds[:-1]).max()))

    def rotation(self, theta: float, half: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sines and cosines of the angles position * theta^(-i / half), [B, T, 1, half]; see `attention.rotary`."""
        if (theta, half, wide) not in self._rotations:
            frequencies = theta ** (-torch.arange(half, dtype=wide, device=self.positions_BT.device) / half)
            angles = self.positions_BT[:, :, None, None].to(wide) * frequencies
            self._rotations[theta, half, wide] = angles.sin(), angles.cos()
        return self._rotations[theta, half, wide]


# ------------------------------------------------------------------------------------------------------------ the forms


def attend(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, places: Places, form: str = "auto") -> Tensor:
    """Query t sees the keys at or before t that are in its document. Softmax in at least float32.

    Returns [B, T, H, h] in q's dtype. Raises ConfigError as `choose_attention` does.
    """
    name, _ = choose_attention(form, q_BTHh.device.type, q_BTHh.dtype, q_BTHh.shape[3])
    if name == "reference":
        return attend_masked(q_BTHh, k_BTKh, v_BTKh, places.visible_BTT)
    if name == "flash":
        return attend_packed(q_BTHh, k_BTKh, v_BTKh, places.packed)
    G = q_BTHh.shape[2] // k_BTKh.shape[2]
    # repeated by hand: with enable_gqa not every device takes its fast path
    q, k, v = (x.transpose(1, 2) for x in (q_BTHh, k_BTKh.repeat_interleave(G, 2), v_BTKh.repeat_interleave(G, 2)))
    if places.alone:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=places.visible_BTT[:, None])
    return mixed.transpose(1, 2)


def attend_packed(q_BTHh: Tensor, k_BTKh: Tensor, v_BTKh: Tensor, packed: Packed) -> Tensor:
    """flash-attn's variable-length form: documents one after another, none filled up, each causal."""
    attention, (B, T) = flash_attention(q_BTHh.shape[3])[1], q_BTHh.shape[:2]
    if attention is None:
        raise ConfigError("model.attention_form = 'flash': needs the package flash-attn; use sdpa")
    q, k, v = (x.reshape(B * T, *x.shape[2:]) for x in (q_BTHh, k_BTKh, v_BTKh))
    if packed.order_N is not None:
        q, k, v = (x[packed.order_N] for x in (q, k, v))
    bounds = {"cu_seqlens_q": packed.bounds, "cu_seqlens_k": packed.bounds}
    lengths = {"max_seqlen_q": packed.longest, "max_seqlen_k": packed.longest}
    # Unless told, its backward pass adds in an order of its own, whatever torch.use_deterministic_algorithms says.
    mixed = attention(q, k, v, causal=True, deterministic=True, **bounds, **lengths)
    mixed = mixed[0] if isinstance(mixed, tuple) else mixed  # some versions give the logarithms of the sums as well
    if packed.order_N is not None:
        mixed = mixed[torch.argsort(packed.order_N)]
    return mixed.reshape(q_BTHh.shape)


def attend_cached(q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, last_BT: Tensor) -> Tensor:
    """Query t sees the places 0 to last[t] of a cache. Softmax in float32. Returns [B, T, H, h] in q's dtype."""
    # Of a query that has none, any result will do.
    visible_BTS = torch.arange(k_BSKh.shape[1], device=last_BT.device) <= last_BT.clamp(min=0)[:, :, None]
    return attend_masked(q_BTHh, k_BSKh, v_BSKh, visible_BTS)


def attend_masked(q_BTHh: Tensor, k_BSKh: Tensor, v_BSKh: Tensor, visible_BTS: Tensor) -> Tensor:
    """The form `reference`: all scores at once."""
    B, T, H, h = q_BTHh.shape
    K, wide = k_BSKh.shape[2], torch.promote_types(q_BTHh.dtype, torch.float32)
    q_BTKGh = q_BTHh.reshape(B, T, K, H // K, h)
    scores_BKGTS = torch.einsum("btkgh,bskh->bkgts", q_BTKGh.to(wide), k_BSKh.to(wide)) / math.sqrt(h)
    scores_BKGTS = scores_BKGTS.masked_fill(~visible_BTS[:, None, None], torch.finfo(wide).min)
    weights_BKGTS = scores_BKGTS.softmax(dim=-1).to(v_BSKh.dtype)
    mixed_BTKGh = torch.einsum("bkgts,bskh->btkgh", weights_BKGTS.to(wide), v_BSKh.to(wide))
    return mixed_BTKGh.reshape(B, T, H, h).to(q_BTHh.dtype)
