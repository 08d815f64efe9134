"""Checkpoints of a run: Orbax writes the arrays in the background, `lumina.runs.steps` makes a step exist.

A step's directory holds `state/`, the arrays by name, and the manifest, which has for each array shape, dtype and digest. Where
several processes each have a part of an array, each writes pieces of it, process 1 in `state.1/`, and the manifest lists them.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from lumina.config import CheckpointConfig, Config, ModelConfig
from lumina.errors import CheckpointError
from lumina.interchange import state as interchange
from lumina.interchange.orbax import Piece, Reader, directory_of, key_of, to_leaves, write
from lumina.runs import checkpoints
from lumina.runs.checkpoints import Record, changed, check_fits, digest_of, find, written_by
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.steps import Steps, sync_files
from lumina_jax.digest import digests
from lumina_jax.hosts import agreed, forget, hear, in_any, tell
from lumina_jax.mesh import one_device, shaped_whole
from lumina_jax.model import Variables
from lumina_jax.step import TrainState, state_shapes

PATIENCE_SECONDS = 3600.0  # for another process's disk; one that is gone ends this one sooner
READ_AT_ONCE = 2**32  # bytes of arrays, of which this process has a part in memory beside the devices
_SAVES = itertools.count()  # all processes count alike
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
        pieces = [piece for leaf in jax.tree.leaves(like) if jax.process_count() > 1 for piece, _ in pieces_of(leaf)]
        if pieces:
            self.others = range(1, jax.process_count())
            self.parts = frozenset(directory_of(piece.process) for piece in pieces)
        super().__init__(run, config, events, backup, jax.process_index() == 0, origin)

    def _bytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._like))

    def _on_host(self, state: TrainState) -> tuple[dict[str, np.ndarray], dict[str, Record], str]:
        """What this process writes. A state that is whole on every device the first process writes alone."""
        self._save = next(_SAVES)
        if self.others and self._writes:
            forget(f"save/{self._save - 1}")
        named = by_name(state)
        if all(leaf.is_fully_replicated for leaf in named.values()):
            named = {name: leaf.addressable_data(0) for name, leaf in named.items()}
        found = digests(named)
        host: dict[str, np.ndarray] = {}
        leaves: dict[str, Record] = {}
        for name, array in named.items():
            leaves[name] = {"shape": list(array.shape), "dtype": str(array.dtype), "digest": found[name]}
            if pieces := pieces_of(array):
                leaves[name]["pieces"] = [piece.record() for piece, _ in pieces]
                shards = {shard.device: shard.data for shard in array.addressable_shards}
                own = {key_of(name, n): shards[owner] for n, (_, owner) in enumerate(pieces) if owner in shards}
            else:
                own = {name: array if array.is_fully_addressable else array.addressable_data(0)} if self._writes else {}
            # A copy: the arrays are about to be given away to the next step.
            host |= {key: np.array(part) for key, part in own.items()}
        return host, leaves, parameters_digest(found)

    def _write_arrays(self, directory: Path, host: dict[str, np.ndarray]) -> None:
        if self._writes:
            with _orbax() as writer:
                writer.save((directory / "state").absolute(), args=ocp.args.PyTreeSave(host))
        elif host:
            write(directory, jax.process_index(), host)
            sync_files(directory / directory_of(jax.process_index()))  # which the first process cannot do for this machine

    def _tell(self, word: str) -> None:
        if self.others:
            tell(f"save/{self._save}/{jax.process_index()}", word)

    def _hear(self, process: int) -> str:
        return hear(f"save/{self._save}/{process}", PATIENCE_SECONDS)

    def _check_fits(self, directory: Path, leaves: dict[str, Record]) -> None:
        check_fits(directory, leaves, shapes_of(self._like))

    def _read(self, directory: Path, leaves: dict[str, Record]) -> tuple[TrainState, list[str]]:
        named = _read(directory, by_name(self._like), leaves)
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
    named = _read(directory, by_name(like), leaves)
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


def pieces_of(leaf: Any) -> list[tuple[Piece, jax.Device]]:
    """The pieces that an array, or its shape, is written in, and the device to take each from. All processes find the same.

    Empty for one that the first process writes whole, as it has all of it. Of devices that have the same, one after the other
    is taken, so that processes that are copies of each other share the work.
    """
    if leaf.sharding.is_fully_addressable or leaf.sharding.is_fully_replicated:
        return []
    holders: dict[tuple[tuple[int, ...], tuple[int, ...]], list[jax.Device]] = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        holders.setdefault(_box(index, leaf.shape), []).append(device)
    owners = [(box, devices[n % len(devices)]) for n, (box, devices) in enumerate(holders.items())]
    return [(Piece(owner.process_index, *box), owner) for box, owner in owners]


def _box(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(begin, shape) of a part of an array."""
    ranges = [each.indices(length)[:2] for each, length in zip(index or (), shape, strict=True)]
    return tuple(begin for begin, _ in ranges), tuple(end - begin for begin, end in ranges)


def _orbax() -> ocp.Checkpointer:
    """Writes from the first process alone. Random bits do not compress."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="save")
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read(directory: Path, like: dict[str, Any], leaves: dict[str, Record]) -> dict[str, jax.Array]:
    """The arrays as `like` says: each process reads what its devices are to have."""
    reader, found = Reader(directory, leaves), {}
    for names in _in_turn(like):
        reading = {name: _begin(reader, name, like[name]) for name in names}
        found.update({name: finish() for name, finish in reading.items()})
    return found


def _in_turn(like: dict[str, Any]) -> Iterator[list[str]]:
    """Names of arrays to read at the same time."""
    names: list[str] = []
    size = 0
    for name, leaf in like.items():
        names.append(name)
        size += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize * len(leaf.sharding.addressable_devices)
        if size > READ_AT_ONCE:
            yield names
            names, size = [], 0
    yield names


def _begin(reader: Reader, name: str, leaf: Any) -> Callable[[], jax.Array]:
    """Begin to read this process's part of an array; what returns waits for it."""
    boxes = {_box(index, leaf.shape) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
    reading = {box: reader.begin(name, *box) for box in boxes}

    def finish() -> jax.Array:
        parts = {box: wait() for box, wait in reading.items()}
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_box(index, leaf.shape)])

    return finish


def _path(path: Any) -> str:
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(names).removesuffix(".value")
