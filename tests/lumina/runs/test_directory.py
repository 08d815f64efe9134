"""A run's directory, and who may go on with it."""

import json

import pytest

from lumina.config import Config, load
from lumina.errors import ConfigError, DataError, UsageError
from lumina.runs.directory import RunDirectory, append_json, read_json_lines, trim_after


class Tokenizer:
    def save(self, directory):
        directory.mkdir()
        (directory / "saved").touch()


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.require_writable()
    run.begin(Config(), {"fingerprint": "a" * 64}, Tokenizer())
    return run


def files(path):
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def test_begin_records_config_data_and_tokenizer(run):
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
    RunDirectory(tmp_path).check_same_data("anything")


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


def test_what_changes_no_number_of_the_past_may_change(run):
    config = Config()
    config.train.steps, config.train.micro_batches, config.train.eval_every, config.train.eval_rows = 2000, 2, 7, 8
    config.train.early_stopping, config.checkpoint.every, config.checkpoint.keep = 3, 9, 4
    config.monitor.log_every, config.monitor.sample_prompt, config.data.cache_dir = 1, "class ", "elsewhere"
    run.check_same_config(config)


def test_a_config_that_cannot_be_read_is_refused_by_name(run):
    run.config.write_text('{"model": ')
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        run.check_same_config(Config())


def test_other_data_than_the_run_began_with_is_refused(run):
    run.check_same_data("a" * 64)
    with pytest.raises(DataError, match="began on data aaaaaaaaaaaa, this is bbbbbbbbbbbb"):
        run.check_same_data("b" * 64)


def test_appended_records_are_lines_that_read_back_in_order(tmp_path):
    records = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "layers": [1, [2.5]]}, {"step": 3, "text": "é\n"}]
    for record in records:
        append_json(tmp_path / "x.jsonl", record)
    assert (tmp_path / "x.jsonl").read_text().count("\n") == 3
    assert read_json_lines(tmp_path / "x.jsonl") == records


def test_trim_drops_later_records_and_keeps_the_others_byte_for_byte(tmp_path):
    path = tmp_path / "x.jsonl"
    kept = '{"kind": "train", "step": 2, "loss": 1.50}\n{"step": 3}\n'
    path.write_text(kept + '{"step": 4}\n{"step": 10}\n')
    trim_after(path, 3)
    assert path.read_text() == kept
    assert files(tmp_path) == ["x.jsonl"]


@pytest.mark.parametrize("half", ['{"step": 3, "lo', "{", '{"step": 3'])
def test_trim_drops_a_half_written_line(tmp_path, half):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 2}\n' + half)
    trim_after(path, 5)
    append_json(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 2}, {"step": 3}]


def test_trim_ends_a_line_that_lacks_only_its_end(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 2}')
    trim_after(path, 5)
    append_json(path, {"step": 3})
    assert read_json_lines(path) == [{"step": 2}, {"step": 3}]


def test_trim_to_the_beginning_leaves_an_empty_file(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"step": 1}\n')
    trim_after(path, 0)
    assert path.read_text() == ""


def test_trim_of_no_file_makes_none(tmp_path):
    trim_after(tmp_path / "x.jsonl", 5)
    assert files(tmp_path) == []
