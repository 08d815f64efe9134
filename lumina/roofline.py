"""How fast a training step could be at best: what a device computes, reads and sends, over what its maker promises.

Bounds, not forecasts: each is a time below which no schedule gets. T positions of a row, n devices along some axes.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from lumina.architecture import block_tensors, capacity, counts, expert_capacity, layer_kinds, tensor_groups, use_of
from lumina.config import Config
from lumina.footprint import Footprint
from lumina.mesh import AXES, Sizes
from lumina.topology import Topology
from lumina.traffic import Transfer, compute_width, computed, plan

WHOLE_WEIGHTS = ("weights", "weights of embedding and head", "gradients")  # sent while something else is computed


class Bounds(NamedTuple):
    """Seconds that a step takes at least, by what it waits for."""

    compute: float
    memory: float
    links: float  # of a TPU slice or a GPU node, all axes together
    network: float  # between slices or nodes

    @property
    def at_best(self) -> float:
        """Everything at the same time."""
        return max(self)

    @property
    def in_turn(self) -> float:
        """One after the other: nothing overlaps."""
        return sum(self)

    @property
    def binding(self) -> str:
        return max(self._fields, key=lambda name: getattr(self, name))


# --------------------------------------------------------------------------------------------------------------- FLOPs


def model_flops(config: Config) -> int:
    """Of an optimizer step on all devices, without recomputation or padding: what MFU counts."""
    return counts(config).training_flops * config.train.batch_size * config.data.sequence_length


def executed_flops(config: Config) -> int:
    """Of an optimizer step on all devices, with what remat computes again and with slots of experts that stay empty."""
    model, remat = config.model, config.train.remat
    passes = 4 if remat == "full" else 3  # the backward pass is two
    if model.moe.balance_over == "batch" and config.train.micro_batches > 1:
        passes += 1  # for the load of the whole batch
    a_token = 6.0 * model.d_model * model.vocab_size  # the head's are formed with the loss, and never again
    for kind, layers in Counter(layer_kinds(model)).items():
        products, attention, experts = layer_flops(config, kind)
        a_token += layers * passes * (products + attention + experts)
        if remat == "dots":  # keeps products with weights, but neither attention's nor those of experts, which are batched
            a_token += layers * (attention + experts)
    if remat == "full":  # what a layer adds to the residual is not needed again, unless a gate has been multiplied with it
        for segment in plan(config):
            a_token -= segment.repeats * 2 * model.d_ff * model.d_model * (segment.kinds[-1] == "dense")
    return round(a_token * config.train.batch_size * config.data.sequence_length)


def attention_flops(config: Config) -> int:
    """The part of `executed_flops` that kernels of attention do."""
    again = 4 if config.train.remat != "none" else 3
    a_token = sum(layers * layer_flops(config, kind)[1] for kind, layers in Counter(layer_kinds(config.model)).items())
    return round(again * a_token * config.train.batch_size * config.data.sequence_length)


def layer_flops(config: Config, kind: str) -> tuple[float, float, float]:
    """A token's in the forward pass of a layer: (products with weights, scores and mixed values, products of experts)."""
    model, moe, T = config.model, config.model.moe, config.data.sequence_length
    taken = capacity(T, model.mod.capacity) if kind.endswith("+mod") else T
    attended = taken if model.mod.scope == "block" else T
    products = experts = 0.0
    for tensor in block_tensors(model, kind):
        named = dataclasses.replace(tensor, name=f"blocks.0.{tensor.name}")
        if not tensor.decayed:
            continue
        if ".experts." not in tensor.name:
            products += 2 * tensor.size * use_of(named, kind, model, T)[0]
        elif moe.dispatch == "capacity":
            experts += 2 * tensor.size * expert_capacity(model, taken) / T
        else:
            experts += 2 * tensor.size * use_of(named, kind, model, T)[0]
    attention = 4 * model.num_heads * model.head_dim * attended * (attended + 1) / 2 / T
    return products, attention, experts


# -------------------------------------------------------------------------------------------------------------- bounds


def touched_bytes(config: Config, sizes: Sizes, parts: Footprint) -> int:
    """Bytes that one device reads and writes at least in a step: its state once, and in every micro-batch the layers'
    weights as they are computed with, written and read in each pass, and the activations, written and read once."""
    state = 2 * (parts.parameters + parts.gradients + parts.optimizer)
    reads = 3 if config.train.remat == "full" else 2  # a weight's own gradient does not need it
    weights = sum(
        group.copies * computed(group.tensor, sizes) * compute_width(group.tensor, config)
        for group in tensor_groups(config.model)
        if len(group.tensor.shape) > 1 and group.layers
    )
    return state + config.train.micro_batches * (round(2 * reads * weights) + 2 * parts.activations)


def bounds(topology: Topology, sizes: Sizes, flops: int, touched: int, traffic: Iterable[Transfer]) -> Bounds:
    """Seconds of a step.

    Args:
        flops: of all devices.
        touched: bytes that one device reads and writes.
        traffic: what one device sends. All links of a chip carry all axes' together: how axes lie in a torus is left out, which
            makes this a bound for any placement.
    """
    chip = topology.chip
    links, network = split_traffic(traffic, sizes, topology.linked)
    return Bounds(
        compute=flops / (sizes.devices * chip.peak_flops / chip.devices),
        memory=touched / (chip.memory_bandwidth / chip.devices),
        links=links / (chip.link_bandwidth / chip.devices),
        network=network / (chip.network_bandwidth / chip.devices) if network else 0.0,
    )


def step_seconds(config: Config, topology: Topology, sizes: Sizes, parts: Footprint, traffic: Iterable[Transfer]) -> float:
    """Seconds of a step by which ways to split it are ranked: what its work takes at least, and what it then waits for.

    Weights are gathered, and gradients scattered, while something else is computed; tokens, keys and the residual stream, which
    the next product needs, are waited for.
    """
    traffic = list(traffic)
    hidden = [each for each in traffic if each.what in WHOLE_WEIGHTS]
    waited = [each for each in traffic if each.what not in WHOLE_WEIGHTS]
    work = bounds(topology, sizes, executed_flops(config), touched_bytes(config, sizes, parts), hidden)
    waits = bounds(topology, sizes, 0, 0, waited)
    return max(work.compute, work.memory, work.links + work.network) + waits.links + waits.network


def split_traffic(traffic: Iterable[Transfer], sizes: Sizes, linked: int) -> tuple[float, float]:
    """Bytes that one device sends over (links, network), if each `linked` devices in the order of the mesh share links."""
    links = network = 0.0
    for each in traffic:
        share = network_share(each.kind, each.axes, sizes, linked)
        links += each.bytes * (1 - share)
        network += each.bytes * share
    return links, network


def network_share(kind: str, axes: tuple[str, ...], sizes: Sizes, linked: int) -> float:
    """The share of a collective's bytes that leaves a slice or node.

    A ring over n devices, m groups of which are linked, crosses between them m times in n; of pairs, n - n / m of n - 1 cross.
    """
    n = sizes.along(axes)
    m = _groups(axes, sizes, linked)
    if m == 1:
        return 0.0
    return (n - n / m) / (n - 1) if kind == "all_to_all" else m / n


def _groups(axes: tuple[str, ...], sizes: Sizes, linked: int) -> int:
    """Slices or nodes that the devices of one collective lie in: the last axes of a mesh are nearest to each other."""
    within, groups = linked, 1
    for axis in reversed(AXES):
        size = getattr(sizes, axis)
        inside = max(1, min(size, within))
        if axis in axes:
            groups *= -(-size // inside)
        within = max(1, within // size)
    return groups
