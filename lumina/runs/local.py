"""Several processes of one command on this machine, as one: python -m lumina.runs.local --count 2 -- COMMAND ARG...

Each is told of the others by the variables that `lumina_jax` joins by. `launch/local.sh` is the short way to call it.
"""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock, Thread
from types import FrameType
from typing import BinaryIO

from lumina.arguments import Parser
from lumina.errors import INTERRUPTED, STOPPED_AND_SAVED, UsageError, exit_with
from lumina.runs.supervisor import STOPS, cause_of, exit_code, stop_without_parent

PLATFORMS = ("cpu", "gpu")
GRACE = 30.0  # seconds for the others when one has ended badly; they may be waiting for it, and deaf to signals

_WRITING = Lock()


def together(
    command: list[str], count: int, platform: str = "cpu", port: int = 0, logs: Path | None = None, grace: float = GRACE
) -> int:
    """Run `count` processes of `command` to their end; returns one exit code for all.

    It is that of the first to end badly, else 75 if any stopped and saved, else 0. When one ends badly the others are asked to
    end, and killed after `grace` seconds. Requests to stop are passed on to all; a SIGINT after another kills. Port 0 takes one
    that is free. A line of output begins with its process's number, or goes to `logs`/process-NUMBER.log. Raises UsageError.
    """
    children: list[subprocess.Popen[bytes]] = []
    with reserved_port(port) as port, _passing_on(children) as stops:
        address = f"127.0.0.1:{port}"
        try:
            for number in range(count):
                children.append(_start(command, _place(number, count, platform, address), logs, number))
                if stops.asked:  # came before this one was there to hear it
                    _send(children, signal.SIGTERM)
            tellers = _tell(children) if logs is None else []
            code = _until_all_end(children, grace)
            for teller in tellers:
                teller.join(timeout=5)  # what a process has left running may hold its output open
        finally:
            _send(children, signal.SIGKILL)
            for child in children:
                child.wait()
        return INTERRUPTED if stops.at_once else code


def _place(number: int, count: int, platform: str, address: str) -> dict[str, str]:
    """The environment of process `number`: on `cpu` it has the processor's devices, on `gpu` the GPU of its number."""
    device = {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {"JAX_LOCAL_DEVICE_IDS": str(number)}
    joins = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(number)}
    return {**os.environ, **device, **joins}


def _start(command: list[str], environment: dict[str, str], logs: Path | None, number: int) -> "subprocess.Popen[bytes]":
    with contextlib.ExitStack() as opened:
        try:
            out = subprocess.PIPE if logs is None else opened.enter_context((logs / f"process-{number}.log").open("ab"))
            # No session of its own: what kills this program's process group kills these as well.
            return subprocess.Popen(  # noqa: S603, to run what the user asks for is the purpose
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out if logs is None else subprocess.STDOUT,
                preexec_fn=stop_without_parent,
            )
        except OSError as error:
            raise UsageError(
                f"{error.filename}: {(error.strerror or str(error)).lower()}; it must be a program or a log"
            ) from error


def _until_all_end(children: "list[subprocess.Popen[bytes]]", grace: float) -> int:
    began, ends = time.monotonic(), queue.SimpleQueue[int]()
    for number, child in enumerate(children):
        Thread(target=_report, args=(number, child, ends), daemon=True).start()
    code, until = 0, None
    for _ in children:
        ended_now = _next(ends, until)
        if ended_now is None:
            _say(f"the others have not ended in {grace:g} s: killed")
            _send(children, signal.SIGKILL)
            until = None
        number = ends.get() if ended_now is None else ended_now
        ended = exit_code(children[number].returncode)
        if ended == STOPPED_AND_SAVED:
            code = code or ended
        elif ended and code in (0, STOPPED_AND_SAVED):
            code, until = ended, time.monotonic() + grace
            _say(f"process {number}: {cause_of(children[number].returncode, time.monotonic() - began)}; ending the others")
            _send(children, signal.SIGTERM)
    return code


def _next(ends: "queue.SimpleQueue[int]", until: float | None) -> int | None:
    """The next process that ends; None where none has until then."""
    while until is None or time.monotonic() < until:
        # A signal that comes just before a wait is heard only after it: so no wait is for ever.
        with contextlib.suppress(queue.Empty):
            return ends.get(timeout=0.5 if until is None else min(0.5, max(0.0, until - time.monotonic())))
    return None


def _report(number: int, child: "subprocess.Popen[bytes]", ends: "queue.SimpleQueue[int]") -> None:
    child.wait()
    ends.put(number)


def _tell(children: "list[subprocess.Popen[bytes]]") -> list[Thread]:
    """Threads that write each line behind the number of the process that it is from."""
    threads = []
    for number, child in enumerate(children):
        for source, to in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer)):
            threads.append(Thread(target=_prefix, args=(f"[{number}] ".encode(), source, to), daemon=True))
            threads[-1].start()
    return threads


def _prefix(prefix: bytes, source: BinaryIO, to: BinaryIO) -> None:
    with source, contextlib.suppress(OSError):  # nobody reads: closed, so that the process learns of it as it would alone
        for line in source:
            with _WRITING:
                to.write(prefix + line.rstrip(b"\n") + b"\n")
                to.flush()


class _Stops:
    """Passes requests to stop on to all processes."""

    def __init__(self, children: "list[subprocess.Popen[bytes]]"):
        self.children = children
        self.asked = self.at_once = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.at_once = self.at_once or (self.asked and number == signal.SIGINT)
        self.asked = True
        # Never as SIGINT: a terminal and `lumina run` send it to these processes too, and a second one loses what is not saved.
        _send(self.children, signal.SIGKILL if self.at_once else signal.SIGTERM)


@contextlib.contextmanager
def _passing_on(children: "list[subprocess.Popen[bytes]]") -> Iterator[_Stops]:
    stops = _Stops(children)
    before = {number: old for number in STOPS if (old := signal.getsignal(number)) != signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, stops)
        yield stops
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _send(children: "list[subprocess.Popen[bytes]]", number: int) -> None:
    for child in children:
        child.send_signal(number)  # none to one that has ended


@contextlib.contextmanager
def reserved_port(port: int = 0) -> Iterator[int]:
    """This port; for 0 one that is free, and that Linux gives to nobody else who asks for any while this lasts.

    Who is to listen there asks for it by its number: SO_REUSEADDR on both sides allows that, as nobody listens here.
    """
    with socket.socket() as probe:
        if not port:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if sys.platform != "linux":  # elsewhere this socket, which nobody listens on, is what others would connect to
            probe.close()
        yield port


def _say(text: str) -> None:
    with contextlib.suppress(OSError), _WRITING:
        print(f"lumina local: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of `python -m lumina.runs.local`."""
    parser = Parser(prog="python -m lumina.runs.local", description=__doc__)
    parser.add_argument("--count", type=int, required=True, metavar="N", help="processes")
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu", help="cpu, or gpu: one process a GPU (default: cpu)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="where process 0 listens (default: any that is free)")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="a file for each process, instead of prefixes")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    given = parser.parse_args()
    if given.count < 1 or not 0 <= given.port < 65536:
        raise UsageError(f"--count {given.count} --port {given.port}: must be at least 1, and 0 to 65535")
    if given.logs:
        given.logs.mkdir(parents=True, exist_ok=True)
    sys.exit(together(given.command, given.count, given.platform, given.port, given.logs))


if __name__ == "__main__":
    exit_with(main)
