"""Checkpoints of a run: Orbax writes the arrays in the background, `lumina.runs.steps` makes a step exist.

A step's directory holds `state/`, the arrays by name, and the manifest, which has for each array shape, dtype and digest.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lumina.config import CheckpointConfig, Config, ModelConfig
from lumina.errors import CheckpointError
from lumina.interchange import state as interchange
from lumina.interchange.orbax import to_leaves
from lumina.runs import checkpoints
from lumina.runs.checkpoints import Record, changed, check_fits, digest_of, find, written_by
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.steps import Steps
from lumina_jax.digest import digests
from lumina_jax.mesh import agreed, in_any, one_device, shaped_whole
from lumina_jax.model import Variables
from lumina_jax.step import TrainState, state_shapes

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of what it raises, once in each thread


class Checkpoints(checkpoints.Checkpoints):
    """The states of a run that is being trained. In several processes all call the same methods at the same step."""

    def __init__(
        self,
        run: RunDirectory,
        config: CheckpointConfig,
        events: Events,
        like: TrainState,
        backup: Callable[[int], Path] | None = None,
        origin: Callable[[], tuple[TrainState, Record]] | None = None,
    ):
        """As of `lumina.runs.checkpoints`; `like` has shapes, dtypes and shardings of a state."""
        self._like = like
        super().__init__(run, config, events, backup, jax.process_index() == 0, origin)

    def _bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._like))

    def _on_host(self, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, Record], str]:
        named = by_name(state)
        found = digests(named)
        # A copy: the arrays are about to be given away to the next step.
        host = {name: np.array(array) for name, array in named.items()}
        leaves = {n: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": found[n]} for n, a in host.items()}
        return host, leaves, parameters_digest(found)

    def _write_arrays(self, directory: Path, host: dict[str, np.ndarray]) -> None:
        with _orbax() as writer:
            writer.save((directory / "state").absolute(), args=ocp.args.PyTreeSave(host))

    def _check_fits(self, directory: Path, leaves: dict[str, Record]) -> None:
        check_fits(directory, leaves, shapes_of(self._like))

    def _read(self, directory: Path, leaves: dict[str, Record]) -> tuple[TrainState, list[str]]:
        named = _read(directory, by_name(self._like))
        return jax.tree.unflatten(jax.tree.structure(self._like), named.values()), changed(digests(named), leaves)

    def _agreed(self, value: Any) -> Any:
        return agreed(value)

    def _in_any(self, value: bool) -> bool:
        return in_any(value)


def load(run: RunDirectory, like: TrainState, best: bool = False) -> tuple[TrainState, int]:
    """The newest state that verifies, or the one with the lowest held-out loss, and its step; changes nothing in the run.

    Raises CheckpointError when there is none.
    """
    step = find(run, best)
    steps = Steps(run.checkpoints)
    directory, leaves = steps.directory(step), steps.manifest(step)["leaves"]
    if written_by(directory) == "lumina_torch":
        config, state, _ = interchange.load(run.path, step=step)
        return from_state(config.model, state, like), step
    check_fits(directory, leaves, shapes_of(like))
    named = _read(directory, by_name(like))
    if wrong := changed(digests(named), leaves):
        raise CheckpointError(f"{directory}: damaged: {wrong[0]}")
    return jax.tree.unflatten(jax.tree.structure(like), named.values()), step


def open_model(path: Path, best: bool = False) -> tuple[Config, nnx.GraphDef, Variables, int]:
    """(config, graph definition, variables, step) of the newest state that verifies of a run of either backend, or the best, or
    of a canonical directory, on the first device and in forms for it.

    Raises UsageError, ConfigError or CheckpointError as `lumina.interchange.state.locate`.
    """
    config, state = interchange.load_here(path, best)
    return config, *variables_of(config, state), state.step


def variables_of(config: Config, state: interchange.State) -> tuple[nnx.GraphDef, Variables]:
    """The weights of `state` as a model of `config`, on the first device."""
    shapes, graphdef = state_shapes(config)
    like = {"variables": shaped_whole(one_device(), shapes.variables)}
    return graphdef, from_state(config.model, state, like)["variables"]


def from_state(model: ModelConfig, state: interchange.State, like: Any) -> Any:
    """The arrays of `state` as `like`, all of a TrainState or a part of it, has them: stacked, with its shardings.

    Raises CheckpointError for one of another shape or dtype.
    """
    leaves, named = by_name(like), {}
    for name, array in to_leaves(model, vars(state), leaves):
        counted = array.ndim == 0 and leaves[name].dtype == np.int32  # on the host as a Python number
        named[name] = array.astype(np.int32) if counted else array
        if (named[name].shape, named[name].dtype) != (leaves[name].shape, leaves[name].dtype):
            found, wanted = ((tuple(of.shape), str(of.dtype)) for of in (named[name], leaves[name]))
            raise CheckpointError(f"{name}: is {found}, the model needs {wanted}")

    def placed(array: np.ndarray, leaf: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    return jax.tree.unflatten(jax.tree.structure(like), [placed(named[name], leaf) for name, leaf in leaves.items()])


def by_name(state: Any) -> dict[str, Any]:
    """The leaves of a state under names such as `variables.params.embedding`, in the order of the tree."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def shapes_of(state: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each leaf. Orbax casts dtypes silently when it restores: they are compared first."""
    return {name: (tuple(leaf.shape), str(leaf.dtype)) for name, leaf in by_name(state).items()}


def parameters_digest(found: dict[str, str]) -> str:
    """One digest of all that the model is: parameters and router biases."""
    return digest_of({name: digest for name, digest in found.items() if name.startswith("variables.")})


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


def _path(path: Any) -> str:
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(names).removesuffix(".value")
