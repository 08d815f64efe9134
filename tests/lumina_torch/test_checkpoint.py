"""What PyTorch saves comes back bit for bit, what is damaged is passed over, and what does not fit is refused by name."""

import errno

import numpy as np
import pytest
import torch

from lumina.config import save
from lumina.errors import CheckpointError, UsageError
from lumina.interchange.state import MODEL, OPTIMIZER, State, arrays
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.steps import Steps
from lumina_torch.checkpoint import Checkpoints, from_state, load, to_state
from lumina_torch.step import init_state
from tests.lumina.interchange.states import add_step, assert_same, every_kind, random_state

CONFIG = every_kind()
FULL = OSError(errno.ENOSPC, "No space left on device")


def state_at(step, seed=0):
    return from_state(CONFIG, random_state(CONFIG, step, seed))


def record(best=None):
    return lambda parameters: {"progress": {"best_step": best, "rows": 4}, "ledger": {"bytes": 7}}


class Opened:
    """Checkpoints of a run, and what they tell."""

    def __init__(self, path, config=CONFIG, **arguments):
        self.run, self.said = RunDirectory(path), []
        events = Events(self.run, self.said.append)
        self.it = Checkpoints(self.run, config, events, **arguments)

    def save(self, *steps, best=None):
        for step in steps:
            self.it.save(step, state_at(step, seed=step), record(best))
        self.it.wait()
        return self

    @property
    def steps(self):
        return Steps(self.run.checkpoints).all()


def flip(run, step, name=OPTIMIZER):
    file = Steps(run.checkpoints).directory(step) / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture
def saved(tmp_path):
    """A run with checkpoints of steps 2 to 6, of which the best was step 2."""
    save(CONFIG, tmp_path / "config.json")
    return Opened(tmp_path).save(2, 4, 6, best=2)


def test_a_state_becomes_arrays_and_a_state_again():
    expected = random_state(CONFIG, 7)
    expected.loss_scale, expected.good_steps = 0.0, 0  # of float16 alone
    assert_same(to_state(from_state(CONFIG, expected)), expected)


def test_a_fresh_state_has_moments_of_zero():
    found = to_state(init_state(CONFIG))
    assert (found.step, found.updates, found.skipped) == (0, 0, 0)
    assert (
        found.first_moment.keys()
        == found.second_moment.keys()
        == dict(init_state(CONFIG).transformer.named_parameters()).keys()
    )
    assert not any(array.any() for array in (*found.first_moment.values(), *found.second_moment.values()))


def test_the_loss_scale_of_float16_goes_along_and_begins_anew_after_another_precision():
    half = every_kind(compute_dtype="float16")
    state = random_state(half, 7)
    assert_same(to_state(from_state(half, state)), state)
    state.loss_scale = 0.0
    assert from_state(half, state).loss_scale.scale == half.torch.loss_scale


def test_the_newest_state_comes_back_bit_for_bit_with_its_manifest(saved):
    found, manifest = Opened(saved.run.path).it.restore()
    assert_same(to_state(found), to_state(state_at(6, seed=6)))
    assert (manifest["step"], manifest["progress"]["rows"], manifest["ledger"]) == (6, 4, {"bytes": 7})
    assert saved.steps == [2, 4, 6]
    directory = Steps(saved.run.checkpoints).directory(6)
    assert {path.name for path in directory.iterdir()} == {MODEL, OPTIMIZER, "manifest.json"}


def test_a_state_that_steps_change_after_saving_is_saved_as_it_was(tmp_path):
    opened, state = Opened(tmp_path), state_at(2)
    expected = to_state(state)
    opened.it.save(2, state, record())
    with torch.no_grad():
        for tensor in (*state.transformer.parameters(), *state.transformer.buffers()):
            tensor += 1
        for moments in state.optimizer.state.values():
            moments["exp_avg"] += 1
    opened.it.wait()
    assert_same(to_state(opened.it.restore()[0]), expected)


def test_the_digest_of_the_parameters_covers_parameters_and_biases_alone(tmp_path):
    opened, digest = Opened(tmp_path), []

    def of(change):
        state = random_state(CONFIG, 2)
        change(state)
        return opened.it._on_host(from_state(CONFIG, state))[2]

    digest = of(lambda state: None)
    assert of(lambda state: state.first_moment["final_norm.scale"].fill(0)) == digest
    for name in ("final_norm.scale", "blocks.3.moe.bias", "blocks.2.mod.bias"):
        assert of(lambda state, name=name: state.weights[name].fill(0)) != digest, name


def test_a_damaged_step_is_set_aside_and_the_one_before_taken(saved):
    flip(saved.run, 6)
    again = Opened(saved.run.path)
    found, manifest = again.it.restore()
    assert manifest["step"] == 4
    assert_same(to_state(found), to_state(state_at(4, seed=4)))
    assert again.said == ["step 6 is damaged, now broken-6: optimizer.safetensors: its contents changed"]
    assert [(e["event"], e["step"]) for e in read_json_lines(again.run.events)][-1] == ("set aside", 6)


def test_values_that_are_not_those_saved_are_found_though_every_file_is_as_it_was_written(saved):
    add_step(saved.run, random_state(CONFIG, 8), **{"second_moment.blocks.1.moe.router": "0" * 16})
    again = Opened(saved.run.path)
    assert again.it.restore()[1]["step"] == 6
    assert again.said[0].endswith("broken-8: second_moment.blocks.1.moe.router: not the values that were saved")


def test_when_no_checkpoint_is_whole_training_does_not_begin_anew(saved):
    for step in saved.steps:
        flip(saved.run, step)
    with pytest.raises(CheckpointError, match="no checkpoint is whole, 3 were set aside"):
        Opened(saved.run.path).it.restore()


def test_a_new_run_has_nothing_to_restore_or_what_it_begins_from(tmp_path):
    assert Opened(tmp_path).it.restore() is None
    begun = (state_at(7), {"begun_from": {}})
    assert Opened(tmp_path, origin=lambda: begun).it.restore() is begun


def test_a_rewind_before_the_first_checkpoint_goes_to_where_the_run_began(tmp_path):
    begun = (state_at(7), {"begun_from": {}})
    opened = Opened(tmp_path, every_kind(), origin=lambda: begun)
    opened.it.save(9, state_at(9), record())  # a signal stopped it there, which the schedule of 200 does not divide
    assert opened.it.restore(scheduled=True) is begun
    assert opened.steps == []


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"d_ff": 32}}, r"feedforward\.down is \(\(24, 16\), 'float32'\), the model needs \(\(32, 16\)"),
        ({"model": {"qk_norm": True}}, r"key_norm\.scale is missing, the model needs \(\(8,\)"),
        ({"guard": {"spike_window": 64}}, r"losses_W is \(\(128,\), 'float32'\), the model needs \(\(64,\)"),
    ],
    ids=["another_width", "a_tensor_more", "another_window"],
)
def test_a_state_of_another_shape_is_refused_by_name_and_not_damaged(saved, changes, named):
    with pytest.raises(CheckpointError, match=named):
        Opened(saved.run.path, every_kind(**changes)).it.restore()
    assert saved.steps == [2, 4, 6]


def test_a_full_disk_costs_one_checkpoint_and_the_next_one_succeeds(saved, monkeypatch):
    def refuse(*arguments):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("lumina_torch.checkpoint.write", refuse)
        saved.save(8)
    assert saved.said == ["step 8: the checkpoint could not be written (No space left on device); step 6 stands"]
    with pytest.raises(CheckpointError, match=r"8: could not be written \(No space left on device\)"):
        saved.it.require(8)
    saved.save(10)
    assert saved.steps[-1] == 10
    assert saved.it.failure == ""


def test_a_disk_too_small_for_a_checkpoint_is_told_of_at_the_start(tmp_path, monkeypatch):
    sizes = sum(array.nbytes for array in arrays(random_state(CONFIG)).values())
    for free, fits in ((sizes, True), (sizes - 1, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: type("Usage", (), {"free": free}))
        opened = Opened(tmp_path)
        if fits:
            opened.it.require_room()
        else:
            with pytest.raises(UsageError, match="make room, or choose another --workdir"):
                opened.it.require_room()


def test_a_model_is_loaded_for_generation_from_a_run(saved):
    for best, step in ((False, 6), (True, 2)):
        config, transformer, at_step = load(saved.run.path, best=best)
        assert at_step == step
        expected = state_at(step, seed=step).transformer
        for name, tensor in expected.state_dict().items():
            assert torch.equal(transformer.state_dict()[name], tensor), name


def test_weights_that_do_not_fit_are_refused_by_name():
    state = State(0, random_state(CONFIG).weights)
    state.weights["final_norm.scale"] = np.zeros(3, np.float32)
    with pytest.raises(CheckpointError, match=r"final_norm\.scale: is \(\(3,\), 'float32'\), the model needs \(\(16,\)"):
        from_state(CONFIG, state)
