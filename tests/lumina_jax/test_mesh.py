"""Who shares the work: devices of one process, and several processes over sockets of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lumina.config import save
from lumina.errors import ConfigError, UsageError
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.steps import Steps
from lumina_jax.device import describe
from lumina_jax.hosts import JOINED_BY, join
from lumina_jax.mesh import ROWS, make_mesh, one_device, own_copy, place_rows, shaped_whole, whole
from tests.lumina_jax.tiny import tiny

ROOT = Path(__file__).parents[2]


def config(data, **train):
    made = tiny("dense", **train)
    made.mesh.data = data
    return made


# ------------------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(("data", "rows", "micro", "size"), [(1, 4, 1, 1), (4, 8, 1, 4), (4, 8, 2, 4), (-1, 16, 2, 8)])
def test_the_mesh_has_the_devices_that_were_asked_for(data, rows, micro, size):
    mesh = make_mesh(config(data, batch_size=rows, micro_batches=micro))
    assert list(mesh.devices.flat) == jax.devices()[:size]


@pytest.mark.parametrize(
    ("data", "rows", "micro", "works"),
    [
        (9, 9, 1, r"mesh.data = 9: there are 8 devices; it must be at most 8"),
        (4, 6, 1, r"6 rows cannot be split over 4 devices; use a multiple of 4 rows, or mesh.data=3$"),
        (4, 8, 4, r"= 2 rows cannot be split over 4 devices; use a multiple of 4 rows, or mesh.data=2$"),
        (-1, 12, 1, r"mesh.data = -1: .* 12 rows cannot be split over 8 devices; .* or mesh.data=6$"),
        (3, 7, 1, r"or mesh.data=1$"),
    ],
)
def test_rows_that_cannot_be_split_are_refused_with_what_would_work(data, rows, micro, works):
    with pytest.raises(ConfigError, match=works):
        make_mesh(config(data, batch_size=rows, micro_batches=micro))


def test_rows_are_spread_in_order_and_whole_arrays_are_on_every_device():
    mesh = make_mesh(config(4, batch_size=8))
    batch = {"a": np.arange(24).reshape(8, 3).astype(np.int32), "b": np.arange(8).astype(np.float32)}
    placed = place_rows(mesh, batch)
    for name, array in batch.items():
        assert np.array_equal(placed[name], array)
        for i, shard in enumerate(placed[name].addressable_shards):
            assert np.array_equal(shard.data, array[2 * i : 2 * i + 2])
    shapes = shaped_whole(mesh, jax.eval_shape(lambda: batch))
    assert {name: (s.shape, s.dtype, s.sharding) for name, s in shapes.items()} == {
        name: (array.shape, array.dtype, whole(mesh)) for name, array in batch.items()
    }


def test_an_own_copy_is_the_whole_array_on_one_device():
    mesh = make_mesh(config(8, batch_size=8))
    array = jax.device_put(np.arange(8.0, dtype=np.float32), NamedSharding(mesh, ROWS))
    own = own_copy(mesh, {"a": array})["a"]
    assert np.array_equal(own, array)
    assert own.devices() == {jax.devices()[0]}


def test_a_device_tells_how_many_work_and_how_many_stay_idle():
    assert (
        describe(make_mesh(config(8, batch_size=8)))
        == f"8 x cpu (cpu), each with its part of every batch, jax {jax.__version__}"
    )
    assert describe(one_device()) == f"1 x cpu (cpu), jax {jax.__version__}; 7 more stay idle"


@pytest.mark.parametrize(
    ("given", "works"),
    [
        ({0: "localhost:1"}, "JAX_COORDINATOR_ADDRESS is set, .* set JAX_NUM_PROCESSES, JAX_PROCESS_ID as well"),
        ({1: "2", 2: "0"}, "JAX_NUM_PROCESSES is set, .* set JAX_COORDINATOR_ADDRESS as well"),
        ({0: "localhost:1", 1: "two", 2: "0"}, "JAX_NUM_PROCESSES=two JAX_PROCESS_ID=0: "),
        ({0: "localhost:1", 1: "2", 2: "x"}, "JAX_PROCESS_ID=x: "),
    ],
    ids=["address_alone", "no_address", "count_is_no_number", "id_is_no_number"],
)
def test_half_a_set_of_processes_is_refused_with_what_is_missing(monkeypatch, given, works):
    for i, name in enumerate(JOINED_BY):
        monkeypatch.setenv(name, given.get(i, ""))
    with pytest.raises(UsageError, match=works):
        join()


def test_without_other_processes_there_is_nothing_to_join(monkeypatch):
    for name in JOINED_BY:
        monkeypatch.delenv(name, raising=False)
    join()
    assert not jax.distributed.is_initialized()


# ------------------------------------------------------------------------------------------------- several processes


def settings(steps):
    made = tiny("dense", model={"num_layers": 1}, steps=steps, batch_size=4, eval_every=0, eval_rows=8)
    made.mesh.data, made.data.source = -1, "synthetic"
    made.checkpoint.every, made.monitor.log_every, made.monitor.sample_tokens, made.monitor.tensorboard = 2, 1, 2, False
    return made


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(directory, count):
    """The trainer as `count` processes of one device each, in one run directory."""
    command = [sys.executable, "-m", "lumina_jax.train", "--config", directory / "config.json", "--workdir", directory / "run"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            command,
            env=environment | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes):
    """(exit codes, what each wrote)."""
    try:
        output = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], output


def losses(directory):
    return [r["loss"] for r in read_json_lines(RunDirectory(directory / "run").metrics) if r["kind"] == "train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(directory, exit codes, output) of the same training by one process and by two."""
    found = {}
    for count in (1, 2):
        directory = tmp_path_factory.mktemp(f"by{count}")
        save(settings(6), directory / "config.json")
        found[count] = (directory, *finish(start(directory, count)))
    return found


def test_two_processes_train_to_the_losses_of_one(trained):
    for count in (1, 2):
        assert trained[count][1] == [0] * count, trained[count][2]
    one, two = (losses(trained[count][0]) for count in (1, 2))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)
    held_out = [json.loads((trained[count][0] / "run" / "result.json").read_text())["held_out"] for count in (1, 2)]
    assert held_out[0]["tokens"] == held_out[1]["tokens"]
    assert held_out[1]["loss"] == pytest.approx(held_out[0]["loss"], rel=1e-5)


def test_two_processes_read_the_rows_of_one(trained):
    one, two = (
        [record["rows"] for record in read_json_lines(RunDirectory(trained[count][0] / "run").ledger) if "rows" in record]
        for count in (1, 2)
    )
    assert one == two


def test_of_two_processes_one_speaks(trained):
    first, second = trained[2][2]
    assert "2 x cpu (cpu) in 2 processes, each with its part of every batch" in first
    assert "held out" in first
    assert not [line for line in second.splitlines() if line.startswith(("step", "held out", "---", "next:"))]


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    save(settings(100_000), tmp_path / "config.json")
    processes = start(tmp_path, 2)
    run, until = RunDirectory(tmp_path / "run"), time.monotonic() + 100
    while not Steps(run.checkpoints).all() and time.monotonic() < until:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)  # the one that does not write
    codes, output = finish(processes)
    assert codes == [75, 75], output
    (stopped,) = [record for record in read_json_lines(run.events) if record["event"] == "stopped"]
    assert "a signal to another process" in stopped["says"]
    assert Steps(run.checkpoints).all()[-1] == stopped["step"]
    assert Steps(run.checkpoints).verify(stopped["step"]) == []
