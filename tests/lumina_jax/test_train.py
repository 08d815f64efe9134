"""Training from end to end: what a run leaves behind, going on with one, stopping, and refusing what cannot work."""

import ast
import contextlib
import hashlib
import io
import json
import math
import os
import pkgutil
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import lumina
import lumina.runs.loop
import lumina_jax
import lumina_jax.device
import lumina_jax.train
from lumina.config import MeshConfig, load, save
from lumina.data.rows import Batches, Rows
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.runs.console import printable
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.lock import RunLock
from lumina.runs.steps import Steps
from lumina.runs.train import SAMPLES
from lumina.tokenizer import train_bpe
from lumina_jax import checkpoint
from lumina_jax.evaluate import evaluate
from lumina_jax.generate import load_generator
from lumina_jax.mesh import one_device, shaped_whole
from lumina_jax.step import make_eval_step, state_shapes
from lumina_jax.train import train_and_evaluate
from tests.lumina.corpora import corpus_of
from tests.lumina_jax.tiny import T, V, tiny
from tests.waiting import GIVES_UP, until

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 9, 3
TIMINGS = {"tokens_per_second", "peak_fraction"}

pytestmark = pytest.mark.usefixtures("compiled_once")


def config(**changes):
    """A run of 9 steps that evaluates and keeps a checkpoint every 3."""
    made = tiny(**{"steps": STEPS, "eval_every": EVERY, **changes})
    made.data.source, made.checkpoint.every, made.mesh.data = "synthetic", EVERY, 1
    made.monitor.log_every, made.monitor.sample_every, made.monitor.sample_tokens = 1, 4, 6
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through, with what it wrote."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "whole")
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert train_and_evaluate(config(), run.path) == 0
    run.stdout, run.stderr = stdout.getvalue(), stderr.getvalue()
    return run


def train_command(*arguments, directory=ROOT):
    """The finished command; one that trains where it should refuse is ended in the end."""
    command = [sys.executable, "-m", "lumina_jax.train", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    captured = {"capture_output": True, "text": True, "check": False}
    return subprocess.run(command, cwd=directory, env=environment, timeout=GIVES_UP, **captured)


def train_batches():
    corpus = corpus_of(config().data, V)
    return Batches(Rows(corpus.train, T, corpus.document_end_id), 4, config().train.seed)


def contents(path):
    """All files but the lock, which says who looked last."""
    return {
        str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "lock"
    }


def newest(run):
    """The newest state of a run, as numpy arrays, and its manifest but for the files' own hashes."""
    state, step = checkpoint.load(run, shaped_whole(one_device(), state_shapes(config())[0]))
    manifest = Steps(run.checkpoints).manifest(step)
    return jax.device_get(state), {name: value for name, value in manifest.items() if name != "files"}


def events(run, *kinds):
    return [(event["event"], event["step"]) for event in read_json_lines(run.events) if not kinds or event["event"] in kinds]


def row_digest(numbers):
    return hashlib.sha256(np.asarray(numbers).astype("<i8").tobytes()).hexdigest()[:16]


def of_steps(run):
    """The ledger's records of steps; others are of parameters, where a checkpoint was made."""
    return [record for record in read_json_lines(run.ledger) if "loss" in record]


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.tobytes() == y.tobytes()


def untimed(run):
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in read_json_lines(run.metrics)]


# ----------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_files(whole):
    assert {file.name for file in whole.path.iterdir()} == {
        "config.json",
        "data.json",
        "tokenizer",
        "metrics.jsonl",
        "ledger.jsonl",
        "events.jsonl",
        "result.json",
        "tensorboard",
        "samples",
        "checkpoints",
        "lock",
    }
    assert {each.name for each in whole.checkpoints.iterdir()} == {"6", "9"}  # the newest two, of which one is the best
    assert sorted(int(each.stem) for each in whole.samples.iterdir()) == [4, 8, 9]


def test_the_ledger_has_every_step_once_with_the_bits_of_its_loss_and_the_digest_of_its_rows(whole):
    losses = {record["step"]: record["loss"] for record in read_json_lines(whole.metrics) if record["kind"] == "train"}
    ledger = of_steps(whole)
    assert [record["step"] for record in ledger] == list(range(1, STEPS + 1))
    for record in ledger:
        assert struct.unpack(">f", bytes.fromhex(record["loss"])) == (losses[record["step"]],)
        assert record["rows"] == row_digest(train_batches().row_numbers(record["step"] - 1))


def test_the_ledger_has_the_digest_of_the_parameters_at_each_checkpoint(whole):
    found = {record["step"]: record["parameters"] for record in read_json_lines(whole.ledger) if "parameters" in record}
    assert list(found) == [3, 6, 9]
    assert len(set(found.values())) == 3
    assert found[STEPS] == Steps(whole.checkpoints).manifest(STEPS)["parameters"]


def test_events_tell_of_start_checkpoints_and_end(whole):
    assert events(whole) == [("started", 0), *[("saved", step) for step in (3, 6, 9)], ("finished", STEPS)]
    assert all(event["time"] for event in read_json_lines(whole.events))


def test_a_run_tells_what_it_is_about_to_do_then_each_step_and_evaluation(whole):
    lines = whole.stderr.splitlines()
    assert f"run  {whole.path}, new" in whole.stderr
    assert "1 x cpu (cpu), jax" in whole.stderr
    told = [line.split("  ")[0] for line in lines if line.startswith("step ")]
    assert [line for line in told if ":" not in line] == [f"step {n}/{STEPS}" for n in range(1, STEPS + 1)]
    assert [line.split(":")[0] for line in lines if "held out loss" in line] == [f"step {n}" for n in (3, 6, 9)]


def test_samples_and_figures_go_to_stdout_and_nothing_else_does(whole):
    result = json.loads(whole.result.read_text())
    assert len(result["samples"]) == SAMPLES
    for number, sample in enumerate(result["samples"], 1):
        assert f"--- sample {number} -" in whole.stdout
        assert printable(sample) in whole.stdout
    assert f"step {STEPS}, held out: loss {result['held_out']['loss']:.4f}" in whole.stdout
    assert "gzip -9" in whole.stdout
    assert whole.stdout.rstrip().splitlines()[-1].startswith("next: ")
    assert "tok/s" not in whole.stdout


def test_metrics_have_every_step_and_evaluation(whole):
    records = read_json_lines(whole.metrics)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6, 9]
    train = records[0]
    assert np.shape(train["moe_load"]) == (2, 4)
    for name in ("balance_loss", "z_loss", "dropped"):
        assert np.shape(train[f"moe_{name}"]) == (2,)
    for name in ("predictor_loss", "causal_capacity", "agreement"):
        assert np.shape(train[f"mod_{name}"]) == (2,)
    assert np.sum(train["moe_load"], axis=1) == pytest.approx([1, 1])


def test_bits_per_byte_count_the_bytes_of_the_batch(whole):
    corpus, batches = corpus_of(config().data, V), train_batches()
    for record in read_json_lines(whole.metrics):
        if record["kind"] == "train":
            targets = batches.batch(record["step"] - 1)["targets"]
            count = len(corpus.tokenizer.decode_bytes(targets.ravel().tolist()))
            expected = record["loss"] * targets.size / math.log(2) / count
        else:
            expected = record["loss"] * record["tokens"] / math.log(2) / record["bytes"]
        assert record["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_counts_every_whole_row_of_the_held_out_text(whole):
    corpus = corpus_of(config().data, V)
    rows = (corpus.held_out.num_tokens - 1) // T
    text = corpus.tokenizer.decode_bytes(corpus.held_out.read(1, rows * T + 1).tolist())
    last = json.loads(whole.result.read_text())["held_out"]
    assert (last["tokens"], last["bytes"]) == (rows * T, len(text))


def test_the_loss_falls(whole):
    held_out = [record["loss"] for record in read_json_lines(whole.metrics) if record["kind"] == "eval"]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < math.log(V) - 0.3


def test_the_warm_up_is_used(whole):
    rates = [record["learning_rate"] for record in read_json_lines(whole.metrics) if record["kind"] == "train"]
    assert rates[:4] == pytest.approx([1e-2 * n / 4 for n in (1, 2, 3, 4)], rel=1e-6)
    assert rates[-1] < rates[4]


# --------------------------------------------------------------------------------------------------------- going on


class Interruption(BaseException):
    """What a test stops a run with: like a power cut, nothing is saved after it."""


def wait_for(path, process=None):
    """A checkpoint is written in the background; an interruption before it is on disk would be another test."""

    def ended():
        assert process is None or process.poll() is None, process.communicate()
        return f"{path} was never written"

    until(path.exists, ended)


def interrupt(settings, run, after, checkpoint):
    """Train until the batch after step `after` would be used; returns from and to which steps batches were asked for."""
    prefetch, asked = lumina.runs.loop.prefetch, []

    def ends(batches, start, stop, workers):
        asked.append((start, stop))
        for step, batch in prefetch(batches, start, stop, workers):
            if step == after:
                wait_for(run.checkpoints / str(checkpoint))
                raise Interruption
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumina.runs.loop, "prefetch", ends)
        with pytest.raises(Interruption):
            train_and_evaluate(settings, run.path)
    return asked


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """(a run that was interrupted and then went on, its metrics in between, the steps it went on with)."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "resumed")
    assert interrupt(config(), run, after=8, checkpoint=6) == [(0, STEPS)]
    between, asked, prefetch = read_json_lines(run.metrics), [], lumina.runs.loop.prefetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumina.runs.loop, "prefetch", lambda *a: asked.append(a[1:3]) or prefetch(*a))
        assert train_and_evaluate(config(), run.path) == 0
    return run, between, asked


def test_a_run_goes_on_from_its_newest_checkpoint(resumed):
    assert resumed[2] == [(6, STEPS)]
    assert events(resumed[0], "started", "finished") == [("started", 0), ("started", 6), ("finished", STEPS)]


def test_resumed_equals_uninterrupted_bit_for_bit(resumed, whole):
    run = resumed[0]
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()
    (state, manifest), (expected, expected_manifest) = newest(run), newest(whole)
    assert int(state.step) == STEPS
    assert_same_bits(state, expected)
    assert manifest == expected_manifest


def test_a_resumed_run_tells_each_step_once_and_the_same_as_an_uninterrupted_one(resumed, whole):
    run, between, _ = resumed
    assert max(record["step"] for record in between) > 6  # what went on from there had to be dropped
    assert untimed(run) == untimed(whole)
    assert run.result.read_bytes() == whole.result.read_bytes()


def test_an_annealed_run_interrupted_between_two_falls_goes_on_bit_for_bit(tmp_path, capsys):
    depth = {"scope": "block", "capacity": 0.25, "anneal_steps": 5}
    settings = config(kind="dense+mod", model={"num_layers": 1}, mod=depth, steps=6)
    whole, run = (RunDirectory(tmp_path / name) for name in ("whole", "run"))
    assert train_and_evaluate(settings, whole.path) == 0
    told = [line.rsplit(" ", 1)[1] for line in capsys.readouterr().err.splitlines() if "for a depth capacity of" in line]
    assert told == ["1", "0.90625", "0.71875", "0.625", "0.4375", "0.25"]  # eighths of the fall, as steps reach them
    interrupt(settings, run, after=5, checkpoint=3)
    assert train_and_evaluate(settings, run.path) == 0
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()  # digests of the parameters among it


def test_a_finished_run_run_again_says_so_and_changes_nothing(whole, tmp_path):
    save(config(), tmp_path / "config.json")
    before = contents(whole.path)
    again = train_command("--config", tmp_path / "config.json", "--workdir", whole.path)
    assert again.returncode == 0, again.stderr
    assert "is complete" in again.stderr
    assert json.loads(whole.result.read_text())["samples"][0] in again.stdout
    assert contents(whole.path) == before


def test_an_empty_process_number_is_none(whole, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PROCESS_ID", "")
    assert train_and_evaluate(config(), whole.path) == 0
    assert "--- sample 1 -" in capsys.readouterr().out


def test_a_finished_run_goes_on_when_given_more_steps(whole, tmp_path):
    run = RunDirectory(tmp_path / "longer")
    shutil.copytree(whole.path, run.path)
    train_and_evaluate(config(steps=STEPS + 2), run.path)
    assert run.ledger.read_text().startswith(whole.ledger.read_text())
    assert [record["step"] for record in of_steps(run)] == list(range(1, STEPS + 3))
    assert json.loads(run.result.read_text())["step"] == STEPS + 2
    assert load(str(run.path)).train.steps == STEPS + 2
    (changed,) = [event["says"] for event in read_json_lines(run.events) if event["event"] == "changed"]
    assert changed == f"changed from step {STEPS} on: train.steps: {STEPS} -> {STEPS + 2}"


def test_a_changed_config_is_refused_with_its_field(whole):
    before = contents(whole.path)
    with pytest.raises(ConfigError, match=r"another config \(optim\.learning_rate: 0\.01 -> 0\.02\); choose another --workdir"):
        train_and_evaluate(config(optim={"learning_rate": 0.02}), whole.path)
    assert contents(whole.path) == before


def damage(run, step):
    for file in (run.checkpoints / str(step) / "state").rglob("*"):
        if file.is_file() and not file.name.startswith(("_", "manifest")):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def copied(run, path):
    shutil.copytree(run.path, path)
    return RunDirectory(path)


def test_after_a_damaged_checkpoint_the_one_before_leads_to_the_same_bits(whole, tmp_path):
    run = copied(whole, tmp_path / "damaged")
    damage(run, STEPS)
    assert train_and_evaluate(config(), run.path) == 0
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()
    assert_same_bits(newest(run)[0], newest(whole)[0])
    assert events(run, "set aside") == [("set aside", STEPS)]
    assert (run.checkpoints / f"broken-{STEPS}").is_dir()


def test_damaged_checkpoints_alone_are_refused_by_name_instead_of_starting_anew(whole, tmp_path):
    run = copied(whole, tmp_path / "damaged")
    for step in Steps(run.checkpoints).all():
        damage(run, step)
    before = run.ledger.read_bytes(), run.result.read_bytes()
    with pytest.raises(CheckpointError, match="no checkpoint is whole, 2 were set aside"):
        train_and_evaluate(config(steps=STEPS + 2), run.path)
    assert (run.ledger.read_bytes(), run.result.read_bytes()) == before


def test_an_error_saves_the_step_it_came_in_and_the_run_goes_on_from_there(whole, tmp_path, monkeypatch):
    run, read = RunDirectory(tmp_path / "run"), Rows.row
    doomed = int(train_batches().row_numbers(5)[2])  # of step 6

    def row(self, index):
        if index == doomed and self.stream.name == "train":
            raise OSError("the disk is gone")
        return read(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(Rows, "row", row)
        with pytest.raises(OSError, match="the disk is gone"):
            train_and_evaluate(config(), run.path)
    assert events(run, "failed") == [("failed", 5)]
    assert Steps(run.checkpoints).all()[-1] == 5
    assert train_and_evaluate(config(), run.path) == 0
    assert of_steps(run) == of_steps(whole)
    assert_same_bits(newest(run)[0], newest(whole)[0])


def test_a_batch_with_a_nan_is_skipped_and_told_of_and_training_goes_on(tmp_path, monkeypatch):
    run, make = RunDirectory(tmp_path / "run"), Batches.batch

    def batch(self, step):
        made = make(self, step)
        if step == 4:
            made["weights"][1, 3] = np.nan
        return made

    monkeypatch.setattr(Batches, "batch", batch)
    assert train_and_evaluate(config(), run.path) == 0
    assert {record["step"]: record.get("update") for record in of_steps(run)} == {
        step: "skipped" if step == 5 else None for step in range(1, STEPS + 1)
    }
    assert events(run, "skipped") == [("skipped", 5)]
    assert math.isfinite(json.loads(run.result.read_text())["held_out"]["loss"])


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 2, "expert": 2}], ids=["rows", "split, moments on the host"])
def test_more_devices_go_on_with_a_run_and_change_its_numbers_by_rounding_alone(whole, tmp_path, axes):
    run, more = RunDirectory(tmp_path / "run"), config()
    interrupt(config(), run, after=8, checkpoint=6)
    more.mesh, more.optim.offload = MeshConfig(**{"data": 1, **axes}), "fsdp" in axes
    assert train_and_evaluate(more, run.path) == 0
    assert train_and_evaluate(config(), run.path) == 0  # complete, as one device reads what several wrote
    found, expected = ([r["loss"] for r in read_json_lines(each.metrics)] for each in (run, whole))
    assert found == pytest.approx(expected, rel=1e-5)
    assert [record["rows"] for record in of_steps(run)] == [record["rows"] for record in of_steps(whole)]


def test_a_larger_batch_goes_on_with_the_rows_where_the_smaller_one_was(tmp_path):
    run = RunDirectory(tmp_path / "run")
    interrupt(config(), run, after=5, checkpoint=3)
    larger = config(batch_size=8)
    with pytest.raises(ConfigError, match=r"train\.batch_size: 4 -> 8.*--accept-changes"):
        train_and_evaluate(larger, run.path)
    assert train_and_evaluate(larger, run.path, accept_changes=True) == 0
    order = np.concatenate([train_batches().row_numbers(step) for step in range(3 + 2 * 6)])
    batches = [order[4 * n : 4 * n + 4] for n in range(3)] + [order[12 + 8 * n : 20 + 8 * n] for n in range(6)]
    assert [record["rows"] for record in of_steps(run)] == [row_digest(numbers) for numbers in batches]
    assert load(str(run.path)).train.batch_size == 8
    assert train_and_evaluate(larger, run.path) == 0  # complete, and the change needs no accepting twice


# -------------------------------------------------------------------------------------------------------- on request


def test_sigterm_saves_and_exits_with_75_and_the_command_that_goes_on(tmp_path):
    endless = config(steps=100_000, eval_every=0)
    endless.checkpoint.every, endless.monitor.sample_every = 100_000, 0
    save(endless, tmp_path / "config.json")
    run, arguments = (
        RunDirectory(tmp_path / "run"),
        ["--config", str(tmp_path / "config.json"), "--workdir", str(tmp_path / "run")],
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lumina_jax.train", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(run.ledger, process)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=GIVES_UP)
    finally:
        process.kill()
    assert process.returncode == 75, stderr
    assert stdout == ""
    last = of_steps(run)[-1]["step"]
    assert Steps(run.checkpoints).all() == [last]
    assert Steps(run.checkpoints).verify(last) == []
    assert f"stopped by SIGTERM at step {last}" in stderr
    assert stderr.splitlines()[-2] == "all is saved; this goes on where it stopped:"
    assert stderr.splitlines()[-1].endswith("-m lumina_jax.train " + " ".join(arguments))


def test_a_second_trainer_is_refused_while_one_trains(whole, tmp_path):
    run = copied(whole, tmp_path / "run")
    lock = RunLock(run.lock)
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        train_and_evaluate(config(steps=STEPS + 2), run.path)
    lock.release()
    assert contents(run.path) == contents(whole.path)


# ----------------------------------------------------------------------------------------------------- stopping, the best

PATIENCE = 3


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """(config, run) of a run whose learning rate grows until it learns no more."""
    optim = {"learning_rate": 1.0, "warmup_steps": 8, "schedule": "constant"}
    settings = config(optim=optim, steps=40, eval_every=1, eval_rows=16, early_stopping=PATIENCE)
    settings.checkpoint.every, settings.monitor.sample_every = 1, 0
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "diverged")
    train_and_evaluate(settings, run.path)
    return settings, run


def test_early_stopping_stops_after_evaluations_without_improvement(diverged):
    settings, run = diverged
    losses = [record["loss"] for record in read_json_lines(run.metrics) if record["kind"] == "eval"]
    assert len(losses) < settings.train.steps
    assert losses.index(min(losses)) == len(losses) - 1 - PATIENCE
    assert of_steps(run)[-1]["step"] == len(losses)
    assert json.loads(run.result.read_text())["step"] == len(losses)


def test_a_run_that_stopped_early_stays_as_it_is_when_run_again(diverged):
    settings, run = diverged
    before = contents(run.path)
    train_and_evaluate(settings, run.path)
    assert contents(run.path) == before


def test_patience_and_the_best_so_far_outlast_an_interruption(diverged, tmp_path):
    settings, expected = diverged
    run, last = RunDirectory(tmp_path / "run"), read_json_lines(expected.ledger)[-1]["step"]
    interrupt(settings, run, after=last - 1, checkpoint=last - 1)
    train_and_evaluate(settings, run.path)
    assert run.ledger.read_bytes() == expected.ledger.read_bytes()
    assert run.result.read_bytes() == expected.result.read_bytes()


def test_the_best_checkpoint_is_the_one_of_the_lowest_held_out_loss(diverged):
    settings, run = diverged
    evaluations = {record["step"]: record for record in read_json_lines(run.metrics) if record["kind"] == "eval"}
    best = min(evaluations.values(), key=lambda record: record["loss"])
    assert best["step"] in Steps(run.checkpoints).all()
    assert json.loads(run.result.read_text())["best_step"] == best["step"] < max(evaluations)
    corpus = corpus_of(settings.data, V)
    held_out = Batches(Rows(corpus.held_out, T, corpus.document_end_id), 4, seed=0, shuffle=False)
    step = jax.jit(make_eval_step(settings, state_shapes(settings)[1], corpus.tokenizer.token_bytes()))
    for which, record in ((True, best), (False, evaluations[max(evaluations)])):
        variables = load_generator(run.path, best=which).variables
        found = evaluate(step, variables, held_out.evaluation(settings.train.eval_rows))
        assert {"kind": "eval", "step": record["step"], **found} == record


# --------------------------------------------------------------------------------------------------------- bad input


CONFIGS = {
    "fine": {"data": {"source": "synthetic"}, "model": {"vocab_size": V}},
    "near": {"train": {"step": 5}},
    "group": {"optimizer": {}},
    "type": {"train": {"steps": "ten"}},
    "list": [],
    "gone": {"data": {"source": "gone.txt"}},
    "empty": {"data": {"source": "empty.txt"}},
    "short": {
        "data": {"source": "text*.txt", "held_out": 0.2, "sequence_length": 5000, "tokenizer": "tokenizer"},
        "model": {"vocab_size": 290},
    },
    "small": {"data": {"source": "synthetic", "tokenizer": "tokenizer"}, "model": {"vocab_size": 280}},
    "bytes": {"data": {"source": "synthetic"}, "model": {"vocab_size": 100}},
}
# Name -> (exit code, what the line says, the config and what follows it)
REFUSALS = {
    "unknown_field": (3, "train.step: no such field (did you mean steps?)", "near.json"),
    "unknown_group": (3, "optimizer: no such field (did you mean optim?)", "group.json"),
    "unknown_field_in_a_flag": (3, "did you mean train.steps?", "fine.json --config.train.stepz=5"),
    "wrong_type": (3, "train.steps = 'ten': must be of type int", "type.json"),
    "wrong_type_in_a_flag": (3, "train.steps", "fine.json --config.train.steps=ten"),
    "impossible_value": (3, "optim.schedule = 'cosin': must be one of", "fine.json --config.optim.schedule=cosin"),
    "dtype_of_pytorch": (
        3,
        "train.compute_dtype = 'float16': not in lumina_jax, which has float32, bfloat16",
        "fine.json --config.train.compute_dtype=float16",
    ),
    "attention_of_pytorch": (
        3,
        "model.attention_form = 'flash': not in lumina_jax, which has auto, reference, chunked, splash",
        "fine.json --config.model.attention_form=flash",
    ),
    "experts_of_pytorch": (
        3,
        "model.moe.grouped_form = 'loop': not in lumina_jax, which has auto, blocks, ragged",
        "fine.json --config.model.moe.grouped_form=loop",
    ),
    "nothing_to_begin_from": (2, "nowhere: no such directory", "fine.json --config.checkpoint.init_from=nowhere"),
    "not_json": (3, "broken.json: cannot be read as a config", "broken.json"),
    "not_an_object": (3, "must be a mapping", "list.json"),
    "no_config_file": (2, "nowhere.json: no such config file", "nowhere.json"),
    "not_a_run_directory": (2, "no config.json", "tokenizer"),
    "unknown_flag": (2, "--steps=5: unknown argument", "fine.json --steps=5"),
    "bad_variant": (2, "debug:sparse: no variant 'sparse'", "debug:sparse"),
    "variant_of_a_file_without_any": (2, "have variants", "fine.json:moe"),
    "workdir_below_a_file": (2, "file/run: cannot be written", "fine.json --workdir file/run"),
    "workdir_is_a_file": (2, "file: cannot be written", "fine.json --workdir file"),
    "no_data_file": (4, "gone.txt: no such file", "gone.json"),
    "empty_corpus": (4, "holds no document", "empty.json"),
    "sequence_longer_than_the_data": (4, "data.sequence_length = 5000: a row takes 5001 tokens", "short.json"),
    "vocabulary_smaller_than_the_tokenizer": (
        3,
        "model.vocab_size = 280: must be at least tokenizer bpe-290's",
        "small.json",
    ),
    "vocabulary_smaller_than_bytes": (3, "model.vocab_size = 100: must be at least 262", "bytes.json"),
}
# These are known once the data has been read, of which a line or two tell.
AFTER_READING = ("sequence_longer_than_the_data", "vocabulary_smaller_than_bytes")


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Name -> the finished command; as many at once as there are processors."""
    directory = tmp_path_factory.mktemp("bad")
    for name, values in CONFIGS.items():
        (directory / f"{name}.json").write_text(json.dumps(values))
    (directory / "broken.json").write_text("{")
    (directory / "empty.txt").touch()
    (directory / "file").touch()
    for number in range(40):
        (directory / f"text{number}.txt").write_text(f"Text number {number}, a short one.\n")
    train_bpe([" ".join(f"{n} words" for n in range(300))], 290).save(directory / "tokenizer")

    def run(name):
        return name, train_command("--config", *REFUSALS[name][2].split(), directory=directory)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(run, REFUSALS))


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_is_one_clear_line_and_an_exit_code(refused, name):
    (code, text, _), done = REFUSALS[name], refused[name]
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert text in line
    assert not before or name in AFTER_READING
    assert not [other for other in before if "error" in other.lower() or "Traceback" in other]


def test_a_changed_config_exits_with_the_code_of_a_config_error(whole, tmp_path):
    save(config(seed=1), tmp_path / "config.json")
    done = train_command("--config", tmp_path / "config.json", "--workdir", whole.path)
    assert done.returncode == 3
    assert done.stderr.startswith("error: ")
    assert "train.seed: 0 -> 1" in done.stderr
    assert done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------------- who may know whom

BACKENDS = {"jax", "flax", "optax", "orbax", "torch"}


def imported_by(package):
    """Names of the top-level packages that importing every module of `package` loads, in a process of its own."""
    modules = [name for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}, modules


def test_importing_all_of_lumina_loads_no_backend():
    loaded, modules = imported_by(lumina)
    assert "lumina.cli" in modules
    assert "lumina.data.loader" in modules
    assert not loaded & (BACKENDS | {"lumina_jax", "lumina_torch", "grain"})


def test_importing_all_of_lumina_jax_loads_no_torch():
    loaded, modules = imported_by(lumina_jax)
    assert "lumina_jax.train" in modules
    assert {"jax", "flax"} <= loaded
    assert not loaded & {"torch", "lumina_torch"}


MAY_KNOW = {"lumina/interchange/verify.py": {"torch"}}  # asks transformers what it computes, when an export is verified


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("lumina", BACKENDS),
        ("lumina_jax", {"torch", "lumina_torch"}),
        ("lumina_torch", (BACKENDS - {"torch"}) | {"lumina_jax"}),
    ],
)
def test_no_source_imports_what_it_may_not_know(package, forbidden):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            known = forbidden - MAY_KNOW.get(file.relative_to(ROOT).as_posix(), set())
            assert not {name.partition(".")[0] for name in names} & known, f"{file}:{node.lineno}"


def test_steps_lowered_to_the_checkpoint_give_a_result(tmp_path):
    run, settings = RunDirectory(tmp_path / "run"), config(eval_every=0, steps=8, optim={"warmup_steps": 1})
    interrupt(settings, run, after=5, checkpoint=EVERY)
    settings.train.steps = EVERY
    train_and_evaluate(settings, run.path)
    result = json.loads(run.result.read_text())
    assert result["step"] == EVERY
    assert [r["step"] for r in read_json_lines(run.metrics) if r["kind"] == "eval"] == [EVERY]


def test_a_run_cut_off_between_stopping_early_and_its_result_trains_no_further(diverged, tmp_path):
    settings, expected = diverged
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(expected.path, run.path)
    run.result.unlink()
    train_and_evaluate(settings, run.path)
    assert run.ledger.read_bytes() == expected.ledger.read_bytes()
    assert json.loads(run.result.read_text())["step"] == json.loads(expected.result.read_text())["step"]
