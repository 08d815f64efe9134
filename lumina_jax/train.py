"""Train a model: python -m lumina_jax.train --config configs/debug.py --workdir runs/debug

What happens, and in what order, is told in `lumina.runs.train`; here is what JAX does in it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina.architecture import at_capacity, at_length, depth_capacity_at
from lumina.config import Config, MeshConfig
from lumina.data.rows import Batches
from lumina.errors import LuminaError, exit_with
from lumina.mesh import named
from lumina.runs import processes, train
from lumina.runs.console import Console
from lumina.runs.directory import Events, RunDirectory
from lumina.runs.evaluation import figures_by_source
from lumina.runs.loop import Backend
from lumina.runs.origin import Origin
from lumina.runs.text import Text
from lumina.runs.units import gib

if TYPE_CHECKING:  # jax is imported when a run and its data are in order
    from lumina_jax.checkpoint import Checkpoints
    from lumina_jax.step import TrainState

SAMPLING = 0.4  # of a device's memory that the weights may take beside its part of a state, to sample from them there

JAX = train.Framework(
    program="lumina_jax",
    is_first=processes.is_first,
    dtypes=("float32", "bfloat16"),
    attention=("auto", "reference", "chunked", "splash"),
    grouped=("auto", "blocks", "ragged"),
    remat=("none", "full", "dots"),
    moments=("float32", "bfloat16"),
    offload=(False, True),
)


def train_and_evaluate(config: Config, workdir: Path, accept_changes: bool = False) -> int:
    """Train as `config` says, in `workdir`; a run found there goes on from its newest checkpoint.

    Returns the exit code: 0 when done, 75 when a signal stopped it and all is saved.
    """
    try:
        code = train.train_and_evaluate(JAX, Trainer, config, workdir, accept_changes)
    except LuminaError:
        raise
    except Exception as error:
        if hosts := sys.modules.get("lumina_jax.hosts"):  # else it was before there was any other process
            hosts.say_who_is_gone(error)
        raise
    if hosts := sys.modules.get("lumina_jax.hosts"):
        hosts.leave_together()
    return code


class Trainer:
    """See `lumina.runs.train.Trainer`. The state and each batch lie on the mesh as `lumina.mesh` says."""

    def __init__(self, config: Config):
        import jax

        from lumina.layout import choose
        from lumina_jax.allocator import keep_large_buffers
        from lumina_jax.device import at_hand, describe, memory_of_each
        from lumina_jax.hosts import agreed, join, require_same
        from lumina_jax.mesh import axes_of, make_mesh, row_blocks, shaped, shardings
        from lumina_jax.step import init_state, state_shapes

        self.buffers = keep_large_buffers()
        join()
        self.why_mesh = ""
        if config.mesh.auto and not named(config.mesh):
            config, self.why_mesh = choose(config, at_hand(), agreed(memory_of_each() >> 20) << 20)
        self.mesh = make_mesh(config)
        self.config = config = replace(config, mesh=MeshConfig(**axes_of(self.mesh)._asdict()))
        self.versions, self.device = {"jax": jax.__version__}, describe(self.mesh)
        self.processes, self.part = jax.process_count(), row_blocks(self.mesh)
        self.agreed, self.require_same = agreed, require_same
        shapes, self.graphdef = state_shapes(config)
        self.like: TrainState = shaped(config, self.mesh, shapes)
        self.fresh = jax.jit(lambda: init_state(config)[1], out_shardings=shardings(config, self.mesh, shapes))

    def checkpoints(
        self, run: RunDirectory, events: Events, backup: Callable[[int], Path] | None, origin: Origin | None
    ) -> "Checkpoints":
        """Where the run's states are kept."""
        from lumina_jax.checkpoint import Checkpoints

        begin = (lambda: self._begun(origin)) if origin else None
        return Checkpoints(run, self.config.checkpoint, events, self.like, backup, begin)

    def _begun(self, origin: Origin) -> "tuple[TrainState, dict[str, Any]]":
        from lumina_jax.checkpoint import from_state

        state, record = origin.load()
        if state.is_whole:
            return from_state(self.config.model, state, self.like), record
        variables = from_state(self.config.model, state, {"variables": self.like.variables})["variables"]
        return self.fresh()._replace(variables=variables), record

    def steps_of(self, state: "TrainState") -> int:
        """Batches that a state has consumed."""
        return int(state.step)

    def forms(self) -> str:
        """The forms of kernels that the devices take, and why."""
        from lumina_jax.device import chosen_forms

        told = f"{chosen_forms(self.config)}; {self.buffers}"
        return f"{told}\nmesh: {self.why_mesh}" if self.why_mesh else told

    def peak(self) -> float:
        """FLOP/s of matrix products on all devices."""
        import jax

        from lumina_jax.device import matmul_peak

        return matmul_peak(self.config.train.compute_dtype) * (1 if jax.default_backend() == "cpu" else self.mesh.size)

    def backend(
        self,
        text: Text,
        start: int,
        writes: bool,
        console: Console,
        aside: Callable[[], AbstractContextManager[None]],
    ) -> Backend:
        """What the loop calls; its step is compiled before anything is said to have begun."""
        import jax

        from lumina.generation import Sampling
        from lumina_jax.device import memory_of_each
        from lumina_jax.evaluate import sums
        from lumina_jax.generate import Generator
        from lumina_jax.hosts import meet
        from lumina_jax.mesh import own_copy, place_each, place_rows
        from lumina_jax.step import controls, make_eval_step, make_train_step, state_shapes

        config, mesh, tokenizer = self.config, self.mesh, text.tokenizer
        token_bytes = tokenizer.token_bytes()
        eval_step = jax.jit(make_eval_step(config, self.graphdef, token_bytes, mesh))

        def inputs(batch: dict[str, Any], update: bool, stop: bool) -> tuple[Any, Any]:
            return place_rows(mesh, batch), controls(config, update, place_each(mesh, stop))

        def compile_step(capacity: float, T: int, batch: dict[str, Any]) -> Any:
            """The step at a depth capacity, which may be annealed, and a row length, which may grow."""
            console.status("compiling the training step")
            began, stage = time.perf_counter(), at_length(at_capacity(config, capacity), T)
            step = jax.jit(make_train_step(stage, state_shapes(stage)[1], mesh, token_bytes), donate_argnums=0)
            compiled = step.lower(self.like, *inputs(batch, True, False)).compile()
            at = [f"a depth capacity of {capacity:g}"] if config.model.mod.anneal_steps else []
            at += [f"rows of {T:,} tokens"] if several else []
            console.say(f"compiled in {time.perf_counter() - began:.1f} s" + (f" for {' and '.join(at)}" if at else ""))
            return compiled

        several = len({stage.sequence_length for stage in text.stages}) > 1
        first = min(start, config.train.steps - 1)
        of_first = depth_capacity_at(config.model.mod, first), text.train.sequence_length(first)
        compiled = {of_first: compile_step(*of_first, text.train.batch(text.train.begin(first)))}
        begun = set[tuple[float, int]]()

        def train_step(number: int, state: Any, batch: dict[str, Any], update: bool, stop: bool) -> tuple[Any, Any]:
            made_for = depth_capacity_at(config.model.mod, number), text.train.sequence_length(number)
            if made_for not in compiled:
                with aside():
                    compiled[made_for] = compile_step(*made_for, batch)
            if made_for not in begun:  # some may have compiled, or restored, for longer
                meet("step {:g} {}".format(*made_for))
                begun.add(made_for)
            return compiled[made_for](state, *inputs(batch, update, stop))

        def held_out_loss(state: Any, alive: Any) -> dict[str, Any]:
            def placed(batches: Batches) -> Iterator[Any]:
                return (place_rows(mesh, batch) for batch in batches.evaluation(config.train.eval_rows))

            totals = {name: sums(eval_step, state.variables, placed(of), alive) for name, of in text.held_out.items()}
            return figures_by_source(totals)

        def sample(state: Any, count: int) -> list[str]:
            needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.like.variables))
            if self.agreed(mesh.size > 1 and needed > SAMPLING * memory_of_each()):
                console.say(f"no samples: they take all of the weights, {gib(needed)}, on one device")
                return []
            generator = Generator(config, self.graphdef, own_copy(mesh, state.variables), tokenizer)
            prompt = config.monitor.sample_prompt
            length = min(config.monitor.sample_tokens, generator.room(prompt))
            return [prompt + "".join(generator.text(prompt, length, Sampling(seed=seed))) for seed in range(count)]

        return Backend(
            fresh=self.fresh,
            train_step=train_step,
            fetch=jax.device_get,
            steps_of=self.steps_of,
            evaluate=held_out_loss,
            sample=sample,
            processes=self.processes,
            writes=writes,
            samples_together=True,
        )


def main() -> None:
    """Entry point of `python -m lumina_jax.train`."""
    train.run_command(JAX, train_and_evaluate)


if __name__ == "__main__":
    exit_with(main)
