"""The memory estimate against the compiler's own account, and what a device tells of itself."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lumina.architecture import at_capacity
from lumina.config import load, override
from lumina.errors import ConfigError
from lumina.footprint import footprint
from lumina.layout import choose
from lumina.mesh import Sizes
from lumina.topology import CHIPS, Topology, unnamed
from lumina_jax.device import at_hand, chosen_forms, compiled_memory, matmul_peak, peak_memory
from lumina_jax.mesh import ROWS, mesh_of, shaped
from lumina_jax.step import controls, make_train_step, state_shapes
from lumina_jax.train import Trainer
from tests.lumina_jax.tiny import tiny

ESTIMATED = {
    "debug": [],
    "remat": ["--config.model.num_layers=4", "--config.train.remat=full"],
    "dropless": ["--config.model.moe.dispatch=dropless", "--config.model.moe.top_k=2"],
    "block": ["--config.model.mod.scope=block", "--config.model.mod.anneal_steps=8"],
}


@pytest.mark.parametrize("flags", ESTIMATED.values(), ids=ESTIMATED.keys())
def test_expected_memory_is_within_25_percent_of_the_compiled_step(flags):
    config = override(load("debug"), flags)
    if config.model.mod.anneal_steps:  # the first stage is the largest
        config = at_capacity(config, config.model.mod.start_capacity)
    shapes, graphdef = state_shapes(config)
    size = (config.train.batch_size, config.data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(size, jnp.int32) for name in ("inputs", "targets", "segments", "positions")}
    batch["weights"] = jax.ShapeDtypeStruct(size, jnp.float32)
    step = jax.jit(make_train_step(config, graphdef), donate_argnums=0).lower(shapes, batch, controls(config)).compile()
    assert footprint(config).total == pytest.approx(compiled_memory(step), rel=0.25)


def test_expected_memory_of_a_part_is_within_25_percent_of_the_compiled_step():
    config, sizes = override(load("debug"), ESTIMATED["remat"]), Sizes(expert=2, context=2)
    mesh = mesh_of(sizes, jax.devices()[:4])
    shapes, graphdef = state_shapes(config)
    size, rows = (config.train.batch_size, config.data.sequence_length), NamedSharding(mesh, ROWS)
    names = {"inputs": "int32", "targets": "int32", "segments": "int32", "positions": "int32", "weights": "float32"}
    batch = {name: jax.ShapeDtypeStruct(size, dtype, sharding=rows) for name, dtype in names.items()}
    knobs = controls(config, stop_N=np.zeros(sizes.devices, np.int32))
    step = jax.jit(make_train_step(config, graphdef, mesh), donate_argnums=0)
    compiled = step.lower(shaped(config, mesh, shapes), batch, knobs).compile()
    assert footprint(config, sizes).total == pytest.approx(compiled_memory(compiled), rel=0.25)


def test_every_form_that_a_run_will_need_is_announced_and_refused_at_the_start(monkeypatch):
    blocks = ["--config.model.mod.scope=block", "--config.model.mod.capacity=0.3", "--config.data.sequence_length=512"]
    config = override(load("debug"), [*blocks, "--config.train.compute_dtype=bfloat16"])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert chosen_forms(config).startswith("attention: splash (auto: the fastest on tpu), chunked among the 154 tokens")
    # 512 tokens begin; at the first fall there are 468, of which splash makes no whole blocks
    asked = override(config, ["--config.model.mod.anneal_steps=100", "--config.model.attention_form=splash"])
    with pytest.raises(ConfigError, match=r"splash takes rows whose length is a multiple of 128, not 154; chunked"):
        chosen_forms(asked)


def test_compiled_memory_counts_arguments_and_results_that_reuse_none():
    array = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    fresh = jax.jit(lambda a: a + 1).lower(array).compile()
    reused = jax.jit(lambda a: a + 1, donate_argnums=0).lower(array).compile()
    assert (compiled_memory(fresh), compiled_memory(reused)) == (8_000_000, 4_000_000)


def test_peaks_are_of_this_machine():
    assert matmul_peak("float32", seconds=0.01) > 1e8
    assert peak_memory() > 50 << 20


def test_a_run_takes_the_mesh_that_the_one_rule_chooses_for_the_devices_at_hand(monkeypatch):
    config = tiny("moe", batch_size=8)
    config.mesh.auto = True
    monkeypatch.setattr("lumina_jax.device.memory_of_each", lambda: 1 << 30)
    trainer = Trainer(config)
    chosen, why = choose(config, unnamed("cpu", "cpu", 8), 1 << 30)
    assert trainer.why_mesh == why
    assert "speeds of cpu are not known: assumed " in trainer.forms()
    assert trainer.config == replace(chosen, mesh=replace(chosen.mesh, auto=False))
    monkeypatch.setattr(
        jax,
        "devices",
        lambda: [SimpleNamespace(device_kind="TPU v5 lite", platform="tpu", slice_index=i // 4) for i in range(8)],
    )
    assert at_hand() == Topology(CHIPS["v5e"], (4,), 2)
