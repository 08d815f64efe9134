"""Several processes as one, shown with commands that do not take long."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lumina.errors import UsageError
from lumina.runs import local
from lumina.runs.local import reserved_port, together
from tests.waiting import GIVES_UP, runs, until

ROOT = Path(__file__).parents[3]
NUMBER = "import os, signal, sys, time; number = int(os.environ['JAX_PROCESS_ID'])\n"
# Process 1 goes on when process 0 has come so far.
READY = "os.mkdir('ready') if number == 0 else [time.sleep(0.01) for _ in iter(lambda: os.path.exists('ready'), True)]\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
SAVES = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(75)))\n"


@pytest.fixture(autouse=True)
def no_python_between_fork_and_exec(monkeypatch):
    """Pytest's process has threads, and JAX's where other tests came before: not so a launcher of its own."""
    monkeypatch.setattr(local, "stop_without_parent", None)


def python(text):
    return [sys.executable, "-S", "-c", NUMBER + text]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(75 * (number == 1))", 75),
        ("number or time.sleep(60_000); sys.exit(93 if number else 1)", 93),
        ("number or time.sleep(60_000); sys.exit(3 if number else 75)", 3),
        ("number and time.sleep(1); sys.exit(3 if number else 75)", 3),
        ("number == 2 and sys.exit(5); time.sleep(60_000)", 5),
        ("number == 1 and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60_000)", 137),
        (SAVES + "number == 1 and (time.sleep(1), sys.exit(4)); time.sleep(60_000)", 4),
    ],
    ids=["done", "saved", "one_saved", "first", "after_75", "before_75", "refused", "killed", "others_save"],
)
def test_the_first_that_ends_badly_ends_the_others_and_gives_its_code(text, code):
    assert together(python(text), 3, grace=GIVES_UP) == code


def test_the_others_are_asked_to_end(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = "signal.signal(signal.SIGTERM, lambda *_: (print('asked'), sys.exit(75)))\n"
    assert together(python(asked + READY + "number and sys.exit(4); time.sleep(60_000)"), 2, grace=GIVES_UP) == 4
    assert capfd.readouterr().out == "[0] asked\n"


def test_what_does_not_hear_is_killed_when_another_has_ended_badly(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert together(python(DEAF + READY + "number and sys.exit(9); time.sleep(60_000)"), 2, grace=0.2) == 9
    told = capfd.readouterr().err.splitlines()
    assert told[0].startswith("lumina local: process 1: crashed with exit code 9 after ")
    assert told[1:] == ["lumina local: the others have not ended in 0.2 s: killed"]


def test_each_is_told_of_the_others(capfd, monkeypatch):
    names = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_PLATFORMS", "JAX_LOCAL_DEVICE_IDS", "JAX_COORDINATOR_ADDRESS"
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    show = python(f"print(*(os.environ.get(name) for name in {names}))")
    assert together(show, 2, "cpu", 12345) == together(show, 2, "gpu", 12345) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == [
        "[0] 2 0 None 0 127.0.0.1:12345",
        "[0] 2 0 cpu None 127.0.0.1:12345",
        "[1] 2 1 None 1 127.0.0.1:12345",
        "[1] 2 1 cpu None 127.0.0.1:12345",
    ]
    assert together(python("print(os.environ['JAX_COORDINATOR_ADDRESS'])"), 2) == 0
    first, second = (line.split()[1] for line in capfd.readouterr().out.splitlines())
    assert first == second
    assert first != "127.0.0.1:0"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere none is reserved")
def test_a_reserved_port_is_for_who_names_it_alone():
    with reserved_port() as port, socket.socket() as other, socket.socket() as meant:
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))  # as the system would, for any
        meant.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        meant.bind(("127.0.0.1", port))
        meant.listen()


def test_lines_begin_with_the_number_and_streams_stay_apart(capfd):
    assert together(python("print('a\\nb'); sys.stderr.write('c')"), 2) == 0
    out, err = capfd.readouterr()
    assert sorted(out.splitlines()) == ["[0] a", "[0] b", "[1] a", "[1] b"]
    assert sorted(err.splitlines()) == ["[0] c", "[1] c"]


def test_logs_are_a_file_each_and_are_added_to(tmp_path, capfd):
    for _ in range(2):
        assert together(python("print(number); sys.stderr.write('e\\n')"), 2, logs=tmp_path) == 0
    assert {path.name: sorted(path.read_text().split()) for path in tmp_path.iterdir()} == {
        "process-0.log": ["0", "0", "e", "e"],
        "process-1.log": ["1", "1", "e", "e"],
    }
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"^no-such-program: no such file or directory; "):
        together(["no-such-program"], 2)
    with pytest.raises(UsageError, match=r"/none/process-0\.log: no such file"):
        together(python(""), 2, logs=tmp_path / "none")


@pytest.mark.parametrize("given", [["--count", "0"], ["--count", "2", "--port", "65536"]])
def test_numbers_that_cannot_be_are_refused(given, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["local", *given, "--", "true"])
    with pytest.raises(UsageError, match=" ".join(given)):
        local.main()


@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM], 75),
        ([signal.SIGINT], 75),  # a second SIGINT, or one passed on as such, would end them with 130
        ([signal.SIGHUP], 75),
        ([signal.SIGUSR1], 75),
        ([signal.SIGTERM, signal.SIGTERM], 75),
        ([signal.SIGTERM, signal.SIGINT], 130),
    ],
    ids=lambda value: "-".join(s.name for s in value) if isinstance(value, list) else None,
)
def test_a_signal_reaches_all_once_ready(signals, code, tmp_path):
    text = (
        "signal.signal(signal.SIGINT, lambda *_: os._exit(130))\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'asked\\n'))\n"  # a print may be what the signal comes in
        "print('ready', flush=True)\n"
        "while not os.path.exists('saved'): time.sleep(0.01)\n"
        "sys.exit(75)"
    )
    command = [sys.executable, "-m", "lumina.runs.local", "--count", "2", "--", *python(text)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        heard = [launcher.stdout.readline()[3:] for _ in range(2)]
        for number in signals:
            launcher.send_signal(number)
            heard += [launcher.stdout.readline()[3:] for _ in range(2)]
        (tmp_path / "saved").touch()
        assert launcher.wait(timeout=GIVES_UP) == code
    ended = ["", ""] if code == 130 else [" asked\n"] * 2  # at once
    assert heard == [" ready\n"] * 2 + [" asked\n"] * 2 * (len(signals) - 1) + ended


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's death")
def test_none_is_left_when_the_launcher_is_killed(tmp_path):
    text = "print(os.getpid(), flush=True); time.sleep(60_000)"
    command = [sys.executable, "-m", "lumina.runs.local", "--count", "2", "--", *python(text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
        pids = [int(launcher.stdout.readline().split()[1]) for _ in range(2)]
        launcher.kill()
    for pid in pids:
        until(lambda pid=pid: not runs(pid))
