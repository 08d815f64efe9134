"""Signals that ask for an end, and the end of what hangs. Processes of their own, since a failure ends them."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys

import pytest

from lumina.runs.health import StopRequest, Watchdog
from tests.waiting import GIVES_UP, until

BEGIN = """
import ctypes, os, signal, sys, threading, time
from lumina.runs.health import StopRequest, Watchdog

there = threading.Event()

def elsewhere():
    there.set()
    time.sleep(60_000)

threading.Thread(target=elsewhere, daemon=True).start()
there.wait()
"""
# Limits of the watchdog, in seconds: one that is to be reached, and one that no machine is slow enough for.
SHORT, NEVER = 0.5, 60_000
FIRES = f"watchdog.seconds = {SHORT}\nwatchdog.alive()\ntime.sleep(60_000)"


def run(code):
    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIVES_UP)


# ------------------------------------------------------------------------------------------------------ requests to stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_the_first_signal_asks_and_is_told(name, capfd):
    with StopRequest() as asked:
        assert not asked
        signal.raise_signal(signal.Signals[name])
        assert asked
        assert asked.signal == name
    assert f"\n{name}: finishing the step and saving" in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopRequest() as asked:
        signal.raise_signal(signal.SIGHUP)
        assert not asked
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN


def test_a_request_can_be_seen_after_the_end(capfd):
    with StopRequest() as asked:
        signal.raise_signal(signal.SIGTERM)
    assert asked


def test_sigterm_again_changes_nothing(capfd):
    with StopRequest() as asked:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
    assert asked.signal == "SIGTERM"
    assert capfd.readouterr().err.count("SIGTERM") == 1


def test_a_sigterm_after_the_first_sigint_does_not_leave(capfd):
    with StopRequest() as asked:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert asked.signal == "SIGINT"


def test_a_second_sigint_leaves_at_once_whatever_else_runs():
    done = run("""
threading.Thread(target=elsewhere).start()
try:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        print("goes on", flush=True)
        signal.raise_signal(signal.SIGINT)
        print("goes on for too long", flush=True)
finally:
    print("waits for others", flush=True)
""")
    assert (done.returncode, done.stdout) == (130, "goes on\n")
    assert "SIGINT: finishing the step and saving; Ctrl-C leaves at once\n" in done.stderr
    assert "left at once; the newest checkpoint stands" in done.stderr


def test_nobody_who_reads_the_message_is_no_reason_to_fail():
    done = run("os.close(2)\nwith StopRequest() as asked: signal.raise_signal(signal.SIGTERM)\nprint(asked.signal)")
    assert (done.returncode, done.stdout) == (0, "SIGTERM\n")


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_handlers_are_as_they_were_afterwards_however_it_ends(error):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with contextlib.suppress(ValueError, KeyboardInterrupt), StopRequest():
        assert signal.getsignal(signal.SIGINT) not in before
        if error:
            raise error
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


# -------------------------------------------------------------------------------------------------------------- hangs


@pytest.fixture
def told(monkeypatch):
    """What a watchdog of this process would have its clock do, and the system with this process."""
    told = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: told.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: told.append("rests"))
    monkeypatch.setattr(os, "kill", lambda *signalled: told.append(signalled))
    before = signal.getsignal(signal.SIGTSTP)
    yield told
    signal.signal(signal.SIGTSTP, before)


@pytest.mark.parametrize("hang", ["time.sleep(60_000)", "ctypes.PyDLL(None).sleep(60_000)", "lock.acquire()"])
def test_what_hangs_ends_with_the_stacks_of_all_threads(hang):
    done = run(f"""
lock = threading.Lock()
lock.acquire()

def hangs():
    Watchdog({SHORT}).alive()
    {hang}

hangs()
""")
    assert done.returncode == 1
    assert "Timeout (0:00:00.5" in done.stderr
    assert "in hangs" in done.stderr
    assert "in elsewhere" in done.stderr


def test_each_sign_of_life_begins_the_count_anew(told):
    watchdog = Watchdog(1.5)
    for _ in range(3):
        watchdog.alive()
    assert told == [1.5] * 3


def test_a_count_begun_anew_replaces_the_one_before():
    done = run(f"watchdog = Watchdog({NEVER})\nwatchdog.alive()\n{FIRES}")
    assert (done.returncode, "Timeout (0:00:00.5" in done.stderr) == (1, True)


def test_who_rests_may_take_long(told):
    watchdog = Watchdog(1.5)
    watchdog.alive()
    watchdog.rest()
    assert told == [1.5, "rests"]


def test_after_a_rest_it_counts_again():
    done = run(f"watchdog = Watchdog({NEVER})\nwatchdog.alive()\nwatchdog.rest()\n{FIRES}")
    assert done.returncode == 1


def test_before_the_first_sign_of_life_nothing_is_counted():
    assert run(f"watchdog = Watchdog({SHORT})\ntime.sleep(1)").returncode == 0


def test_a_limit_of_zero_is_none(told):
    before = signal.getsignal(signal.SIGTSTP)
    watchdog = Watchdog(0)
    watchdog.alive()
    assert told == []
    assert signal.getsignal(signal.SIGTSTP) == before


def suspended(code):
    """What is left of a process that was suspended by Ctrl-Z by its `code`, and went on: its exit code, what it wrote."""
    command = [sys.executable, "-c", f"{BEGIN}\nctrl_z = lambda: signal.raise_signal(signal.SIGTSTP)\n{code}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, status = until(lambda: (found := os.waitpid(process.pid, os.WUNTRACED | os.WNOHANG))[0] and found)
            assert os.WIFSTOPPED(status), process.communicate()
            process.send_signal(signal.SIGCONT)
            stdout, stderr = process.communicate(timeout=GIVES_UP)
        finally:
            process.kill()
    return process.returncode, stdout, stderr


def test_ctrl_z_suspends_and_fg_goes_on():
    code = f"watchdog = Watchdog({NEVER})\nwatchdog.alive()\nctrl_z()\nprint('goes on')"
    assert suspended(code) == (0, "goes on\n", "")


def test_the_time_of_ctrl_z_until_fg_is_no_hang(told):
    Watchdog(1.5).alive()
    signal.raise_signal(signal.SIGTSTP)
    # A clock that still counted would have run out by then, and end the process as soon as that goes on.
    assert told == [1.5, "rests", (os.getpid(), signal.SIGSTOP), 1.5]


def test_after_fg_it_counts_anew():
    code = f"watchdog = Watchdog({NEVER})\nwatchdog.alive()\nwatchdog.seconds = {SHORT}\nctrl_z()\ntime.sleep(60_000)"
    code, _, stderr = suspended(code)
    assert (code, "Timeout (0:00:00.5" in stderr) == (1, True)


def test_who_rested_at_ctrl_z_still_rests_after_fg(told):
    watchdog = Watchdog(1.5)
    watchdog.alive()
    watchdog.rest()
    signal.raise_signal(signal.SIGTSTP)
    assert told == [1.5, "rests", "rests", (os.getpid(), signal.SIGSTOP)]
