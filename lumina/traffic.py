"""What one device sends in a training step, without any array: the collectives of the step's algorithm, tensor by tensor.

b rows of a micro-batch on a device, T positions of a row, t = T / context, C tokens that a Mixture-of-Depths layer takes,
c = C / context, rounded up; D model width, K key/value heads, h head width, E experts, k choices, A alternatives; w bytes of a
number in the compute dtype, M micro-batches, S bytes, n devices along the axes of a collective.
"""

import functools
import math
from typing import NamedTuple

from lumina.architecture import (
    LOGIT_CHUNK,
    Segment,
    Tensor,
    block_tensors,
    capacity,
    expert_capacity,
    layer_kinds,
    layer_plan,
    outer_tensors,
    tensor_groups,
)
from lumina.config import Config
from lumina.mesh import AXES, GATHERED, GATHERED_OVER, RULES, Sizes

FLOAT32 = 4  # bytes
TRANSPOSED = {  # what the backward pass does for what the forward pass did
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_reduce": "all_reduce",
    "all_to_all": "all_to_all",
    "permute": "permute",
}


class Transfer(NamedTuple):
    """Collectives of a step that do the same."""

    what: str
    kind: str  # all_gather, reduce_scatter, all_reduce, all_to_all or permute
    axes: tuple[str, ...]  # all of more than one device
    bytes: int  # that one device sends in a step
    count: int  # type: ignore[assignment]  # operations in a step; a tuple's own `count` has no use here


def sent(kind: str, size: float, n: int) -> float:
    """Bytes that each of n devices sends over a ring.

    `size` is S: of the result of an all_gather, of the argument of a reduce_scatter, all_reduce or all_to_all, of what a
    permute passes on. A gather passes on n - 1 parts of S / n; an all_reduce is a reduce_scatter and an all_gather (Patarasuk
    and Yuan, 2009).
    """
    if kind == "permute":
        return size
    return (2 if kind == "all_reduce" else 1) * size * (n - 1) / n


# ------------------------------------------------------------------------------------------------------------- tensors


def stored(tensor: Tensor, sizes: Sizes) -> int:
    """Numbers of the part of `tensor` that one device keeps."""
    parts = (sizes.along(over) for over in RULES.layout(tensor))
    return math.prod(-(-size // n) for size, n in zip(tensor.shape, parts, strict=True))


def computed(tensor: Tensor, sizes: Sizes) -> int:
    """Numbers of the part that a device computes with: what it keeps, gathered."""
    return stored(tensor, sizes) * sizes.along(gathered_over(tensor))


def gathered_over(tensor: Tensor) -> tuple[str, ...]:
    """The axes over which `tensor` is gathered to compute with it."""
    dimensions = zip(tensor.axes, RULES.layout(tensor), strict=True)
    return tuple(axis for logical, over in dimensions if logical in GATHERED for axis in over)


def width(config: Config) -> int:
    """w: bytes of a number in the compute dtype."""
    return 4 if config.train.compute_dtype == "float32" else 2


def compute_width(tensor: Tensor, config: Config) -> int:
    """Bytes of a number of `tensor` as it is computed with: what decides is never rounded."""
    decides = "router" in tensor.name or "predictor" in tensor.name
    return FLOAT32 if decides else width(config)


# ----------------------------------------------------------------------------------------------------------- collectives


class Account:
    """Collects transfers; drops those over axes of one device."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self._found: dict[tuple[str, str, tuple[str, ...]], tuple[float, int]] = {}

    def add(self, what: str, kind: str, axes: tuple[str, ...], size: float, count: int) -> None:
        """`count` collectives of S = `size` bytes each."""
        live = tuple(axis for axis in AXES if axis in axes and getattr(self.sizes, axis) > 1)
        if live and size and count:
            total, before = self._found.get((what, kind, live), (0.0, 0))
            moved = count * sent(kind, size, self.sizes.along(live))
            self._found[what, kind, live] = (total + moved, before + count)

    def transfers(self) -> list[Transfer]:
        """In the order in which they were first added."""
        return [Transfer(*key, round(total), count) for key, (total, count) in self._found.items()]


def transfers(config: Config, sizes: Sizes) -> list[Transfer]:
    """What one device sends in a training step, with the depth capacity that the config ends with.

    Metrics, the sums of the loss and the norm of the gradients are a few numbers each, and left out.
    """
    account, M = Account(sizes), config.train.micro_batches
    add_outer_weights(account, config)
    add_embedding_and_loss(account, config)
    for segment in plan(config):
        for place, kind in enumerate(segment.kinds):
            add_layer(account, config, kind, segment.repeats * M, closes=place + 1 == len(segment.kinds))
    add_gradients(account, config)
    return account.transfers()


def layer_transfers(config: Config, sizes: Sizes, kind: str) -> list[Transfer]:
    """What one device sends in one layer of this kind for one micro-batch, forward and backward."""
    account = Account(sizes)
    add_layer(account, config, kind, 1)
    return account.transfers()


def plan(config: Config) -> list[Segment]:
    """The segments of layers that a step is compiled of."""
    return _plan(tuple(layer_kinds(config.model)))


@functools.cache
def _plan(kinds: tuple[str, ...]) -> list[Segment]:
    return layer_plan(list(kinds))


def forward_passes(config: Config) -> int:
    """Of a micro-batch: one more where the balance loss needs the load of the whole batch before the first gradient."""
    moe, routed = config.model.moe, any(kind.startswith("moe") for kind in layer_kinds(config.model))
    return 2 if routed and moe.balance_over == "batch" and config.train.micro_batches > 1 else 1


def _add_weight(account: Account, config: Config, what: str, tensor: Tensor, gathers: int, scatters: int) -> None:
    """Weights in the dtype that they are computed with, S = numbers * w; gradients in float32, S = numbers * 4."""
    axes, numbers = gathered_over(tensor), computed(tensor, account.sizes)
    account.add(what, "all_gather", axes, numbers * compute_width(tensor, config), gathers)
    account.add(what, "reduce_scatter", axes, numbers * FLOAT32, scatters)


def add_outer_weights(account: Account, config: Config) -> None:
    """The embedding, gathered for the lookup and, where it is the head too, for the loss, or else the head. Neither is needed
    again for the backward pass, and each use has its gradient."""
    M, passes, tied = config.train.micro_batches, forward_passes(config), config.model.tie_embeddings
    for tensor in outer_tensors(config.model):
        head = tensor.name.startswith("head")
        gathers, scatters = (1, 1) if head else (passes + tied, 1 + tied)
        _add_weight(account, config, "weights of embedding and head", tensor, gathers * M, scatters * M)


def add_gradients(account: Account, config: Config) -> None:
    """Gradients, once a step, over the axes that do not split them: S = numbers kept * 4. Stacked layers are one array."""
    segments = plan(config)
    for group in tensor_groups(config.model):
        if not group.tensor.trained:
            continue
        split = {axis for over in RULES.layout(group.tensor) for axis in over}
        axes = tuple(axis for axis in AXES if axis not in split)
        stacks = [len(set(s.layers(p)) & set(group.layers)) for s in segments for p in range(len(s.kinds))]
        for layers in filter(None, stacks if group.layers else [1]):
            account.add("gradients", "all_reduce", axes, layers * stored(group.tensor, account.sizes) * FLOAT32, 1)


def rows_at_once(config: Config, sizes: Sizes) -> int:
    """b: rows of a micro-batch on one device."""
    return max(1, config.train.batch_size // config.train.micro_batches // sizes.row_parts)


def add_embedding_and_loss(account: Account, config: Config) -> None:
    """Over `tensor`: a device looks up what is in its part of the vocabulary, and the sum is scattered along the sequence,
    S = b t D w. For the loss it has all positions, S = b t D w, and its part of the logits, of whose softmax two float32 a
    token (the largest and the sum) are reduced, a chunk at a time."""
    sizes, model, M = account.sizes, config.model, config.train.micro_batches
    b, t = rows_at_once(config, sizes), config.data.sequence_length // sizes.context
    hidden = b * t * model.d_model * width(config)
    account.add("embedding lookup", "reduce_scatter", ("tensor",), hidden, forward_passes(config) * M)
    account.add("embedding lookup", "all_gather", ("tensor",), hidden, M)
    account.add("hidden state for the loss", "all_gather", ("tensor",), hidden, M)
    account.add("hidden state for the loss", "reduce_scatter", ("tensor",), hidden, M)
    chunk = min(LOGIT_CHUNK, b * t)
    account.add("softmax of the loss", "all_reduce", ("tensor",), chunk * FLOAT32, 2 * -(-b * t // chunk) * M)


def share(tokens: int, context: int) -> int:
    """Of so many tokens of a row those of one device: an early and a late part of equal length, padded."""
    return tokens if context == 1 else 2 * -(-tokens // (2 * context))


def add_layer(account: Account, config: Config, kind: str, times: int, closes: bool = True) -> None:
    """What a layer of this kind sends, `times` over. One that `closes` its period is not computed again for a layer after it.

    Each collective of the forward pass has its transpose in the backward pass. What was gathered is not kept for that where
    weights are gathered, and under a remat policy nothing is: it is sent again, but for what only the next layer needs. Without
    one it may be a little less, where a copy in another shape is kept.
    """
    sizes, model, passes = account.sizes, config.model, forward_passes(config)
    remat, forgets = config.train.remat != "none", sizes.along(GATHERED_OVER) > 1

    def both_ways(what: str, how: str, axis: str, size: float, count: int = 1, needed: bool = True, back: float = 0) -> None:
        again = needed and (remat or (forgets and how == "all_gather"))
        account.add(what, how, (axis,), size, count * times * (passes + again))
        account.add(what, TRANSPOSED[how], (axis,), back or size, count * times)

    for tensor in block_tensors(model, kind):
        _add_weight(account, config, "weights", tensor, (passes + 1) * times, times)
    b, T, row = rows_at_once(config, sizes), config.data.sequence_length, model.d_model * width(config)
    mod = kind.endswith("+mod")
    C = capacity(T, model.mod.capacity) if mod else T
    t, c = T // sizes.context, share(C, sizes.context)
    block = mod and model.mod.scope == "block"
    hops = (
        sizes.context if sizes.context % 2 == 0 and sizes.context > 2 else sizes.context - 1
    )  # at most, both ways round a ring

    # The residual stream is split along the sequence (Korthikanti et al., 2022), blocks have all of it: S = b t D w.
    if block:  # around both; between them the tokens taken alone, S = b c D w
        both_ways("residual to layer", "all_gather", "tensor", b * t * row)
        both_ways("residual within layer", "all_reduce", "tensor", b * c * row)
        both_ways("residual from layer", "reduce_scatter", "tensor", b * t * row, needed=not closes)
    else:
        both_ways("residual to attention", "all_gather", "tensor", b * t * row)
        both_ways("residual from attention", "reduce_scatter", "tensor", b * t * row)
        both_ways("residual to feed-forward", "all_gather", "tensor", b * t * row)
        both_ways("residual from feed-forward", "reduce_scatter", "tensor", b * t * row, needed=not closes)

    # Keys and values of the own heads, of all positions that attend: S = b T (K / tensor) h w each, gradients in float32.
    keys = b * (c * sizes.context if block else T) * model.num_kv_heads // sizes.tensor * model.head_dim
    both_ways("keys and values", "all_gather", "context", keys * width(config), 2, back=keys * FLOAT32)
    if mod:
        # A router's and a predictor's logit a token in float32, S = b T 4. The tokens taken are spread evenly, and their
        # results go back to where they came from: round the ring what a device has, S = b t D w and b c D w.
        both_ways("routing logits", "all_gather", "context", b * T * FLOAT32, 2)
        both_ways("tokens to layer", "permute", "context", b * t * row, hops)
        both_ways("tokens from layer", "permute", "context", b * c * row, hops, needed=not closes)
    if not kind.startswith("moe"):
        return

    moe = model.moe
    # S = b C A 4, as all below with the padding that spreads tokens evenly.
    both_ways("routing logits", "all_gather", "context", b * c * sizes.context * (moe.num_experts + moe.noop_experts) * FLOAT32)
    if moe.dispatch == "capacity":
        # Each device fills its share of the slots of all experts, S = b E (slots / context) D w, from all of a row; they travel
        # to the experts and back, and the row's tokens fetch their results.
        slots = b * moe.num_experts * share(expert_capacity(model, C), sizes.context) * row
        both_ways("tokens to slots", "permute", "context", b * c * row, hops)
        both_ways("slots to experts", "all_to_all", "expert", slots)
        both_ways("slots from experts", "all_to_all", "expert", slots)
        both_ways("tokens from slots", "permute", "context", slots, hops)
    else:
        # The tokens of all rows along `expert`, S = n b c D w, their choices in int32 and gates; the sum of the results back.
        tokens = sizes.expert * b * c
        both_ways("tokens to experts", "all_gather", "expert", tokens * row)
        both_ways("gates to experts", "all_gather", "expert", tokens * moe.top_k * width(config))
        account.add("choices to experts", "all_gather", ("expert",), tokens * moe.top_k * 4, times * (passes + 1))
        both_ways("tokens from experts", "reduce_scatter", "expert", tokens * row, needed=mod or not closes)
