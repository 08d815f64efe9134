"""Several processes with DeepSpeed's ZeRO make the steps that one makes, and their checkpoints are those of one.

T positions, V vocabulary.
"""

import copy
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import lumina_torch.device
import lumina_torch.train
from lumina.config import save, validate
from lumina.errors import ConfigError, UsageError
from lumina.flags import parse
from lumina.interchange.state import MOMENTS, arrays, read, write
from lumina.interchange.state import load as load_state
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.local import reserved_port
from lumina_torch.checkpoint import from_state, to_state
from lumina_torch.device import decide, fetch
from lumina_torch.processes import Place, place_of
from lumina_torch.stages import bytes_a_parameter, choose_stage, deepspeed_config, require_possible
from lumina_torch.step import controls, init_state, make_eval_step, make_train_step
from parity_tests.lanes import record
from tests.lumina_jax.tiny import tiny
from tests.lumina_torch.zero_worker import HALF, STAGES, STEPS, TOKEN_BYTES, batch, cases, numbers
from tests.waiting import until

ROOT = Path(__file__).parents[2]
CPU = decide("cpu", ["cpu"], "float32", False)
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the package deepspeed")


# ---------------------------------------------------------------------------------------------------- what is asked for


def sharing(stage="2", **changes):
    config = tiny(batch_size=8, micro_batches=2)
    config.torch.deepspeed.zero_stage = stage
    for name, value in changes.items():
        setattr(config.torch.deepspeed, name, value)
    return config


@pytest.mark.parametrize(
    ("free", "expected"), [(16e9 / 0.75, 0), (15.9e9 / 0.75, 1), (9.4e9 / 0.75, 2), (6.4e9 / 0.75, 3), (3.1e9 / 0.75, 3)]
)
def test_the_lowest_stage_that_fits_is_chosen(free, expected):
    stage, why = choose_stage(10**9, math.ceil(free), 8)
    assert stage == expected
    assert ("no stage fits" in why) == (free < 4e9)


def test_what_is_offloaded_decides_the_lowest_stage():
    assert choose_stage(1000, 10**9, 2)[0] == 0
    assert choose_stage(1000, 10**9, 2, offload_optimizer=True)[0] == 1
    assert choose_stage(1000, 10**9, 2, offload_parameters=True)[0] == 3


def test_deepspeed_is_configured_as_the_config_says():
    found = deepspeed_config(sharing("2", bucket_size=1000, overlap=False, offload_optimizer="cpu"), 2, 2, 5000)
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 2)
    assert found["gradient_clipping"] == 0  # the step clips; DeepSpeed's default is 1
    assert found["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }


def test_a_bucket_is_no_larger_than_the_model():
    found = deepspeed_config(sharing("3", offload_parameters="cpu"), 3, 2, 5000, on_cuda=True)
    optimization = found["zero_optimization"]
    assert optimization["reduce_bucket_size"] == optimization["stage3_prefetch_bucket_size"] == 5000
    assert optimization["offload_param"] == {"device": "cpu", "pin_memory": True}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (sharing("3", offload_parameters="cpu"), "offload_parameters = 'cpu': they are there already"),
    ],
)
def test_what_cannot_be_is_refused(config, said):
    with pytest.raises(ConfigError, match=said):
        require_possible(validate(config), CPU, Place(0, 2, 0))


def test_compiling_mps_and_rows_that_cannot_be_split_are_refused():
    compiled = sharing()
    compiled.torch.compile = True
    with pytest.raises(ConfigError, match="compile = True: not with DeepSpeed"):
        require_possible(compiled, CPU, Place())
    with pytest.raises(ConfigError, match="= 4 rows: must be a multiple of 3"):
        require_possible(sharing(), CPU, Place(0, 3, 0))
    with pytest.raises(ConfigError, match="DeepSpeed has no mps"):
        decide("mps", ["mps", "cpu"], "float32", False, deepspeed=True)


@pytest.mark.parametrize(
    ("given", "expected"), [(("", "", ""), Place()), (("3", "8", "1"), Place(3, 8, 1)), (("0", "1", "0"), Place(0, 1, 0))]
)
def test_a_process_is_told_its_place(given, expected, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), given, strict=True):
        monkeypatch.setenv(name, value)
    assert place_of() == expected


@pytest.mark.parametrize("given", [("2", "2", "0"), ("0", "2", ""), ("0", "2", "1"), ("x", "2", "0")])
def test_a_place_that_cannot_be_is_refused(given, monkeypatch):
    for name, value in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), given, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="RANK"):
        place_of()


def test_the_table_of_memory_in_the_docs_is_computed():
    told = (ROOT / "docs" / "deepspeed.md").read_text()
    for stage in STAGES:
        row = [f"{bytes_a_parameter(stage, n):g}" for n in (1, 2, 8, 64)]
        row.append(f"{bytes_a_parameter(stage, 8, offload_optimizer=True):g}" if stage else "-")
        assert f"| {stage} | " + " | ".join(row) + " |" in told


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_launch_script_has_flags_that_the_trainer_takes(script):
    command = [str(ROOT / "launch" / script), "--config.train.steps=300"]
    said = subprocess.run(command, env=os.environ | {"DRY_RUN": "1"}, cwd=ROOT, check=True, capture_output=True, text=True)
    words = said.stdout.split()
    config, workdir, _ = parse("lumina_torch.train", words[words.index("lumina_torch.train") + 1 :])
    assert (config.torch.deepspeed.zero_stage, config.train.steps, str(workdir)) == ("auto", 300, "runs/debug-torch")


# --------------------------------------------------------------------------------------------------------- two processes


def together(out):
    """Both processes of zero_worker.py, to their end."""
    with reserved_port() as port:
        return _together(out, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})


def _together(out, common):
    command = [sys.executable, "-m", "tests.lumina_torch.zero_worker", str(out)]
    logs = [(out / f"log-{rank}.txt").open("w+") for rank in (0, 1)]
    processes = []
    for rank, log in enumerate(logs):
        env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    until(lambda: any(p.poll() for p in processes) or all(p.poll() == 0 for p in processes))
    for process in processes:  # one that failed leaves the other waiting
        if process.poll() is None:
            process.kill()
        process.wait()
    for log in logs:
        log.seek(0)
    said = "\n".join(log.read()[-3000:] for log in logs)
    assert [process.returncode for process in processes] == [0, 0], said
    return [json.loads((out / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def alone(config, first, last, state=None):
    """(state, metrics of each step) of one process."""
    state = state or init_state(config)
    step, history = make_train_step(config, TOKEN_BYTES), []
    for number in range(first, last):
        state, metrics = step(state, batch(number), controls(config))
        history.append(numbers(fetch(metrics)))
    return state, history


def run_config():
    config = copy.deepcopy(cases()["mod"])
    config.data.source, config.checkpoint.every, config.train.eval_every, config.train.eval_rows = "synthetic", 3, 3, 6
    config.monitor.sample_every, config.monitor.sample_tokens, config.monitor.tensorboard = 2, 4, False
    config.monitor.log_every, config.train.steps = 1, 6
    return config


class Both:
    """What two processes did, told by each, and what one did."""

    def __init__(self, out):
        self.out, self.plain, self.states = out, {}, {}
        save(run_config(), out / "config.json")
        for name, config in cases().items():
            state, history = alone(config, 0, HALF)
            if name == "hybrid":
                (out / "begin").mkdir()
                write(out / "begin", to_state(state))
            state, rest = alone(config, HALF, STEPS, state)
            self.plain[name], self.states[name] = history + rest, state
        self.told, self.others = together(out)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    if find_spec("deepspeed") is None:
        pytest.skip("needs the package deepspeed")
    return Both(tmp_path_factory.mktemp("zero"))


def distance(found, expected):
    """Relative L2 over all parameters, or over all moments, whichever is farthest off."""
    far = []
    for part in ("weights", *MOMENTS):
        a, b = getattr(found, part), getattr(expected, part)
        assert a.keys() == b.keys()
        square = sum(np.sum((np.float64(a[name]) - b[name]) ** 2) for name in b)
        far.append(math.sqrt(square / sum(np.sum(np.float64(b[name]) ** 2) for name in b)))
    return max(far)


def assert_metrics(found, expected):
    """The same numbers, floats within 2e-5 of the largest of their kind."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_metrics(found[name], value)
        else:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-5 * (np.abs(value).max() + 1e-30), err_msg=name)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", cases())
def test_two_processes_make_the_steps_of_one(both, name, stage):
    for found, expected in zip(both.told[f"{name} {stage}"], both.plain[name], strict=True):
        assert_metrics(found, expected)
    found = read(both.out / f"{name} {stage} {STEPS}")
    assert (found.step, found.updates) == (STEPS, STEPS)
    record("ZeRO", f"{name}, stage {stage}", distance(found, to_state(both.states[name])))


@needs_deepspeed
def test_each_process_is_told_the_same(both):
    for name, told in both.told.items():
        if not name.startswith(("refused", "copied", "memory")):
            assert both.others[name] == told, name
    assert both.told["agreed"] == [True, 0, None]
    assert both.told["in_any"] == [True, False]
    assert both.told["same"] is None
    assert both.told["different"] == "the data: process 1 has another than process 0; start all with the same"


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_state_goes_on_at_another_stage(both, stage):
    """At stage 3 from one of stage 2; at 0 and 1 from one of a single process."""
    for found, expected in zip(both.told[f"resumed {stage}"], both.plain["hybrid"][HALF:], strict=True):
        assert_metrics(found, expected)
    away = distance(read(both.out / f"resumed {stage}"), to_state(both.states["hybrid"]))
    record("ZeRO", f"hybrid, resumed at stage {stage}", away)


@needs_deepspeed
def test_weights_alone_begin_a_state_that_is_fresh(both):
    expected = to_state(init_state(cases()["hybrid"]))
    expected.weights = read(both.out / "begin").weights
    found, wanted = (arrays(state) for state in (read(both.out / "weights alone"), expected))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name], equal_nan=True) for name in wanted)


@needs_deepspeed
def test_a_state_of_stage_2_goes_on_in_one_process(both):
    config = cases()["hybrid"]
    state, history = alone(config, HALF, STEPS, from_state(config, read(both.out / f"hybrid 2 {HALF}")))
    for found, expected in zip(history, both.plain["hybrid"][HALF:], strict=True):
        assert_metrics(found, expected)
    assert distance(to_state(state), to_state(both.states["hybrid"])) < 1e-5


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_bad_makes_no_update_anywhere(both, stage):
    *bad, good = both.told[f"refused {stage}"]
    assert [each["skipped"] for each in bad] == [1, 2, 2]
    assert [each["finite"] for each in bad] == [False, False, True]
    assert all(each["same"] and each["updates"] == 0 for each in bad)
    config = cases()["moe"]
    state = init_state(config)
    state.step = 3
    _, expected = make_train_step(config)(state, batch(0), controls(config))
    assert (good["skipped"], good["stop"]) == (0, 1)
    assert good["gradient_norm"] == pytest.approx(float(expected["gradient_norm"]), rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_an_offloaded_optimizer_makes_the_same_steps(both, stage):
    record(
        "ZeRO",
        f"moe, stage {stage}, optimizer on the CPU",
        distance(read(both.out / f"offload {stage}"), to_state(both.states["moe"])),
    )


@needs_deepspeed
def test_bfloat16_makes_nearly_the_same_steps(both):
    config = copy.deepcopy(cases()["moe"])
    config.train.compute_dtype = "bfloat16"
    _, expected = alone(config, 0, 3)
    for found, one in zip(both.told["bfloat16 3"], expected, strict=True):
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert found["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-2)


@needs_deepspeed
def test_float16_halves_its_scale_where_gradients_overflow(both):
    told = both.told["float16 2"]
    assert [each["loss_scale"] for each in told] == [2.0**59, 2.0**58, 2.0**57]
    assert [each["skipped"] for each in told] == [0, 0, 0]
    assert all(math.isfinite(each["loss"]) for each in told)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_is_of_all_rows_and_generation_has_the_whole_model(both, stage):
    transformer = both.states["hybrid"].transformer
    assert_metrics(
        both.told[f"eval {stage}"], numbers(fetch(make_eval_step(cases()["hybrid"], TOKEN_BYTES)(transformer, batch(0))))
    )
    assert both.told[f"copied {stage}"] == pytest.approx(float(transformer.embedding.weight.detach().sum()), rel=1e-3)


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_memory_is_what_the_formula_says(both, stage):
    assert both.told[f"memory {stage}"] == pytest.approx(bytes_a_parameter(stage, 2), rel=0.05)


@needs_deepspeed
def test_a_run_of_two_processes_is_that_of_one(both, tmp_path, monkeypatch):
    monkeypatch.setattr(lumina_torch.device, "matmul_peak", lambda dtype, device: 1e12)
    for steps in (3, 6):
        config = run_config()
        config.train.steps = steps
        assert lumina_torch.train.train_and_evaluate(config, tmp_path / "run") == 0
    one, two = RunDirectory(tmp_path / "run"), RunDirectory(both.out / "run")
    assert [each.get("rows") for each in read_json_lines(one.ledger)] == [
        each.get("rows") for each in read_json_lines(two.ledger)
    ]
    assert distance(load_state(two.path)[1], load_state(one.path)[1]) < 1e-5
    found, expected = (json.loads(run.result.read_text()) for run in (two, one))
    assert found["held_out"]["loss"] == pytest.approx(expected["held_out"]["loss"], rel=1e-5)
    assert [len(found["samples"]), found["step"]] == [3, 6]
    assert load_state(two.path)[0].torch.deepspeed.zero_stage == "3"
