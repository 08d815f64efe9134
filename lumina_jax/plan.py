"""Compile a training step for devices that are not at hand, and tell what the compiler knows of it.

`lumina plan` runs this as a process of its own, as the platform must be settled before JAX is imported: a request comes as JSON
on standard input, the findings go as one JSON object to the file that it names. No array of the model's size is ever made.
"""

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lumina.config import Config, from_dict
from lumina_jax.census import census
from lumina_jax.device import forms
from lumina_jax.mesh import EACH, ROWS, make_mesh, shaped
from lumina_jax.platform import compiling_for
from lumina_jax.step import controls, make_train_step, state_shapes

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def topology_devices(layout: str, slices: int) -> list[Any]:
    """Devices of a TPU topology that need not exist, from libtpu."""
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(layout, platform="tpu", **more).devices


def step_inputs(config: Config, mesh: Mesh) -> tuple[Any, dict[str, Any], Any]:
    """(state, batch, controls) of a training step, as shapes with shardings: nothing is made."""
    state = shaped(config, mesh, state_shapes(config)[0])
    rows, each = (NamedSharding(mesh, spec) for spec in (ROWS, EACH))
    size = (config.train.batch_size, config.data.sequence_length)
    batch = {
        name: jax.ShapeDtypeStruct(size, jnp.float32 if name == "weights" else jnp.int32, sharding=rows)
        for name in ("inputs", "targets", "weights", "segments", "positions")
    }
    return state, batch, controls(config, True, jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=each))


def trace_step(config: Config, devices: list[Any]) -> tuple[Any, Any]:
    """(the step that training compiles, traced; the state as shapes with shardings)."""
    mesh = make_mesh(config, devices)
    inputs = step_inputs(config, mesh)
    token_bytes = np.zeros(config.model.vocab_size, np.int32)
    step = jax.jit(make_train_step(config, state_shapes(config)[1], mesh, token_bytes), donate_argnums=0)
    return step.trace(*inputs), inputs[0]


def state_bytes(state: Any) -> dict[str, int]:
    """Bytes of the state that one device holds, by part, and those that it keeps in its host's memory."""

    def on_one(tree: Any, away: bool = False) -> int:
        arrays = [a for a in jax.tree.leaves(tree) if (a.sharding.memory_kind == "pinned_host") == away]
        return sum(int(np.prod(a.sharding.shard_shape(a.shape))) * a.dtype.itemsize for a in arrays)

    found = {"parameters": on_one(state.variables), "optimizer": on_one(state.optimizer)}
    return {**found, "host": away} if (away := on_one(state, away=True)) else found


def refused_sizes(message: str) -> dict[str, int] | None:
    """What the TPU compiler says of a program that its memory does not hold; None if it says something else."""
    forms = (
        r"Used ([0-9.]+)([KMGT]?) of ([0-9.]+)([KMGT]?) hbm",
        r"\(([0-9.]+)([KMGT]?)\) exceeds available HBM \(([0-9.]+)([KMGT]?)\)",
    )
    found = re.search(forms[0], message) or re.search(forms[1], message)
    if not found:
        return None
    used, has = (round(float(found[i]) * UNITS[found[i + 1]]) for i in (1, 3))
    return {"needed_bytes": used, "available_bytes": has, "over_bytes": used - has}


def assigned_bytes(directory: str) -> int | None:
    """Bytes of a device's memory that libtpu assigned to buffers, arguments among them, by the report that it wrote there.

    By this it refuses a program. Its memory analysis has more, as temporaries count some of what loops carry twice, or a little
    less, at the peak, without the gaps between buffers (docs/log.md).
    """
    for report in Path(directory).glob("*memory-usage-report.txt"):
        if found := re.search(r"^Memory Space: default \(color=0\)\nTotal bytes: ([0-9]+)", report.read_text(errors="replace")):
            return int(found[1])
    return None


def compiled_sizes(compiled: Any, assigned: int | None = None) -> dict[str, int]:
    """Bytes on one device by the compiler's own account: what was `assigned` to buffers where that is known."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    told: dict[str, int] = {} if assigned is None else {"assigned": assigned}
    temporaries = sizes.temp_size_in_bytes if assigned is None else assigned - sizes.argument_size_in_bytes - results
    return told | {
        "arguments": sizes.argument_size_in_bytes,
        "results": results,
        "temporaries": temporaries,
        "program": sizes.generated_code_size_in_bytes,
        "total": sizes.argument_size_in_bytes + results + temporaries + sizes.generated_code_size_in_bytes,
    }


def compile_and_size(lowered: Any, platform: str) -> tuple[Any, dict[str, int]]:
    """The compiled program, and its sizes. On TPU the compiler writes its report into a directory that is then removed."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled_sizes(compiled)
    with tempfile.TemporaryDirectory(prefix="lumina-plan-") as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "^$"}
        compiled = lowered.compile(compiler_options=options)
        if (assigned := assigned_bytes(directory)) is None:
            print("libtpu wrote no report of its memory: temporaries are an upper bound", file=sys.stderr)
        return compiled, compiled_sizes(compiled, assigned)


def examine(config: Config, platform: str, devices: list[Any]) -> dict[str, Any]:
    """Trace and compile the step of `config` on a mesh of `devices`; everything told is of one device and one step."""
    began = time.perf_counter()
    with compiling_for(platform):
        traced, state = trace_step(config, devices)
        counted = census(traced.jaxpr)
        lowered = traced.lower()
    between = time.perf_counter()
    found: dict[str, Any] = {
        "platform": platform,
        "kernels": [{"what": what, "form": form, "why": why} for what, form, why in forms(config, platform)],
        "state": state_bytes(state),
        "traced": {
            "flops": counted.flops,
            "kernels": counted.kernels,
            "collectives": [
                {"kind": kind, "axes": list(axes), "bytes": size, "count": count}
                for (kind, axes), (size, count) in counted.collectives.items()
            ],
            "constant_bytes": counted.constants,
            "equations": counted.equations,
        },
        "versions": {"jax": jax.__version__},
    }
    try:
        compiled, memory = compile_and_size(lowered, platform)
    except jax.errors.JaxRuntimeError as error:
        refused = refused_sizes(str(error))
        if refused is None:
            raise
        found["refused"] = refused
    else:
        found["memory"] = memory
        cost = compiled.cost_analysis() or {}
        found["cost"] = {"flops": cost.get("flops"), "bytes": cost.get("bytes accessed")}
    found["seconds"] = {"trace": between - began, "compile": time.perf_counter() - between}
    return found


def main() -> None:
    """Read a request, answer it."""
    request = json.load(sys.stdin)
    config = from_dict(request["config"])
    if request["platform"] == "tpu":
        devices = topology_devices(request["layout"], request["slices"])
    else:
        devices = jax.devices()[: request["devices"]]
    Path(request["answer"]).write_text(json.dumps(examine(config, request["platform"], devices)), encoding="utf-8")


if __name__ == "__main__":
    main()
