"""metrics.jsonl and TensorBoard events."""

import pytest

from lumina.config import MonitorConfig
from lumina.runs.directory import RunDirectory, append_json, read_json_lines
from lumina.runs.metrics import MetricsLog


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path)


def test_each_record_is_a_line_with_its_kind(run):
    log = MetricsLog(run, MonitorConfig(tensorboard=False), 0)
    log.write("train", {"step": 1, "loss": 2.5})
    log.write("eval", {"step": 1, "loss": 3.5, "mod_capacity": [0.5, 0.25]})
    log.close()
    assert read_json_lines(run.metrics) == [
        {"kind": "train", "step": 1, "loss": 2.5},
        {"kind": "eval", "step": 1, "loss": 3.5, "mod_capacity": [0.5, 0.25]},
    ]


def test_going_on_drops_what_metrics_and_ledger_hold_of_later_steps(run):
    for step in (1, 2, 3, 4):
        append_json(run.metrics, {"kind": "train", "step": step})
        append_json(run.ledger, {"step": step})
    MetricsLog(run, MonitorConfig(tensorboard=False), 2).close()
    assert [record["step"] for record in read_json_lines(run.metrics)] == [1, 2]
    assert [record["step"] for record in read_json_lines(run.ledger)] == [1, 2]


def test_tensorboard_gets_the_numbers_of_each_layer_under_their_names(run):
    log = MetricsLog(run, MonitorConfig(tensorboard=True), 0)
    log.write("train", {"step": 1, "loss": 2.5, "moe_dropped": [0.1, 0.2], "moe_load": [[0.5, 0.5], [1.0, 0.0]]})
    log.close()
    (events,) = run.tensorboard.iterdir()
    content = events.read_bytes()
    for name in (b"train/loss", b"train/moe_dropped/0", b"train/moe_dropped/1"):
        assert name in content
    assert b"train/step" not in content


def test_without_tensorboard_nothing_is_made_for_it(run):
    log = MetricsLog(run, MonitorConfig(tensorboard=False), 0)
    log.write("train", {"step": 1, "loss": 2.5})
    log.close()
    assert not run.tensorboard.exists()
