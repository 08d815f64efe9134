"""The supervisor: what it restarts and what it leaves alone, which signals reach the command, what it tells."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from datetime import datetime, timedelta

import pytest

from lumina import cli
from lumina.errors import UsageError
from lumina.runs import supervisor
from lumina.runs.supervisor import cause_of, exit_code, supervise, wait_before_restart
from tests.waiting import GIVES_UP, until

PYTHON = [sys.executable, "-I", "-S", "-c"]

# Notes the cause it is told, then ends as its arguments say: the first run with the first, all beyond the last with the last.
ENDING = """
import os, signal, sys
notes, *endings = sys.argv[1:]
with open(notes, "a") as file:
    print(os.environ.get("LUMINA_RESTART_CAUSE", "unset"), file=file)
ending = endings[min(len(open(notes).readlines()), len(endings)) - 1]
if ending.startswith("SIG"):
    if ending != "SIGKILL":
        signal.signal(getattr(signal, ending), signal.SIG_DFL)
    os.kill(os.getpid(), getattr(signal, ending))
os._exit(int(ending))
"""

# Notes each signal, and ends with 75 when told to by a file.
LISTENING = """
import os, signal, sys, time
notes, end = sys.argv[1:]
def note(text):
    with open(notes, "a") as file:
        print(text, file=file)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: note(signal.Signals(number).name))
note("listening")
while not os.path.exists(end):
    time.sleep(0.1)
sys.exit(75)
"""

# A supervisor to send signals to, whatever the suite's own parent ignores.
FRESH = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
"""
COMMAND_LINE = FRESH + "from lumina.cli import main\nmain()"
LONG_WAIT = (
    FRESH + "from lumina.runs.supervisor import supervise\nsys.exit(supervise(sys.argv[1:], 20, wait=lambda *run: 3600.0))"
)


@pytest.fixture(autouse=True)
def no_python_between_fork_and_exec(monkeypatch):
    """Pytest's process has threads, and JAX's where other tests came before: not so a supervisor of its own, see `start`."""
    monkeypatch.setattr(supervisor, "_LIBC", None)


@pytest.fixture
def notes(tmp_path):
    """Where a command leaves a line for each of its runs, or of the signals it got."""
    (tmp_path / "notes").touch()
    return tmp_path / "notes"


def ending(notes, *endings):
    return [*PYTHON, ENDING, str(notes), *(str(each) for each in endings)]


def at_once(code, seconds, crashes):
    return 0.0


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def start():
    """Starts a supervisor as a process, in a process group of its own as a shell does."""
    started = []

    def start(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.communicate(timeout=GIVES_UP)


@pytest.mark.parametrize("end", [75, 1, 7, 134, 137, 139, 143, 255, "SIGKILL", "SIGTERM", "SIGHUP"])
def test_what_crashed_or_stopped_and_saved_is_restarted(notes, end):
    assert supervise(ending(notes, end, 0), 20, wait=at_once) == 0
    assert len(lines(notes)) == 2


@pytest.mark.parametrize(
    ("end", "code"),
    [*((code, code) for code in (0, 2, 3, 4, 5, 6, 93, 126, 127, 130, 141)), ("SIGINT", 130), ("SIGPIPE", 141)],
)
def test_what_a_restart_would_not_help_runs_once_and_its_exit_code_is_the_supervisors(notes, end, code):
    assert supervise(ending(notes, end), 20, wait=at_once) == code
    assert len(lines(notes)) == 1


@pytest.mark.parametrize(("end", "code"), [(75, 75), (1, 1), ("SIGKILL", 137)])
def test_it_gives_up_after_so_many_restarts_and_exits_as_the_last_run_did(notes, capfd, end, code):
    assert supervise(ending(notes, 1, end), 3, wait=at_once) == code
    assert len(lines(notes)) == 1 + 3
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 3 + 1
    assert "giving up: --max-restarts allows 3 in a row" in said[-1]


def test_no_restarts_allowed_means_one_run(notes):
    assert supervise(ending(notes, 1), 0, wait=at_once) == 1
    assert len(lines(notes)) == 1


def test_crashes_wait_1_2_4_to_60_seconds():
    assert [wait_before_restart(1, 0.0, crashes) for crashes in (1, 2, 3, 4, 5, 6, 7, 8, 9_999)] == [
        *(1, 2, 4, 8, 16, 32, 60, 60, 60)
    ]


def test_what_stopped_and_saved_goes_on_at_once_unless_that_would_spin():
    assert wait_before_restart(75, 3600.0, 5) == 0
    assert wait_before_restart(75, 0.5, 5) == 1


def test_only_crashes_lengthen_the_wait(notes):
    asked = []
    supervise(
        ending(notes, 1, 1, 75, "SIGKILL", 0), 20, wait=lambda code, seconds, crashes: asked.append((code, crashes)) or 0.0
    )
    assert asked == [(1, 1), (1, 2), (75, 2), (137, 3)]


def test_a_long_run_begins_the_count_and_the_wait_anew(notes):
    asked = []

    def wait(code, seconds, crashes):
        asked.append(crashes)
        return 0.0

    assert supervise(ending(notes, 1, 1, 1, 75, 1, 0), 1, wait=wait, long_run=0.0) == 0
    assert asked == [1, 1, 1, 0, 1]


def test_a_restarted_command_is_told_the_cause_and_a_first_run_is_told_none(notes, monkeypatch):
    monkeypatch.setenv("LUMINA_RESTART_CAUSE", "of another supervisor")
    supervise(ending(notes, "SIGKILL", 75, 0), 20, wait=at_once)
    first, second, third = lines(notes)
    assert first == "unset"
    assert second.startswith("killed by SIGKILL after ")
    assert third.startswith("exit 75: stopped and saved")


@pytest.mark.parametrize(
    ("returncode", "seconds", "cause"),
    [
        (-9, 12.3, "killed by SIGKILL after 12 s (the kernel does that when memory runs out)"),
        (-6, 12.3, "killed by SIGABRT after 12 s (of several processes, JAX ends one so when another is gone)"),
        (-11, 59.6, "killed by SIGSEGV after 1:00"),
        (-35, 1, "killed by signal 35 after 1 s"),
        (1, 182, "crashed with exit code 1 after 3:02"),
        (75, 3723, "exit 75: stopped and saved, after 1:02:03"),
        (137, 1, "crashed with exit code 137 after 1 s, which stands for SIGKILL (the kernel does that when memory runs out)"),
        (139, 1, "crashed with exit code 139 after 1 s, which stands for SIGSEGV"),
        (255, 1, "crashed with exit code 255 after 1 s"),
        (3, 1, "exit 3: refused the config, after 1 s"),
    ],
)
def test_causes_are_in_plain_words(returncode, seconds, cause):
    assert cause_of(returncode, seconds) == cause


def test_death_by_a_signal_is_an_exit_code_as_in_a_shell():
    assert [exit_code(-9), exit_code(-15), exit_code(75)] == [137, 143, 75]


def test_a_restart_is_one_line_with_its_cause_its_number_and_its_time(notes, capfd):
    supervise(ending(notes, 1, 75, 0), 20, wait=lambda code, seconds, crashes: 0.25 if code == 1 else 0.0)
    first, second = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"lumina run: crashed with exit code 1 after \d+ s; restart 1 of 20 in 0\.25 s", first)
    assert re.fullmatch(r"lumina run: exit 75: stopped and saved, after \d+ s; restart 2 of 20 now", second)


def test_what_is_done_needs_no_word_and_what_is_refused_gets_one(notes, capfd):
    supervise(ending(notes, 0), 20)
    assert capfd.readouterr().err == ""
    supervise(ending(notes, 93), 20)
    assert re.fullmatch(r"lumina run: exit 93: asks for no restart, after \d+ s; no restart\n", capfd.readouterr().err)


def test_the_log_has_a_json_line_for_each_end(notes, tmp_path):
    (tmp_path / "log").write_text("from before\n", encoding="utf-8")
    supervise(ending(notes, "SIGKILL", 1, 0), 20, tmp_path / "log", wait=lambda code, seconds, crashes: crashes / 100)
    before, *records = lines(tmp_path / "log")
    assert before == "from before"
    killed, crashed, done = map(json.loads, records)
    assert {name: killed[name] for name in ("exit_code", "signal", "restart", "wait_seconds")} == {
        "exit_code": None,
        "signal": "SIGKILL",
        "restart": 1,
        "wait_seconds": 0.01,
    }
    assert (crashed["exit_code"], crashed["signal"], crashed["restart"]) == (1, None, 2)
    assert (done["exit_code"], done["restart"], done["wait_seconds"]) == (0, None, None)
    assert [killed["cause"], crashed["cause"]] == lines(notes)[1:]
    assert all(record["seconds"] > 0 for record in (killed, crashed, done))
    assert datetime.fromisoformat(done["time"]).utcoffset() == timedelta(0)


def test_a_log_that_fails_later_is_told_once_and_stops_nothing(notes, tmp_path, capfd):
    log = tmp_path / "log"
    breaks_it = (
        "import os, sys\nif os.path.isfile(sys.argv[1]):\n    os.remove(sys.argv[1]); os.mkdir(sys.argv[1])\nsys.exit(1)"
    )
    assert supervise([*PYTHON, breaks_it, str(log)], 3, log, wait=at_once) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if "cannot be written" in line]
    assert told == [f"lumina run: --log = {log}: cannot be written, is a directory; going on without"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError()])
def test_a_stderr_that_fails_stops_nothing(notes, monkeypatch, error):
    class Failing(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stderr", Failing())
    assert supervise(ending(notes, 1, 0), 20, wait=at_once) == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert supervise(ending(notes, 93), 20, wait=at_once) == 93


def test_what_a_crashed_command_left_running_is_killed_before_the_restart(tmp_path, capfd):
    leaves = f"""
import fcntl, os, subprocess, sys, time
lock = open({str(tmp_path / "lock")!r}, "a")
for _ in range(12_000):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
    except BlockingIOError:
        time.sleep(0.05)
else:
    sys.exit(93)
if "LUMINA_RESTART_CAUSE" not in os.environ:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60_000)"], pass_fds=[lock.fileno()])
    sys.exit(1)
"""
    assert supervise([*PYTHON, leaves], 20, wait=at_once) == 0
    assert "lumina run: killed what the command left running" in capfd.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("name", "arrives"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM"), ("SIGUSR1", "SIGTERM")]
)
def test_a_signal_reaches_the_command_as_one_it_knows_and_ends_the_restarts(start, notes, tmp_path, name, arrives):
    process = start(COMMAND_LINE, "run", "--", *PYTHON, LISTENING, str(notes), str(tmp_path / "end"))
    until(lambda: lines(notes) == ["listening"])
    process.send_signal(getattr(signal, name))
    until(lambda: len(lines(notes)) == 2)
    (tmp_path / "end").touch()
    said = process.communicate(timeout=GIVES_UP)[1]
    assert process.returncode == 75
    assert lines(notes) == ["listening", arrives]
    assert f"no restart after {name}" in said


def test_ctrl_c_counts_once_and_the_second_counts_too(start, notes, tmp_path):
    process = start(COMMAND_LINE, "run", "--", *PYTHON, LISTENING, str(notes), str(tmp_path / "end"))
    until(lambda: lines(notes) == ["listening"])
    for count in (1, 2):
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its foreground process group
        until(lambda count=count: len(lines(notes)) == 1 + count)
    process.terminate()  # by then, a further SIGINT would have come
    until(lambda: "SIGTERM" in lines(notes))
    (tmp_path / "end").touch()
    process.communicate(timeout=GIVES_UP)
    assert lines(notes) == ["listening", "SIGINT", "SIGINT", "SIGTERM"]


def test_a_signal_reaches_what_a_shell_script_runs(start, notes, tmp_path):
    script = 'trap "" TERM; "$@"; exit $?'  # a shell without exec, which passes nothing on itself
    listening = [*PYTHON, LISTENING, str(notes), str(tmp_path / "end")]
    process = start(COMMAND_LINE, "run", "--", "/bin/sh", "-c", script, "sh", *listening)
    until(lambda: lines(notes) == ["listening"])
    process.terminate()
    until(lambda: lines(notes) == ["listening", "SIGTERM"])
    (tmp_path / "end").touch()
    process.communicate(timeout=GIVES_UP)
    assert process.returncode == 75


def test_a_signal_that_comes_while_the_command_is_started_is_passed_on(notes, monkeypatch):
    started = subprocess.Popen

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return started(*arguments, **options)

    monkeypatch.setattr(supervisor.subprocess, "Popen", interrupted)
    assert supervise([*PYTHON, "import time; time.sleep(60_000)"], 20, wait=at_once) == 128 + signal.SIGTERM


def test_a_signal_is_sent_no_second_time(monkeypatch):
    sent = []
    send = os.killpg
    monkeypatch.setattr(supervisor.os, "killpg", lambda group, number: sent.append(number) or send(group, number))
    asks_to_be_stopped = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60_000)"
    assert supervise([*PYTHON, asks_to_be_stopped], 20, wait=at_once) == 128 + signal.SIGTERM
    assert sent == [signal.SIGTERM]  # the kernel merges two that are close, so that the command cannot tell


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_wait_ends_it(start, notes, number, code):
    process = start(LONG_WAIT, *ending(notes, 1))
    assert process.stderr.readline().endswith("; restart 1 of 20 in 3600 s\n")
    process.send_signal(number)
    process.communicate(timeout=GIVES_UP)
    assert process.returncode == code
    assert len(lines(notes)) == 1


def test_under_nohup_a_hangup_is_nobodys(start, notes, tmp_path):
    nohup = COMMAND_LINE.replace("main()", "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nmain()")
    process = start(nohup, "run", "--", *PYTHON, LISTENING, str(notes), str(tmp_path / "end"))
    until(lambda: lines(notes) == ["listening"])
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGINT)
    until(lambda: "SIGINT" in lines(notes))
    assert lines(notes) == ["listening", "SIGINT"]
    (tmp_path / "end").touch()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the command runs on without its supervisor")
def test_a_killed_supervisor_takes_its_command_along(start, notes, tmp_path):
    process = start(COMMAND_LINE, "run", "--", *PYTHON, LISTENING, str(notes), str(tmp_path / "end"))
    until(lambda: lines(notes) == ["listening"])
    process.kill()
    until(lambda: lines(notes) == ["listening", "SIGTERM"])
    (tmp_path / "end").touch()


def test_handlers_of_signals_are_given_back(notes):
    before = [signal.getsignal(number) for number in supervisor.STOPS]
    supervise(ending(notes, 0), 20)
    assert [signal.getsignal(number) for number in supervisor.STOPS] == before


def test_the_command_gets_its_arguments_untouched(tmp_path):
    arguments = ["--config.train.steps=5", "--", "--max-restarts", "x", "", "a b", "$HOME", "*", "--help"]
    code = f"import json, sys; json.dump(sys.argv[1:], open({str(tmp_path / 'got')!r}, 'w'))"
    with pytest.raises(SystemExit) as left:
        cli.run(["run", "--max-restarts", "3", "--", *PYTHON, code, *arguments])
    assert left.value.code == 0
    assert json.loads((tmp_path / "got").read_text(encoding="utf-8")) == arguments


def test_the_command_line_reaches_the_supervisor(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(supervisor, "supervise", lambda *arguments: asked.append(arguments) or 7)
    for options in ([], [f"--log={tmp_path / 'log'}", "--max-restarts=3"]):
        with pytest.raises(SystemExit) as left:
            cli.run(["run", *options, "--", "train"])
        assert left.value.code == 7
    assert asked == [(["train"], 20, None), (["train"], 3, tmp_path / "log")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], r"no command; give one after --, as in `lumina run -- python"),
        (["--"], r"no command; give one after --"),
        (["python", "-m", "lumina_jax.train"], r"no command; give one after --"),
        (["--max-restart=3", "--", "true"], r"--max-restart=3: unknown argument .did you mean --max-restarts.*`lumina run "),
        (["--config.train.steps=5", "--", "true"], r"--config.train.steps=5: unknown argument"),
        (["--max-restarts=-1", "--", "true"], r"--max-restarts = -1: must be at least 0"),
        (
            ["--", "no-such-program", "-x"],
            r"'no-such-program': cannot be run, no such file or directory; give a program on PATH",
        ),
        (["--", ""], r"'': cannot be run"),
        (["--", __file__], r"test_supervisor.py': cannot be run, permission denied"),
        (["--log=no/such/file", "--", "true"], r"--log = no/such/file: cannot be written, no such file or directory"),
    ],
)
def test_mistakes_are_refused(arguments, said):
    with pytest.raises(UsageError, match=said):
        cli.run(["run", *arguments])


def test_help_shows_the_usage_and_imports_nothing_heavy():
    code = """
import sys, lumina.cli
try:
    lumina.cli.run(["run", "--help"])
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lumina run [--max-restarts N] [--log FILE] -- COMMAND ARG..." in done.stdout
    assert not {"jax", "numpy", "lumina.runs.supervisor"} & set(done.stderr.split())
