"""Bounds of a step's time, by hand."""

import pytest

from lumina.config import load, override
from lumina.footprint import Footprint, footprint
from lumina.mesh import Sizes
from lumina.roofline import (
    bounds,
    executed_flops,
    layer_flops,
    model_flops,
    network_share,
    split_traffic,
    step_seconds,
    touched_bytes,
)
from lumina.topology import parse
from lumina.traffic import Transfer


def test_bounds_are_work_over_what_the_datasheet_promises():
    sizes = Sizes(data=4)
    traffic = [Transfer("", "all_reduce", ("data",), 3_000_000_000, 1), Transfer("", "all_gather", ("data",), 3_000_000_000, 1)]
    found = bounds(parse("v5p:2x2x1"), sizes, flops=4 * 459 * 10**12, touched=27_650_000_000, traffic=traffic)
    assert found == pytest.approx((1.0, 0.01, 0.01, 0.0))  # 6 GB at 600 GB/s
    assert (found.at_best, found.in_turn, found.binding) == pytest.approx((1.0, 1.02, "compute"))


def test_a_device_that_is_half_a_chip_has_half_of_everything():
    sizes = Sizes(data=8)
    traffic = [Transfer("", "permute", ("data",), 300_000_000, 1)]
    found = bounds(parse("tpu7x:2x2x1"), sizes, flops=4 * 2307 * 10**12, touched=3_690_000_000, traffic=traffic)
    assert found == pytest.approx((1.0, 0.001, 0.001, 0.0))


def test_the_last_axes_stay_within_a_node_and_the_first_cross():
    sizes = Sizes(data=2, fsdp=4, tensor=4)  # 32 GPUs; a node has tensor x 2 of fsdp
    assert network_share("all_gather", ("tensor",), sizes, 8) == 0
    assert network_share("all_gather", ("fsdp",), sizes, 8) == pytest.approx(2 / 4)
    assert network_share("all_reduce", ("data",), sizes, 8) == 1
    assert network_share("all_to_all", ("fsdp",), sizes, 8) == pytest.approx((4 - 2) / 3)
    assert network_share("all_reduce", ("data", "fsdp"), sizes, 8) == pytest.approx(4 / 8)
    assert network_share("all_reduce", ("data", "fsdp"), sizes, 32) == 0


def test_bytes_beyond_a_node_wait_for_the_network():
    traffic = [Transfer("", "all_gather", ("fsdp",), 1000, 1), Transfer("", "all_gather", ("tensor",), 300, 1)]
    assert split_traffic(traffic, Sizes(fsdp=4, tensor=4), linked=8) == pytest.approx((800, 500))


def test_weights_travel_while_a_step_computes_and_tokens_are_waited_for():
    config, topology, sizes = load("b1"), parse("v5e:2x2"), Sizes(fsdp=2, expert=2)
    config.train.micro_batches = 1
    flops = executed_flops(config) / (4 * 197e12)

    def seconds(*traffic):
        return step_seconds(config, topology, sizes, Footprint(0, 0, 0, 0, 0), traffic)

    alone = seconds()
    assert alone == pytest.approx(flops)
    tokens = Transfer("slots to experts", "all_to_all", ("expert",), 400_000_000_000, 1)
    for what in ("weights", "weights of embedding and head", "gradients"):
        weights = Transfer(what, "all_gather", ("fsdp",), round(alone / 2 * 200e9), 1)
        assert seconds(weights, tokens) == pytest.approx(alone + 2)  # 400 GB at 200 GB/s
        assert seconds(weights._replace(bytes=4 * weights.bytes), tokens) == pytest.approx(2 * alone + 2)


def test_what_is_waited_for_beyond_a_node_waits_for_the_network():
    config, topology, sizes = load("b1"), parse("gpu:h100x16"), Sizes(expert=16)
    moved = Transfer("slots to experts", "all_to_all", ("expert",), 450_000_000_000, 1)
    inside, beyond = (
        step_seconds(config, t, sizes, Footprint(0, 0, 0, 0, 0), [moved])
        for t in (topology._replace(chip=topology.chip._replace(most=16)), topology)
    )
    assert beyond - inside == pytest.approx(8 / 15 * 450 / 50 - 8 / 15)  # half of the pairs, but each with itself


def test_a_step_takes_no_less_than_its_memory():
    config, topology = load("b1"), parse("v5e:2x2")
    slow = topology._replace(chip=topology.chip._replace(memory_bandwidth=1e6))
    parts = footprint(config, Sizes(data=4))
    assert step_seconds(config, slow, Sizes(data=4), parts, []) == pytest.approx(
        touched_bytes(config, Sizes(data=4), parts) / 1e6
    )


def test_slices_are_crossed_by_the_outermost_axis():
    sizes = Sizes(data=2, fsdp=256)
    topology = parse("v5e:16x16*2")
    found = bounds(topology, sizes, 1, 1, [Transfer("", "all_reduce", ("data",), 3_125_000_000, 1)])
    assert (found.links, found.network) == pytest.approx((0.0, 1.0))


def test_remat_adds_a_forward_pass_of_the_layers_and_none_of_the_head():
    config = load("b14:dense")
    plain = override(config, ["--config.train.remat=none"])
    full = override(config, ["--config.train.remat=full"])
    tokens = config.train.batch_size * config.data.sequence_length
    # All of the layer but its last product, whose result is only added to the residual.
    forward = (sum(layer_flops(config, "dense")) - 2 * config.model.d_ff * config.model.d_model) * config.model.num_layers
    assert executed_flops(plain) == pytest.approx(model_flops(config), rel=1e-6)
    assert executed_flops(full) - executed_flops(plain) == pytest.approx(forward * tokens, rel=1e-6)


def test_empty_slots_of_experts_are_executed_and_are_not_the_models():
    config = load("b14:moe")  # capacity_factor 1.25, top-1
    plain = override(config, ["--config.train.remat=none"])
    model, tokens = config.model, config.train.batch_size * config.data.sequence_length
    experts = 3 * 3 * 2 * model.d_model * model.d_ff * model.num_layers * tokens
    assert executed_flops(plain) - model_flops(config) == pytest.approx(0.25 * experts, rel=1e-3)
