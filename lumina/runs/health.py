"""Stopping on request, and ending what hangs."""

import contextlib
import faulthandler
import os
import signal
import sys
from types import FrameType
from typing import Any

from lumina.errors import INTERRUPTED

# SLURM warns with SIGUSR1; a terminal that closes hangs up.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """A signal asks the loop to finish its step, save and leave; SIGINT after that leaves at once.

    A context manager: before and after it, signals do what they do by default. One that is ignored, as by nohup, stays so.
    """

    def __init__(self) -> None:
        self.signal: str | None = None  # what asked, once something has
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            _write("left at once; the newest checkpoint stands")
            os._exit(INTERRUPTED)  # no waiting for threads, saves or other processes
        if self.signal is None:
            self.signal = signal.Signals(number).name
            _write(f"{self.signal}: finishing the step and saving; Ctrl-C leaves at once")


class Watchdog:
    """Ends the process, exit code 1 and every thread's stack on stderr, when `alive` was not called for `seconds`.

    The clock runs in a thread of faulthandler's that needs no interpreter lock, so a hang inside C code that holds it ends too.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds  # 0 is off
        self._counts = False
        if seconds > 0:
            signal.signal(signal.SIGTSTP, self._suspend)

    def alive(self) -> None:
        """Begin counting anew."""
        if self.seconds > 0:
            self._counts = True
            faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__ or 2)

    def rest(self) -> None:
        """Stop counting."""
        self._counts = False
        faulthandler.cancel_dump_traceback_later()

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the time until `fg` is not a hang."""
        faulthandler.cancel_dump_traceback_later()
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._counts:
            self.alive()


def _write(line: str) -> None:
    """To stderr from a signal handler, where a buffered stream may be in use already."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
