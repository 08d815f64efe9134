"""PyTorch's trainer from end to end: what a run leaves, going on with one, stopping, beginning from another, and refusals.

What both trainers share is tested at length with JAX's, in tests/lumina_jax/test_train.py and tests/lumina/runs.
"""

import contextlib
import io
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

import lumina.runs.loop
import lumina_torch
import lumina_torch.device
import lumina_torch.train
from lumina.config import load as load_config
from lumina.config import save
from lumina.data.rows import Batches, Rows
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.interchange.state import load
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.steps import Steps
from lumina.runs.text import open_corpora, read
from lumina_torch.train import train_and_evaluate
from tests.lumina.corpora import chats, texts
from tests.lumina.interchange.states import assert_same, every_kind, make_directory
from tests.waiting import GIVES_UP, until

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 9, 3
TIMINGS = {"tokens_per_second", "peak_fraction"}


def config(**changes):
    """A run of 9 steps of all four kinds of layers that evaluates and keeps a checkpoint every 3."""
    made = every_kind(**{"steps": STEPS, "eval_every": EVERY, "eval_rows": 16, **changes})
    made.data.source, made.checkpoint.every = "synthetic", EVERY
    made.monitor.log_every, made.monitor.sample_every, made.monitor.sample_tokens = 1, 4, 4
    made.monitor.tensorboard = False
    return made


@pytest.fixture(scope="module", autouse=True)
def unmeasured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumina_torch.device, "matmul_peak", lambda dtype, device: 1e12)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through, with what it wrote."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "whole")
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        assert train_and_evaluate(config(), run.path) == 0
    run.stdout, run.stderr = stdout.getvalue(), stderr.getvalue()
    return run


def events(run, *kinds):
    return [(event["event"], event["step"]) for event in read_json_lines(run.events) if not kinds or event["event"] in kinds]


def of_steps(run):
    return [record for record in read_json_lines(run.ledger) if "loss" in record]


def untimed(run):
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in read_json_lines(run.metrics)]


def copied(run, path, *without):
    shutil.copytree(run.path, path)
    Steps(path / "checkpoints").remove(without)
    return RunDirectory(path)


def half(whole, path):
    """The run as it stood at step 6, in another place."""
    return copied(whole, path, STEPS)


def beginning_from(run, part="state", **changes):
    made = config(**changes)
    made.checkpoint.init_from, made.checkpoint.init_part = str(run.path), part
    return made


# ----------------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_its_files_and_tells_its_story(whole):
    assert {file.name for file in whole.path.iterdir()} == {
        "config.json",
        "data.json",
        "tokenizer",
        "metrics.jsonl",
        "ledger.jsonl",
        "events.jsonl",
        "result.json",
        "samples",
        "checkpoints",
        "lock",
    }
    assert {each.name for each in whole.checkpoints.iterdir()} == {"6", "9"}
    assert events(whole) == [("started", 0), *[("saved", step) for step in (3, 6, 9)], ("finished", STEPS)]
    assert read_json_lines(whole.events)[0]["torch"] == torch.__version__
    assert f"run  {whole.path}, new" in whole.stderr
    assert f"torch {torch.__version__}; matmul peak 1.00 TFLOP/s" in whole.stderr
    assert "attention: sdpa" in whole.stderr
    assert "--- sample 3 -" in whole.stdout


def test_the_loss_falls_and_every_step_is_told_of_once(whole):
    held_out = [record["loss"] for record in read_json_lines(whole.metrics) if record["kind"] == "eval"]
    assert held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < np.log(300) - 0.3
    assert [record["step"] for record in of_steps(whole)] == list(range(1, STEPS + 1))
    train = next(record for record in read_json_lines(whole.metrics) if record["kind"] == "train")
    assert np.shape(train["moe_load"]) == (3, 4)
    assert np.sum(train["moe_load"], axis=1) == pytest.approx([1, 1, 1])
    assert np.shape(train["mod_agreement"]) == (2,)


def test_metrics_are_those_of_the_jax_trainer_by_name(whole):
    train = next(record for record in read_json_lines(whole.metrics) if record["kind"] == "train")
    jax_names = {"loss", "bits_per_byte", "accuracy", "learning_rate", "gradient_norm", "moe_load", "moe_balance_loss"}
    jax_names |= {"moe_z_loss", "moe_entropy", "moe_dropped", "mod_predictor_loss", "mod_causal_capacity", "mod_agreement"}
    assert train.keys() - {"kind", "step", "time"} - TIMINGS == jax_names


# --------------------------------------------------------------------------------------------------------- going on


class Interruption(BaseException):
    """What a test stops a run with: like a power cut, nothing is saved after it."""


def wait_for(path, process=None):
    def ended():
        assert process is None or process.poll() is None, process.communicate()
        return f"{path} was never written"

    until(path.exists, ended)


def interrupt(settings, run, after, checkpoint):
    """Train until the batch after step `after` would be used."""
    prefetch = lumina.runs.loop.prefetch

    def ends(*arguments):
        for step, batch in prefetch(*arguments):
            if step == after:
                wait_for(run.checkpoints / str(checkpoint))
                raise Interruption
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumina.runs.loop, "prefetch", ends)
        with pytest.raises(Interruption):
            train_and_evaluate(settings, run.path)


def assert_equal_runs(run, whole):
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()  # digests of the parameters among it
    assert_same(load(run.path)[1], load(whole.path)[1])
    found, expected = ({**load(each.path)[2], "files": 0} for each in (run, whole))
    assert found == expected
    assert untimed(run) == untimed(whole)
    assert run.result.read_bytes() == whole.result.read_bytes()


def test_resumed_equals_uninterrupted_bit_for_bit(whole, tmp_path):
    run = RunDirectory(tmp_path / "run")
    interrupt(config(), run, after=8, checkpoint=6)
    assert train_and_evaluate(config(), run.path) == 0
    assert events(run, "started", "finished") == [("started", 0), ("started", 6), ("finished", STEPS)]
    assert_equal_runs(run, whole)


def test_after_a_damaged_checkpoint_the_one_before_leads_to_the_same_bits(whole, tmp_path):
    run = copied(whole, tmp_path / "damaged")
    file = run.checkpoints / str(STEPS) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert train_and_evaluate(config(), run.path) == 0
    assert events(run, "set aside") == [("set aside", STEPS)]
    assert (run.checkpoints / f"broken-{STEPS}").is_dir()
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()


def test_dropout_and_jitter_go_on_with_the_draws_they_would_have_had(tmp_path):
    settings = config(model={"dropout": 0.2}, moe={"jitter": 0.1, "bias_rate": 0.01}, micro_batches=2, eval_every=0)
    runs = [RunDirectory(tmp_path / name) for name in ("whole", "run")]
    assert train_and_evaluate(settings, runs[0].path) == 0
    interrupt(settings, runs[1], after=5, checkpoint=3)
    assert train_and_evaluate(settings, runs[1].path) == 0
    assert runs[1].ledger.read_bytes() == runs[0].ledger.read_bytes()
    biases = load(runs[0].path)[1].weights["blocks.1.moe.bias"]
    assert np.abs(biases).max() > 0


def test_an_annealed_capacity_falls_in_training_alone_and_goes_on_bit_for_bit(tmp_path, monkeypatch):
    from lumina_torch import mod

    depth = {"scope": "block", "capacity": 0.25, "anneal_steps": 5, "router": "random"}
    settings = config(mod=depth, steps=6)
    seen, asked = [], mod.capacity

    def capacity(tokens, share):
        seen.append(share)
        return asked(tokens, share)

    monkeypatch.setattr(mod, "capacity", capacity)
    whole_run, run = (RunDirectory(tmp_path / name) for name in ("whole", "run"))
    assert train_and_evaluate(settings, whole_run.path) == 0
    assert seen[::2] == seen[1::2] == [1, 0.90625, 0.71875, 0.625, 0.4375, 0.25]  # eighths of the fall, as steps reach them
    amid, last = (r["mod_capacity"] for r in read_json_lines(whole_run.metrics) if r["kind"] == "eval")
    assert amid == last  # random routing takes the share that it is told
    interrupt(settings, run, after=5, checkpoint=3)
    assert train_and_evaluate(settings, run.path) == 0
    assert run.ledger.read_bytes() == whole_run.ledger.read_bytes()


def test_a_finished_run_run_again_says_so_and_changes_nothing(whole, capsys):
    before = {file: file.read_bytes() for file in whole.path.rglob("*") if file.is_file() and file.name != "lock"}
    assert train_and_evaluate(config(), whole.path) == 0
    told = capsys.readouterr()
    assert "is complete: a larger --config.train.steps goes on" in told.err
    assert "--- sample 1 -" in told.out
    assert before == {file: file.read_bytes() for file in whole.path.rglob("*") if file.is_file() and file.name != "lock"}


def test_an_error_saves_the_step_it_came_in_and_the_run_goes_on_from_there(whole, tmp_path, monkeypatch):
    run, read, calls = RunDirectory(tmp_path / "run"), Rows.row, []

    def row(self, index):
        calls.append(index)
        if len(calls) > 4 * 5 and self.stream.name == "train" and not events(run, "failed"):
            raise OSError("the disk is gone")
        return read(self, index)

    settings = config(eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "row", row)
        patch.setattr(lumina.runs.loop, "prefetch", one_at_a_time)
        with pytest.raises(OSError, match="the disk is gone"):
            train_and_evaluate(settings, run.path)
    assert Steps(run.checkpoints).all()[-1] == 5
    assert train_and_evaluate(settings, run.path) == 0
    assert of_steps(run) == of_steps(whole)


def one_at_a_time(batches, start, stop, workers):
    for step in range(start, stop):
        yield step, batches.batch(step)


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
    assert load(run.path)[1].updates == STEPS - 1


def test_sigterm_saves_and_exits_with_75_and_the_command_goes_on(tmp_path):
    endless = config(steps=100_000, eval_every=0)
    endless.checkpoint.every, endless.monitor.sample_every = 100_000, 0
    save(endless, tmp_path / "config.json")
    run = RunDirectory(tmp_path / "run")
    arguments = ["--config", str(tmp_path / "config.json"), "--workdir", str(run.path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "lumina_torch.train", *arguments],
        cwd=ROOT,
        env=environment,
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
    assert (process.returncode, stdout) == (75, ""), stderr
    last = of_steps(run)[-1]["step"]
    assert Steps(run.checkpoints).all() == [last]
    assert f"stopped by SIGTERM at step {last}" in stderr
    assert stderr.splitlines()[-1].endswith("-m lumina_torch.train " + " ".join(arguments))
    endless.train.steps = last + 2
    assert train_and_evaluate(endless, run.path) == 0
    assert [record["step"] for record in of_steps(run)] == list(range(1, last + 3))


# ------------------------------------------------------------------------------------------------- beginning from another


def test_a_run_that_begins_from_a_state_goes_on_bit_for_bit(whole, tmp_path):
    source, run = half(whole, tmp_path / "half"), RunDirectory(tmp_path / "run")
    settings = beginning_from(source)
    assert train_and_evaluate(settings, run.path) == 0
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()  # the steps before are the source's
    assert_same(load(run.path)[1], load(whole.path)[1])
    assert load(run.path)[2]["begun_from"] == {"path": str(source.path), "part": "state", "step": 6}
    (begun,) = [event for event in read_json_lines(run.events) if event["event"] == "begun"]
    assert begun["begun_from"]["step"] == 6
    assert begun["says"] == f"begins from {source.path}, going on at its step 6"
    assert train_and_evaluate(settings, run.path) == 0  # complete, and the source is asked for nothing more


def test_a_run_that_began_from_another_resumes_without_it(whole, tmp_path):
    source, run = half(whole, tmp_path / "half"), RunDirectory(tmp_path / "run")
    settings = beginning_from(source)
    settings.checkpoint.every = 1
    interrupt(settings, run, after=8, checkpoint=7)
    shutil.rmtree(source.path)
    assert train_and_evaluate(settings, run.path) == 0
    assert of_steps(run) == of_steps(whole)


def test_a_rewind_to_before_the_first_checkpoint_goes_back_to_the_source(tmp_path, monkeypatch):
    guard = {"spike_sigmas": 1.0, "spike_window": 5, "spike_action": "rewind"}
    source, run, make = RunDirectory(tmp_path / "source"), RunDirectory(tmp_path / "run"), Batches.batch
    assert train_and_evaluate(config(guard=guard), source.path) == 0
    Steps(source.checkpoints).remove([STEPS])

    def batch(self, step):
        made = make(self, step)
        if step == 7:
            made["targets"] = np.zeros_like(made["targets"])
        return made

    settings = beginning_from(source, guard=guard)
    settings.checkpoint.every = 100
    monkeypatch.setattr(Batches, "batch", batch)
    assert train_and_evaluate(settings, run.path) == 0
    assert events(run, "rewound") == [("rewound", 6)]
    assert [(record["step"], record.get("update")) for record in of_steps(run)[6:]] == [
        (7, "passed over"),
        (8, "passed over"),
        (9, None),
    ]


def test_weights_begin_at_step_0_with_a_fresh_optimizer(whole, tmp_path):
    run = RunDirectory(tmp_path / "run")
    settings = beginning_from(whole, "weights", seed=3, optim={"learning_rate": 1e-3})
    assert train_and_evaluate(settings, run.path) == 0
    assert [record["step"] for record in of_steps(run)] == list(range(1, STEPS + 1))
    first = next(record for record in read_json_lines(run.metrics) if record["kind"] == "train")
    assert first["loss"] < json.loads(whole.metrics.read_text().splitlines()[0])["loss"] - 0.3
    assert first["learning_rate"] == pytest.approx(1e-3 / 4)
    assert load(run.path)[1].updates == STEPS


def test_a_directory_of_weights_begins_a_run(whole, tmp_path):
    state = load(whole.path)[1]
    state.first_moment, state.second_moment = {}, {}
    path = make_directory(tmp_path / "model", config(), state)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds weights alone"):
        train_and_evaluate(beginning_from(RunDirectory(path)), run.path)
    assert not run.config.exists()
    assert train_and_evaluate(beginning_from(RunDirectory(path), "weights", steps=5), run.path) == 0


# --------------------------------------------------------------------------------------------------------- refusals


def test_a_damaged_source_is_refused_before_anything_is_made(whole, tmp_path):
    source, run = half(whole, tmp_path / "half"), RunDirectory(tmp_path / "run")
    for step in Steps(source.checkpoints).all():
        (source.checkpoints / str(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        train_and_evaluate(beginning_from(source), run.path)
    assert {file.name for file in run.path.iterdir()} <= {"lock"}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["model.attention_form=splash"], "model.attention_form = 'splash': not in lumina_torch, which has auto, reference,"),
        (["model.moe.grouped_form=ragged"], "model.moe.grouped_form = 'ragged': not in lumina_torch, which has auto,"),
        (["mesh.data=4"], "mesh.data = 4: lumina_torch has one device a process"),
        (["checkpoint.init_from=gone"], "gone: no such directory"),
    ],
)
def test_what_only_jax_has_is_refused_before_torch_is_imported(tmp_path, flags, says):
    save(config(), tmp_path / "config.json")
    code = "import sys; from lumina.errors import exit_with; from lumina_torch.train import main\n"
    code += "try: exit_with(main)\nfinally: print(*sorted({'torch', 'jax'} & set(sys.modules)))"
    arguments = ["--config", "config.json", "--workdir", "run", *[f"--config.{flag}" for flag in flags]]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode in (2, 3)
    assert done.stdout == "\n"
    assert done.stderr.startswith("error: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_several_processes_without_zero_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE = 2: .*set --config\.torch\.deepspeed\.zero_stage=0"):
        train_and_evaluate(config(), tmp_path)


def test_a_changed_config_is_refused_with_its_field(whole):
    with pytest.raises(ConfigError, match=r"another config \(optim\.learning_rate: 0\.01 -> 0\.02\)"):
        train_and_evaluate(config(optim={"learning_rate": 0.02}), whole.path)
    assert load_config(str(whole.path)).optim.learning_rate == 0.01


def test_importing_all_of_lumina_torch_loads_no_jax():
    modules = [name for _, name, _ in pkgutil.walk_packages(lumina_torch.__path__, "lumina_torch.")]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "lumina_torch.train" in modules
    assert not loaded & {"jax", "flax", "optax", "orbax", "lumina_jax", "grain"}


# ------------------------------------------------------------------------------------------------------------ stages


def test_stages_of_another_length_and_mixture_are_trained_on_and_told_of(tmp_path):
    text, talk, run = texts(tmp_path / "texts.jsonl"), chats(tmp_path / "chats.jsonl"), RunDirectory(tmp_path / "run")
    settings = config(steps=6, eval_every=0)
    settings.data.source, settings.data.sequence_length, settings.data.held_out = "stdlib", 32, 0.2
    settings.data.stages = f"3 x 16: {text}; {text}@1, {talk}@1"
    settings.monitor.sample_prompt = "s"
    assert train_and_evaluate(settings, run.path) == 0
    records = [record for record in read_json_lines(run.metrics) if record["kind"] == "train"]
    assert [(record["stage"], record["sequence_length"]) for record in records] == [(1, 16)] * 3 + [(2, 32)] * 3
    assert [record.get(f"mixture/{talk}") for record in records[3:]] == [0.5] * 3
    assert [event["step"] for event in read_json_lines(run.events) if event["event"] == "stage"] == [4]
    course = read(settings, open_corpora(settings, lambda line: None), ((0,), 1)).train
    rows = [sha256(course.row_numbers(step).astype("<i8").tobytes()).hexdigest()[:16] for step in range(6)]
    assert [record["rows"] for record in read_json_lines(run.ledger) if "rows" in record] == rows
    found = json.loads(run.result.read_text())["held_out"]
    assert found["tokens"] == sum(of["tokens"] for of in found["sources"].values())
