"""`lumina run`: starts a command, and starts it again for as long as that can help."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from lumina import errors
from lumina.runs.units import duration

RESTART_CAUSE = "LUMINA_RESTART_CAUSE"  # tells a restarted trainer why it was, for its run directory
LONG_RUN = 600.0  # seconds; what ran for longer had recovered, and its next crash is the first of a new row
SHORT_RUN = 10.0  # seconds; what stops sooner than this, time and again, must not do so in a spin
LONGEST_WAIT = 60.0

# Exit codes after which a restart would meet the same again, or nobody wants one. All others but 75 are crashes.
FINAL = {
    0: "done",
    errors.UsageError.exit_code: "refused the command line",
    errors.ConfigError.exit_code: "refused the config",
    errors.DataError.exit_code: "refused the data",
    errors.CheckpointError.exit_code: "refused a checkpoint",
    errors.NOT_CAUSAL: "found the run not causal",
    errors.DO_NOT_RETRY: "asks for no restart",
    126: "a program could not be run",  # so say shells, and programs that start others
    127: "a program was not found",
    errors.INTERRUPTED: "interrupted",
    errors.OUTPUT_CLOSED: "nobody reads its output",
}

# What is most often behind a death by a signal.
REASONS: dict[int, str] = {
    signal.SIGKILL: " (the kernel does that when memory runs out)",
    signal.SIGABRT: " (of several processes, JAX ends one so when another is gone)",
}

# Requests to stop, and as what they are passed on. A terminal that is gone (SIGHUP) and the warning before the end that SLURM's
# --signal=USR1@120 asks for would end a trainer unsaved, which knows the other two alone.
STOPS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGTERM,
}

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def wait_before_restart(code: int, seconds: float, crashes: int) -> float:
    """Seconds to wait after a run of `seconds` that ended with `code`, the last of so many `crashes` in a row."""
    if code == errors.STOPPED_AND_SAVED:
        return 1.0 if seconds < SHORT_RUN else 0.0
    return min(LONGEST_WAIT, 2.0 ** min(crashes - 1, 6))


def supervise(
    command: list[str],
    max_restarts: int,
    log: Path | None = None,
    wait: Callable[[int, float, int], float] = wait_before_restart,
    long_run: float = LONG_RUN,
) -> int:
    """Run `command`, again after each crash and each stop with 75; returns the exit code of its last run.

    `wait` and `long_run` (seconds) are other than these in tests. Raises UsageError if the command cannot be run, or `log` not
    be opened when it begins.
    """
    ends = _Log(log)
    restarts = crashes = 0
    cause: str | None = None
    with _passing_on() as signals:
        while True:
            began = time.monotonic()
            child = _run(command, cause, signals)
            seconds = time.monotonic() - began
            code, cause = exit_code(child.returncode), cause_of(child.returncode, seconds)
            if seconds > long_run:
                restarts = crashes = 0
            if why := _why_not(code, signals.first, restarts, max_restarts):
                ends.append(cause, child.returncode, seconds, None, None)
                if code:  # what is done says so itself
                    _say(f"{cause}; {why}")
                return code
            restarts += 1
            crashes += code != errors.STOPPED_AND_SAVED
            pause = wait(code, seconds, crashes)
            ends.append(cause, child.returncode, seconds, restarts, pause)
            _say(f"{cause}; restart {restarts} of {max_restarts} {f'in {pause:g} s' if pause else 'now'}")
            if _send(child.pid, signal.SIGKILL):  # it may hold the GPU's memory, or the run directory's lock
                _say("killed what the command left running")
            _sleep(pause, signals)
            if signals.first:
                _say(f"{_name(signals.first)}; no restart")
                return 128 + signals.first


def exit_code(returncode: int) -> int:
    """A process's `returncode` as shells tell of it: 137 where SIGKILL ended it."""
    return 128 - returncode if returncode < 0 else returncode


def cause_of(returncode: int, seconds: float) -> str:
    """How a run of `seconds` ended, in plain words."""
    after = "after " + (f"{seconds:.0f} s" if round(seconds) < 60 else duration(seconds))
    code = exit_code(returncode)
    why = REASONS.get(code - 128, "")
    if returncode < 0:
        return f"killed by {_name(-returncode)} {after}{why}"
    if code == errors.STOPPED_AND_SAVED:
        return f"exit {code}: stopped and saved, {after}"
    if code in FINAL:
        return f"exit {code}: {FINAL[code]}, {after}"
    of_signal = f", which stands for {_name(code - 128)}{why}" if code - 128 in set(signal.Signals) else ""
    return f"crashed with exit code {code} {after}{of_signal}"


def _why_not(code: int, stop: int, restarts: int, max_restarts: int) -> str:
    """Why a run that ended with `code` is the last, or nothing if it is not."""
    if stop:
        return f"no restart after {_name(stop)}"
    if code in FINAL:
        return "no restart"
    if restarts >= max_restarts:
        return f"giving up: --max-restarts allows {max_restarts} in a row"
    return ""


def _run(command: list[str], cause: str | None, signals: "_Signals") -> subprocess.Popen:
    """A run of `command`, when it has ended."""
    environment = {name: value for name, value in os.environ.items() if name != RESTART_CAUSE}
    if cause is not None:
        environment[RESTART_CAUSE] = cause
    try:
        # A session of its own: Ctrl-C reaches it through the supervisor alone, so once. A trainer takes a second for: at once.
        child = subprocess.Popen(  # noqa: S603, to run what the user asks for is the purpose
            command, env=environment, start_new_session=True, preexec_fn=stop_without_parent if _LIBC else None
        )
    except OSError as error:
        raise errors.UsageError(
            f"{command[0]!r}: cannot be run, {_reason(error)}; give a program on PATH, or the path of an executable file"
        ) from error
    signals.attach(child.pid)
    child.wait()
    signals.detach()
    return child


def stop_without_parent() -> None:
    """In the child, before it becomes the command: let Linux send it SIGTERM when the supervisor is killed.

    Python code between fork and exec is safe here, since the supervisor has a single thread.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


class _Signals:
    """Passes each signal on to the command's process group, once, and remembers which came first."""

    def __init__(self) -> None:
        self.first = 0
        self._group = 0
        self._early: list[int] = []  # those that came while the command was being started

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or number
        passed_on = STOPS[signal.Signals(number)]
        if self._group:
            _send(self._group, passed_on)
        else:
            self._early.append(passed_on)

    def attach(self, group: int) -> None:
        self._group = group
        while self._early:
            _send(group, self._early.pop(0))

    def detach(self) -> None:
        self._group = 0


@contextlib.contextmanager
def _passing_on() -> Iterator[_Signals]:
    signals = _Signals()
    # What is ignored stays so, for the command as well: that is how nohup works.
    before = {number: old for number in STOPS if (old := signal.getsignal(number)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, signals)
        yield signals
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _send(group: int, number: int) -> bool:
    """Whether there was a process in the group to send the signal to."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS answers the second for a group of which only a zombie is left
        return False
    return True


def _sleep(seconds: float, signals: _Signals) -> None:
    end = time.monotonic() + seconds
    while not signals.first and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))  # in pieces, since Python sleeps on after a signal


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _say(text: str) -> None:
    # A full disk, a terminal that is gone or no stderr at all (None) is no reason to leave the command alone.
    with contextlib.suppress(OSError, AttributeError):
        below = "\n" if sys.stderr.isatty() else ""  # the trainer's live line, which shows the step it came to
        print(f"{below}lumina run: {text}", file=sys.stderr, flush=True)


class _Log:
    """A JSON line for each end of the command."""

    def __init__(self, path: Path | None):
        self.path = path
        self._told = False
        if path is not None:
            try:
                path.open("a").close()
            except OSError as error:
                raise errors.UsageError(f"--log = {path}: cannot be written, {_reason(error)}; give another file") from error

    def append(self, cause: str, returncode: int, seconds: float, restart: int | None, wait: float | None) -> None:
        """`restart` and `wait` (seconds) are None at the last end."""
        if self.path is None:
            return
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "cause": cause,
            "exit_code": returncode if returncode >= 0 else None,
            "signal": _name(-returncode) if returncode < 0 else None,
            "seconds": round(seconds, 3),
            "restart": restart,
            "wait_seconds": wait,
        }
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self._told:
                _say(f"--log = {self.path}: cannot be written, {_reason(error)}; going on without")
            self._told = True


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
