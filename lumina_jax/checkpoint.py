"""Checkpoints of a run, written by Orbax while training goes on."""

import copy
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lumina.config import CheckpointConfig
from lumina.errors import CheckpointError
from lumina.runs.directory import RunDirectory
from lumina_jax.step import TrainState


class Checkpoints:
    """The newest states of a run, and apart from them the best one."""

    def __init__(self, run: RunDirectory, config: CheckpointConfig, create: bool = True):
        def open_at(path: Path, keep: int) -> ocp.CheckpointManager:
            if not create and not path.is_dir():
                raise CheckpointError(f"{path}: no checkpoints; train the run with `python -m lumina_jax.train`")
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create)
            handlers = {"state": ocp.StandardCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
            return ocp.CheckpointManager(path.absolute(), options=options, item_handlers=handlers)

        self._newest = open_at(run.checkpoints, config.keep)
        self._best = open_at(run.best, 1)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return self._newest.latest_step()

    def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Copy `state` to the host and write it in the background, with the host's own `progress` (plain JSON values)."""
        if step not in self._newest.all_steps():
            self._newest.save(step, args=_arguments(state, progress))

    def save_best(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        """The same, kept until a better one comes."""
        for stale in (s for s in self._best.all_steps() if s > step):  # of a run that was cut off and began again before it
            self._best.delete(stale)  # Orbax would keep it, and leave out `step` without a word
        if step not in self._best.all_steps():
            self._best.save(step, args=_arguments(state, progress))

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, shaped as `like` (shapes and dtypes), with its progress."""
        return _restore(self._newest, like)

    def restore_best(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state with the lowest held-out loss, or the newest when nothing was evaluated."""
        return _restore(self._best if self._best.latest_step() is not None else self._newest, like)

    def wait(self) -> None:
        """Until everything is on disk; raises what went wrong there."""
        self._newest.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the background threads."""
        self._newest.close()
        self._best.close()


def _arguments(state: TrainState, progress: dict[str, Any]) -> ocp.args.Composite:
    progress = copy.deepcopy(progress)  # written in the background, while the caller changes its own
    return ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))


def _restore(manager: ocp.CheckpointManager, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"{manager.directory}: no finished checkpoint; train the run with `python -m lumina_jax.train`")
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), progress=ocp.args.JsonRestore())
    try:
        _check_fits(manager, step, like)
        restored = manager.restore(step, args=args)
    except (ValueError, OSError) as error:
        why = str(error).partition(":")[0]
        raise CheckpointError(
            f"{manager.directory}/{step}: cannot be read ({why}); move it away, and the one before is used"
        ) from error
    return restored["state"], restored["progress"]


def _check_fits(manager: ocp.CheckpointManager, step: int, like: TrainState) -> None:
    """Orbax casts dtypes silently when it restores: compare shapes and dtypes first."""
    saved = manager.item_metadata(step)["state"]
    if saved is None:
        raise CheckpointError(f"{manager.directory}/{step}: holds no training state")
    found = {_path(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _leaves(saved)}
    wanted = {_path(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in _leaves(like)}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{manager.directory}/{step}: {name} is {found.get(name, 'missing')}, "
                f"the model needs {wanted.get(name, 'none')}"
            )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _path(path: Any) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
