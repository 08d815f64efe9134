"""Rows of the fault matrix: signals, hangs, memory, exceptions, several processes, data workers, two trainers, `lumina run`."""

import os
import signal
import socket
from pathlib import Path

from lumina.runs.directory import RunDirectory
from tests.faults.faulty import Trainer
from tests.faults.trial import HUNDRED, PYTHON, Trial, events, last_line, ledger, parameters, require, tree, whole

TRAIN = [*PYTHON, "lumina_jax.train"]


def signals(trial: Trial, part: int, parts: int) -> str:
    """SIGTERM and SIGINT, once and twice, in the loop, in a save and while it starts."""
    term, interrupt = ({"do": "signal", "signal": number} for number in (signal.SIGTERM, signal.SIGINT))
    cases = {
        "SIGTERM": ([term | {"step": 5}], 75),
        "SIGTERM twice": ([term | {"step": 5}, term | {"save": 5}], 75),
        "SIGINT": ([interrupt | {"step": 5}], 75),
        "SIGINT twice": ([interrupt | {"step": 5}, interrupt | {"save": 5}], 130),
        "SIGINT in the last step": ([interrupt | {"step": 12}], 0),
        "SIGTERM at the start": ([term | {"at": "start"}], -signal.SIGTERM),
        "SIGINT at the start": ([interrupt | {"at": "start"}], 130),
    }
    for name, (faults, code) in cases.items():
        run = trial.run(name.replace(" ", "-"))
        trial.train(run, faults=faults, code=code)
        require(code != 75 or whole(run) == [3, 5], f"{name}: {whole(run)}, and 5 was asked for")
        trial.train(run)
        trial.nothing_lost(run)
        trial.trials += 1
    for pause in (1.0, 2.0):  # while the step is compiled, and such
        run = trial.run(f"pause-{pause}")
        trainer = trial.start(run)
        trainer.until(lambda: False, pause)
        trainer.kill(signal.SIGTERM)
        require(trainer.wait() in (75, -signal.SIGTERM, 0), f"SIGTERM after {pause} s: exit {trainer.code}")
        trial.train(run)
        trial.nothing_lost(run)
        trial.trials += 1
    return ", ".join(f"{name} ({code})" for name, (_, code) in cases.items())


# ------------------------------------------------------------------------------------------------------ several processes


def two(trial: Trial, run: RunDirectory, *flags: str, faults: tuple[list, list] = ([], [])) -> list[Trainer]:
    """Two processes that train one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        trial.start(
            run,
            *flags,
            faults=faults[number],
            log=f"log-{number}",
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
        )
        for number in range(2)
    ]


def ended(trainers: list[Trainer], codes: list[int]) -> None:
    found = [trainer.wait() for trainer in trainers]
    require(found == codes, f"exit {found}, not {codes}: {' | '.join(last_line(trainer.output()) for trainer in trainers)}")


def two_processes(trial: Trial, part: int, parts: int) -> str:
    """SIGTERM to one of two processes: both save the same step; one of two killed; one of two stopped for good."""
    reference = trial.run("reference")
    ended(two(trial, reference), [0, 0])
    term = {"do": "signal", "signal": signal.SIGTERM, "step": 5}
    for number in (0, 1):
        run = trial.run(f"term-{number}")
        ended(two(trial, run, faults=([term], []) if number == 0 else ([], [term])), [75, 75])
        saved = whole(run)[-1]
        require(saved in (5, 6), f"asked at step 5, saved {saved}")
        ended(two(trial, run), [0, 0])
        trial.nothing_lost(run, reference)
        trial.trials += 1
    return "SIGTERM to the first, to the second: both save the same step and exit 75"


def one_of_two(trial: Trial, part: int, parts: int) -> str:
    """One of two processes is stopped, or killed: the other ends by the watchdog, and both together go on."""
    reference = trial.run("reference")
    ended(two(trial, reference), [0, 0])
    for number in (0, 1):
        for how in (signal.SIGSTOP, signal.SIGKILL):
            run = trial.run(f"{how.name}-{number}")
            after = str(run.checkpoints / "6")
            fault = {"do": "signal", "signal": how, "step": 9, "after": after if number == 0 else None}
            trainers = two(trial, run, "--config.guard.hang_seconds=6", faults=([fault], []) if number == 0 else ([], [fault]))
            other, stopped = trainers[1 - number], trainers[number]
            code = other.wait(60)
            require(code not in (0, 75), f"one was {how.name}ped, and the other ended with {code}")
            if how == signal.SIGSTOP:
                stopped.kill(signal.SIGCONT)
            stopped.wait(60)
            whole(run)
            ended(two(trial, run), [0, 0])
            trial.nothing_lost(run, reference)
            trial.trials += 1
    return "SIGSTOP and SIGKILL of the first, of the second: the other ends, both together go on"


def killed_worker(trial: Trial, part: int, parts: int) -> str:
    """Batches made by two worker processes, one of which is killed."""
    run, flags = trial.run("whole"), ("--config.data.workers=2",)
    trainer = trial.start(run, *flags, command=TRAIN)
    require(trainer.wait() == 0, f"with workers: exit {trainer.code}: {last_line(trainer.output())}")
    trial.nothing_lost(run)
    run, flags, ends = trial.run("killed"), (*flags, *HUNDRED, "--config.checkpoint.every=10"), []
    for after in (0, 20, 50):
        trainer = trial.start(run, *flags, command=TRAIN)
        begun = trainer.until(lambda pid=trainer.pid, after=after: workers_of(pid) and len(ledger(run)) > after)
        require(begun, last_line(trainer.output()))
        os.kill(workers_of(trainer.pid)[0], signal.SIGKILL)
        ends.append(trainer.wait(60))
        whole(run)
        trial.trials += 1
    trainer = trial.start(run, *flags, command=TRAIN)
    require(trainer.wait() == 0, f"exit {trainer.code}: {last_line(trainer.output())}")
    trial.nothing_lost(run, trial.hundred)
    return f"the trainer ended with {ends}; the same command went on"


def workers_of(pid: int) -> list[int]:
    """Processes that load data for the trainer: Python starts them with spawn_main, in the trainer's session."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            session = int((each / "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[3])
            if session == pid and b"spawn_main" in (each / "cmdline").read_bytes():
                found.append(int(each.name))
        except OSError:  # it has ended
            continue
    return sorted(found)


def second_trainer(trial: Trial, part: int, parts: int) -> str:
    """A second trainer on a run that is being trained: refused with who has it, and the first is not disturbed."""
    run = trial.run("run", trial.six)
    first = trial.start(run, faults=[{"step": 8, "do": "hold"}])
    first.held()
    before = tree(run.path)
    for _ in range(2):
        second = trial.start(run, log="second")
        require(second.wait() == 2, f"exit {second.code}, not 2")
        says = last_line(second.output())
        require(f"process {first.pid} on {socket.gethostname()}" in says, f"says {says!r}")
        require(tree(run.path) == before, "the second trainer changed the run")
        trial.trials += 1
    first.release()
    ended([first], [0])
    trial.nothing_lost(run)
    return "exit 2 with pid and host, the run untouched"


# ---------------------------------------------------------------------------------------------------- what ends a trainer


def hang_with_interpreter_lock(trial: Trial, part: int, parts: int) -> str:
    """A batch that never comes, made by C code that keeps the interpreter lock."""
    run = trial.run("run", trial.six)
    trainer = trial.start(run, "--config.guard.hang_seconds=5", faults=[{"batch": [9], "do": "hang with the interpreter lock"}])
    code = trainer.wait(60)
    require(code == 1, f"exit {code}, not 1")
    require("Timeout (" in trainer.output() and 'File "' in trainer.output(), "no stacks were printed")
    whole(run, [6])
    trial.train(run)
    trial.nothing_lost(run)
    trial.trials += 1
    return "exit 1 with all stacks after guard.hang_seconds"


def out_of_memory(trial: Trial, part: int, parts: int) -> str:
    """No more memory is to be had from step 7 on; a MemoryError; the kernel's SIGKILL."""
    ends = []
    limits = [{"step": 7, "do": "memory", "bytes": mib << 20} for mib in (0, 2, 16, 128)]
    for fault in [*limits, {"step": 7, "do": "memory error"}, {"step": 7, "do": "signal", "signal": signal.SIGKILL}]:
        run = trial.run(f"run-{trial.trials}", trial.six)
        trainer = trial.start(run, "--config.guard.hang_seconds=30", faults=[fault])
        ends.append(trainer.wait(90))
        whole(run, [6] if ends[-1] else [])
        trial.train(run)
        trial.nothing_lost(run)
        trial.trials += 1
    return f"RLIMIT_AS 0, 2, 16, 128 MiB above use, MemoryError, SIGKILL: ended with {ends}"


def unexpected_exception(trial: Trial, part: int, parts: int) -> str:
    """An exception that nobody expects: the last step is saved before leaving, but not over a checkpoint that exists."""
    run = trial.run("between")
    trial.train(run, faults=[{"step": 6, "do": "raise"}], code=1)
    require(whole(run) == [3, 5], f"checkpoints {whole(run)}: 5 was to be saved before leaving")
    require(parameters(run, 5), "no digest of step 5")
    trial.train(run)
    trial.nothing_lost(run)
    run = trial.run("at")
    trial.train(run, faults=[{"step": 7, "do": "raise", "after": str(run.checkpoints / "6")}], code=1)
    require(whole(run) == [3, 6], f"checkpoints {whole(run)}")
    trial.train(run)
    trial.nothing_lost(run)
    trial.trials += 2
    return "RuntimeError: saved at the last step; one that exists is left alone"


def supervised(trial: Trial, part: int, parts: int) -> str:
    """`lumina run` starts the trainer again after each kill -9, and it completes by itself."""
    run = trial.run("run")
    flags, kills = (*HUNDRED, "--config.checkpoint.every=10"), 0
    command = [*PYTHON, "lumina.cli", "run", "--", *TRAIN]
    supervisor = trial.start(run, *flags, command=command)
    seen: set[int] = set()
    for after in (5, 30, 60):
        if not supervisor.until(lambda after=after: len(ledger(run)) > after and trainer_of(run) not in (0, *seen)):
            break
        seen.add(trainer := trainer_of(run))
        os.kill(trainer, signal.SIGKILL)
        kills += 1
    require(kills == 3, f"killed only {kills} times: {last_line(supervisor.output())}")
    require(supervisor.wait() == 0, f"exit {supervisor.code}: {last_line(supervisor.output())}")
    causes = [each.get("restarted_because") for each in events(run, "started")]
    require(len(causes) == kills + 1 and all("SIGKILL" in cause for cause in causes[1:]), f"causes of the restarts: {causes}")
    trial.nothing_lost(run, trial.hundred)
    trial.trials += kills
    return f"{kills} kills, {kills} restarts, done"


def trainer_of(run: RunDirectory) -> int:
    """The process that trains the run, 0 if none does."""
    started = events(run, "started")
    pid = started[-1]["process"] if started else 0
    return pid if pid and Path(f"/proc/{pid}").exists() else 0
