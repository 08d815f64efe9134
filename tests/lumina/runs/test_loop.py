"""The training loop around a backend of plain Python: what is called when, and what goes wrong on the way.

A state is the steps made, the rows whose updates it has, and how many updates were skipped in a row.
"""

import io
import math
import os
import signal
from typing import NamedTuple

import numpy as np
import pytest

from lumina.config import Config
from lumina.data.mixture import Course, Leg, Table, Turns
from lumina.data.rows import Batches, Rows
from lumina.errors import CheckpointError, ConfigError, DataError, DoNotRetryError
from lumina.runs.console import Console
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.health import STOPPING
from lumina.runs.journal import read_json_lines
from lumina.runs.ledger import compare_ledgers, read_ledger
from lumina.runs.loop import Backend, Loop
from lumina.stages import stages

T, NUM_ROWS = 2, 500


class State(NamedTuple):
    step: int = 0
    rows: tuple = ()
    skipped: int = 0


class Stream:
    """Token i is i: a row says by its first token which one it is."""

    name, num_tokens, fails_at = "train", NUM_ROWS * T + 1, -1

    def read(self, start, stop):
        if start // T == self.fails_at:
            raise DataError("the shard is corrupt")
        return np.arange(start, stop, dtype=np.int32)


EVERY = 3  # steps between checkpoints


class Saving:
    """Checkpoints in memory."""

    def __init__(self, said):
        self.kept, self.said, self.fails = {}, said, set()

    def save(self, step, state, record):
        if step in self.kept:
            return
        manifest = record(f"digest of {step}")
        self.said.append(("save", step))
        if step not in self.fails:
            self.kept[step] = (state, manifest)

    def require(self, step):
        if step not in self.kept:
            raise CheckpointError(f"step {step} could not be written")

    def restore(self, scheduled=False):
        self.kept = {step: kept for step, kept in self.kept.items() if not (scheduled and step % EVERY)}
        return self.kept[max(self.kept)] if self.kept else None


class World:
    """A run directory, and what training in it does; `again` is another process in the same directory."""

    def __init__(self, path, **changes):
        self.run, self.said, self.stderr = RunDirectory(path), [], io.StringIO()
        self.saving = Saving(self.said)
        self.config = Config()
        self.config.data.sequence_length, self.config.train.batch_size, self.config.train.steps = T, 2, 8
        self.config.train.eval_every, self.config.checkpoint.every, self.config.guard.hang_seconds = 0, EVERY, 0
        self.config.monitor.log_every, self.config.monitor.tensorboard = 1, False
        self.stream, self.processes, self.writes = Stream(), 1, True
        self.losses = {}  # of the batch that a step reads; 1 / step otherwise
        self.held_out = {}  # after a step; 1 / step otherwise
        self.at = {}  # what happens while a step is dispatched
        self.routers = {}  # metrics of a step that has any
        self.set(**changes)

    def set(self, **changes):
        for name, value in changes.items():
            group, _, field = name.partition("__")
            if field:
                setattr(getattr(self.config, group), field, value)
            else:
                setattr(self, name, value)
        return self

    def train_step(self, number, state, batch, update, stop):
        step = state.step + 1
        self.at.get(step, lambda: None)()
        self.said.append(("step" if update else "pass", step))
        loss = self.losses.get(step, 1 / step)
        good = math.isfinite(loss) and loss < 100
        skipped = state.skipped if not update else 0 if good else state.skipped + 1
        rows = tuple((batch["inputs"][:, 0] // T).tolist()) if update and good else ()
        metrics = {"loss": loss, "text_bytes": 9, "text_tokens": 4, "accuracy": 0.5, "learning_rate": 0.1, "gradient_norm": 1.0}
        return State(step, state.rows + rows, skipped), {**metrics, **self.routers, "skipped": skipped, "stop": int(stop)}

    def evaluate(self, state, alive):
        self.said.append(("evaluate", state.step))
        alive()
        loss = self.held_out.get(state.step, 1 / state.step)
        return {"loss": loss, "perplexity": 1.0, "bits_per_byte": 1.0, "accuracy": 0.5, "tokens": 7}

    def sample(self, state, count):
        self.said.append(("sample", state.step))
        return ["def \x1b[31m"] * count

    def loop(self):
        backend = Backend(
            fresh=State,
            train_step=self.train_step,
            fetch=lambda metrics: {name: v if isinstance(v, dict) else np.asarray(v) for name, v in metrics.items()},
            steps_of=lambda state: state.step,
            evaluate=self.evaluate,
            sample=self.sample,
            processes=self.processes,
            writes=self.writes,
        )
        console = Console(self.config.train.steps, self.stderr)
        events = Events(self.run if self.writes else None, console.say)
        restored, prints = self.saving.restore(), {"config": "abc"}
        return Loop(self.config, self.run, backend, self.batches(), self.saving, restored, console, events, prints, 1e12)

    def batches(self):
        rows, size = Rows(self.stream, T, -1), self.config.train.batch_size
        if not self.config.data.stages:
            return Batches(rows, size, seed=0)
        planned = stages(self.config)
        return Course([Table(0, rows)], [Leg(stage.steps, (0,), Turns([1])) for stage in planned], size, seed=0)

    def go(self, **changes):
        self.set(**changes)
        return self.loop().run()

    def rows(self, count=None):
        """The rows of the run's order."""
        return tuple(int(n) for n in Batches(Rows(Stream(), T, -1), count or len(self.last.rows), seed=0).row_numbers(0))

    @property
    def last(self):
        return self.saving.kept[max(self.saving.kept)][0]

    @property
    def progress(self):
        return self.saving.kept[max(self.saving.kept)][1]["progress"]

    @property
    def events(self):
        return [(event["event"], event["step"]) for event in read_json_lines(self.run.events)]

    def did(self, *kinds):
        return [what for what in self.said if what[0] in kinds]

    def recorded(self, journal):
        return [record["step"] for record in read_json_lines(journal)]


@pytest.fixture(autouse=True)
def heeded():
    """Signals as at a terminal; where tests run in the background, some are ignored, and stay so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def steps(first, last):
    return [("step", n) for n in range(first, last + 1)]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def fail(error):
    def raises():
        raise error

    return raises


# ---------------------------------------------------------------------------------------------------------- in order


def test_every_step_is_made_once_on_the_rows_of_its_turn(world):
    assert world.go() == "finished"
    assert world.did("step", "pass") == steps(1, 8)
    assert world.last == State(8, world.rows(16), 0)


def test_evaluations_samples_and_checkpoints_come_after_their_steps_in_this_order(world):
    world.go(train__eval_every=4, monitor__sample_every=4, checkpoint__every=4)
    around = [("evaluate", 4), ("sample", 4), ("save", 4)]
    assert world.said == [*steps(1, 4), *around, *steps(5, 8), ("evaluate", 8), ("save", 8)]


def test_the_last_step_is_evaluated_once_and_saved_whatever_was_asked(world):
    for eval_every in (0, 4, 5):
        other = World(world.run.path / str(eval_every), train__eval_every=eval_every, checkpoint__every=5)
        other.run.path.mkdir()
        other.go()
        assert other.did("evaluate").count(("evaluate", 8)) == 1
        assert other.did("save")[-1] == ("save", 8)


def test_an_evaluation_that_is_the_best_is_saved_and_another_is_not(world):
    world.go(train__eval_every=2, checkpoint__every=100, held_out={2: 5.0, 4: 4.0, 6: 4.5, 8: 4.5})
    assert world.did("save") == [("save", 2), ("save", 4), ("save", 8)]
    assert (world.progress["best_step"], world.progress["best_loss"]) == (4, 4.0)


def test_metrics_and_ledger_have_every_step_once_and_in_order(world):
    world.go(train__eval_every=4)
    records = read_json_lines(world.run.metrics)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 9))
    assert [r["step"] for r in records if r["kind"] == "eval"] == [4, 8]
    ledger = read_json_lines(world.run.ledger)
    assert [r["step"] for r in ledger if "loss" in r] == list(range(1, 9))
    assert [(r["step"], r["parameters"]) for r in ledger if "parameters" in r] == [(n, f"digest of {n}") for n in (3, 4, 6, 8)]


def test_the_manifest_has_progress_ledger_and_fingerprints(world):
    world.go()
    for step, (_, manifest) in world.saving.kept.items():
        assert manifest["progress"]["rows"] == 2 * step
        assert manifest["config"] == "abc"
        lines = world.run.ledger.read_bytes()[: manifest["ledger"]["bytes"]].splitlines()
        assert len(lines) == step + len([kept for kept in world.saving.kept if kept <= step])


def test_a_process_that_does_not_write_leaves_nothing(world):
    world.run.path.joinpath("empty").mkdir()
    other = World(world.run.path / "empty", writes=False, processes=2, monitor__sample_every=2)
    assert other.go() == "finished"
    assert list(other.run.path.iterdir()) == []
    assert other.did("sample") == []


def test_what_a_model_says_cannot_steer_the_terminal(world):
    world.go(monitor__sample_every=4)
    assert "def \\x1b[31m" in world.stderr.getvalue()
    assert "\x1b" not in world.stderr.getvalue()
    assert (world.run.samples / "4.txt").read_text() == "def \x1b[31m\n"


def test_samples_that_cannot_be_kept_do_not_stop_training(world):
    world.run.samples.write_text("in the way")
    assert world.go(monitor__sample_every=4) == "finished"
    assert f"{world.run.samples}: cannot be written" in world.stderr.getvalue()


# ---------------------------------------------------------------------------------------------------------- going on


def test_a_resumed_run_makes_each_remaining_step_once(world):
    world.go(train__steps=5)
    world.said.clear()
    assert world.go(train__steps=8) == "finished"
    assert world.did("step") == steps(6, 8)
    assert world.last.rows == world.rows(16)


def test_what_came_after_the_checkpoint_is_told_again_and_once(world):
    class Killed(BaseException):
        """Nothing can be saved any more."""

    with pytest.raises(Killed):
        world.go(at={6: fail(Killed())})
    assert max(world.saving.kept) == 3
    assert max(world.recorded(world.run.ledger)) > 3
    assert world.go(at={}) == "finished"
    for journal in (world.run.metrics, world.run.ledger):
        told = [r["step"] for r in read_json_lines(journal) if "loss" in r and r.get("kind") != "eval"]
        assert told == list(range(1, 9))
    assert "ledger differs" not in dict(world.events)


@pytest.mark.parametrize("batch_size", [1, 4, 3])
def test_after_a_change_of_batch_size_rows_go_on_where_they_were(world, batch_size):
    world.go(train__steps=5)
    world.go(train__steps=8, train__batch_size=batch_size)
    assert world.last.rows == world.rows(10 + 3 * batch_size)
    assert world.progress["rows"] == 10 + 3 * batch_size
    world.go(train__steps=9, train__batch_size=2)  # and back again
    assert world.last.rows == world.rows(12 + 3 * batch_size)


def test_a_ledger_that_is_not_as_it_was_is_told_of_and_kept(world):
    world.go(train__steps=5)
    lines = world.run.ledger.read_text().splitlines(keepends=True)
    world.run.ledger.write_text("".join(lines[1:]))
    world.go(train__steps=8)
    assert ("ledger differs", 5) in world.events
    assert world.run.ledger.read_text().startswith("".join(lines[1:]))


def test_nothing_is_trained_or_evaluated_when_all_was_done(world):
    world.go()
    world.said.clear()
    assert world.go() == "finished"
    assert world.said == []


def test_fewer_steps_than_were_made_evaluate_what_is_there(world):
    world.go()
    world.said.clear()
    del world.saving.kept[8]
    assert world.go(train__steps=5) == "finished"
    assert world.said == [("evaluate", 6)]


# ---------------------------------------------------------------------------------------------------- stopping early


def test_training_stops_when_evaluations_bring_nothing_and_the_state_is_saved(world):
    said = world.go(train__steps=50, train__eval_every=2, train__early_stopping=2, held_out={2: 3.0, 4: 2.0, 6: 2.0, 8: 2.5})
    assert said == "stopped early"
    assert world.did("step") == steps(1, 8)
    assert world.did("evaluate")[-1] == ("evaluate", 8)
    assert world.last.step == 8


def test_a_run_that_stopped_early_stops_at_once_when_it_goes_on(world):
    world.go(train__steps=50, train__eval_every=2, train__early_stopping=2, held_out={2: 3.0, 4: 3.0, 6: 3.0})
    world.said.clear()
    assert world.go() == "stopped early"
    assert world.said == []


# ---------------------------------------------------------------------------------------------------- stopping on request


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_training_after_the_step_it_came_in_with_the_state_saved(world, number, capfd):
    assert world.go(at={5: lambda: os.kill(os.getpid(), number)}) == "stopped"
    assert world.did("step") == steps(1, 5)
    assert world.last.step == 5
    assert world.events[-1] == ("stopped", 5)
    assert f"stopped by {signal.Signals(number).name} at step 5" in world.stderr.getvalue()
    assert max(world.recorded(world.run.ledger)) == 5
    world.at = {}
    assert world.go() == "finished"
    assert world.last.rows == world.rows(16)


def test_a_signal_in_the_last_step_lets_the_run_finish(world):
    assert world.go(at={8: terminate}) == "finished"
    assert world.did("evaluate") == [("evaluate", 8)]


def test_a_signal_makes_no_evaluation_that_was_not_due(world):
    world.go(at={4: terminate}, train__eval_every=5)
    assert world.did("evaluate") == []


def test_of_several_processes_each_stops_at_the_step_after_all_have_learned(world):
    world.go(processes=2, at={4: terminate})
    # The request goes out with step 5, and is read, a step late, when step 6 is under way.
    assert world.did("step") == steps(1, 6)
    assert world.last.step == 6
    assert world.events[-1] == ("stopped", 6)


def test_signals_do_what_they_did_once_training_is_over(world):
    world.go()
    assert [signal.getsignal(number) for number in STOPPING] == [signal.SIG_DFL] * len(STOPPING)


# ---------------------------------------------------------------------------------------------------------- bad steps


def test_a_skipped_update_is_told_of_with_its_rows_and_training_goes_on(world):
    assert world.go(losses={5: math.nan}) == "finished"
    rows = world.rows(16)
    assert world.last.rows == rows[:8] + rows[10:]
    assert ("skipped", 5) in world.events
    assert f"step 5: loss is nan (rows {rows[8]}, {rows[9]}): update skipped, 1 in a row" in world.stderr.getvalue()
    updates = {r["step"]: r.get("update") for r in read_json_lines(world.run.ledger) if "loss" in r}
    assert updates == {n: "skipped" if n == 5 else None for n in range(1, 9)}


def test_an_expert_without_tokens_is_an_event_and_told_of_once_though_the_run_stops_and_goes_on(world):
    world.config.model.moe.pattern, world.config.model.moe.num_experts = "0", 2
    world.routers = {"moe": {"load_A": np.array([[2 * T, 0]])}}
    world.go(train__steps=6)
    world.go(train__steps=9)
    assert [event for event in world.events if event[0] == "routing"] == [("routing", 5)]
    assert world.stderr.getvalue().count("expert 1 of layer 0 has had no token for 5 log steps") == 1


def test_a_run_of_skips_ends_the_run_without_saving_its_state(world):
    with pytest.raises(DoNotRetryError, match=r"step 6: loss is nan .*3 updates in a row were skipped"):
        world.go(losses=dict.fromkeys(range(4, 9), math.nan), guard__max_skips=2)
    assert world.last.step == 3
    assert world.events[-1][0] == "failed"


def test_skips_that_are_not_in_a_row_end_nothing(world):
    bad = dict.fromkeys((2, 3, 5, 6, 8), math.nan)
    assert world.go(losses=bad, guard__max_skips=2) == "finished"


def test_a_skip_in_the_last_step_is_judged_before_the_run_ends(world):
    with pytest.raises(DoNotRetryError, match="step 8"):
        world.go(losses={7: math.nan, 8: math.nan}, guard__max_skips=1)


def test_a_spike_rewinds_to_the_newest_checkpoint_and_passes_over_the_batches_since(world):
    assert world.go(losses={5: 500.0}, guard__spike_action="rewind") == "finished"
    rows = world.rows(16)
    # Step 6 was under way when step 5 was read. Steps 4 and 5 are passed over; 6 to 8 are made anew.
    assert world.did("step", "pass") == [*steps(1, 6), ("pass", 4), ("pass", 5), *steps(6, 8)]
    assert world.last.rows == rows[:6] + rows[10:]
    assert world.progress["passed"] == [[4, 5]]
    assert world.progress["rewinds"] == 1
    assert ("rewound", 3) in world.events


def test_after_a_rewind_journals_tell_each_step_once(world):
    world.go(losses={5: 500.0}, guard__spike_action="rewind")
    ledger = [r for r in read_json_lines(world.run.ledger) if "loss" in r]
    assert [r["step"] for r in ledger] == list(range(1, 9))
    assert [r.get("update") for r in ledger] == [None] * 3 + ["passed over"] * 2 + [None] * 3
    assert [r["step"] for r in read_json_lines(world.run.metrics) if r["kind"] == "train"] == list(range(1, 9))
    kept = world.saving.kept[8][1]["ledger"]["bytes"]
    assert kept == world.run.ledger.stat().st_size


def test_a_spike_before_the_first_checkpoint_begins_anew(world):
    assert world.go(losses={2: 500.0}, guard__spike_action="rewind") == "finished"
    assert world.last.rows == world.rows(16)[4:]
    assert world.progress["passed"] == [[1, 2]]


def test_rewinds_add_up_and_the_last_one_allowed_is_the_last(world):
    assert world.go(losses={2: 500.0, 5: 500.0}, guard__spike_action="rewind", guard__max_rewinds=2) == "finished"
    assert world.progress["passed"] == [[1, 2], [4, 5]]
    other = World(world.run.path / "other", losses={2: 500.0, 5: 500.0}, guard__spike_action="rewind", guard__max_rewinds=1)
    other.run.path.mkdir()
    with pytest.raises(DoNotRetryError, match="after 1 rewinds"):
        other.go()


def test_what_was_passed_over_stays_so_when_the_run_goes_on(world):
    world.go(losses={5: 500.0}, guard__spike_action="rewind", train__steps=6)
    kept = world.last.rows
    world.go(train__steps=8)
    assert world.last.rows == kept + world.rows(16)[12:]
    assert world.progress["passed"] == [[4, 5]]


def test_a_rewind_beyond_a_change_of_batch_size_reads_no_row_twice(world):
    world.go(train__steps=6)
    rewind = {"losses": {8: 500.0}, "guard__spike_action": "rewind", "at": {8: lambda: world.saving.kept.pop(6)}}
    world.go(train__steps=12, train__batch_size=8, **rewind)
    rows = world.rows(6 + 9 * 8)
    assert world.progress["passed"] == [[4, 8]]
    assert world.last.rows == rows[:6] + rows[6 + 5 * 8 :]
    assert world.progress["rows"] == len(rows)


# ------------------------------------------------------------------------------------------------------- what fails


def test_an_error_in_a_step_that_is_to_be_evaluated_saves_nothing_as_the_evaluation_would_be_left_out(world):
    evaluate, world.evaluate = world.evaluate, lambda state, alive: fail(RuntimeError("no memory to evaluate"))()
    with pytest.raises(RuntimeError, match="no memory to evaluate"):
        world.go(train__eval_every=4)
    assert max(world.saving.kept) == 3
    world.evaluate = evaluate
    assert world.go() == "finished"
    assert [step for what, step in world.said if what == "evaluate"] == [4, 8]


class Closing(io.StringIO):
    """Output whose reader goes away after some writes."""

    left = 3

    def write(self, text):
        self.left -= 1
        if self.left < 0:
            raise BrokenPipeError
        return super().write(text)


def test_a_reader_that_goes_away_stops_the_run_with_all_saved_and_told_in_the_ledger(world):
    world.stderr = Closing()
    assert world.go(monitor__log_every=1) == "stopped"
    stopped = max(world.saving.kept)
    assert stopped < 8
    assert [record["step"] for record in read_json_lines(world.run.ledger) if "loss" in record] == list(range(1, stopped + 1))
    world.stderr = io.StringIO()
    assert world.go() == "finished"
    assert world.last.rows == world.rows(16)


def test_an_error_saves_the_state_and_is_raised(world):
    with pytest.raises(RuntimeError, match="the device is gone"):
        world.go(at={6: fail(RuntimeError("the device is gone"))})
    assert world.last == State(5, world.rows(10), 0)
    assert world.events[-1:] == [("failed", 5)]
    assert "saved at step 5 before leaving; the same command goes on" in world.stderr.getvalue()
    assert world.go(at={}) == "finished"
    assert world.last.rows == world.rows(16)


def test_data_that_cannot_be_read_saves_the_state_before_it(world):
    world.stream.fails_at = world.rows(16)[11]  # of step 6
    with pytest.raises(DataError, match="corrupt"):
        world.go()
    assert world.last.step == 5
    assert max(world.recorded(world.run.ledger)) == 5


def test_an_error_that_takes_the_state_with_it_leaves_the_newest_checkpoint(world):
    loop = world.set(at={6: fail(RuntimeError("out of memory"))}).loop()

    def gone(state):
        raise ValueError("array has been deleted")

    loop.backend.steps_of = gone
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.run()
    assert world.last.step == 3
    assert "nothing could be saved at step 5 (array has been deleted); the newest checkpoint stands" in world.stderr.getvalue()


def test_of_several_processes_none_saves_after_an_error_as_that_takes_all(world):
    with pytest.raises(RuntimeError):
        world.go(at={6: fail(RuntimeError("lost"))}, processes=2)
    assert world.last.step == 3


def test_a_last_state_that_cannot_be_saved_is_tried_once_more_and_then_an_error(world):
    world.saving.fails = {8}
    with pytest.raises(CheckpointError, match="step 8 could not be written"):
        world.go()
    assert world.did("save") == [("save", n) for n in (3, 6, 8, 8)]
    assert world.last.step == 6


def test_a_checkpoint_that_fails_on_the_way_stops_nothing(world):
    world.saving.fails = {3}
    assert world.go() == "finished"
    assert sorted(world.saving.kept) == [6, 8]


# ------------------------------------------------------------------------------------------------------------ stages

STAGES = "4: stdlib; stdlib"  # a second stage from step 5 on


def test_patience_ends_in_the_last_stage_alone(world):
    flat = dict.fromkeys(range(1, 20), 3.0)
    changes = {"train__steps": 30, "train__eval_every": 1, "train__early_stopping": 2, "held_out": flat}
    assert world.go(data__stages="6: stdlib; 4: stdlib; stdlib", **changes) == "stopped early"
    assert world.did("step") == steps(1, 13)  # 11 is the first of the last stage and its best, 12 and 13 bring nothing
    assert world.loop().progress.best_step == 11


def stage_lines(world):
    return [record["step"] for record in read_json_lines(world.run.ledger) if "stage" in record]


def test_a_stage_that_begins_is_said_and_an_event(world):
    assert world.go(data__stages=STAGES) == "finished"
    (event,) = [event for event in read_json_lines(world.run.events) if event["event"] == "stage"]
    assert (event["step"], event["says"] in world.stderr.getvalue()) == (5, True)
    assert stage_lines(world) == [5]
    assert world.last.rows == world.rows(16)


def test_a_rewind_over_a_boundary_tells_of_the_stage_once_more_and_leaves_one_line(world):
    rewinding = {"guard__spike_action": "rewind", "guard__spike_sigmas": 1.0}
    assert world.go(data__stages=STAGES, losses={5: 1000.0}, **rewinding) == "finished"
    assert [record["step"] for record in read_json_lines(world.run.events) if record["event"] == "rewound"] == [3]
    assert stage_lines(world) == [5]
    state, _ = read_ledger(read_json_lines(world.run.ledger))
    assert (state.wrong(), state.last) == ([], 8)


def test_a_run_stopped_at_a_boundary_has_the_line_of_its_next_stage_from_when_it_goes_on(world):
    stop = {4: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    assert world.go(data__stages=STAGES, at=stop) == "stopped"
    assert stage_lines(world) == []
    whole = World(world.run.path / "whole")
    whole.run.path.mkdir()
    whole.go(data__stages=STAGES)
    assert world.go(at={}) == "finished"
    assert stage_lines(world) == [5]
    assert compare_ledgers(read_json_lines(world.run.ledger), read_json_lines(whole.run.ledger)).identical


def test_another_batch_size_is_refused_in_a_run_of_stages(world):
    world.go(data__stages=STAGES, train__steps=6, checkpoint__every=3)
    with pytest.raises(ConfigError, match=r"train.batch_size = 4: 12 rows were read in 6 steps of another size"):
        world.go(train__batch_size=4, train__steps=8)
