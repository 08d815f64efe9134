"""Which mesh, remat policy and micro-batches for a topology: all that there could be, ranked by what they hold and send."""

from dataclasses import replace
from typing import NamedTuple

from lumina.config import Config, MeshConfig
from lumina.footprint import footprint
from lumina.layout import SHARE, candidates, micro_batches
from lumina.mesh import Sizes
from lumina.roofline import Bounds, bounds, executed_flops, touched_bytes
from lumina.topology import Topology
from lumina.traffic import transfers

REMAT = ("none", "dots", "full")
MOST = 24  # numbers of micro-batches tried for a mesh, fewest first


class Candidate(NamedTuple):
    """A way to split a step that fits by our estimate, and its bounds."""

    sizes: Sizes
    remat: str
    micro_batches: int
    needed: int  # bytes on a device, estimated
    bound: Bounds

    @property
    def rank(self) -> tuple:
        """Lower is better: between everything at the same time and nothing so; then less memory."""
        return self.bound.at_best + self.bound.in_turn, self.needed

    def of(self, config: Config) -> Config:
        """`config`, split so."""
        train = replace(config.train, remat=self.remat, micro_batches=self.micro_batches)
        return replace(config, train=train, mesh=MeshConfig(**self.sizes._asdict()))


def search(config: Config, topology: Topology, usable: int) -> list[Candidate]:
    """Every mesh and remat policy, with the fewest micro-batches that fit into `usable` bytes of a device; best first."""
    flat = config.model.moe.pattern == "none"  # without experts their axis does what fsdp does
    found = []
    for sizes in candidates(config, topology.devices):
        if (flat and sizes.expert > 1) or sizes.data % topology.slices:  # `data` alone goes over the network of slices
            continue
        counts = micro_batches(config, sizes)[:MOST]
        for remat in REMAT:
            for count in counts:
                split = replace(config, train=replace(config.train, remat=remat, micro_batches=count))
                parts = footprint(split, sizes)
                if parts.total <= usable:
                    bound = bounds(
                        topology, sizes, executed_flops(split), touched_bytes(split, sizes, parts), transfers(split, sizes)
                    )
                    found.append(Candidate(sizes, remat, count, parts.total, bound))
                    break
    return sorted(found, key=lambda one: one.rank)


def usable(topology: Topology) -> int:
    """Bytes of a device that an estimate may take: the rest is for what it misses."""
    return int(topology.chip.device_memory * SHARE)
