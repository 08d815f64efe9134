"""Which mesh, micro-batches and remat policy for some devices: all that there could be, ranked by one rule for all who ask.

Of what fits their memory by our estimate, it is the one whose step should be the shortest (`lumina.roofline.step_seconds`).
"""

import bisect
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

from lumina import mesh
from lumina.config import Config, MeshConfig
from lumina.errors import ConfigError
from lumina.footprint import footprint
from lumina.mesh import AXES, Sizes
from lumina.roofline import executed_flops, step_seconds
from lumina.runs.units import gib
from lumina.topology import FLOPS_A_LINK_BYTE, FLOPS_A_MEMORY_BYTE, Topology
from lumina.traffic import transfers

SHARE = 0.9  # of a device's memory; the rest is for what the estimate misses, the compiler's buffers and the collectives'
TOLD = 3  # layouts passed over that are told
REMAT = ("none", "dots", "full")


class Layout(NamedTuple):
    """A mesh with the fewest micro-batches that fit, or that need the least where none does."""

    sizes: Sizes
    remat: str
    micro_batches: int
    needed: int  # bytes on a device
    sent: int  # bytes of a device in a step
    computing: float  # seconds of a step's FLOPs alone
    seconds: float  # expected of a step

    @property
    def rank(self) -> tuple:
        """Lower is better: time, to two digits, as no estimate knows more; bytes; fewer micro-batches; then the plainer
        mesh, and `data` before the others."""
        plain = sum(size > 1 for size in self.sizes)
        return float(f"{self.seconds:.2g}"), self.sent, self.micro_batches, plain, tuple(-size for size in self.sizes)

    def of(self, config: Config) -> Config:
        """A copy of `config`, split so."""
        split = deepcopy(config)
        split.mesh = MeshConfig(**self.sizes._asdict(), auto=config.mesh.auto)
        split.train.micro_batches, split.train.remat = self.micro_batches, self.remat
        return split


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


def require_shared(config: Config, devices: int) -> None:
    """Raise a ConfigError where so many devices cannot split the batch and the model at all, whatever their memory."""
    if not any(micro_batches(config, sizes) for sizes in candidates(config, devices)):
        raise _unshared(config, devices)


def _unshared(config: Config, devices: int) -> ConfigError:
    fits = max((n for n in range(1, devices) if candidates(config, n)), default=1)
    return ConfigError(
        f"mesh.auto: {devices} devices cannot share train.batch_size = {config.train.batch_size} rows and the tensors of "
        f"this model; {fits} can"
    )


def usable(memory_bytes: int) -> int:
    """Bytes of a device that an estimate may take."""
    return int(memory_bytes * SHARE)


def layouts(config: Config, topology: Topology, memory_bytes: int, remats: tuple[str, ...] = REMAT) -> list[Layout]:
    """Every mesh and remat policy for the topology, each with the fewest micro-batches that fit; the best of all first.

    What does not fit is there as well. Where no datasheet tells how fast a device is, ratios of speeds are assumed.
    """
    meshes = [sizes for sizes in candidates(config, topology.devices) if micro_batches(config, sizes)]
    meshes = [sizes for sizes in meshes if sizes.data % topology.slices == 0]  # only `data` goes over the network of slices
    if config.model.moe.pattern == "none":  # without experts their axis does what fsdp does
        meshes = [sizes for sizes in meshes if sizes.expert == 1] or meshes
    topology = topology._replace(chip=topology.chip.filled())
    found = [
        _best(replace(config, train=replace(config.train, remat=remat)), sizes, topology, usable(memory_bytes))
        for remat in remats
        for sizes in meshes
    ]
    return sorted(found, key=lambda one: one.rank)


def choose(config: Config, topology: Topology, memory_bytes: int) -> tuple[Config, str]:
    """`config` with a mesh and micro-batches for a topology whose devices have so much memory, and why, in a few lines.

    Depends on nothing but its arguments, so that all processes of a run choose the same.

    Raises ConfigError where no layout fits, or the devices cannot split the model at all.
    """
    devices, found = topology.devices, layouts(config, topology, memory_bytes, (config.train.remat,))
    if not found:
        raise _unshared(config, devices)
    limit = usable(memory_bytes)
    fitting = [one for one in found if one.needed <= limit]
    given = f"{devices} devices of {gib(memory_bytes)}, of which {SHARE:.0%} are used"
    if not fitting:
        least = min(found, key=lambda one: (one.needed, one.rank))
        instead = "train.remat=full" if config.train.remat != "full" else "shorter rows"
        raise ConfigError(
            f"mesh.auto: no layout fits {given}; the least, {_named(config, least)}, needs {gib(least.needed)}; "
            f"use more devices or {instead}"
        )
    best, known = fitting[0], bool(topology.chip.peak_flops)
    lines = [f"{given}; {_speeds(topology)}"]
    lines.append(
        f"chosen, of those that fit the fastest: {_named(config, best)}: needs {gib(best.needed)}, {_cost(best, known)}"
    )
    too_large = [one for one in found if one.rank < best.rank]
    lines += [f"passed over: {one.sizes}: needs {gib(one.needed)} of {gib(limit)}" for one in too_large[:TOLD]]
    lines += [f"passed over: {one.sizes}: fits, {_cost(one, known)}" for one in fitting[1:2]]
    return best.of(config), "\n".join(lines)


def with_mesh(config: Config, topology: Topology, memory_bytes: int) -> tuple[Config, str]:
    """`choose` where the config names no mesh and the memory is known; a mesh that it names is taken as it is."""
    if mesh.named(config.mesh) or not memory_bytes:
        return config, ""
    return choose(config, topology, memory_bytes)


def _factored(product: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `product` as so many factors in order."""
    if parts == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for rest in _factored(product // first, parts - 1):
                yield first, *rest


def _best(config: Config, sizes: Sizes, topology: Topology, limit: int) -> Layout:
    def divided(count: int) -> Config:
        return replace(config, train=replace(config.train, micro_batches=count))

    def needed(count: int) -> int:
        return footprint(divided(count), sizes).total

    allowed = micro_batches(config, sizes)
    count = allowed[0]
    if needed(count) > limit and len(allowed) > 1:  # from two on there is a second gradient
        several = allowed[1:]
        first = bisect.bisect_left(several, True, key=lambda count: needed(count) <= limit)
        count = several[min(first, len(several) - 1)]
        count = count if needed(count) <= limit or needed(count) < needed(1) else 1
    split = divided(count)
    parts, sent = footprint(split, sizes), transfers(split, sizes)
    computing = executed_flops(split) / (topology.chips * topology.chip.peak_flops)
    seconds = step_seconds(split, topology, sizes, parts, sent)
    whole = sum(each.bytes for each in sent)
    return Layout(sizes, config.train.remat, count, parts.total, whole, computing, seconds)


def _named(config: Config, layout: Layout) -> str:
    rows = config.train.batch_size // layout.micro_batches // layout.sizes.row_parts
    several = f"{layout.micro_batches} micro-batches" if layout.micro_batches > 1 else "one micro-batch"
    return f"{layout.sizes}, {several}, {rows} row{'s' if rows > 1 else ''} of a device at a time"


def _speeds(topology: Topology) -> str:
    if topology.chip.peak_flops:
        return f"speeds as the maker of {topology.chip.name} promises them"
    return (
        f"speeds of {topology.chip.name} are not known: assumed that a byte of memory takes as long as {FLOPS_A_MEMORY_BYTE:,} "
        f"FLOPs, and a byte sent as {FLOPS_A_LINK_BYTE:,}"
    )


def _cost(layout: Layout, known: bool) -> str:
    took = f"{layout.seconds:.3g} s, " if known else ""
    return f"sends {gib(layout.sent)} a step, takes about {took}{layout.seconds / layout.computing:.2f} times its computing"
