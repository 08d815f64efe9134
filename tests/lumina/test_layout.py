"""Meshes for a number of devices: all that there could be, and the one that is chosen."""

import itertools

import pytest

from lumina import mesh
from lumina.architecture import tensor_table
from lumina.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig, load, presets, to_dict, validate
from lumina.errors import ConfigError
from lumina.footprint import footprint
from lumina.layout import SHARE, Rates, candidates, choose, micro_batches
from lumina.mesh import AXES, RULES, Sizes
from lumina.traffic import stored, transfers

PRESETS = [name for name in presets() if name != "auto"]


def small(**train):
    """Experts in every layer; heads, width and vocabulary that 2 and 4 divide, key/value heads that only 2 does."""
    shape = {"vocab_size": 64, "d_model": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "d_ff": 64}
    model = ModelConfig(**shape, moe=MoEConfig(pattern="all", num_experts=4))
    return Config(model, DataConfig(sequence_length=32), train=TrainConfig(**{"batch_size": 16} | train))


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
    chosen, _ = choose(config, 4, 2**40)
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


def test_of_what_fits_the_choice_sends_the_least():
    config = small(remat="full")
    memory = round(1.01 * footprint(config, Sizes(fsdp=8)).total / SHARE)  # of one device all, or of eight a part
    chosen, _ = choose(config, 8, memory)
    sizes = mesh.resolve(chosen, 8)
    assert footprint(chosen, sizes).total <= memory * SHARE

    def sent(config, sizes):
        return sum(t.bytes for t in transfers(config, sizes))

    for other in candidates(config, 8):
        config.train.micro_batches = 1
        if footprint(config, other).total <= memory * SHARE:
            assert sent(chosen, sizes) <= sent(config, other)


def test_the_choice_is_a_config_of_its_own_and_the_same_each_time():
    config = small(micro_batches=4)
    config.mesh.auto = True
    before = to_dict(config)
    chosen, why = choose(config, 8, 1 << 40)
    assert to_dict(config) == before
    assert choose(config, 8, 1 << 40) == (chosen, why)
    validate(chosen)
    assert chosen.train.micro_batches == 1  # with room for all rows at once
    assert to_dict(chosen)["model"] == before["model"]


def test_less_memory_takes_more_micro_batches_then_more_shards():
    def of(mib):
        chosen, _ = choose(load("large"), 8, mib << 20)
        return chosen.train.micro_batches, chosen.mesh.data

    micro, copies = zip(*(of(gib << 10) for gib in (200, 80, 24)), strict=True)
    assert micro[0] < micro[1]
    assert copies[0] == copies[1] == 8 > copies[2]


def test_the_choice_says_what_it_passed_over():
    chosen, why = choose(load("large"), 8, 24 << 30)
    lines = why.splitlines()
    assert lines[0] == "8 devices of 24.0 GiB, of which 90% are used"
    assert lines[1].startswith(f"chosen: {mesh.resolve(chosen, 8)}, {chosen.train.micro_batches} micro-batches, ")
    needs = [line for line in lines[2:] if ": needs " in line]
    assert needs[0].startswith("passed over: data 8: needs ")
    assert all(line.endswith(" of 21.6 GiB") for line in needs)
    assert lines[-1].startswith("passed over: ")
    assert ": fits, sends " in lines[-1]


def test_a_slow_link_avoids_what_computing_cannot_hide():
    config = load("b1:dense")
    config.train.micro_batches = 1
    fast, slow = (choose(config, 16, 96 << 30, Rates(flops=4e14, bandwidth=rate)) for rate in (1e12, 1e9))
    for chosen, why in (fast, slow):
        assert "at the given rates" in why
        assert chosen.mesh.tensor == 1  # its collectives wait for no computation
    assert fast[1] != slow[1]


def test_what_cannot_fit_is_refused_with_the_least_that_it_needs():
    with pytest.raises(
        ConfigError, match=r"^mesh\.auto: no layout fits 8 devices of 8\.00 GiB, of which 90% are used; the least, "
    ):
        choose(load("b14"), 8, 8 << 30)


def test_devices_that_cannot_share_the_batch_are_refused_with_a_number_that_can():
    with pytest.raises(ConfigError, match=r"^mesh\.auto: 7 devices cannot share train\.batch_size = 16 rows .*; 4 can$"):
        choose(small(), 7, 1 << 40)


def test_a_dense_model_is_not_offered_an_axis_for_experts():
    _, why = choose(load("large"), 16, 24 << 30)
    assert "expert" not in why
