"""A run's directory, and who may go on with it."""

import json
import os
from dataclasses import replace
from datetime import datetime

import pytest

from lumina.config import Config, from_dict, load, save, to_dict
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.directory import MAY_CHANGE, Events, RunDirectory, config_changes, config_fingerprint, deciding
from lumina.runs.journal import read_json_lines

DATA = {"fingerprint": "a" * 64}
FREE = {
    "model.attention_form",
    "model.moe.grouped_form",
    "train.steps",
    "train.micro_batches",
    "train.remat",
    "optim.offload",
    "train.eval_every",
    "train.eval_rows",
    "train.early_stopping",
    "mesh.data",
    "mesh.fsdp",
    "mesh.expert",
    "mesh.context",
    "mesh.tensor",
    "mesh.auto",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "checkpoint.backup_dir",
    "checkpoint.backup_every",
    "checkpoint.backup_keep",
    "checkpoint.backup_encrypt",
    "checkpoint.init_from",
    "checkpoint.init_part",
    "guard.max_skips",
    "guard.max_rewinds",
    "guard.hang_seconds",
    "monitor.log_every",
    "monitor.sample_every",
    "monitor.sample_prompt",
    "monitor.sample_tokens",
    "monitor.tensorboard",
    "data.cache_dir",
    "data.workers",
    "torch.device",
    "torch.compile",
    *(f"torch.deepspeed.{name}" for name in ("zero_stage", "offload_optimizer", "offload_parameters")),
    *(f"torch.deepspeed.{name}" for name in ("bucket_size", "overlap")),
}


class Tokenizer:
    def __init__(self, content="saved"):
        self.content = content

    def save(self, directory):
        directory.mkdir(exist_ok=True)
        (directory / "saved").write_text(self.content)


class BrokenTokenizer(Tokenizer):
    def save(self, directory):
        super().save(directory)
        raise OSError(28, "No space left on device")


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.require_writable()
    run.record(Config(), DATA, Tokenizer())
    return run


def names(values, prefix=""):
    """Every field by its whole name."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from names(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def with_another(field):
    """The default config with another value in one field."""
    *groups, name = field.split(".")
    values = group = to_dict(Config())
    for each in groups:
        group = group[each]
    old = group[name]
    group[name] = not old if isinstance(old, bool) else old + "x" if isinstance(old, str) else old + 1
    return from_dict(values)


every_field = pytest.mark.parametrize("field", list(names(to_dict(Config()))))


def files(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def test_a_run_records_its_config_data_and_tokenizer(run):
    assert files(run.path) == ["config.json", "data.json", "tokenizer", "tokenizer/saved"]
    assert load(str(run.path)) == Config()
    assert json.loads(run.data.read_text()) == {"fingerprint": "a" * 64}


def test_the_write_probe_makes_the_directory_and_leaves_nothing_in_it(tmp_path):
    run = RunDirectory(tmp_path / "deep" / "run")
    run.require_writable()
    run.require_writable()
    assert files(tmp_path) == ["deep", "deep/run"]


def test_a_directory_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"file/run: cannot be written \(.+\); choose another --workdir"):
        RunDirectory(tmp_path / "file" / "run").require_writable()


def test_a_file_in_place_of_the_directory_is_refused_by_name(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UsageError, match="run: cannot be written"):
        RunDirectory(tmp_path / "run").require_writable()


def test_a_directory_that_holds_no_run_accepts_any_config(tmp_path):
    RunDirectory(tmp_path).check_same_config(Config())
    RunDirectory(tmp_path).check_same_data({"fingerprint": "anything"})


def test_the_same_config_may_go_on(run):
    run.check_same_config(Config())


def test_every_changed_field_is_named_with_both_values(run):
    config = Config()
    config.model.d_ff, config.model.moe.top_k, config.optim.learning_rate, config.train.seed = 7, 2, 0.5, 1
    with pytest.raises(ConfigError) as refusal:
        run.check_same_config(config)
    for change in (
        "model.d_ff: 512 -> 7",
        "model.moe.top_k: 1 -> 2",
        "optim.learning_rate: 0.0003 -> 0.5",
        "train.seed: 0 -> 1",
    ):
        assert change in str(refusal.value)
    assert "->" not in str(refusal.value).replace("->", "", 4)


@every_field
def test_what_changes_no_number_may_change_and_nothing_else(run, field):
    if field in FREE:
        run.check_same_config(with_another(field))
    else:
        with pytest.raises(ConfigError, match=rf"\({field}: .+ -> .+\); choose another --workdir, .+ --accept-changes$"):
            run.check_same_config(with_another(field))


def test_micro_batches_may_not_change_where_balance_is_taken_over_them(run):
    config = Config()
    config.model.moe.balance_over = "micro_batch"
    save(config, run.config)
    more = replace(config, train=replace(config.train, micro_batches=2))
    with pytest.raises(ConfigError, match=r"train.micro_batches: 1 -> 2"):
        run.check_same_config(more)
    assert config_fingerprint(more) != config_fingerprint(config)


def test_a_change_is_accepted_when_asked_for(run):
    run.check_same_config(with_another("model.d_ff"), accept=True)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model.moe.top_k", "model.moe.top_k: 1 -> 2"),
        ("data.source", "data.source: 'stdlib' -> 'stdlibx'"),
        ("checkpoint.keep", "checkpoint.keep: 2 -> 3"),
        ("monitor.tensorboard", "monitor.tensorboard: True -> False"),
    ],
)
def test_a_change_is_told_with_both_values_whether_it_may_be_or_not(run, field, change):
    assert run.changes(with_another(field)) == [change]


@every_field
def test_the_fingerprint_is_of_the_fields_that_decide_a_runs_numbers(field):
    assert (config_fingerprint(with_another(field)) == config_fingerprint(Config())) == (field in FREE)


def test_the_fingerprint_is_that_of_the_saved_config(run):
    assert config_fingerprint(load(str(run.path))) == config_fingerprint(Config())


@pytest.mark.parametrize("rule", MAY_CHANGE)
def test_no_rule_of_what_may_change_is_about_nothing(rule):
    assert any(field.startswith(rule) for field in FREE)


def test_a_directory_that_holds_no_run_has_no_changes(tmp_path):
    assert RunDirectory(tmp_path).changes(with_another("train.seed")) == []


def test_fields_that_an_older_config_lacks_have_their_defaults(run):
    values = json.loads(run.config.read_text())
    del values["guard"], values["mesh"]
    run.config.write_text(json.dumps(values))
    assert run.changes(Config()) == []
    assert run.changes(with_another("guard.spike_sigmas")) == ["guard.spike_sigmas: 0.0 -> 1.0"]


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff", b"[]", b'{"modle": {}}', b'{"train": {"stepz": 1}}'])
def test_a_config_that_cannot_be_read_is_refused_by_name(run, content):
    run.config.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read \(.+\); choose another --workdir$"):
        run.check_same_config(Config(), accept=True)


def test_a_group_in_place_of_a_value_is_a_change(run):
    run.config.write_text('{"train": {"seed": {"deep": 1}}}')
    with pytest.raises(ConfigError, match=r"train\.seed: .+ -> 0"):
        run.check_same_config(Config())


def test_other_data_than_the_run_began_with_is_refused(run):
    run.check_same_data({"fingerprint": "a" * 64})
    with pytest.raises(DataError, match=r"began on other data \(fingerprint: aaaaaaaaaaaa -> bbbbbbbbbbbb\)"):
        run.check_same_data({"fingerprint": "b" * 64})


def test_other_data_is_told_field_by_field(tmp_path):
    run = RunDirectory(tmp_path)
    data = {
        "fingerprint": "a" * 64,
        "source": {"spec": "stdlib", "fingerprint": "c" * 64},
        "tokenizer": {"name": "bpe-1024"},
        "train": {"tokens": 10, "shards": [1]},
        "rejects": {"counts": {}},
    }
    run.record(Config(), data, Tokenizer())
    other = data | {"fingerprint": "b" * 64, "tokenizer": {"name": "bpe-512"}, "train": {"tokens": 12, "shards": [2]}}
    assert run.data_changes(other) == ["tokenizer.name: 'bpe-1024' -> 'bpe-512'", "train.tokens: 10 -> 12"]
    moved = data | {"fingerprint": "b" * 64, "source": {"spec": "stdlib", "fingerprint": "d" * 64}}
    assert run.data_changes(moved) == ["source.fingerprint: cccccccccccc -> dddddddddddd"]


def test_other_data_is_accepted_when_asked_for(run):
    run.check_same_data({"fingerprint": "b" * 64}, accept=True)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}", b"null"])
def test_data_that_cannot_be_read_is_refused_by_name(run, content):
    run.data.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.json: cannot be read \(.+\); choose another --workdir$"):
        run.check_same_data({"fingerprint": "a" * 64}, accept=True)


@pytest.mark.parametrize("fingerprint", [3, None, ["a"]])
def test_a_fingerprint_of_another_form_is_that_of_other_data(run, fingerprint):
    run.data.write_text(json.dumps({"fingerprint": fingerprint}))
    with pytest.raises(DataError, match="began on other data"):
        run.check_same_data({"fingerprint": "a" * 64})


# ------------------------------------------------------------------------------------------------------------- recording


def test_accepted_changes_are_recorded_and_from_then_on_the_same(run):
    run.record(with_another("train.seed"), {"fingerprint": "b" * 64}, Tokenizer("another"))
    run.check_same_config(with_another("train.seed"))
    run.check_same_data({"fingerprint": "b" * 64})
    assert (run.tokenizer / "saved").read_text() == "another"


def test_what_is_recorded_already_is_not_written_again(run):
    before = {path: path.stat().st_ino for path in run.path.iterdir()}
    run.record(Config(), DATA | {"other": 1}, BrokenTokenizer())
    assert {path: path.stat().st_ino for path in run.path.iterdir()} == before


def test_data_are_recorded_only_when_their_tokenizer_is(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(OSError, match="No space"):
        run.record(Config(), DATA, BrokenTokenizer())
    assert not run.data.exists()
    run.record(Config(), DATA, Tokenizer())
    run.check_same_data({"fingerprint": "a" * 64})


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_file_that_cannot_be_written_stays_as_it_was(run, monkeypatch, call):
    run.write_result({"step": 1})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def fails(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        for write in (
            lambda: run.record(with_another("train.seed"), DATA, Tokenizer()),
            lambda: run.record(Config(), {"fingerprint": "b" * 64}, Tokenizer()),
            lambda: run.write_result({"step": 2}),
        ):
            with pytest.raises(OSError, match="No space"):
                write()
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_files_are_synced_before_their_names_are_theirs(tmp_path, monkeypatch):
    run, calls = RunDirectory(tmp_path), []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append(new.name), replace(old, new)))
    run.record(Config(), DATA, Tokenizer())
    config, saved, data = (path.stat().st_ino for path in (run.config, run.tokenizer / "saved", run.data))
    assert [call for call in calls if call in (config, saved, data) or isinstance(call, str)] == [
        config,
        "config.json",
        saved,
        data,
        "data.json",
    ]


def test_a_result_replaces_the_one_before(run):
    run.write_result({"step": 1, "long": "x" * 100})
    run.write_result({"step": 2})
    assert json.loads(run.result.read_text()) == {"step": 2}


# --------------------------------------------------------------------------------------------------------------- events


def test_an_event_has_a_time_a_name_and_a_step(run):
    Events(run, lambda _: None).write("skipped", 7, loss=2.5)
    (event,) = read_json_lines(run.events)
    assert datetime.fromisoformat(event.pop("time")).utcoffset().total_seconds() == 0
    assert event == {"event": "skipped", "step": 7, "loss": 2.5}


def test_what_an_event_says_is_shown_and_recorded(run):
    said = []
    events = Events(run, said.append)
    events.write("resumed", 7, "goes on at step 7")
    events.write("skipped", 8)
    assert said == ["goes on at step 7"]
    assert [event.get("says") for event in read_json_lines(run.events)] == ["goes on at step 7", None]


def test_events_of_later_steps_stay_when_a_run_goes_back(run):
    for step in (9, 3):
        Events(run, lambda _: None).write("resumed", step)
    assert [event["step"] for event in read_json_lines(run.events)] == [9, 3]


def test_a_disk_that_takes_no_event_is_told_of_and_the_event_is_shown_all_the_same(run):
    said = []
    run.events.mkdir()
    Events(run, said.append).write("stopped", 7, "stops at step 7")
    assert said[0] == "stops at step 7"
    assert "events.jsonl: cannot be written" in said[1]


def test_without_a_run_an_event_is_only_shown(tmp_path):
    said = []
    Events(None, said.append).write("stopped", 7, "stops at step 7")
    assert said == ["stops at step 7"]


def test_more_steps_move_the_stages_of_a_hybrid_and_those_of_no_other_mode():
    for mode, moves in (("hybrid", True), ("interleaved", False), ("base_only", False)):
        before, now = Config(), Config()
        before.data.mode = now.data.mode = mode
        now.train.steps = 2000
        assert bool(deciding(config_changes(before, now), now)) == moves
