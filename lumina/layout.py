"""Which mesh for a number of devices: every one that there could be, and the one that fits their memory and sends the least."""

import bisect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

from lumina import mesh
from lumina.architecture import counts
from lumina.config import Config, MeshConfig
from lumina.errors import ConfigError
from lumina.footprint import footprint
from lumina.mesh import AXES, Sizes
from lumina.runs.units import duration, gib
from lumina.traffic import transfers

SHARE = 0.9  # of a device's memory; the rest is for what the estimate misses, the compiler's buffers and the collectives'
TOLD = 3  # layouts passed over that are told
WHOLE_WEIGHTS = ("weights", "weights of embedding and head", "gradients")  # sent while something else is computed


class Rates(NamedTuple):
    """How fast one device is."""

    flops: float  # a second, in the compute dtype
    bandwidth: float  # bytes a second that it sends to the others


class Layout(NamedTuple):
    """A mesh with the fewest micro-batches that fit, or that need the least where none does."""

    sizes: Sizes
    micro_batches: int
    needed: int  # bytes on a device
    sent: int  # bytes of a device in a step
    seconds: float  # of a step at the given rates; without rates 0

    @property
    def rank(self) -> tuple:
        """Lower is better: time, else bytes; then fewer micro-batches; then the plainer mesh, and `data` before the others."""
        plain = sum(size > 1 for size in self.sizes)
        return self.seconds, self.sent, self.micro_batches, plain, tuple(-size for size in self.sizes)


def candidates(config: Config, devices: int) -> list[Sizes]:
    """Every mesh of exactly so many devices that the rows of a batch and the tensors of the model can be split over."""
    found = []
    whole_batch = replace(config, train=replace(config.train, micro_batches=1))
    for sizes in _factored(devices, len(AXES)):
        try:
            mesh.check(whole_batch, Sizes(*sizes))
        except ConfigError:
            continue
        found.append(Sizes(*sizes))
    return found


def micro_batches(config: Config, sizes: Sizes) -> list[int]:
    """Every number of micro-batches whose rows can be split so, fewest first; where balance is over one, the one asked for."""
    rows, moe = config.train.batch_size // sizes.row_parts, config.model.moe
    decided = moe.balance_over == "micro_batch" and moe.pattern != "none"
    return [n for n in range(1, rows + 1) if rows % n == 0 and (not decided or n == config.train.micro_batches)]


def choose(config: Config, devices: int, memory_bytes: int, rates: Rates | None = None) -> tuple[Config, str]:
    """`config` with a mesh and micro-batches for so many devices of so much memory, and why, in a few lines.

    Of the layouts that fit, it is the one whose step is the shortest at `rates`; without them, that sends the fewest bytes, as
    all compute the same.

    Raises ConfigError where no layout fits, or the devices cannot split the model at all.
    """
    usable = int(memory_bytes * SHARE)
    meshes = [sizes for sizes in candidates(config, devices) if micro_batches(config, sizes)]
    if config.model.moe.pattern == "none":  # without experts their axis does what fsdp does
        meshes = [sizes for sizes in meshes if sizes.expert == 1] or meshes
    found = sorted((_best(config, sizes, usable, rates) for sizes in meshes), key=lambda one: one.rank)
    if not found:
        fits = max((n for n in range(1, devices) if candidates(config, n)), default=1)
        raise ConfigError(
            f"mesh.auto: {devices} devices cannot share train.batch_size = {config.train.batch_size} rows and the tensors of "
            f"this model; {fits} can"
        )
    fitting = [one for one in found if one.needed <= usable]
    given = f"{devices} devices of {gib(memory_bytes)}, of which {SHARE:.0%} are used"
    if not fitting:
        least = min(found, key=lambda one: (one.needed, one.rank))
        instead = "train.remat=full" if config.train.remat != "full" else "shorter rows"
        raise ConfigError(
            f"mesh.auto: no layout fits {given}; the least, {_named(config, least)}, needs {gib(least.needed)}; "
            f"use more devices or {instead}"
        )
    best = fitting[0]
    lines = [f"{given}", f"chosen: {_named(config, best)}: needs {gib(best.needed)}, {_cost(best)}"]
    too_large = [one for one in found if one.rank < best.rank]
    lines += [f"passed over: {one.sizes}: needs {gib(one.needed)} of {gib(usable)}" for one in too_large[:TOLD]]
    lines += [f"passed over: {one.sizes}: fits, {_cost(one)}" for one in fitting[1:2]]
    chosen = deepcopy(config)
    chosen.mesh = MeshConfig(**best.sizes._asdict(), auto=config.mesh.auto)
    chosen.train.micro_batches = best.micro_batches
    return chosen, "\n".join(lines)


def _factored(product: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `product` as so many factors in order."""
    if parts == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for rest in _factored(product // first, parts - 1):
                yield first, *rest


def _best(config: Config, sizes: Sizes, usable: int, rates: Rates | None) -> Layout:
    def divided(count: int) -> Config:
        return replace(config, train=replace(config.train, micro_batches=count))

    def needed(count: int) -> int:
        return footprint(divided(count), sizes).total

    allowed = micro_batches(config, sizes)
    count = allowed[0]
    if needed(count) > usable and len(allowed) > 1:  # from two on there is a second gradient
        several = allowed[1:]
        first = bisect.bisect_left(several, True, key=lambda count: needed(count) <= usable)
        count = several[min(first, len(several) - 1)]
        count = count if needed(count) <= usable or needed(count) < needed(1) else 1
    sent = transfers(divided(count), sizes)
    seconds = 0.0
    if rates:
        tokens = config.train.batch_size * config.data.sequence_length
        computing = counts(config).training_flops * tokens / sizes.devices / rates.flops
        hidden = sum(each.bytes for each in sent if each.what in WHOLE_WEIGHTS) / rates.bandwidth
        seconds = max(computing, hidden) + sum(each.bytes for each in sent) / rates.bandwidth - hidden
    return Layout(sizes, count, needed(count), sum(each.bytes for each in sent), seconds)


def _named(config: Config, layout: Layout) -> str:
    rows = config.train.batch_size // layout.micro_batches // layout.sizes.row_parts
    several = f"{layout.micro_batches} micro-batches" if layout.micro_batches > 1 else "one micro-batch"
    return f"{layout.sizes}, {several}, {rows} row{'s' if rows > 1 else ''} of a device at a time"


def _cost(layout: Layout) -> str:
    took = f", takes about {duration(layout.seconds)} at the given rates" if layout.seconds else ""
    return f"sends {gib(layout.sent)} a step{took}"
