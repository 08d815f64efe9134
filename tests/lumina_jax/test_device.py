"""The memory estimate against the compiler's own account, and what a device tells of itself."""

import jax
import jax.numpy as jnp
import pytest

from lumina.architecture import memory
from lumina.config import load, override
from lumina_jax.device import compiled_memory, matmul_peak, peak_memory
from lumina_jax.step import controls, make_train_step, state_shapes


@pytest.mark.parametrize("flags", [[], ["--config.model.num_layers=4", "--config.train.remat=True"]], ids=["debug", "remat"])
def test_expected_memory_is_within_25_percent_of_the_compiled_step(flags):
    config = override(load("debug"), flags)
    shapes, graphdef = state_shapes(config)
    size = (config.train.batch_size, config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(size, jnp.int32) for name in ("inputs", "targets", "segments", "positions")}
    batch["weights"] = jax.ShapeDtypeStruct(size, jnp.float32)
    step = jax.jit(make_train_step(config, graphdef), donate_argnums=0).lower(shapes, batch, controls(config)).compile()
    assert memory(config).total == pytest.approx(compiled_memory(step), rel=0.25)


def test_compiled_memory_counts_arguments_and_results_that_reuse_none():
    array = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    fresh = jax.jit(lambda a: a + 1).lower(array).compile()
    reused = jax.jit(lambda a: a + 1, donate_argnums=0).lower(array).compile()
    assert (compiled_memory(fresh), compiled_memory(reused)) == (8_000_000, 4_000_000)


def test_peaks_are_of_this_machine():
    assert matmul_peak("float32", seconds=0.01) > 1e8
    assert peak_memory() > 50 << 20
