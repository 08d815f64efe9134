"""Several processes, one chapter after the other: python -m tests.lumina_jax.together DIRECTORY CHAPTERS

A chapter is [processes, devices of each, scenario, argument, ...], the list of them JSON. Scenarios `four` and `two` save and
restore arrays, and print a JSON object of what they saw; `train` trains in DIRECTORY/run. What process N of chapter C writes is
in DIRECTORY/out-C-N and errors-C-N; printed are the exit codes, a list a chapter. Processes are forked: that costs no imports.
"""

import ctypes
import errno
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lumina_jax.device
import lumina_jax.train
from lumina.config import CheckpointConfig
from lumina.errors import exit_with
from lumina.runs import checkpoints
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.local import reserved_port
from lumina.runs.processes import OWN
from lumina.runs.steps import Steps
from lumina_jax import hosts
from lumina_jax.checkpoint import Checkpoints, by_name
from lumina_jax.hosts import join
from lumina_jax.step import state_shapes
from tests.compiling import QUICKLY
from tests.lumina_jax.tiny import tiny

CONFIG = tiny()
PR_SET_PDEATHSIG = 1


def values(step):
    """The state of a step: on the host, the same in every process, and of other values at another step."""
    rng = np.random.default_rng(step)

    def random(leaf):
        drawn = rng.standard_normal(leaf.shape) if leaf.dtype.kind == "f" else rng.integers(1, 99, leaf.shape)
        return np.asarray(drawn, leaf.dtype)

    return jax.tree.map(random, state_shapes(CONFIG)[0])


def like(sizes, order=None):
    """The state's shapes over (data, fsdp) devices, fsdp along the last dimension that divides; `order` is of the devices."""
    devices = np.array(jax.devices())[list(order or range(len(jax.devices())))].reshape(sizes)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))

    def spread(leaf):
        axes = [axis for axis, length in enumerate(leaf.shape) if length % sizes[1] == 0 and leaf.ndim > 1]
        spec = PartitionSpec(*("fsdp" if axes and axis == axes[-1] else None for axis in range(leaf.ndim)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(spread, state_shapes(CONFIG)[0])


def placed(state, shapes):
    def place(array, leaf):
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return jax.tree.map(place, state, shapes)


def same_bits(found, step):
    """Whether this process's parts are those of the state of `step`."""
    expected = by_name(values(step))
    return all(
        np.asarray(shard.data).tobytes() == np.ascontiguousarray(expected[name][shard.index]).tobytes()
        for name, array in by_name(found).items()
        for shard in array.addressable_shards
    )


class Opened:
    """Checkpoints of a run in all processes, of which the first writes the events."""

    def __init__(self, path, shapes, **config):
        self.run, self.like = RunDirectory(path), shapes
        events = Events(self.run if jax.process_index() == 0 else None, lambda says: None)
        self.it = Checkpoints(self.run, CheckpointConfig(**{"keep": 9, **config}), events, shapes)

    def save(self, step):
        """Why it failed, if it did."""
        record = {"progress": {"best_step": None, "losses": []}, "ledger": {"bytes": 7}}
        self.it.save(step, placed(values(step), self.like), lambda parameters: record)
        self.it.wait()
        return self.it.failure


def four(directory):
    """Save over four processes of a device each."""
    return {"failures": [Opened(directory / "run", like((1, 4))).save(1)]}


def two(directory):
    """Restore in two processes of two devices what four saved; save in other layouts, with disks that fail."""
    number = jax.process_index()
    opened = Opened(directory / "run", like((2, 2)))  # each process has a copy of the whole
    found, manifest = opened.it.restore()
    seen = {"restored": [manifest["step"], same_bits(found, 1)], "alone": [], "failures": []}
    found, manifest = Opened(directory / "alone", like((1, 4))).it.restore()
    seen["alone"] = [manifest["step"], same_bits(found, 1)]
    seen["failures"].append(opened.save(2))
    across = Opened(directory / "run", like((2, 2), (0, 2, 1, 3)))  # fsdp over the processes
    write, begin = across.it._write_arrays, Steps.begin

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    across.it._write_arrays = refuse if number == 1 else write
    seen["failures"].append(across.save(3))
    across.it._write_arrays, Steps.begin = write, refuse
    seen["failures"].append(across.save(4))
    Steps.begin = begin
    seen["failures"].append(across.save(5))
    found, manifest = across.it.restore()
    seen["again"] = [manifest["step"], same_bits(found, 5)]
    checkpoints.VISIBLE_SECONDS, path = 0.5, across.it.steps.path
    if number == 1:  # which sees another disk
        across.it.steps.path = directory / "elsewhere"
        across.it.steps.path.mkdir()
    seen["failures"].append(across.save(6))
    across.it.steps.path = path
    across.it._write_arrays = (lambda *arguments: None) if number == 1 else write
    seen["failures"].append(across.save(7))
    keys = hosts._client().key_value_dir_get("lumina/save") if number == 0 else []
    seen["kept"] = sorted({key.split("/")[2] for key, _ in keys})
    of_another = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer [127.0.0.1]:1")
    hosts.say_who_is_gone(of_another if number == 0 else RuntimeError("planted"))
    return seen


def train(directory, step=0, number=0, process=0):
    """The trainer; before `step` a process sends itself a signal, once the checkpoint before it is there."""
    from lumina.runs import loop, processes

    lumina_jax.device.matmul_peak = lambda dtype: 1e12  # a second, for a figure on the screen
    prefetch, steps = loop.prefetch, Steps(RunDirectory(directory / "run").checkpoints)

    def signalled(*arguments):
        for at, batch in prefetch(*arguments):
            if at + 1 == step:
                while step - 1 not in steps.all():
                    time.sleep(0.01)
                if processes.part(os.environ).number == process:
                    os.kill(os.getpid(), number)
            yield at, batch

    loop.prefetch = signalled
    sys.argv = ["lumina_jax.train", "--config", str(directory / "config.json"), "--workdir", str(directory / "run")]
    lumina_jax.train.main()


def run(directory, scenario, *arguments):
    if scenario == "train":
        train(directory, *arguments)
    hosts.SILENT_BEATS = 500  # a machine that stands still for ten seconds is to end none of what follows
    join()
    print(json.dumps({"four": four, "two": two}[scenario](directory)))


def fork(directory, chapter, count, number, devices, address, scenario):
    """The process; its id. Ends with the one that forks it."""
    if pid := os.fork():
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    for name, fd in (("out", 1), ("errors", 2)):
        os.dup2(os.open(directory / f"{name}-{chapter}-{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    os.environ["XLA_FLAGS"] = f"{QUICKLY} --xla_force_host_platform_device_count={devices}"
    if count > 1:
        os.environ.update(zip(OWN, (address, str(count), str(number)), strict=True))
    exit_with(lambda: run(directory, *scenario))
    sys.exit(0)


def main():
    directory, codes = Path(sys.argv[1]), []
    for chapter, (count, devices, *scenario) in enumerate(json.loads(sys.argv[2])):
        with reserved_port() as port:
            address = f"127.0.0.1:{port}"
            pids = [fork(directory, chapter, count, number, devices, address, scenario) for number in range(count)]
            codes.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
