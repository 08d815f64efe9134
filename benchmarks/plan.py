"""Predicted against measured memory, and compile time by depth: benchmarks/plan.py   (prints one JSON object)

For each config and mesh, on virtual devices of the processor: our estimate, what the compiler says, and what the process really
holds while two steps run. `--topology v5p:2x2x1` compiles 8 and 120 layers for a TPU instead (needs libtpu).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FEW = ["--config.train.batch_size=8", "--config.train.micro_batches=1"]
EXPERTS = ["--config.model.moe.pattern=all", "--config.model.moe.num_experts=4", "--config.model.d_ff=512"]
DEPTH = ["--config.model.mod.pattern=all", "--config.model.mod.capacity=0.5", "--config.train.remat=full"]
CASES = {
    "dense, one device": ["--config.mesh.data=1"],
    "dense, data 8": ["--config.mesh.data=8"],
    "dense, fsdp 8": ["--config.mesh.data=1", "--config.mesh.fsdp=8"],
    "dense, data 2 tensor 2": ["--config.mesh.data=2", "--config.mesh.tensor=2"],
    "experts, data 8": ["--config.mesh.data=8", *EXPERTS],
    "experts, fsdp 4 tensor 2": ["--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2", *EXPERTS],
    "experts and depth, remat, data 8": ["--config.mesh.data=8", *EXPERTS, *DEPTH],
    "experts and depth, remat, fsdp 2 expert 4": [
        "--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.expert=4", *EXPERTS, *DEPTH
    ],
}  # fmt: skip


def main() -> None:
    """Measure each case in a process of its own, as memory once held is not given back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--topology", help="compile time of 8 and 120 layers there")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.topology:
        print(json.dumps(depths(arguments.preset, arguments.topology), indent=2))
        return
    if arguments.case:
        print(json.dumps(measure(arguments.preset, CASES[arguments.case])))
        return
    found = {}
    flags = "--xla_force_host_platform_device_count=8"
    for case in CASES:
        command = [sys.executable, str(Path(__file__)), "--preset", arguments.preset, "--case", case]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603, ourselves
        found[case] = json.loads(done.stdout)
        print(f"{case}: {found[case]}", file=sys.stderr)
    print(json.dumps({"preset": arguments.preset, "cases": found}, indent=2))


def measure(preset: str, flags: list[str]) -> dict[str, float]:
    """Bytes of all devices together; measured from when only the programs are there to the most while they run."""
    import ctypes

    import jax

    from lumina.config import load, override
    from lumina.footprint import footprint
    from lumina.mesh import resolve
    from lumina_jax.mesh import make_mesh
    from lumina_jax.plan import compiled_sizes, step_inputs, trace_step
    from lumina_jax.step import init_state

    config = override(load(preset), [*FEW, *flags])
    sizes, like = resolve(config, jax.device_count()), step_inputs(config, make_mesh(config))
    step = trace_step(config, jax.devices())[0].lower().compile()

    def fresh():
        zeros = jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype) if hasattr(a, "shape") else a, like[1:])
        return init_state(config)[1], *zeros

    lie = jax.tree.map(lambda a: getattr(a, "sharding", None), like)
    make = jax.jit(fresh, out_shardings=lie).lower().compile()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    state, *inputs = make()
    jax.block_until_ready((state, inputs))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the most that was held starts anew
    for _ in range(2):
        state, metrics = step(state, *inputs)
        jax.block_until_ready((state, metrics))
    measured = _status("VmHWM") - before
    told = compiled_sizes(step)
    compiler, estimate = (told["total"] - told["program"]) * sizes.devices, footprint(config, sizes).total * sizes.devices
    return {
        "estimate": estimate,
        "compiler": compiler,
        "measured": measured,
        "estimate_over_compiler": round(estimate / compiler, 3),
        "compiler_over_measured": round(compiler / measured, 3),
    }


def _status(name: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def depths(preset: str, topology: str) -> dict[str, object]:
    """Seconds to trace and compile 8 and 120 layers of a preset."""
    from lumina.config import load, override
    from lumina.planning import compile_for
    from lumina.topology import parse

    found = {}
    for layers in (8, 120):
        config = override(load(preset), [f"--config.model.num_layers={layers}", "--config.mesh.data=1", "--config.mesh.fsdp=4"])
        found[layers] = compile_for(config, parse(topology))["seconds"]
    ratio = sum(found[120].values()) / sum(found[8].values())
    return {"preset": preset, "topology": topology, "seconds": found, "120_over_8": round(ratio, 3)}


if __name__ == "__main__":
    main()
