"""What is saved comes back bit for bit, and what does not fit is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError
from lumina.runs.directory import RunDirectory
from lumina_jax.checkpoint import Checkpoints
from lumina_jax.step import init_state, state_shapes
from tests.lumina_jax.tiny import tiny

KEEP_TWO = CheckpointConfig(keep=2)


@pytest.fixture(scope="module")
def state():
    """A state with a value of its own in every place, as after training."""
    shapes = jax.eval_shape(lambda: init_state(tiny())[1])
    rng = np.random.default_rng(0)

    def values(a):
        random = rng.standard_normal(a.shape) if jnp.issubdtype(a.dtype, jnp.floating) else rng.integers(1, 99, a.shape)
        return jnp.asarray(random, a.dtype)

    return jax.tree.map(values, shapes)


def later(state, by):
    return jax.tree.map(lambda a: a + jnp.asarray(by, a.dtype), state)


def shapes(**changes):
    return state_shapes(tiny(**changes))[0]


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def steps(path):
    return sorted(int(each.name) for each in path.iterdir())


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run with checkpoints of steps 1 to 4, of which the best was step 2."""
    run = RunDirectory(tmp_path_factory.mktemp("run"))
    checkpoints = Checkpoints(run, KEEP_TWO)
    for step in (1, 2, 3, 4):
        if step == 2:
            checkpoints.save_best(step, later(state, step), {"best_loss": 0.25})
        checkpoints.save(step, later(state, step), {"best_step": 2, "losses": [0.1 + 0.2, None]})
    checkpoints.wait()
    checkpoints.close()
    return run


@pytest.fixture
def reopened(saved):
    """The same run as another process finds it."""
    checkpoints = Checkpoints(saved, KEEP_TWO, create=False)
    yield checkpoints
    checkpoints.close()


def test_the_newest_state_comes_back_bit_for_bit_with_its_progress(reopened, state):
    assert reopened.latest_step == 4
    found, progress = reopened.restore(shapes())
    assert_same_bits(found, later(state, 4))
    assert progress == {"best_step": 2, "losses": [0.1 + 0.2, None]}


def test_the_best_state_is_kept_apart_from_the_newest(reopened, state):
    found, progress = reopened.restore_best(shapes())
    assert_same_bits(found, later(state, 2))
    assert progress == {"best_loss": 0.25}


def test_the_newest_are_kept_and_the_best(saved):
    assert steps(saved.checkpoints) == [3, 4]
    assert steps(saved.best) == [2]


def test_a_better_one_replaces_the_best(state, tmp_path):
    run = RunDirectory(tmp_path)
    checkpoints = Checkpoints(run, KEEP_TWO)
    for step in (2, 5):
        checkpoints.save_best(step, later(state, step), {})
    checkpoints.wait()
    assert steps(run.best) == [5]
    assert_same_bits(checkpoints.restore_best(shapes())[0], later(state, 5))
    checkpoints.close()


def test_without_a_best_one_the_newest_stands_in(state, tmp_path):
    checkpoints = Checkpoints(RunDirectory(tmp_path), KEEP_TWO)
    checkpoints.save(3, state, {})
    checkpoints.wait()
    assert_same_bits(checkpoints.restore_best(shapes())[0], state)
    checkpoints.close()


def test_a_saved_state_may_change_at_once(state, tmp_path):
    checkpoints = Checkpoints(RunDirectory(tmp_path), KEEP_TWO)
    doomed = jax.tree.map(jnp.copy, state)
    checkpoints.save(1, doomed, {})
    jax.tree.map(lambda a: a.delete(), doomed)  # as the next step does, which is given the state's memory
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(shapes())[0], state)
    checkpoints.close()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"d_ff": 32}}, r"\.experts\.down.* is \(\(2, 4, 24, 16\), 'float32'\), the model needs \(\(2, 4, 32, 16\)"),
        ({"model": {"qk_norm": True}}, r"\.key_norm\.scale.* is missing, the model needs \(\(2, 8\)"),
        ({"mod": {"pattern": "none"}}, r"\.mod\.bias.* is \(\(2,\), 'float32'\), the model needs none"),
    ],
    ids=["another_width", "a_tensor_more", "a_tensor_less"],
)
def test_a_state_of_another_shape_is_refused_by_name(reopened, changes, named):
    with pytest.raises(CheckpointError, match=named):
        reopened.restore(shapes(**changes))
    with pytest.raises(CheckpointError, match=named):
        reopened.restore_best(shapes(**changes))


def test_a_state_of_another_dtype_is_refused_and_not_cast(reopened):
    like = shapes()
    narrow = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), like.variables.params)
    with pytest.raises(CheckpointError, match=r"variables\.params\..*'float32'\), the model needs .*'bfloat16'"):
        reopened.restore(like._replace(variables=like.variables._replace(params=narrow)))


def test_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints; train the run with"):
        Checkpoints(RunDirectory(tmp_path), KEEP_TWO, create=False)


def test_a_run_without_a_finished_checkpoint_is_refused(tmp_path):
    checkpoints = Checkpoints(RunDirectory(tmp_path), KEEP_TWO)
    assert checkpoints.latest_step is None
    for restore in (checkpoints.restore, checkpoints.restore_best):
        with pytest.raises(CheckpointError, match="no finished checkpoint"):
            restore(shapes())
    checkpoints.close()


def test_saved_progress_may_change_at_once(state, tmp_path):
    checkpoints, progress = Checkpoints(RunDirectory(tmp_path), KEEP_TWO), {"last": {"loss": 1.5}}
    checkpoints.save(1, state, progress)
    progress["last"]["loss"] = 2.5
    checkpoints.wait()
    assert checkpoints.restore(shapes())[1] == {"last": {"loss": 1.5}}
    checkpoints.close()


def test_a_run_that_begins_again_replaces_a_best_one_of_a_later_step(state, tmp_path):
    run = RunDirectory(tmp_path)
    for step in (5, 2):
        checkpoints = Checkpoints(run, KEEP_TWO)
        checkpoints.save_best(step, later(state, step), {})
        checkpoints.close()
    assert steps(run.best) == [2]
