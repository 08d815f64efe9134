"""Checkpoints of a run that is being trained, whatever the framework: when a step is written, which stay, which is restored.

A framework says how a state becomes files and comes back; `lumina.runs.steps` makes a step exist. The manifest has for each
array shape, dtype and digest.
"""

import queue
import re
import shutil
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError, UsageError
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.steps import Steps
from lumina.runs.units import gib

Record = dict[str, Any]  # what the manifest says of a step: progress, ledger, fingerprints, leaves
VISIBLE_SECONDS = 120.0  # NFS may show a directory as it was a minute ago
ARRAYS = {"lumina_jax": "state", "lumina_torch": "model.safetensors"}  # what a step holds, by the program that wrote it


class Checkpoints(ABC):
    """The states of a run that is being trained. In several processes all call the same methods at the same step.

    What is about arrays is a framework's to say: the methods under "arrays" below.
    """

    others: Sequence[int] = ()  # numbers of the processes that write parts of a state beside the first
    parts: frozenset[str] = frozenset()  # names of what they write, in a step's directory

    def __init__(
        self,
        run: RunDirectory,
        config: CheckpointConfig,
        events: Events,
        backup: Callable[[int], Path] | None = None,
        writes: bool = True,
        origin: Callable[[], tuple[Any, Record]] | None = None,
    ):
        """
        Args:
            run, config, events: where states go, which stay, and where to tell of it.
            backup: copies a step to another place; it may raise OSError or CheckpointError.
            writes: whether this process is the one that writes.
            origin: the state that the run began from and its record, if not a fresh one.
        """
        self.steps = Steps(run.checkpoints, config.keep, config.keep_every)
        self._events, self._config, self._backup = events, config, backup
        self._writes, self._origin = writes, origin
        self._saves = 0
        self._best: int | None = None  # the best step that was written
        self._thread: threading.Thread | None = None
        self._orders: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._in_backup: set[int] = set()  # steps that retention leaves alone
        # A slow or hanging place for backups must hold up neither training nor an end that was asked for.
        self._copier = threading.Thread(target=self._back_up, name="backup", daemon=True)
        if backup is not None:
            self._copier.start()
        self.failure = ""  # why the last save did not succeed
        if self._writes:
            self.steps.clean()

    # ---------------------------------------------------------------------------------------------------- arrays

    @abstractmethod
    def _bytes(self) -> int:
        """Of a state on disk."""

    @abstractmethod
    def _on_host(self, state: Any) -> tuple[Any, dict[str, Record], str]:
        """A copy that later steps leave alone; of each array shape, dtype and digest; a digest of all that the model is."""

    @abstractmethod
    def _write_arrays(self, directory: Path, host: Any) -> None:
        """Write what `_on_host` returned; in the background."""

    @abstractmethod
    def _check_fits(self, directory: Path, leaves: dict[str, Record]) -> None:
        """Raise a CheckpointError that names an array which this model does not have so."""

    @abstractmethod
    def _read(self, directory: Path, leaves: dict[str, Record]) -> tuple[Any, list[str]]:
        """The state, and which of its arrays are not bit for bit what was saved."""

    def _tell(self, word: str) -> None:  # noqa: B027, alone there is nobody to tell
        """Let the other processes that write know: that a step was begun, or this process's part written; or why not."""

    def _hear(self, process: int) -> str:
        """What a process told of the save under way, once it has; raises TimeoutError, and never waits for ever."""
        raise NotImplementedError(process)

    def _agreed(self, value: Any) -> Any:
        """What the first process says."""
        return value

    def _in_any(self, value: bool) -> bool:
        """Whether it holds in any process."""
        return value

    # ---------------------------------------------------------------------------------------------------- saving

    def require_room(self) -> None:
        """Raise a UsageError, in all processes, where not even one checkpoint fits on the disk."""
        needed = self._bytes()
        free = shutil.disk_usage(self.steps.path.parent).free
        if not self._agreed(free >= needed):
            raise UsageError(
                f"{self.steps.path.parent}: {gib(free)} free, a checkpoint takes {gib(needed)}, and there are "
                f"{self._config.keep + 1} at times; make room, or choose another --workdir"
            )

    def save(self, step: int, state: Any, record: Callable[[str], Record]) -> None:
        """Copy `state` to the host and write it in the background; a step that exists already is left as it is.

        `record` is given the digest of the parameters and returns what else the manifest is to say. A disk that fails costs
        this checkpoint, which is said, and no older one; `failure` then says why. The first process makes the step exist, when
        the `others` have written their parts of it.
        """
        self.wait()
        if self.others:
            if self._agreed(step in self.steps.all()):
                return
        elif not self._writes or step in self.steps.all():
            return
        host, leaves, parameters = self._on_host(state)
        if self._writes:
            manifest = {"leaves": leaves, "parameters": parameters, **record(parameters)}
            write = partial(self._write, step, host, manifest)
        else:
            write = partial(self._write_part, step, host)
        self._thread = threading.Thread(target=write, name=f"save-{step}")
        self._thread.start()

    def _write_part(self, step: int, host: Any) -> None:
        """In the background, in another process than the first: its own arrays, into the directory that the first one made."""
        try:
            self.failure = self._hear(0)
            if not self.failure:
                directory = self.steps.writing(step)
                require_visible(directory.parent, {directory.name})
                self._write_arrays(directory, host)
        except Exception as error:
            self.failure = why(error)
        self._tell(self.failure)

    def _begin(self, step: int) -> Path:
        """The directory for the step, which the others wait for."""
        try:
            directory = self.steps.begin(step)
        except Exception as error:
            self._tell(why(error))
            raise
        self._tell("")
        return directory

    def _await_others(self, directory: Path) -> None:
        """Raise an OSError where one of them could not write, or what it wrote is not here."""
        for process, failure in [(process, self._hear(process)) for process in self.others]:
            if failure:
                raise OSError(f"process {process}: {failure}")
        require_visible(directory, self.parts)

    def _write(self, step: int, host: Any, manifest: Record) -> None:
        """In the background: the arrays, then the commit, then what may go."""
        try:
            directory = self._begin(step)
            self._write_arrays(directory, host)
            self._await_others(directory)
            self.steps.commit(step, manifest)
        except Exception as error:  # whatever a disk makes a library raise
            self.failure = why(error)
            self.steps.abandon(step)
            stands = f"step {self.steps.all()[-1]} stands" if self.steps.all() else "there is none yet"
            says = f"step {step}: the checkpoint could not be written ({self.failure}); {stands}"
            self._events.write("save failed", step, says)
            return
        self.failure = ""
        self._events.write("saved", step)
        self._saves += 1
        if self._backup is not None and self._saves % self._config.backup_every == 0:
            self._in_backup.add(step)
            self._orders.put(step)
        if (best := manifest["progress"]["best_step"]) in self.steps.all():
            self._best = best
        stay = {self._scheduled(), *self._in_backup}
        try:  # a step that is pinned by now stays as well
            doomed = self.steps.superfluous(self._best)
            self.steps.remove(old for old in doomed if old not in stay | self.steps.pinned())
        except OSError as error:
            self._events.write("remove failed", step, f"older checkpoints cannot be removed: {why(error)}")

    def _back_up(self) -> None:
        """In a thread of its own: the newest step that is to be backed up, until there are no more."""
        while (step := self._orders.get()) is not None:
            try:
                if self._backup and step == max(self._in_backup):  # else a newer one waits
                    self._events.write("backed up", step, path=str(self._backup(step)))
            except (OSError, CheckpointError) as error:
                self._events.write("backup failed", step, f"step {step}: not backed up: {why(error)}; training goes on")
            finally:
                self._in_backup.discard(step)

    def wait(self) -> None:
        """Until what is being written exists, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def require(self, step: int) -> None:
        """Raise a CheckpointError, in all processes, unless `step` exists."""
        self.wait()
        if not self._agreed(step in self.steps.all()):
            kept = self.steps.all()
            newest = f"the newest checkpoint is step {kept[-1]}" if kept else "there is no checkpoint"
            raise CheckpointError(
                f"{self.steps.directory(step)}: could not be written ({self.failure}); {newest}; make room, then "
                "run the same command"
            )

    def close(self, wait_for_backup: bool = False) -> None:
        """Wait for what is being written; a backup that is not waited for is dropped when the process ends."""
        self.wait()
        self._orders.put(None)
        if wait_for_backup and self._copier.is_alive():
            self._copier.join()

    # --------------------------------------------------------------------------------------------------- restoring

    def restore(self, scheduled: bool = False) -> tuple[Any, Record] | None:
        """The newest state that verifies and its manifest; in a new run what it begins from, or None.

        A step that does not verify is renamed aside and named in one line. Raises CheckpointError when there were steps and
        none is good, or when one is good but of another model.

        Args:
            scheduled: only steps that `checkpoint.every` divides, and newer ones are deleted: where a rewind goes must not
                depend on where the run was stopped.
        """
        self.wait()
        while (step := self._agreed(self._newest_verified(scheduled))) is not None:
            directory, manifest = self.steps.directory(step), self.steps.manifest(step)
            self._check_fits(directory, manifest["leaves"])
            state, wrong = self._read(directory, manifest["leaves"])
            if not self._in_any(bool(wrong)):
                return state, manifest
            self._set_aside(step, wrong or ["another process reads other values"])
        if self._agreed(self.steps.broken() != []):
            what = "no checkpoint to rewind to" if scheduled else "no checkpoint"
            raise CheckpointError(
                f"{self.steps.path}: {what} is whole, {len(self.steps.broken())} were set aside (broken-*); restore a "
                "backup, rename back what was not at fault, or move them away to begin again at step 0"
            )
        return self._origin() if self._origin else None

    def _newest_verified(self, scheduled: bool) -> int | None:
        found = None
        for step in reversed(self.steps.all() if self._writes else []):
            if scheduled and step % self._config.every:
                continue
            if wrong := self.steps.verify(step):
                self._set_aside(step, wrong)
                continue
            found = step
            break
        # Only now, and not when what was looked for is damaged, may newer steps go: they may be all that is left.
        if self._writes and scheduled and (found is not None or not self.steps.broken()):
            self.steps.remove(step for step in self.steps.all() if found is None or step > found)
        return found

    def _scheduled(self) -> int | None:
        """The step that a rewind would go to."""
        return max((step for step in self.steps.all() if step % self._config.every == 0), default=None)

    def _set_aside(self, step: int, wrong: list[str]) -> None:
        if self._writes:
            path = self.steps.set_aside(step)
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            self._events.write("set aside", step, f"step {step} is damaged, now {path.name}: {wrong[0]}{more}")


def require_visible(directory: Path, names: Set[str]) -> None:
    """Raise an OSError unless what another process made in a directory can be seen, if not at once, soon."""
    until = time.monotonic() + VISIBLE_SECONDS
    while missing := names - ({each.name for each in directory.iterdir()} if names else set()):
        if time.monotonic() > until:
            raise OSError(
                f"{directory / min(missing)}: made by another process, but not seen by this one; all must share the disk"
            )
        time.sleep(0.1)


def find(run: RunDirectory, best: bool = False) -> int:
    """The newest step that verifies, or the one with the lowest held-out loss; changes nothing in the run.

    Raises CheckpointError when there is none.
    """
    steps = Steps(run.checkpoints)
    found = steps.all()[::-1]
    for step in found:
        if wrong := steps.verify(step):
            if best:
                raise CheckpointError(f"{steps.directory(step)}: damaged: {wrong[0]}; see `lumina runs verify {run.path}`")
            print(f"{steps.directory(step)} is damaged and passed over: {wrong[0]}", file=sys.stderr)
            continue
        chosen = steps.manifest(step)["progress"]["best_step"]
        if best and chosen not in (None, step):
            if chosen not in found:
                raise CheckpointError(f"{steps.path}: step {chosen} was the best, and is not there any more")
            if wrong := steps.verify(chosen):
                raise CheckpointError(f"{steps.directory(chosen)}: damaged: {wrong[0]}")
            return int(chosen)
        return step
    raise CheckpointError(f"{steps.path}: no whole checkpoint; train the run first")


def written_by(directory: Path) -> str:
    """The program that wrote the step in `directory`, or nothing where that cannot be told."""
    return next((program for program, name in ARRAYS.items() if (directory / name).exists()), "")


def require_own(run: RunDirectory, program: str) -> None:
    """Raise a UsageError where another program than `program` trained the run."""
    steps = Steps(run.checkpoints)
    others = {written_by(steps.directory(step)) for step in steps.all()} - {"", program}
    if others:
        raise UsageError(
            f"{run.path}: holds checkpoints of {others.pop()}; to go on in {program}, choose a new --workdir with "
            f"--config.checkpoint.init_from={run.path}"
        )


def check_fits(directory: Path, leaves: dict[str, Record], wanted: dict[str, tuple[tuple[int, ...], str]]) -> None:
    """Raise a CheckpointError unless the arrays of a manifest have the shapes and dtypes that the model needs."""
    found = {name: (tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in leaves.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{directory}: {name} is {found.get(name, 'missing')}, the model needs {wanted.get(name, 'none')}"
            )


def changed(found: dict[str, str], leaves: dict[str, Record]) -> list[str]:
    """Arrays whose digests are not those that a manifest has."""
    return [f"{name}: not the values that were saved" for name in found if found[name] != leaves[name]["digest"]]


def digest_of(found: dict[str, str]) -> str:
    """One digest of many, by name."""
    return sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]


def why(error: Exception) -> str:
    """An error in one line; of TensorStore's long ones what the operating system said."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    elif said := re.search(r"([^:]+) \[os_error_code=", text):
        text = said[1].strip()
    text = text.splitlines()[0]
    return text if len(text) < 200 else text[:200] + "..."
