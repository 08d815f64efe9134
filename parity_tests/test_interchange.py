"""A run may begin in one framework and go on in the other: states cross bit for bit, and training goes on as it would have."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import lumina_jax.device
import lumina_jax.train
import lumina_torch.device
import lumina_torch.train
from lumina.config import CheckpointConfig, save
from lumina.errors import CheckpointError, UsageError
from lumina.interchange import orbax
from lumina.interchange.state import arrays, load
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.steps import Steps
from lumina_jax import checkpoint as of_jax
from lumina_jax.digest import digests
from lumina_jax.mesh import one_device, shaped_whole, whole
from lumina_jax.step import init_state, state_shapes
from lumina_torch import checkpoint as of_torch
from parity_tests.lanes import record
from parity_tests.pairs import distance
from tests.lumina.interchange.states import assert_same, every_kind
from tests.lumina_jax.tiny import tiny

STEPS, EVERY = 6, 3
STACKED = {"moe": {"pattern": "interleaved"}, "mod": {"pattern": "none"}}  # layers that share an array in JAX
TRAINERS = {"lumina_jax": lumina_jax.train.train_and_evaluate, "lumina_torch": lumina_torch.train.train_and_evaluate}


def like(config):
    return shaped_whole(one_device(), state_shapes(config)[0])


def jax_state(config):
    """With a value of its own in every place, as after training."""
    rng = np.random.default_rng(0)

    def values(a):
        random = rng.standard_normal(a.shape) if jnp.issubdtype(a.dtype, jnp.floating) else rng.integers(1, 99, a.shape)
        return jnp.asarray(random, a.dtype)

    return jax.device_put(jax.tree.map(values, jax.eval_shape(lambda: init_state(config)[1])), whole(one_device()))


def silent(run):
    return Events(run, lambda line: None)


def save_jax(path, config, state, step):
    run = RunDirectory(path)
    run.path.mkdir()
    return _saved(run, of_jax.Checkpoints(run, CheckpointConfig(), silent(run), like(config)), config, state, step)


def save_torch(path, config, state, step):
    run = RunDirectory(path)
    run.path.mkdir()
    return _saved(run, of_torch.Checkpoints(run, config, silent(run)), config, state, step)


def _saved(run, checkpoints, config, state, step):
    save(config, run.config)
    checkpoints.save(step, state, lambda parameters: {"progress": {"best_step": None, "rows": 9}, "ledger": None})
    checkpoints.close()
    assert checkpoints.failure == ""
    return run


@pytest.mark.parametrize("patterns", [{}, STACKED], ids=["every_kind", "stacked"])
def test_jax_to_torch_to_jax_is_bit_for_bit(tmp_path, patterns):
    config = every_kind(**patterns)
    expected = jax_state(config)
    step = int(expected.step)
    first = save_jax(tmp_path / "first", config, expected, step)
    _, crossed, _ = load(first.path)
    there = of_torch.from_state(config, crossed)
    assert there.step == step
    assert dict(there.transformer.named_parameters())["blocks.1.moe.router"].tolist() == (
        expected.variables.params["segments"][0][1]["moe"]["router"][...][0].tolist()
    )
    second = save_torch(tmp_path / "second", config, there, step)
    back, _ = of_jax.load(second, like(config))
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    for name, array in of_jax.by_name(expected).items():
        other = of_jax.by_name(back)[name]
        assert (other.dtype, other.shape, other.sharding) == (array.dtype, array.shape, array.sharding), name
        before, after = (np.frombuffer(np.asarray(each).tobytes(), np.uint8) for each in (array, other))
        record("interchange", "every kind" if not patterns else "stacked layers", int(np.bitwise_count(before ^ after).sum()))
    assert_same(load(second.path)[1], crossed)


def test_the_digest_of_an_array_is_that_of_jax():
    rng = np.random.default_rng(0)
    named = {
        "matrix": rng.standard_normal((7, 33)).astype(np.float32),
        "number": np.asarray(5, np.int32),
        "empty": np.zeros((0, 4), np.float32),
        "half": rng.standard_normal(9).astype(np.float16),
        "nan": np.array([np.nan, -0.0], np.float32),
    }
    assert {name: orbax.digest(array) for name, array in named.items()} == digests(named)


def test_values_of_jax_that_are_not_those_saved_are_refused(tmp_path, monkeypatch):
    config = every_kind()
    run = save_jax(tmp_path / "run", config, jax_state(config), 5)
    read = orbax.read

    def altered(directory, names):
        named = read(directory, names)
        named["optimizer.1.nu.final_norm.scale"] = named["optimizer.1.nu.final_norm.scale"][::-1]
        return named

    monkeypatch.setattr(orbax, "read", altered)
    with pytest.raises(CheckpointError, match=r"damaged: optimizer\.1\.nu\.final_norm\.scale: not the values that were saved"):
        load(run.path)


# ----------------------------------------------------------------------------------------------------------- two trainers


def config(**changes):
    made = tiny(**{"steps": STEPS, "eval_every": EVERY, "eval_rows": 16, **changes})
    made.data.source, made.checkpoint.every, made.mesh.data = "synthetic", EVERY, 1
    made.monitor.log_every, made.monitor.sample_tokens, made.monitor.tensorboard = 1, 4, False
    return made


def beginning_from(run, part="state", **changes):
    made = config(**changes)
    made.checkpoint.init_from, made.checkpoint.init_part = str(run.path), part
    return made


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs here share what JAX compiles; none measures the machine."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        for device in (lumina_jax.device, lumina_torch.device):
            patch.setattr(device, "matmul_peak", lambda *arguments: 1e12)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def trained(path, program, settings):
    run = RunDirectory(path)
    assert TRAINERS[program](settings, run.path) == 0
    return run


def losses(run, kind="train"):
    return {record["step"]: record["loss"] for record in read_json_lines(run.metrics) if record["kind"] == kind}


@pytest.fixture(scope="module")
def of_each(tmp_path_factory):
    """A run of 6 steps in each framework; the states after 3 and 6 are kept."""
    path = tmp_path_factory.mktemp("runs")
    return {program: trained(path / program, program, config()) for program in TRAINERS}


@pytest.mark.parametrize(("here", "there"), [("lumina_jax", "lumina_torch"), ("lumina_torch", "lumina_jax")])
def test_a_run_begun_in_one_framework_goes_on_in_the_other(of_each, tmp_path, here, there):
    source = RunDirectory(tmp_path / "half")
    whole_run = of_each[here]
    shutil.copytree(whole_run.path, source.path)
    Steps(source.checkpoints).remove([STEPS])
    run = trained(tmp_path / "other", there, beginning_from(source))
    found, expected = losses(run), losses(whole_run)
    assert list(found) == [4, 5, 6]
    for step, loss in found.items():
        assert loss == pytest.approx(expected[step], rel=1e-6), step
    assert losses(run, "eval")[STEPS] == pytest.approx(losses(whole_run, "eval")[STEPS], rel=1e-6)
    rows, expected_rows = (
        [(r["step"], r["rows"]) for r in read_json_lines(each.ledger) if "rows" in r] for each in (run, whole_run)
    )
    assert rows == expected_rows  # those of the steps before as well
    (begun,) = [event for event in read_json_lines(run.events) if event["event"] == "begun"]
    assert begun["begun_from"] == {"path": str(source.path), "part": "state", "step": EVERY}
    final, other = load(run.path)[1], load(whole_run.path)[1]
    assert (final.step, final.updates) == (other.step, other.updates) == (STEPS, STEPS)
    record("resume", f"{EVERY} steps in {here}, {EVERY} in {there}", distance(final.weights, other.weights))
    for name, array in arrays(other).items():
        if array.dtype == np.float32 and name != "losses_W":
            assert np.abs(arrays(final)[name] - array).max() <= 1e-5 * np.abs(array).max(), name
    assert json.loads(run.config.read_text())["checkpoint"]["init_from"] == str(source.path)


@pytest.mark.parametrize(("here", "there"), [("lumina_jax", "lumina_torch"), ("lumina_torch", "lumina_jax")])
def test_a_run_of_the_other_framework_is_refused_with_what_would_work(of_each, here, there):
    run = of_each[here]
    with pytest.raises(UsageError) as refused:
        TRAINERS[there](config(steps=9), run.path)
    assert str(refused.value) == (
        f"{run.path}: holds checkpoints of {here}; to go on in {there}, choose a new --workdir with "
        f"--config.checkpoint.init_from={run.path}"
    )


def test_weights_alone_begin_a_fresh_run(of_each, tmp_path):
    source = of_each["lumina_torch"]
    run = trained(tmp_path / "run", "lumina_jax", beginning_from(source, "weights", seed=5))
    assert list(losses(run)) == list(range(1, STEPS + 1))
    first = losses(run)[1]
    assert first < losses(source)[1] - 0.1  # it has learned something already
    assert load(run.path)[1].updates == STEPS
