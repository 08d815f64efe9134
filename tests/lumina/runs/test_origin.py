"""What a new run may begin from, and what is refused before anything expensive."""

import pytest

from lumina.errors import CheckpointError, ConfigError, DataError, UsageError
from lumina.interchange.state import State, write
from lumina.runs.directory import RunDirectory
from lumina.runs.origin import Origin
from lumina.runs.steps import Steps
from lumina.tokenizer import train_bpe
from tests.lumina.interchange.states import (
    DATA,
    add_step,
    assert_same,
    every_kind,
    make_directory,
    make_run,
    random_state,
)


def asking(path, part="state", **changes):
    config = every_kind(**changes)
    config.checkpoint.init_from, config.checkpoint.init_part = str(path), part
    return config


@pytest.fixture
def source(tmp_path):
    progress = {"best_loss": 2.5, "passed": [[3, 4]], "evaluations_without_improvement": 2}
    return make_run(tmp_path / "source", every_kind(), 2, 6, best=2, progress=progress)


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "new")


def test_without_the_field_a_run_begins_with_itself(run):
    assert Origin.of(every_kind(), run) is None


def test_a_state_goes_on_at_the_step_of_the_source_with_its_progress(source, run):
    origin = Origin.of(asking(source.path), run)
    assert origin.new
    state, manifest = origin.load()
    assert_same(state, random_state(every_kind(), 6))
    assert manifest["progress"]["rows"] == 24
    assert manifest["progress"]["passed"] == [[3, 4]]
    assert manifest["begun_from"] == {"path": str(source.path.resolve()), "part": "state", "step": 6}
    assert origin.says == f"begins from {source.path}, going on at its step 6"


def test_weights_begin_at_step_0_without_progress(source, run):
    state, manifest = Origin.of(asking(source.path, "weights"), run).load()
    assert_same(state, State(0, random_state(every_kind(), 6).weights))
    assert "progress" not in manifest


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("source", "docstrings", "weights"),
        ("mode", "interleaved", "weights"),
        ("stages", "20: synthetic; docstrings", "weights"),
        ("loss_weights", "assistant=2", "weights"),
        ("workers", 2, "state"),
    ],
)
def test_of_itself_a_run_on_other_data_begins_from_weights_and_else_from_the_state(source, run, field, value, part):
    config = asking(source.path, "auto")
    setattr(config.data, field, value)
    assert Origin.of(config, run).record["part"] == part


def test_of_itself_a_run_begins_from_weights_that_are_all_there_is(tmp_path, run):
    directory = make_directory(tmp_path / "weights", every_kind(), State(0, random_state(every_kind(), 6).weights))
    assert Origin.of(asking(directory, "auto"), run).record["part"] == "weights"


def test_the_tokenizer_is_that_of_the_run_once_it_has_one_and_before_that_of_the_origin(source, run):
    origin = Origin.of(asking(source.path), run)
    assert origin.tokenizer(run) is None
    source.tokenizer.mkdir(exist_ok=True)
    assert origin.tokenizer(run) == source.tokenizer
    run.tokenizer.mkdir(parents=True)
    assert origin.tokenizer(run) == run.tokenizer


def test_the_step_is_the_one_it_began_from_whatever_the_source_does_later(source, run):
    origin = Origin.of(asking(source.path), run)
    add_step(source, random_state(every_kind(), 8))
    assert origin.load()[0].step == 6
    Steps(source.checkpoints).remove([6])
    with pytest.raises(CheckpointError, match="6: damaged: manifest"):
        origin.load()


def test_a_run_that_has_checkpoints_goes_on_with_itself_and_remembers_where_it_began(source, tmp_path):
    record = {"path": str(source.path), "part": "state", "step": 2}
    run = make_run(tmp_path / "begun", every_kind())
    state = random_state(every_kind(), 4)
    add_step(run, state)
    assert Origin.of(asking("gone"), run) is None  # what began otherwise stays so
    steps = Steps(run.checkpoints)
    manifest = {name: value for name, value in steps.manifest(4).items() if name not in ("format", "step", "files")}
    steps.remove([4])
    write(steps.begin(4), state)
    steps.commit(4, {**manifest, "begun_from": record})
    for config in (asking("gone"), every_kind()):
        origin = Origin.of(config, run)
        assert (origin.record, origin.new) == (record, False)
        assert origin.load()[0].step == 2


def test_a_run_whose_checkpoints_are_all_broken_does_not_begin_again(source, tmp_path):
    run = make_run(tmp_path / "broken", every_kind(), 2)
    Steps(run.checkpoints).set_aside(2)
    assert Origin.of(asking(source.path), run) is None


REFUSALS = {
    "gone": (lambda source: asking("gone"), UsageError, "gone: no such directory"),
    "another_width": (
        lambda source: asking(source.path, "weights", model={"d_ff": 32}),
        ConfigError,
        "blocks.0.feedforward.gate is (16, 24) there, the model needs (16, 32)",
    ),
    "a_layer_more": (
        lambda source: asking(source.path, "weights", model={"num_layers": 7}),
        ConfigError,
        "blocks.6.attention_norm.scale is missing there, the model needs (16,)",
    ),
    "a_layer_fewer": (
        lambda source: asking(source.path, "weights", model={"num_layers": 5}, moe={"pattern": "1,3"}),
        ConfigError,
        "blocks.5.attention_norm.scale is (16,) there, the model needs none",
    ),
    "another_config": (
        lambda source: asking(source.path, seed=1, optim={"learning_rate": 0.5}),
        ConfigError,
        "another config (optim.learning_rate: 0.01 -> 0.5; train.seed: 0 -> 1); use --config.checkpoint.init_part=weights",
    ),
    "nothing_left": (
        lambda source: asking(source.path, steps=6),
        ConfigError,
        "is at step 6; train.steps = 6 must be above it",
    ),
    "stopped_early": (
        lambda source: asking(source.path, early_stopping=2),
        ConfigError,
        "stopped early; use train.early_stopping = 0 or above 2",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_go_on_is_refused_in_one_line(source, run, name):
    make, error, says = REFUSALS[name]
    with pytest.raises(error) as refused:
        Origin.of(make(source), run)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_accepted_changes_go_on(source, run):
    changed = asking(source.path, seed=1, optim={"learning_rate": 0.5})
    assert Origin.of(changed, run, accept=True).load()[0].step == 6


def test_what_may_change_within_a_run_may_change_here(source, run):
    changed = asking(source.path, micro_batches=2, eval_every=1, model={"attention_form": "reference"})
    assert Origin.of(changed, run).record["step"] == 6


def test_a_window_of_another_length_is_refused_even_if_accepted(source, run):
    with pytest.raises(ConfigError, match=r"remembers guard\.spike_window = 128 losses"):
        Origin.of(asking(source.path, guard={"spike_window": 64}), run, accept=True)


def test_weights_alone_are_no_state(tmp_path, run):
    path = make_directory(tmp_path / "model", every_kind(), State(6, random_state(every_kind()).weights))
    with pytest.raises(ConfigError, match=r"holds weights alone; use --config\.checkpoint\.init_part=weights"):
        Origin.of(asking(path), run)
    assert Origin.of(asking(path, "weights"), run).load()[0].step == 0


def test_a_run_cannot_begin_from_itself(tmp_path):
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UsageError, match="is this run itself"):
        Origin.of(asking(tmp_path / "." / "run"), run)


def test_a_source_of_other_data_is_refused_unless_accepted(source, run):
    origin = Origin.of(asking(source.path), run)
    assert origin.check_data(DATA) == []
    other = DATA | {"fingerprint": "0" * 64, "tokenizer": {"name": "gpt2", "fingerprint": "u" * 64}}
    with pytest.raises(DataError, match=r"trained on other data \(tokenizer\.name: 'bpe-300' -> 'gpt2'"):
        origin.check_data(other)
    assert origin.check_data(other, accept=True)[0] == "checkpoint.init_from: tokenizer.name: 'bpe-300' -> 'gpt2'"


def test_weights_may_go_to_other_data_and_another_tokenizer_is_told_of(source, run):
    origin = Origin.of(asking(source.path, "weights"), run)
    assert origin.check_data(DATA | {"fingerprint": "0" * 64, "held_out": {"num_tokens": 5}}) == []
    (said,) = origin.check_data(DATA | {"fingerprint": "0" * 64, "tokenizer": DATA["tokenizer"] | {"name": "gpt2"}})
    assert said == "checkpoint.init_from: tokenizer.name: 'bpe-300' -> 'gpt2'"


@pytest.mark.parametrize("part", ["state", "weights"])
def test_another_tokenizer_than_that_of_a_directory_without_data_is_noticed(tmp_path, run, part):
    path = make_directory(tmp_path / "model", every_kind(), random_state(every_kind()))
    tokenizer = train_bpe(["def f(x):\n    return x\n" * 9], 270)
    tokenizer.save(path / "tokenizer")
    origin = Origin.of(asking(path, part), run)
    same = DATA | {"tokenizer": {"name": "bpe-270", "fingerprint": tokenizer.fingerprint}}
    assert origin.check_data(same) == []
    if part == "weights":
        (said,) = origin.check_data(DATA)
        assert said.startswith("checkpoint.init_from: tokenizer.fingerprint: ")
    else:
        with pytest.raises(DataError, match=r"trained on other data \(tokenizer\.fingerprint: "):
            origin.check_data(DATA)


def test_data_of_a_run_that_is_under_way_are_its_own(source, run):
    origin = Origin(Origin.of(asking(source.path), run).record, new=False)
    assert origin.check_data(DATA | {"fingerprint": "0" * 64}) == []
