"""Rows of the fault matrix: checkpoints that were damaged, disks that are full, fail or turn read-only, lines half written."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lumina.runs.directory import RunDirectory
from lumina.runs.steps import Steps
from tests.faults import instants
from tests.faults.kills import EVERY_STEP, traced
from tests.faults.trial import (
    HUNDRED,
    LostError,
    NotRunError,
    Trial,
    events,
    last_line,
    ledger,
    require,
    same_metrics,
    tree,
    whole,
)

# ---------------------------------------------------------------------------------------------------- damaged checkpoints

DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "a bit flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "deleted": lambda data: None,
    "grown": lambda data: data + b"\0",
}


def damaged_checkpoints(trial: Trial, part: int, parts: int) -> str:
    """A run with a checkpoint of every step; each but the oldest is damaged in another file, in another way. One start must
    set all of them aside, and go on from the oldest."""
    run, flags = trial.run("run"), (*EVERY_STEP, "--config.checkpoint.keep=1000")
    kept, stop = 4, {"do": "signal", "signal": signal.SIGTERM}
    damages = [(kind, name) for name in kinds(trial.reference) for kind in DAMAGES]
    trial.train(run, *flags, faults=[stop | {"step": kept + len(damages) + 1}], code=75)
    steps = [step for step in Steps(run.checkpoints).all() if step > kept]
    made = {}
    for step, (kind, name) in zip(steps, damages, strict=False):
        file = first_of_kind(run.checkpoints / str(step), name)
        data = file.read_bytes()
        if not data and kind not in ("grown", "deleted"):  # an empty file cannot be damaged so
            kind = "grown"
        changed = DAMAGES[kind](data)
        file.unlink() if changed is None else file.write_bytes(changed)
        made[step] = f"{name} {kind}"
    require(len(made) == len(damages), f"{len(made)} checkpoints for {len(damages)} damages")
    for step in set(steps) - made.keys():
        (run.checkpoints / str(step) / "manifest.json").unlink()
    trial.train(run, *flags)
    aside = {each["step"] for each in events(run, "set aside")}
    unnoticed = [made[step] for step in made if step not in aside]
    require(not unnoticed, f"not noticed: {', '.join(unnoticed)}")
    trial.nothing_lost(run, trial.hundred)
    trial.trials += len(made)

    run = trial.run("values", trial.six)  # files that fit, of another step: the digests of the arrays must notice
    directory = run.checkpoints / "6"
    shutil.rmtree(directory / "state")
    shutil.copytree(run.checkpoints / "3" / "state", directory / "state")
    rewrite_hashes(directory)
    require(not Steps(run.checkpoints).verify(6), "the hashes were to fit")
    trial.train(run)
    require([each["step"] for each in events(run, "set aside")] == [6], "other values under hashes that fit: not set aside")
    trial.nothing_lost(run)
    trial.trials += 1

    run = trial.run("all", trial.six)
    for step in Steps(run.checkpoints).all():
        file = first_of_kind(run.checkpoints / str(step), "state/manifest.ocdbt")
        file.write_bytes(file.read_bytes()[:-1])
    before = run.ledger.read_bytes()
    for _ in range(2):
        trial.train(run, code=5)
        require(run.ledger.read_bytes() == before, "all checkpoints damaged: the ledger was changed")
    require(len(Steps(run.checkpoints).broken()) == 2, "all damaged: they were to be set aside")
    trial.trials += 1
    of = f"{len(made)} damages to {len(kinds(trial.reference))} kinds of file"
    return f"{of}, other values under hashes that fit; all damaged: exit 5"


def kinds(run: RunDirectory) -> list[str]:
    """The kinds of file of a checkpoint: names that are a hash count as one."""
    directory = run.checkpoints / str(Steps(run.checkpoints).all()[-1])
    return sorted({kind_of(each, directory) for each in directory.rglob("*") if each.is_file()})


def kind_of(file: Path, directory: Path) -> str:
    name = file.relative_to(directory)
    return str(name.parent / "*" if len(name.name) == 32 else name)


def first_of_kind(directory: Path, kind: str) -> Path:
    return min(each for each in directory.rglob("*") if each.is_file() and kind_of(each, directory) == kind)


def rewrite_hashes(directory: Path) -> None:
    manifest = directory / "manifest.json"
    body = json.loads(manifest.read_text(encoding="utf-8"))["manifest"]
    files = [each for each in directory.rglob("*") if each.is_file() and each != manifest]
    body["files"] = {
        each.relative_to(directory).as_posix(): {
            "bytes": each.stat().st_size,
            "sha256": hashlib.sha256(each.read_bytes()).hexdigest(),
        }
        for each in files
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({"manifest": body, "sha256": digest}), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ full disks


@contextmanager
def small_disk(path: Path, megabytes: int = 4) -> Iterator[None]:
    """A file system of its own at `path`, in a mount namespace of this process: it vanishes with the process, if not before."""
    path.mkdir(parents=True)
    if ctypes.CDLL(None, use_errno=True).unshare(0x20000) != 0:  # CLONE_NEWNS
        raise NotRunError(f"no mount namespace: {os.strerror(ctypes.get_errno())}")
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path))
    try:
        yield
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(path), 2)  # MNT_DETACH


def _mount(*arguments: str) -> None:
    program = shutil.which("mount")
    if program is None:
        raise NotRunError("there is no mount")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotRunError(f"mount is not permitted: {done.stderr.strip()}")


def fill(path: Path, leaving: int = 0) -> Path:
    """A file that takes all room but `leaving` bytes."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError as error:
            require(error.errno == errno.ENOSPC, f"the disk did not fill up: {error}")
        os.truncate(filler, max(0, file.tell() - leaving))
    return filler


def full_disk(trial: Trial, part: int, parts: int) -> str:
    """The disk is full during a save, at several places in it, and gets room again; or it stays full until the end."""
    levels = (0, 4096, 16_384, 65_536, 98_304)
    for level in levels:
        with small_disk(trial.directory / f"disk-{level}"):
            run = trial.run(f"disk-{level}/run", trial.six)
            trainer = trial.start(run, faults=[{"save": 9, "do": "hold"}, {"step": 11, "do": "hold"}])
            trainer.held()
            filler = fill(run.path.parent, level)
            trainer.release()
            trainer.held()
            trainer.until(lambda run=run: not Steps(run.checkpoints).writing(9).exists(), 20)
            require(whole(run) == [3, 6], f"{whole(run)} on a full disk")
            filler.unlink()
            trainer.release()
            require(trainer.wait() == 0, f"disk full with {level} bytes left: {last_line(trainer.output())}")
            require(events(run, "save failed"), "the failed save was not recorded")
            trial.nothing_lost(run)
            trial.trials += 1
    with small_disk(trial.directory / "disk"):
        run = trial.run("disk/run", trial.six)
        trainer = trial.start(run, faults=[{"step": 8, "do": "hold"}])
        trainer.held()
        filler = fill(run.path.parent)
        trainer.release()
        require(trainer.wait() == 5, f"the last save had no room: exit {trainer.code}, not 5: {last_line(trainer.output())}")
        whole(run, [3, 6])
        filler.unlink()
        trial.train(run)
        trial.nothing_lost(run)
        trial.trials += 1
    return f"tmpfs; {', '.join(map(str, levels))} bytes left; full to the end: exit 5, older steps whole"


def full_disk_for_the_log(trial: Trial, part: int, parts: int) -> str:
    """Checkpoints are on another disk than metrics, ledger, events and TensorBoard, which is full: first until step 80, then
    until the end."""
    flags = (*HUNDRED, "--config.checkpoint.every=10")
    for until in (80, None):
        with small_disk(trial.directory / f"disk-{until}"):
            run, elsewhere = trial.run(f"disk-{until}/run"), trial.directory / f"elsewhere-{until}"
            run.path.mkdir()
            elsewhere.mkdir()
            run.checkpoints.symlink_to(elsewhere)
            trainer = trial.start(run, *flags, faults=[{"step": step, "do": "hold"} for step in (7, until) if step])
            trainer.held()
            filler = fill(run.path.parent)
            trainer.release()
            if until:
                trainer.held()
                trainer.until(lambda run=run: os.listdir(run.checkpoints) in (["60", "70"], ["70", "60"]), 20)
                require(len(ledger(run)) < 70, "the ledger was written to a full disk")
                require(whole(run)[-1] == 70, f"checkpoints on a disk with room: {whole(run)}")
                filler.unlink()
                trainer.release()
            code = trainer.wait()
            require("cannot be written" in trainer.output(), "nothing was said of the lines that could not be written")
            require(whole(run)[-1] == 100, f"training did not reach its end: {last_line(trainer.output())}")
            if until:
                require(code == 0, f"exit {code}: {last_line(trainer.output())}")
                trial.nothing_lost(run, trial.hundred)
            else:
                filler.unlink()
                trial.train(run, *flags)
                manifests = [Steps(each.checkpoints).manifest(100)["parameters"] for each in (run, trial.hundred)]
                require(manifests[0] == manifests[1], "other parameters at the end")
                require(events(run, "ledger differs"), "lines of the ledger are lost, and it was not said")
            trial.trials += 1
    return "lines wait for room and follow; full to the end: training ends, and says which lines are lost"


# --------------------------------------------------------------------------------------------------------- failing disks


def failing_calls(trial: Trial, names: frozenset[str], number: int) -> tuple[RunDirectory, list[str]]:
    """A run that saves every step, where the n-th save meets an error at its n-th call; and the calls that failed."""
    run, failed, wrong = trial.run("run"), [], []
    index, met, spared, most = (
        0,
        True,
        0,
        0,
    )  # calls of this save; whether one failed; saves in a row that had not so many; whole

    def act(call: instants.Call) -> Any:
        nonlocal index, met, spared, most
        if call.name == "mkdir" and call.path.startswith("checkpoints/.writing-") and call.path.count("/") == 1:
            try:
                found = whole(run)
                require(len(found) >= min(2, most), f"only {found} is left")
                most = max(most, len(found))
            except LostError as error:
                wrong.append(f"after {failed[-1:]}: {error}")
            index, met, spared = 0, False, 0 if met else spared + 1
        if spared == 3:
            return "leave"
        if call.name not in names or not call.path.startswith("checkpoints"):
            return None
        index += 1
        if met or index <= len(failed):
            return None
        met = True
        failed.append(str(call))
        return number

    flags = ("--config.checkpoint.every=1", "--config.train.steps=240", "--config.train.eval_every=0")
    reference = trial.run("without")
    trial.train(reference, *flags[1:])
    trainer, _, _ = traced(trial, run, act, *flags, names=names | {"mkdir"}, seconds=300.0)
    code = trainer.wait()
    require(not wrong, "; ".join(wrong[:3]))
    require(code == 0, f"exit {code}: {last_line(trainer.output())}")
    trial.nothing_lost(run, reference, result=False)
    trial.trials += len(failed)
    return run, failed


def errors_of_sync_and_rename(trial: Trial, part: int, parts: int) -> str:
    """EIO at every fsync, rename, mkdir and unlink of a save and a deletion, one a save."""
    run, failed = failing_calls(trial, instants.DURABLE, errno.EIO)
    count = len(events(run, "save failed"))
    return f"EIO at {len(failed)} calls: {count} saves failed and were said to, the others did without"


def errors_of_write(trial: Trial, part: int, parts: int) -> str:
    """ENOSPC at every write of a save."""
    run, failed = failing_calls(trial, instants.WRITES, errno.ENOSPC)
    count = len(events(run, "save failed"))
    return f"ENOSPC at {len(failed)} writes: {count} saves failed and were said to"


def read_only(trial: Trial, part: int, parts: int) -> str:
    """A run directory that is read-only at the start; one that turns read-only at step 7, until step 11 or to the end."""
    with small_disk(trial.directory / "disk"):
        run = trial.run("disk/run", trial.six)
        _mount("-o", "remount,ro", str(run.path.parent))
        before = tree(run.path)
        trainer = trial.start(run)
        require(trainer.wait() == 2, f"read-only at the start: exit {trainer.code}, not 2")
        require("Read-only file system" in trainer.output(), f"says {last_line(trainer.output())}")
        require(tree(run.path) == before, "read-only, and changed")
        _mount("-o", "remount,rw", str(run.path.parent))
        trial.train(run)
        trial.nothing_lost(run)
        trial.trials += 1
    everything = instants.DURABLE | instants.WRITES | {"openat"}
    for until in (True, False):
        run = trial.run(f"turned-{until}", trial.six)
        ends = run.path.parent / "ends"

        def act(call: instants.Call, ends: Path = ends) -> Any:
            return "leave" if ends.exists() else errno.EROFS

        faults = [{"step": 11, "do": "touch", "path": str(ends)}] if until else []
        trainer, _, status = traced(trial, run, act, names=everything, at_step=7, faults=faults)
        code = trainer.wait() if status is None else trainer.code
        require("Read-only file system" in trainer.output(), "turned read-only, and nothing was said")
        whole(run, [3, 6] if not until else [6])
        require(code == (0 if until else 5), f"turned read-only: exit {code}: {last_line(trainer.output())}")
        if not until:
            trial.train(run)
        trial.nothing_lost(run)
        ends.unlink(missing_ok=True)
        trial.trials += 1
    return "at the start: exit 2; within, until step 11 and to the end (EROFS at every call)"


# ------------------------------------------------------------------------------------------------------ damaged journals


def half_lines(trial: Trial, part: int, parts: int) -> str:
    """The ends of metrics.jsonl and ledger.jsonl are cut within a line, or are zeros; there is garbage in the middle."""

    def cut(data: bytes) -> bytes:
        return data[: data.rstrip(b"\n").rfind(b"\n") + 20]

    def garbage(data: bytes) -> bytes:
        place = data.index(b"\n", len(data) // 3) + 1
        return data[:place] + b'\xff\x00 garbage {"step":\n' + data[place:]

    for damage in (cut, lambda data: data + bytes(512), garbage):
        run = trial.run(f"run-{trial.trials}", trial.six)
        for file in (run.ledger, run.metrics):
            file.write_bytes(damage(file.read_bytes()))
        trial.train(run)
        trial.nothing_lost(run)
        same_metrics(run, trial.reference)
        trial.trials += 1
    run = trial.run("record", trial.six)  # a record of a step before the checkpoint cannot be made again: it must be said
    lines = run.ledger.read_bytes().splitlines(keepends=True)
    run.ledger.write_bytes(b"".join([*lines[:2], lines[2][:10] + b"\n", *lines[3:]]))
    trial.train(run)
    require(events(run, "ledger differs"), "a record of the ledger was destroyed, and nothing was said")
    expected = [record for record in ledger(trial.reference) if record != json.loads(lines[2])]
    require(ledger(run) == expected, "other records than the destroyed one differ")
    trial.trials += 1
    return "cut, zeros, garbage: made whole; a record that was destroyed is said to be gone"
