"""What a training step holds on a device, against sums done another way."""

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lumina.architecture import counts
from lumina.config import PRESET_DIRECTORY, Config, DataConfig, MoDConfig, ModelConfig, MoEConfig, TrainConfig, load, presets
from lumina.footprint import footprint
from lumina.mesh import AXES, Sizes
from lumina.runs.units import gib, si

PRESETS = [name for name in presets() if name != "auto"]


@pytest.mark.parametrize("name", PRESETS)
def test_receipts_state_the_computed_figures(name):
    config = load(name)
    count, needed = counts(config), footprint(config)
    rows = config.train.batch_size // config.train.micro_batches
    receipt = (
        f"Parameters: {si(count.mean_active)} mean active, {si(count.most_active)} most active, {si(count.total)} total.\n"
        f"Memory, {rows} row{'s' if rows > 1 else ''} at a time: weights {gib(needed.parameters)}, "
        f"gradients {gib(needed.gradients)}, optimizer {gib(needed.optimizer)}, activations {gib(needed.activations)}, "
        f"temporaries {gib(needed.temporaries)}.\n"
    )
    docstring = (PRESET_DIRECTORY / f"{name}.py").read_text(encoding="utf-8").split('"""')[1]
    assert receipt in docstring, f"if the change was meant, configs/{name}.py should say:\n{receipt}"


def test_one_device_holds_weights_gradients_and_two_moments():
    config = Config(ModelConfig(), DataConfig())
    total, needed = counts(config).total, footprint(config)
    assert (needed.parameters, needed.gradients, needed.optimizer) == (4 * total, 4 * total, 8 * total)
    config.train.micro_batches = 2
    assert footprint(config).gradients == 8 * total


# ------------------------------------------------------------------------------------------------------------- a mesh

ATTENTION, FEEDFORWARD, EMBEDDING = 16 * 4 * 4 * 2 + 16 * 2 * 4 * 2, 3 * 16 * 24, 32 * 16


def small(moe=(), mod=(), **train):
    """Two layers, D 16, H 4, K 2, h 4, F 24, V 32; 8 rows of 8 tokens; float32, tied."""
    shape = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "d_ff": 24}
    model = ModelConfig(**shape, moe=MoEConfig(**dict(moe)), mod=MoDConfig(**dict(mod)))
    return Config(model, DataConfig(sequence_length=8), train=TrainConfig(**{"batch_size": 8, "remat": "full"} | train))


def test_a_shard_is_a_part_of_every_matrix_and_all_of_every_norm():
    norms = 5 * 16
    for sizes in ({"fsdp": 4}, {"tensor": 2, "fsdp": 2}, {"context": 4}, {"data": 2, "fsdp": 4}):
        needed = footprint(small(), Sizes(**sizes))
        numbers = (2 * (ATTENTION + FEEDFORWARD) + EMBEDDING) // 4 + norms
        assert (needed.parameters, needed.gradients, needed.optimizer) == (4 * numbers, 4 * numbers, 8 * numbers)


def test_experts_lie_apart_and_state_that_is_not_trained_has_no_gradient():
    needed = footprint(small(moe={"pattern": "all", "num_experts": 4}), Sizes(expert=4))
    trained = 2 * (ATTENTION + 4 * FEEDFORWARD + 16 * 4) // 4 + EMBEDDING // 4 + 5 * 16
    assert (needed.parameters, needed.gradients) == (4 * (trained + 2 * 4), 4 * trained)


def test_data_copies_parameters_and_splits_rows():
    alone, copied = footprint(small()), footprint(small(), Sizes(data=4))
    assert alone[:3] == copied[:3]
    assert alone.activations == 4 * copied.activations


def test_with_remat_another_layer_keeps_the_residual_of_the_devices_tokens():
    for sizes, tokens in (({}, 64), ({"fsdp": 4}, 16), ({"context": 2, "tensor": 2}, 16), ({"tensor": 2}, 32)):
        config = small(compute_dtype="bfloat16")
        before = footprint(config, Sizes(**sizes))
        config.model.num_layers = 5
        after = footprint(config, Sizes(**sizes))
        assert after.activations - before.activations == 3 * tokens * 16 * 2
        assert after.temporaries == before.temporaries


def test_with_remat_a_period_of_layers_is_computed_at_once():
    every = small(moe={"pattern": "all", "num_experts": 2})
    other = small(moe={"pattern": "interleaved", "num_experts": 2})
    for config in (every, other):
        config.model.num_layers = 4
    residual, layers = 64 * 16 * 4, [footprint(small(moe={"pattern": p, "num_experts": 2})) for p in ("none", "all")]
    dense, moe = (layer.activations - 2 * residual for layer in layers)
    assert footprint(every).activations == 4 * residual + moe
    assert footprint(other).activations == 2 * residual + dense + moe


def test_gathered_weights_of_two_layers_and_the_largest_gradient_come_and_go():
    def of_weights(config, **sizes):
        """Temporaries beside those of one device with as many rows."""
        fewer = deepcopy(config)
        fewer.train.batch_size //= Sizes(**sizes).row_parts
        return footprint(config, Sizes(**sizes)).temporaries - footprint(fewer).temporaries

    layer, matrix = ATTENTION + FEEDFORWARD, 16 * 24
    assert of_weights(small(), fsdp=2) == 2 * 4 * layer + 4 * matrix
    assert of_weights(small(), data=2) == 0
    with_experts = small(moe={"pattern": "all", "num_experts": 4})
    attention = ATTENTION + 16 * 4
    assert of_weights(with_experts, expert=4) == 2 * 4 * attention + 4 * 16 * 4 * 4  # of the experts nothing is gathered
    assert of_weights(with_experts, fsdp=4) == 2 * 4 * (attention + 4 * FEEDFORWARD) + 4 * 4 * matrix


def test_a_large_vocabulary_is_gathered_with_its_gradient_in_float32():
    config = small(compute_dtype="bfloat16")
    config.model.vocab_size = 4096
    config.train.batch_size = 2
    whole, split = footprint(config, Sizes(fsdp=2)), footprint(config, Sizes(fsdp=2, tensor=2))
    logits = 3 * 8 * 4096 * 4
    wide, residual = 8 * 3 * 24 * 2, 3 * 8 * 16 * 2
    assert whole.temporaries == 4096 * 16 * (2 + 4) + logits + wide + residual
    assert split.temporaries == (4096 * 16 * (2 + 4) + logits + wide + residual) // 2


def test_what_remat_keeps_is_between_all_and_a_residual():
    for sizes in (Sizes(), Sizes(fsdp=2), Sizes(tensor=2)):
        config = small()
        config.model.num_layers = 8
        kept = []
        for config.train.remat in ("full", "dots", "none"):
            kept.append(footprint(config, sizes).activations)
        assert kept == sorted(set(kept))


FAMILIES = {
    "dense": {},
    "capacity": {"moe": {"pattern": "all", "num_experts": 4, "top_k": 2}},
    "dropless": {"moe": {"pattern": "all", "num_experts": 4, "top_k": 2, "dispatch": "dropless"}},
    "depth": {"mod": {"pattern": "all", "capacity": 0.5}},
    "block": {"moe": {"pattern": "all"}, "mod": {"pattern": "interleaved", "capacity": 0.5, "scope": "block"}},
}


@pytest.mark.parametrize("family", FAMILIES)
@given(
    axis=st.sampled_from(AXES),
    remat=st.sampled_from(["none", "full", "dots"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    micro_batches=st.sampled_from([1, 2]),
)
@settings(max_examples=20, deadline=None)
def test_twice_the_devices_never_hold_more_of_what_lasts(family, axis, remat, dtype, micro_batches):
    config = small(**FAMILIES[family], remat=remat, compute_dtype=dtype, micro_batches=micro_batches)
    if axis == "expert" and family == "dropless":
        return  # each device is given the rows of all
    one, two = (footprint(config, Sizes(fsdp=2)._replace(**{axis: n})) for n in (2, 4))
    assert two.parameters <= one.parameters
    assert two.gradients <= one.gradients
    assert two.optimizer <= one.optimizer
    assert two.activations <= one.activations
    assert all(part >= 0 for part in two)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_more_micro_batches_hold_fewer_activations_and_one_more_gradient(remat):
    one, two, four = (footprint(small(remat=remat, micro_batches=n), Sizes(fsdp=2)) for n in (1, 2, 4))
    assert one.activations == 2 * two.activations == 4 * four.activations
    assert 2 * one.gradients == two.gradients == four.gradients
