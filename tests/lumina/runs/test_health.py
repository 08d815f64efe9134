"""Signals that ask for an end, and the end of what hangs. Processes of their own, since a failure ends them."""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys

import pytest

from lumina.runs.health import StopRequest, Watchdog

BEGIN = """
import ctypes, os, signal, sys, threading, time
from lumina.runs.health import StopRequest, Watchdog

def elsewhere():
    time.sleep(600)

threading.Thread(target=elsewhere, daemon=True).start()
"""
# Limits of the watchdog, in seconds: what hangs does so for ever, and what does not answers well within them.
SHORT, LONG = "Watchdog(0.5)", "Watchdog(1.5)"


def run(code):
    return subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False, timeout=60)


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


@pytest.mark.parametrize("hang", ["time.sleep(600)", "ctypes.PyDLL(None).sleep(600)", "lock.acquire()"])
def test_what_hangs_ends_with_the_stacks_of_all_threads(hang):
    done = run(f"""
lock = threading.Lock()
lock.acquire()

def hangs():
    {hang}

watchdog = {SHORT}
watchdog.alive()
hangs()
""")
    assert done.returncode == 1
    assert "Timeout (0:00:00.5" in done.stderr
    assert "in hangs" in done.stderr
    assert "in elsewhere" in done.stderr


def test_who_is_alive_in_time_goes_on():
    done = run(f"""
watchdog = {LONG}
for _ in range(10):
    watchdog.alive()
    time.sleep(0.2)
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_who_rests_may_take_long():
    done = run(f"watchdog = {SHORT}\nwatchdog.alive()\nwatchdog.rest()\ntime.sleep(1)")
    assert (done.returncode, done.stderr) == (0, "")


def test_after_a_rest_it_counts_again():
    done = run(f"watchdog = {SHORT}\nwatchdog.alive()\nwatchdog.rest()\nwatchdog.alive()\ntime.sleep(600)")
    assert done.returncode == 1


def test_before_the_first_sign_of_life_nothing_is_counted():
    assert run(f"watchdog = {SHORT}\ntime.sleep(1)").returncode == 0


def test_a_limit_of_zero_is_none(monkeypatch):
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: pytest.fail("counts"))
    before = signal.getsignal(signal.SIGTSTP)
    watchdog = Watchdog(0)
    watchdog.alive()
    watchdog.rest()
    assert signal.getsignal(signal.SIGTSTP) == before


def suspended_for_longer_than_the_limit(code):
    """What is left of a process that was suspended by Ctrl-Z, waited, and went on: its exit code and stdout."""
    command = [sys.executable, "-c", BEGIN + code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGTSTP)
            assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
            process.send_signal(signal.SIGCONT)
            stdout, _ = process.communicate("fg\n", timeout=60)
        finally:
            process.kill()
    return process.returncode, stdout


def test_the_time_of_ctrl_z_until_fg_is_no_hang():
    code = f"watchdog = {LONG}\nwatchdog.alive()\nprint('ready', flush=True)\nprint(input())"
    assert suspended_for_longer_than_the_limit(code) == (0, "fg\n")


def test_after_fg_it_counts_anew():
    code = f"watchdog = {LONG}\nwatchdog.alive()\nprint('ready', flush=True)\nprint(input(), flush=True)\ntime.sleep(600)"
    assert suspended_for_longer_than_the_limit(code) == (1, "fg\n")


def test_who_rested_at_ctrl_z_still_rests_after_fg():
    code = f"watchdog = {SHORT}\nwatchdog.alive()\nwatchdog.rest()\nprint('ready', flush=True)\nprint(input())\ntime.sleep(1)"
    assert suspended_for_longer_than_the_limit(code) == (0, "fg\n")
