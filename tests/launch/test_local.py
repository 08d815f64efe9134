"""launch/local.sh for real: two processes of the trainer on this machine, under the supervisor."""

import os
import signal
import subprocess
import sys

import pytest

from lumina.config import save
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import read_json_lines
from lumina.runs.steps import Steps
from tests.compiling import QUICKLY
from tests.launch.scripts import ROOT
from tests.lumina_jax.tiny import tiny
from tests.waiting import GIVES_UP, until


@pytest.fixture
def supervised(tmp_path):
    """(`lumina run`, one restart allowed, of launch/local.sh; its run; the file of what they say)."""
    config = tiny("dense", model={"num_layers": 1}, steps=100_000, batch_size=4, eval_every=0, eval_rows=8)
    config.data.source, config.checkpoint.every, config.monitor.log_every = "synthetic", 2, 1
    config.monitor.sample_tokens, config.monitor.tensorboard = 2, False
    save(config, tmp_path / "config.json")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "CONFIG": str(tmp_path / "config.json"),
        "WORKDIR": str(tmp_path / "run"),
        "XLA_FLAGS": QUICKLY,
    }
    command = [sys.executable, "-m", "lumina.cli", "run", "--max-restarts", "1", "--", "launch/local.sh"]
    with (tmp_path / "said.txt").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
    yield process, RunDirectory(tmp_path / "run"), tmp_path / "said.txt"
    process.terminate()
    process.wait(timeout=GIVES_UP)


def children(pid):
    """The processes that this one has started, in their order."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], check=True, capture_output=True, text=True)  # noqa: S607
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if int(line.split()[1]) == pid]


def events(run, name):
    return [record for record in read_json_lines(run.events) if record["event"] == name]


def test_one_killed_ends_the_other_both_start_again_and_sigterm_to_the_script_saves(supervised):
    process, run, said = supervised

    def ended():
        assert process.poll() is None, said.read_text()
        return said.read_text()

    steps = Steps(run.checkpoints)
    until(steps.all, ended)
    (script,) = children(process.pid)
    first, second = children(script)
    os.kill(second, signal.SIGKILL)

    until(lambda: len(events(run, "started")) == 2, ended)
    reached = steps.all()[-1]
    until(lambda: steps.all()[-1] > reached, ended)
    (script,) = children(process.pid)
    os.kill(script, signal.SIGTERM)
    assert process.wait(timeout=GIVES_UP) == 75, said.read_text()

    assert not {script, first, second} & set(children(1))  # gone, not orphaned
    (_, restart), (stopped,) = events(run, "started"), events(run, "stopped")
    assert restart["restarted_because"].startswith("crashed with exit code 137")
    assert "cpu (cpu) in 2 processes" in said.read_text()
    assert "process 1: killed by SIGKILL" in said.read_text()
    assert steps.all()[-1] == stopped["step"]
    assert steps.verify(stopped["step"]) == []
    ledger = [record["step"] for record in read_json_lines(run.ledger) if "rows" in record]
    assert ledger == list(range(1, stopped["step"] + 1))
