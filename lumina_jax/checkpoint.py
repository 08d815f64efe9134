"""Checkpoints of a run: Orbax writes the arrays in the background, `lumina.runs.steps` makes a step exist.

A step's directory holds `state/`, the arrays by name, and the manifest, which has for each array shape, dtype and digest.
"""

import logging
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError, UsageError
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.steps import Steps
from lumina.runs.units import gib
from lumina_jax.digest import digests
from lumina_jax.mesh import agreed, in_any, own_copy
from lumina_jax.step import TrainState

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of what it raises, once in each thread

Record = dict[str, Any]  # what the manifest says of a step: progress, ledger, fingerprints, leaves


class Checkpoints:
    """The states of a run that is being trained. In several processes all call the same methods at the same step."""

    def __init__(
        self,
        run: RunDirectory,
        config: CheckpointConfig,
        events: Events,
        like: TrainState,
        backup: Callable[[int], Path] | None = None,
    ):
        """
        Args:
            run, config, events: where states go, which stay, and where to tell of it.
            like: shapes, dtypes and shardings of a state.
            backup: copies a step to another place; it may raise OSError or CheckpointError.
        """
        self.steps = Steps(run.checkpoints, config.keep, config.keep_every)
        self._events, self._config, self._like, self._backup = events, config, like, backup
        self._writes = jax.process_index() == 0
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

    # ---------------------------------------------------------------------------------------------------- saving

    def require_room(self) -> None:
        """Raise a UsageError, in all processes, where not even one checkpoint fits on the disk."""
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._like))
        free = shutil.disk_usage(self.steps.path.parent).free
        if not agreed(free >= needed):
            raise UsageError(
                f"{self.steps.path.parent}: {gib(free)} free, a checkpoint takes {gib(needed)}, and there are "
                f"{self._config.keep + 1} at times; make room, or choose another --workdir"
            )

    def save(self, step: int, state: TrainState, record: Callable[[str], Record]) -> None:
        """Copy `state` to the host and write it in the background; a step that exists already is left as it is.

        `record` is given the digest of the parameters and returns what else the manifest is to say. A disk that fails costs
        this checkpoint, which is said, and no older one; `failure` then says why. The state is whole on every device, so that
        the first process writes it alone, and waits for no other.
        """
        self.wait()
        if not self._writes or step in self.steps.all():
            return
        named = by_name(own_copy(state))
        found = digests(named)
        # A copy: the arrays are about to be given away to the next step.
        host = {name: np.array(array) for name, array in named.items()}
        leaves = {n: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": found[n]} for n, a in host.items()}
        parameters = parameters_digest(found)
        manifest = {"leaves": leaves, "parameters": parameters, **record(parameters)}
        self._thread = threading.Thread(target=self._write, args=(step, host, manifest), name=f"save-{step}")
        self._thread.start()

    def _write(self, step: int, host: dict[str, np.ndarray], manifest: Record) -> None:
        """In the background: the arrays, then the commit, then what may go."""
        try:
            directory = self.steps.begin(step)
            with _orbax() as writer:
                writer.save((directory / "state").absolute(), args=ocp.args.PyTreeSave(host))
            self.steps.commit(step, manifest)
        except Exception as error:  # whatever a disk makes Orbax raise
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
        if not agreed(step in self.steps.all()):
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

    def restore(self, scheduled: bool = False) -> tuple[TrainState, Record] | None:
        """The newest state that verifies and its manifest; None in a new run.

        A step that does not verify is renamed aside and named in one line. Raises CheckpointError when there were steps and
        none is good, or when one is good but of another model.

        Args:
            scheduled: only steps that `checkpoint.every` divides, and newer ones are deleted: where a rewind goes must not
                depend on where the run was stopped.
        """
        self.wait()
        like = by_name(self._like)
        while (step := agreed(self._newest_verified(scheduled))) is not None:
            manifest = self.steps.manifest(step)
            _check_fits(self.steps.directory(step), manifest["leaves"], like)
            named = _read(self.steps.directory(step), like)
            wrong = _damaged(named, manifest["leaves"])
            if not in_any(bool(wrong)):
                return jax.tree.unflatten(jax.tree.structure(self._like), named.values()), manifest
            self._set_aside(step, wrong or ["another process reads other values"])
        if agreed(self.steps.broken() != []):
            what = "no checkpoint to rewind to" if scheduled else "no checkpoint"
            raise CheckpointError(
                f"{self.steps.path}: {what} is whole, {len(self.steps.broken())} were set aside (broken-*); restore a "
                "backup, rename back what was not at fault, or move them away to begin again at step 0"
            )
        return None

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


def load(run: RunDirectory, like: TrainState, best: bool = False) -> tuple[TrainState, int]:
    """The newest state that verifies, or the one with the lowest held-out loss, and its step; changes nothing in the run.

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
        manifest = steps.manifest(step)
        chosen = manifest["progress"]["best_step"]
        if best and chosen not in (None, step):
            if chosen not in found:
                raise CheckpointError(f"{steps.path}: step {chosen} was the best, and is not there any more")
            step, best = chosen, False
            if wrong := steps.verify(step):
                raise CheckpointError(f"{steps.directory(step)}: damaged: {wrong[0]}")
            manifest = steps.manifest(step)
        _check_fits(steps.directory(step), manifest["leaves"], by_name(like))
        named = _read(steps.directory(step), by_name(like))
        if wrong := _damaged(named, manifest["leaves"]):
            raise CheckpointError(f"{steps.directory(step)}: damaged: {wrong[0]}")
        return jax.tree.unflatten(jax.tree.structure(like), named.values()), step
    raise CheckpointError(f"{steps.path}: no whole checkpoint; train the run with `python -m lumina_jax.train`")


def by_name(state: Any) -> dict[str, Any]:
    """The leaves of a state under names such as `variables.params.embedding`, in the order of the tree."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def parameters_digest(found: dict[str, str]) -> str:
    """One digest of all that the model is: parameters and router biases."""
    of_model = sorted((name, digest) for name, digest in found.items() if name.startswith("variables."))
    return sha256(repr(of_model).encode()).hexdigest()[:16]


def _orbax() -> ocp.Checkpointer:
    """Writes from the first process alone. Random bits do not compress."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="save")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read(directory: Path, like: dict[str, Any]) -> dict[str, jax.Array]:
    """The arrays as `like` says."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=like, restore_args=ocp.checkpoint_utils.construct_restore_args(like))
        restored = reader.restore((directory / "state").absolute(), args=args)
    return {name: restored[name] for name in like}


def _damaged(named: dict[str, jax.Array], leaves: dict[str, Any]) -> list[str]:
    """Arrays that are not bit for bit what was saved."""
    found = digests(named)
    return [f"{name}: not the values that were saved" for name in named if found[name] != leaves[name]["digest"]]


def _check_fits(directory: Path, leaves: dict[str, Any], like: dict[str, Any]) -> None:
    """Orbax casts dtypes silently when it restores: compare shapes and dtypes first."""
    found = {name: (tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in leaves.items()}
    wanted = {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in like.items()}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{directory}: {name} is {found.get(name, 'missing')}, the model needs {wanted.get(name, 'none')}"
            )


def _path(path: Any) -> str:
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(names).removesuffix(".value")


def why(error: Exception) -> str:
    """An error in one line; of TensorStore's long ones what the operating system said."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    elif said := re.search(r"([^:]+) \[os_error_code=", text):
        text = said[1].strip()
    text = text.splitlines()[0]
    return text if len(text) < 200 else text[:200] + "..."
