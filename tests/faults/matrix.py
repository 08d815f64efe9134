"""Try every fault that the trainer claims to survive, and let the ledger say whether anything was lost: make faults [ARGS=kill]

One line a row: what was tried, how often, and the verdict. Exits 1 when a row lost something. See docs/faults.md.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # halves compiling
    "PYTHONPATH": str(ROOT),
}


class Row(NamedTuple):
    """A fault, and the function that tries it: row(trial, part, parts) -> what was done, in words."""

    name: str
    act: Callable[[Any, int, int], str]
    parts: int = 1  # that may be tried side by side


def rows() -> list[Row]:
    from tests.faults import batches, disks, kills, processes

    return [
        Row("kill -9 at every instant of a save and a deletion", kills.kill_at_every_instant, 2),
        Row("kill -9 at random instants", kills.kill_at_random_instants, 2),
        Row("damaged checkpoints", disks.damaged_checkpoints),
        Row("disk full in a save", disks.full_disk),
        Row("disk full for metrics, ledger, events", disks.full_disk_for_the_log),
        Row("EIO at every fsync, rename, unlink of a save", disks.errors_of_sync_and_rename),
        Row("ENOSPC at every write of a save", disks.errors_of_write),
        Row("read-only run directory", disks.read_only),
        Row("half lines and garbage in ledger and metrics", disks.half_lines),
        Row("SIGTERM and SIGINT, once and twice", processes.signals),
        Row("SIGTERM to one of two processes", processes.two_processes),
        Row("SIGSTOP and kill -9 of one of two processes", processes.one_of_two),
        Row("kill -9 of a data worker", processes.killed_worker),
        Row("corrupt token shard", batches.corrupt_shard),
        Row("NaN batches", batches.nan_batches),
        Row("loss spikes", batches.spikes),
        Row("clock jumps", batches.clock_jumps),
        Row("4, 2, 1 devices and two micro-batches", batches.devices),
        Row("batch size 8 to 16", batches.batch_size),
        Row("another config, data, tokenizer", batches.changed),
        Row("two trainers on one directory", processes.second_trainer),
        Row("hang with the interpreter lock held", processes.hang_with_interpreter_lock),
        Row("out of memory", processes.out_of_memory),
        Row("unexpected exception", processes.unexpected_exception),
        Row("kill -9 under lumina run", processes.supervised),
    ]


# --------------------------------------------------------------------------------------------------------------- trying


def prepare(kit: Path) -> None:
    """The config of all rows, and the runs that no fault meets."""
    from lumina.config import save
    from lumina.runs.directory import RunDirectory
    from tests.faults.trial import EVERY, HUNDRED, STEPS, Trial
    from tests.lumina_jax.tiny import tiny

    config = tiny("moe+mod", model={"num_layers": 1, "dropout": 0.1}, steps=STEPS, eval_every=6, eval_rows=8)
    config.data.source, config.checkpoint.every = "synthetic", EVERY
    config.monitor.log_every, config.monitor.sample_tokens, config.mesh.data = 1, 1, -1
    kit.mkdir()
    save(config, kit / "config.json")
    trial = Trial(kit, kit)
    trial.train(trial.reference)
    trial.train(trial.hundred, *HUNDRED, "--config.checkpoint.every=10")
    killed = {"step": 9, "after": str(trial.six / "checkpoints" / "6"), "do": "signal", "signal": signal.SIGKILL}
    trial.train(RunDirectory(trial.six), faults=[killed], code=-signal.SIGKILL)


def work(tasks: list[tuple[Row, int]], scratch: Path, orders: Connection) -> None:
    """A worker: for each number that it is given, that part of a row; answers (verdict, says, trials, seconds)."""
    from tests.faults import faulty
    from tests.faults.trial import LostError, NotRunError, Trial

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        while (number := orders.recv()) is not None:
            began, says, trials = time.monotonic(), "", 0
            try:
                if number < 0:
                    verdict = "nothing lost"
                    prepare(scratch / "kit")
                else:
                    row, part = tasks[number]
                    trial = Trial(scratch / f"row-{number}", scratch / "kit")
                    try:
                        says, verdict = row.act(trial, part, row.parts), "nothing lost"
                    finally:
                        trials = trial.trials
                        end_all(faulty.Trainer.live)
            except NotRunError as error:
                verdict, says = "not run", str(error)
            except LostError as error:
                verdict, says = "LOST", str(error)
            except Exception:  # a mistake in the row counts as a failure of the row
                verdict, says = "LOST", traceback.format_exc()
            if number >= 0 and verdict != "LOST":
                shutil.rmtree(scratch / f"row-{number}", ignore_errors=True)
            orders.send((verdict, says, trials, time.monotonic() - began))
    except EOFError:
        pass
    finally:
        end_all(faulty.Trainer.live)


def end_all(live: set[Any]) -> None:
    for trainer in list(live):
        trainer.kill()


class Workers:
    """Forked processes that know all the rows; killed when this ends, and so are their trainers."""

    def __init__(self, tasks: list[tuple[Row, int]], scratch: Path):
        self.pids: dict[Connection, int] = {}
        for _ in range(WORKERS):
            here, there = Pipe()
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    here.close()
                    for other in self.pids:
                        other.close()
                    work(tasks, scratch, there)
                    code = 0
                finally:
                    os._exit(code)
            there.close()
            self.pids[here] = pid

    def close(self) -> None:
        for pid in self.pids.values():
            os.kill(pid, signal.SIGTERM)
        for pid in self.pids.values():
            os.waitpid(pid, 0)


def run_all(chosen: list[Row], scratch: Path, tell: Callable[[Row, str, str, int, float], None]) -> None:
    """Every row, each told of when its last part is done."""
    tasks = [(row, part) for row in chosen for part in range(row.parts)]
    found: dict[str, list[tuple[str, str, int, float]]] = {row.name: [] for row in chosen}
    workers = Workers(tasks, scratch)
    try:
        first, *others = workers.pids
        first.send(-1)
        verdict, says, _, _ = first.recv()
        if verdict != "nothing lost":
            raise SystemExit(f"error: the runs without a fault did not succeed: {says}")
        waiting, busy = list(range(len(tasks))), {}
        idle = [first, *others]
        while waiting or busy:
            while waiting and idle:
                busy[worker := idle.pop()] = waiting.pop(0)
                worker.send(busy[worker])
            for worker in wait(list(busy)):
                try:
                    answer = worker.recv()
                except EOFError:
                    raise SystemExit(f"error: the worker at {tasks[busy[worker]][0].name!r} died") from None
                row, _ = tasks[busy.pop(worker)]
                idle.append(worker)
                parts = found[row.name]
                parts.append(answer)
                if len(parts) == row.parts:
                    worst = next((v for v in ("LOST", "not run") if any(p[0] == v for p in parts)), "nothing lost")
                    says = "; ".join(p[1] for p in parts if p[0] == worst and p[1])
                    tell(row, worst, says, sum(p[2] for p in parts), sum(p[3] for p in parts))
    finally:
        workers.close()


def main() -> int:
    """Try the rows whose name contains the argument; print a line each."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("part", nargs="*", help="tries the rows whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a row")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--keep", action="store_true", help="keep the directories of rows that lost something")
    arguments = parser.parse_args()
    part = " ".join(arguments.part)
    chosen = [row for row in rows() if part in row.name]
    if not chosen:
        sys.exit(f"error: no row has {part!r} in its name; there are: {'; '.join(row.name for row in rows())}")
    if arguments.list:
        print("\n".join(row.name for row in chosen))
        return 0
    began, verdicts = time.monotonic(), []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = Path(tempfile.mkdtemp(prefix="lumina-faults-"))

    def tell(row: Row, verdict: str, says: str, trials: int, seconds: float) -> None:
        verdicts.append(verdict)
        if arguments.json:
            record = {"row": row.name, "verdict": verdict, "says": says, "trials": trials, "seconds": round(seconds, 1)}
            print(json.dumps(record), flush=True)
        else:
            print(f"{row.name:<62} {verdict:<12} {trials:>4} trials {seconds:>5.0f} s  {says}", flush=True)

    try:
        caches = {"JAX_COMPILATION_CACHE_DIR": str(scratch / "jax"), "LUMINA_CACHE": str(scratch / "cache")}
        os.environ.update(ENVIRONMENT | caches)
        sys.path.insert(0, str(ROOT))
        from tests.faults import faulty

        faulty.load()
        run_all(chosen, scratch, tell)
    finally:
        if not (arguments.keep and "LOST" in verdicts):
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            print(f"kept: {scratch}", file=sys.stderr)
    counts = {verdict: verdicts.count(verdict) for verdict in ("nothing lost", "LOST", "not run")}
    if not arguments.json:
        print(
            f"{len(chosen)} rows in {time.monotonic() - began:.0f} s: {counts['nothing lost']} lost nothing, "
            f"{counts['LOST']} LOST SOMETHING, {counts['not run']} NOT RUN"
        )
    return 1 if counts["LOST"] else 0


if __name__ == "__main__":
    sys.exit(main())
