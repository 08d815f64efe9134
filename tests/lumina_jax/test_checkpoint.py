"""What is saved comes back bit for bit, what is damaged is passed over, and what does not fit is refused by name."""

import errno
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError
from lumina.runs.checkpoints import why
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.steps import Steps
from lumina_jax.checkpoint import Checkpoints, by_name, load, parameters_digest
from lumina_jax.digest import digests
from lumina_jax.mesh import one_device, shaped_whole, whole
from lumina_jax.step import init_state, state_shapes
from tests.lumina_jax.tiny import tiny
from tests.waiting import until

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def state():
    """A state with a value of its own in every place, as after training."""
    rng = np.random.default_rng(0)

    def values(a):
        random = rng.standard_normal(a.shape) if jnp.issubdtype(a.dtype, jnp.floating) else rng.integers(1, 99, a.shape)
        return jnp.asarray(random, a.dtype)

    return jax.device_put(jax.tree.map(values, jax.eval_shape(lambda: init_state(tiny())[1])), whole(one_device()))


@jax.jit
def later(state, by):
    return jax.tree.map(lambda a: a + by.astype(a.dtype), state)


later_in_place = jax.jit(later, donate_argnums=0)


def at(state, step):
    return later(state, jnp.int32(step))


def like(**changes):
    return shaped_whole(one_device(), state_shapes(tiny(**changes))[0])


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def record(best=None, **more):
    """What a loop adds to the manifest."""
    return lambda parameters: {"progress": {"best_step": best, "losses": [0.1 + 0.2, None], **more}, "ledger": {"bytes": 7}}


class Opened:
    """Checkpoints of a run, and what they tell."""

    def __init__(self, path, backup=None, shapes=None, **config):
        self.run, self.said = RunDirectory(path), []
        events = Events(self.run, self.said.append)
        self.it = Checkpoints(self.run, CheckpointConfig(**config), events, shapes or like(), backup)

    def save(self, state, *steps, best=None):
        for step in steps:
            self.it.save(step, at(state, step), record(best))
        self.it.wait()

    def save_and_back_up(self, state, *steps):
        for step in steps:
            self.save(state, step)
            until(lambda: not self.it._in_backup)  # a thread of its own, which passes over a step when a newer one waits

    @property
    def steps(self):
        return Steps(self.run.checkpoints).all()

    @property
    def events(self):
        return [(event["event"], event["step"]) for event in read_json_lines(self.run.events)]


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of tmp_path, as often as a test asks."""
    made = []

    def open_again(**arguments):
        made.append(Opened(tmp_path, **arguments))
        return made[-1]

    yield open_again
    for each in made:
        each.it.close()


def damage(run, step):
    """Flip a bit in the middle of the largest file of a step; returns the file."""
    file = max((Steps(run.checkpoints).directory(step) / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


# ------------------------------------------------------------------------------------------------- saved and restored


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A run with checkpoints of steps 1 to 4, of which the best was step 2."""
    opened = Opened(tmp_path_factory.mktemp("run"))
    for step in (1, 2, 3, 4):
        opened.it.save(step, at(state, step), record(best=min(step, 2)))
    opened.it.close()
    return opened


def test_the_newest_state_comes_back_bit_for_bit_with_its_manifest(saved, state):
    found, manifest = Opened(saved.run.path).it.restore()
    assert_same_bits(found, at(state, 4))
    assert manifest["step"] == 4
    assert manifest["progress"] == {"best_step": 2, "losses": [0.1 + 0.2, None]}
    assert manifest["ledger"] == {"bytes": 7}


def test_a_restored_state_lies_where_it_was_asked_to(saved, state):
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    found, _ = Opened(saved.run.path, shapes=shaped_whole(mesh, state_shapes(tiny())[0])).it.restore()
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {whole(mesh)}
    assert_same_bits(found, at(state, 4))


def test_the_newest_two_stay_and_the_best(saved):
    assert saved.steps == [2, 3, 4]
    assert saved.events == [("saved", step) for step in (1, 2, 3, 4)]


def test_the_manifest_has_shape_dtype_and_digest_of_every_array(saved, state):
    manifest, named = Steps(saved.run.checkpoints).manifest(4), by_name(at(state, 4))
    found = digests(named)
    assert manifest["leaves"] == {
        name: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": found[name]} for name, a in named.items()
    }
    assert {"step", "guard.losses_W", "guard.skipped"} < set(named)


def test_the_digest_of_the_parameters_covers_parameters_and_biases_alone(saved, state):
    manifest, found = Steps(saved.run.checkpoints).manifest(4), digests(by_name(at(state, 4)))
    assert manifest["parameters"] == parameters_digest(found)
    for name in found:
        changed = parameters_digest({**found, name: "0" * 16}) != manifest["parameters"]
        assert changed == name.startswith("variables."), name


def test_the_record_is_made_with_the_digest_of_the_parameters(opened, state):
    checkpoints, given = opened(), []
    checkpoints.it.save(1, state, lambda parameters: given.append(parameters) or record()(parameters))
    checkpoints.it.wait()
    assert given == [parameters_digest(digests(by_name(state)))]


def test_loading_for_generation_finds_the_newest_or_the_best_and_changes_nothing(saved, state):
    before = {path: path.read_bytes() for path in saved.run.path.rglob("*") if path.is_file()}
    for best, step in ((False, 4), (True, 2)):
        found, at_step = load(saved.run, like(), best)
        assert at_step == step
        assert_same_bits(found, at(state, step))
    assert {path: path.read_bytes() for path in saved.run.path.rglob("*") if path.is_file()} == before


def test_without_an_evaluation_the_newest_stands_in_for_the_best(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 3, 5)
    assert load(checkpoints.run, like(), best=True)[1] == 5


def test_a_new_run_has_nothing_to_restore(opened):
    assert opened().it.restore() is None


def test_a_run_without_a_checkpoint_is_refused_for_generation(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint; train the run"):
        load(RunDirectory(tmp_path), like())


def test_a_state_given_away_after_saving_is_saved_as_it_was(opened, state):
    # As the next step does, which writes into the state's memory while the checkpoint is on its way to disk.
    checkpoints, expected = opened(keep=100), {}
    moving = later(state, jnp.int32(0))
    for step in range(1, 9):
        expected[step] = digests(by_name(moving))
        checkpoints.it.save(step, moving, record())
        for _ in range(3):
            moving = later_in_place(moving, jnp.int32(1))
    checkpoints.it.wait()
    for step, digest in expected.items():
        found = load_step(checkpoints.run, step)
        assert digests(by_name(found)) == digest


def load_step(run, step):
    """The state of one step, whatever the manifest says of its values."""
    from lumina_jax.checkpoint import _read

    steps = Steps(run.checkpoints)
    named = _read(steps.directory(step), by_name(like()), steps.manifest(step)["leaves"])
    return jax.tree.unflatten(jax.tree.structure(like()), named.values())


def test_a_step_that_exists_is_left_as_it_is(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1)
    before = Steps(checkpoints.run.checkpoints).manifest(1)
    checkpoints.it.save(1, at(state, 50), record())
    checkpoints.it.wait()
    assert Steps(checkpoints.run.checkpoints).manifest(1) == before
    assert_same_bits(checkpoints.it.restore()[0], at(state, 1))


def test_pinned_steps_and_those_that_a_number_divides_stay(opened, state):
    checkpoints = opened(keep_every=3)
    checkpoints.save(state, 1)
    Steps(checkpoints.run.checkpoints).pin(1)
    checkpoints.save(state, 2, 3, 4, 5, 6, best=4)
    assert checkpoints.steps == [1, 3, 4, 5, 6]


def test_what_a_process_left_half_written_is_removed(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1)
    leftover = checkpoints.it.steps.begin(2)
    opened()
    assert not leftover.exists()
    assert checkpoints.steps == [1]


# -------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_step_is_set_aside_by_name_and_an_older_one_used(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1, 2)
    file = damage(checkpoints.run, 2)
    again = opened()
    found, manifest = again.it.restore()
    assert manifest["step"] == 1
    assert_same_bits(found, at(state, 1))
    assert (again.run.checkpoints / "broken-2").is_dir()
    relative = file.relative_to(again.run.checkpoints / "2").as_posix()
    assert again.said == [f"step 2 is damaged, now broken-2: {relative}: its contents changed"]
    assert again.events[-1] == ("set aside", 2)


def test_values_that_are_not_those_saved_are_found_though_every_file_is_as_it_was_written(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1, 2)
    steps = Steps(checkpoints.run.checkpoints)
    manifest = steps.manifest(2)
    name = "variables.params.embedding"
    manifest["leaves"][name]["digest"] = "0" * 16  # as if memory had changed on the way from the digest to the disk
    forged = steps.begin(3)
    (steps.directory(2) / "state").rename(forged / "state")
    steps.commit(3, {key: value for key, value in manifest.items() if key not in ("format", "step", "files")})
    steps.remove([2])
    assert steps.verify(3) == []
    with pytest.raises(CheckpointError, match=f"3: damaged: {name}: not the values that were saved"):
        load(checkpoints.run, like())
    again = opened()
    assert again.it.restore()[1]["step"] == 1
    assert again.said == [f"step 3 is damaged, now broken-3: {name}: not the values that were saved"]


def test_when_no_checkpoint_is_whole_training_does_not_begin_anew(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1, 2)
    for step in (1, 2):
        damage(checkpoints.run, step)
    again = opened()
    for _ in range(2):  # nor when asked again
        with pytest.raises(CheckpointError, match=r"no checkpoint is whole, 2 were set aside \(broken-\*\); restore a backup"):
            again.it.restore()


def test_loading_passes_over_a_damaged_step_aloud_and_leaves_it(opened, state, capsys):
    checkpoints = opened()
    checkpoints.save(state, 1, 2)
    damage(checkpoints.run, 2)
    assert load(checkpoints.run, like())[1] == 1
    assert "2 is damaged and passed over: state/" in capsys.readouterr().err
    assert checkpoints.steps == [1, 2]


def test_a_damaged_best_step_is_refused_and_no_other_given_for_it(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1, 2, best=1)
    damage(checkpoints.run, 1)
    with pytest.raises(CheckpointError, match="/1: damaged: state/"):
        load(checkpoints.run, like(), best=True)
    assert load(checkpoints.run, like())[1] == 2


def test_a_best_step_that_is_gone_is_refused(opened, state):
    checkpoints = opened()
    checkpoints.save(state, 1, 2, best=1)
    checkpoints.it.steps.remove([1])
    with pytest.raises(CheckpointError, match="step 1 was the best, and is not there any more"):
        load(checkpoints.run, like(), best=True)


# ---------------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"d_ff": 32}}, r"\.experts\.down.* is \(\(2, 4, 24, 16\), 'float32'\), the model needs \(\(2, 4, 32, 16\)"),
        ({"model": {"qk_norm": True}}, r"\.key_norm\.scale.* is missing, the model needs \(\(2, 8\)"),
        ({"mod": {"pattern": "none"}}, r"\.mod\.bias.* is \(\(2,\), 'float32'\), the model needs none"),
    ],
    ids=["another_width", "a_tensor_more", "a_tensor_less"],
)
def test_a_state_of_another_shape_is_refused_by_name(saved, changes, named):
    with pytest.raises(CheckpointError, match=named):
        Opened(saved.run.path, shapes=like(**changes)).it.restore()
    for best in (False, True):
        with pytest.raises(CheckpointError, match=named):
            load(saved.run, like(**changes), best)


def test_a_state_that_does_not_fit_is_not_damaged(saved):
    before = saved.steps
    with pytest.raises(CheckpointError):
        Opened(saved.run.path, shapes=like(model={"d_ff": 32})).it.restore()
    assert Steps(saved.run.checkpoints).broken() == []
    assert saved.steps == before


def test_a_state_of_another_dtype_is_refused_and_not_cast(saved):
    wanted = like()
    narrow = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), wanted.variables.params)
    wanted = wanted._replace(variables=wanted.variables._replace(params=narrow))
    with pytest.raises(CheckpointError, match=r"variables\.params\..*'float32'\), the model needs .*'bfloat16'"):
        Opened(saved.run.path, shapes=wanted).it.restore()


# ---------------------------------------------------------------------------------------------------- disks that fail


@pytest.mark.parametrize("fails", ["begin", "commit"])
def test_a_full_disk_costs_one_checkpoint_and_the_next_one_succeeds(opened, state, monkeypatch, fails):
    checkpoints = opened()
    checkpoints.save(state, 1)

    def refuse(*arguments):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(Steps, fails, refuse)
        checkpoints.save(state, 2)
    assert checkpoints.it.failure == "No space left on device"
    assert checkpoints.steps == [1]
    assert checkpoints.said == ["step 2: the checkpoint could not be written (No space left on device); step 1 stands"]
    assert not checkpoints.it.steps.writing(2).exists()
    with pytest.raises(CheckpointError, match=r"2: could not be written \(No space left on device\); the newest .* is step 1"):
        checkpoints.it.require(2)
    checkpoints.save(state, 3)
    assert checkpoints.it.failure == ""
    checkpoints.it.require(3)
    assert_same_bits(checkpoints.it.restore()[0], at(state, 3))


def test_orbax_failing_in_the_background_costs_one_checkpoint(opened, state, monkeypatch):
    checkpoints = opened()
    checkpoints.save(state, 1)

    def refuse(*arguments, **keywords):
        raise ValueError("RESOURCE_EXHAUSTED: no room\nand a long story")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", refuse)
        checkpoints.save(state, 2)
    assert checkpoints.it.failure == "RESOURCE_EXHAUSTED: no room"
    assert checkpoints.steps == [1]
    checkpoints.save(state, 3)
    assert checkpoints.steps == [1, 3]


def test_without_any_checkpoint_a_failed_one_says_that_there_is_none(opened, state, monkeypatch):
    checkpoints = opened()
    monkeypatch.setattr(Steps, "commit", lambda *arguments: (_ for _ in ()).throw(FULL))
    checkpoints.save(state, 1)
    assert checkpoints.said[0].endswith("; there is none yet")
    with pytest.raises(CheckpointError, match="there is no checkpoint; make room"):
        checkpoints.it.require(1)


def test_older_checkpoints_that_cannot_be_removed_stay_and_are_told_of(opened, state, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    checkpoints = opened()
    monkeypatch.setattr(Steps, "remove", refuse)
    checkpoints.save(state, 1, 2, 3)
    assert checkpoints.steps == [1, 2, 3]
    assert checkpoints.said[-1] == "older checkpoints cannot be removed: Permission denied"
    assert checkpoints.it.failure == ""


def test_nothing_older_is_removed_before_a_step_exists(opened, state, monkeypatch):
    checkpoints, seen, remove = opened(), [], Steps.remove

    def watched(self, doomed):
        doomed = list(doomed)
        seen.append((self.all(), doomed))
        return remove(self, doomed)

    monkeypatch.setattr(Steps, "remove", watched)
    checkpoints.save(state, 1, 2, 3)
    assert seen == [([1], []), ([1, 2], []), ([1, 2, 3], [1])]


# ---------------------------------------------------------------------------------------------------------- backups


def test_every_so_many_checkpoints_are_backed_up_after_they_exist(opened, state):
    copied = []

    def backup(step):
        copied.append((step, step in checkpoints.steps, threading.current_thread() is threading.main_thread()))
        return checkpoints.run.path / "elsewhere"

    checkpoints = opened(backup=backup, backup_every=2)
    checkpoints.save_and_back_up(state, 1, 2, 3, 4)
    assert copied == [(2, True, False), (4, True, False)]
    assert [step for event, step in checkpoints.events if event == "backed up"] == [2, 4]


@pytest.mark.parametrize("error", [FULL, CheckpointError("No space left on device")], ids=["disk", "refusal"])
def test_a_backup_that_fails_is_told_of_and_costs_nothing_else(opened, state, error):
    def backup(step):
        raise error

    checkpoints = opened(backup=backup)
    checkpoints.save_and_back_up(state, 1)
    assert checkpoints.steps == [1]
    assert checkpoints.it.failure == ""
    assert checkpoints.said == ["step 1: not backed up: No space left on device; training goes on"]


def test_manifests_are_plain_json(saved):
    path = Steps(saved.run.checkpoints).directory(4) / "manifest.json"
    assert json.loads(path.read_text())["manifest"]["step"] == 4


# ----------------------------------------------------------------------------------------- what says nothing against a step


def test_a_machine_that_cannot_load_a_step_leaves_it_where_it_is(opened, state, monkeypatch):
    opened().save(state, 1, 2)

    def refuse(*arguments):
        raise RuntimeError("RESOURCE_EXHAUSTED: another process has the memory")

    with monkeypatch.context() as patch:
        patch.setattr("lumina_jax.checkpoint._read", refuse)
        with pytest.raises(RuntimeError, match="another process has the memory"):
            opened().it.restore()
    assert opened().steps == [1, 2]
    assert_same_bits(opened().it.restore()[0], at(state, 2))


def test_storage_that_fails_for_now_costs_no_checkpoint(opened, state, monkeypatch):
    opened().save(state, 1)
    with monkeypatch.context() as patch:
        patch.setattr("lumina.runs.steps._sha256", lambda path: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
        with pytest.raises(OSError, match="I/O error"):
            opened().it.restore()
    assert opened().steps == [1]


def test_a_rewind_goes_to_a_step_of_the_schedule_and_drops_later_ones(opened, state):
    checkpoints = opened(every=5)
    checkpoints.save(state, 5, 7, 8)  # a signal stopped it at 7 and 8; 5 stays although it is not among the newest two
    assert checkpoints.steps == [5, 7, 8]
    found, manifest = checkpoints.it.restore(scheduled=True)
    assert manifest["step"] == 5
    assert_same_bits(found, at(state, 5))
    assert checkpoints.steps == [5]


def test_a_rewind_before_the_first_step_of_the_schedule_begins_anew(opened, state):
    checkpoints = opened(every=5)
    checkpoints.save(state, 3)
    assert checkpoints.it.restore(scheduled=True) is None
    assert checkpoints.steps == []


def test_a_rewind_whose_step_is_damaged_is_refused_and_deletes_nothing(opened, state):
    checkpoints = opened(every=5)
    checkpoints.save(state, 5, 7)
    damage(checkpoints.run, 5)
    with pytest.raises(CheckpointError, match="no checkpoint to rewind to is whole"):
        checkpoints.it.restore(scheduled=True)
    assert checkpoints.steps == [7]
    assert_same_bits(opened().it.restore()[0], at(state, 7))


def test_the_best_stays_until_a_better_one_is_written(opened, state, monkeypatch):
    checkpoints = opened(every=100)
    checkpoints.save(state, 3, best=3)
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "commit", lambda *arguments: (_ for _ in ()).throw(FULL))
        checkpoints.save(state, 6, best=6)
    checkpoints.save(state, 9, 12, 15, best=6)
    assert checkpoints.steps == [3, 12, 15]


def test_a_step_that_is_pinned_while_others_go_stays(opened, state, monkeypatch):
    checkpoints, find = opened(every=100), Steps.superfluous

    def pinning(self, best):
        doomed = find(self, best)
        for step in doomed:
            self.pin(step)
        return doomed

    monkeypatch.setattr(Steps, "superfluous", pinning)
    checkpoints.save(state, 1, 2, 3)
    assert checkpoints.steps == [1, 2, 3]


def test_an_end_does_not_wait_for_a_backup_unless_told_to(opened, state):
    may_end, made = threading.Event(), []

    def backup(step):
        may_end.wait()
        made.append(step)
        return step

    checkpoints = opened(backup=backup)
    checkpoints.save(state, 1)
    checkpoints.it.close()
    assert made == []
    may_end.set()
    checkpoints.it.close(wait_for_backup=True)
    assert made == [1]


def test_a_long_error_of_the_disk_is_told_in_its_own_words():
    long = 'OUT_OF_RANGE: Error writing "a/0" at local file "/x:y/": Failed to write 7 bytes to file 14: File too large'
    assert why(ValueError(f"{long} [os_error_code='27']")) == "File too large"
    assert why(OSError(errno.ENOSPC, "No space left on device", "/x")) == "No space left on device: /x"
