"""Topologies: what is parsed, what is refused, and that figures are as the documents have them."""

import pytest

from lumina.errors import UsageError
from lumina.topology import CHIPS, KINDS, at_hand, parse


@pytest.mark.parametrize(
    ("text", "chips", "devices", "linked", "layout"),
    [
        ("v5p:8x8x16", 1024, 1024, 1024, "v5p:8x8x16"),
        ("v5e:4x8", 32, 32, 32, "v5e:4x8"),
        ("v5e:16x16*4", 1024, 1024, 256, "v5e:16x16"),
        ("tpu7x:2x2x1", 4, 8, 8, "tpu7x:2x2x1"),
        ("gpu:h200x64", 64, 64, 8, None),
        ("gpu:b200x4", 4, 4, 4, None),
        ("cpu:8", 8, 8, 8, None),
    ],
)
def test_a_topology_says_how_many_devices_there_are_and_which_share_links(text, chips, devices, linked, layout):
    topology = parse(text)
    assert (topology.chips, topology.devices, topology.linked) == (chips, devices, linked)
    assert str(topology) == text
    assert layout is None or topology.layout == layout


def test_devices_at_hand_are_those_of_the_table_where_it_has_them():
    assert set(KINDS.values()) == {chip.name for chip in CHIPS.values() if chip.platform != "cpu"}
    half = at_hand("TPU7x", "tpu", 8)
    whole = parse("tpu7x:2x2x1")
    assert (half.devices, half.linked) == (whole.devices, whole.linked)
    assert half.chip.peak_flops / half.chip.memory_bandwidth == whole.chip.peak_flops / whole.chip.memory_bandwidth
    assert half.chip.peak_flops == whole.chip.peak_flops / 2
    assert half.chip.device_memory == whole.chip.device_memory
    slices = at_hand("TPU v5 lite", "tpu", 64, 4)
    assert (slices.devices, slices.linked, slices.slices) == (64, 16, 4)
    nodes = at_hand("NVIDIA H200", "gpu", 64)
    assert (nodes.devices, nodes.linked) == (64, 8)
    unknown = at_hand("cpu", "cpu", 6)
    assert (unknown.devices, unknown.linked, unknown.chip.peak_flops) == (6, 6, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5q:2x2x1", "did you mean v5p?"),
        ("v5p", "a torus of 3 dimensions; write v5p:4x4x4"),
        ("v5p:8x8", "a torus of 3 dimensions"),
        ("v5e:2x2x2", "a torus of 2 dimensions; write v5e:4x4"),
        ("v5p:3x4x4", "the first two dimensions must be even"),
        ("v5p:0x0x0", "0 devices"),
        ("v5e:32x32", "a slice of v5e has at most 256"),
        ("v4:4x4x4*2", "the network between slices of v4 is not published"),
        ("v5p:16x16x24*8", "49152 devices; must be from 1 to 16384"),
        ("gpu:h200", "as gpu:h200x64"),
        ("gpu:rtx4090x8", "name one of a100, h100, h200, b200"),
        ("h200:8", "name GPUs as gpu:h200x8"),
        ("gpu:h200x0", "0 devices"),
        ("cpu:many", "as cpu:8"),
        ("v5p:4x4x4; rm", "a torus of 3 dimensions"),
    ],
)
def test_what_there_is_not_is_refused_with_what_would_work(text, said):
    with pytest.raises(UsageError, match="--topology") as refused:
        parse(text)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_every_figure_has_a_source():
    for chip in CHIPS.values():
        constants = chip.constants()
        assert constants["source"]
        if chip.platform != "cpu":
            assert "cloud.google.com" in chip.source or "datasheet" in chip.source
            assert chip.peak_flops > 1e14
            assert chip.memory_bytes > 10 * 2**30


def test_figures_have_the_units_that_they_say():
    v5p, h200 = CHIPS["v5p"], CHIPS["h200"]
    assert (v5p.peak_flops, v5p.memory_bytes, v5p.memory_bandwidth) == (459e12, 95 * 2**30, 2765e9)
    assert (v5p.link_bandwidth, v5p.network_bandwidth) == (600e9, 6.25e9)  # 1200 GB/s both ways, 50 Gbit/s
    assert (h200.memory_bytes, h200.link_bandwidth, h200.network_bandwidth) == (141e9, 450e9, 50e9)
    assert CHIPS["tpu7x"].device_memory == 96 * 2**30  # JAX sees two devices a chip
