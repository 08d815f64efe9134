"""Runs of several stages: each compiles once, is told of, and a run goes on at any of their boundaries with the same bits."""

import contextlib
import io
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest

import lumina.runs.loop
from lumina.errors import DataError
from lumina.runs import library
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.ledger import compare_ledgers
from lumina.runs.text import open_corpora, read
from lumina_jax.train import train_and_evaluate
from tests.lumina.corpora import chats, preferences, texts
from tests.lumina_jax.tiny import tiny

SHORT, LONG = 16, 32

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    return SimpleNamespace(
        texts=texts(path / "texts.jsonl"),
        chats=chats(path / "chats.jsonl"),
        preferences=preferences(path / "preferences.jsonl"),
    )


def config(source, steps=9, **data):
    made = tiny("dense", model={"num_layers": 1}, steps=steps, eval_every=0)
    made.data.source = "stdlib" if "stages" in data else source
    made.data.sequence_length, made.data.held_out = LONG, 0.2
    made.checkpoint.every, made.mesh.data, made.monitor.log_every = 3, 1, 1
    made.monitor.sample_prompt, made.monitor.sample_tokens, made.monitor.tensorboard = "s", 4, False
    for name, value in data.items():
        setattr(made.data, name, value)
    return made


def staged(files):
    """Texts in short rows, then texts and conversations in long ones, then conversations alone."""
    return config(files.texts, stages=f"3 x {SHORT}: {files.texts}; 3: {files.texts}@1, {files.chats}@1; {files.chats}")


def train(settings, run, code=0):
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert train_and_evaluate(settings, run.path) == code, stderr.getvalue()
    run.stdout, run.stderr = stdout.getvalue(), stderr.getvalue()
    return run


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    return train(staged(files), RunDirectory(tmp_path_factory.mktemp("runs") / "whole"))


def test_each_row_length_compiles_once(whole):
    told = [line.rpartition(" for ")[2] for line in whole.stderr.splitlines() if line.startswith("compiled in")]
    assert told == [f"rows of {SHORT} tokens", f"rows of {LONG} tokens"]


def test_a_stage_that_begins_is_an_event_a_line_and_in_the_ledger(whole, files):
    events = [event for event in read_json_lines(whole.events) if event["event"] == "stage"]
    assert [event["step"] for event in events] == [4, 7]
    assert events[0]["says"] in whole.stderr
    stages = [record for record in read_json_lines(whole.ledger) if "stage" in record]
    assert [(r["step"], r["stage"], r["mixture"]) for r in stages] == [
        (4, 2, f"{files.texts}@1, {files.chats}@1"),
        (7, 3, files.chats),
    ]


def test_a_source_that_begins_anew_is_told_at_the_start_and_in_the_ledger(whole, files):
    (event,) = [event for event in read_json_lines(whole.events) if event["event"] == "read again"]
    assert event["says"].startswith(f"stage 2 of 3 begins {files.texts} anew, in rows of {LONG}: about ")
    assert event["says"] in whole.stderr
    told = [record.get("read_again") for record in read_json_lines(whole.ledger) if "stage" in record]
    assert list(told[0]) == [files.texts]
    assert 0 < told[0][files.texts] <= 6 * LONG  # half of three batches of four rows
    assert told[1] is None


def test_a_run_of_stages_is_whole_to_those_that_read_it(whole):
    assert [finding.says for finding in library.verify(whole) if not finding.well] == []
    assert library.summary(whole).step == 9


def test_the_opening_tells_of_every_source_and_stage(whole, files):
    assert f"3 steps of rows of {SHORT} tokens from {files.texts}" in whole.stderr
    assert f"3 steps of rows of {LONG} tokens from {files.chats}" in whole.stderr
    assert f"{files.chats}: " in whole.stderr
    assert "packed rows" in whole.stderr


def test_the_mixture_reaches_its_second_kind_of_data_at_the_ratio(whole, files):
    records = [record for record in read_json_lines(whole.metrics) if record["kind"] == "train"]
    assert [record["stage"] for record in records] == [1] * 3 + [2] * 3 + [3] * 3
    assert [record["sequence_length"] for record in records] == [SHORT] * 3 + [LONG] * 6
    assert [record.get(f"mixture/{files.chats}") for record in records] == [None] * 3 + [0.5] * 3 + [1.0] * 3


def test_an_evaluation_is_over_the_tokens_of_all_sources_and_tells_of_each(whole, files):
    found = json.loads(whole.result.read_text())["held_out"]
    by_source = found["sources"]
    assert set(by_source) == {files.texts, files.chats}
    assert found["tokens"] == sum(of["tokens"] for of in by_source.values())
    mean = sum(of["loss"] * of["tokens"] for of in by_source.values()) / found["tokens"]
    assert found["loss"] == pytest.approx(mean, rel=1e-6)
    assert by_source[files.texts]["loss"] != by_source[files.chats]["loss"]


def test_the_compressors_read_the_bytes_that_the_evaluation_counts(whole, files, monkeypatch):
    from lumina.runs import report

    settings = staged(files)
    text = read(settings, open_corpora(settings, lambda line: None), ((0,), 1))
    assert len(report.evaluated_text(text)) == json.loads(whole.result.read_text())["held_out"]["bytes"]


def stop_at(step):
    """A prefetch that has the process asked to stop while it is at `step`."""
    prefetch = lumina.runs.loop.prefetch

    def stops(batches, start, stop, workers):
        for number, batch in prefetch(batches, start, stop, workers):
            if number + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield number, batch

    return stops


def test_a_run_stopped_at_and_around_its_boundaries_goes_on_with_the_same_bits(whole, files, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    for step in (3, 4, 6):
        with monkeypatch.context() as patch:
            patch.setattr(lumina.runs.loop, "prefetch", stop_at(step))
            train(staged(files), run, code=75)
        assert read_json_lines(run.events)[-1]["step"] == step
    train(staged(files), run)
    found, expected = read_json_lines(run.ledger), read_json_lines(whole.ledger)
    assert compare_ledgers(found, expected).identical
    assert compare_ledgers(found, expected).digests == 3
    assert [r for r in found if "stage" in r] == [r for r in expected if "stage" in r]
    assert json.loads(run.result.read_text())["held_out"] == json.loads(whole.result.read_text())["held_out"]


# ------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.fixture(scope="module")
def base(files, tmp_path_factory):
    return train(config(files.texts, steps=6), RunDirectory(tmp_path_factory.mktemp("runs") / "base"))


def tuning(files, base, **data):
    made = config(files.chats, steps=12, **data)
    made.checkpoint.init_from = str(base.path)
    return made


def test_fine_tuning_begins_from_the_weights_with_their_tokenizer(files, base, tmp_path):
    run = train(tuning(files, base), RunDirectory(tmp_path / "run"))
    assert f"data.tokenizer = 'bpe': the one of {base.path}" in run.stderr
    (begun,) = [event for event in read_json_lines(run.events) if event["event"] == "begun"]
    assert begun["says"] == f"begins from the weights of {base.path} at its step 6, at step 0"
    assert (
        json.loads(run.data.read_text())["tokenizer"]["fingerprint"]
        == json.loads(base.data.read_text())["tokenizer"]["fingerprint"]
    )
    losses = [record["loss"] for record in read_json_lines(run.metrics) if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.3
    again = train(tuning(files, base), RunDirectory(run.path))
    assert "is complete" in again.stderr


def test_fine_tuning_goes_on_without_what_it_began_from(files, base, tmp_path, monkeypatch):
    origin, run = RunDirectory(tmp_path / "origin"), RunDirectory(tmp_path / "run")
    shutil.copytree(base.path, origin.path)
    with monkeypatch.context() as patch:
        patch.setattr(lumina.runs.loop, "prefetch", stop_at(4))
        train(tuning(files, origin), run, code=75)
    shutil.rmtree(origin.path)
    train(tuning(files, origin), run)
    assert [event["step"] for event in read_json_lines(run.events) if event["event"] == "started"] == [0, 4]


def test_a_run_on_the_same_data_begins_from_the_state(files, base, tmp_path):
    settings = config(files.texts, steps=8)
    settings.checkpoint.init_from = str(base.path)
    run = train(settings, RunDirectory(tmp_path / "run"))
    (begun,) = [event for event in read_json_lines(run.events) if event["event"] == "begun"]
    assert begun["says"] == f"begins from {base.path}, going on at its step 6"


def test_preferences_are_refused_for_training(files, tmp_path):
    with pytest.raises(DataError, match=r"preferences\.jsonl: holds preferences, chosen and rejected; training needs texts"):
        train(config(files.preferences), RunDirectory(tmp_path / "run"))
