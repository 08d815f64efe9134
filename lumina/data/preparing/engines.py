"""What makes the units of a preparation: this process, several of them, or a Ray cluster. Results come in any order."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for

from lumina.data.extras import need
from lumina.data.preparing.tokenise import Account, Job, tokenise
from lumina.data.reading.readers import Unit
from lumina.errors import UsageError
from lumina.runs.health import STOPPING

ENGINES = ("local", "ray")
TICK_SECONDS = 1.0  # nothing is yielded for longer, so that progress can be shown
AHEAD = 2  # units a worker has waiting


def run(units: list[Unit], job: Job, workers: int, engine: str) -> Iterator[tuple[Unit, Account] | None]:
    """Each unit with its account, as it is made; None where nothing was for a second. `workers` 0: in this process."""
    if engine == "ray":
        return _on_ray(units, job)
    return _in_processes(units, job, workers) if workers else ((unit, tokenise(unit, job, threads=True)) for unit in units)


def _in_processes(units: list[Unit], job: Job, workers: int) -> Iterator[tuple[Unit, Account] | None]:
    waiting = iter(units)
    running: dict[Future[Account], Unit] = {}
    # Not forked: a fork of a process with threads, such as a trainer's, may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin)
    try:
        while True:
            for unit in waiting:
                running[pool.submit(tokenise, unit, job)] = unit
                if len(running) >= workers * AHEAD:
                    break
            if not running:
                return
            done, _ = wait(running, TICK_SECONDS, FIRST_COMPLETED)
            if not done:
                yield None
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        works = "the same command goes on; with fewer --workers if memory ran out"
        raise UsageError(f"a worker process was killed; what is done is kept: {works}") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """In a worker: signals are for the first process, and without that there is nothing to do."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _on_ray(units: list[Unit], job: Job) -> Iterator[tuple[Unit, Account] | None]:
    """On the cluster of RAY_ADDRESS, or a local one. All its machines see the sources and the output under the same paths."""
    ray = need("ray", "--engine ray", "ray")
    ray.init(ignore_reinit_error=True, log_to_driver=False, include_dashboard=False)
    remote = ray.remote(max_retries=2)(tokenise)
    most = max(int(ray.cluster_resources().get("CPU", 1)) * AHEAD, 1)
    waiting, running = iter(units), {}
    try:
        while True:
            for unit in waiting:
                running[remote.remote(unit, job)] = unit
                if len(running) >= most:
                    break
            if not running:
                return
            done, _ = ray.wait(list(running), timeout=TICK_SECONDS)
            if not done:
                yield None
            for reference in done:
                yield running.pop(reference), ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # its own words are of many lines
        raise error.cause from None
    finally:
        ray.shutdown()
