"""What one device sends in a step, against sums written out by hand for a model small enough."""

import pytest

from lumina.architecture import layer_kinds
from lumina.config import Config, DataConfig, MoDConfig, ModelConfig, MoEConfig, TrainConfig, load, presets
from lumina.mesh import AXES, Sizes
from lumina.traffic import Transfer, layer_transfers, sent, transfers

PRESETS = [name for name in presets() if name != "auto"]


def small(moe=(), mod=(), **train):
    """Two layers, D 16, H 4, K 2, h 4, F 24, V 32; 8 rows of 8 tokens; bfloat16, tied."""
    model = ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        d_ff=24,
        moe=MoEConfig(**dict(moe)),
        mod=MoDConfig(**dict(mod)),
    )
    settings = {"batch_size": 8, "compute_dtype": "bfloat16", "remat": "full"} | train
    return Config(model, DataConfig(sequence_length=8), train=TrainConfig(**settings))


def told(config: Config, **sizes: int) -> dict[tuple[str, str], tuple[tuple[str, ...], int, int]]:
    return {(t.what, t.kind): (t.axes, t.bytes, t.count) for t in transfers(config, Sizes(**sizes))}


# ---------------------------------------------------------------------------------------------------------------- rings


def test_a_ring_gathers_scatters_and_reduces_with_the_bytes_that_are_claimed():
    n, part = 5, 12  # bytes of a device's part
    have = [{device} for device in range(n)]
    passed = 0
    while any(len(parts) < n for parts in have):  # each passes on what it was given last: one part at a time
        newest = [max(parts, key=lambda p, d=device: (d - p) % n) for device, parts in enumerate(have)]
        passed += part
        have = [parts | {newest[device - 1]} for device, parts in enumerate(have)]
    assert sent("all_gather", n * part, n) == sent("reduce_scatter", n * part, n) == passed == 48
    assert sent("all_reduce", n * part, n) == 2 * passed
    assert sent("all_to_all", n * part, n) == sum(part for other in range(n) if other != 0)
    assert sent("permute", part, n) == part


@pytest.mark.parametrize("name", PRESETS)
def test_one_device_sends_nothing(name):
    assert transfers(load(name), Sizes()) == []


# ---------------------------------------------------------------------------------------------------------------- dense

ATTENTION = 16 * 4 * 4 * 2 + 16 * 2 * 4 * 2  # numbers: query and output, key and value
FEEDFORWARD = 3 * 16 * 24


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once_a_micro_batch():
    found = told(small(micro_batches=2), fsdp=4)
    layers, tensors = 2, 7
    assert ATTENTION + FEEDFORWARD == 1920
    axes = ("fsdp",)
    assert found == {
        ("weights", "all_gather"): (axes, 2 * 2 * layers * 1920 * 2 * 3 // 4, 2 * 2 * layers * tensors),
        ("weights", "reduce_scatter"): (axes, 2 * layers * 1920 * 4 * 3 // 4, 2 * layers * tensors),
        # the table is looked up in, and is the head as well
        ("weights of embedding and head", "all_gather"): (axes, 2 * 2 * 512 * 2 * 3 // 4, 4),
        ("weights of embedding and head", "reduce_scatter"): (axes, 2 * 2 * 512 * 4 * 3 // 4, 4),
        # five norms of 16, those of layers stacked; an all-reduce sends twice 3/4 of its bytes, once a step
        ("gradients", "all_reduce"): (axes, 2 * 5 * 16 * 4 * 3 // 4, 3),
    }


def test_an_untied_head_is_gathered_once_as_is_the_embedding():
    config = small()
    config.model.tie_embeddings = False
    found = told(config, fsdp=2)
    assert found["weights of embedding and head", "all_gather"] == (("fsdp",), 2 * 512 * 2 // 2, 2)
    assert found["weights of embedding and head", "reduce_scatter"] == (("fsdp",), 2 * 512 * 4 // 2, 2)


def test_data_alone_reduces_every_gradient_once_a_step():
    for count in (1, 2):
        found = told(small(micro_batches=count), data=4)
        numbers = 2 * (1920 + 2 * 16) + 512 + 16
        assert found == {("gradients", "all_reduce"): (("data",), 2 * numbers * 4 * 3 // 4, 9 + 2)}


def test_gradients_of_what_data_copies_are_reduced_a_shard_at_a_time():
    found = {t.axes: t.bytes for t in transfers(small(), Sizes(data=2, fsdp=4)) if t.what == "gradients"}
    assert found[("data",)] == 2 * (2 * 1920 + 512) // 4 * 4 // 2  # twice half of a quarter of all matrices
    assert found[("data", "fsdp")] == 2 * 5 * 16 * 4 * 7 // 8


def test_tensor_splits_the_residual_around_each_block_and_the_softmax():
    found = told(small(compute_dtype="float32"), tensor=2)
    whole = 8 * 8 * 16 * 4 // 2  # b t D w, of which half is sent
    tensor = ("tensor",)
    assert found["residual to attention", "all_gather"] == (tensor, 2 * 2 * whole, 4)  # forward, and recomputed
    assert found["residual to attention", "reduce_scatter"] == (tensor, 2 * whole, 2)
    assert found["residual from attention", "reduce_scatter"] == (tensor, 2 * 2 * whole, 4)
    assert found["residual from attention", "all_gather"] == (tensor, 2 * whole, 2)
    assert found["residual to feed-forward", "all_gather"] == (tensor, 2 * 2 * whole, 4)
    assert found["residual from feed-forward", "reduce_scatter"] == (
        tensor,
        2 * whole,
        2,
    )  # not again: only the next layer reads it
    assert found["residual from feed-forward", "all_gather"] == (tensor, 2 * whole, 2)
    for what in ("embedding lookup", "hidden state for the loss"):
        assert {found[what, kind] for kind in ("all_gather", "reduce_scatter")} == {(tensor, whole, 1)}
    assert found["softmax of the loss", "all_reduce"] == (tensor, 2 * 2 * 64 * 4 // 2, 2)  # largest and sum of 64 tokens
    assert found["gradients", "all_reduce"] == (tensor, 2 * 5 * 16 * 4 // 2, 3)
    assert not [what for what, _ in found if what.startswith("weights")]


def test_without_remat_and_without_gathered_weights_nothing_is_sent_again():
    found = told(small(remat="none"), tensor=2)
    assert found["residual to attention", "all_gather"][2] == found["residual from attention", "reduce_scatter"][2] == 2
    forgetful = told(small(remat="none"), tensor=2, fsdp=2)  # as gathered weights are not kept, nothing gathered is
    assert forgetful["residual to attention", "all_gather"][2] == 4
    assert forgetful["residual from attention", "reduce_scatter"][2] == 2


def test_in_a_period_of_two_layers_the_first_is_computed_again_to_its_end():
    config = small(moe={"pattern": "interleaved", "num_experts": 2})
    config.model.num_layers = 4
    assert layer_kinds(config.model) == ["dense", "moe", "dense", "moe"]
    found = told(config, tensor=2)
    assert found["residual from feed-forward", "reduce_scatter"][2] == 4 + 2


def test_context_gathers_keys_and_values_of_the_row():
    found = told(small(), context=2)
    one = 8 * 8 * 2 * 4 * 2 // 2  # b T K h w, of which half is sent
    assert found["keys and values", "all_gather"] == (("context",), 2 * 2 * 2 * one, 8)
    assert found["keys and values", "reduce_scatter"] == (("context",), 2 * 2 * 2 * one, 4)  # in float32
    assert found["weights", "all_gather"][1] == 2 * 2 * 1920 * 2 // 2  # weights lie split along context as well
    both = told(small(), context=2, tensor=2)
    assert both["keys and values", "all_gather"][1] == 2 * 2 * 2 * one // 2  # of one of two heads


# --------------------------------------------------------------------------------------------------------------- sparse


def test_slots_of_experts_travel_there_and_back_forward_again_and_backward():
    config = small(moe={"pattern": "all", "num_experts": 4, "top_k": 2, "capacity_factor": 1.0}, micro_batches=2)
    found = told(config, expert=2)
    slots = 2 * 4 * 4 * 16 * 2 // 2  # 2 rows, 4 experts, 8 * 2 / 4 slots, D, w; half stays
    for what in ("slots to experts", "slots from experts"):
        assert found[what, "all_to_all"] == (("expert",), 3 * 2 * 2 * slots, 12)
    # attention and the router, in float32, are gathered along expert; the experts' own tensors are not
    assert found["weights", "all_gather"][1] == 2 * 2 * 2 * (ATTENTION * 2 + 16 * 4 * 4) // 2
    assert found["weights", "reduce_scatter"][1] == 2 * 2 * (ATTENTION + 16 * 4) * 4 // 2
    assert found["gradients", "all_reduce"][1] == 2 * 5 * 16 * 4 // 2


def test_dropless_experts_are_given_all_rows():
    config = small(moe={"pattern": "all", "num_experts": 4, "top_k": 2, "dispatch": "dropless"})
    found = told(config, expert=4)
    tokens = 8 * 8  # of the 4 devices together
    expert = ("expert",)
    assert found["tokens to experts", "all_gather"] == (expert, 2 * 2 * tokens * 16 * 2 * 3 // 4, 4)
    assert found["tokens to experts", "reduce_scatter"] == (expert, 2 * tokens * 16 * 2 * 3 // 4, 2)
    assert found["gates to experts", "all_gather"] == (expert, 2 * 2 * tokens * 2 * 2 * 3 // 4, 4)
    assert found["choices to experts", "all_gather"] == (expert, 2 * 2 * tokens * 2 * 4 * 3 // 4, 4)
    assert ("choices to experts", "reduce_scatter") not in found  # integers have no gradient
    assert found["tokens from experts", "reduce_scatter"] == (expert, 2 * tokens * 16 * 2 * 3 // 4, 2)


def test_a_layer_of_depth_routing_sends_its_tokens_round_the_ring():
    found = told(small(mod={"pattern": "all", "capacity": 0.5}), context=4)
    # Two hops each way, of 8 rows of 2 tokens, of those taken as many, as one is filled up to an early and a late one.
    there, back = 4 * 8 * 2 * 16 * 2, 4 * 8 * 2 * 16 * 2
    assert found["tokens to layer", "permute"] == (("context",), 2 * 3 * there, 2 * 3 * 4)
    assert found["tokens from layer", "permute"] == (("context",), 2 * 2 * back, 2 * 2 * 4)
    assert found["routing logits", "all_gather"] == (("context",), 2 * 2 * 2 * 8 * 8 * 4 * 3 // 4, 8)


def test_a_routed_block_sends_keys_and_sums_of_the_tokens_it_takes_alone():
    config = small(mod={"pattern": "all", "capacity": 0.5, "scope": "block"})
    assert told(config, context=2)["keys and values", "all_gather"][1] == 2 * 2 * 2 * (8 * 4 * 2 * 4 * 2 // 2)
    found = told(config, tensor=2)
    assert found["residual within layer", "all_reduce"] == (("tensor",), 3 * 2 * 2 * (8 * 4 * 16 * 2) // 2, 6)
    assert found["residual to layer", "all_gather"] == (("tensor",), 2 * 2 * 8 * 8 * 16 * 2 // 2, 4)
    assert ("residual to attention", "all_gather") not in found


def test_balance_over_the_batch_costs_another_forward_pass():
    once = told(small(moe={"pattern": "all"}, micro_batches=2), fsdp=2)
    twice = told(small(moe={"pattern": "all", "balance_over": "batch"}, micro_batches=2), fsdp=2)
    assert twice["weights", "all_gather"][1] * 2 == once["weights", "all_gather"][1] * 3
    assert twice["weights", "reduce_scatter"] == once["weights", "reduce_scatter"]
    alone = told(
        small(moe={"pattern": "all", "balance_over": "batch"}), fsdp=2
    )  # of one micro-batch its own load is the batch's
    assert alone == told(small(moe={"pattern": "all"}), fsdp=2)


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_is_its_layers_and_what_lies_outside_of_them(name):
    config, sizes = load(name), Sizes(fsdp=2, context=2, tensor=2)
    config.train.micro_batches = config.train.batch_size // 2
    layers = [t for kind in layer_kinds(config.model) for t in layer_transfers(config, sizes, kind)]
    inside = {t.what for t in layers}
    of_layers = sum(t.bytes for t in layers) * config.train.micro_batches
    of_step = sum(t.bytes for t in transfers(config, sizes) if t.what in inside)
    assert of_step == pytest.approx(of_layers, rel=1e-9)
    assert {t.what for t in transfers(config, sizes)} - inside == {
        "weights of embedding and head",
        "embedding lookup",
        "hidden state for the loss",
        "softmax of the loss",
        "gradients",
    }


@pytest.mark.parametrize("axis", AXES)
def test_twice_the_micro_batches_send_weights_twice_and_tokens_once(axis):
    def sums(micro_batches: int) -> dict[bool, int]:
        config = small(moe={"pattern": "all", "num_experts": 4, "capacity_factor": 1.0}, micro_batches=micro_batches)
        found = transfers(config, Sizes(**{axis: 2}))
        return {weights: sum(t.bytes for t in found if t.what.startswith("weights") == weights) for weights in (False, True)}

    one, two = sums(1), sums(2)
    assert two == {False: one[False], True: 2 * one[True]}


def test_transfers_tell_all_that_is_needed_of_them():
    found = transfers(small(), Sizes(data=2, fsdp=2))
    assert all(isinstance(each, Transfer) and each.bytes > 0 and each.count > 0 and each.axes for each in found)
    assert len({(t.what, t.kind, t.axes) for t in found}) == len(found)
