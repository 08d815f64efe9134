"""One model over many devices: every mesh computes what one device does, and sends what it should and no more."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from lumina.config import load
from lumina.mesh import AXES, Sizes
from lumina_jax.mesh import mesh_of, place_each, place_rows, shardings
from lumina_jax.model import by_canonical_name
from lumina_jax.plan import step_inputs
from lumina_jax.step import controls, init_state, make_eval_step, make_train_step, state_shapes
from parity_tests.lanes import record
from tests.lumina_jax.tiny import V, packed_batch, tiny

# `data` alone is in test_step.py.
MESHES = {
    "capacity": [
        Sizes(fsdp=4),
        Sizes(expert=4),
        Sizes(tensor=2),
        Sizes(context=4),
        Sizes(data=2, expert=2),
        Sizes(fsdp=2, tensor=2),
        Sizes(fsdp=2, context=2, tensor=2),
    ],
    "dropless": [Sizes(fsdp=8), Sizes(context=2), Sizes(expert=2, context=2, tensor=2)],
}
WIDE = {"d_model": 32, "num_heads": 4, "num_kv_heads": 2, "num_layers": 4, "vocab_size": V + 4}
TOKEN_BYTES = np.random.default_rng(1).integers(1, 9, V + 4).astype(np.int32)


def capacity():
    """Each kind of layer once: what is beyond the capacity is dropped, and the feed-forward alone is skipped."""
    moe, mod = {"pattern": "1,3", "shared_experts": 1, "bias_rate": 0.01}, {"pattern": "2,3", "predictor_width": 8}
    return tiny("moe+mod", WIDE, moe, mod, {"clip_norm": 0.5}, batch_size=8, micro_batches=2)


def dropless():
    """Nothing is dropped, whole blocks are skipped, and the load is balanced over the batch."""
    moe = {"pattern": "0,3", "dispatch": "dropless", "noop_experts": 2, "balance_over": "batch", "score": "sigmoid"}
    model = WIDE | {"qk_norm": True, "tie_embeddings": False}
    return tiny("moe+mod", model, moe, {"pattern": "1,3", "scope": "block"}, batch_size=8, micro_batches=1, remat="full")


CONFIGS = {"capacity": capacity, "dropless": dropless}


def steps(name, sizes, dtype, count=2):
    """(state, metrics) of each step, then held-out sums, as numpy arrays."""
    config = CONFIGS[name]()
    mesh = mesh_of(sizes, jax.devices()[: sizes.devices])
    graphdef, found = state_shapes(config)[1], []
    state = jax.tree.map(lambda a: a.astype(dtype) if a.dtype == np.float32 else a, _initial(name))
    state = jax.device_put(state, shardings(config, mesh, state))
    step = jax.jit(make_train_step(config, graphdef, mesh, TOKEN_BYTES, dtype))
    for number in range(count):
        batch = place_rows(mesh, _batch(number, dtype))
        state, metrics = step(state, batch, controls(config, True, place_each(mesh, 1)))
        found.append(jax.device_get((state, metrics)))
    held_out = jax.jit(make_eval_step(config, graphdef, TOKEN_BYTES, mesh, dtype))(state.variables, batch)
    return found, jax.device_get(held_out)


@functools.cache
def _initial(name):
    return jax.device_get(jax.jit(lambda: init_state(CONFIGS[name]())[1])())


def _batch(number, dtype):
    batch = packed_batch(8, number)
    uneven = np.random.default_rng(number).integers(0, 3, batch["weights"].shape)
    return batch | {"weights": (uneven * batch["weights"]).astype(dtype)}


def apart(found, wanted):
    """The largest difference, relative to the largest value of its array."""

    def of(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        return np.max(np.abs(a - b), initial=0) / np.max(np.abs(b), initial=1e-30)

    return max(jax.tree.leaves(jax.tree.map(of, found, wanted)))


@functools.cache
def _of_one_device(name):
    with jax.enable_x64(True):
        return steps(name, Sizes(), np.float64)


# Shares of tokens are means of float32 in any case.
@pytest.mark.parametrize(
    ("name", "sizes"),
    [pytest.param(name, sizes, id=f"{name}-{sizes}".replace(" ", "-")) for name in CONFIGS for sizes in MESHES[name]],
)
def test_every_mesh_makes_the_steps_of_one_device(name, sizes):
    one, of_one = _of_one_device(name)
    with jax.enable_x64(True):
        several, of_several = steps(name, sizes, np.float64)
    for (a, metrics_a), (b, metrics_b) in zip(several, one, strict=True):
        assert metrics_a.pop("stop") == sizes.devices
        assert metrics_a.keys() == metrics_b.keys() - {"stop"} >= {"loss", "moe", "mod", "text_bytes"}
        figure = apart((a.variables, a.optimizer, metrics_a["loss"]), (b.variables, b.optimizer, metrics_b["loss"]))
        record("sharded, float64", f"{name}, {sizes}", figure)
        assert apart(metrics_a, {name: metrics_b[name] for name in metrics_a}) < 1e-6
    record("sharded, float64", f"{name}, {sizes}, evaluated", apart(of_several, of_one))


@pytest.mark.parametrize("name", CONFIGS)
def test_in_float32_gradients_stay_within_the_lane(name):
    """The first moment after one step is the gradient, scaled."""
    sizes = Sizes(fsdp=2, expert=2, tensor=2)
    (one, of_one), (several, of_several) = (steps(name, each, np.float32, 1) for each in (Sizes(), sizes))
    (a, metrics_a), (b, metrics_b) = several[0], one[0]
    record("sharded", f"{name}, {sizes}", apart(a.optimizer[1].mu, b.optimizer[1].mu))
    losses = apart((metrics_a["loss"], of_several["loss"]), (metrics_b["loss"], of_one["loss"]))
    record("sharded", f"{name}, {sizes}, losses", losses)


# ------------------------------------------------------------------------------------------------------ what is sent


@functools.cache
def sent(preset, sizes, **train):
    """(kind, type of its result) of each collective in the step of `preset`, lowered for a mesh of no devices."""
    config = load(preset)
    config.train.batch_size, config.train.micro_batches = 2 * sizes.row_parts, 2
    mesh = AbstractMesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    step = jax.jit(make_train_step(config, state_shapes(config)[1], mesh))
    text = step.trace(*step_inputs(config, mesh)).lower(lowering_platforms=("tpu",)).as_text()
    kinds = "all_gather|reduce_scatter|all_to_all|all_reduce|collective_permute"
    return re.findall(rf'"stablehlo\.({kinds})".*?-> tensor<([^>]*)>', text, re.DOTALL)


BIG = Sizes(data=4, fsdp=8, expert=8)


def test_no_expert_leaves_the_devices_that_share_it():
    """b14 on 256 devices: D 5120, F 22016, 8 experts, one on each device along `expert`."""
    found = sent("b14", BIG)
    weights = [of for kind, of in found if kind == "all_gather" and of.endswith(("5120x22016xbf16", "22016x5120xbf16"))]
    assert set(weights) == {"1x5120x22016xbf16", "1x22016x5120xbf16"}
    assert sum(kind == "all_to_all" for kind, _ in found) >= 4  # there and back, and the same backward


def test_weights_are_gathered_in_the_compute_dtype_and_their_gradients_summed_in_float32():
    found = sent("b14", BIG)
    experts = {of for kind, of in found if kind == "reduce_scatter" and "22016" in of}
    assert experts == {"1x640x22016xf32", "1x22016x640xf32"}
    assert "5120x40x128xbf16" in {of for kind, of in found if kind == "all_gather"}


def test_only_what_is_not_split_is_summed_whole_and_no_batch_is_gathered():
    found = sent("b14", BIG)
    T = load("b14").data.sequence_length
    assert not [of for kind, of in found if kind == "all_gather" and f"x{T}xi32" in of]
    largest = max(np.prod([int(n) for n in of.split("x")[:-1]] or [1]) for kind, of in found if kind == "all_reduce")
    assert largest <= 40 * 640 * 22016  # of an expert tensor of 40 layers the part that a device keeps, over `data`


def test_data_parallelism_sends_gradients_and_sums_alone():
    found = sent("debug", Sizes(data=256))
    assert {kind for kind, _ in found} == {"all_reduce"}


def test_a_mesh_of_one_device_sends_nothing():
    assert sent("debug", Sizes()) == []


def test_the_experts_tokens_and_not_their_weights_travel_where_nothing_else_is_split():
    config = load("debug")
    D, F = config.model.d_model, config.model.d_ff
    found = sent("debug", Sizes(expert=8))  # dropless: tokens are gathered, and results scattered
    gathered = {of for kind, of in found if kind == "all_gather"}
    assert not [of for of in gathered if f"{D}x{F}" in of or f"{F}x{D}" in of]
    assert any(kind == "reduce_scatter" for kind, _ in found)


# ------------------------------------------------------------------------------------------------------ how it lies


def test_what_a_device_keeps_is_what_the_rules_say():
    config, sizes = capacity(), Sizes(fsdp=2, expert=2, tensor=2)
    mesh = mesh_of(sizes, jax.devices())
    state = jax.jit(lambda: init_state(config)[1], out_shardings=shardings(config, mesh, state_shapes(config)[0]))()
    found = by_canonical_name(config.model, state.variables.params)
    for name, array in by_canonical_name(config.model, _initial("capacity").variables.params).items():
        assert np.array_equal(found[name], array)  # values do not depend on the mesh
    # D 32 over fsdp x expert, or over fsdp alone for experts; 4 heads, 24 of F and V over tensor; 4 experts over expert.
    second, moments = state.variables.params["segments"][0][1], state.optimizer[1].mu["segments"][0][1]
    for of in (second, moments):
        assert of["attention"]["query"].addressable_shards[0].data.shape == (1, 8, 2, 8)
        assert of["moe"]["experts"]["gate"].addressable_shards[0].data.shape == (1, 2, 16, 12)
        assert of["moe"]["experts"]["down"].addressable_shards[0].data.shape == (1, 2, 12, 16)
        assert of["attention_norm"]["scale"].addressable_shards[0].data.shape == (1, 32)
    assert state.variables.params["embedding"].addressable_shards[0].data.shape == ((V + 4) // 2, 8)


def test_a_process_reads_the_rows_of_its_devices():
    mesh = mesh_of(Sizes(data=2, fsdp=2, tensor=2), jax.devices())
    rows = place_rows(mesh, {"a": np.arange(24).reshape(8, 3)})["a"]
    assert np.array_equal(rows, np.arange(24).reshape(8, 3))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2, 3)}
