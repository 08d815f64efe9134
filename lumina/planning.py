"""`lumina plan`: whether a config fits some devices, what it sends and how fast it could be, without the devices.

A process of its own compiles the real training step (`lumina_jax.plan`), as its platform is settled before JAX is imported.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lumina import plan_text
from lumina import topology as topologies
from lumina.config import Config, load, override, to_dict
from lumina.errors import ConfigError, UsageError
from lumina.footprint import Footprint, footprint
from lumina.layout import layouts, usable, with_mesh
from lumina.mesh import resolve
from lumina.roofline import Bounds, attention_flops, bounds, executed_flops, model_flops, step_seconds, touched_bytes
from lumina.topology import Topology
from lumina.traffic import transfers

COMPILER = "lumina_jax.plan"  # a program, not an import
USUAL = "of half a minute for small models to eight for large ones"  # measured on two busy cores
SHOWN = 8  # ways to split that a search tells
INSTALL = "pip install 'lumina[tpu]'"


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of `lumina plan`."""
    parser.add_argument("config", metavar="CONFIG", help="preset, .py, .json or .yaml file, or run directory; NAME:VARIANT")
    parser.add_argument(
        "--topology", default="cpu:1", metavar="KIND:SHAPE", help=f"such as {topologies.FORMS} (default: cpu:1)"
    )
    parser.add_argument("--tokens", type=float, metavar="N", help="budget, such as 3e11 (default: steps x batch x length)")
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=3,
        metavar="N",
        help="try every mesh, remat policy and micro-batches; compile the best N, and rank what fits (default: 3)",
    )
    parser.add_argument("--analytic", action="store_true", help="compile nothing: our own estimates alone")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


# ------------------------------------------------------------------------------------------------------------- compiler


def environment(topology: Topology) -> dict[str, str]:
    """Of the process that compiles: never a device but the processor, which counts as many."""
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    count = topology.devices if topology.chip.platform != "tpu" else 1
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    settings["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={count}"])
    return {**os.environ, **settings}


def compile_for(config: Config, topology: Topology, expected: float | None = None) -> dict[str, Any]:
    """What the compiler finds of the training step; see `lumina_jax.plan.examine`. Says how long it takes, on stderr.

    Raises:
        UsageError: libtpu is needed and not installed.
        ConfigError: the step cannot be compiled.
    """
    if topology.chip.platform == "tpu" and not importlib.util.find_spec("libtpu"):
        raise UsageError(f"--topology {topology}: compiling for TPU needs libtpu: {INSTALL}; or add --analytic")
    with tempfile.TemporaryDirectory(prefix="lumina-plan-") as directory:
        answer = Path(directory, "answer.json")
        request = {
            "config": to_dict(config),
            "platform": topology.chip.platform,
            "layout": topology.layout,
            "slices": topology.slices,
            "devices": topology.devices,
            "answer": str(answer),
        }
        asked, said = Path(directory, "request.json"), Path(directory, "stderr")
        asked.write_text(json.dumps(request), encoding="utf-8")
        with asked.open(encoding="utf-8") as stdin, said.open("w", encoding="utf-8") as stderr:
            command = [sys.executable, "-m", COMPILER]
            process = subprocess.Popen(command, stdin=stdin, stdout=stderr, stderr=stderr, env=environment(topology))  # noqa: S603, ourselves
            try:
                _wait(process, f"compiling for {topology}", expected)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if process.returncode:
            last = [line for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            why = last[-1] if last else f"it ended with {process.returncode} and said nothing"
            raise ConfigError(f"--topology {topology}: the training step cannot be compiled: {why}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _wait(process: subprocess.Popen, what: str, expected: float | None) -> None:
    """Until it ends; after a few seconds with a line on stderr, in place on a terminal."""
    began, terminal = time.monotonic(), sys.stderr.isatty()
    told = 0.0
    while True:
        try:
            process.wait(timeout=1.0)
            break
        except subprocess.TimeoutExpired:
            passed = time.monotonic() - began
        if passed < 3 or (not terminal and passed - told < 30):
            continue
        told = passed
        left = f"about {max(0, expected - passed):.0f} s left" if expected else USUAL
        start, end = ("\r", "") if terminal else ("", "\n")
        print(f"{start}{what}: {passed:.0f} s, {left}   ", end=end, file=sys.stderr, flush=True)
    if terminal and told:
        print(file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------- plan


def plan(
    config: Config, topology: Topology, tokens: float | None = None, analytic: bool = False, expected: float | None = None
) -> dict[str, Any]:
    """All that is known of training `config` on `topology`, of one device and one step where it does not say otherwise.

    Raises ConfigError where the mesh, the model and the batch do not divide.
    """
    sizes = resolve(config, topology.devices)
    parts, sent = footprint(config, sizes), transfers(config, sizes)
    found = None if analytic or too_large(config, topology) else compile_for(config, topology, expected)
    flops, touched = executed_flops(config), touched_bytes(config, sizes, parts)
    train, T = config.train, config.data.sequence_length
    budget = tokens or train.steps * train.batch_size * T
    result: dict[str, Any] = {
        "topology": str(topology),
        "chips": topology.chips,
        "devices": sizes.devices,
        "mesh": sizes._asdict(),
        "rows": train.batch_size,
        "micro_batches": train.micro_batches,
        "sequence_length": T,
        "remat": train.remat,
        "compiled": compiled_how(topology, found),
        "memory": memory_of(topology, parts, found),
        "flops": {"model": model_flops(config), "executed": flops},
        "collectives": [each._asdict() for each in sent],
        "constants": topology.chip.constants(),
    }
    if found:
        result["collectives_traced"] = found["traced"]["collectives"]
        result["flops"] |= flops_found(config, found, sizes.devices)
        result["kernels"] = found["kernels"]
        result["seconds"] = found["seconds"]
    if topology.chip.peak_flops:
        result["roofline"] = times(config, bounds(topology, sizes, flops, touched, sent), topology, budget)
        result["roofline"]["expected"] = step_seconds(config, topology, sizes, parts, sent)
    return result


def too_large(config: Config, topology: Topology) -> bool:
    """Whether the processor's compiler, which stands in where there is no other, would take too long."""
    return topology.chip.platform != "tpu" and (topology.devices > 64 or config.data.sequence_length > 8192)


def compiled_how(topology: Topology, found: dict[str, Any] | None) -> str:
    """By which compiler, in words."""
    if not found:
        return "nothing: our own estimates alone"
    by = f"by jax {found['versions']['jax']}"
    if topology.chip.platform == "gpu":
        return f"for {topology.devices} virtual devices of a processor, {by}: a GPU's compiler lays a program out otherwise"
    return f"for {topology.chip.platform}, {by}"


def memory_of(topology: Topology, parts: Footprint, found: dict[str, Any] | None) -> dict[str, Any]:
    """Whether it fits: by the compiler's word where there is one, else by our estimate against the datasheet."""
    told: dict[str, Any] = {"estimate": {**parts._asdict(), "total": parts.total}}
    needed, available = parts.total, topology.chip.device_memory
    if found:
        told["state"] = found["state"]
        if refused := found.get("refused"):
            needed, available = refused["needed_bytes"], refused["available_bytes"]
        else:
            told["compiler"] = found["memory"]
            needed = found["memory"]["total"]
    told |= {"needed": needed, "available": available}
    told["fits"] = None if not available else not (found and "refused" in found) and needed <= available
    return told


def flops_found(config: Config, found: dict[str, Any], devices: int) -> dict[str, Any]:
    """The same FLOPs by other counts, of all devices."""
    traced, compiler = found["traced"], (found.get("cost") or {}).get("flops")
    kernels = attention_flops(config) if traced["kernels"] else 0
    return {
        "traced": traced["flops"] * devices + kernels,
        "of_them_in_kernels": kernels,
        "compiler": round(compiler * devices) if compiler else None,
        "why": "traced counts the program's matrix products with the trip counts of its loops, and attention's kernels by "
        "our own formula; the compiler counts the body of a loop once, and a kernel as nothing",
    }


def times(config: Config, bound: Bounds, topology: Topology, budget: float) -> dict[str, Any]:
    """Seconds of a step, MFU, and what the budget of tokens takes, at best and with nothing overlapped."""
    tokens = config.train.batch_size * config.data.sequence_length
    told: dict[str, Any] = {**bound._asdict(), "binding": bound.binding, "token_budget": budget}
    for name in ("at_best", "in_turn"):
        seconds = getattr(bound, name)
        told[name] = {
            "seconds": seconds,
            "mfu": model_flops(config) / (seconds * topology.chips * topology.chip.peak_flops),
            "tokens_a_day": tokens / seconds * 86_400,
            "days": budget / tokens * seconds / 86_400,
            "chip_hours": budget / tokens * seconds / 3600 * topology.chips,
        }
    return told


def tell(arguments: argparse.Namespace) -> None:
    """Run `lumina plan`."""
    for flag, value in (("--tokens", arguments.tokens), ("--search", arguments.search)):
        if value is not None and not value > 0:
            raise UsageError(f"{flag} = {value:g}: must be above 0")
    topology = topologies.parse(arguments.topology)
    config = override(load(arguments.config), arguments.overrides)
    named = {"config": arguments.config}
    if arguments.search:
        found = named | searched(config, topology, arguments.tokens, 0 if arguments.analytic else arguments.search)
        print(json.dumps(found, indent=2) if arguments.json else plan_text.ranking(found))
        return
    config, why = with_mesh(config, topology, topology.chip.device_memory)
    found = named | plan(config, topology, arguments.tokens, arguments.analytic) | {"chosen": why}
    print(json.dumps(found, indent=2) if arguments.json else plan_text.page(found))


def searched(config: Config, topology: Topology, tokens: float | None, compiled: int) -> dict[str, Any]:
    """Plans of the best ways to split `config`, those that were compiled first; of the others only our estimates.

    Raises:
        UsageError: no datasheet tells the memory of such a device.
        ConfigError: nothing fits.
    """
    if not topology.chip.device_memory:
        raise UsageError(
            f"--topology {topology}: --search needs the memory of a device, which no datasheet tells of a processor"
        )
    limit = usable(topology.chip.device_memory)
    found = [each for each in layouts(config, topology, topology.chip.device_memory) if each.needed <= limit]
    if not found:
        raise ConfigError(
            f"--topology {topology}: no mesh, remat policy and micro-batches fit; use more devices or shorter rows"
        )
    plans, took = [], 0.0
    for number, candidate in enumerate(found[: max(compiled, SHOWN)]):
        expected = took / number if number else None
        plans.append(plan(candidate.of(config), topology, tokens, number >= compiled, expected))
        took += sum(plans[-1].get("seconds", {}).values())
    return {"topology": str(topology), "tried": len(found), "plans": sorted(plans, key=lambda p: not p["memory"]["fits"])}
