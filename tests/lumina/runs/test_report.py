"""What a trainer tells of a run: compressors beside it, and whether there is anything left to do."""

import gzip
import hashlib
import io
import json
import lzma
import math
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from lumina.architecture import at_length, counts
from lumina.config import Config, TrainConfig
from lumina.data.mixture import TABLE_BIT, Course, Leg, Table, Turns
from lumina.data.rows import Batches, Rows
from lumina.runs import report
from lumina.runs.console import Console
from lumina.runs.directory import RunDirectory
from lumina.runs.journal import Journal, read_json_lines
from lumina.runs.ledger import read_ledger
from lumina.runs.metrics import MetricsLog
from lumina.runs.progress import Progress
from lumina.runs.text import Text
from lumina.stages import sources, stages

TEXT = "".join(f"line {i * i}\n" for i in range(2000)).encode()


def test_compressors_give_bits_a_byte_of_the_text():
    found = report.compressors(TEXT)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    size = len(deflate.compress(TEXT) + deflate.flush()) + 18  # gzip's header and trailer
    assert found["gzip -9"] == pytest.approx(8 * size / len(TEXT))
    assert found["xz -9"] == pytest.approx(8 * len(lzma.compress(TEXT, preset=9)) / len(TEXT))


def test_compressors_work_as_hard_as_they_can():
    assert report.compressors(TEXT)["gzip -9"] < 8 * len(gzip.compress(TEXT, 1)) / len(TEXT)


@pytest.mark.parametrize(
    ("result", "step", "steps", "early_stopping", "is_finished"),
    [
        ({"step": 8, "stopped_early": False}, 8, 8, 0, True),
        ({"step": 8, "stopped_early": False}, 8, 5, 0, True),
        ({"step": 8, "stopped_early": False}, 8, 10, 0, False),  # more steps were asked for
        ({"step": 8, "stopped_early": False}, 10, 10, 0, False),  # went on, and ended before its result was written
        ({"step": 8, "stopped_early": True}, 8, 20, 3, True),
        ({"step": 8, "stopped_early": True}, 8, 20, 5, False),  # with more patience
        ({"step": 8, "stopped_early": True}, 8, 20, 0, False),  # early stopping was switched off
        (None, 8, 8, 0, False),
    ],
)
def test_a_run_is_finished_when_its_result_is_of_its_last_step(tmp_path, result, step, steps, early_stopping, is_finished):
    run = RunDirectory(tmp_path)
    if result:
        run.result.write_text(json.dumps(result))
    progress = Progress(evaluations_without_improvement=3)
    found = report.finished(run, TrainConfig(steps=steps, early_stopping=early_stopping), step, progress)
    assert found == (result if is_finished else None)


# --------------------------------------------------------------------------------------------------- at the beginning

CORPUS = SimpleNamespace(
    train=SimpleNamespace(num_tokens=64_000),
    held_out=SimpleNamespace(num_tokens=1000),
    tokenizer=SimpleNamespace(name="bpe-300"),
    manifest={"rejects": {"counts": {"empty": 2, "not_json": 1}}},
)


class Chunks:
    """Rows of which there are so many."""

    def __init__(self, tokens, T):
        self.count, self.sequence_length = tokens // T, T

    def __len__(self):
        return self.count


def text_of(config):
    planned, names = stages(config), sources(config)
    uses = list(dict.fromkeys((source, stage.sequence_length) for stage in planned for source, _ in stage.mixture))
    tables = [Table(names.index(source), Chunks(64_000, T)) for source, T in uses]
    legs = [
        Leg(steps, tuple(uses.index((source, T)) for source, _ in mixture), Turns([weight for _, weight in mixture]))
        for steps, T, mixture in planned
    ]
    course = Course(tables, legs, config.train.batch_size, seed=0)
    return Text(dict.fromkeys(names, CORPUS), planned, course, {})


def opening(config, start=0):
    run, chosen = RunDirectory("runs/x"), "attention: by hand"
    text = report.opening(config, run, text_of(config), start, "2 x cpu (fast)", 1.5e12, chosen)
    return dict(line.strip().split("  ", 1) for line in text.splitlines())


def test_the_opening_tells_what_is_about_to_happen():
    config = Config()
    config.train.steps, config.train.batch_size, config.data.sequence_length = 500, 16, 64
    rows = opening(config)
    assert rows["run"] == "runs/x, new"
    assert rows["device"] == "2 x cpu (fast); matmul peak 1.50 TFLOP/s in float32"
    assert rows["batch"] == "16 rows x 64 = 1,024 tokens"
    assert rows["steps"] == "500: 512 K tokens, 8.00 epochs"
    assert rows["data"] == "stdlib: 64.0 K tokens to train on, 1.00 K held out; bpe-300, 3 records rejected"


def test_the_opening_of_a_run_that_goes_on_says_from_where():
    assert opening(Config(), start=120)["run"] == "runs/x, from step 120"


def test_the_opening_tells_of_stages_sources_and_lengths():
    config = Config()
    config.train.steps, config.train.batch_size, config.data.sequence_length = 500, 16, 64
    config.data.stages = "300 x 32: stdlib; stdlib@3, docstrings@1"
    rows = dict(report._reading(config, text_of(config)))
    assert rows["batch"] == "16 rows x 32 = 512 tokens, 16 rows x 64 = 1,024 tokens"
    assert rows["steps"] == "500: 358 K tokens, 4.80 epochs of stdlib, 0.80 epochs of docstrings"
    assert rows["stages"] == (
        "300 steps of rows of 32 tokens from stdlib\n200 steps of rows of 64 tokens from stdlib@3, docstrings@1"
    )
    assert rows["data"].count("64.0 K tokens to train on") == 2


def test_a_source_that_a_later_stage_begins_anew_is_told_with_its_tokens():
    config = Config()
    config.train.steps, config.train.batch_size, config.data.sequence_length = 500, 4, 64
    config.data.stages = "250 x 32: stdlib; 100: docstrings; 50: stdlib; 100 x 32: stdlib"
    # Half of 2,000 short rows, then 200 long ones: half of their 12,800 tokens; then 20 % of the other's.
    assert report.read_again(text_of(config)) == [
        "stage 3 of 4 begins stdlib anew, in rows of 64: about 6.40 K tokens of what stages before it read in rows of another "
        "length are read again",
        "stage 4 of 4 begins stdlib anew, in rows of 32: about 2.56 K tokens of what stages before it read in rows of another "
        "length are read again",
    ]
    config.data.stages = "250: stdlib; 100: docstrings; 150: stdlib"
    assert report.read_again(text_of(config)) == []


# --------------------------------------------------------------------------------------------------------- each step

T = 4


class Stream:
    name, num_tokens = "train", 50 * T + 1

    def read(self, start, stop):
        return np.arange(start, stop, dtype=np.int32)


def metrics(**changed):
    ones = {name: np.float32(1.5) for name in ("loss", "accuracy", "learning_rate", "gradient_norm")}
    return {
        **ones,
        "text_bytes": np.int32(16),
        "text_tokens": np.int32(8),
        "skipped": np.int32(0),
        "stop": np.int32(0),
        **changed,
    }


@pytest.fixture
def reporter(tmp_path):
    """A reporter of batches of two rows, whose metrics need no fetching, and its run."""
    config, run = Config(), RunDirectory(tmp_path)
    config.data.sequence_length, config.train.batch_size, config.train.steps = T, 2, 9
    config.monitor.log_every, config.monitor.tensorboard = 2, False
    batches, console = Batches(Rows(Stream(), T, -1), 2, seed=0), Console(9, io.StringIO())
    log, ledger = MetricsLog(run, config.monitor, 0, console.say), Journal(run.ledger, console.say)
    made = report.Reporter(config, console, log, ledger, batches, 1e12, lambda metrics: metrics)
    made.run = run
    return made


def test_a_step_is_reported_when_the_next_is_under_way(reporter):
    assert reporter.dispatched(1, metrics(), True) is None
    assert reporter.dispatched(2, metrics(), True)["step"] == 1
    assert reporter.flush()["step"] == 2
    assert reporter.flush() is None


def test_a_step_that_does_not_count_is_not_reported(reporter):
    reporter.dispatched(1, metrics(), True)
    reporter.forget()
    assert reporter.flush() is None
    assert read_json_lines(reporter.run.ledger) == []


def test_the_ledger_has_the_bits_of_the_loss_and_the_digest_of_the_rows(reporter):
    loss = np.float32(1 / 3)
    reporter.dispatched(3, metrics(loss=loss), True)
    reporter.flush()
    numbers = reporter.batches.row_numbers(2)
    rows = hashlib.sha256(b"".join(int(n).to_bytes(8, "little") for n in numbers)).hexdigest()[:16]
    assert read_json_lines(reporter.run.ledger) == [{"step": 3, "loss": struct.pack(">f", loss).hex(), "rows": rows}]


@pytest.mark.parametrize(
    ("update", "skipped", "says", "decides"),
    [(True, 0, None, 0), (True, 2, "skipped", 2), (False, 0, "passed over", 0), (False, 2, "passed over", 0)],
)
def test_the_ledger_says_where_a_step_made_no_update(reporter, update, skipped, says, decides):
    reporter.dispatched(3, metrics(skipped=np.int32(skipped)), update)
    assert reporter.flush()["skipped"] == decides
    (record,) = read_json_lines(reporter.run.ledger)
    assert record.get("update") == says


def test_an_update_that_a_loss_scale_overflowed_leaves_its_trace(reporter):
    reporter.dispatched(4, metrics(gradient_norm=np.float32(np.inf), loss_scale=np.float32(512)), True)
    assert reporter.flush()["skipped"] == 0
    assert read_json_lines(reporter.run.ledger)[0]["update"] == "overflowed"
    assert read_json_lines(reporter.run.metrics)[0]["loss_scale"] == 512


def test_the_loop_decides_by_what_the_step_found(reporter):
    reporter.dispatched(3, metrics(loss=np.float32(2.5), gradient_norm=np.float32(np.inf), stop=np.int32(2)), True)
    numbers = reporter.batches.row_numbers(2).tolist()
    expected = {"step": 3, "loss": 2.5, "gradient_norm": math.inf, "skipped": 0, "row_numbers": numbers}
    expected |= {"warnings": [], "stop": True, "began": ""}
    assert reporter.flush() == expected


def test_every_step_is_in_the_ledger_and_every_logged_one_and_the_last_in_the_metrics(reporter):
    for step in range(1, 10):
        reporter.dispatched(step, metrics(), True)
    reporter.flush()
    assert [record["step"] for record in read_json_lines(reporter.run.ledger)] == list(range(1, 10))
    assert [record["step"] for record in read_json_lines(reporter.run.metrics)] == [2, 4, 6, 8, 9]


def test_a_loss_that_is_no_number_is_null_in_the_metrics_and_its_bits_in_the_ledger(reporter):
    reporter.dispatched(2, metrics(loss=np.float32(np.nan)), True)
    reporter.flush()
    assert read_json_lines(reporter.run.metrics)[0]["loss"] is None
    (bits,) = struct.unpack(">f", bytes.fromhex(read_json_lines(reporter.run.ledger)[0]["loss"]))
    assert math.isnan(bits)


def test_figures_of_a_step_follow_from_its_loss_its_bytes_and_its_time(reporter, monkeypatch):
    monkeypatch.setattr(reporter.rate, "step", lambda tokens: 100.0 * tokens)
    reporter.dispatched(2, metrics(), True)
    reporter.flush()
    (record,) = read_json_lines(reporter.run.metrics)
    assert record["bits_per_byte"] == pytest.approx(1.5 * 8 / 16 / math.log(2))
    assert record["tokens_per_second"] == 800
    assert record["peak_fraction"] == pytest.approx(800 * counts(reporter.config).training_flops / 1e12)


def test_a_batch_of_no_text_has_figures_all_the_same(reporter):
    reporter.dispatched(2, metrics(text_bytes=np.int32(0)), True)
    assert reporter.flush()["loss"] == 1.5


def test_routing_is_told_by_layer_and_loads_as_shares(reporter):
    moe = {"load_A": np.array([[1, 3], [2, 2]]), "dropped": np.float32([0.25, 0.5])}
    reporter.dispatched(2, metrics(moe=moe, mod={"agreement": np.float32([0.75])}), True)
    reporter.flush()
    (record,) = read_json_lines(reporter.run.metrics)
    assert (record["moe_load"], record["moe_dropped"], record["mod_agreement"]) == (
        [[0.25, 0.75], [0.5, 0.5]],
        [0.25, 0.5],
        [0.75],
    )


def test_a_layer_without_any_choices_has_no_load(reporter):
    assert report._routing({"moe": {"load_A": np.array([[0, 0], [1, 0]])}}) == {"moe_load": [[0.0, 0.0], [1.0, 0.0]]}


def starving(step):
    return metrics(moe={"load_A": np.array([[4, 0]])})


@pytest.fixture
def with_experts(reporter):
    """Makes a reporter of the run, as a process that goes on from `start` does."""
    reporter.config.model.num_layers, reporter.config.model.moe.pattern = 1, "all"
    reporter.config.model.moe.num_experts, reporter.config.monitor.log_every = 2, 1

    def make(start=0):
        log = MetricsLog(reporter.run, reporter.config.monitor, start, reporter.console.say)
        return report.Reporter(reporter.config, reporter.console, log, None, reporter.batches, 1e12, lambda metrics: metrics)

    return make


def test_an_expert_without_tokens_is_warned_of_once(with_experts):
    reporter = with_experts()
    reporter.dispatched(1, starving(1), True)
    found = [reporter.dispatched(step, starving(step), True) for step in range(2, 10)]
    assert [each["step"] for each in found if each["warnings"]] == [5]
    assert "expert 1 of layer 0 has had no token for 5 log steps" in found[4]["warnings"][0]


@pytest.mark.parametrize("start", range(1, 9))
def test_a_run_that_goes_on_warns_neither_twice_nor_too_late(with_experts, start):
    told = []
    for first, last in ((1, start), (start + 1, 9)):
        reporter = with_experts(first - 1)
        for step in range(first, last + 1):
            reporter.dispatched(step, starving(step), True)
            told += [step] * len(reporter.flush()["warnings"])
    assert told == [5]


def test_going_on_from_an_earlier_step_forgets_the_log_steps_after_it(with_experts):
    reporter = with_experts()
    for step in range(1, 5):
        reporter.dispatched(step, starving(step), True)
        reporter.flush()
    reporter = with_experts(2)
    found = []
    for step in range(3, 7):
        reporter.dispatched(step, starving(step), True)
        found.append(len(reporter.flush()["warnings"]))
    assert found == [0, 0, 1, 0]


def test_steps_that_are_not_logged_are_not_counted(with_experts):
    reporter = with_experts()
    reporter.config.monitor.log_every = 2
    reporter.config.train.steps = 99
    found = []
    for step in range(1, 14):
        reporter.dispatched(step, starving(step), True)
        found.append(reporter.flush()["warnings"])
    assert [step for step, says in enumerate(found, 1) if says] == [10]


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.fixture
def staged(reporter):
    """A reporter of a run of two stages: 3 steps of one source, then 6 of two in rows twice as long."""
    reporter.config.data.sequence_length = 2 * T
    reporter.config.data.stages = f"3 x {T}: a; a@1, b@3"
    tables = [Table(0, Rows(Stream(), T, -1)), *(Table(n, Rows(Stream(), 2 * T, -1)) for n in (0, 1))]
    course = Course(tables, [Leg(3, (0,), Turns([1])), Leg(6, (1, 2), Turns([1, 3]))], 2, seed=0)
    log, run = reporter.log, reporter.run
    made = report.Reporter(reporter.config, reporter.console, log, reporter.ledger, course, 1e12, lambda metrics: metrics)
    made.run = run
    return made


def test_a_stage_that_begins_is_a_line_of_the_ledger_before_its_first_step(staged):
    began = []
    for step in range(1, 10):
        staged.dispatched(step, metrics(), True)
        began.append(staged.flush()["began"])
    records = read_json_lines(staged.run.ledger)
    assert [(r["step"], r.get("stage")) for r in records if r["step"] in (3, 4)] == [(3, None), (4, 2), (4, None)]
    assert sum("stage" in record for record in records) == 1
    about = {"sequence_length": 8, "mixture": "a@1, b@3", "read_again": {"a": 3}}  # 6 rows of 50, and 3 of 25
    assert records[3] == {"step": 4, "stage": 2, **about}
    assert began[3] == "step 4: stage 2 of 2 begins: 6 steps of rows of 8 tokens from a@1, b@3"
    assert not any(began[:3] + began[4:])
    state, found = read_ledger(records)
    assert (state.wrong(), state.last, sorted(found["loss"])) == ([], 9, list(range(1, 10)))


def test_realised_ratios_stage_and_length_are_metrics(staged):
    staged.config.monitor.log_every = 1
    for step in range(1, 10):
        staged.dispatched(step, metrics(), True)
    staged.flush()
    records = read_json_lines(staged.run.metrics)
    assert [(r["stage"], r["sequence_length"]) for r in records] == [(1, 4)] * 3 + [(2, 8)] * 6
    assert [r.get("mixture/b") for r in records[:3]] == [None] * 3
    assert records[2]["mixture/a"] == 1
    numbers = [staged.batches.row_numbers(step) >> TABLE_BIT for step in range(3, 9)]
    for record, until in zip(records[3:], range(1, 7), strict=True):
        share = np.mean(np.concatenate(numbers[:until]) == 2)
        assert (record["mixture/a"], record["mixture/b"]) == pytest.approx((1 - share, share), rel=1e-12)


def test_rows_are_named_with_their_source_where_there_are_several(staged):
    for step in (1, 5):
        staged.dispatched(step, metrics(), True)
        names = staged.flush()["row_numbers"]
        numbers = staged.batches.row_numbers(step - 1)
        expected = [(int(number) >> TABLE_BIT == 2, int(number) & (1 << TABLE_BIT) - 1) for number in numbers]
        assert names == [f"{row} of {'b' if other else 'a'}" for other, row in expected]


def test_longer_rows_are_more_tokens_a_second_and_more_floating_point_operations(staged, monkeypatch):
    monkeypatch.setattr(staged.rate, "step", lambda tokens: 100.0 * tokens)
    seconds = []
    monkeypatch.setattr(staged.console, "progress", lambda record, logged: seconds.append(record["seconds_left"]))
    for step in (2, 4):
        staged.dispatched(step, metrics(), True)
        staged.flush()
    short, long = read_json_lines(staged.run.metrics)
    assert (short["tokens_per_second"], long["tokens_per_second"]) == (800, 1600)
    for record, length in ((short, T), (long, 2 * T)):
        flops = counts(at_length(staged.config, length)).training_flops
        assert record["peak_fraction"] == pytest.approx(record["tokens_per_second"] * flops / 1e12)
    assert seconds == [(2 * T + 6 * 4 * T) / 800, 5 * 4 * T / 1600]


def test_bits_per_byte_are_of_the_tokens_that_count(staged):
    staged.dispatched(2, metrics(text_tokens=np.int32(3)), True)
    staged.flush()
    assert read_json_lines(staged.run.metrics)[0]["bits_per_byte"] == pytest.approx(1.5 * 3 / 16 / math.log(2))


def test_an_evaluation_of_several_sources_tells_of_each():
    of = {"loss": 2.0, "perplexity": 7.4, "bits_per_byte": 1.0, "accuracy": 0.5, "tokens": 10}
    assert report.figures(of).endswith("over 10 tokens")
    both = of | {"sources": {"a": of, "b": of | {"loss": 3.0, "bits_per_byte": 1.5}}}
    assert report.figures(both).endswith("over 10 tokens; a: loss 2.0000, bits/byte 1.000; b: loss 3.0000, bits/byte 1.500")


def test_without_journals_nothing_is_written(reporter):
    reporter.log = reporter.ledger = None
    reporter.dispatched(2, metrics(), True)
    assert reporter.flush()["step"] == 2
    assert not reporter.run.ledger.exists()
