"""Checkpoints of a run: Orbax writes the arrays in the background, `lumina.runs.steps` makes a step exist.

A step's directory holds `state/`, the arrays by name, and the manifest, which has for each array shape, dtype and digest.
"""

import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError, UsageError
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.steps import Steps
from lumina.runs.units import gib
from lumina_jax.digest import digests
from lumina_jax.step import TrainState

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
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="backup")
        self._in_backup: set[int] = set()  # steps that retention leaves alone
        self._thread: threading.Thread | None = None
        self._orbax = _orbax()
        self.failure = ""  # why the last save did not succeed
        if self._writes:
            self.steps.clean()

    # ---------------------------------------------------------------------------------------------------- saving

    def require_room(self) -> None:
        """Raise a UsageError where not even one checkpoint fits on the disk."""
        needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._like))
        free = shutil.disk_usage(self.steps.path.parent).free
        if self._writes and free < needed:
            raise UsageError(
                f"{self.steps.path.parent}: {gib(free)} free, a checkpoint takes {gib(needed)}, and there are "
                f"{self._config.keep + 1} at times; make room, or choose another --workdir"
            )

    def save(self, step: int, state: TrainState, record: Callable[[str], Record]) -> None:
        """Copy `state` to the host and write it in the background; a step that exists already is left as it is.

        `record` is given the digest of the parameters and returns what else the manifest is to say. A disk that fails costs
        this checkpoint, which is said, and no older one; `failure` then says why.
        """
        self.wait()
        if self._agreed(step in self.steps.all()):
            return
        named = by_name(state)
        found = digests(named)
        leaves = {n: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": found[n]} for n, a in named.items()}
        parameters = parameters_digest(found)
        manifest = {"leaves": leaves, "parameters": parameters, **record(parameters)}
        try:
            if self._writes:
                self.steps.begin(step)
        except OSError as error:
            self._failed(step, error)
        if not self._agreed(self.steps.writing(step).is_dir()):
            return
        try:
            self._orbax.save((self.steps.writing(step) / "state").absolute(), args=ocp.args.PyTreeSave(named))
        except Exception as error:  # whatever a disk makes Orbax raise
            self._failed(step, error)
            return
        best = manifest["progress"]["best_step"]
        self._thread = threading.Thread(target=self._finish, args=(step, manifest, best), name=f"save-{step}")
        self._thread.start()

    def _finish(self, step: int, manifest: Record, best: int | None) -> None:
        """In the background: until the arrays are on disk, then the commit, then what may go, then a backup."""
        try:
            self._orbax.wait_until_finished()
            if not self._writes:
                return
            self.steps.commit(step, manifest)
        except Exception as error:
            self._failed(step, error)
            return
        self.failure = ""
        self._events.write("saved", step)
        self._saves += 1
        if self._backup is not None and self._saves % self._config.backup_every == 0:
            self._in_backup.add(step)
            self._copier.submit(self._back_up, step)
        try:
            self.steps.remove(old for old in self.steps.superfluous(best) if old not in self._in_backup)
        except OSError as error:
            self._events.write("remove failed", step, f"older checkpoints cannot be removed: {_why(error)}")

    def _back_up(self, step: int) -> None:
        """In a thread of its own, as a slow place for backups must hold up neither training nor saving."""
        try:
            if self._backup and step == max(self._in_backup):  # else a newer one waits
                self._events.write("backed up", step, path=str(self._backup(step)))
        except (OSError, CheckpointError) as error:
            self._events.write("backup failed", step, f"step {step}: not backed up: {_why(error)}; training goes on")
        finally:
            self._in_backup.discard(step)

    def _failed(self, step: int, error: Exception) -> None:
        self.failure = _why(error)
        self.steps.abandon(step)
        self._orbax = _orbax()  # one that failed may hold on to what failed
        kept = self.steps.all()
        stands = f"step {kept[-1]} stands" if kept else "there is none yet"
        self._events.write("save failed", step, f"step {step}: the checkpoint could not be written ({self.failure}); {stands}")

    def wait(self) -> None:
        """Until what is being written exists, or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def require(self, step: int) -> None:
        """Raise a CheckpointError unless `step` exists."""
        self.wait()
        if self._writes and step not in self.steps.all():
            kept = self.steps.all()
            newest = f"the newest checkpoint is step {kept[-1]}" if kept else "there is no checkpoint"
            raise CheckpointError(
                f"{self.steps.directory(step)}: could not be written ({self.failure}); {newest}; make room, then "
                "run the same command"
            )

    # --------------------------------------------------------------------------------------------------- restoring

    def restore(self) -> tuple[TrainState, Record] | None:
        """The newest state that verifies and its manifest; None in a new run.

        A step that does not verify is renamed aside and named in one line. Raises CheckpointError when there were steps and
        none is good, or when one is good but of another model.
        """
        self.wait()
        like = by_name(self._like)
        while (step := self._agreed(self._newest_verified())) is not None:
            manifest = self.steps.manifest(step)
            _check_fits(self.steps.directory(step), manifest["leaves"], like)
            try:
                named = _read(self.steps.directory(step), like)
                wrong = _damaged(named, manifest["leaves"])
            except Exception as error:  # files whole, and yet unreadable
                wrong = [_why(error)]
            if not wrong:
                return jax.tree.unflatten(jax.tree.structure(self._like), named.values()), manifest
            self._set_aside(step, wrong)
        if self._agreed(self.steps.broken() != []):
            raise CheckpointError(
                f"{self.steps.path}: no checkpoint is whole, {len(self.steps.broken())} were set aside (broken-*); restore a "
                "backup, or remove them to begin again at step 0"
            )
        return None

    def _newest_verified(self) -> int | None:
        for step in reversed(self.steps.all() if self._writes else []):
            wrong = self.steps.verify(step)
            if not wrong:
                return step
            self._set_aside(step, wrong)
        return None

    def _set_aside(self, step: int, wrong: list[str]) -> None:
        if self._writes:
            path = self.steps.set_aside(step)
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            self._events.write("set aside", step, f"step {step} is damaged, now {path.name}: {wrong[0]}{more}")

    def _agreed(self, value: Any) -> Any:
        """What the first process says, so that all do the same: None, a truth value or a step."""
        if jax.process_count() == 1:
            return value
        number = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if value is None else value)))
        return type(value)(number) if isinstance(value, bool) else None if number < 0 else number

    def close(self) -> None:
        self.wait()
        self._copier.shutdown()
        self._orbax.close()


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


def _orbax() -> ocp.AsyncCheckpointer:
    # Random bits do not compress. A directory that is made in the background, and that the disk refuses, would leave threads
    # behind which wait for it and keep the process from ending.
    options = ocp.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False), async_options=options)


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


def _why(error: Exception) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return text if len(text) < 200 else text[:200] + "..."
