"""Train a model: python -m lumina_torch.train --config configs/debug.py --workdir runs/debug-torch

What happens, and in what order, is told in `lumina.runs.train`; here is what PyTorch does in it.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lumina.architecture import depth_capacity_at
from lumina.config import Config
from lumina.errors import ConfigError, UsageError, exit_with
from lumina.runs import train
from lumina.runs.console import Console
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.evaluation import figures_by_source
from lumina.runs.loop import Backend
from lumina.runs.origin import Origin
from lumina.runs.text import Text

if TYPE_CHECKING:  # torch is imported when a run and its data are in order
    from lumina_torch.checkpoint import Checkpoints
    from lumina_torch.model import Transformer
    from lumina_torch.step import TrainState

TORCH = train.Framework(
    program="lumina_torch",
    is_first=lambda environment: (environment.get("RANK") or "0") == "0",
    dtypes=("float32", "bfloat16", "float16"),
    attention=("auto", "reference", "sdpa", "flash"),
    grouped=("auto", "grouped_mm", "loop"),
    remat=("none", "full"),
    moments=("float32",),
    offload=(False,),
)


def train_and_evaluate(config: Config, workdir: Path, accept_changes: bool = False) -> int:
    """Train as `config` says, in `workdir`; a run found there goes on from its newest checkpoint.

    Returns the exit code: 0 when done, 75 when a signal stopped it and all is saved.
    """
    _require_processes(config)
    return train.train_and_evaluate(TORCH, _make, config, workdir, accept_changes)


def _require_processes(config: Config) -> None:
    """Raise a ConfigError or UsageError unless config and environment agree on how many processes there are."""
    processes = os.environ.get("WORLD_SIZE") or "1"
    for axis in ("fsdp", "expert", "context", "tensor"):
        if (size := getattr(config.mesh, axis)) not in (-1, 1):
            raise ConfigError(f"mesh.{axis} = {size}: must be 1 in lumina_torch; torch.deepspeed.zero_stage splits a model")
    if config.mesh.data not in (-1, 1) and str(config.mesh.data) != processes:
        raise ConfigError(
            f"mesh.data = {config.mesh.data}: lumina_torch has one device a process; -1 or {processes} would work"
        )
    if config.torch.deepspeed.zero_stage == "off" and processes != "1":
        raise UsageError(
            f"WORLD_SIZE = {processes}: several processes train one model with DeepSpeed; "
            "set --config.torch.deepspeed.zero_stage=0"
        )


def _make(config: Config) -> "Trainer":
    if config.torch.deepspeed.zero_stage == "off":
        return Trainer(config)
    from lumina_torch.zero_train import ZeroTrainer

    return ZeroTrainer(config)


class Trainer:
    """See `lumina.runs.train.Trainer`. One process with one device."""

    part: tuple[tuple[int, ...], int] = ((0,), 1)
    samples_together = False  # whether all processes take part when one generates

    def __init__(self, config: Config):
        import torch

        from lumina_torch.device import be_exact, choose_device, describe

        self.config, self.policy = config, choose_device(config)
        be_exact(self.policy)
        self.versions, self.device = {"torch": str(torch.__version__)}, describe(self.policy)

    def require_same(self, what: str, digest: str) -> None:
        """It is, in one process."""

    def agreed(self, value: Any) -> Any:
        """What this process says."""
        return value

    def checkpoints(
        self, run: RunDirectory, events: Events, backup: Callable[[int], Path] | None, origin: Origin | None
    ) -> "Checkpoints":
        """Where the run's states are kept."""
        from lumina_torch.checkpoint import Checkpoints

        begin = (lambda: self._begun(origin)) if origin else None
        return Checkpoints(run, self.config, events, self.policy.device, backup, begin)

    def _begun(self, origin: Origin) -> "tuple[TrainState, dict[str, Any]]":
        from lumina_torch.checkpoint import from_state

        state, record = origin.load()
        return from_state(self.config, state, self.policy.device), record

    def steps_of(self, state: "TrainState") -> int:
        """Batches that a state has consumed."""
        return state.step

    def forms(self) -> str:
        """The forms of kernels that the device takes, and why."""
        from lumina_torch.device import chosen_forms

        return "\n".join([chosen_forms(self.config, self.policy), *self.policy.notes])

    def peak(self) -> float:
        """FLOP/s of matrix products."""
        from lumina_torch.device import matmul_peak

        return matmul_peak(self.config.train.compute_dtype, self.policy.device)

    def backend(
        self,
        text: Text,
        start: int,
        writes: bool,
        console: Console,
        aside: Callable[[], AbstractContextManager[None]],
    ) -> Backend:
        """What the loop calls."""
        from lumina.generation import Sampling
        from lumina_torch.device import fetch
        from lumina_torch.evaluate import sums
        from lumina_torch.generate import Generator
        from lumina_torch.step import controls

        config, tokenizer = self.config, text.tokenizer
        step, eval_step = self.make_steps(tokenizer.token_bytes())
        seen: set[tuple[float, int]] = set()  # depth capacities and row lengths that have been compiled

        def train_step(number: int, state: Any, batch: dict[str, Any], update: bool, stop: bool) -> tuple[Any, Any]:
            capacity = depth_capacity_at(config.model.mod, number)
            made_for = capacity, text.train.sequence_length(number)
            compiles = config.torch.compile and made_for not in seen
            seen.add(made_for)
            with aside() if compiles else nullcontext():
                set_depth_capacity(state.transformer, capacity)
                state, metrics = step(state, batch, controls(config, update, np.full(1, stop, np.int32)))
                set_depth_capacity(state.transformer, config.model.mod.capacity)
            return state, metrics

        def held_out_loss(state: Any, alive: Any) -> dict[str, Any]:
            rows = config.train.eval_rows
            return figures_by_source(
                {
                    source: sums(eval_step, state.transformer, batches.evaluation(rows), alive)
                    for source, batches in text.held_out.items()
                }
            )

        def sample(state: Any, count: int) -> list[str]:
            transformer = self.whole(state)
            if transformer is None:
                return []
            generator = Generator(config, transformer, tokenizer)
            prompt = config.monitor.sample_prompt
            length = min(config.monitor.sample_tokens, generator.room(prompt))
            return [prompt + "".join(generator.text(prompt, length, Sampling(seed=seed))) for seed in range(count)]

        return Backend(
            fresh=self.fresh,
            train_step=train_step,
            fetch=fetch,
            steps_of=self.steps_of,
            evaluate=held_out_loss,
            sample=sample,
            processes=self.part[1],
            writes=writes,
            samples_together=self.samples_together,
        )

    def fresh(self) -> "TrainState":
        """The state before the first step."""
        from lumina_torch.step import init_state

        return init_state(self.config, self.policy.device)

    def make_steps(self, token_bytes: np.ndarray) -> tuple[Callable, Callable]:
        """(the training step, the evaluation step)."""
        from lumina_torch.step import make_eval_step, make_train_step

        policy = self.policy
        step = make_train_step(self.config, token_bytes, policy.dtype, policy.device, policy.pin_memory)
        return step, make_eval_step(self.config, token_bytes, policy.dtype, device=policy.device)

    def whole(self, state: "TrainState") -> "Transformer | None":
        """The model, for generation; None in a process that has none to generate with."""
        return state.transformer


def set_depth_capacity(transformer: Any, capacity: float) -> None:
    """Have Mixture-of-Depths layers take this share of tokens from now on, as annealing asks."""
    for block in transformer.blocks:
        if hasattr(block, "mod") and block.mod.mod.capacity != capacity:
            block.mod.mod = replace(block.mod.mod, capacity=capacity)


def main() -> None:
    """Entry point of `python -m lumina_torch.train`."""
    train.run_command(TORCH, train_and_evaluate)


if __name__ == "__main__":
    exit_with(main)
