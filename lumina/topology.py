"""Accelerators that a run may be planned for, and how many: v5p:8x8x16, gpu:h200x64, cpu:8.

Figures are of makers' public documents, and each chip names its own. They are what is promised, not what is measured.
"""

import math
import re
from typing import NamedTuple

from lumina.errors import UsageError
from lumina.validation import nearest

GIB, GB, TERA = 2**30, 10**9, 10**12
SPEEDS = ("peak_flops", "memory_bandwidth", "link_bandwidth", "network_bandwidth")
# Assumed of a chip that is not in the table: near the middle of those that are.
FLOPS_A_MEMORY_BYTE, FLOPS_A_LINK_BYTE, LINK_BYTES_A_NETWORK_BYTE = 250, 2000, 25
CLOUD = "https://cloud.google.com/tpu/docs/"


class Chip(NamedTuple):
    """One accelerator as its maker describes it; all figures are of a chip, of which JAX may see several devices."""

    name: str
    platform: str  # tpu, gpu or cpu: as JAX names it
    peak_flops: float  # a second, of dense bfloat16 matrix products
    memory_bytes: int
    memory_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second that one chip sends to others of its slice (TPU, all links) or node (GPU)
    network_bandwidth: float  # bytes a second that one chip sends beyond; 0: not published
    dimensions: int  # of the torus; 0: none
    most: int  # chips of the largest slice; for GPUs and CPUs those that one node has
    devices: int  # as JAX sees a chip
    source: str

    @property
    def device_memory(self) -> int:
        return self.memory_bytes // self.devices

    def each(self) -> "Chip":
        """One of its devices, as a chip of its own."""
        parts = {name: getattr(self, name) / self.devices for name in SPEEDS}
        return self._replace(**parts, memory_bytes=self.device_memory, devices=1)

    def filled(self) -> "Chip":
        """With assumed ratios in place of what no datasheet tells; of a chip without any, times are in a unit of no meaning."""
        peak = self.peak_flops or 1.0
        links = self.link_bandwidth or peak / FLOPS_A_LINK_BYTE
        return self._replace(
            peak_flops=peak,
            memory_bandwidth=self.memory_bandwidth or peak / FLOPS_A_MEMORY_BYTE,
            link_bandwidth=links,
            network_bandwidth=self.network_bandwidth or links / LINK_BYTES_A_NETWORK_BYTE,
        )

    def constants(self) -> dict[str, float | int | str]:
        """The figures that a plan rests on, with their source."""
        names = ("peak_flops", "memory_bytes", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "source")
        return {name: getattr(self, name) for name in names}


def _tpu(
    name: str, peak: float, gib: int, memory: int, links: int, network: float, about: tuple[int, int, int], source: str
) -> Chip:
    """TFLOP/s, GiB, GB/s, GB/s sent over all links, Gbit/s; (dimensions, most chips, devices a chip)."""
    return Chip(name, "tpu", peak * TERA, gib * GIB, memory * GB, links * GB, network * GB / 8, *about, source)


def _gpu(name: str, peak: float, memory: int, bandwidth: int, links: int, network: int, source: str) -> Chip:
    """TFLOP/s, GB, GB/s, GB/s sent over NVLink, Gbit/s of the node's network a GPU."""
    return Chip(name, "gpu", peak * TERA, memory * GB, bandwidth * GB, links * GB, network * GB / 8, 0, 8, 1, source)


# Documents give a link's bandwidth for both directions together: what a chip sends is half of it. TensorCores of v4 and tpu7x
# are devices of their own in libtpu's topologies.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu(
            "v4",
            275,
            32,
            1200,
            300,
            0,
            (3, 4096, 2),
            f"{CLOUD}v4; links: Jouppi et al., TPU v4 (ISCA 2023): 6 of 50 GB/s",
        ),
        _tpu("v5e", 197, 16, 819, 200, 25, (2, 256, 1), f"{CLOUD}v5e: 400 GBps both ways, 6.4 Tbps of network a pod of 256"),
        _tpu("v5p", 459, 95, 2765, 600, 50, (3, 6144, 1), f"{CLOUD}v5p: 1200 GBps both ways"),
        _tpu("v6e", 918, 32, 1638, 400, 100, (2, 256, 1), f"{CLOUD}v6e and {CLOUD}tpu7x: 800 GBps both ways"),
        _tpu("tpu7x", 2307, 192, 7380, 600, 100, (3, 9216, 2), f"{CLOUD}tpu7x: 1200 GBps both ways"),
        _gpu("a100", 312, 80, 2039, 300, 200, "NVIDIA A100 80GB SXM datasheet; DGX A100 datasheet: 8 x 200 Gb/s"),
        _gpu("h100", 989, 80, 3350, 450, 400, "NVIDIA H100 SXM datasheet, without sparsity; DGX H100 datasheet: 8 x 400 Gb/s"),
        _gpu("h200", 989, 141, 4800, 450, 400, "NVIDIA H200 SXM datasheet, without sparsity; DGX H200 datasheet: 8 x 400 Gb/s"),
        _gpu("b200", 2250, 180, 8000, 900, 400, "NVIDIA DGX B200 datasheet, an eighth, without sparsity: 8 x 400 Gb/s"),
        Chip("cpu", "cpu", 0, 0, 0, 0, 0, 0, 4096, 1, "none: processors differ; training measures its own (docs/train.md)"),
    )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "tpu")
GPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "gpu")
KINDS = {  # as JAX names the kind of a device
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
LARGEST = 16384  # devices that a plan is made for
FORMS = f"{TPUS[2]}:8x8x16, {TPUS[1]}:16x16*4 (four slices), gpu:h200x64 or cpu:8"


class Topology(NamedTuple):
    """Chips of one kind; of TPUs the torus of a slice, and how many slices."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self.chip.devices

    @property
    def linked(self) -> int:
        """Devices that reach each other without the network: of a TPU slice, or of a GPU node."""
        whole = math.prod(self.shape)
        return (min(whole, self.chip.most) if self.chip.platform == "gpu" else whole) * self.chip.devices

    @property
    def layout(self) -> str:
        """A slice as libtpu names it."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        if self.chip.platform == "gpu":
            return f"gpu:{self.chip.name}x{self.chips}"
        return self.layout + (f"*{self.slices}" if self.slices > 1 else "")


def unnamed(name: str, platform: str, devices: int, slices: int = 1) -> Topology:
    """So many devices of which no datasheet is at hand, all joined by the same links within a slice."""
    return Topology(Chip(name, platform, 0, 0, 0, 0, 0, 0, LARGEST, 1, "none"), (devices // slices,), slices)


def at_hand(kind: str, platform: str, devices: int, slices: int = 1) -> Topology:
    """The devices that JAX sees, by the name that it has for them; those that the table has not are `unnamed`."""
    if kind not in KINDS:
        return unnamed(kind, platform, devices, slices)
    return Topology(CHIPS[KINDS[kind]].each(), (devices // slices,), slices)


def parse(text: str) -> Topology:
    """The topology that `text` names. Raises UsageError for one that there is not, with what would work."""
    kind, _, rest = text.partition(":")
    if kind in GPUS:
        raise UsageError(f"--topology {text}: name GPUs as gpu:{kind}x8")
    if kind == "gpu":
        found = re.fullmatch(r"([a-z0-9]+?)x([0-9]+)", rest)
        if not found or found[1] not in GPUS:
            raise UsageError(f"--topology {text}: name one of {', '.join(GPUS)} and how many, as gpu:h200x64")
        return _checked(text, Topology(CHIPS[found[1]], (int(found[2]),)))
    if kind == "cpu":
        if not re.fullmatch(r"[0-9]+", rest):
            raise UsageError(f"--topology {text}: say how many devices one processor counts as, as cpu:8")
        return _checked(text, Topology(CHIPS["cpu"], (int(rest),)))
    if kind not in TPUS:
        raise UsageError(f"--topology {text}: no such kind{nearest(kind, [*TPUS, 'gpu', 'cpu'])}; take one such as {FORMS}")
    chip = CHIPS[kind]
    found = re.fullmatch(r"([0-9]+(?:x[0-9]+)+)(?:\*([0-9]+))?", rest)
    shape = tuple(map(int, found[1].split("x"))) if found else ()
    if not found or len(shape) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise UsageError(f"--topology {text}: {kind} is a torus of {chip.dimensions} dimensions; write {kind}:{example}")
    topology = Topology(chip, shape, int(found[2] or 1))
    if shape[0] % 2 or shape[1] % 2:  # libtpu: chips_per_host_bounds 2x2x1
        raise UsageError(f"--topology {text}: a host has 2 x 2 chips, so the first two dimensions must be even")
    if math.prod(shape) > chip.most:
        raise UsageError(f"--topology {text}: {math.prod(shape)} chips, and a slice of {kind} has at most {chip.most}")
    if topology.slices > 1 and not chip.network_bandwidth:
        raise UsageError(f"--topology {text}: the network between slices of {kind} is not published; plan for one slice")
    return _checked(text, topology)


def _checked(text: str, topology: Topology) -> Topology:
    if not 0 < topology.devices <= LARGEST:
        raise UsageError(f"--topology {text}: {topology.devices} devices; must be from 1 to {LARGEST}")
    return topology
