"""Checkpoints of a run: safetensors holds the arrays under canonical names, `lumina.runs.steps` makes a step exist.

A step's directory holds model.safetensors, optimizer.safetensors, and the manifest, which has for each array shape, dtype and
digest.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lumina.config import Config
from lumina.errors import CheckpointError
from lumina.interchange.state import State, arrays, digests, load_here, read, shapes, write
from lumina.runs import checkpoints
from lumina.runs.checkpoints import Record, changed, check_fits, digest_of
from lumina.runs.directory import Events, RunDirectory
from lumina_torch.device import be_exact, choose_device
from lumina_torch.model import Transformer, load_state, state_by_name
from lumina_torch.optimizer import load_moments, make_optimizer, moments
from lumina_torch.step import Guard, LossScale, TrainState, compile_blocks, init_state


class Checkpoints(checkpoints.Checkpoints):
    """The states of a run that is being trained."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        events: Events,
        device: torch.device | str = "cpu",
        backup: Callable[[int], Path] | None = None,
        origin: Callable[[], tuple[TrainState, Record]] | None = None,
        writes: bool = True,
    ):
        """As of `lumina.runs.checkpoints`; `config` and `device` say what a state is, and where."""
        self._model_config, self._device = config, device
        self._wanted = shapes(config)
        super().__init__(run, config.checkpoint, events, backup, writes, origin)

    def _bytes(self) -> int:
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self._wanted.values())

    def _on_host(self, state: TrainState | State) -> tuple[State, dict[str, Record], str]:
        host = state if isinstance(state, State) else to_state(state)
        named = arrays(host)
        found = digests(named)
        leaves = {n: {"shape": list(a.shape), "dtype": str(a.dtype), "digest": found[n]} for n, a in named.items()}
        return host, leaves, digest_of({name: found[name] for name in host.weights})

    def _write_arrays(self, directory: Path, host: State) -> None:
        write(directory, host)

    def _check_fits(self, directory: Path, leaves: dict[str, Record]) -> None:
        check_fits(directory, leaves, self._wanted)

    def _read(self, directory: Path, leaves: dict[str, Record]) -> tuple[TrainState, list[str]]:
        host = read(directory)
        wrong = changed(digests(arrays(host)), leaves)
        return from_state(self._model_config, host, self._device), wrong


def load(path: Path, best: bool = False) -> tuple[Config, Transformer, int]:
    """(config, model, step) of the newest state that verifies of a run of either backend, or the best, or of a canonical
    directory, on this machine's device.

    Raises CheckpointError when there is none; changes nothing.
    """
    config, state = load_here(path, best)
    return config, transformer_of(config, state), state.step


def transformer_of(config: Config, state: State) -> Transformer:
    """The weights of `state` as a model of `config`, on the device that it asks for."""
    policy = choose_device(config)
    be_exact(policy)
    transformer = Transformer(config.model, policy.device)
    load_state(transformer, state.weights)
    return transformer.eval()


def to_state(state: TrainState) -> State:
    """A copy on the host, which later steps leave alone."""

    def copied(named: dict[str, Tensor]) -> dict[str, np.ndarray]:
        return {name: np.array(tensor.detach().cpu().numpy()) for name, tensor in named.items()}

    first, second, updates = moments(state.transformer, state.optimizer)
    weights = copied(state_by_name(state.transformer))
    guard, scale = state.guard, state.loss_scale or LossScale(0.0, 0)
    return State(
        step=state.step,
        weights=weights,
        first_moment=copied(first),
        second_moment=copied(second),
        updates=updates,
        losses_W=guard.losses_W.copy(),
        skipped=int(guard.skipped),
        loss_scale=scale.scale,
        good_steps=scale.good_steps,
    )


def from_state(config: Config, state: State, device: torch.device | str = "cpu") -> TrainState:
    """The inverse of `to_state`. Of weights alone it makes a fresh state around them.

    Raises CheckpointError for a tensor that does not fit.
    """
    try:
        if not state.is_whole:
            fresh = init_state(config, device)
            load_state(fresh.transformer, state.weights)
            return fresh
        transformer = Transformer(config.model, device)
        load_state(transformer, state.weights)
        if config.torch.compile:
            compile_blocks(transformer)
        optimizer = make_optimizer(config, transformer)
        load_moments(transformer, optimizer, state.first_moment, state.second_moment, state.updates)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    scale = None
    if config.train.compute_dtype == "float16":  # one that another precision left behind has none
        scale = LossScale(state.loss_scale or config.torch.loss_scale, state.good_steps)
    guard = Guard(np.array(state.losses_W, np.float32), state.skipped)
    return TrainState(state.step, transformer, optimizer, guard, scale)
