"""The step that is compiled for devices that are not at hand: what is told of it, against what is there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lumina.config import load, override, to_dict
from lumina.footprint import footprint
from lumina.mesh import resolve
from lumina.planning import environment
from lumina.roofline import executed_flops
from lumina.topology import parse
from lumina_jax.census import census
from lumina_jax.plan import assigned_bytes, compiled_sizes, examine, refused_sizes, trace_step
from lumina_jax.platform import compiling_for, target_platform
from tests.lumina_jax.tiny import tiny

FEW = ["--config.model.num_layers=3", "--config.train.batch_size=8", "--config.train.micro_batches=1"]
EXPERTS = ["--config.model.moe.pattern=all", "--config.model.moe.num_experts=4", "--config.model.d_ff=512"]
SPLIT = {
    "dense on one device": ["--config.mesh.data=1"],
    "experts over data": ["--config.mesh.data=8", *EXPERTS],
    "experts over fsdp and tensor": ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", *EXPERTS],
}


@pytest.mark.parametrize("flags", SPLIT.values(), ids=SPLIT.keys())
def test_expected_memory_is_within_15_percent_of_the_compiled_step(flags):
    config = override(load("tiny"), [*FEW, *flags])
    found = examine(config, "cpu", jax.devices())
    estimate = footprint(config, resolve(config, 8))
    assert found["state"]["parameters"] == estimate.parameters
    assert found["state"]["optimizer"] == pytest.approx(estimate.optimizer, rel=1e-3)  # it counts its steps too
    assert estimate.total == pytest.approx(found["memory"]["total"] - found["memory"]["program"], rel=0.15)


def test_no_array_of_the_models_size_is_made_and_none_is_embedded():
    config = override(load("b300"), ["--config.mesh.data=1", "--config.data.sequence_length=1024"])
    before = {id(array) for array in jax.live_arrays()}
    traced, state = trace_step(config, jax.devices()[:1])
    assert sum(a.size for a in jax.tree.leaves(state.variables)) > 2e12
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(state))
    assert sum(a.nbytes for a in jax.live_arrays() if id(a) not in before) < 1e6
    assert census(traced.jaxpr).constants <= 4 * config.model.vocab_size  # bytes of text a token stands for


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("kind", ["dense", "moe+mod"])
def test_our_count_of_products_is_that_of_the_traced_step(kind, remat):
    config = tiny(kind, model={"attention_form": "reference"}, remat=remat)
    T = config.data.sequence_length
    traced, _ = trace_step(override(config, ["--config.mesh.data=1"]), jax.devices()[:1])
    # The reference computes all scores, of which a causal count has (T + 1) / 2T.
    passes = 4 if remat == "full" else 3
    model, tokens = config.model, config.train.batch_size * T
    hidden = passes * model.num_layers * tokens * 4 * model.num_heads * model.head_dim * (T - 1) / 2
    assert census(traced.jaxpr).flops == pytest.approx(executed_flops(config) + hidden, rel=0.01)


def test_a_deep_model_is_no_longer_program_than_a_shallow_one():
    def equations(layers):
        flags = [f"--config.model.num_layers={layers}", "--config.train.remat=full", "--config.mesh.data=1"]
        return census(trace_step(override(load("debug"), flags), jax.devices()[:1])[0].jaxpr).equations

    assert equations(120) <= 1.3 * equations(8)


def test_kernels_are_those_of_the_platform_that_is_compiled_for():
    assert target_platform() == "cpu"
    config = override(load("debug"), ["--config.mesh.data=1"])
    with compiling_for("tpu"):
        assert target_platform() == "tpu"
        kernels = census(trace_step(config, jax.devices()[:1])[0].jaxpr).kernels
    assert target_platform() == "cpu"
    assert sum("fwd" in name for name in kernels) == 1
    assert kernels[next(name for name in kernels if "fwd" in name)] == config.model.num_layers
    assert not census(trace_step(config, jax.devices()[:1])[0].jaxpr).kernels


@pytest.mark.parametrize(
    ("message", "sizes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (167.28G) exceeds "
            "available HBM (15.75G).",
            (167.28, 15.75),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 113.40G of "
            "95.74G hbm. Exceeded hbm capacity by 17.66G.",
            (113.40, 95.74),
        ),
    ],
)
def test_a_refusal_for_memory_tells_the_sizes(message, sizes):
    found = refused_sizes(message)
    assert found is not None
    assert (found["needed_bytes"] / 2**30, found["available_bytes"] / 2**30) == pytest.approx(sizes)
    assert found["over_bytes"] == found["needed_bytes"] - found["available_bytes"]


def test_a_tpus_temporaries_are_what_it_assigned_beyond_the_arguments(tmp_path):
    report = tmp_path / "module_0000.jit_step.cl_1.after_optimizations-memory-usage-report.txt"
    other = "Memory Space: (color=1)\nTotal bytes: 117440512 (112.00MiB)\n"
    report.write_text(f"Memory Space: default (color=0)\nTotal bytes: 2013265920 (1.88GiB)\n\n{other}")
    (tmp_path / "module_0000.jit_step.cl_1.after_optimizations.txt").write_text("Total bytes: 1")
    assert assigned_bytes(str(tmp_path)) == 1920 << 20
    assert assigned_bytes(str(tmp_path / "none")) is None
    analysis = SimpleNamespace(  # of a scan whose carries are stacked, for v5e: 1,664 MiB were assigned beyond the arguments
        argument_size_in_bytes=256 << 20,
        output_size_in_bytes=256 << 20,
        alias_size_in_bytes=256 << 20,
        temp_size_in_bytes=1920 << 20,
        generated_code_size_in_bytes=1 << 20,
    )
    program = SimpleNamespace(memory_analysis=lambda: analysis)
    found = compiled_sizes(program, 1920 << 20)
    assert (found["temporaries"], found["total"], found["assigned"]) == (1664 << 20, 1921 << 20, 1920 << 20)
    assert compiled_sizes(program)["total"] == (256 + 1920 + 1) << 20


def test_another_error_is_not_taken_for_a_lack_of_memory():
    assert refused_sizes("INVALID_ARGUMENT: Mosaic failed to compile TPU kernel") is None


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="compiling for TPU needs libtpu: pip install 'lumina[tpu]'")
def test_a_step_is_compiled_for_a_tpu_that_is_not_there(tmp_path):
    topology = parse("v5e:2x2")
    config = override(load("debug"), ["--config.mesh.data=2", "--config.mesh.expert=2"])
    answer = Path(tmp_path, "answer.json")
    request = {"config": to_dict(config), "platform": "tpu", "layout": topology.layout, "slices": 1, "answer": str(answer)}
    command = [sys.executable, "-m", "lumina_jax.plan"]
    subprocess.run(command, input=json.dumps(request), env=environment(topology), text=True, check=True, capture_output=True)
    found = json.loads(answer.read_text(encoding="utf-8"))
    assert found["memory"]["arguments"] > sum(found["state"].values()) * 0.99
    assert any("splash" in name for name in found["traced"]["kernels"])
    assert "JAX_PLATFORMS" not in os.environ or os.environ["JAX_PLATFORMS"] == "cpu"
