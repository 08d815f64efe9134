"""Training in several processes, which hold one state by DeepSpeed's ZeRO: what differs from `lumina_torch.train`."""

import os
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lumina.architecture import counts
from lumina.config import Config
from lumina.errors import CheckpointError, ConfigError
from lumina.interchange.state import State, arrays, digests, read
from lumina.runs.checkpoints import Record, changed
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.origin import Origin
from lumina_torch import checkpoint, processes
from lumina_torch.device import Policy
from lumina_torch.model import Transformer
from lumina_torch.stages import choose_stage, require_possible
from lumina_torch.step import TrainState
from lumina_torch.train import Trainer
from lumina_torch.zero import Zero, join, make_shared_eval_step, make_train_step


class ZeroTrainer(Trainer):
    """See `lumina.runs.train.Trainer`. Each process has one device and its rows of a batch."""

    def __init__(self, config: Config):
        if find_spec("deepspeed") is None:
            stage = config.torch.deepspeed.zero_stage
            raise ConfigError(f"torch.deepspeed.zero_stage = {stage!r}: needs the package deepspeed; off would work without")
        super().__init__(config)
        self.place = processes.place_of()
        self.policy = own_device(self.policy, self.place)
        require_possible(config, self.policy, self.place)
        join(self.policy, self.place, config.guard.hang_seconds)
        self.part = ((self.place.number,), self.place.processes)
        self.stage, self.why = self._stage()
        self.samples_together = self.stage == 3
        self.versions |= {"deepspeed": version("deepspeed")}
        self.device = f"{self.place.processes} processes with {self.device.partition(';')[0]} each"
        self._zero: Zero | None = None

    def agreed(self, value: Any) -> Any:
        """What the first process says."""
        return processes.agreed(value, self.policy.device)

    def require_same(self, what: str, digest: str) -> None:
        """Raise a ConfigError, in all processes, unless each has the same SHA-256."""
        processes.require_same(what, digest, self.policy.device)

    def _stage(self) -> tuple[int, str]:
        zero = self.config.torch.deepspeed
        if zero.zero_stage != "auto":
            return int(zero.zero_stage), "as the config says"
        offload = (zero.offload_optimizer != "none", zero.offload_parameters != "none")
        free = self.agreed(bytes_free(self.policy))
        return choose_stage(counts(self.config).total, free, self.place.processes, *offload)

    @property
    def zero(self) -> Zero:
        """Made when all processes are known to have the same config."""
        if self._zero is None:
            self._zero = Zero(self.config, self.policy, self.place, self.stage)
        return self._zero

    def checkpoints(
        self, run: RunDirectory, events: Events, backup: Callable[[int], Path] | None, origin: Origin | None
    ) -> "Checkpoints":
        """Where the run's states are kept."""
        begin = (lambda: self._begun(origin)) if origin else None
        return Checkpoints(run, self.config, events, self.zero, backup, begin)

    def _begun(self, origin: Origin) -> tuple[TrainState, dict[str, Any]]:
        state, record = origin.load()
        return self.zero.load(state), record

    def forms(self) -> str:
        """The forms of kernels that the devices take, what is split, and why."""
        told = [super().forms(), f"ZeRO stage {self.stage}: {self.why}"]
        if self.stage == 3 and self.config.train.remat == "none":
            told.append("without train.remat the backward pass holds the weights of all layers at once")
        return "\n".join(told)

    def peak(self) -> float:
        """FLOP/s of matrix products on all devices; processes on one CPU share it."""
        return super().peak() * (1 if self.policy.device.type == "cpu" else self.place.processes)

    def fresh(self) -> TrainState:
        """The state before the first step."""
        return self.zero.fresh()

    def make_steps(self, token_bytes: np.ndarray) -> tuple[Callable, Callable]:
        """(the training step, the evaluation step)."""
        dtype = self.policy.dtype
        return make_train_step(self.zero, token_bytes, dtype), make_shared_eval_step(self.zero, token_bytes, dtype)

    def whole(self, state: TrainState) -> Transformer | None:
        """The model, for generation; None in a process that has none to generate with."""
        return self.zero.copy()


def own_device(policy: Policy, place: processes.Place) -> Policy:
    """The policy with the device that is this process's; raises ConfigError where there are too few."""
    if policy.device.type != "cuda":
        return policy
    if place.local >= torch.cuda.device_count():
        raise ConfigError(
            f"LOCAL_RANK = {place.local}: this machine has {torch.cuda.device_count()} CUDA devices, one a process"
        )
    torch.cuda.set_device(place.local)
    return replace(policy, device=torch.device("cuda", place.local))


def bytes_free(policy: Policy) -> int:
    """Of the device's memory; processes on one CPU share it."""
    if policy.device.type == "cuda":
        return torch.cuda.mem_get_info(policy.device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


class Checkpoints(checkpoint.Checkpoints):
    """The same files as of one process: the first writes them, of tensors that all gather."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        events: Events,
        zero: Zero,
        backup: Callable[[int], Path] | None = None,
        origin: Callable[[], tuple[TrainState, Record]] | None = None,
    ):
        """As of `lumina.runs.checkpoints`."""
        self._zero = zero
        super().__init__(run, config, events, zero.policy.device, backup, origin, writes=zero.place.number == 0)

    def save(self, step: int, state: TrainState, record: Callable[[str], Record]) -> None:
        """As of `lumina.runs.checkpoints`; all take part."""
        self.wait()
        if not self._agreed(step in self.steps.all()):
            super().save(step, self._zero.to_state(state), record)

    def _read(self, directory: Path, leaves: dict[str, Record]) -> tuple[TrainState, list[str]]:
        host: State | None = None
        wrong: list[str] = []
        error: CheckpointError | None = None
        if self._writes:
            try:
                host = read(directory)
                wrong = changed(digests(arrays(host)), leaves)
            except CheckpointError as caught:
                error = caught
        if not self._agreed(error is None):
            raise error or CheckpointError(f"{directory}: the first process cannot read it")
        return self._zero.load(host), wrong

    def _agreed(self, value: Any) -> Any:
        return processes.agreed(value, self._zero.policy.device)

    def _in_any(self, value: bool) -> bool:
        return processes.in_any(value, self._zero.policy.device)
