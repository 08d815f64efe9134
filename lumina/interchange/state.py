"""A training state as numpy arrays by canonical name, whichever backend made it, and where it is read from.

W losses remembered. A state on disk is model.safetensors, the parameters and router biases, and optimizer.safetensors: for each
parameter `first_moment.NAME` and `second_moment.NAME`, and beside them the numbers of `SCALARS`.
"""

import json
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import tensor_table
from lumina.config import Config, ModelConfig, beside, from_dict, validate
from lumina.errors import CheckpointError, ConfigError, UsageError
from lumina.interchange import orbax
from lumina.runs.checkpoints import changed, check_fits, find, written_by
from lumina.runs.directory import RunDirectory
from lumina.runs.steps import MANIFEST, Steps, differing, read_manifest

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MOMENTS = ("first_moment", "second_moment")
SCALARS = {  # name -> dtype on disk; all but the losses have no dimension
    "step": np.int64,
    "updates": np.int64,
    "losses_W": np.float32,
    "skipped": np.int64,
    "loss_scale": np.float64,
    "good_steps": np.int64,
}


@dataclass
class State:
    """All that a step changes; without moments, a model alone."""

    step: int  # batches consumed
    weights: dict[str, np.ndarray]  # parameters and router biases by canonical name, float32, in the order of the table
    first_moment: dict[str, np.ndarray] = field(default_factory=dict)  # Adam's, of the parameters
    second_moment: dict[str, np.ndarray] = field(default_factory=dict)
    updates: int = 0  # that were made; Adam corrects its bias by it
    losses_W: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # the guard's; NaN where there is none yet
    skipped: int = 0  # updates skipped in a row
    loss_scale: float = 0.0  # of float16; 0 where there is none
    good_steps: int = 0  # updates since the loss scale last changed

    @property
    def is_whole(self) -> bool:
        """Whether training can go on from it as if it had not stopped."""
        return bool(self.first_moment)


# ----------------------------------------------------------------------------------------------------------- two files


def arrays(state: State) -> dict[str, np.ndarray]:
    """Every array of a state, named as on disk: the weights, and of a whole state moments and scalars."""
    named = dict(state.weights)
    if state.is_whole:
        for moment in MOMENTS:
            named.update({f"{moment}.{name}": array for name, array in getattr(state, moment).items()})
        named.update({name: np.asarray(getattr(state, name), dtype) for name, dtype in SCALARS.items()})
    return named


def shapes(config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of a whole state of `config`, named as on disk."""
    table = tensor_table(config.model)
    wanted = {tensor.name: (tensor.shape, "float32") for tensor in table}
    for moment in MOMENTS:
        wanted.update({f"{moment}.{tensor.name}": (tensor.shape, "float32") for tensor in table if tensor.trained})
    for name, dtype in SCALARS.items():
        wanted[name] = ((config.guard.spike_window,) if name == "losses_W" else (), np.dtype(dtype).name)
    return wanted


def digests(named: dict[str, np.ndarray]) -> dict[str, str]:
    """16 hexadecimal digits of the SHA-256 of each array's bytes."""
    return {name: sha256(np.asarray(array, order="C").data).hexdigest()[:16] for name, array in named.items()}


def write(directory: Path, state: State) -> None:
    """Write a state into `directory`; OSError where the disk fails."""
    from safetensors.numpy import save_file

    named = {name: np.asarray(array, order="C") for name, array in arrays(state).items()}
    weights = {name: named.pop(name) for name in state.weights}
    _save(save_file, weights, directory / MODEL)
    if named:
        _save(save_file, named, directory / OPTIMIZER)


def _save(save_file: Any, named: dict[str, np.ndarray], path: Path) -> None:
    """Raise OSError where safetensors has an error of its own for what the disk says."""
    from safetensors import SafetensorError

    try:
        save_file(named, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def read(directory: Path, step: int = 0) -> State:
    """The state in `directory`, in any order, of `step` if only a model is there; raises CheckpointError for other files."""
    weights = _load(directory / MODEL)
    if not (directory / OPTIMIZER).is_file():
        return State(step, weights)
    rest = _load(directory / OPTIMIZER)
    parts: dict[str, Any] = {moment: {} for moment in MOMENTS}
    for name, array in rest.items():
        moment, _, of = name.partition(".")
        if moment in MOMENTS:
            parts[moment][of] = array
        elif name in SCALARS:
            parts[name] = array if name == "losses_W" else array.item()
        else:
            raise CheckpointError(f"{directory / OPTIMIZER}: {name}: no such part of a state")
    if missing := sorted(SCALARS.keys() - parts.keys()):
        raise CheckpointError(f"{directory / OPTIMIZER}: {missing[0]}: missing")
    return State(weights=weights, **parts)


def _load(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, OSError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read as safetensors: {said}") from error


# ------------------------------------------------------------------------------------------------------ where it lies


class Source(NamedTuple):
    """A run of either backend, or a directory with a model under canonical names, and the step that is taken of it."""

    path: Path
    directory: Path  # with the arrays
    config: Config
    manifest: dict[str, Any]
    is_run: bool

    @property
    def step(self) -> int:
        return int(self.manifest.get("step", 0))

    @property
    def is_whole(self) -> bool:
        """Whether there is more than weights."""
        return written_by(self.directory) == "lumina_jax" or (self.directory / OPTIMIZER).is_file()


def locate(path: Path, best: bool = False, step: int | None = None) -> Source:
    """Find the state that `load` would read, with every file of it verified.

    Raises:
        UsageError: `path` is no run and no such directory. ConfigError: its config cannot be used.
        CheckpointError: there is no whole state, or it is damaged.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        what = "no such directory" if not path.exists() else "has no config.json"
        raise UsageError(f"{path}: {what}; give a run directory, or what `lumina export` or `lumina import` wrote")
    try:
        config = beside(path, validate(from_dict(json.loads(config_file.read_text(encoding="utf-8")))))
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{config_file}: cannot be read as a config: {str(error).splitlines()[0]}") from error
    if not (path / MODEL).is_file():
        run = RunDirectory(path)
        step = find(run, best) if step is None else step
        steps = Steps(run.checkpoints)
        if wrong := steps.verify(step):
            raise CheckpointError(f"{steps.directory(step)}: damaged: {wrong[0]}")
        return Source(path, steps.directory(step), config, steps.manifest(step), is_run=True)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(f"{path}: has no {MANIFEST}, so that nothing can be verified; export or import it again")
    manifest = read_manifest(path)
    needed = [name for name in (MODEL, OPTIMIZER) if (path / name).is_file() and name not in manifest["files"]]
    if wrong := [f"{name}: not in the manifest" for name in needed] + differing(path, manifest["files"]):
        raise CheckpointError(f"{path}: damaged: {wrong[0]}")
    return Source(path, path, config, manifest, is_run=False)


def load(path: Path, best: bool = False, step: int | None = None) -> tuple[Config, State, dict[str, Any]]:
    """(config, state, manifest) of the newest step of a run (or its best, or `step`), or of a canonical directory.

    All is verified: the hash of every file, shapes and dtypes, and of a run the digest of every array. Raises as `locate`.
    """
    source = locate(path, best, step)
    return source.config, read_state(source), source.manifest


def load_here(path: Path, best: bool = False) -> tuple[Config, State]:
    """(config, state) as `load` finds them; the config asks for this machine's device and forms: it may be another's."""
    config, state, _ = load(path, best)
    model = replace(config.model, attention_form="auto", moe=replace(config.model.moe, grouped_form="auto"))
    return replace(config, model=model, torch=replace(config.torch, device="auto", compile=False)), state


def backend_of(path: Path) -> str:
    """jax or torch, which trained the run at `path`; jax for a canonical directory and whatever else either may open."""
    steps = Steps(RunDirectory(path).checkpoints)
    newest = steps.all()[-1:] if not (path / MODEL).is_file() else []
    return "torch" if any(written_by(steps.directory(step)) == "lumina_torch" for step in newest) else "jax"


def read_state(source: Source) -> State:
    """The arrays of what `locate` found; raises CheckpointError where they are not those that were saved, or do not fit."""
    directory, model, leaves = source.directory, source.config.model, source.manifest.get("leaves", {})
    if written_by(directory) == "lumina_jax":
        try:
            named = orbax.read(directory, leaves)
            parts = orbax.from_leaves(model, named)
        except (ValueError, KeyError, IndexError) as error:
            raise CheckpointError(f"{directory}: cannot be read: {str(error).splitlines()[0]}") from error
        found = {name: orbax.digest(array) for name, array in named.items()}
        state = State(**parts | {name: int(parts[name]) for name in ("step", "updates", "skipped")})
    else:
        state = read(directory, source.step)
        named = arrays(state)
        found = digests(named) if leaves else {}
    if leaves:
        check_fits(directory, leaves, {name: (array.shape, str(array.dtype)) for name, array in named.items()})
        if wrong := changed(found, leaves):
            raise CheckpointError(f"{directory}: damaged: {wrong[0]}")
    return _in_order(directory, model, state)


def _in_order(directory: Path, model: ModelConfig, state: State) -> State:
    """The same, in the order of the table of tensors, each of which must be there in its shape."""
    table = tensor_table(model)
    parts = [("weights", table)]
    if state.is_whole:
        parts += [(moment, [tensor for tensor in table if tensor.trained]) for moment in MOMENTS]
    for part, tensors in parts:
        named = getattr(state, part)
        prefix = "" if part == "weights" else f"{part}."
        leaves = {prefix + name: {"shape": array.shape, "dtype": str(array.dtype)} for name, array in named.items()}
        check_fits(directory, leaves, {prefix + tensor.name: (tensor.shape, "float32") for tensor in tensors})
        setattr(state, part, {tensor.name: named[tensor.name] for tensor in tensors})
    return state
