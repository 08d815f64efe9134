"""A trainer with a fault planted in it, as a forked process: a fork costs no imports, and is the real trainer all the same.

A fault is a dictionary. Where: `step`, just before that step is dispatched, in the main thread; `batch`, the steps whose
batches are changed; `save`, when the checkpoint of a step at or after this one is begun; `at`: `start`. What: `do`.
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

PR_SET_PDEATHSIG = 1
DAY = 86_400.0
Fault = dict[str, Any]


def load() -> None:
    """Import what a trainer imports, and start nothing: a process that forks must have no threads and no backend."""
    import grain  # noqa: F401
    import tensorboardX.event_file_writer
    import tensorboardX.summary  # noqa: F401

    import lumina.runs.loop  # noqa: F401
    import lumina_jax.checkpoint
    import lumina_jax.device
    import lumina_jax.evaluate
    import lumina_jax.generate
    import lumina_jax.train

    lumina_jax.device.matmul_peak = lambda dtype: 1e12  # a second of each start, and only a figure on the screen
    from jax._src import xla_bridge

    assert not xla_bridge._backends, "a backend was started before the fork"
    gc.freeze()  # a child need not look through all that was imported


class Trainer:
    """`python -m lumina_jax.train ARGUMENTS` in a process of its own; killed when this process ends.

    With a fault that says `hold`, the trainer waits at that place until `release`; `held` tells when it is there.
    """

    live: ClassVar[set["Trainer"]] = set()

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        faults: list[Fault] = (),
        environment: dict[str, str] | None = None,
        command: list[str] | None = None,
    ):
        """`command`, such as [python, -m, lumina_jax.train], is started anew instead; then there can be no faults."""
        self.log, self.code = log, None
        ready, go = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become_trainer(arguments, log, faults, environment or {}, command, (ready[1], go[0]), (ready[0], go[1]))
        os.close(ready[1])
        os.close(go[0])
        self._ready, self._go = ready[0], go[1]
        Trainer.live.add(self)

    def poll(self) -> int | None:
        """The exit code, or minus the signal, once the process has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended(status)
        return self.code

    def ended(self, status: int) -> None:
        """Take note of the status that waitpid gave; what the process started ends with it."""
        self.code = os.waitstatus_to_exitcode(status)
        Trainer.live.discard(self)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self._ready)
        os.close(self._go)

    def wait(self, seconds: float = 120.0) -> int:
        """The exit code; a trainer that has not ended by then is killed, and TimeoutError raised."""
        if not self.until(lambda: False, seconds) and self.code is None:
            self.kill(signal.SIGUSR1)  # its stacks
            self.until(lambda: False, 0.5)
            self.kill()
            raise TimeoutError(f"did not end within {seconds:.0f} s: ...{self.output()[-5000:]}")
        return self.code

    def until(self, holds: Callable[[], Any], seconds: float = 120.0) -> bool:
        """Wait until `holds`; False when the process has ended, or the time is over, before it did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if holds():
                return True
            if self.poll() is not None:
                return False
            time.sleep(0.005)
        return False

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)
            if number == signal.SIGKILL:
                self.ended(os.waitpid(self.pid, 0)[1])

    def held(self, seconds: float = 120.0) -> None:
        """Until the trainer has come to the place where it is to be held."""
        os.set_blocking(self._ready, False)

        def there() -> bool:
            try:
                return os.read(self._ready, 1) == b"."
            except BlockingIOError:
                return False

        if not self.until(there, seconds):
            raise TimeoutError(f"never came to where it was to be held: {self.output()[-1500:]}")

    def release(self) -> None:
        os.write(self._go, b".")

    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _become_trainer(
    arguments: list[str],
    log: Path,
    faults: list[Fault],
    environment: dict[str, str],
    command: list[str] | None,
    own: tuple[int, int],
    others: tuple[int, int],
) -> None:
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for fd in others:
            os.close(fd)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, wanted in ((null, 0), (output, 1), (output, 2)):
            os.dup2(fd, wanted)
        for stream, fd in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            text = os.fdopen(os.dup(fd) if fd == 0 else fd, "r" if fd == 0 else "w", closefd=False)
            setattr(sys, stream, text)
            setattr(sys, f"__{stream}__", text)
        os.environ.update(environment)
        if command:
            os.execvp(command[0], [*command, *arguments])  # noqa: S606
        faulthandler.register(signal.SIGUSR1)
        sys.argv = ["lumina_jax.train", *arguments]
        from lumina.errors import exit_with
        from lumina_jax.train import main

        def main_with_faults() -> None:
            _plant(faults, own)
            main()

        try:
            exit_with(main_with_faults)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # as the interpreter does at the end of a program
        sys.excepthook(*sys.exc_info())
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# ------------------------------------------------------------------------------------------------------------- planting


def _plant(faults: list[Fault], pipes: tuple[int, int]) -> None:
    import lumina.runs.loop
    from lumina.data.rows import Batches
    from lumina_jax.checkpoint import Checkpoints

    at_step = [fault for fault in faults if "step" in fault]
    if at_step:
        prefetch = lumina.runs.loop.prefetch

        def faulty_prefetch(*arguments: Any) -> Iterator[Any]:
            for number, batch in prefetch(*arguments):
                for fault in at_step:
                    if fault["step"] == number + 1:
                        _do(fault, pipes)
                yield number, batch

        lumina.runs.loop.prefetch = faulty_prefetch
    if at_save := [fault for fault in faults if "save" in fault]:
        save = Checkpoints.save

        def faulty_save(self: Any, step: int, *arguments: Any) -> None:
            for fault in list(at_save):
                if step >= fault["save"]:
                    at_save.remove(fault)
                    _do(fault, pipes)
            save(self, step, *arguments)

        Checkpoints.save = faulty_save
    for fault in faults:
        if "batch" in fault:
            Batches.batch = _faulty_batch(Batches.batch, fault)
        if "passes_over" in fault:
            from lumina.runs.progress import Progress

            Progress.passes_over = lambda self, step, those=tuple(fault["passes_over"]): step in those
        if fault.get("at") == "start":
            _do(fault, pipes)


def _faulty_batch(batch_of: Callable, fault: Fault) -> Callable:
    def faulty(self: Any, step: int) -> dict[str, np.ndarray]:
        batch = batch_of(self, step)
        if step + 1 not in fault["batch"]:
            return batch
        if fault["do"] == "nan":
            batch["weights"][0, 0] = np.nan
        elif fault["do"] == "random tokens":
            random = np.random.default_rng(step)
            batch["targets"] = random.integers(0, 256, batch["targets"].shape).astype(np.int32)
        elif fault["do"] == "hang with the interpreter lock":
            ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the interpreter lock
        return batch

    return faulty


def _do(fault: Fault, pipes: tuple[int, int]) -> None:
    if after := fault.get("after"):  # something that a background thread is still about to write
        end = time.monotonic() + 60
        while not Path(after).exists() and time.monotonic() < end:
            time.sleep(0.005)
    what = fault["do"]
    if what == "hold":
        os.write(pipes[0], b".")
        os.read(pipes[1], 1)
    elif what == "signal":
        os.kill(os.getpid(), fault["signal"])
    elif what == "raise":
        raise RuntimeError("planted")
    elif what == "clock":
        now, monotonic_free = time.time, fault["seconds"]
        time.time = lambda: now() + monotonic_free
    elif what == "touch":
        Path(fault["path"]).touch()
    elif what == "memory":
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        limit = used + fault["bytes"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    elif what == "memory error":
        raise MemoryError
    elif what == "file size":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
    else:
        raise ValueError(what)
