"""Training from end to end: what a run leaves behind, going on with one, stopping, and refusing what cannot work."""

import ast
import hashlib
import json
import math
import os
import pkgutil
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import lumina
import lumina_jax
import lumina_jax.device
import lumina_jax.train
from lumina.config import save
from lumina.data import prepare
from lumina.data.rows import Batches, Rows
from lumina.errors import ConfigError
from lumina.runs.directory import RunDirectory, read_json_lines
from lumina.tokenizer import train_bpe
from lumina_jax.checkpoint import Checkpoints
from lumina_jax.evaluate import evaluate
from lumina_jax.generate import load_generator
from lumina_jax.step import make_eval_step, state_shapes
from lumina_jax.train import train_and_evaluate
from tests.lumina_jax.tiny import T, V, tiny

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 8, 3
TIMINGS = {"tokens_per_second", "peak_fraction"}


def config(**changes):
    """A run of 8 steps that keeps a checkpoint every 3 and evaluates every 2."""
    made = tiny(**{"steps": STEPS, "eval_every": 2, **changes})
    made.data.source, made.checkpoint.every = "synthetic", EVERY
    made.monitor.log_every, made.monitor.sample_every, made.monitor.sample_tokens = 1, 4, 6
    return made


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """All runs here, in this process and in others, share what they compile; none measures the machine."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        patch.setattr(lumina_jax.device, "matmul_peak", lambda dtype: 1e12)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that went through."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "whole")
    train_and_evaluate(config(), run.path)
    return run


def train_command(*arguments, directory=ROOT):
    """The finished command; one that trains where it should refuse is ended after a minute."""
    command = [sys.executable, "-m", "lumina_jax.train", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=60)


def train_batches():
    corpus = prepare(config().data, V)
    return Batches(Rows(corpus.train, T, corpus.document_end_id), 4, config().train.seed)


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def newest(run):
    """The newest state of a run, as numpy arrays."""
    checkpoints = Checkpoints(run, config().checkpoint, create=False)
    state, progress = checkpoints.restore(state_shapes(config())[0])
    checkpoints.close()
    return jax.device_get(state), progress


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
        "result.json",
        "tensorboard",
        "samples",
        "checkpoints",
        "best",
    }
    assert sorted(int(each.name) for each in whole.checkpoints.iterdir()) == [6, 8]  # the newest two of 3, 6 and 8
    assert sorted(int(each.stem) for each in whole.samples.iterdir()) == [4, 8]


def test_the_ledger_has_every_step_once_with_the_bits_of_its_loss_and_the_digest_of_its_rows(whole):
    losses = {record["step"]: record["loss"] for record in read_json_lines(whole.metrics) if record["kind"] == "train"}
    ledger = read_json_lines(whole.ledger)
    assert [record["step"] for record in ledger] == list(range(1, STEPS + 1))
    for record in ledger:
        assert struct.unpack(">f", bytes.fromhex(record["loss"])) == (losses[record["step"]],)
        numbers = train_batches().row_numbers(record["step"] - 1)
        assert record["rows"] == hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]


def test_metrics_have_every_step_and_evaluation(whole):
    records = read_json_lines(whole.metrics)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [2, 4, 6, 8]
    train = records[0]
    assert np.shape(train["moe_load"]) == (2, 4)
    for name in ("balance_loss", "z_loss", "dropped"):
        assert np.shape(train[f"moe_{name}"]) == (2,)
    for name in ("predictor_loss", "causal_capacity", "agreement"):
        assert np.shape(train[f"mod_{name}"]) == (2,)
    assert np.sum(train["moe_load"], axis=1) == pytest.approx([1, 1])


def test_bits_per_byte_count_the_bytes_of_the_batch(whole):
    corpus, batches = prepare(config().data, V), train_batches()
    for record in read_json_lines(whole.metrics):
        if record["kind"] == "train":
            targets = batches.batch(record["step"] - 1)["targets"]
            count = len(corpus.tokenizer.decode_bytes(targets.ravel().tolist()))
            expected = record["loss"] * targets.size / math.log(2) / count
        else:
            expected = record["loss"] * record["tokens"] / math.log(2) / record["bytes"]
        assert record["bits_per_byte"] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_counts_every_whole_row_of_the_held_out_text(whole):
    corpus = prepare(config().data, V)
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


class Interruption(Exception):
    """What a test stops a run with."""


def wait_for(path):
    """A checkpoint is written in the background; an interruption before it is on disk would be another test."""
    until = time.monotonic() + 60
    while not path.is_dir():
        assert time.monotonic() < until, f"{path} was never written"
        time.sleep(0.02)


def interrupt(settings, run, after, checkpoint):
    """Train until the batch after step `after` would be used; returns from and to which steps batches were asked for."""
    prefetch, asked = lumina_jax.train.prefetch, []

    def ends(batches, start, stop):
        asked.append((start, stop))
        for step, batch in prefetch(batches, start, stop):
            if step == after:
                wait_for(run.checkpoints / str(checkpoint))
                raise Interruption
            yield step, batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumina_jax.train, "prefetch", ends)
        with pytest.raises(Interruption):
            train_and_evaluate(settings, run.path)
    return asked


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """(a run that was interrupted and then went on, its metrics in between, the steps it went on with)."""
    run = RunDirectory(tmp_path_factory.mktemp("runs") / "resumed")
    assert interrupt(config(), run, after=5, checkpoint=EVERY) == [(0, STEPS)]
    between, asked, prefetch = read_json_lines(run.metrics), [], lumina_jax.train.prefetch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumina_jax.train, "prefetch", lambda *a: asked.append(a[1:]) or prefetch(*a))
        train_and_evaluate(config(), run.path)
    return run, between, asked


def test_a_run_goes_on_from_its_newest_checkpoint(resumed):
    assert resumed[2] == [(EVERY, STEPS)]


def test_resumed_equals_uninterrupted_bit_for_bit(resumed, whole):
    run = resumed[0]
    assert run.ledger.read_bytes() == whole.ledger.read_bytes()
    (state, progress), (expected, expected_progress) = newest(run), newest(whole)
    assert int(state.step) == STEPS
    assert_same_bits(state, expected)
    assert progress == expected_progress


def test_a_resumed_run_tells_each_step_once_and_the_same_as_an_uninterrupted_one(resumed, whole):
    run, between, _ = resumed
    assert max(record["step"] for record in between) > EVERY  # what went on from there had to be dropped
    assert untimed(run) == untimed(whole)
    assert run.result.read_bytes() == whole.result.read_bytes()


def test_a_finished_run_run_again_says_so_and_changes_nothing(whole, tmp_path):
    save(config(), tmp_path / "config.json")
    before = contents(whole.path)
    again = train_command("--config", tmp_path / "config.json", "--workdir", whole.path)
    assert again.returncode == 0, again.stderr
    assert "is complete" in again.stderr
    assert json.loads(whole.result.read_text())["samples"][0] in again.stdout
    assert contents(whole.path) == before


def test_a_finished_run_goes_on_when_given_more_steps(whole, tmp_path):
    run = RunDirectory(tmp_path / "longer")
    shutil.copytree(whole.path, run.path)
    train_and_evaluate(config(steps=STEPS + 2), run.path)
    before, after = whole.ledger.read_text(), run.ledger.read_text()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after.removeprefix(before).splitlines()] == [STEPS + 1, STEPS + 2]
    assert json.loads(run.result.read_text())["step"] == STEPS + 2


def test_a_changed_config_is_refused_with_its_field(whole):
    before = contents(whole.path)
    with pytest.raises(ConfigError, match=r"another config \(optim\.learning_rate: 0\.01 -> 0\.02\); choose another --workdir"):
        train_and_evaluate(config(optim={"learning_rate": 0.02}), whole.path)
    assert contents(whole.path) == before


def test_a_damaged_checkpoint_is_refused_by_name_instead_of_starting_anew(whole, tmp_path):
    run = RunDirectory(tmp_path / "damaged")
    shutil.copytree(whole.path, run.path)
    for file in (run.checkpoints / str(STEPS) / "state").rglob("*"):
        if file.is_file() and not file.name.startswith(("_", "manifest")):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = run.ledger.read_bytes(), run.result.read_bytes()
    save(config(steps=STEPS + 2), tmp_path / "config.json")
    done = train_command("--config", tmp_path / "config.json", "--workdir", run.path)
    assert done.returncode == 5
    assert f"checkpoints/{STEPS}: cannot be read" in done.stderr
    assert (run.ledger.read_bytes(), run.result.read_bytes()) == before


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
    assert read_json_lines(run.ledger)[-1]["step"] == len(losses)
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
    assert [each.name for each in run.best.iterdir()] == [str(best["step"])]
    assert json.loads(run.result.read_text())["best_step"] == best["step"] < max(evaluations)
    corpus = prepare(settings.data, V)
    held_out = Batches(Rows(corpus.held_out, T, corpus.document_end_id), 4, seed=0, shuffle=False)
    step = jax.jit(make_eval_step(settings, state_shapes(settings)[1]))
    for which, record in ((True, best), (False, evaluations[max(evaluations)])):
        variables = load_generator(run.path, best=which).variables
        found = evaluate(step, variables, held_out, corpus.tokenizer.token_bytes(), settings.train.eval_rows)
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


@pytest.mark.parametrize(("package", "forbidden"), [("lumina", BACKENDS), ("lumina_jax", {"torch", "lumina_torch"})])
def test_no_source_imports_what_it_may_not_know(package, forbidden):
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & forbidden, f"{file}:{node.lineno}"


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
