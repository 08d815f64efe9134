"""Meshes for a number of devices: all that there could be, and the one that is chosen."""

import itertools

import pytest

from lumina import mesh
from lumina.architecture import tensor_table
from lumina.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig, load, presets, to_dict, validate
from lumina.errors import ConfigError
from lumina.footprint import footprint
from lumina.layout import REMAT, SHARE, candidates, choose, layouts, micro_batches, usable
from lumina.mesh import AXES, RULES, Sizes
from lumina.roofline import step_seconds
from lumina.topology import CHIPS, parse, unnamed
from lumina.traffic import stored, transfers

PRESETS = [name for name in presets() if name != "auto"]


def small(**train):
    """Experts in every layer; heads, width and vocabulary that 2 and 4 divide, key/value heads that only 2 does."""
    shape = {"vocab_size": 64, "d_model": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    model = ModelConfig(**shape, moe=MoEConfig(pattern="all", num_experts=4))
    return Config(model, DataConfig(sequence_length=32), train=TrainConfig(**{"batch_size": 16} | train))


def some(devices):
    """Devices of which nothing is known."""
    return unnamed("something new", "gpu", devices)


def passes(config, sizes):
    try:
        mesh.check(config, sizes)
    except ConfigError:
        return False
    return True


def test_candidates_are_all_that_pass_the_check():
    config = small()
    found = candidates(config, 8)
    products = [Sizes(*sizes) for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))]
    assert set(found) == {sizes for sizes in products if sizes.devices == 8 and passes(config, sizes)}
    assert len(found) == len(set(found)) > 10
    assert not any(sizes.tensor > 2 or sizes.expert > 4 for sizes in found)


def test_micro_batches_leave_each_device_whole_rows():
    found = micro_batches(small(), Sizes(data=2, fsdp=2))
    assert (
        found == [n for n in range(1, 17) if 16 % n == 0 and passes(small(micro_batches=n), Sizes(data=2, fsdp=2))] == [1, 2, 4]
    )


def test_a_loss_that_counts_over_a_micro_batch_keeps_the_micro_batches_asked_for():
    config = small(micro_batches=4)
    config.model.moe.balance_over = "micro_batch"
    assert micro_batches(config, Sizes(data=2)) == [4]
    assert micro_batches(config, Sizes(data=8)) == []
    chosen, _ = choose(config, some(4), 2**40)
    assert chosen.train.micro_batches == 4


@pytest.mark.parametrize(
    ("changed", "named"), [({}, False), ({"auto": True}, False), ({"tensor": 2}, True), ({"data": 1}, True)]
)
def test_an_axis_that_was_set_is_not_chosen(changed, named):
    assert mesh.named(MeshConfig(**changed)) == named


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("devices", [4, 16])
def test_the_tensors_of_every_preset_divide(name, devices):
    config = load(name)
    found = candidates(config, devices)
    assert found
    for sizes in found[:: max(1, len(found) // 8)]:
        for tensor in tensor_table(config.model)[:16]:
            parts = sizes.along(tuple(axis for over in RULES.layout(tensor) for axis in over))
            assert stored(tensor, sizes) * parts == tensor.size


def test_of_what_fits_the_choice_is_the_fastest():
    config, topology = small(remat="full"), parse("v5e:2x4")
    memory = round(1.01 * footprint(config, Sizes(fsdp=8)).total / SHARE)  # of one device all, or of eight a part
    chosen, _ = choose(config, topology, memory)
    sizes = mesh.resolve(chosen, 8)
    assert footprint(chosen, sizes).total <= memory * SHARE

    def seconds(config, sizes):
        return step_seconds(config, topology, sizes, footprint(config, sizes), transfers(config, sizes))

    config.train.micro_batches = 1
    fitting = [other for other in candidates(config, 8) if footprint(config, other).total <= memory * SHARE]
    assert len(fitting) < len(candidates(config, 8))
    assert seconds(chosen, sizes) == min(seconds(config, other) for other in fitting)
    assert seconds(chosen, sizes) < max(seconds(config, other) for other in fitting)


@pytest.mark.parametrize("name", ["v5p:4x4x4", "gpu:h200x64"])
def test_the_best_of_all_layouts_with_the_configs_remat_is_the_choice(name):
    config, topology = load("b14"), parse(name)
    memory = topology.chip.device_memory
    found = [each for each in layouts(config, topology, memory) if each.needed <= usable(memory)]
    assert {each.remat for each in found} == set(REMAT)
    best = next(each for each in found if each.remat == config.train.remat)
    chosen, _ = choose(config, topology, memory)
    assert best.of(config) == chosen


def test_only_the_ratios_of_a_devices_speeds_decide():
    config, topology = load("b1"), parse("v6e:4x4")
    chip = topology.chip
    names = ("peak_flops", "memory_bandwidth", "link_bandwidth", "network_bandwidth")
    tenfold = chip._replace(**{name: 10 * getattr(chip, name) for name in names})
    other = topology._replace(chip=tenfold)
    assert choose(config, topology, chip.memory_bytes)[0] == choose(config, other, chip.memory_bytes)[0]


def test_where_no_speeds_are_known_ratios_are_assumed_and_told():
    _, why = choose(small(), some(8), 1 << 40)
    assert "speeds of something new are not known: assumed that a byte of memory takes as long as 250 FLOPs, " in why
    assert " s, " not in why.split("chosen", 1)[1]  # seconds would mean nothing
    _, why = choose(small(), parse("v5e:2x4"), 1 << 40)
    assert "speeds as the maker of v5e promises them" in why
    known = [chip for chip in CHIPS.values() if chip.peak_flops]
    assumed = CHIPS["cpu"].filled()
    for name in ("memory_bandwidth", "link_bandwidth"):
        ratios = [chip.peak_flops / getattr(chip, name) for chip in known]
        assert min(ratios) < assumed.peak_flops / getattr(assumed, name) < max(ratios)
    over = [chip.link_bandwidth / chip.network_bandwidth for chip in known if chip.network_bandwidth]
    assert min(over) < assumed.link_bandwidth / assumed.network_bandwidth < max(over)
    assert all(chip.filled() == chip for chip in known if chip.network_bandwidth)


def test_only_data_goes_over_the_network_between_slices():
    found = layouts(load("b1"), parse("v5e:4x4*4"), 16 << 30, ("full",))
    assert found
    assert all(each.sizes.data % 4 == 0 for each in found)


def test_the_choice_is_a_config_of_its_own_and_the_same_each_time():
    config = small(micro_batches=4)
    config.mesh.auto = True
    before = to_dict(config)
    chosen, why = choose(config, some(8), 1 << 40)
    assert to_dict(config) == before
    assert choose(config, some(8), 1 << 40) == (chosen, why)
    validate(chosen)
    assert chosen.train.micro_batches == 1  # with room for all rows at once
    assert to_dict(chosen)["model"] == before["model"]


def test_less_memory_takes_more_micro_batches_then_more_shards():
    def of(mib):
        chosen, _ = choose(load("large"), some(8), mib << 20)
        return chosen.train.micro_batches, chosen.mesh.data

    micro, copies = zip(*(of(gib << 10) for gib in (200, 80, 24)), strict=True)
    assert micro[0] < micro[1]
    assert copies[0] == copies[1] == 8 > copies[2]


def test_the_choice_says_what_it_passed_over():
    chosen, why = choose(load("large"), some(8), 24 << 30)
    lines = why.splitlines()
    assert lines[0].startswith("8 devices of 24.0 GiB, of which 90% are used; ")
    assert lines[1].startswith(
        f"chosen, of those that fit the fastest: {mesh.resolve(chosen, 8)}, {chosen.train.micro_batches} micro-batches, "
    )
    needs = [line for line in lines[2:] if ": needs " in line]
    assert needs[0].startswith("passed over: data 8: needs ")
    assert all(line.endswith(" of 21.6 GiB") for line in needs)
    assert lines[-1].startswith("passed over: ")
    assert ": fits, sends " in lines[-1]


def test_a_slow_link_avoids_what_computing_cannot_hide():
    config = load("b1:dense")
    config.train.micro_batches = 1
    topology = parse("v5p:4x4x1")
    rates = (topology.chip._replace(link_bandwidth=rate) for rate in (1e12, 1e9))
    fast, slow = (choose(config, topology._replace(chip=chip), 96 << 30) for chip in rates)
    for chosen, _ in (fast, slow):
        assert chosen.mesh.tensor == 1  # its collectives wait for no computation
    assert fast[1] != slow[1]


def test_what_cannot_fit_is_refused_with_the_least_that_it_needs():
    with pytest.raises(
        ConfigError, match=r"^mesh\.auto: no layout fits 8 devices of 8\.00 GiB, of which 90% are used; the least, "
    ):
        choose(load("b14"), some(8), 8 << 30)


def test_devices_that_cannot_share_the_batch_are_refused_with_a_number_that_can():
    with pytest.raises(ConfigError, match=r"^mesh\.auto: 7 devices cannot share train\.batch_size = 16 rows .*; 4 can$"):
        choose(small(), some(7), 1 << 40)


def test_a_dense_model_is_not_offered_an_axis_for_experts():
    _, why = choose(load("large"), some(16), 24 << 30)
    assert "expert" not in why


def test_among_layouts_as_fast_to_two_digits_the_least_is_sent():
    config, topology = load("b14"), parse("v5p:4x4x4")
    found = [one for one in layouts(config, topology, 95 * 2**30, ("full",)) if one.needed <= usable(95 * 2**30)]
    near = [one for one in found if round(one.seconds) == round(min(one.seconds for one in found)) == 20]
    assert max(one.sent for one in near) > 4 * min(one.sent for one in near)
    assert found[0].sent == min(one.sent for one in near)
