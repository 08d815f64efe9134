"""metrics.jsonl and TensorBoard events."""

import errno
import itertools
import struct
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from lumina.config import MonitorConfig
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import Journal, read_json_lines
from lumina.runs.metrics import MetricsLog, TensorBoard


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


@pytest.fixture
def warnings():
    return []


def open_log(run, warnings, start=0, tensorboard=True):
    return MetricsLog(run, MonitorConfig(tensorboard=tensorboard), start, warnings.append)


def events(run):
    """Of all files, in order, as TensorBoard reads them: length, checksum, event, checksum."""
    found = []
    for file in sorted(run.tensorboard.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(run):
    return [(each.step, value.tag, value.simple_value) for each in events(run) for value in each.summary.value]


def starts(run):
    return [each.step for each in events(run) if each.session_log.status == SessionLog.START]


def test_each_record_is_a_line_with_its_kind(run, warnings):
    log = open_log(run, warnings, tensorboard=False)
    log.write("train", {"step": 1, "loss": 2.5})
    log.write("eval", {"step": 1, "loss": 3.5, "mod_capacity": [0.5, 0.25]})
    log.close()
    assert read_json_lines(run.metrics) == [
        {"kind": "train", "step": 1, "loss": 2.5},
        {"kind": "eval", "step": 1, "loss": 3.5, "mod_capacity": [0.5, 0.25]},
    ]
    assert warnings == []


@pytest.mark.parametrize("while_running", [True, False], ids=["trim", "start"])
def test_going_on_from_a_step_drops_what_came_after_it(run, warnings, monkeypatch, while_running):
    clock = SimpleNamespace(time=itertools.count(1.7e9).__next__)  # files are named after the second they are opened in
    monkeypatch.setattr("tensorboardX.event_file_writer.time", clock)
    log = open_log(run, warnings)
    for step in (1, 2, 3, 4):
        log.write("train", {"step": step, "loss": 1.0})
    if while_running:
        log.trim(2)
    else:
        log.close()
        log = open_log(run, warnings, start=2)
    log.write("train", {"step": 3, "loss": 2.0})
    log.close()
    assert [(record["step"], record["loss"]) for record in read_json_lines(run.metrics)] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert starts(run) == [1, 3]  # TensorBoard drops what it has of the step that begins, and of later ones


def test_the_ledger_is_not_its_business(run, warnings):
    ledger = Journal(run.ledger, warnings.append)
    for step in (1, 2, 3):
        ledger.append({"step": step})
    open_log(run, warnings, start=1).close()
    assert [record["step"] for record in read_json_lines(run.ledger)] == [1, 2, 3]


def test_tensorboard_gets_the_numbers_of_each_layer_under_their_names(run, warnings):
    log = open_log(run, warnings)
    log.write("train", {"step": 1, "loss": 2.5, "moe_dropped": [0.25, 0.5], "moe_load": [[0.5, 0.5], [1.0, 0.0]]})
    log.close()
    assert scalars(run) == [(1, "train/loss", 2.5), (1, "train/moe_dropped/0", 0.25), (1, "train/moe_dropped/1", 0.5)]


def test_tensorboard_has_a_record_as_soon_as_it_is_written(run, warnings):
    log = open_log(run, warnings)
    log.write("eval", {"step": 3, "loss": 2.5})
    assert scalars(run) == [(3, "eval/loss", 2.5)]
    log.close()


def test_without_tensorboard_nothing_is_made_for_it(run, warnings):
    log = open_log(run, warnings, tensorboard=False)
    log.write("train", {"step": 1, "loss": 2.5})
    log.trim(0)
    log.close()
    assert not run.tensorboard.exists()


@pytest.mark.parametrize("fails", ["__init__", "write", "start_after", "close"])
def test_a_disk_that_takes_no_events_costs_those_and_is_told_of_once(run, warnings, monkeypatch, fails):
    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TensorBoard, fails, refuse)
    log = open_log(run, warnings)
    for step in (1, 2):
        log.write("train", {"step": step, "loss": 1.0})
    log.trim(1)
    log.write("train", {"step": 2, "loss": 2.0})
    log.close()
    assert [record["loss"] for record in read_json_lines(run.metrics)] == [1.0, 2.0]
    (warning,) = warnings
    assert warning.startswith(f"{run.tensorboard}: cannot be written (No space left on device); metrics.jsonl has it all")
