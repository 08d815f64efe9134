"""What a person sees, on a terminal and in a file."""

import errno
import io

import pytest

from lumina.runs import console as module
from lumina.runs.console import Console, Rate, printable, table

RECORD = {
    "step": 7,
    "loss": 2.5,
    "bits_per_byte": 1.25,
    "learning_rate": 3e-4,
    "gradient_norm": 0.75,
    "tokens_per_second": 21_500.0,
    "peak_fraction": 0.123,
    "seconds_left": 125.0,
}
LINE = "step   7/100  eta 2:05  loss 2.500  bits/byte 1.250  21.5 K tok/s  peak 12%  lr 3.0e-04  grad 0.75"
ERASE = "\r\x1b[K"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines that a person sees in the end, as a terminal shows what was written."""
        lines = [""]
        for part in self.getvalue().replace(ERASE, "\0").splitlines(keepends=True):
            lines[-1] += part.rstrip("\n")
            if "\0" in lines[-1]:
                lines[-1] = lines[-1].rpartition("\0")[2]
            if part.endswith("\n"):
                lines.append("")
        return lines


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal()


def test_elsewhere_than_on_a_terminal_only_logged_steps_are_plain_lines():
    stream = io.StringIO()
    console = Console(100, stream)
    console.progress(RECORD, logged=False)
    console.progress(RECORD, logged=True)
    console.progress(RECORD | {"step": 8}, logged=False)
    console.done()
    assert stream.getvalue() == LINE + "\n"


def test_on_a_terminal_every_step_rewrites_one_line(terminal):
    console = Console(100, terminal)
    for step in (5, 6, 7):
        console.progress(RECORD | {"step": step}, logged=False)
    assert terminal.screen() == [LINE]
    assert "\n" not in terminal.getvalue()


def test_on_a_terminal_what_is_said_stays_and_the_live_line_goes_on_below_it(terminal):
    console = Console(100, terminal)
    console.progress(RECORD, logged=True)
    console.say("held out: fine")
    assert terminal.screen() == ["held out: fine", ""]
    console.progress(RECORD, logged=True)
    assert terminal.screen() == ["held out: fine", LINE]


def test_done_leaves_the_live_line_and_moves_below_it(terminal):
    console = Console(100, terminal)
    console.progress(RECORD, logged=False)
    console.done()
    console.done()
    console.say("next")
    assert terminal.screen() == [LINE, "next", ""]


def test_a_live_line_is_cut_to_the_terminal_so_that_it_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal()
    Console(100, terminal).progress(RECORD, logged=True)
    assert terminal.screen() == [LINE[:39]]
    assert "eta 2:05  loss 2.5" in terminal.screen()[0]


def test_a_status_is_replaced_on_a_terminal_and_kept_elsewhere(terminal):
    stream = io.StringIO()
    for console in (Console(100, terminal), Console(100, stream)):
        console.status("tokenised 1 of 2")
        console.status("tokenised 2 of 2")
    assert terminal.screen() == ["tokenised 2 of 2"]
    assert stream.getvalue() == "tokenised 1 of 2\ntokenised 2 of 2\n"


def test_a_step_without_a_known_end_shows_a_question_mark(terminal):
    Console(100, terminal).progress(RECORD | {"seconds_left": float("inf")}, logged=True)
    assert "  eta ?  loss" in terminal.screen()[0]


class Refusing(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_a_full_disk_under_a_log_costs_its_lines_and_not_the_run():
    console = Console(100, Refusing(OSError(errno.ENOSPC, "No space left on device")))
    console.say("held out: fine")
    console.status("compiling")
    console.progress(RECORD, logged=True)
    console.done()


def test_output_that_nobody_reads_is_told_to_the_caller_once_it_is_tried():
    console = Console(100, Refusing(BrokenPipeError()))
    assert not console.closed
    console.say("held out: fine")
    console.say("and more")
    assert console.closed


def test_a_table_aligns_names_and_indents_further_lines():
    assert table([("run", "here"), ("memory", "one\ntwo")]) == "   run  here\nmemory  one\n        two"


def test_control_characters_are_spelled_out_before_they_reach_a_terminal():
    assert printable("red \x1b[31m\a, \r\x9b é日😀\tx\n") == "red \\x1b[31m\\x07, \\x0d\\x9b é日😀\tx\n"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_rate_leaves_out_what_is_not_a_step(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", clock := Clock())
    rate = Rate()
    for _ in range(3):
        clock.now += 2
        assert rate.step(100) == pytest.approx(50)
    rate.pause()
    clock.now += 1000  # an evaluation, say
    assert rate.step(100) == pytest.approx(50)
    clock.now += 2
    assert rate.step(100) == pytest.approx(50)


def test_rate_forgets_the_past(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter", clock := Clock())
    rate = Rate()
    for seconds in [10] * 50 + [1] * 200:
        clock.now += seconds
        shown = rate.step(100)
    assert shown == pytest.approx(100, rel=0.01)
