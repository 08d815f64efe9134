"""A state comes back bit for bit by its canonical names, and nothing is used that does not verify."""

import numpy as np
import pytest

from lumina.architecture import layer_kinds, layer_plan, tensor_table
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.interchange import orbax
from lumina.interchange.state import MODEL, OPTIMIZER, State, arrays, load, locate, read, shapes, write
from lumina.runs.steps import Steps, read_manifest, write_manifest
from tests.lumina.interchange.states import add_step, assert_same, every_kind, make_directory, make_run, random_state

CONFIG = every_kind()


@pytest.fixture
def state():
    return random_state(CONFIG)


# ----------------------------------------------------------------------------------------------------------- two files


def test_a_state_comes_back_bit_for_bit(tmp_path, state):
    write(tmp_path, state)
    found = read(tmp_path)
    assert_same(found, state)
    assert (found.step, found.updates, found.skipped, found.loss_scale, found.good_steps) == (7, 5, 2, 512.0, 3)
    assert found.is_whole


def test_a_model_alone_is_one_file(tmp_path, state):
    write(tmp_path, State(7, state.weights))
    assert [path.name for path in tmp_path.iterdir()] == [MODEL]
    found = read(tmp_path, step=7)
    assert found.step == 7
    assert not found.is_whole
    assert {name: array.tobytes() for name, array in found.weights.items()} == {
        name: array.tobytes() for name, array in state.weights.items()
    }


def test_names_are_those_of_the_table_and_moments_have_theirs(tmp_path, state):
    assert set(arrays(state)) == set(shapes(CONFIG))
    assert "blocks.3.moe.bias" in arrays(state)
    assert "first_moment.blocks.3.mod.router" in arrays(state)
    assert "first_moment.blocks.3.moe.bias" not in arrays(state)  # state, which no gradient reaches


def test_an_array_that_is_no_block_of_memory_is_written_as_it_reads(tmp_path, state):
    name = "blocks.0.attention.query"
    state.weights[name] = np.asarray(state.weights[name][:, ::-1])
    write(tmp_path, state)
    assert read(tmp_path).weights[name].tolist() == state.weights[name].tolist()


@pytest.mark.parametrize("data", [b"", b"\x80\x04}q\x00.", bytes(8)], ids=["empty", "a_pickle", "zeros"])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    (tmp_path / MODEL).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------------- leaves of the JAX trainer


def test_leaves_of_jax_are_named_by_layer_and_unstacked():
    model = CONFIG.model
    plan = layer_plan(layer_kinds(model))
    assert [(s.start, s.kinds, s.repeats) for s in plan] == [(0, ("dense", "moe", "dense+mod", "moe+mod", "dense", "moe"), 1)]
    stacked = every_kind(moe={"pattern": "interleaved"}, mod={"pattern": "none"}).model
    (segment,) = layer_plan(layer_kinds(stacked))
    assert (segment.kinds, segment.repeats) == (("dense", "moe"), 3)
    router = np.arange(3 * 16 * 4, dtype=np.float32).reshape(3, 16, 4)
    parts = orbax.from_leaves(stacked, {"optimizer.1.mu.segments.0.1.moe.router": router, "optimizer.1.count": np.int32(5)})
    assert {name: array.tolist() for name, array in parts["first_moment"].items()} == {
        f"blocks.{layer}.moe.router": router[i].tolist() for i, layer in enumerate((1, 3, 5))
    }
    assert parts["updates"] == 5
    assert parts["weights"] == {}


def test_naming_leaves_and_back_changes_nothing():
    model = every_kind(moe={"pattern": "interleaved"}, mod={"pattern": "none"}).model
    rng = np.random.default_rng(0)
    leaves = {
        "variables.params.embedding": rng.random((300, 16)),
        "variables.params.final_norm.scale": rng.random(16),
        "variables.biases.segments.0.1.moe.bias": rng.random((3, 4)),
        "optimizer.1.nu.segments.0.0.feedforward.up": rng.random((3, 16, 24)),
        "guard.losses_W": rng.random(128),
        "step": np.int32(3),
    }
    back = dict(orbax.to_leaves(model, orbax.from_leaves(model, leaves), leaves))
    assert {name: array.tobytes() for name, array in back.items()} == {name: a.tobytes() for name, a in leaves.items()}


def test_a_leaf_of_no_state_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.1\.trace\.embedding: no such part"):
        orbax.leaf(layer_plan(layer_kinds(CONFIG.model)), "optimizer.1.trace.embedding")


# ----------------------------------------------------------------------------------------------- a run, or a directory


def test_of_a_run_the_newest_or_the_best_or_a_step_is_loaded(tmp_path):
    run = make_run(tmp_path / "run", CONFIG, 2, 4, 6, best=4)
    for given, step in (({}, 6), ({"best": True}, 4), ({"step": 2}, 2)):
        config, found, manifest = load(run.path, **given)
        assert config == CONFIG
        assert_same(found, random_state(CONFIG, step))
        assert manifest["progress"]["rows"] == 4 * step
        assert list(found.weights) == [tensor.name for tensor in tensor_table(CONFIG.model)]


def test_a_damaged_step_is_passed_over_aloud(tmp_path, capsys):
    run = make_run(tmp_path / "run", CONFIG, 2, 4)
    flip(Steps(run.checkpoints).directory(4) / OPTIMIZER)
    assert load(run.path)[1].step == 2
    assert "4 is damaged and passed over: optimizer.safetensors: its contents changed" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"/4: damaged: optimizer\.safetensors"):
        load(run.path, step=4)


def test_values_that_are_not_those_saved_are_refused_though_every_file_verifies(tmp_path):
    run = make_run(tmp_path / "run", CONFIG)
    add_step(run, random_state(CONFIG, 2), **{"blocks.3.moe.router": "0" * 16})
    assert Steps(run.checkpoints).verify(2) == []
    with pytest.raises(CheckpointError, match=r"damaged: blocks\.3\.moe\.router: not the values that were saved"):
        load(run.path)


def test_a_run_without_a_tensor_of_its_model_is_refused(tmp_path):
    run = make_run(tmp_path / "run", CONFIG)
    state = random_state(CONFIG, 2)
    del state.weights["blocks.5.moe.bias"]
    add_step(run, state)
    with pytest.raises(CheckpointError, match=r"blocks\.5\.moe\.bias is missing, the model needs \(\(4,\), 'float32'\)"):
        load(run.path)


def test_a_directory_is_loaded_with_its_step(tmp_path, state):
    path = make_directory(tmp_path / "model", CONFIG, State(7, state.weights))
    config, found, _ = load(path)
    assert (config, found.step, found.is_whole) == (CONFIG, 7, False)
    assert_same(found, State(7, state.weights))
    whole = make_directory(tmp_path / "whole", CONFIG, state)
    assert_same(load(whole)[1], state)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def narrow(path):
    state = read(path)
    state.weights["final_norm.scale"] = state.weights["final_norm.scale"].astype(np.float16)
    write(path, State(7, state.weights))
    write_manifest(path, {"step": 7})


def slip_in(path):
    write(path, random_state(CONFIG))  # moments from elsewhere, of which the manifest knows nothing


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda path: flip(path / MODEL), CheckpointError, "damaged: model.safetensors: its contents changed"),
        (lambda path: (path / MODEL).unlink(), CheckpointError, "no whole checkpoint"),
        (lambda path: (path / "manifest.json").unlink(), CheckpointError, "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{}"), CheckpointError, "not a manifest that can be trusted"),
        (slip_in, CheckpointError, "damaged: optimizer.safetensors: not in the manifest"),
        (narrow, CheckpointError, "final_norm.scale is ((16,), 'float16'), the model needs ((16,), 'float32')"),
        (lambda path: (path / "config.json").unlink(), UsageError, "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), ConfigError, "cannot be read as a config"),
        (lambda path: (path / "config.json").write_text('{"model": {"d_model": 0}}'), ConfigError, "must be at least 1"),
    ],
    ids=["flipped", "no_model", "no_manifest", "forged", "slipped_in", "narrow", "no_config", "half_config", "bad_config"],
)
def test_a_directory_that_does_not_verify_is_refused(tmp_path, state, damage, error, says):
    path = make_directory(tmp_path / "model", CONFIG, State(7, state.weights))
    damage(path)
    with pytest.raises(error) as refused:
        load(path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="gone: no such directory; give a run directory"):
        locate(tmp_path / "gone")


def test_a_manifest_of_a_directory_covers_what_lies_below(tmp_path, state):
    path = tmp_path / "model"
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "ranks").write_text("a")
    write_manifest(path, {"step": 3})
    assert read_manifest(path)["files"]["tokenizer/ranks"]["bytes"] == 1
    assert read_manifest(path)["step"] == 3
