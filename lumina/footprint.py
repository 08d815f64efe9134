"""How many bytes a training step holds on each device, by part, without any array.

b rows of a micro-batch on a device, T positions of a row, t = T / context, D model width, H query heads, K key/value heads,
h head width, F feed-forward width, E experts, V vocabulary, w bytes of a number in the compute dtype.
"""

from typing import NamedTuple

from lumina.architecture import LOGIT_CHUNK, block_tensors, capacity, expert_capacity, layer_kinds, outer_tensors, tensor_groups
from lumina.config import Config
from lumina.mesh import GATHERED_OVER, Sizes
from lumina.traffic import FLOAT32, compute_width, computed, gathered_over, plan, rows_at_once, stored, width

LIVE = 2  # layers whose gathered weights exist at once: one is gathered while another is computed


class Footprint(NamedTuple):
    """Bytes on one device, by part."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # what the backward pass keeps of each layer, and of the one that it works on
    temporaries: int  # all else: gathered weights and their gradients, the loss

    @property
    def total(self) -> int:
        return sum(self)


ONE_DEVICE = Sizes()


def footprint(config: Config, sizes: Sizes = ONE_DEVICE) -> Footprint:
    """Estimate what one device holds at the worst moment of a training step.

    That is its parts of the float32 parameters, gradients and AdamW moments, and the activations of its rows of a micro-batch.

    The scores of a chunk of queries are left out: short rows hardly notice, long ones need a fused kernel.
    """
    groups = tensor_groups(config.model)
    parameters = FLOAT32 * sum(group.copies * stored(group.tensor, sizes) for group in groups)
    trained = FLOAT32 * sum(group.copies * stored(group.tensor, sizes) for group in groups if group.tensor.trained)
    gradients = trained if config.train.micro_batches == 1 else 2 * trained  # a sum, and a micro-batch's own
    activations, temporaries = of_activations(config, sizes), of_temporaries(config, sizes)
    return Footprint(parameters, gradients, 2 * trained, round(activations), round(temporaries))


class _Layer(NamedTuple):
    """Numbers that a layer of one kind holds of the tokens of a device."""

    all: float  # what the backward pass needs
    gathered: float  # of it, what other devices have as well
    dots: float  # of it, the matrix products that `dots` keeps
    wide: float  # gradients of hidden, gate and up


def _residual(config: Config, sizes: Sizes) -> float:
    """Numbers of the residual stream on one device: b T / (context tensor) D."""
    b, T = rows_at_once(config, sizes), config.data.sequence_length
    return b * T / (sizes.context * sizes.tensor) * config.model.d_model


def of_activations(config: Config, sizes: Sizes) -> float:
    """Bytes that the backward pass keeps: with remat the residual before each period of layers, and one period at a time."""
    segments = plan(config)
    found = {kind: _layer(config, sizes, kind) for segment in segments for kind in segment.kinds}
    layers = [found[kind] for segment in segments for kind in segment.kinds * segment.repeats]
    if config.train.remat == "none" and sizes.along(GATHERED_OVER) == 1:
        return width(config) * sum(layer.all for layer in layers)
    if config.train.remat == "none":  # what was gathered is not kept, but for the layer that is worked on
        once = max(layer.gathered for layer in layers)
        return width(config) * (sum(layer.all - layer.gathered for layer in layers) + once)
    kept = _residual(config, sizes) * sum(segment.repeats for segment in segments)
    kept += max(sum(found[kind].all for kind in segment.kinds) for segment in segments)
    if config.train.remat == "dots":
        kept += sum(layer.dots for layer in layers)
    return width(config) * kept


def _layer(config: Config, sizes: Sizes, kind: str) -> _Layer:
    """Numbers a token, by comparison of what XLA keeps of compiled steps of the presets (tests hold the sum to 25 %).

    Of the 5 D about attention and the 5 D about the feed-forward, 2 each are of all positions along `tensor`: what is gathered
    and the partial sum.
    """
    model, moe, T = config.model, config.model.moe, config.data.sequence_length
    D, H, K, h, F = (
        model.d_model,
        model.num_heads // sizes.tensor,
        model.num_kv_heads // sizes.tensor,
        model.head_dim,
        model.d_ff / sizes.tensor,
    )
    mod, share = model.mod, 1.0
    if kind.endswith("+mod"):
        share = capacity(T, max(mod.capacity, mod.start_capacity if mod.anneal_steps else 0)) / T
    taken, attended = round(T * share), share if mod.scope == "block" else 1.0
    whole_row = 2 * K * h * (sizes.context - 1)  # of keys and values, the other devices'
    attention = 3 * D / sizes.tensor + 2 * D + 3 * H * h + 4 * K * h + whole_row  # q twice (RoPE), values out; k twice, v
    slots, dense = 1.0, 5 * F + 2 * D
    feedforward, dots = dense, 2 * F + D
    if kind.startswith("moe"):
        shared = moe.shared_experts * 5 * F
        dots = moe.shared_experts * 2 * F + (D if moe.shared_experts else 0)
        if moe.dispatch == "capacity":
            slots = moe.num_experts * expert_capacity(model, taken) / taken
            travelling = 2 * D * slots if sizes.expert > 1 else 0  # on their way to the experts' devices, and back
            feedforward = slots * (3 * D + 5 * F) + travelling + moe.top_k * D + shared
        else:  # keeps gate and up of each choice; the rest exists for a block at a time
            slots = moe.top_k * sizes.expert  # all rows along `expert` may choose the experts of one device
            feedforward = slots * (3 * D + 2 * F) + (2 * D * sizes.expert if sizes.expert > 1 else 0) + shared
    tokens = rows_at_once(config, sizes) * T / sizes.context
    gathered = attended * whole_row + (attended + share) * (D if sizes.tensor > 1 else 0)
    numbers = attended * attention + 3 * D / sizes.tensor + share * feedforward
    dots = attended * (H * h + 2 * K * h + D) + share * dots
    return _Layer(tokens * numbers, tokens * gathered, tokens * dots, tokens * share * slots * 3 * F)


def of_temporaries(config: Config, sizes: Sizes) -> float:
    """Bytes that come and go: the gradients inside of the widest layer, weights as they are computed with, logits.

    The head is gathered, with its gradient in float32, when no layer's weights are.
    """
    model, w = config.model, width(config)
    kinds = set(layer_kinds(model))
    wide = max(_layer(config, sizes, kind).wide for kind in kinds) * w
    tokens = rows_at_once(config, sizes) * config.data.sequence_length / sizes.context
    logits = min(tokens, LOGIT_CHUNK) * model.vocab_size / sizes.tensor * FLOAT32
    gathered = max(*(layer_weights(config, sizes, kind) for kind in kinds), outer_weights(config, sizes))
    return wide + 3 * _residual(config, sizes) * w + 3 * logits + gathered


def layer_weights(config: Config, sizes: Sizes, kind: str) -> float:
    """Bytes of the weights of layers of this kind while they are computed with, and of a gradient before it is scattered."""
    weights = gradient = 0
    for tensor in block_tensors(config.model, kind):
        numbers = computed(tensor, sizes)
        if sizes.along(gathered_over(tensor)) > 1:
            weights += numbers * compute_width(tensor, config)
            gradient = max(gradient, numbers * FLOAT32)
        elif len(tensor.shape) > 1 and compute_width(tensor, config) < FLOAT32:
            weights += numbers * compute_width(tensor, config)
    return LIVE * weights + gradient


def outer_weights(config: Config, sizes: Sizes) -> float:
    """Bytes of the head or the embedding while it is computed with, and of its gradient in float32 before it is scattered."""
    most = 0
    for tensor in outer_tensors(config.model):
        numbers = computed(tensor, sizes)
        if sizes.along(gathered_over(tensor)) > 1:
            most = max(most, numbers * (compute_width(tensor, config) + FLOAT32))
        elif len(tensor.shape) > 1 and compute_width(tensor, config) < FLOAT32:
            most = max(most, numbers * compute_width(tensor, config))
    return most
